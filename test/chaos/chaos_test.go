// Package chaos runs three whole Deployments against real faults and checks the promises with its own reader.
package chaos

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/netsim"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

var (
	seed     = flag.Uint64("seed", 0, "seed of the faults and writes; 0 picks one")
	duration = flag.Duration("chaos", 20*time.Second, "how long faults are made")
	verbose  = flag.Bool("logs", false, "show the product's logs")
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(pgtest.Main(m))
}

const schema = `
service: sites.example.com
multiRegionPolicy: {enabledRegions: [ap, eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Folder, plural: folders, patterns: ["folders/{folder}"], policyHolder: {field: policy}}
  - {type: Site, plural: sites, patterns: ["folders/{folder}/regions/{region}/sites/{site}"], parent: Folder, onParentDeleted: CascadeDelete}
`

var regions = []string{"ap", "eu", "us"}

// place is one region: its database server, its running Deployment, and the links over which it reaches the others.
type place struct {
	name     string
	pg       *pgserver.Server
	listener *relisten
	links    map[string]*netsim.Link // by target region

	mu   sync.Mutex
	open *deployment.Deployment
	stop func() error
}

// relisten keeps an address over restarts of the server behind it.
type relisten struct{ addr string }

func (r *relisten) listen() (net.Listener, error) { return net.Listen("tcp", r.addr) }

type world struct {
	t      *testing.T
	reg    *registry.Registry
	ca     *pki.CA
	places map[string]*place
	log    *slog.Logger
	audit  time.Duration
}

func newWorld(t *testing.T) *world { return newWorldWith(t, time.Second) }

// newWorldWith starts a world in which copies are audited at an interval.
func newWorldWith(t *testing.T, audit time.Duration) *world {
	t.Helper()
	w := &world{t: t, reg: registry.New(), places: map[string]*place{}, log: slog.New(slog.DiscardHandler), audit: audit}
	if *verbose {
		w.log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	var err error
	if w.ca, err = pki.NewCA("chaos"); err != nil {
		t.Fatal(err)
	}
	var spec v1alpha1.ServiceDescriptorSpec
	if err := yaml.UnmarshalStrict([]byte(schema), &spec); err != nil {
		t.Fatal(err)
	}
	topology := registry.Snapshot{Services: []*v1alpha1.ServiceDescriptor{{ObjectMeta: metav1.ObjectMeta{Name: "sites"}, Spec: spec}}}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, r := range regions {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p := &place{name: r, listener: &relisten{l.Addr().String()}, links: map[string]*netsim.Link{}}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		w.places[r] = p
		topology.Deployments = append(topology.Deployments, &v1alpha1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: r},
			Spec: v1alpha1.DeploymentSpec{Service: "sites.example.com", Region: r, Version: "v1", Shards: 256, Endpoint: "https://" + p.listener.addr,
				TLS: &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: "tls"}}}})
		wg.Go(func() {
			// A killed server must keep what it acknowledged; the disk itself does not fail here.
			pg, err := pgserver.Start(t.Context(), pgserver.Config{Settings: map[string]string{"synchronous_commit": "on"}})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			p.pg = pg
			pgtest.StopAtEnd(t, pg)
			if err := pg.CreateDatabase(t.Context(), r); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if problems := w.reg.Apply(topology); len(problems) > 0 || t.Failed() {
		t.Fatal(problems)
	}
	for _, from := range regions {
		for _, to := range regions {
			if from == to {
				continue
			}
			link, err := netsim.Listen(t.Context(), "127.0.0.1:0", w.places[to].listener.addr)
			if err != nil {
				t.Fatal(err)
			}
			link.SetLatency(5*time.Millisecond, 5*time.Millisecond)
			w.places[from].links[to] = link
			t.Cleanup(link.Close)
		}
	}
	for _, p := range w.places {
		w.start(p)
	}
	t.Cleanup(func() {
		for _, p := range w.places {
			if err := w.halt(p); err != nil {
				t.Errorf("%s stopped with %v", p.name, err)
			}
		}
	})
	return w
}

// start runs the Deployment of p: API server and nodes.
func (w *world) start(p *place) {
	w.t.Helper()
	pair, err := w.ca.Deployment("db-controller", "sites.example.com", p.name)
	if err != nil {
		w.t.Fatal(err)
	}
	source, err := pki.Static(pair, w.ca.CertPEM())
	if err != nil {
		w.t.Fatal(err)
	}
	byAddr := map[string]*netsim.Link{}
	for to, l := range p.links {
		byAddr[w.places[to].listener.addr] = l
	}
	var d *deployment.Deployment
	err = retry(w.t.Context(), 30*time.Second, func() (err error) { // its database may be down
		d, err = deployment.Open(w.t.Context(), deployment.Config{
			Key: registry.Key{Service: "sites.example.com", Region: p.name}, Registry: w.reg, DSN: p.pg.DSN(p.name), TLS: source, Logger: w.log,
			MaxShardsPerNode: 128, AuditInterval: w.audit,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if l := byAddr[addr]; l != nil {
					addr = l.Addr()
				}
				return new(net.Dialer).DialContext(ctx, network, addr)
			},
		})
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	var l net.Listener
	if err := retry(w.t.Context(), 10*time.Second, func() (err error) { l, err = p.listener.listen(); return err }); err != nil {
		w.t.Fatal(err)
	}
	serve, err := d.Server(l)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, serve, d.Manage) }()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = d
	p.stop = func() error {
		cancel()
		err := <-ended
		d.Close()
		return err
	}
}

