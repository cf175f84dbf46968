package fleet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/gomega"
	"github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/controllers"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/registry"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

const service = "notes.example.com"

// vault is registry.Secrets whose secrets change.
type vault struct {
	mu      sync.Mutex
	secrets map[string]map[string][]byte
}

func (v *vault) Get(_ context.Context, _, name string) (map[string][]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, ok := v.secrets[name]
	if !ok {
		return nil, registry.ErrSecretNotFound
	}
	return maps.Clone(s), nil
}

func (v *vault) set(name string, secret map[string][]byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.secrets[name] = secret
}

// setup is a fleet of one Deployment in eu.
type setup struct {
	*Fleet
	vault *vault
	reg   *registry.Registry
	spec  *v1alpha1.Deployment
	addr  string // of its API server
}

func (s *setup) declare(deployments ...*v1alpha1.Deployment) {
	descriptor := &v1alpha1.ServiceDescriptor{}
	descriptor.Spec = v1alpha1.ServiceDescriptorSpec{Service: service, MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu"}, DefaultControlRegion: "eu"},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{{Type: "Note", Plural: "notes", Patterns: []string{"notes/{note}"}}}}}}
	s.reg.Apply(registry.Snapshot{Deployments: deployments, Services: []*v1alpha1.ServiceDescriptor{descriptor}})
}

// start runs the fleet until the test ends. change, unless nil, completes the Deployment.
func start(t *testing.T, secrets map[string]map[string][]byte, change func(*v1alpha1.Deployment)) *setup {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	spec := &v1alpha1.Deployment{}
	spec.Spec = v1alpha1.DeploymentSpec{Service: service, Region: "eu", Version: "v1", Endpoint: "http://" + addr,
		Database: &v1alpha1.DatabaseSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "db", Key: "dsn"}}}
	if change != nil {
		change(spec)
	}
	s := &setup{vault: &vault{secrets: secrets}, reg: registry.New(), spec: spec, addr: addr}
	s.Fleet = New(Config{
		Region: "eu", Registry: s.reg, Secrets: s.vault, Reread: 200 * time.Millisecond, Logger: slog.New(slog.DiscardHandler),
		Parts: func(d *deployment.Deployment) ([]func(context.Context) error, error) {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				return nil, err
			}
			serve, err := d.Server(l)
			return []func(context.Context) error{serve}, err
		},
	})
	s.declare(spec)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// ping reports whether the Deployment runs and reaches its database.
func (s *setup) ping(ctx context.Context) error {
	d, err := s.open(service, "eu")
	if err != nil {
		return err
	}
	within, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return d.Core().Ping(within)
}

func (s *setup) post(ctx context.Context, name string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+s.addr+"/v1/notes?id="+name, strings.NewReader(`{"n":0}`))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	defer http.DefaultClient.CloseIdleConnections()
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if text, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", res.Status, text)
	}
	return nil
}

