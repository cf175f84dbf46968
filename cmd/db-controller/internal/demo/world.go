package demo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/cmd/db-controller/internal/fleet"
	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/dialguard"
	"github.com/dbcontroller/db-controller/internal/netsim"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/registry/folder"
)

// The service of the demo is that of config/samples/packages.yaml.
const (
	service    = "packages.example.com"
	apiVersion = "v1"
	table      = "v1.resources"
)

// Regions of the demo.
var Regions = []string{"eu", "us", "ap"}

// region is one Deployment with all that it needs.
type region struct {
	name string
	dsn  string
	// searchDSN is the region's search database.
	searchDSN string
	pool      *pgxpool.Pool // the demo's own view of the database
	fleet     *fleet.Fleet
	listener  net.Listener // of the API server; it closes it
	ops       net.Listener
	url       string
	client    *http.Client // a user's, to the API server
	// links lead from here to the others, by their API server's address.
	links map[string]*netsim.Link
}

// world is everything that the demo starts, and removes again.
type world struct {
	dir       string // manifests, and the user's certificate
	manifests string
	regions   map[string]*region
	registry  *registry.Registry
	postgres  string // version, for people

	ctx     context.Context // of all that runs
	cancel  context.CancelFunc
	running *errgroup.Group
	mu      sync.Mutex
	closers []func() error // in the order of opening
}

// open starts three regions and returns when they answer. ctx bounds the start only.
func open(ctx context.Context, cfg Config, log *slog.Logger) (_ *world, err error) {
	w := &world{regions: map[string]*region{}, registry: registry.New()}
	w.ctx, w.cancel = context.WithCancel(context.WithoutCancel(ctx))
	w.running, w.ctx = errgroup.WithContext(w.ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.dir, err = os.MkdirTemp("", "db-controller-demo-"); err != nil {
		return nil, err
	}
	w.onClose(func() error { return os.RemoveAll(w.dir) })
	w.manifests = filepath.Join(w.dir, "manifests")
	if err := os.Mkdir(w.manifests, 0o700); err != nil {
		return nil, err
	}
	for _, name := range Regions {
		w.regions[name] = &region{name: name, links: map[string]*netsim.Link{}}
	}
	for _, step := range []func(context.Context, Config) error{w.openDatabases, w.listen, w.link, w.declare} {
		if err := step(ctx, cfg); err != nil {
			return nil, err
		}
	}
	if err := w.run(cfg, log); err != nil {
		return nil, err
	}
	return w, w.waitReady(ctx)
}

func (w *world) onClose(f func() error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closers = append(w.closers, f)
}

// close ends everything and removes every file.
func (w *world) close() error {
	w.cancel()
	errs := []error{w.running.Wait()}
	if errors.Is(errs[0], context.Canceled) {
		errs[0] = nil
	}
	for i := len(w.closers) - 1; i >= 0; i-- {
		errs = append(errs, w.closers[i]())
	}
	return errors.Join(errs...)
}

// openDatabases makes a database for each region: on a private server, or on the one that the user names.
func (w *world) openDatabases(ctx context.Context, cfg Config) error {
	dsn := cfg.DSN
	prefix := "packages_"
	if dsn == "" {
		pg, err := pgserver.Start(ctx, pgserver.Config{Settings: map[string]string{
			"shared_buffers": "128MB", "max_wal_size": "2GB", // a bulk load is not held up by checkpoints
		}})
		if err != nil {
			return fmt.Errorf("%w; install PostgreSQL 15 to 18 (make deps does), or name a server with --dsn", err)
		}
		w.onClose(pg.Stop)
		dsn = pg.DSN("postgres")
	} else {
		prefix = "db_controller_demo_" + strings.ToLower(rand.Text()[:6]) + "_"
	}
	admin, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("connect to the PostgreSQL server of the demo: %w", err)
	}
	defer admin.Close(context.WithoutCancel(ctx))
	w.postgres = admin.PgConn().ParameterStatus("server_version")
	for _, r := range w.regions {
		database := prefix + r.name
		if _, err := admin.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{database}.Sanitize()); err != nil {
			return fmt.Errorf("create database %s: %w", database, err)
		}
		if cfg.DSN != "" {
			w.onClose(func() error { return dropDatabase(cfg.DSN, database) })
		}
		if r.dsn, err = withDatabase(dsn, database); err != nil {
			return err
		}
		if _, err := admin.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{database + "_search"}.Sanitize()); err != nil {
			return fmt.Errorf("create database %s_search: %w", database, err)
		}
		if cfg.DSN != "" {
			w.onClose(func() error { return dropDatabase(cfg.DSN, database+"_search") })
		}
		if r.searchDSN, err = withDatabase(dsn, database+"_search"); err != nil {
			return err
		}
		poolConfig, err := pgxpool.ParseConfig(r.dsn)
		if err != nil {
			return err
		}
		poolConfig.MaxConns = 6
		if r.pool, err = pgxpool.NewWithConfig(w.ctx, poolConfig); err != nil {
			return err
		}
		w.onClose(func() error { r.pool.Close(); return nil })
	}
	return nil
}

