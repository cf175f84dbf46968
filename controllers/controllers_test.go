package controllers_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/controllers"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/registry/registrytest"
)

var _ = registrytest.Behaves("Kubernetes", func(ctx context.Context) registrytest.Source { return newNamespace(ctx) })

// namespace is a namespace of its own for a spec, with the manager's role bound to a user in it.
type namespace struct {
	name     string
	user     *rest.Config
	status   *statuses
	verifier *verifier

	cleaner     *cleaner
	cleanupWait time.Duration
	interval    time.Duration // of the status; default 50 ms
	watched     []string      // other namespaces

	mgr     manager.Manager     // of the last Start
	options controllers.Options // likewise
}

func newNamespace(ctx context.Context) *namespace {
	GinkgoHelper()
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "spec-"}}
	Expect(admin.Create(ctx, object)).To(Succeed())
	n := &namespace{name: object.Name, status: &statuses{}}
	var err error
	n.user, err = cluster.As("manager-of-" + n.name)
	Expect(err).NotTo(HaveOccurred())
	n.bindRoles(ctx)
	return n
}

// bindRoles gives the user the generated roles, and nothing else.
func (n *namespace) bindRoles(ctx context.Context) {
	GinkgoHelper()
	text, err := os.ReadFile(filepath.Join("..", "config", "rbac", "role.yaml"))
	Expect(err).NotTo(HaveOccurred())
	documents := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096)
	subject := []rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: "manager-of-" + n.name}}
	for {
		var document json.RawMessage
		if err := documents.Decode(&document); errors.Is(err, io.EOF) {
			return
		} else {
			Expect(err).NotTo(HaveOccurred())
		}
		var kind metav1.TypeMeta
		Expect(json.Unmarshal(document, &kind)).To(Succeed())
		switch kind.Kind {
		case "ClusterRole":
			var role rbacv1.ClusterRole
			Expect(json.Unmarshal(document, &role)).To(Succeed())
			role.Name = n.name
			Expect(admin.Create(ctx, &role)).To(Succeed())
			Expect(admin.Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: n.name}, Subjects: subject,
				RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: n.name}})).To(Succeed())
		case "Role":
			var role rbacv1.Role
			Expect(json.Unmarshal(document, &role)).To(Succeed())
			Expect(role.Namespace).To(Equal("system"))
			role.Namespace = n.name
			Expect(admin.Create(ctx, &role)).To(Succeed())
			Expect(admin.Create(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: role.Name, Namespace: n.name}, Subjects: subject,
				RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name}})).To(Succeed())
		default:
			Fail("role.yaml holds a " + kind.Kind)
		}
	}
}

func (n *namespace) Namespace() string { return n.name }

func (n *namespace) put(ctx context.Context, o registrytest.Object) error {
	wanted := o.DeepCopyObject().(client.Object)
	present := o.DeepCopyObject().(client.Object)
	err := admin.Get(ctx, client.ObjectKeyFromObject(wanted), present)
	if client.IgnoreNotFound(err) != nil {
		return err
	}
	if err != nil {
		return admin.Create(ctx, wanted)
	}
	wanted.SetResourceVersion(present.GetResourceVersion())
	return admin.Update(ctx, wanted)
}

// bind gives the manager of another namespace the namespaced rights here, too.
func (n *namespace) bind(ctx context.Context, manager *namespace) {
	GinkgoHelper()
	Expect(admin.Create(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: n.name, Name: manager.name},
		Subjects: []rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: "manager-of-" + manager.name}},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "db-controller"}})).To(Succeed())
}

// conflicts with a status patch of the controllers are those of any client: read again.
func (n *namespace) Put(ctx context.Context, o registrytest.Object) {
	GinkgoHelper()
	Eventually(func() error { return n.put(ctx, o) }, registrytest.Patience).Should(Succeed())
}

func (n *namespace) PutRefused(ctx context.Context, o registrytest.Object, message string) {
	GinkgoHelper()
	Eventually(func() error { return n.put(ctx, o) }, registrytest.Patience).Should(MatchError(ContainSubstring(message)))
}

