// Package references runs the acceptance topology, three services that refer to each other in three regions, against real faults, and checks with its own
// reader that references hold.
//
//	schema_test.go     the services, and our own knowledge of their names and fields
//	wire_test.go       calls between Deployments that are lost, doubled and late
//	world_test.go      the Deployments: nine databases, API servers and managers
//	shadow_test.go     what shadows there are, and what they say (F1 to F7)
//	checker_test.go    the invariants over the raw tables, with SQL and decoding of its own
//	corrupt_test.go    that the checker sees what is wrong
//	history_test.go    what was done to each name, for the messages of failures
//	random_test.go     a random workload under faults, then the checker
//	cascade_test.go    random graphs: what a deletion removes is what an independent walk says
//	failures_test.go   the failure catalogue (X rows), one by one
package references

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/netsim"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// The environment: DBC_SEED repeats a run, DBC_REFERENCES_FOR is how long faults are made, DBC_LOGS shows the product's logs.
const (
	seedVar = "DBC_SEED"
	forVar  = "DBC_REFERENCES_FOR"
	logsVar = "DBC_LOGS"
)

func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		os.Exit(childMain())
	}
	os.Exit(pgtest.Main(m))
}

type key = registry.Key

// place is one Deployment.
type place struct {
	key
	world   *world
	version string
	dsn     string
	wire    *wire

	mu       sync.Mutex
	api, mgr *process
}

// process is one of the two halves of a Deployment, which run apart, each with connections of its own.
type process struct {
	open   *deployment.Deployment
	cancel context.CancelFunc
	ended  chan struct{}
	err    error // after ended
}

// config says which world.
type config struct {
	services []string
	regions  []string
	versions map[string]string // of the services; default v2 of low, v1 of the others
	// idle: no managers are started.
	idle bool
	// impatient: calls between Deployments are given up early, so that a cut costs little time.
	impatient bool
}

type world struct {
	t      testing.TB
	cfg    config
	reg    *registry.Registry
	pg     *pgserver.Server
	places map[key]*place
	keys   []key                           // in order
	links  map[string]map[key]*netsim.Link // from a region to a Deployment
	topo   registry.Snapshot
	log    *slog.Logger
	dying  sync.WaitGroup // killed processes
	books  *history
}

func newWorld(t testing.TB, cfg config) *world {
	t.Helper()
	if cfg.services == nil {
		cfg.services = []string{low, mid, high}
	}
	if cfg.regions == nil {
		cfg.regions = regions
	}
	w := &world{t: t, cfg: cfg, reg: registry.New(), places: map[key]*place{}, links: map[string]map[key]*netsim.Link{}, log: slog.New(slog.DiscardHandler), books: newHistory()}
	if os.Getenv(logsVar) != "" {
		w.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	// A killed server must keep what it acknowledged.
	w.pg = pgtest.Server(t, pgserver.Config{Settings: map[string]string{"max_connections": "300", "synchronous_commit": "on", "max_wal_size": "2GB"}})
	w.topo.Services = descriptors()
	for _, s := range cfg.services {
		for _, r := range cfg.regions {
			w.declare(key{Service: s, Region: r})
		}
	}
	for _, r := range cfg.regions {
		w.links[r] = map[key]*netsim.Link{}
		for _, k := range w.keys {
			link, err := netsim.Listen(context.Background(), "127.0.0.1:0", w.places[k].wire.addr)
			check(t, err)
			w.links[r][k] = link
			t.Cleanup(link.Close)
		}
	}
	if problems := w.reg.Apply(w.topo); len(problems) > 0 {
		t.Fatal(problems)
	}
	t.Cleanup(w.stop)
	var starting sync.WaitGroup
	limit := make(chan struct{}, 3)
	for _, k := range w.keys {
		starting.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			w.places[k].startAPI()
			if !cfg.idle {
				w.places[k].startManager()
			}
		})
	}
	starting.Wait()
	if t.Failed() {
		t.FailNow()
	}
	w.createProjects()
	return w
}

func (w *world) declare(k key) {
	name, _, _ := strings.Cut(k.Service, ".")
	p := &place{key: k, world: w, version: w.cfg.version(k.Service), dsn: w.pg.DSN(name + "_" + k.Region)}
	check(w.t, w.pg.CreateDatabase(w.t.Context(), name+"_"+k.Region))
	var err error
	p.wire, err = newWire(seed())
	check(w.t, err)
	w.t.Cleanup(p.wire.close)
	w.places[k] = p
	w.keys = append(w.keys, k)
	w.topo.Deployments = append(w.topo.Deployments, &v1alpha1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name + "-" + k.Region},
		Spec: v1alpha1.DeploymentSpec{Service: k.Service, Region: k.Region, Version: p.version, Shards: 256, Endpoint: "http://" + p.wire.addr}})
}

