package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/internal/kubetest"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// TestTopologyFromKubernetes runs managers and API servers as processes against a kube-apiserver, as users with the rights of config/rbac and no others: a
// write is copied, and the status of the Deployments says so.
func TestTopologyFromKubernetes(t *testing.T) {
	g := NewWithT(t)
	cluster, err := kubetest.Start()
	if errors.Is(err, kubetest.ErrNoAssets) {
		t.Skip(err)
	}
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { g.Expect(cluster.Stop()).To(Succeed()) })
	scheme := runtime.NewScheme()
	g.Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	g.Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	admin, err := client.New(cluster.Config, client.Options{Scheme: scheme})
	g.Expect(err).NotTo(HaveOccurred())
	ctx := t.Context()
	const namespace = "packages"
	g.Expect(admin.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}})).To(Succeed())
	apply := func(manifests string, change func(*unstructured.Unstructured)) {
		t.Helper()
		for text := range strings.SplitSeq(manifests, "\n---\n") {
			o := &unstructured.Unstructured{}
			g.Expect(yaml.Unmarshal([]byte(text), &o.Object)).To(Succeed())
			o.SetNamespace(namespace)
			change(o)
			g.Expect(admin.Create(ctx, o)).To(Succeed(), text)
		}
	}
	asIs := func(*unstructured.Unstructured) {}

	roles, err := os.ReadFile(filepath.Join("..", "..", "config", "rbac", "role.yaml"))
	g.Expect(err).NotTo(HaveOccurred())
	apply(strings.TrimPrefix(string(roles), "---\n"), func(o *unstructured.Unstructured) {
		if o.GetKind() == "ClusterRole" {
			o.SetNamespace("")
		}
	})
	subject := []rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: "db-controller"}}
	g.Expect(admin.Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "db-controller"}, Subjects: subject,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "db-controller"}})).To(Succeed())
	g.Expect(admin.Create(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "db-controller", Namespace: namespace}, Subjects: subject,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "db-controller"}})).To(Succeed())
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text, err := cluster.Kubeconfig("db-controller")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(os.WriteFile(kubeconfig, text, 0o600)).To(Succeed())

	ca, err := pki.NewCA("test")
	g.Expect(err).NotTo(HaveOccurred())
	apply(string(samples.Packages), asIs)
	sites := map[string]*site{}
	for _, region := range []string{"eu", "us"} {
		pair, err := ca.Deployment("db-controller", "packages.example.com", region, "127.0.0.1")
		g.Expect(err).NotTo(HaveOccurred())
		s := &site{
			region: region, dsn: pgtest.Database(t), api: freeAddress(t), managerOps: freeAddress(t), apiOps: freeAddress(t),
			certificates: secretManifest(region+"-tls", pair, ca.CertPEM()),
		}
		sites[region] = s
		apply(s.manifest(), asIs)
	}
	var managers []*program
	for _, s := range sites {
		start(t, "apiserver", "--kubeconfig", kubeconfig, "--allow-loopback-peers", "--service", "packages.example.com", "--region", s.region,
			"--bind-address", s.api, "--metrics-bind-address", "", "--health-probe-bind-address", s.apiOps, "--log-format", "text")
		managers = append(managers, start(t, "manager", "--kubeconfig", kubeconfig, "--allow-loopback-peers", "--region", s.region, "--leader-elect", "--leader-election-namespace", namespace,
			"--metrics-bind-address", "", "--health-probe-bind-address", s.managerOps, "--log-format", "text"))
	}
	eu, us := sites["eu"], sites["us"]
	for _, s := range sites {
		ready(g, s.apiOps)
		ready(g, s.managerOps)
	}

	copied := func() {
		g.Eventually(func() string { n, hash := digest(t, us.dsn); return fmt.Sprint(n, hash) }).WithTimeout(time.Minute).
			Should(Equal(func() string { n, hash := digest(t, eu.dsn); return fmt.Sprint(n, hash) }()))
	}

	// Once us knows the policy of the section, a write there is forwarded to eu, and comes back as a copy.
	user, err := ca.User("db-controller", "test")
	g.Expect(err).NotTo(HaveOccurred())
	httpClient := clientOf(t, user, ca)
	fill(g, httpClient, eu, 0, 1)
	copied()
	fill(g, httpClient, us, 1, 10)
	copied()
	res, err := httpClient.Get("https://" + us.api + "/v1/sections/s/packages/p3")
	g.Expect(err).NotTo(HaveOccurred())
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(body)).To(ContainSubstring(`"owningRegion":"eu"`))

	// What kubectl shows.
	ofUS := func() *v1alpha1.Deployment {
		d := &v1alpha1.Deployment{}
		g.Expect(admin.Get(ctx, client.ObjectKey{Namespace: namespace, Name: "packages.us"}, d)).To(Succeed())
		return d
	}
	g.Eventually(func() bool { return meta.IsStatusConditionTrue(ofUS().Status.Conditions, "Ready") }).WithTimeout(2*time.Minute).WithPolling(time.Second).Should(BeTrue(),
		func() string { b, err := yaml.Marshal(ofUS().Status); return fmt.Sprint(string(b), err) })
	t.Logf("status of packages.us: %s", must(yaml.Marshal(ofUS().Status)))

	// The data of us goes with its Deployment, once neither its manager nor its API server uses it any more. That of eu stays.
	g.Expect(admin.Patch(ctx, ofUS(), client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"reclaimPolicy":"Delete"}}`)))).To(Succeed())
	g.Eventually(func() []string { return ofUS().Finalizers }).WithTimeout(time.Minute).Should(ConsistOf(v1alpha1.CleanupFinalizer))
	g.Expect(admin.Delete(ctx, ofUS())).To(Succeed())
	g.Eventually(func() error {
		return admin.Get(ctx, client.ObjectKey{Namespace: namespace, Name: "packages.us"}, &v1alpha1.Deployment{})
	}).WithTimeout(time.Minute).WithPolling(time.Second).Should(MatchError(apierrors.IsNotFound, "it is not there"))
	g.Expect(schemas(t, us.dsn)).To(BeEmpty())
	g.Expect(schemas(t, eu.dsn)).To(ConsistOf("ctl", "v1"))

	for _, m := range managers {
		g.Expect(m.cmd.Process.Signal(syscall.SIGTERM)).To(Succeed())
		g.Expect(m.code(t)).To(Equal(0))
		for line := range bytes.Lines(m.stderr.Bytes()) {
			if bytes.Contains(line, []byte("error received after stop sequence was engaged")) {
				continue // controller-runtime says so of the lease that a manager gives back when it is told to stop
			}
			if bytes.Contains(line, []byte("context canceled")) {
				continue // so does client-go of a request that was under way then
			}
			g.Expect(string(line)).NotTo(Or(ContainSubstring("forbidden"), ContainSubstring("level=ERROR")))
		}
	}
}

// schemas are those of db-controller.
func schemas(t *testing.T, dsn string) []string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	rows, err := conn.Query(t.Context(), "SELECT nspname::text FROM pg_namespace WHERE nspname ~ '^(ctl|v[0-9])'")
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func must(text []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return text
}