func (n *namespace) Touch(ctx context.Context, o registrytest.Object) {
	GinkgoHelper()
	touched := o.DeepCopyObject().(client.Object)
	Expect(admin.Patch(ctx, touched, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"touched":"yes"}}}`)))).To(Succeed())
}

func (n *namespace) Delete(ctx context.Context, o registrytest.Object) {
	GinkgoHelper()
	Expect(admin.Delete(ctx, o.DeepCopyObject().(client.Object))).To(Succeed())
}

func (n *namespace) Start(context.Context) (*registry.Registry, registry.Secrets, func()) {
	GinkgoHelper()
	namespaces := map[string]cache.Config{}
	for _, name := range append(n.watched, n.name) {
		namespaces[name] = cache.Config{}
	}
	mgr, err := ctrl.NewManager(n.user, ctrl.Options{
		Scheme:     scheme,
		Metrics:    metricsserver.Options{BindAddress: "0"},
		Cache:      cache.Options{DefaultNamespaces: namespaces},
		Controller: config.Controller{SkipNameValidation: new(true)}, // each spec has a manager of its own
	})
	Expect(err).NotTo(HaveOccurred())
	reg := registry.New()
	options := controllers.Options{Region: "eu", Registry: reg, Status: n.status, StatusInterval: cmp.Or(n.interval, 50*time.Millisecond)}
	if n.verifier != nil {
		options.Verifier = n.verifier
	}
	if n.cleaner != nil {
		options.Cleaner, options.CleanupWait = n.cleaner, n.cleanupWait
	}
	Expect(controllers.Add(mgr, options)).To(Succeed())
	n.mgr, n.options = mgr, options
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		Expect(<-done).To(Succeed())
	})
	DeferCleanup(stop)
	return reg, controllers.NewSecrets(mgr.GetAPIReader()), stop
}

// replay shows the controller an object as a cache that is behind might.
func (n *namespace) replay(ctx context.Context, d *v1alpha1.Deployment) error {
	return controllers.Replay(ctx, n.mgr, n.options, d.DeepCopy())
}

// happened returns the events of the namespace.
func (n *namespace) happened(ctx context.Context) func() []string {
	return func() []string {
		var list eventsv1.EventList
		Expect(admin.List(ctx, &list, client.InNamespace(n.name))).To(Succeed())
		var reasons []string
		for _, e := range list.Items {
			reasons = append(reasons, e.Regarding.Name+" "+e.Reason)
		}
		return reasons
	}
}

// statuses stands for the store and the syncers, which are not what is tested here.
type statuses struct {
	mu      sync.Mutex
	serving controllers.Serving
	peers   []v1alpha1.PeerStatus
}

func (s *statuses) set(serving controllers.Serving, peers ...v1alpha1.PeerStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serving, s.peers = serving, peers
}

func (s *statuses) PeerStatuses(_, _ string) []v1alpha1.PeerStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]v1alpha1.PeerStatus(nil), s.peers...)
}

func (s *statuses) Serving(_, _ string) controllers.Serving {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serving
}

func seconds(s float64) *metav1.Duration {
	return &metav1.Duration{Duration: time.Duration(s * float64(time.Second))}
}

var _ = Describe("the status of", func() {
	var n *namespace
	BeforeEach(func(ctx context.Context) { n = newNamespace(ctx) })

	status := func(ctx context.Context, name string) func() v1alpha1.DeploymentStatus {
		return func() v1alpha1.DeploymentStatus {
			var d v1alpha1.Deployment
			Expect(admin.Get(ctx, client.ObjectKey{Namespace: n.name, Name: name}, &d)).To(Succeed())
			if d.Status.ObservedGeneration != d.Generation {
				return v1alpha1.DeploymentStatus{}
			}
			return d.Status
		}
	}
	condition := func(ctx context.Context, name, conditionType string) func() string {
		return func() string {
			c := meta.FindStatusCondition(status(ctx, name)().Conditions, conditionType)
			if c == nil {
				return "not set"
			}
			return string(c.Status) + " " + c.Reason + ": " + c.Message
		}
	}
	eventually := func(f func() string, prefix, text string) {
		GinkgoHelper()
		Eventually(f, registrytest.Patience).Should(And(HavePrefix(prefix), ContainSubstring(text)))
	}
	secret := func(ctx context.Context, name string, data map[string][]byte) {
		GinkgoHelper()
		Expect(admin.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: n.name, Name: name}, Data: data})).To(Succeed())
	}

	It("a Deployment of the own region: its life", func(ctx context.Context) {
		n.Put(ctx, registrytest.Deployment(n, "eu", "eu"))
		n.Put(ctx, registrytest.Deployment(n, "us", "us"))
		reg, _, _ := n.Start(ctx)

		By("the first visit: all conditions are there")
		Eventually(status(ctx, "eu"), registrytest.Patience).Should(HaveField("Conditions", HaveLen(14)))
		for _, c := range status(ctx, "eu")().Conditions {
			Expect(c.ObservedGeneration).To(BeEquivalentTo(1))
		}
		eventually(condition(ctx, "eu", "Ready"), "False DescriptorNotFound", registrytest.Service)
		eventually(condition(ctx, "eu", "Stalled"), "True DescriptorNotFound", registrytest.Service)
		eventually(condition(ctx, "eu", "PeersReachable"), "Unknown Pending", "us")
		eventually(condition(ctx, "eu", "InitialSyncComplete"), "False Syncing", "us")

		By("the descriptor comes, the secret is missing")
		n.Put(ctx, registrytest.Descriptor(n, "packages"))
		eventually(condition(ctx, "eu", "Ready"), "False SecretNotFound", "spec.database.secretRef: get secret "+n.name+"/eu-db")
		eventually(condition(ctx, "eu", "CredentialsValid"), "False SecretNotFound", "eu-db")

		By("the secret comes, without the key and then with it")
		secret(ctx, "eu-db", map[string][]byte{"url": []byte("x")})
		eventually(condition(ctx, "eu", "CredentialsValid"), "False SecretNotFound", `key "dsn"`)
		Expect(admin.Update(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: n.name, Name: "eu-db"}, Data: map[string][]byte{"dsn": []byte("host=/tmp")}})).To(Succeed())
		eventually(condition(ctx, "eu", "CredentialsValid"), "True", "")
		eventually(condition(ctx, "eu", "Ready"), "Unknown Pending", "being opened")
		eventually(condition(ctx, "eu", "Stalled"), "False", "")
		eventually(condition(ctx, "eu", "Reconciling"), "True Pending", "v1 is not served yet")

		By("the database does not answer, then the first copy runs, then all is well")
		n.status.set(controllers.Serving{Err: errors.New("connection refused")})
		eventually(condition(ctx, "eu", "Ready"), "False DatabaseUnavailable", "connection refused")
		n.status.set(controllers.Serving{Version: "v1", OwnedShards: 4096}, v1alpha1.PeerStatus{Region: "us", ContactAge: seconds(0.1), PendingRows: 7})
		eventually(condition(ctx, "eu", "Ready"), "False Syncing", "us")
		eventually(condition(ctx, "eu", "Reconciling"), "True Syncing", "us")
		n.status.set(controllers.Serving{Version: "v1", OwnedShards: 4096},
			v1alpha1.PeerStatus{Region: "us", ContactAge: seconds(0.1), Freshness: seconds(0.2104999), ApplyLag: seconds(0)},
			v1alpha1.PeerStatus{Region: "nowhere", ContactAge: seconds(1)})
		eventually(condition(ctx, "eu", "Ready"), "True Available", "serving v1")
		eventually(condition(ctx, "eu", "Reconciling"), "False", "")
		Expect(status(ctx, "eu")()).To(And(
			HaveField("CurrentVersion", "v1"), HaveField("PeersInSync", "1/1"), HaveField("Lag", HaveValue(Equal(metav1.Duration{Duration: 210 * time.Millisecond}))),
			HaveField("Shards.Summary", "4096/4096"), HaveField("Peers", HaveLen(1))))

		By("the peer lags, then falls silent, then comes back")
		n.status.set(controllers.Serving{Version: "v1"}, v1alpha1.PeerStatus{Region: "us", ContactAge: seconds(1), Freshness: seconds(12)})
		eventually(condition(ctx, "eu", "CaughtUp"), "False Lagging", "us are copied later than 5s")
		n.status.set(controllers.Serving{Version: "v1"}, v1alpha1.PeerStatus{Region: "us", ContactAge: seconds(100), Freshness: seconds(101)})
		eventually(condition(ctx, "eu", "PeersReachable"), "False PeerUnreachable", "us")
		eventually(condition(ctx, "eu", "CaughtUp"), "Unknown PeerUnreachable", "us")
		eventually(condition(ctx, "eu", "InitialSyncComplete"), "True", "")
		n.status.set(controllers.Serving{Version: "v1", QuarantinedRows: 3}, v1alpha1.PeerStatus{Region: "us", ContactAge: seconds(1), Freshness: seconds(1)})
		eventually(condition(ctx, "eu", "PeersReachable"), "True", "us")
		eventually(condition(ctx, "eu", "Degraded"), "True Quarantine", "3 rows")

		By("what its nodes know")
		well := v1alpha1.PeerStatus{Region: "us", ContactAge: seconds(1), Freshness: seconds(1)}
		through := time.Now().Add(-time.Minute).Truncate(time.Second)
		n.status.set(controllers.Serving{
			Version: "v1", References: &controllers.References{}, VerifyStale: time.Hour,
			Verified: map[string]controllers.Verified{"us": {Through: through, Finished: time.Now(), Mismatched: 2}},
		}, well)
		eventually(condition(ctx, "eu", "ReferencesHealthy"), "True Healthy", "")
		eventually(condition(ctx, "eu", "SearchInSync"), "True NotConfigured", "")
		eventually(condition(ctx, "eu", "Verified"), "False Differs", "us (2)")
		eventually(condition(ctx, "eu", "Degraded"), "False Available", "")
		n.status.set(controllers.Serving{
			Version: "v1", References: &controllers.References{Cascading: 1, Refused: 1, Dangling: 1}, VerifyStale: time.Hour, ShardMoves: 1, FencedWrites: 1,
			Verified: map[string]controllers.Verified{"us": {Through: through, Finished: time.Now()}},
		}, well)
		eventually(condition(ctx, "eu", "ReferencesHealthy"), "False Dangling", "1 committed references")
		eventually(condition(ctx, "eu", "Verified"), "True Equal", "us")
		Expect(status(ctx, "eu")()).To(And(
			HaveField("Verified", HaveValue(HaveField("Time", BeTemporally("==", through)))),
			HaveField("Peers", ConsistOf(HaveField("Verified", HaveValue(HaveField("Time", BeTemporally("==", through))))))))
		n.status.set(controllers.Serving{Version: "v1", References: &controllers.References{}}, well)
		eventually(condition(ctx, "eu", "ReferencesHealthy"), "True Healthy", "")

		By("suspending and disabling it")
		edited := registrytest.Deployment(n, "eu", "eu")
		edited.Spec.SuspendScopes = []v1alpha1.SuspendScope{{PeerRegion: "us"}}
		n.Put(ctx, edited)
		eventually(condition(ctx, "eu", "Suspended"), "True Suspended", "the syncing from us")
		edited.Spec.SuspendScopes, edited.Spec.Disabled = nil, true
		n.Put(ctx, edited)
		eventually(condition(ctx, "eu", "Suspended"), "False NotSuspended", "")
		eventually(condition(ctx, "eu", "Ready"), "False Disabled", "")
		Eventually(status(ctx, "eu"), registrytest.Patience).Should(HaveField("ObservedGeneration", BeNumerically("==", 3)))

		Eventually(n.happened(ctx), registrytest.Patience).Should(ContainElements("eu DescriptorNotFound", "eu CredentialsInvalid", "eu InitialSyncStarted",
			"eu InitialSyncCompleted", "eu LagObjectiveMissed", "eu PeerUnreachable", "eu PeerRecovered", "eu RowQuarantined", "eu Suspended", "eu Resumed",
			"eu VerificationMismatch", "eu ReferencesUnhealthy", "eu CascadeStarted", "eu CascadeBlocked", "eu CascadeCompleted", "eu ShardMoved", "eu StaleOwnerFenced"))

		By("the Deployment of the other region is none of our business")
		Expect(status(ctx, "us")()).To(BeZero())
		Expect(reg.Problems()).To(BeEmpty())
	})

	It("two Deployments for one service and region", func(ctx context.Context) {
		n.Put(ctx, registrytest.Deployment(n, "a-eu", "eu"))
		n.Start(ctx)
		eventually(condition(ctx, "a-eu", "Conflict"), "False Unique", "")
		n.Put(ctx, registrytest.Deployment(n, "b-eu", "eu"))
		eventually(condition(ctx, "b-eu", "Conflict"), "True Duplicate", "already declared by Deployment "+n.name+"/a-eu, which is older")
		eventually(condition(ctx, "b-eu", "Ready"), "False Duplicate", "")
		eventually(condition(ctx, "b-eu", "Stalled"), "True Duplicate", "")
		Consistently(condition(ctx, "a-eu", "Conflict"), "200ms").Should(HavePrefix("False"))
		Eventually(n.happened(ctx), registrytest.Patience).Should(ContainElement("b-eu Duplicate"))

		n.Delete(ctx, registrytest.Deployment(n, "a-eu", "eu"))
		eventually(condition(ctx, "b-eu", "Conflict"), "False Unique", "")
		eventually(condition(ctx, "b-eu", "Stalled"), "True DescriptorNotFound", "")
	})

	It("two of them in two namespaces", func(ctx context.Context) {
		other := newNamespace(ctx)
		n.watched = []string{other.name}
		other.bind(ctx, n)
		n.Put(ctx, registrytest.Deployment(n, "eu", "eu"))
		n.Start(ctx)
		eventually(condition(ctx, "eu", "Conflict"), "False Unique", "")
		var first v1alpha1.Deployment
		Expect(admin.Get(ctx, client.ObjectKey{Namespace: n.name, Name: "eu"}, &first)).To(Succeed())
		later := func() time.Duration { return time.Since(first.CreationTimestamp.Time) }
		Eventually(later, registrytest.Patience).Should(BeNumerically(">", time.Second), "a creation time has whole seconds; of two in the same one the names decide")
		other.Put(ctx, registrytest.Deployment(other, "eu", "eu"))
		rival := func() string {
			var d v1alpha1.Deployment
			Expect(admin.Get(ctx, client.ObjectKey{Namespace: other.name, Name: "eu"}, &d)).To(Succeed())
			if c := meta.FindStatusCondition(d.Status.Conditions, "Conflict"); c != nil {
				return string(c.Status) + " " + c.Reason + ": " + c.Message
			}
			return ""
		}
		eventually(rival, "True Duplicate", "already declared by Deployment "+n.name+"/eu, which is older")
		Expect(condition(ctx, "eu", "Conflict")()).To(HavePrefix("False"))
	})

	It("one that somebody asks to look at", func(ctx context.Context) {
		n.interval = time.Hour
		n.Put(ctx, registrytest.Deployment(n, "eu", "eu"))
		n.Start(ctx)
		eventually(condition(ctx, "eu", "Ready"), "False DescriptorNotFound", "")
		Expect(status(ctx, "eu")().LastHandledRequestAt).To(BeEmpty())
		Expect(admin.Patch(ctx, registrytest.Deployment(n, "eu", "eu"),
			client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"meta.dbcontroller.io/requested-at":"now"}}}`)))).To(Succeed())
		Eventually(status(ctx, "eu"), registrytest.Patience).Should(HaveField("LastHandledRequestAt", "now"))
	})

	It("one whose search store and cache have no secrets", func(ctx context.Context) {
		secret(ctx, "eu-db", map[string][]byte{"dsn": []byte("host=/tmp")})
		eu := registrytest.Deployment(n, "eu", "eu")
		eu.Spec.Search = &v1alpha1.SearchSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "eu-search"}}
		eu.Spec.Cache = &v1alpha1.CacheSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "eu-cache", Key: "url"}}
		n.Put(ctx, eu)
		n.Put(ctx, registrytest.Descriptor(n, "packages"))
		n.status.set(controllers.Serving{Version: "v1"})
		n.Start(ctx)
		credentials := condition(ctx, "eu", "CredentialsValid")
		eventually(credentials, "False SecretNotFound", "spec.search.secretRef: get secret "+n.name+"/eu-search")
		eventually(condition(ctx, "eu", "Degraded"), "True SecretNotFound", "spec.search")
		eventually(condition(ctx, "eu", "Ready"), "True", "")
		secret(ctx, "eu-search", map[string][]byte{"dsn": []byte("x")})
		secret(ctx, "eu-cache", map[string][]byte{"dsn": []byte("x")})
		eventually(credentials, "False SecretNotFound", `spec.cache.secretRef: key "url" of secret eu-cache`)
		Expect(admin.Update(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: n.name, Name: "eu-cache"}, Data: map[string][]byte{"url": []byte("x")}})).To(Succeed())
		eventually(credentials, "True", "")
		eventually(condition(ctx, "eu", "Degraded"), "False", "")
		eventually(condition(ctx, "eu", "SearchInSync"), "Unknown Pending", "")
	})

	It("a Deployment with TLS", func(ctx context.Context) {
		ca, err := pki.NewCA("test")
		Expect(err).NotTo(HaveOccurred())
		pair := func(region string, until time.Duration) map[string][]byte {
			kp, err := ca.Issue(pki.Identity{TrustDomain: "db-controller", Service: registrytest.Service, Region: region}, time.Now().Add(until))
			Expect(err).NotTo(HaveOccurred())
			return map[string][]byte{"tls.crt": kp.CertPEM, "tls.key": kp.KeyPEM, "ca.crt": ca.CertPEM()}
		}
		secret(ctx, "eu-db", map[string][]byte{"dsn": []byte("host=/tmp")})
		secret(ctx, "eu-tls", map[string][]byte{"tls.crt": []byte("junk")})
		eu := registrytest.Deployment(n, "eu", "eu")
		eu.Spec.TLS = &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: "eu-tls"}}
		n.Put(ctx, eu)
		n.Start(ctx)
		credentials := condition(ctx, "eu", "CredentialsValid")
		eventually(credentials, "False Invalid", "spec.tls.secretRef: secret eu-tls: the certificates do not fit")
		for _, c := range []struct {
			data         map[string][]byte
			prefix, text string
		}{
			{pair("us", time.Hour), "False Invalid", "region/us, but this Deployment is"},
			{pair("eu", -time.Minute), "False Invalid", "the certificate is valid from"},
			{pair("eu", time.Hour), "True", ""},
		} {
			Expect(admin.Update(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: n.name, Name: "eu-tls"}, Data: c.data})).To(Succeed())
			eventually(credentials, c.prefix, c.text)
		}
	})

	It("ServiceDescriptors", func(ctx context.Context) {
		ready := func(name, conditionType string) func() string {
			return func() string {
				var s v1alpha1.ServiceDescriptor
				Expect(admin.Get(ctx, client.ObjectKey{Namespace: n.name, Name: name}, &s)).To(Succeed())
				c := meta.FindStatusCondition(s.Status.Conditions, conditionType)
				if c == nil || s.Status.ObservedGeneration != s.Generation {
					return "not set"
				}
				return string(c.Status) + " " + c.Reason + ": " + c.Message
			}
		}
		bad := registrytest.Descriptor(n, "a-packages")
		bad.Spec.Versions[0].Resources[1].Patterns = []string{"sections/{section}/packages/{pack"}
		n.Put(ctx, bad)
		n.Start(ctx)
		eventually(ready("a-packages", "Ready"), "False Invalid", "spec.versions[0].resources[1].patterns")
		Expect(ready("a-packages", "Ready")()).NotTo(ContainSubstring("stays in use"))
		n.Put(ctx, registrytest.Descriptor(n, "a-packages"))
		eventually(ready("a-packages", "Ready"), "True Compiled", "")
		eventually(ready("a-packages", "Stalled"), "False", "")
		eventually(ready("a-packages", "Degraded"), "False Compiled", "")
		n.status.set(controllers.Serving{Version: "v1", PolicyHeld: []string{"region us still owns 2 resources"}})
		eventually(ready("a-packages", "Degraded"), "True PolicyNotInForce", "the former one is: region us still owns 2 resources")
		eventually(ready("a-packages", "Ready"), "True Compiled", "")
		n.status.set(controllers.Serving{Version: "v1"})
		eventually(ready("a-packages", "Degraded"), "False Compiled", "")
		n.Put(ctx, bad)
		eventually(ready("a-packages", "Ready"), "False Invalid", "the last state that compiled stays in use")

		n.Put(ctx, registrytest.Descriptor(n, "b-packages"))
		eventually(ready("b-packages", "Ready"), "False Duplicate", n.name+"/a-packages")
		n.Delete(ctx, bad)
		eventually(ready("b-packages", "Ready"), "True Compiled", "")
		Eventually(n.happened(ctx), registrytest.Patience).Should(ContainElements("a-packages Refused", "b-packages Duplicate", "a-packages PolicyNotInForce"))
	})

	It("nothing but what has changed: a status that stays is not written again", func(ctx context.Context) {
		n.Put(ctx, registrytest.Deployment(n, "eu", "eu"))
		n.Start(ctx)
		eventually(condition(ctx, "eu", "Ready"), "False DescriptorNotFound", "")
		version := func() string {
			var d v1alpha1.Deployment
			Expect(admin.Get(ctx, client.ObjectKey{Namespace: n.name, Name: "eu"}, &d)).To(Succeed())
			return d.ResourceVersion
		}
		written := version()
		Consistently(version, "500ms").Should(Equal(written), "ten intervals")
	})

	It("no secret of another namespace, however it is asked for (S7)", func(ctx context.Context) {
		other := newNamespace(ctx)
		Expect(admin.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: other.name, Name: "eu-db"}, Data: map[string][]byte{"dsn": []byte("x")}})).To(Succeed())
		raw := func(secretRef map[string]any) *unstructured.Unstructured {
			return &unstructured.Unstructured{Object: map[string]any{
				"apiVersion": v1alpha1.GroupVersion.String(), "kind": "Deployment", "metadata": map[string]any{"namespace": n.name, "name": "eu"},
				"spec": map[string]any{"service": registrytest.Service, "region": "eu", "version": "v1", "endpoint": "https://eu.example.com", "database": map[string]any{"secretRef": secretRef}},
			}}
		}
		elsewhere := map[string]any{"name": "eu-db", "namespace": other.name}
		Expect(client.WithFieldValidation(admin, metav1.FieldValidationStrict).Create(ctx, raw(elsewhere))).To(MatchError(ContainSubstring(`unknown field "spec.database.secretRef.namespace"`)))
		for _, name := range []string{other.name + "/eu-db", "../" + other.name + "/secrets/eu-db", "Eu-Db", "eu-db?x", ""} {
			Expect(admin.Create(ctx, raw(map[string]any{"name": name}))).To(MatchError(ContainSubstring("spec.database.secretRef.name")), name)
		}
		Expect(admin.Create(ctx, raw(elsewhere))).To(Succeed(), "an old client")
		n.Start(ctx)
		eventually(condition(ctx, "eu", "CredentialsValid"), "False SecretNotFound", "get secret "+n.name+"/eu-db")
	})

	It("the manager's role: secrets by name, no list", func(ctx context.Context) {
		secret(ctx, "eu-db", map[string][]byte{"dsn": []byte("x")})
		c, err := client.New(n.user, client.Options{Scheme: scheme})
		Expect(err).NotTo(HaveOccurred())
		secrets := controllers.NewSecrets(c)
		Expect(secrets.Get(ctx, n.name, "eu-db")).To(HaveKeyWithValue("dsn", []byte("x")))
		_, err = secrets.Get(ctx, n.name, "none")
		Expect(err).To(MatchError(registry.ErrSecretNotFound))
		_, err = secrets.Get(ctx, "default", "none")
		Expect(err).To(And(MatchError(ContainSubstring("forbidden")), Not(MatchError(registry.ErrSecretNotFound))))
		Expect(c.List(ctx, &corev1.SecretList{}, client.InNamespace(n.name))).To(MatchError(ContainSubstring("forbidden")))
		d := registrytest.Deployment(n, "eu", "eu")
		n.Put(ctx, d)
		Expect(c.Delete(ctx, d)).To(MatchError(ContainSubstring("forbidden")))
		Expect(c.Update(ctx, d)).To(MatchError(ContainSubstring("forbidden")))
	})
})