// createProjects makes the policy holders, and waits until every region of low knows them.
func (w *world) createProjects() {
	w.t.Helper()
	if !slices.Contains(w.cfg.services, low) {
		return
	}
	for _, r := range w.cfg.regions {
		w.save(low, project(r), store.Write{Body: policyBody(r, w.cfg.regions...)})
	}
	if w.cfg.idle {
		return
	}
	for _, r := range w.cfg.regions {
		for _, holder := range w.cfg.regions {
			eventually(w.t, 30*time.Second, "the policies are known in "+r, func() error {
				_, err := w.at(low, r).store().Get(w.t.Context(), project(holder))
				return err
			})
		}
	}
}

func policyBody(control string, enabled ...string) []byte {
	return fmt.Appendf(nil, `{"policy":{"enabledRegions":["%s"],"defaultControlRegion":%q}}`, strings.Join(enabled, `","`), control)
}

func (w *world) at(service, region string) *place {
	return w.places[key{Service: service, Region: region}]
}

// owner returns the Deployment that owns a service's own name.
func (w *world) owner(service, name string) *place { return w.at(service, regionOf(name)) }

// save writes one resource where it belongs, and it must succeed.
func (w *world) save(service, name string, wr store.Write) (r *store.Resource) {
	w.t.Helper()
	err := whileUnavailable(func() (err error) { r, err = w.trySave(w.t.Context(), service, name, wr); return err })
	if err != nil {
		w.t.Fatalf("save %s %s: %v", service, name, err)
	}
	return r
}

// whileUnavailable repeats what a slow machine makes Unavailable, as clients do.
func whileUnavailable(do func() error) (err error) {
	_ = retry(context.Background(), soon, func() error {
		if err = do(); store.CodeOf(err) == store.Unavailable {
			return err
		}
		return nil
	})
	return err
}

func (w *world) trySave(ctx context.Context, service, name string, wr store.Write) (*store.Resource, error) {
	wr.Op, wr.Name = store.Save, name
	if wr.Body == nil {
		wr.Body = []byte(`{}`)
	}
	res, err := w.write(ctx, w.owner(service, name), wr)
	if err != nil {
		return nil, err
	}
	return res[0].Resource, nil
}

// delete deletes one resource where it belongs.
func (w *world) delete(service, name string) error {
	_, err := w.write(w.t.Context(), w.owner(service, name), store.Write{Op: store.Delete, Name: name})
	return err
}

// write is one transaction, noted in the history.
func (w *world) write(ctx context.Context, p *place, writes ...store.Write) ([]store.Result, error) {
	st := p.store()
	if st == nil {
		return nil, &store.Error{Code: store.Unavailable, Reason: "the API server is down"}
	}
	note := w.books.begin(p.key, writes)
	res, err := st.BatchWrite(ctx, writes)
	note(err)
	return res, err
}

// store is that of the API server; nil while it is down.
func (p *place) store() store.Store {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.api == nil {
		return nil
	}
	return p.api.open.Store()
}

// open opens the Deployment. Its database may be down for the moment.
func (p *place) open(reg *registry.Registry, conns int) *deployment.Deployment {
	w := p.world
	var d *deployment.Deployment
	err := retry(context.Background(), 30*time.Second, func() (err error) {
		d, err = deployment.Open(context.Background(), p.config(reg, conns))
		return err
	})
	if err != nil {
		w.t.Errorf("open %s: %v", p.key, err)
		return nil
	}
	return d
}

func (p *place) config(reg *registry.Registry, conns int) deployment.Config {
	return timings(p.world.cfg.impatient, deployment.Config{
		Key: p.key, Registry: reg, DSN: p.dsn, Logger: p.world.log, MaxShardsPerNode: 256, MaxConns: conns,
		DialContext: dialer(p.world.routes(p.Region)),
	})
}

// routes are the links of a region: from the address that the registry has to the one to dial.
func (w *world) routes(region string) map[string]string {
	routes := map[string]string{}
	for k, l := range w.links[region] {
		routes[w.places[k].wire.addr] = l.Addr()
	}
	return routes
}

func dialer(routes map[string]string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if to := routes[addr]; to != "" {
			addr = to
		}
		return (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, addr)
	}
}