func dropDatabase(dsn, database string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("drop database %s: %w", database, err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "DROP DATABASE IF EXISTS "+pgx.Identifier{database}.Sanitize()+" WITH (FORCE)"); err != nil {
		return fmt.Errorf("drop database %s: %w", database, err)
	}
	return nil
}

// withDatabase returns dsn, a URL or libpq keywords, for another database of the same server.
func withDatabase(dsn, database string) (string, error) {
	if !strings.Contains(dsn, "://") {
		return dsn + " dbname=" + database, nil // the last one of a keyword counts
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return "", errors.New("--dsn: is no valid URL") // the error would show the password
	}
	u.Path = "/" + database
	return u.String(), nil
}

// listen opens the ports of all API servers, so that the manifests can name them.
func (w *world) listen(ctx context.Context, cfg Config) error {
	scheme := "https"
	if cfg.Insecure {
		scheme = "http"
	}
	for _, r := range w.regions {
		for _, l := range []*net.Listener{&r.listener, &r.ops} {
			var err error
			if *l, err = new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
				return err
			}
			w.onClose(func() error { _ = (*l).Close(); return nil }) // its server has closed it, if there was one
		}
		r.url = scheme + "://" + r.listener.Addr().String()
	}
	return nil
}

// link connects each region with each other one by a link of its own.
func (w *world) link(_ context.Context, cfg Config) error {
	for _, from := range w.regions {
		for _, to := range w.regions {
			if from == to {
				continue
			}
			address := to.listener.Addr().String()
			l, err := netsim.Listen(w.ctx, "127.0.0.1:0", address)
			if err != nil {
				return err
			}
			w.onClose(func() error { l.Close(); return nil })
			l.SetLatency(cfg.Latency[PairOf(from.name, to.name)]/2, 0)
			from.links[address] = l
		}
	}
	return nil
}

// dial takes the link to another region.
func (r *region) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if l := r.links[address]; l != nil {
		address = l.Addr()
	}
	return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, network, address)
}

// cut makes a region unreachable for the others, and them for it, until heal.
func (w *world) cut(name string)  { w.eachLinkOf(name, (*netsim.Link).Cut) }
func (w *world) heal(name string) { w.eachLinkOf(name, (*netsim.Link).Heal) }

func (w *world) eachLinkOf(name string, do func(*netsim.Link)) {
	cut := w.regions[name]
	for _, r := range w.regions {
		for address, l := range r.links {
			if r == cut || address == cut.listener.Addr().String() {
				do(l)
			}
		}
	}
}

// declare writes the manifests, with the certificates that it makes, and the user's certificate for curl.
func (w *world) declare(_ context.Context, cfg Config) error {
	ca, err := pki.NewCA("db-controller demo")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(w.manifests, "packages.yaml"), samples.Packages, 0o600); err != nil {
		return err
	}
	var user pki.Source
	if !cfg.Insecure {
		if user, err = w.issueUser(ca); err != nil {
			return err
		}
	}
	for _, r := range w.regions {
		want := pki.Identity{TrustDomain: v1alpha1.DefaultTrustDomain, Service: service, Region: r.name}
		transport := pki.Transport(user, want, nil)
		w.onClose(func() error { transport.CloseIdleConnections(); return nil })
		r.client = &http.Client{Transport: transport}

		d := v1alpha1.Deployment{Spec: v1alpha1.DeploymentSpec{
			Service: service, Region: r.name, Version: apiVersion, Endpoint: r.url,
			Database: &v1alpha1.DatabaseSpec{SecretRef: v1alpha1.SecretKeyRef{Name: r.name + "-database", Key: v1alpha1.DefaultDSNKey}},
			Search:   &v1alpha1.SearchSpec{Type: v1alpha1.SearchPostgres, SecretRef: v1alpha1.SecretKeyRef{Name: r.name + "-search", Key: v1alpha1.DefaultDSNKey}},
		}}
		d.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "Deployment"}
		d.Name = "packages." + r.name
		documents := []any{&d, secret(r.name+"-database", map[string][]byte{v1alpha1.DefaultDSNKey: []byte(r.dsn)}),
			secret(r.name+"-search", map[string][]byte{v1alpha1.DefaultDSNKey: []byte(r.searchDSN)})}
		if !cfg.Insecure {
			d.Spec.TLS = &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: r.name + "-tls"}, TrustDomain: v1alpha1.DefaultTrustDomain}
			pair, err := ca.Deployment(v1alpha1.DefaultTrustDomain, service, r.name, "127.0.0.1", "localhost")
			if err != nil {
				return err
			}
			documents = append(documents, secret(r.name+"-tls", map[string][]byte{
				v1alpha1.TLSCertKey: pair.CertPEM, v1alpha1.TLSKeyKey: pair.KeyPEM, v1alpha1.TLSCAKey: ca.CertPEM(),
			}))
		}
		if err := writeManifest(filepath.Join(w.manifests, r.name+".yaml"), documents); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) issueUser(ca *pki.CA) (pki.Source, error) {
	pair, err := ca.User(v1alpha1.DefaultTrustDomain, "you")
	if err != nil {
		return nil, err
	}
	for file, pem := range map[string][]byte{"you.crt": pair.CertPEM, "you.key": pair.KeyPEM, "ca.crt": ca.CertPEM()} {
		if err := os.WriteFile(filepath.Join(w.dir, file), pem, 0o600); err != nil {
			return nil, err
		}
	}
	return pki.Static(pair, ca.CertPEM())
}