func execute(t *testing.T, dsn string, statements ...string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	for _, sql := range statements {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

// TestPasswordRotation: the password of the database's role changes, its Secret follows, and the process goes on with the new one within seconds.
func TestPasswordRotation(t *testing.T) {
	g := NewWithT(t)
	server := pgtest.Server(t, pgserver.Config{TCP: true})
	execute(t, server.DSN("postgres"), "CREATE ROLE app LOGIN PASSWORD 'one'", "CREATE DATABASE app OWNER app")
	dsn := func(password string) map[string][]byte {
		u := url.URL{Scheme: "postgres", User: url.UserPassword("app", password), Host: server.Addr(), Path: "/app", RawQuery: "sslmode=disable"}
		return map[string][]byte{"dsn": []byte(u.String())}
	}
	s := start(t, map[string]map[string][]byte{"db": dsn("wrong")}, nil)
	g.Eventually(func() error { return s.Serving(service, "eu").Err }).WithTimeout(20*time.Second).Should(MatchError(ContainSubstring("password")), "the status says what is wrong")
	g.Expect(s.Serving(service, "eu").Err.Error()).NotTo(ContainSubstring("wrong"), "and not the secret (S8)")
	s.vault.set("db", dsn("one"))
	g.Eventually(func() error { return s.ping(t.Context()) }).WithTimeout(30 * time.Second).Should(Succeed())

	for _, password := range []string{"two", "three"} {
		execute(t, server.DSN("postgres"), "ALTER ROLE app PASSWORD '"+password+"'",
			"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
		g.Eventually(func() error { return s.ping(t.Context()) }).WithTimeout(20*time.Second).ShouldNot(Succeed(), "the old password opens nothing")
		s.vault.set("db", dsn(password))
		g.Eventually(func() error { return s.post(t.Context(), password) }).WithTimeout(20 * time.Second).Should(Succeed())
		g.Expect(s.Serving(service, "eu").Err).NotTo(HaveOccurred())
	}
}

// TestCertificateRotation: a Secret with the certificate of another authority is shown and trusted within seconds, without a restart.
func TestCertificateRotation(t *testing.T) {
	g := NewWithT(t)
	authority := func() (*pki.CA, map[string][]byte, *http.Client) {
		ca, err := pki.NewCA("test")
		g.Expect(err).NotTo(HaveOccurred())
		pair, err := ca.Deployment("db-controller", service, "eu", "127.0.0.1")
		g.Expect(err).NotTo(HaveOccurred())
		user, err := ca.User("db-controller", "test")
		g.Expect(err).NotTo(HaveOccurred())
		certificate, err := tls.X509KeyPair(user.CertPEM, user.KeyPEM)
		g.Expect(err).NotTo(HaveOccurred())
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(ca.CertPEM())
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
			TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{certificate}, RootCAs: roots, MinVersion: tls.VersionTLS13}}}
		return ca, map[string][]byte{"tls.crt": pair.CertPEM, "tls.key": pair.KeyPEM, "ca.crt": ca.CertPEM()}, client
	}
	oldCA, oldSecret, oldClient := authority()
	newCA, newSecret, newClient := authority()
	s := start(t, map[string]map[string][]byte{"db": {"dsn": []byte(pgtest.Database(t))}, "tls": oldSecret}, func(d *v1alpha1.Deployment) {
		d.Spec.TLS = &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: "tls"}}
		d.Spec.Endpoint = strings.Replace(d.Spec.Endpoint, "http:", "https:", 1)
	})
	get := func(c *http.Client) func() error {
		return func() error {
			res, err := c.Get("https://" + s.addr + "/v1/notes")
			if err != nil {
				return err
			}
			defer res.Body.Close()
			if res.StatusCode != http.StatusOK {
				return errors.New(res.Status)
			}
			return nil
		}
	}
	g.Eventually(get(oldClient)).WithTimeout(30 * time.Second).Should(Succeed())
	before, err := s.open(service, "eu")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(get(newClient)()).NotTo(Succeed())

	// First both are trusted, then the certificate is the new one, then the old authority goes: nobody is cut off on the way.
	both := append(append([]byte{}, oldCA.CertPEM()...), newCA.CertPEM()...)
	s.vault.set("tls", map[string][]byte{"tls.crt": oldSecret["tls.crt"], "tls.key": oldSecret["tls.key"], "ca.crt": both})
	mixed := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: newClient.Transport.(*http.Transport).TLSClientConfig.Clone()}}
	mixed.Transport.(*http.Transport).TLSClientConfig.RootCAs = oldClient.Transport.(*http.Transport).TLSClientConfig.RootCAs
	g.Eventually(get(mixed)).WithTimeout(10*time.Second).Should(Succeed(), "a user of the new authority, the certificate of the old one")
	g.Expect(get(oldClient)()).To(Succeed())
	s.vault.set("tls", map[string][]byte{"tls.crt": []byte("torn"), "tls.key": newSecret["tls.key"], "ca.crt": both})
	g.Consistently(get(oldClient), "500ms").Should(Succeed(), "what does not fit together changes nothing")
	s.vault.set("tls", newSecret)
	g.Eventually(get(newClient)).WithTimeout(10 * time.Second).Should(Succeed())
	g.Expect(get(oldClient)()).NotTo(Succeed())
	after, err := s.open(service, "eu")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(after).To(BeIdenticalTo(before), "nothing was restarted")
}