func (p *place) startAPI() { p.startAPIWith(p.world.reg) }

// startAPIWith lets the API server see a topology of its own.
func (p *place) startAPIWith(reg *registry.Registry) {
	d := p.open(reg, 6)
	if d == nil {
		return
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.world.t.Error(err)
		d.Close()
		return
	}
	serve, err := d.Server(l)
	if err != nil {
		p.world.t.Error(err)
		d.Close()
		return
	}
	addr := l.Addr().String()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.api = run(d, serve)
	p.wire.target.Store(&addr)
}

func (p *place) startManager() {
	d := p.open(p.world.reg, 5)
	if d == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mgr = run(d, d.Manage)
}

func run(d *deployment.Deployment, part func(context.Context) error) *process {
	ctx, cancel := context.WithCancel(context.Background())
	r := &process{open: d, cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		r.err = d.Run(ctx, part)
		d.Close()
	}()
	return r
}

// stopAPI and stopManager wait for the end, killAPI and killManager do not: what was under way goes on beside the successor for a moment.
func (p *place) stopAPI()     { p.end(&p.api, true) }
func (p *place) stopManager() { p.end(&p.mgr, true) }
func (p *place) killAPI()     { p.end(&p.api, false) }
func (p *place) killManager() { p.end(&p.mgr, false) }

func (p *place) end(which **process, wait bool) {
	p.mu.Lock()
	r := *which
	*which = nil
	if which == &p.api {
		p.wire.target.Store(nil)
	}
	p.mu.Unlock()
	if r == nil {
		return
	}
	r.cancel()
	ended := func() {
		<-r.ended
		if r.err != nil && !errors.Is(r.err, context.Canceled) {
			p.world.t.Errorf("%s stopped with %v", p.key, r.err)
		}
	}
	if wait {
		ended()
	} else {
		p.world.dying.Go(ended)
	}
}

func (w *world) stop() {
	var all sync.WaitGroup
	for _, p := range w.places {
		all.Go(func() {
			p.stopManager()
			p.stopAPI()
		})
	}
	all.Wait()
	w.dying.Wait()
}

// heal ends all troubles of the network.
func (w *world) heal() {
	for _, links := range w.links {
		for _, l := range links {
			l.Heal()
		}
	}
	for _, p := range w.places {
		p.wire.setTrouble(trouble{})
		p.wire.intercept(nil)
	}
}

// exec runs SQL in a Deployment's database, past the product; search_path is that of its version.
func (p *place) exec(sql string, args ...any) {
	p.world.t.Helper()
	check(p.world.t, p.tryExec(p.world.t.Context(), sql, args...))
}

func (p *place) tryExec(ctx context.Context, sql string, args ...any) error {
	conn, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	_, err = conn.Exec(ctx, sql, args...)
	return err
}

func (p *place) connect(ctx context.Context) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(p.dsn)
	if err != nil {
		return nil, err
	}
	cfg.RuntimeParams["search_path"] = p.version
	return pgx.ConnectConfig(ctx, cfg)
}

// number asks a Deployment's database for a number.
func (p *place) number(sql string, args ...any) (n int) {
	p.world.t.Helper()
	conn, err := p.connect(p.world.t.Context())
	check(p.world.t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	check(p.world.t, conn.QueryRow(p.world.t.Context(), sql, args...).Scan(&n))
	return n
}

// expireBlockades lets time pass for all tentative blockades of a Deployment: no safety rests on how much.
func (p *place) expireBlockades() { p.exec("UPDATE blockades SET expires_at = now()") }

// forget makes the database of a Deployment that does not run what a standby would be that was behind: it does not know who refers to it, and its epoch rises. It
// still knows where its ownees are.
func (p *place) forget() error {
	return p.tryExec(context.Background(), `BEGIN; DELETE FROM sources WHERE NOT ownee; UPDATE sources SET blocking = false, subscriber = false; DELETE FROM blockades;
		SELECT ctl.raise_epoch(); COMMIT`)
}

func retry(ctx context.Context, limit time.Duration, do func() error) error {
	deadline := time.Now().Add(limit)
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := do()
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		time.Sleep(pause) // a poll with a deadline
	}
}

// eventually fails the test if do fails until the limit.
func eventually(t testing.TB, limit time.Duration, what string, do func() error) {
	t.Helper()
	if err := retry(t.Context(), limit, do); err != nil {
		t.Fatalf("not within %s: %s: %v", limit, what, err)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