func (w *world) halt(p *place) error {
	p.mu.Lock()
	stop := p.stop
	p.stop, p.open = nil, nil
	p.mu.Unlock()
	if stop == nil {
		return nil
	}
	return stop()
}

func (p *place) store() store.Store {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open == nil {
		return nil
	}
	return p.open.Store()
}

func retry(ctx context.Context, limit time.Duration, do func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := do()
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond) // a poll with a deadline
	}
}

// row is what the test's own reader sees of one name.
type row struct {
	owner          string
	epoch, version int64
	regions        []string
	content        string
}

// read reads the live rows of a region, past the product.
func (p *place) read(ctx context.Context) (map[string]row, error) {
	conn, err := pgx.Connect(ctx, p.pg.DSN(p.name))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close(ctx) }()
	rows, err := conn.Query(ctx, `SELECT name, owning_region, epoch, resource_version, regions, concat_ws('|', uuid, generation, meta::text, body::text)
		FROM v1.resources WHERE state <> 2`)
	if err != nil {
		return nil, err
	}
	all := map[string]row{}
	var name string
	var r row
	_, err = pgx.ForEachRow(rows, []any{&name, &r.owner, &r.epoch, &r.version, &r.regions, &r.content}, func() error { all[name] = r; return nil })
	return all, err
}

// differences compares every region with what the owners say it must hold (I22, I24, I25).
func (w *world) differences(ctx context.Context) (found []string, rows int, err error) {
	all := map[string]map[string]row{}
	for _, p := range w.places {
		if all[p.name], err = p.read(ctx); err != nil {
			return nil, 0, err
		}
	}
	for _, region := range regions {
		must := map[string]row{}
		for owner, held := range all {
			for name, r := range held {
				if r.owner == owner && (owner == region || slices.Contains(r.regions, region) || slices.Contains(r.regions, "*")) {
					must[name] = r
				}
			}
		}
		rows += len(must)
		for name, want := range must {
			got, ok := all[region][name]
			if !ok {
				found = append(found, fmt.Sprintf("%s misses %s of %s", region, name, want.owner))
			} else if fmt.Sprint(got) != fmt.Sprint(want) {
				found = append(found, fmt.Sprintf("%s has %s as %v, its owner as %v", region, name, got, want))
			}
		}
		for name, got := range all[region] {
			if _, ok := must[name]; !ok {
				found = append(found, fmt.Sprintf("%s holds %s of %s, which it must not", region, name, got.owner))
			}
		}
	}
	return found, rows, nil
}

// journal is what a writer knows of the names it writes.
type journal struct {
	mu    sync.Mutex
	acked map[string]string          // the value last acknowledged; "" after a delete
	maybe map[string]map[string]bool // values written since whose outcome is unknown
	count map[string]int
}

func (j *journal) note(name, value string, err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch store.CodeOf(err) {
	case 0:
		if err == nil {
			j.acked[name] = value
			delete(j.maybe, name)
			j.count["acknowledged"]++
			return nil
		}
		if !errors.Is(err, context.Canceled) && !errors.Is(err, io.EOF) {
			return err
		}
	case store.Unavailable, store.Aborted:
	case store.FailedPrecondition: // the policy has not arrived in this region yet
		j.count["refused"]++
		return nil
	default:
		return err
	}
	if j.maybe[name] == nil {
		j.maybe[name] = map[string]bool{}
	}
	j.maybe[name][value] = true
	j.count["unknown"]++
	return nil
}

