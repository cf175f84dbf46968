package apiserver

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/prometheus/client_golang/prometheus"

	rpc "github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/region"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestAPIServer(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "apiserver")
}

const (
	service = "packages.example.com"
	domain  = "example.org"
	ring    = 256
)

// world is a few regions of one service, each with a database and a server that listens.
type world struct {
	registry    *registry.Registry
	deployments []*v1alpha1.Deployment
	descriptor  *v1alpha1.ServiceDescriptor
	ca          *pki.CA // nil: plain text
	regions     map[string]*server
}

type server struct {
	name     string
	dsn      string
	store    *postgres.Store
	server   *Server
	endpoint string
	metrics  *prometheus.Registry
	stop     func()
}

// newWorld starts the regions. Everything without a region in its name belongs to eu.
func newWorld(plaintext bool, tune func(*Config), names ...string) *world {
	GinkgoHelper()
	w := &world{registry: registry.New(), regions: map[string]*server{}, descriptor: descriptorOf(names)}
	if !plaintext {
		var err error
		w.ca, err = pki.NewCA("test")
		Expect(err).NotTo(HaveOccurred())
	}
	for _, name := range names {
		w.start(name, tune)
	}
	w.publish()
	return w
}

func (w *world) publish() {
	GinkgoHelper()
	Expect(w.registry.Apply(registry.Snapshot{Deployments: w.deployments, Services: []*v1alpha1.ServiceDescriptor{w.descriptor}})).To(BeEmpty())
}

func (w *world) start(name string, tune func(*Config)) {
	GinkgoHelper()
	dsn := pgtest.Database(GinkgoTB())
	st, err := postgres.Open(GinkgoT().Context(), postgres.Config{
		DSN: dsn, Service: service, Region: name, Version: "v1", Ring: ring, FeedLimit: 50, Logger: slog.New(slog.DiscardHandler),
	})
	Expect(err).NotTo(HaveOccurred())
	r := &server{name: name, dsn: dsn, store: st, metrics: prometheus.NewRegistry()}
	version := func() *descriptor.Version {
		service, _ := w.registry.View().Service(service)
		return service.Version("v1")
	}
	stack := region.Layer(st, name, version, policy.New(version, st, slog.New(slog.DiscardHandler)))
	cfg := Config{
		Service: service, Region: name, Version: "v1",
		Store: stack, Owners: stack, Changes: st.Feed(), Replica: st, Topology: w.registry,
		Registerer: r.metrics, Logger: slog.New(slog.NewTextHandler(GinkgoWriter, nil)),
	}
	scheme := "http"
	if w.ca != nil {
		cfg.TLS, cfg.TrustDomain = w.source(pki.Identity{TrustDomain: domain, Service: service, Region: name}), domain
		scheme = "https"
	}
	if tune != nil {
		tune(&cfg)
	}
	r.server, err = New(cfg)
	Expect(err).NotTo(HaveOccurred())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	Expect(err).NotTo(HaveOccurred())
	r.endpoint = scheme + "://" + l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.server.Run(ctx, l) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		var err error
		Eventually(done, "30s").Should(Receive(&err))
		Expect(err).NotTo(HaveOccurred())
	})
	DeferCleanup(func() {
		r.stop()
		st.Close()
	})
	w.regions[name] = r
	d := &v1alpha1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name}}
	d.Spec = v1alpha1.DeploymentSpec{Service: service, Region: name, Version: "v1", Endpoint: r.endpoint, Shards: ring}
	if w.ca != nil {
		d.Spec.TLS = &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: "tls"}, TrustDomain: domain}
	}
	w.deployments = append(w.deployments, d)
}

func descriptorOf(regions []string) *v1alpha1.ServiceDescriptor {
	d := &v1alpha1.ServiceDescriptor{ObjectMeta: metav1.ObjectMeta{Name: "packages"}}
	d.Spec = v1alpha1.ServiceDescriptorSpec{
		Service:           service,
		MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: regions, DefaultControlRegion: "eu"},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
			{Type: "Section", Plural: "sections", Patterns: []string{"sections/{section}"}},
			{
				Type: "Package", Plural: "packages", Patterns: []string{"sections/{section}/packages/{package}"},
				Parent: "Section", OnParentDeleted: v1alpha1.DeleteBlock, MaxBodyBytes: 1 << 20,
				Schema: &runtime.RawExtension{Raw: []byte(`{"type": "object", "required": ["version"], "properties": {
					"version": {"type": "string"}, "size": {"type": "number"}, "kind": {"type": "string"}, "note": {"type": "string"},
					"spec": {"type": "object", "properties": {"depth": {"type": "integer", "maximum": 10}}}}}`)},
			},
			{Type: "Mirror", Plural: "mirrors", Patterns: []string{"regions/{region}/mirrors/{mirror}"}},
		}}},
	}
	return d
}

func (w *world) source(id pki.Identity) pki.Source {
	GinkgoHelper()
	pair, err := w.ca.Issue(id, time.Now().Add(time.Hour))
	Expect(err).NotTo(HaveOccurred())
	s, err := pki.Static(pair, w.ca.CertPEM())
	Expect(err).NotTo(HaveOccurred())
	return s
}

var alice = pki.Identity{TrustDomain: domain, User: "alice"}

func deployment(region string) pki.Identity {
	return pki.Identity{TrustDomain: domain, Service: service, Region: region}
}

// client returns an HTTP client that calls a region as somebody.
func (w *world) client(as pki.Identity, of string) *http.Client {
	GinkgoHelper()
	var source pki.Source
	if w.ca != nil {
		source = w.source(as)
	}
	t := pki.Transport(source, deployment(of), nil)
	DeferCleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

func (w *world) resources(as pki.Identity, of string) rpc.ResourcesClient {
	return rpc.NewResourcesClient(w.client(as, of), w.regions[of].endpoint)
}

func (w *world) feed(as pki.Identity, of string) rpc.FeedClient {
	return rpc.NewFeedClient(w.client(as, of), w.regions[of].endpoint)
}

// rest is alice with curl.
type rest struct {
	client *http.Client
	base   string
}

func (w *world) rest(of string) rest {
	return rest{w.client(alice, of), w.regions[of].endpoint + "/v1"}
}

type answer struct {
	status int
	header http.Header
	text   string
}

func (a answer) json() map[string]any {
	GinkgoHelper()
	var v map[string]any
	Expect(json.Unmarshal([]byte(a.text), &v)).To(Succeed(), a.text)
	return v
}

// violations are the fields that an error complains about.
func (a answer) violations() []string {
	GinkgoHelper()
	var e struct {
		Error struct {
			Details []struct {
				Type            string `json:"@type"`
				FieldViolations []struct{ Field, Description string }
			}
		}
	}
	Expect(json.Unmarshal([]byte(a.text), &e)).To(Succeed(), a.text)
	var fields []string
	for _, d := range e.Error.Details {
		if d.Type == "type.googleapis.com/google.rpc.BadRequest" {
			for _, v := range d.FieldViolations {
				Expect(v.Description).NotTo(BeEmpty())
				fields = append(fields, v.Field)
			}
		}
	}
	return fields
}

func (r rest) do(method, path, body string, header ...string) answer {
	GinkgoHelper()
	ctx, cancel := context.WithTimeout(GinkgoT().Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, r.base+path, strings.NewReader(body))
	Expect(err).NotTo(HaveOccurred())
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := r.client.Do(req)
	Expect(err).NotTo(HaveOccurred())
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	Expect(err).NotTo(HaveOccurred())
	return answer{resp.StatusCode, resp.Header, string(text)}
}
