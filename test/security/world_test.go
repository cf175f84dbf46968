// Package security plays the attacks of docs/security.md against whole Deployments: two regions of one service and one of another that imports it, with API servers,
// managers, databases and certificates of their own.
package security

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
)

func TestMain(m *testing.M) {
	if os.Getenv(victimVar) != "" {
		os.Exit(victim())
	}
	os.Exit(pgtest.Main(m))
}

const (
	domain   = "example.org"
	packages = "packages.example.com"
	library  = "library.example.com" // imports packages
	ring     = 64
)

type key = registry.Key

var (
	packagesEU = key{Service: packages, Region: "eu"}
	packagesUS = key{Service: packages, Region: "us"}
	libraryEU  = key{Service: library, Region: "eu"}

	alice = pki.Identity{TrustDomain: domain, User: "alice"}
)

func identity(k key) pki.Identity {
	return pki.Identity{TrustDomain: domain, Service: k.Service, Region: k.Region}
}

// world is what runs.
type world struct {
	t        testing.TB
	ca       *authority
	registry *registry.Registry
	snapshot registry.Snapshot
	places   map[key]*place
}

// place is one Deployment.
type place struct {
	key
	dsn      string
	endpoint string
	open     *deployment.Deployment
	log      *buffer
}

// config changes how a world is made.
type config struct {
	// tls is the source of a Deployment's certificates; nil: valid ones.
	tls func(w *world, k key) pki.Source
	// alter changes the configuration of each Deployment.
	alter func(*deployment.Config)
	// only these run; nil: all. All are declared.
	only []key
	// unmanaged: API servers only.
	unmanaged bool
}

func newWorld(t testing.TB, cfg config) *world {
	t.Helper()
	w := &world{t: t, ca: newAuthority(t), registry: registry.New(), places: map[key]*place{}}
	w.snapshot.Services = descriptors()
	listeners := map[key]net.Listener{}
	declared := []key{packagesEU, packagesUS, libraryEU, {Service: packages, Region: "ap"}, {Service: packages, Region: "off"}}
	for _, k := range declared {
		endpoint := "https://192.0.2.1:8443" // nobody is there
		if runs(cfg, k) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			check(t, err)
			listeners[k] = l
			endpoint = "https://" + l.Addr().String()
			w.places[k] = &place{key: k, dsn: pgtest.Database(t), endpoint: endpoint, log: &buffer{}}
		}
		d := &v1alpha1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: strings.ReplaceAll(k.Service, ".", "-") + "-" + k.Region}}
		d.Spec = v1alpha1.DeploymentSpec{Service: k.Service, Region: k.Region, Version: "v1", Endpoint: endpoint, Shards: ring, Disabled: k.Region == "off",
			TLS: &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: "tls"}, TrustDomain: domain}}
		w.snapshot.Deployments = append(w.snapshot.Deployments, d)
	}
	w.publish()
	for k, l := range listeners {
		w.run(cfg, k, l)
	}
	return w
}

func runs(cfg config, k key) bool {
	if cfg.only != nil {
		return slices.Contains(cfg.only, k)
	}
	return k == packagesEU || k == packagesUS || k == libraryEU
}

func (w *world) publish() {
	w.t.Helper()
	if problems := w.registry.Apply(w.snapshot); len(problems) > 0 {
		w.t.Fatal(problems)
	}
}

// run runs a Deployment until the test ends.
func (w *world) run(cfg config, k key, l net.Listener) {
	w.t.Helper()
	p := w.places[k]
	source := w.ca.source(w.t, identity(k))
	if cfg.tls != nil {
		if s := cfg.tls(w, k); s != nil {
			source = s
		}
	}
	c := deployment.Config{Key: k, Registry: w.registry, DSN: p.dsn, TLS: source, MaxConns: 6, Logger: slog.New(slog.NewJSONHandler(p.log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	if cfg.alter != nil {
		cfg.alter(&c)
	}
	d, err := deployment.Open(w.t.Context(), c)
	check(w.t, err)
	p.open = d
	serve, err := d.Server(l)
	check(w.t, err)
	parts := []func(context.Context) error{serve}
	if !cfg.unmanaged {
		parts = append(parts, d.Manage)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, parts...) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("%s ended with %v", k, err)
		}
		d.Close()
	})
}