var _ = Describe("kubectl's table of Deployments", func() {
	It("has the columns that people look for", func(ctx context.Context) {
		n := newNamespace(ctx)
		n.Put(ctx, registrytest.Deployment(n, "eu", "eu"))
		n.Put(ctx, registrytest.Deployment(n, "us", "us"))
		n.status.set(controllers.Serving{
			Version: "v1", OwnedShards: 4096, VerifyStale: time.Hour,
			Verified: map[string]controllers.Verified{"us": {Through: time.Now().Add(-time.Hour), Finished: time.Now()}},
		}, v1alpha1.PeerStatus{Region: "us", ContactAge: seconds(1), Freshness: seconds(0.21), PendingRows: 3})
		n.Put(ctx, registrytest.Descriptor(n, "packages"))
		Expect(admin.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: n.name, Name: "eu-db"}, Data: map[string][]byte{"dsn": []byte("x")}})).To(Succeed())
		n.Start(ctx)
		Eventually(func() string { return table(ctx, n.name, 0) }, registrytest.Patience).Should(And(
			HavePrefix("NAME SERVICE REGION VERSION READY LAG PEERS SHARDS AGE"), ContainSubstring("eu "+registrytest.Service+" eu v1 True 210ms 1/1 4096/4096 ")))
		Expect(table(ctx, n.name, 1)).To(And(
			HavePrefix("NAME SERVICE REGION VERSION READY LAG PEERS SHARDS PENDING VERIFIED REASON AGE"),
			ContainSubstring("eu "+registrytest.Service+" eu v1 True 210ms 1/1 4096/4096 3 60m Available ")))
	})
})

// table asks for what kubectl prints; of the columns, those up to a priority: 1 is kubectl's -o wide.
func table(ctx context.Context, ns string, priority int32) string {
	GinkgoHelper()
	cfg := rest.CopyConfig(cluster.Config)
	cfg.GroupVersion = &v1alpha1.GroupVersion
	cfg.APIPath = "/apis"
	cfg.NegotiatedSerializer = clientgoscheme.Codecs.WithoutConversion()
	rc, err := rest.RESTClientFor(cfg)
	Expect(err).NotTo(HaveOccurred())
	raw, err := rc.Get().Namespace(ns).Resource("deployments").SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(ctx)
	Expect(err).NotTo(HaveOccurred())
	var t metav1.Table
	Expect(json.Unmarshal(raw, &t)).To(Succeed())
	var out strings.Builder
	for _, c := range t.ColumnDefinitions {
		if c.Priority <= priority {
			out.WriteString(strings.ToUpper(c.Name) + " ")
		}
	}
	for _, row := range t.Rows {
		out.WriteString("\n")
		for i, cell := range row.Cells {
			if t.ColumnDefinitions[i].Priority <= priority {
				fmt.Fprint(&out, cell, " ")
			}
		}
	}
	return out.String()
}