// TestCleanup drops what was made for a Deployment, and nothing before all that is safe.
func TestCleanup(t *testing.T) {
	g := NewWithT(t)
	cacheServer := redisserver.New(t, nil)
	database, searched := pgtest.Database(t), pgtest.Database(t)
	s := start(t, map[string]map[string][]byte{"db": {"dsn": []byte(database)}, "cache": {"dsn": []byte(cacheServer.URL())}, "search": {"dsn": []byte(searched)}}, func(d *v1alpha1.Deployment) {
		d.Spec.Cache = &v1alpha1.CacheSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "cache"}}
		d.Spec.Search = &v1alpha1.SearchSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "search"}}
	})
	ctx := t.Context()
	g.Eventually(func() error { return s.post(ctx, "n") }).WithTimeout(30 * time.Second).Should(Succeed())
	execute(t, database, "CREATE SCHEMA theirs", "CREATE TABLE theirs.t (x int)")
	execute(t, searched, "CREATE SCHEMA search_v7", "CREATE TABLE search_v7.owner (service text, region text)", "CREATE TABLE search_v7.leases ()",
		"INSERT INTO search_v7.owner VALUES ('"+service+"', 'eu')", "CREATE SCHEMA search_v8", "CREATE TABLE search_v8.owner (service text, region text)",
		"CREATE TABLE search_v8.leases ()", "INSERT INTO search_v8.owner VALUES ('"+service+"', 'us')")
	schemas := func(dsn string) (names []string) {
		conn, err := pgx.Connect(ctx, dsn)
		g.Expect(err).NotTo(HaveOccurred())
		defer func() { _ = conn.Close(ctx) }()
		rows, err := conn.Query(ctx, "SELECT nspname::text FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema|public)' ORDER BY 1")
		g.Expect(err).NotTo(HaveOccurred())
		names, err = pgx.CollectRows(rows, pgx.RowTo[string])
		g.Expect(err).NotTo(HaveOccurred())
		return names
	}
	redisKeys := func() []string {
		o, err := redis.ParseURL(cacheServer.URL())
		g.Expect(err).NotTo(HaveOccurred())
		c := redis.NewClient(o)
		defer func() { _ = c.Close() }()
		keys, err := c.Keys(ctx, "*").Result()
		g.Expect(err).NotTo(HaveOccurred())
		return keys
	}
	g.Eventually(redisKeys).WithTimeout(20 * time.Second).ShouldNot(BeEmpty())

	eu := registry.DeploymentOf(s.spec)
	names, mark, err := s.Referrers(ctx, eu, nil)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(names).To(BeEmpty())
	g.Expect(s.Drop(ctx, eu, mark)).To(MatchError(controllers.ErrInUse), "it runs in this process")

	s.declare()
	g.Eventually(func() error { return s.Drop(ctx, eu, "v1:another") }).WithTimeout(20*time.Second).Should(MatchError(controllers.ErrReferred), "once its connections are closed")
	execute(t, database, "INSERT INTO v1.sources VALUES ('notes/n', 'b.example.com/us', true, false, false)")
	g.Expect(s.Drop(ctx, eu, mark)).To(MatchError(controllers.ErrReferred))
	execute(t, database, "DELETE FROM v1.sources")
	other := eu
	other.Region = "us"
	g.Expect(s.Drop(ctx, other, "")).To(MatchError(ContainSubstring("belongs to " + service + " in eu")))
	busy, err := pgx.Connect(ctx, database+"&application_name=db-controller%20of%20another%20process")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(s.Drop(ctx, eu, "")).To(MatchError(controllers.ErrInUse))
	g.Expect(busy.Close(ctx)).To(Succeed())
	g.Expect(schemas(database)).To(Equal([]string{"ctl", "theirs", "v1"}), "so far everything is there")

	g.Expect(s.Drop(ctx, eu, mark)).To(Succeed())
	g.Expect(schemas(database)).To(Equal([]string{"theirs"}), "what others have made stays")
	g.Expect(schemas(searched)).To(Equal([]string{"search_v8"}), "and what belongs to another Deployment")
	g.Expect(redisKeys()).To(BeEmpty())
	g.Expect(s.Drop(ctx, eu, mark)).To(Succeed(), "what is not there is dropped")
	s.vault.set("db", map[string][]byte{"dsn": []byte("host=/nowhere")})
	g.Expect(s.Drop(ctx, eu, mark)).NotTo(Succeed())
}