func descriptors() []*v1alpha1.ServiceDescriptor {
	policy := &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu", "us"}, DefaultControlRegion: "eu"}
	p := &v1alpha1.ServiceDescriptor{ObjectMeta: metav1.ObjectMeta{Name: "packages"}}
	p.Spec = v1alpha1.ServiceDescriptorSpec{Service: packages, MultiRegionPolicy: policy, Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
		{Type: "Section", Plural: "sections", Patterns: []string{"sections/{section}"}, MaxBodyBytes: 1 << 20},
		{Type: "Mirror", Plural: "mirrors", Patterns: []string{"regions/{region}/mirrors/{mirror}"}, MaxBodyBytes: 1 << 20},
		{Type: "Tenant", Plural: "tenants", Patterns: []string{"tenants/{tenant}"}, PolicyHolder: &v1alpha1.PolicyHolder{Field: "policy"}, SyncType: v1alpha1.SyncAlwaysGlobally},
		{Type: "Draft", Plural: "drafts", Patterns: []string{"tenants/{tenant}/drafts/{draft}"}, Parent: "Tenant", OnParentDeleted: v1alpha1.DeleteAllowDangling, SyncType: v1alpha1.SyncNever},
	}}}}
	l := &v1alpha1.ServiceDescriptor{ObjectMeta: metav1.ObjectMeta{Name: "library"}}
	l.Spec = v1alpha1.ServiceDescriptorSpec{Service: library, MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu"}, DefaultControlRegion: "eu"},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Imports: []v1alpha1.ServiceImport{{Service: packages, Version: "v1"}}, Resources: []v1alpha1.ResourceType{
			{Type: "Book", Plural: "books", Patterns: []string{"books/{book}"}, References: []v1alpha1.ReferenceField{
				{Field: "mirror", Target: packages + "/Mirror", OnTargetDeleted: v1alpha1.DeleteBlock},
			}},
		}}}}
	return []*v1alpha1.ServiceDescriptor{p, l}
}

// client calls the API server of a Deployment as somebody.
func (w *world) client(as pki.Identity, of key) *http.Client {
	w.t.Helper()
	return w.clientWith(w.ca.source(w.t, as), of)
}

func (w *world) clientWith(source pki.Source, of key) *http.Client {
	t := pki.Transport(source, identity(of), nil)
	w.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t, Timeout: time.Minute}
}

// rest is one REST call.
func (w *world) rest(c *http.Client, of key, method, path, body string) (int, string) {
	w.t.Helper()
	status, text, err := request(w.t.Context(), c, method, w.places[of].endpoint+"/v1"+path, []byte(body), "application/json")
	check(w.t, err)
	return status, text
}

// save creates or changes a resource as alice, where it is owned.
func (w *world) save(of key, name, body string) {
	w.t.Helper()
	if status, text := w.rest(w.client(alice, of), of, "PATCH", "/"+name+"?allow_missing=true", body); status != http.StatusOK {
		w.t.Fatalf("save %s: %d %s", name, status, text)
	}
}

func request(ctx context.Context, c *http.Client, method, url string, body []byte, contentType string, header ...string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	if len(body) > 0 || method == http.MethodPost {
		req.Header.Set("Content-Type", contentType)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// rows are the contents of all tables of the version, by table: what no attack may change.
func (p *place) rows(t testing.TB) map[string]string {
	t.Helper()
	conn := p.connect(t)
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'v1' AND c.relkind = 'r' ORDER BY 1")
	check(t, err)
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(t, err)
	all := map[string]string{}
	for _, table := range tables {
		if table == "horizon" { // it follows the clock
			continue
		}
		var text string
		check(t, conn.QueryRow(t.Context(), "SELECT coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), '') FROM v1."+pgx.Identifier{table}.Sanitize()+" t").Scan(&text))
		all[table] = fmt.Sprintf("%d bytes, %x", len(text), md5.Sum([]byte(text)))
	}
	return all
}

func (p *place) connect(t testing.TB) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), p.dsn)
	check(t, err)
	return conn
}

func (p *place) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	conn := p.connect(t)
	defer conn.Close(context.Background())
	_, err := conn.Exec(t.Context(), sql, args...)
	check(t, err)
}

// metric is the sum of a counter over the series that have all the labels, given as pairs.
func (p *place) metric(t testing.TB, name string, labels ...string) (sum float64) {
	t.Helper()
	families, err := prometheus.Gatherers{p.open.Metrics()}.Gather()
	check(t, err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	series:
		for _, m := range f.GetMetric() {
			for i := 0; i < len(labels); i += 2 {
				if !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == labels[i] && l.GetValue() == labels[i+1] }) {
					continue series
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

// call is a call of the mixin's Call message.
func call(from, to key) *v1.Call {
	return &v1.Call{Requester: &v1.Location{Service: from.Service, Region: from.Region}, Callee: &v1.Location{Service: to.Service, Region: to.Region}, Version: "v1"}
}

func peer(from, to key) *v1.Peer {
	return &v1.Peer{Service: from.Service, ForRegion: from.Region, OfRegion: to.Region, Version: "v1", Layout: 1, Ring: ring}
}

// eventually repeats do until it returns nil.
func eventually(t testing.TB, within time.Duration, what string, do func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := do()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// buffer takes a log from many goroutines.
type buffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func insecure(c tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{c}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}}
}
