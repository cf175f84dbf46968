package folder_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/registry/folder"
	"github.com/dbcontroller/db-controller/registry/registrytest"
)

func TestMain(m *testing.M) {
	// Ginkgo's own, for as long as the process lives.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/onsi/ginkgo/v2/internal/interrupt_handler.(*InterruptHandler).registerForInterrupts.func2"))
}

func TestFolder(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "folder")
}

var _ = registrytest.Behaves("a folder", func(context.Context) registrytest.Source { return newManifests() })

// manifests is a folder of manifests, one file for each object.
type manifests struct {
	dir string
	log lockedBuffer
	reg *registry.Registry
}

func newManifests() *manifests { return &manifests{dir: GinkgoT().TempDir()} }

func (m *manifests) Namespace() string { return "default" }

func (m *manifests) file(o registrytest.Object) string {
	return o.GetName() + "." + strings.ToLower(o.GetObjectKind().GroupVersionKind().Kind) + ".yaml"
}

func (m *manifests) Put(_ context.Context, o registrytest.Object) {
	GinkgoHelper()
	m.write(m.file(o), text(o))
}

func (m *manifests) PutRefused(ctx context.Context, o registrytest.Object, message string) {
	GinkgoHelper()
	m.Put(ctx, o)
	m.expectProblem(m.file(o)+", document 1", message)
}

func (m *manifests) Touch(_ context.Context, o registrytest.Object) {
	GinkgoHelper()
	m.write(m.file(o), "# touched\n---\n"+text(o))
}

func (m *manifests) Delete(_ context.Context, o registrytest.Object) {
	GinkgoHelper()
	Expect(os.Remove(filepath.Join(m.dir, m.file(o)))).To(Succeed())
}

func (m *manifests) Start(ctx context.Context) (*registry.Registry, registry.Secrets, func()) {
	GinkgoHelper()
	return m.start(folder.Config{})
}

func (m *manifests) start(cfg folder.Config) (*registry.Registry, registry.Secrets, func()) {
	GinkgoHelper()
	cfg.Dir = m.dir
	if cfg.Settle == 0 {
		cfg.Settle = 20 * time.Millisecond
	}
	cfg.Logger = slog.New(slog.NewTextHandler(io.MultiWriter(&m.log, GinkgoWriter), nil))
	m.reg = registry.New()
	source, err := folder.New(m.reg, cfg)
	Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- source.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		Expect(<-done).To(Succeed())
	})
	DeferCleanup(stop)
	return m.reg, source, stop
}

// write replaces a file as careful editors do.
func (m *manifests) write(name, content string) {
	GinkgoHelper()
	temporary := filepath.Join(m.dir, ".new-"+name)
	Expect(os.WriteFile(temporary, []byte(content), 0o600)).To(Succeed())
	Expect(os.Rename(temporary, filepath.Join(m.dir, name))).To(Succeed())
}

func (m *manifests) expectProblem(origin, message string) {
	GinkgoHelper()
	Eventually(m.reg.Problems, registrytest.Patience).Should(ContainElement(And(
		HaveField("Reason", registry.InvalidManifest), HaveField("Origin", origin), HaveField("Message", ContainSubstring(message)))))
}

func (m *manifests) expectRegions(regions ...string) {
	GinkgoHelper()
	Eventually(func() []string {
		got := []string{}
		for _, d := range m.reg.View().Deployments() {
			got = append(got, d.Region)
		}
		return got
	}, registrytest.Patience).Should(HaveExactElements(regions))
}