// check compares a journal with what the owner has: every acknowledged write is there or superseded by a later one (P4).
func (j *journal) check(held map[string]row) (lost []string) {
	for name, value := range j.acked {
		r, ok := held[name]
		now := ""
		if ok {
			_, now, _ = strings.Cut(r.content, `"value": "`)
			now, _, _ = strings.Cut(now, `"`)
		}
		if now != value && !j.maybe[name][now] {
			lost = append(lost, fmt.Sprintf("%s: acknowledged %q, stored %q, unknown %v", name, value, now, slices.Collect(maps.Keys(j.maybe[name]))))
		}
	}
	return lost
}

func folder(name string, enabled ...string) store.Write {
	return store.Write{Op: store.Save, Name: "folders/" + name, Type: "Folder",
		Body: []byte(`{"policy":{"enabledRegions":["` + strings.Join(enabled, `","`) + `"],"defaultControlRegion":"eu"}}`)}
}

// TestCopiesSurviveFaults: while every region writes, databases are killed, links cut and reset, and whole Deployments stopped and started. After
// healing, all copies equal their owners, nothing acknowledged is lost, and no copy ever went back.
func TestCopiesSurviveFaults(t *testing.T) {
	s := cmp.Or(*seed, uint64(time.Now().UnixNano()))
	t.Logf("seed %d (repeat with -seed %d)", s, s)
	w := newWorld(t)
	ctx := t.Context()
	eu := w.places["eu"]
	for _, f := range []store.Write{folder("all", regions...), folder("pair", "eu", "us"), folder("flip", regions...)} {
		if _, err := store.Apply(ctx, eu.store(), f); err != nil {
			t.Fatal(err)
		}
	}

	writing, stopWriting := context.WithCancel(ctx)
	var wg sync.WaitGroup
	journals := map[string]*journal{}
	for i, r := range regions {
		p := w.places[r]
		j := &journal{acked: map[string]string{}, maybe: map[string]map[string]bool{}, count: map[string]int{}}
		journals[r] = j
		rng := rand.New(rand.NewPCG(s, uint64(i)))
		wg.Go(func() {
			for n := 0; writing.Err() == nil; n++ {
				name := fmt.Sprintf("folders/%s/regions/%s/sites/%d", []string{"all", "pair", "flip"}[rng.IntN(3)], r, rng.IntN(300))
				if r == "ap" && !strings.Contains(name, "/all/") { // a region that comes and goes may own nothing
					continue
				}
				value := fmt.Sprintf("%s-%d", r, n)
				wr := store.Write{Op: store.Save, Name: name, Body: []byte(`{"value":"` + value + `"}`)}
				if rng.IntN(10) == 0 {
					wr, value = store.Write{Op: store.Delete, Name: name, AllowMissing: true}, ""
				}
				st := p.store()
				if st == nil {
					continue
				}
				call, cancel := context.WithTimeout(ctx, 20*time.Second)
				_, err := store.Apply(call, st, wr)
				cancel()
				if err := j.note(name, value, err); err != nil {
					t.Errorf("write %s: %v", name, err)
					return
				}
				time.Sleep(time.Duration(rng.IntN(4)) * time.Millisecond) // the load, not a wait for something
			}
		})
	}
	wg.Go(func() { // the policy of one folder goes to and fro
		for n := 0; writing.Err() == nil; n++ {
			f := folder("flip", regions...)
			if n%2 == 0 {
				f = folder("flip", "eu", "us", "ap")
				f.Body = []byte(strings.Replace(string(f.Body), `"us","ap"`, `"us"`, 1))
			}
			if st := eu.store(); st != nil {
				call, cancel := context.WithTimeout(ctx, 20*time.Second)
				_, err := store.Apply(call, st, f)
				cancel()
				if c := store.CodeOf(err); err != nil && c != store.Unavailable && c != store.Aborted {
					t.Errorf("flip: %v", err)
				}
			}
			time.Sleep(300 * time.Millisecond) // the load
		}
	})
	backwards := make(chan string, 100)
	for _, r := range regions {
		wg.Go(func() { w.watchVersions(writing, w.places[r], backwards) })
	}

	fired := w.nemesis(ctx, rand.New(rand.NewPCG(s, 99)), time.Now().Add(*duration))
	stopWriting()
	wg.Wait()
	close(backwards)
	for b := range backwards {
		t.Error(b)
	}

	// Every document of the folder that changed its policy learns the last one: following a policy by itself is not this test's subject.
	for _, r := range regions {
		p := w.places[r]
		if err := retry(ctx, 30*time.Second, func() error { return resave(ctx, p) }); err != nil {
			t.Fatalf("%s: save again: %v", r, err)
		}
	}
	var left []string
	var rows int
	err := retry(ctx, 90*time.Second, func() (err error) {
		if left, rows, err = w.differences(ctx); err == nil && len(left) > 0 {
			err = fmt.Errorf("%d differences", len(left))
		}
		return err
	})
	if err != nil {
		for _, p := range w.places {
			t.Logf("%s: %+v", p.name, p.open.Peers())
		}
		t.Fatalf("after healing: %v, for example:\n%s", err, strings.Join(left[:min(10, len(left))], "\n"))
	}
	for _, r := range regions {
		held, err := w.places[r].read(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if lost := journals[r].check(held); len(lost) > 0 {
			t.Errorf("%s lost %d acknowledged writes: %v", r, len(lost), lost[:min(5, len(lost))])
		}
		t.Logf("%s: %v", r, journals[r].count)
	}
	t.Logf("%d rows in their places; faults: %v", rows, fired)
	for _, f := range faults {
		if *duration >= 20*time.Second && fired[f] == 0 {
			t.Errorf("the fault %q never fired: the run proves nothing about it", f)
		}
	}
}

var faults = []string{"kill database", "stop database at once", "cut", "one-way cut", "reset", "restart deployment"}

// nemesis makes random faults, several at a time, until the deadline, and then heals everything.
func (w *world) nemesis(ctx context.Context, rng *rand.Rand, until time.Time) map[string]int {
	fired := map[string]int{}
	var wg sync.WaitGroup
	var busy sync.Map            // one fault per thing at a time
	due := rng.Perm(len(faults)) // each once, then any
	for time.Now().Before(until) {
		at := rng.IntN(len(regions))
		p, other := w.places[regions[at]], regions[(at+1+rng.IntN(len(regions)-1))%len(regions)]
		fault := faults[rng.IntN(len(faults))]
		for_ := time.Duration(rng.IntN(2500)) * time.Millisecond
		if _, taken := busy.LoadOrStore(p.name, true); !taken {
			if len(due) > 0 {
				fault, due = faults[due[0]], due[1:]
			}
			fired[fault]++
			wg.Go(func() {
				defer busy.Delete(p.name)
				switch fault {
				case "kill database", "stop database at once":
					sig := syscall.SIGKILL
					if fault != "kill database" {
						sig = syscall.SIGQUIT
					}
					if err := p.pg.Crash(sig); err != nil {
						w.t.Errorf("%s: %v", fault, err)
					}
					time.Sleep(for_ / 3)
					if err := p.pg.Restart(ctx); err != nil {
						w.t.Errorf("restart database: %v", err)
					}
				case "cut", "one-way cut":
					for to, l := range p.links {
						if fault == "cut" {
							l.Cut()
							w.places[to].links[p.name].Cut()
						} else if to == other {
							l.CutDownstream()
						}
					}
					time.Sleep(for_)
					for to, l := range p.links {
						l.Heal()
						w.places[to].links[p.name].Heal()
					}
				case "reset":
					for _, l := range p.links {
						l.Reset()
					}
				case "restart deployment":
					if err := w.halt(p); err != nil {
						w.t.Errorf("%s stopped with %v", p.name, err)
					}
					w.start(p)
				}
			})
		}
		time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond) // the rhythm of the faults
	}
	wg.Wait()
	for _, p := range w.places {
		for _, l := range p.links {
			l.Heal()
		}
	}
	return fired
}

