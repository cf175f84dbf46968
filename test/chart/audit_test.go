package chart_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// unused are the rights that are granted and that the test does not make the program use, with the reason.
var unused = map[string]string{
	"patch events":               "an event is patched when it is repeated within minutes",
	"patch events.events.k8s.io": "an event is patched when it is repeated within minutes",

	"list deployments.meta.dbcontroller.io":        streamed,
	"list servicedescriptors.meta.dbcontroller.io": streamed,
	"list verifications.meta.dbcontroller.io":      streamed,
	"list leases.coordination.k8s.io":              streamed,
	"get servicedescriptors.meta.dbcontroller.io":  "caches answer it; get, list and watch of our own kinds are given together",
}

const streamed = "a watch begins with the list where the API server can do that, as this one; older ones are asked for it"

// S13: the program, with the tokens of the release's service accounts and no other rights, does all its work without being refused anything, and uses
// every right that it is granted. With roles for the cluster, and with rbac.namespaced.
func (c *control) testRightsGrantedAreRightsUsed(t *testing.T) {
	g := NewWithT(t)
	binary, err := program()
	g.Expect(err).NotTo(HaveOccurred())
	// They are there after the test of install and uninstall, but not when this test runs alone.
	err = c.admin.Get(t.Context(), client.ObjectKey{Name: "deployments.meta.dbcontroller.io"}, &apiextensionsv1.CustomResourceDefinition{})
	if apierrors.IsNotFound(err) {
		_, err = c.helm(t, "install", "crds", crdsChart)
	}
	g.Expect(err).NotTo(HaveOccurred())
	for name, values := range map[string]string{
		"wide":   "rbac.namespaced=false",
		"narrow": "rbac.namespaced=true,watchNamespaces={narrow-eu,narrow-us}",
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{control: c, binary: binary, mode: name, values: values}
			w.run(t)
			w.checkAudit(t)
		})
	}
}

// world is two regions in two namespaces of one cluster.
type world struct {
	*control
	binary, mode, values string
	ca                   *pki.CA
}

func (w *world) ns(region string) string { return w.mode + "-" + region }

func (w *world) run(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	var err error
	w.ca, err = pki.NewCA("test")
	g.Expect(err).NotTo(HaveOccurred())
	regions := []string{"eu", "us"}
	for _, region := range regions {
		w.namespace(t, w.ns(region))
	}
	api := map[string]string{}
	for _, region := range regions {
		_, err := w.helm(t, "install", "dbc", chart, "-n", w.ns(region), "--set", w.values, "--set", "crds.enabled=false,region="+region,
			"--set", "apiServers[0].service="+service, "--set", "rbac.secretNamespaces={"+w.ns(region)+"},rbac.secretNames={database,identity}",
			"--set", "leaderElection.leaseDuration=4s,leaderElection.renewDeadline=3s,leaderElection.retryPeriod=500ms")
		g.Expect(err).NotTo(HaveOccurred())
		api[region] = freeAddress(t)
		pair, err := w.ca.Deployment("db-controller", service, region, "127.0.0.1")
		g.Expect(err).NotTo(HaveOccurred())
		w.create(t, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns(region), Name: "database"}, StringData: map[string]string{"dsn": pgtest.Database(t)}})
		w.create(t, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns(region), Name: "identity"},
			Data: map[string][]byte{"tls.crt": pair.CertPEM, "tls.key": pair.KeyPEM, "ca.crt": w.ca.CertPEM()}})
	}
	descriptor := &v1alpha1.ServiceDescriptor{}
	g.Expect(yaml.UnmarshalStrict(samples.Packages, descriptor)).To(Succeed())
	descriptor.Namespace = w.ns("eu")
	w.create(t, descriptor)
	var declared []*v1alpha1.Deployment
	for _, region := range regions {
		d := &v1alpha1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Namespace: w.ns(region), Name: region},
			Spec: v1alpha1.DeploymentSpec{Service: service, Region: region, Version: "v1", Endpoint: "https://" + api[region],
				Database: &v1alpha1.DatabaseSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "database"}},
				TLS:      &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: "identity"}}},
		}
		if region == "us" {
			d.Spec.ReclaimPolicy = v1alpha1.ReclaimDelete
		}
		w.create(t, d)
		declared = append(declared, d)
	}

	// Two managers in us, so that one waits for the other's Lease.
	var running []*process
	for _, region := range regions {
		running = append(running, w.pod(t, region, "dbc-db-controller-packages-example-com", 0, "--bind-address="+api[region]))
		running = append(running, w.pod(t, region, "dbc-db-controller-manager", 0))
	}
	running = append(running, w.pod(t, "us", "dbc-db-controller-manager", 1))

	w.write(t, api["eu"], 20)
	inSync := func(d *v1alpha1.Deployment) {
		t.Helper()
		g.Eventually(func() string {
			if err := w.admin.Get(ctx, client.ObjectKeyFromObject(d), d); err != nil {
				return err.Error()
			}
			for _, c := range []string{"Ready", "CaughtUp"} {
				if !meta.IsStatusConditionTrue(d.Status.Conditions, c) {
					return fmt.Sprintf("%s: %s is not true: %+v", d.Name, c, d.Status)
				}
			}
			return ""
		}).WithTimeout(90 * time.Second).WithPolling(500 * time.Millisecond).Should(BeEmpty())
	}
	for _, d := range declared {
		inSync(d)
	}
	g.Eventually(func() bool {
		g.Expect(w.admin.Get(ctx, client.ObjectKeyFromObject(descriptor), descriptor)).To(Succeed())
		return len(descriptor.Status.Conditions) > 0
	}).WithTimeout(30 * time.Second).Should(BeTrue())
	verification := &v1alpha1.Verification{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns("us"), Name: "once"},
		Spec: v1alpha1.VerificationSpec{Service: service, Region: "us"}}
	w.create(t, verification)
	g.Eventually(func() v1alpha1.VerificationPhase {
		g.Expect(w.admin.Get(ctx, client.ObjectKeyFromObject(verification), verification)).To(Succeed())
		return verification.Status.Phase
	}).WithTimeout(60 * time.Second).WithPolling(500 * time.Millisecond).Should(Equal(v1alpha1.VerificationSucceeded))

	// A manager ends by itself, and the other takes over: the Lease is given back and taken.
	running[len(running)-2].stop(t)
	inSync(declared[1])

	// The data of us goes with its Deployment, which a finalizer keeps until it has.
	for _, d := range slices.Backward(declared) {
		g.Expect(w.admin.Delete(ctx, d)).To(Succeed())
		g.Eventually(func() bool {
			return apierrors.IsNotFound(w.admin.Get(ctx, client.ObjectKeyFromObject(d), d))
		}).WithTimeout(60*time.Second).WithPolling(200*time.Millisecond).Should(BeTrue(), d.Name)
	}
	for _, p := range running {
		p.stop(t)
	}
}