func text(o registrytest.Object) string {
	GinkgoHelper()
	y, err := yaml.Marshal(o)
	Expect(err).NotTo(HaveOccurred())
	return string(y)
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var _ = Describe("a folder of manifests", func() {
	var m *manifests
	BeforeEach(func() { m = newManifests() })
	region := func(name string) string { return text(registrytest.Deployment(m, name, name)) }

	It("keeps the last good state of a file that is broken, and uses the documents beside the fault", func() {
		m.write("all.yaml", region("ap")+"---\n"+region("eu"))
		m.start(folder.Config{})
		m.expectRegions("ap", "eu")

		By("a document that is no YAML, beside a new good one")
		m.write("all.yaml", region("us")+"---\nspec: {service: [\n---\n")
		m.expectProblem("all.yaml, document 2", "yaml: line 1")
		m.expectRegions("ap", "eu", "us")

		By("a misspelt field")
		m.write("all.yaml", region("us")+"---\n"+strings.Replace(region("eu"), "  region:", "  regoin:", 1))
		m.expectProblem("all.yaml, document 2", "spec.regoin: Forbidden: unknown field")
		m.expectProblem("all.yaml, document 2", "spec.region: Required value")
		m.expectRegions("ap", "eu", "us")

		By("mending it")
		m.write("all.yaml", region("us"))
		m.expectRegions("us")
		Expect(m.reg.Problems()).To(BeEmpty())
		Expect(m.log.String()).To(And(ContainSubstring("problem solved"), ContainSubstring("regoin")))
	})

	It("takes the objects of a file that is gone away, whatever was wrong with it", func() {
		m.write("ap.yaml", region("ap"))
		m.write("eu.yml", region("eu"))
		m.start(folder.Config{})
		m.expectRegions("ap", "eu")
		m.write("eu.yml", "]")
		m.expectProblem("eu.yml, document 1", "yaml")
		Expect(os.Remove(filepath.Join(m.dir, "eu.yml"))).To(Succeed())
		m.expectRegions("ap")
		Expect(m.reg.Problems()).To(BeEmpty())
	})

	It("follows an object from file to file", func() {
		m.write("one.yaml", region("eu"))
		m.start(folder.Config{})
		m.expectRegions("eu")
		events := registrytest.Subscribe(m.reg)
		Eventually(events).Should(Receive(BeAssignableToTypeOf(registry.SyncEvent{})))
		Expect(os.Rename(filepath.Join(m.dir, "one.yaml"), filepath.Join(m.dir, "two.yaml"))).To(Succeed())
		m.write("marker.yaml", region("us"))
		Eventually(events, registrytest.Patience).Should(Receive(HaveField("Deployment.Region", "us")), "the move itself is no event")

		By("declaring it twice")
		m.write("zoo.yaml", region("eu"))
		Eventually(m.reg.Problems, registrytest.Patience).Should(ContainElement(And(HaveField("Reason", registry.Conflict),
			HaveField("Origin", "zoo.yaml, document 1"), HaveField("Message", ContainSubstring("two.yaml, document 1")))))
	})

	It("sees edits in place, and a mounted ConfigMap that switches its generation", func() {
		generation := func(name, content string) {
			Expect(os.Mkdir(filepath.Join(m.dir, name), 0o700)).To(Succeed())
			Expect(os.WriteFile(filepath.Join(m.dir, name, "eu.yaml"), []byte(content), 0o600)).To(Succeed())
			Expect(os.Symlink(name, filepath.Join(m.dir, "..data_tmp"))).To(Succeed())
			Expect(os.Rename(filepath.Join(m.dir, "..data_tmp"), filepath.Join(m.dir, "..data"))).To(Succeed())
		}
		generation("..2026_01", region("eu"))
		Expect(os.Symlink(filepath.Join("..data", "eu.yaml"), filepath.Join(m.dir, "eu.yaml"))).To(Succeed())
		m.start(folder.Config{Poll: time.Hour})
		m.expectRegions("eu")
		generation("..2026_02", region("eu")+"---\n"+region("us"))
		m.expectRegions("eu", "us")

		Expect(os.WriteFile(filepath.Join(m.dir, "ap.yaml"), []byte(region("ap")), 0o600)).To(Succeed())
		m.expectRegions("ap", "eu", "us")
		Expect(os.WriteFile(filepath.Join(m.dir, "ap.yaml"), nil, 0o600)).To(Succeed())
		m.expectRegions("eu", "us")
	})

	It("polls what no notification tells of", func() {
		elsewhere := filepath.Join(GinkgoT().TempDir(), "eu.yaml")
		Expect(os.WriteFile(elsewhere, []byte(region("eu")), 0o600)).To(Succeed())
		Expect(os.Symlink(elsewhere, filepath.Join(m.dir, "eu.yaml"))).To(Succeed())
		m.start(folder.Config{Poll: 50 * time.Millisecond})
		m.expectRegions("eu")
		Expect(os.WriteFile(elsewhere, []byte(region("us")), 0o600)).To(Succeed())
		m.expectRegions("us")
	})

	It("keeps what it knows while the folder, or a file, cannot be read", func() {
		m.write("eu.yaml", region("eu"))
		m.start(folder.Config{Poll: 50 * time.Millisecond})
		m.expectRegions("eu")
		away := m.dir + "-away"
		Expect(os.Rename(m.dir, away)).To(Succeed())
		m.expectProblem(m.dir, "no such file or directory")
		m.expectRegions("eu")
		Expect(os.Rename(away, m.dir)).To(Succeed())
		m.write("us.yaml", region("us"))
		m.expectRegions("eu", "us")
		Expect(m.reg.Problems()).To(BeEmpty())

		Expect(os.Remove(filepath.Join(m.dir, "eu.yaml"))).To(Succeed())
		Expect(os.Symlink("nowhere", filepath.Join(m.dir, "eu.yaml"))).To(Succeed())
		Eventually(m.reg.Problems, registrytest.Patience).Should(ContainElement(HaveField("Origin", "eu.yaml")))
		m.expectRegions("eu", "us")
	})

	It("cannot start without the folder", func(ctx context.Context) {
		source, err := folder.New(registry.New(), folder.Config{Dir: filepath.Join(m.dir, "missing")})
		Expect(err).NotTo(HaveOccurred())
		Expect(source.Run(ctx)).To(MatchError(And(ContainSubstring("read manifests"), ContainSubstring("missing"))))
	})

	It("has the secrets, and shows them to nobody", func(ctx context.Context) {
		const password = "hunter2"
		secret := &corev1.Secret{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
			ObjectMeta: metav1.ObjectMeta{Name: "eu-db"},
			StringData: map[string]string{"dsn": password},
			Data:       map[string][]byte{"more": []byte("data")},
		}
		m.Put(ctx, secret)
		_, secrets, _ := m.start(folder.Config{})
		Eventually(func() (map[string][]byte, error) { return secrets.Get(ctx, "default", "eu-db") }, registrytest.Patience).
			Should(Equal(map[string][]byte{"dsn": []byte(password), "more": []byte("data")}))
		_, err := secrets.Get(ctx, "default", "us-db")
		Expect(errors.Is(err, registry.ErrSecretNotFound)).To(BeTrue())

		for _, fault := range []string{
			"data: {dsn: " + password + "}", "stringData: [" + password + "]", "stringData: {dsn: *" + password + "}", "bogus: " + password,
			"stringData: {dsn: !!int " + password + "}", "stringData: {dsn: x" + password, "stringData: {dsn: a, dsn: " + password + "}",
		} {
			m.write(m.file(secret), "apiVersion: v1\nkind: Secret\nmetadata: {name: eu-db}\n"+fault+"\n# "+fault)
			m.expectProblem(m.file(secret)+", document 1", "its contents are not shown here")
			Expect(m.reg.Problems()[0].String()).NotTo(ContainSubstring(password), fault)
		}
		Expect(m.log.String()).NotTo(ContainSubstring(password))
		Expect(secrets.Get(ctx, "", "eu-db")).To(HaveKeyWithValue("dsn", []byte(password)), "the last good state")
	})

	DescribeTable("refuses a document and says why", func(content, message string) {
		m.write("x.yaml", content)
		m.start(folder.Config{})
		m.expectProblem("x.yaml, document 1", message)
	},
		Entry("no object", "- a\n- b\n", "not an object"),
		Entry("other kind", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n", `Deployment of apiVersion "apps/v1" is not known here`),
		Entry("no name", "apiVersion: meta.dbcontroller.io/v1alpha1\nkind: Deployment\n", "metadata.name"),
		Entry("bad name", "apiVersion: meta.dbcontroller.io/v1alpha1\nkind: Deployment\nmetadata: {name: EU_1}\n", "metadata.name"),
		Entry("field twice", "apiVersion: v1\napiVersion: v1\nkind: Deployment\n", `key "apiVersion" already set`),
		Entry("no spec", "apiVersion: meta.dbcontroller.io/v1alpha1\nkind: Deployment\nmetadata: {name: x}\n", "spec: Required value"),
		Entry("unknown metadata", "apiVersion: meta.dbcontroller.io/v1alpha1\nkind: Deployment\nmetadata: {name: x, lables: {}}\n", "metadata.lables: Forbidden: unknown field"),
		Entry("wrong type", "apiVersion: meta.dbcontroller.io/v1alpha1\nkind: Deployment\nmetadata: {name: x}\nspec: {shards: many}\n", "spec.shards"),
	)
})