func secret(name string, data map[string][]byte) *corev1.Secret {
	s := &corev1.Secret{Data: data}
	s.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}
	s.Name = name
	return s
}

func writeManifest(path string, documents []any) error {
	var text []byte
	for _, d := range documents {
		document, err := yaml.Marshal(d)
		if err != nil {
			return err
		}
		text = append(append(text, "---\n"...), document...)
	}
	return os.WriteFile(path, text, 0o600)
}

// run starts what the manager and the apiserver commands start, for each region.
func (w *world) run(cfg Config, log *slog.Logger) error {
	source, err := folder.New(w.registry, folder.Config{Dir: w.manifests, Logger: log})
	if err != nil {
		return err
	}
	w.running.Go(func() error { return source.Run(w.ctx) })
	for _, r := range w.regions {
		listeners := make(chan net.Listener, 1)
		listeners <- r.listener
		address := r.listener.Addr().String()
		r.fleet = fleet.New(fleet.Config{
			Region: r.name, Registry: w.registry, Secrets: source, Manages: true, Logger: log,
			Template: deployment.Config{DialContext: dialguard.New(dialguard.Config{AllowLoopback: true, DialContext: r.dial}).DialContext},
			Parts: func(d *deployment.Deployment) ([]func(context.Context) error, error) {
				var l net.Listener
				select {
				case l = <-listeners:
				default: // it is not the first start
					var err error
					if l, err = new(net.ListenConfig).Listen(w.ctx, "tcp", address); err != nil {
						return nil, err
					}
				}
				serve, err := d.Server(l)
				if err != nil {
					l.Close()
					return nil, err
				}
				return []func(context.Context) error{serve, d.Manage}, nil
			},
		})
		process := fleet.NewProcessMetrics(cfg.Version)
		process.MustRegister(w.registry)
		w.running.Go(func() error { return r.fleet.Run(w.ctx) })
		w.running.Go(func() error { return deployment.ServeHTTP(w.ctx, r.ops, r.fleet.Handler(w.ctx, process)) })
	}
	return nil
}

// waitReady returns when all API servers answer.
func (w *world) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, name := range Regions {
		r := w.regions[name]
		for {
			err := r.get(ctx, "/sections")
			if err == nil {
				break
			}
			select {
			case <-ctx.Done():
				for _, s := range r.fleet.Status() {
					if s.Error != "" {
						err = errors.New(s.Error)
					}
				}
				return fmt.Errorf("wait for region %s to answer: %w", name, errors.Join(ctx.Err(), err))
			case <-w.ctx.Done():
				return errors.New("a part of the demo has ended") // close says which
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	return nil
}

// get is a request of which only the success matters.
func (r *region) get(ctx context.Context, path string) error {
	_, err := r.call(ctx, http.MethodGet, path, nil)
	return err
}

// callTimeout is a little more than the API server takes at most.
const callTimeout = 35 * time.Second

// call sends a REST request below /v1.
func (r *region) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, r.url+"/"+apiVersion+path, strings.NewReader(string(body)))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := r.client.Do(req)
	if err != nil {
		return nil, &callError{err: err, retry: true}
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, &callError{err: err, retry: true}
	}
	if res.StatusCode != http.StatusOK {
		retry := res.StatusCode == http.StatusServiceUnavailable || res.StatusCode == http.StatusGatewayTimeout || res.StatusCode == http.StatusConflict
		return nil, &callError{err: fmt.Errorf("%s: %s", res.Status, messageOf(answer)), status: res.StatusCode, retry: retry}
	}
	return answer, nil
}

// callError is the failure of a call. status is 0 if there was no answer; retry says that the same call may succeed later.
type callError struct {
	err    error
	status int
	retry  bool
}

func (e *callError) Error() string { return e.err.Error() }
func (e *callError) Unwrap() error { return e.err }