func (w *world) create(t *testing.T, o client.Object) {
	t.Helper()
	NewWithT(t).Expect(w.admin.Create(t.Context(), o)).To(Succeed())
	t.Cleanup(func() { _ = w.admin.Delete(context.Background(), o) })
}

// write writes a section and n packages through an API server.
func (w *world) write(t *testing.T, address string, n int) {
	t.Helper()
	g := NewWithT(t)
	user, err := w.ca.User("db-controller", "test")
	g.Expect(err).NotTo(HaveOccurred())
	material, err := pki.Parse(user.CertPEM, user.KeyPEM, w.ca.CertPEM())
	g.Expect(err).NotTo(HaveOccurred())
	pair, err := tls.X509KeyPair(user.CertPEM, user.KeyPEM)
	g.Expect(err).NotTo(HaveOccurred())
	transport := &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: material.Roots}}
	defer transport.CloseIdleConnections()
	writes := []string{`{"update":{"allowMissing":true,"resource":{"name":"sections/s","multiRegionPolicy":{"enabledRegions":["eu","us"],"defaultControlRegion":"eu"}}}}`}
	for i := range n {
		writes = append(writes, fmt.Sprintf(`{"update":{"allowMissing":true,"resource":{"name":"sections/s/packages/p%d","version":"1"}}}`, i))
	}
	g.Eventually(func() (string, error) {
		res, err := (&http.Client{Transport: transport}).Post("https://"+address+"/v1:batchWrite", "application/json",
			strings.NewReader(`{"writes":[`+strings.Join(writes, ",")+"]}"))
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		return fmt.Sprintf("%d %.500s", res.StatusCode, body), err
	}).WithTimeout(60 * time.Second).WithPolling(500 * time.Millisecond).Should(HavePrefix("200 "))
}

// process is the container of a pod.
type process struct {
	name   string
	cmd    *exec.Cmd
	output bytes.Buffer
	done   chan error
}

// pod runs the container of a workload's pod as a process: with its arguments, and the token of its service account. Ports are free ones.
func (w *world) pod(t *testing.T, region, name string, n int, more ...string) *process {
	t.Helper()
	g := NewWithT(t)
	d := &appsv1.Deployment{}
	g.Expect(w.admin.Get(t.Context(), client.ObjectKey{Namespace: w.ns(region), Name: name}, d)).To(Succeed())
	token, err := w.Token(t.Context(), d.Namespace, d.Spec.Template.Spec.ServiceAccountName)
	g.Expect(err).NotTo(HaveOccurred())
	config := clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"test": {Server: w.Config.Host, CertificateAuthorityData: w.Config.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"account": {Token: token}},
		Contexts:       map[string]*clientcmdapi.Context{"test": {Cluster: "test", AuthInfo: "account", Namespace: d.Namespace}},
		CurrentContext: "test",
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	g.Expect(clientcmd.WriteToFile(config, kubeconfig)).To(Succeed())
	p := &process{name: fmt.Sprintf("%s/%s-%d", d.Namespace, name, n), done: make(chan error, 1)}
	p.cmd = exec.Command(w.binary, append(slices.Concat(args(d), more), "--allow-loopback-peers", "--log-format=text", "--metrics-bind-address=", "--health-probe-bind-address="+freeAddress(t))...)
	p.cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig, fmt.Sprintf("POD_NAME=%s-%d", name, n))
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	g.Expect(p.cmd.Start()).To(Succeed())
	go func() { p.done <- p.cmd.Wait() }()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		select {
		case err := <-p.done:
			p.done <- err
		case <-time.After(10 * time.Second):
			t.Errorf("%s does not end", p.name)
			return
		}
		if t.Failed() {
			t.Logf("%s:\n%s", p.name, last(p.output.String(), 40))
		}
	})
	return p
}