// watchVersions reports copies whose version goes back (I23). A region's database is asked directly.
func (w *world) watchVersions(ctx context.Context, p *place, backwards chan<- string) {
	seen := map[string]row{}
	for ctx.Err() == nil {
		now, err := p.read(ctx)
		if err != nil {
			continue // its server is down
		}
		for name, r := range now {
			was, ok := seen[name]
			if ok && (was.epoch > r.epoch || was.epoch == r.epoch && was.version > r.version) {
				select {
				case backwards <- fmt.Sprintf("%s in %s went back from %v to %v", name, p.name, was, r):
				default:
				}
			}
			seen[name] = r
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// resave saves what the region owns without a change, which refreshes metadata.syncing.
func resave(ctx context.Context, p *place) error {
	st := p.store()
	for token := ""; ; {
		page, err := st.List(ctx, store.Query{Type: "Site", PageSize: 1000, PageToken: token})
		if err != nil {
			return err
		}
		for _, r := range page.Resources {
			if r.OwningRegion != p.name {
				continue
			}
			if _, err := store.Apply(ctx, st, store.Write{Op: store.Update, Name: r.Name, Meta: r.Meta, Body: r.Body}); err != nil {
				return err
			}
		}
		if token = page.NextPageToken; token == "" {
			return nil
		}
	}
}