// stop tells the process to end, as the kubelet does, and waits for it.
func (p *process) stop(t *testing.T) {
	t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-p.done:
		p.done <- err
		NewWithT(t).Expect(err).NotTo(HaveOccurred(), p.name)
	case <-time.After(30 * time.Second):
		t.Fatalf("%s was told to stop and did not", p.name)
	}
}

func last(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// request is a line of the audit log.
type request struct {
	Verb string `json:"verb"`
	User struct {
		Username string `json:"username"`
	} `json:"user"`
	ObjectRef *struct {
		Resource, Subresource, APIGroup, Namespace, Name string
	} `json:"objectRef"`
	ResponseStatus struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"responseStatus"`
}

// right is how a request, or a rule, is told: "patch deployments/status.meta.dbcontroller.io".
func right(verb, resource, group string) string {
	if group == "" {
		return verb + " " + resource
	}
	return verb + " " + resource + "." + group
}

// checkAudit compares what each service account asked with what it may.
func (w *world) checkAudit(t *testing.T) {
	g := NewWithT(t)
	file, err := os.Open(w.audit)
	g.Expect(err).NotTo(HaveOccurred())
	defer file.Close()
	used := map[string]map[string]int{} // by account
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r request
		g.Expect(json.Unmarshal(lines.Bytes(), &r)).To(Succeed())
		account, ours := strings.CutPrefix(r.User.Username, "system:serviceaccount:"+w.mode+"-")
		if !ours || r.ObjectRef == nil {
			continue // somebody else, or discovery
		}
		_, account, _ = strings.Cut(account, ":")
		name := right(r.Verb, r.ObjectRef.Resource, r.ObjectRef.APIGroup)
		if r.ObjectRef.Subresource != "" {
			name = right(r.Verb, r.ObjectRef.Resource+"/"+r.ObjectRef.Subresource, r.ObjectRef.APIGroup)
		}
		g.Expect(r.ResponseStatus.Code).NotTo(Equal(http.StatusForbidden), "%s may not %s in %q: %s", account, name, r.ObjectRef.Namespace, r.ResponseStatus.Message)
		if used[account] == nil {
			used[account] = map[string]int{}
		}
		used[account][name]++
	}
	g.Expect(lines.Err()).NotTo(HaveOccurred())
	for _, account := range []string{"dbc-db-controller-manager", "dbc-db-controller-apiserver"} {
		granted := w.granted(t, account)
		var idle, sneaked []string
		for name := range granted {
			if used[account][name] == 0 && unused[name] == "" {
				idle = append(idle, name)
			}
		}
		for name := range used[account] {
			if !granted[name] {
				sneaked = append(sneaked, name)
			}
		}
		slices.Sort(idle)
		g.Expect(idle).To(BeEmpty(), "%s may do what it never does", account)
		g.Expect(sneaked).To(BeEmpty(), "%s does what its roles do not say", account)
		t.Logf("%s: %d rights granted, used %v", account, len(granted), used[account])
	}
}

// granted are the rights of a service account of us by the roles that are bound to it.
func (w *world) granted(t *testing.T, account string) map[string]bool {
	t.Helper()
	g := NewWithT(t)
	ctx := t.Context()
	granted := map[string]bool{}
	add := func(rules []rbacv1.PolicyRule) {
		for _, r := range rules {
			for _, group := range r.APIGroups {
				for _, resource := range r.Resources {
					for _, verb := range r.Verbs {
						granted[right(verb, resource, group)] = true
					}
				}
			}
		}
	}
	is := func(subjects []rbacv1.Subject) bool {
		return slices.Contains(subjects, rbacv1.Subject{Kind: "ServiceAccount", Namespace: w.ns("us"), Name: account})
	}
	var bindings rbacv1.RoleBindingList
	g.Expect(w.admin.List(ctx, &bindings)).To(Succeed())
	for _, b := range bindings.Items {
		if is(b.Subjects) {
			role := &rbacv1.Role{}
			g.Expect(w.admin.Get(ctx, client.ObjectKey{Namespace: b.Namespace, Name: b.RoleRef.Name}, role)).To(Succeed())
			add(role.Rules)
		}
	}
	var wide rbacv1.ClusterRoleBindingList
	g.Expect(w.admin.List(ctx, &wide)).To(Succeed())
	for _, b := range wide.Items {
		if is(b.Subjects) {
			g.Expect(w.mode).To(Equal("wide"))
			role := &rbacv1.ClusterRole{}
			g.Expect(w.admin.Get(ctx, client.ObjectKey{Name: b.RoleRef.Name}, role)).To(Succeed())
			add(role.Rules)
		}
	}
	g.Expect(granted).NotTo(BeEmpty())
	return granted
}
