package syncing

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store/feed"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// world is a region "us" that copies from owners in memory.
type world struct {
	t      testing.TB
	owners map[string]*memOwner
	target *memTarget
	reg    *registry.Registry
	cfg    Config
	node   *ControllerNode
	stop   func()
}

func newWorld(t testing.TB, edit func(*world)) *world {
	w := &world{t: t, owners: map[string]*memOwner{"eu": newMemOwner("eu")}, target: newMemTarget(), reg: registry.New()}
	w.cfg = Config{
		Service: memService, Region: "us", Version: "v1", Ring: memRing, MaxShardsPerNode: 8, Registry: w.reg, Target: w.target,
		AuditInterval: -1, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Dial: func(d registry.Deployment) (Source, error) {
			if o := w.owners[d.Region]; o != nil {
				return o, nil
			}
			return nil, errors.New("nobody there")
		},
	}
	if edit != nil {
		edit(w)
	}
	return w
}

// declare makes these the Deployments of the service.
func (w *world) declare(regions ...string) {
	w.declareWith(nil, regions...)
}

func (w *world) declareWith(edit func(*v1alpha1.Deployment), regions ...string) {
	var s registry.Snapshot
	for _, r := range append([]string{"us"}, regions...) {
		d := &v1alpha1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: "library-" + r, Namespace: "default"},
			Spec:       v1alpha1.DeploymentSpec{Service: memService, Region: r, Endpoint: "http://" + r + ":80", Version: "v1", Shards: memRing},
		}
		if edit != nil {
			edit(d)
		}
		s.Deployments = append(s.Deployments, d)
	}
	w.reg.Apply(s)
}

func (w *world) start() {
	w.t.Helper()
	node, err := NewControllerNode(w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- node.Run(ctx) }()
	if err := node.UpdateShardRange(ctx, feed.Range{From: 0, To: memRing}); err != nil {
		w.t.Fatal(err)
	}
	w.node = node
	w.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("Run after a stop = %v", err)
		}
		w.stop = func() {}
	}
}

func (w *world) status(region string) PeerStatus {
	for _, s := range w.node.Status() {
		if s.Region == region {
			return s
		}
	}
	return PeerStatus{}
}

func (w *world) equal(region string) error {
	want, got := w.owners[region].live(), w.target.live(region)
	if !maps.Equal(want, got) {
		return fmt.Errorf("copies of %s = %v, want %v", region, got, want)
	}
	return nil
}

// settle lets time pass and then wants equality.
func (w *world) settle(d time.Duration, regions ...string) {
	w.t.Helper()
	time.Sleep(d)
	synctest.Wait()
	for _, r := range regions {
		if err := w.equal(r); err != nil {
			w.t.Error(err)
		}
		if s := w.status(r); s.State != Live {
			w.t.Errorf("%s is %s: %s", r, s.State, s.LastError)
		}
	}
	if w.target.regress != nil {
		w.t.Error(w.target.regress)
	}
}

func book(i int) string { return fmt.Sprintf("shelves/%d/books/%d", i%5, i) }

func books(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = book(i)
	}
	return names
}

func bubble(t *testing.T, edit func(*world), test func(*testing.T, *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, edit)
		w.owners["eu"].save(books(50)...)
		w.declare("eu")
		w.start()
		defer func() { w.stop() }()
		test(t, w)
	})
}

func TestInitialCopyThenLive(t *testing.T) { // F91, F94
	bubble(t, nil, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		w.owners["eu"].save("shelves/9/books/new", book(3))
		w.owners["eu"].put(book(4), true)
		w.settle(10*time.Millisecond, "eu")
		if n := w.owners["eu"].asked["fetch"]; n != 2 { // one bulk for each subrange
			t.Errorf("%d fetches, want 2", n)
		}
	})
}

func TestRestartResumesFromTheCursor(t *testing.T) { // F94
	bubble(t, nil, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		w.stop()
		w.owners["eu"].save(book(1), "shelves/9/books/new")
		w.owners["eu"].put(book(2), true)
		before, writes := w.owners["eu"].asked["digest"], w.target.writes
		w.start()
		w.settle(5*time.Second, "eu")
		if n := w.owners["eu"].asked["digest"] - before; n != 0 {
			t.Errorf("compared %d times in spite of a good cursor", n)
		}
		if n := w.target.writes - writes; n != 3 {
			t.Errorf("%d rows written, want the 3 that changed", n)
		}
	})
}

func TestPurgedTombstoneIsFoundByComparing(t *testing.T) { // X22, F92, F93
	bubble(t, nil, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		w.stop()
		w.owners["eu"].put(book(2), true)
		w.owners["eu"].save(book(7))
		w.owners["eu"].purge()
		w.start()
		w.settle(5*time.Second, "eu")
		if w.owners["eu"].asked["versions"] == 0 {
			t.Error("was not compared by name")
		}
	})
}

func TestOwnerLosesCommits(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		eu := w.owners["eu"]
		w.settle(5*time.Second, "eu")
		backup := eu.backup()
		eu.save(book(1), "shelves/9/books/lost")
		eu.put(book(2), true)
		w.settle(time.Second, "eu")
		eu.restore(backup)
		eu.save(book(3))
		w.settle(20*time.Second, "eu")
	})
}

func TestRowCreatedBetweenListAndDeletionSurvives(t *testing.T) { // F94, I22
	bubble(t, nil, func(t *testing.T, w *world) {
		eu := w.owners["eu"]
		w.settle(5*time.Second, "eu")
		backup := eu.backup()
		eu.save("shelves/9/books/back")
		w.settle(time.Second, "eu")
		// The owner loses the row, so that the list lacks it, and has it again, under the same version, when asked by name.
		lost := eu.backup()["shelves/9/books/back"]
		eu.onFetch = func() {
			eu.mu.Lock()
			defer eu.mu.Unlock()
			eu.rows["shelves/9/books/back"] = lost
		}
		eu.restore(backup)
		w.settle(20*time.Second, "eu")
	})
}

func TestClocksAreTrueWhileCut(t *testing.T) {
	bubble(t, func(w *world) { w.owners["eu"].ahead = 42 * time.Minute }, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		s := w.status("eu")
		if s.Freshness == nil || *s.Freshness > 1100*time.Millisecond || *s.ApplyLag != 0 || *s.ClockOffset != 42*time.Minute {
			t.Fatalf("idle: freshness %v, apply lag %v, offset %v", *s.Freshness, *s.ApplyLag, *s.ClockOffset)
		}
		cutAt := time.Now()
		w.owners["eu"].cut()
		w.owners["eu"].save(book(1))
		time.Sleep(time.Hour)
		s = w.status("eu")
		for name, age := range map[string]*time.Duration{"contact": s.ContactAge, "freshness": s.Freshness} {
			if since := time.Since(cutAt); *age < since || *age > since+3*time.Second {
				t.Errorf("cut for %v: %s age %v", since, name, *age)
			}
		}
		if s.State == Live || !strings.Contains(s.LastError, "silent") {
			t.Errorf("cut: state %s, last error %q", s.State, s.LastError)
		}
		w.owners["eu"].heal()
		w.settle(8*time.Second, "eu")
		if s := w.status("eu"); *s.Freshness > 1100*time.Millisecond {
			t.Errorf("healed: freshness %v", *s.Freshness)
		}
	})
}

func TestUnreachablePeerDelaysNobody(t *testing.T) {
	bubble(t, func(w *world) { w.owners["ap"] = newMemOwner("ap"); w.owners["ap"].cut() }, func(t *testing.T, w *world) {
		w.declare("eu", "ap", "nowhere")
		w.settle(5*time.Second, "eu")
		for range 20 {
			w.owners["eu"].save(book(1))
			w.settle(10*time.Millisecond, "eu")
		}
		if s := w.status("ap"); s.Freshness != nil || s.ContactAge != nil || s.State == Live {
			t.Errorf("ap never answered: %+v", s)
		}
		if s := w.status("nowhere"); !strings.Contains(s.LastError, "nobody there") {
			t.Errorf("nowhere: %+v", s)
		}
	})
}

func TestDeploymentsComeAndGo(t *testing.T) { // F76, F77, F102, X34, X35
	bubble(t, func(w *world) { w.owners["ap"] = newMemOwner("ap"); w.owners["ap"].save("ap/1", "ap/2") }, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		w.declare("eu", "ap")
		w.settle(5*time.Second, "eu", "ap")
		w.declare("eu", "ap") // nothing new
		w.declare("eu")
		time.Sleep(time.Second)
		w.owners["ap"].save("ap/3")
		time.Sleep(23 * time.Hour)
		if got := len(w.target.live("ap")); got != 2 {
			t.Errorf("%d copies of the removed Deployment, want the 2 from before", got)
		}
		if s := w.status("ap"); s.Region != "" {
			t.Errorf("a removed Deployment has a status: %+v", s)
		}
		w.declare("eu", "ap") // back in time: no purge
		w.settle(5*time.Second, "ap")
		w.declare("eu")
		time.Sleep(25 * time.Hour)
		synctest.Wait()
		if got := len(w.target.live("ap")); got != 0 {
			t.Errorf("%d copies after the grace period, want none", got)
		}
		w.settle(0, "eu")
	})
}

func TestOwnerRemovedWhileNoProcessRan(t *testing.T) { // X35
	bubble(t, func(w *world) { w.owners["ap"] = newMemOwner("ap"); w.owners["ap"].save("ap/1", "ap/2") }, func(t *testing.T, w *world) {
		w.declare("eu", "ap")
		w.settle(5*time.Second, "eu", "ap")
		w.stop()
		w.declare("eu")
		w.start()
		time.Sleep(25 * time.Hour)
		synctest.Wait()
		if got := len(w.target.live("ap")); got != 0 {
			t.Errorf("%d copies after the grace period, want none", got)
		}
		w.settle(5*time.Second, "eu")
	})
}

func TestSuspendedKeepsContactAndClocks(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		w.declareWith(func(d *v1alpha1.Deployment) { d.Spec.SuspendScopes = []v1alpha1.SuspendScope{{PeerRegion: "eu"}} }, "eu")
		time.Sleep(10 * time.Second)
		w.owners["eu"].save(book(1))
		time.Sleep(time.Minute)
		s := w.status("eu")
		if s.State != Suspended || !s.Suspended || *s.ContactAge > 3*time.Second || *s.Freshness < time.Minute {
			t.Errorf("suspended: %s, contact %v, freshness %v", s.State, s.ContactAge, s.Freshness)
		}
		if w.equal("eu") == nil {
			t.Error("a change was applied in spite of the suspension")
		}
		w.declare("eu")
		w.settle(5*time.Second, "eu")
	})
}

func TestPoisonStopsOnlyItself(t *testing.T) { // X26
	bubble(t, func(w *world) { w.target.poison[book(7)] = true }, func(t *testing.T, w *world) {
		time.Sleep(15 * time.Second)
		w.owners["eu"].save(book(8))
		time.Sleep(time.Second)
		s := w.status("eu")
		if s.State != Live || s.Quarantined != 1 || len(w.target.live("eu")) != 49 {
			t.Errorf("%s, %d quarantined, %d copies", s.State, s.Quarantined, len(w.target.live("eu")))
		}
		w.target.mu.Lock()
		w.target.poison = map[string]bool{}
		w.target.mu.Unlock()
		w.owners["eu"].save(book(7))
		w.settle(15*time.Second, "eu")
		if s := w.status("eu"); s.Quarantined != 0 {
			t.Errorf("%d quarantined after the cure", s.Quarantined)
		}
	})
}

func TestOneFrameAheadAndOneAtATime(t *testing.T) { // F95, I30
	bubble(t, func(w *world) { w.cfg.MaxShardsPerNode = -1 }, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		w.target.mu.Lock()
		w.target.slow = time.Hour
		w.target.mu.Unlock()
		w.owners["eu"].save(books(40)...)
		time.Sleep(time.Minute)
		synctest.Wait()
		s := w.status("eu")
		// The one being applied and the one held, of two rows each at most; the first may be the row that came before the others.
		if s.PendingRows < 2 || s.PendingRows > 4 || w.target.maxMerge != 1 {
			t.Errorf("%d rows held, %d merges at once", s.PendingRows, w.target.maxMerge)
		}
		if *s.ApplyLag < time.Minute {
			t.Errorf("apply lag %v after a minute", *s.ApplyLag)
		}
		w.target.mu.Lock()
		w.target.slow = 0
		w.target.mu.Unlock()
		w.settle(2*time.Hour, "eu")
	})
}

func TestAuditRepairsAndCounts(t *testing.T) { // F87, X25
	registry := prometheus.NewRegistry()
	bubble(t, func(w *world) { w.cfg.AuditInterval = time.Minute; w.cfg.Metrics = registry }, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		w.target.mu.Lock() // someone edits the copies by hand
		delete(w.target.rows, book(1))
		r := w.target.rows[book(2)]
		r.version.Number = 0
		w.target.rows[book(2)] = r
		w.target.rows["shelves/9/books/ghost"], w.target.owner["shelves/9/books/ghost"] = r, "eu"
		w.target.mu.Unlock()
		for waited := time.Duration(0); mismatched(t, registry) == 0; waited += time.Second {
			if time.Sleep(time.Second); waited > 2*time.Minute {
				t.Fatal("no mismatch reported")
			}
		}
		w.settle(5*time.Minute, "eu")
		if n := mismatched(t, registry); n != 0 {
			t.Errorf("%v mismatches reported after the repair", n)
		}
		ctx, cancel := context.WithCancel(t.Context()) // writes under way are no mismatch
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for ctx.Err() == nil {
				w.owners["eu"].save(book(rand.N(50)))
				time.Sleep(30 * time.Millisecond)
			}
		}()
		for range 10 {
			time.Sleep(30 * time.Second)
			if n := mismatched(t, registry); n != 0 {
				t.Errorf("%v mismatches reported while writing", n)
			}
		}
		cancel()
		<-ended
		if n, err := testutil.GatherAndCount(registry, "dbcontroller_sync_freshness_seconds"); err != nil || n != 1 {
			t.Errorf("%d freshness series, %v", n, err)
		}
	})
}

func mismatched(t *testing.T, g prometheus.Gatherer) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var sum float64
	for _, f := range families {
		if f.GetName() == "dbcontroller_sync_mismatched_shards" {
			for _, m := range f.GetMetric() {
				sum += m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func TestReshardingKeepsCopying(t *testing.T) { // X24, F79
	bubble(t, nil, func(t *testing.T, w *world) {
		for i, r := range []feed.Range{{From: 0, To: 5}, {From: 0, To: 16}, {From: 0, To: 0}, {From: 4, To: 16}, {From: 0, To: 16}} {
			if err := w.node.UpdateShardRange(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			w.owners["eu"].save(book(i), fmt.Sprintf("shelves/8/books/%d", i))
			time.Sleep(100 * time.Millisecond)
		}
		w.settle(5*time.Second, "eu")
		if err := w.node.UpdateShardRange(t.Context(), feed.Range{From: 0, To: 17}); err == nil {
			t.Error("a range beyond the ring was taken")
		}
	})
}

// Whatever happens in whatever order: once it is quiet, the copies are what the owner has, and no row went back within an epoch.
func TestRandomFaultsConverge(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		seed := rapid.Uint64().Draw(r, "seed")
		rnd := rand.New(rand.NewPCG(seed, 0))
		two := rapid.Bool().Draw(r, "two nodes on the same shards")
		steps := rapid.SliceOfN(rapid.IntRange(0, 15), 1, 60).Draw(r, "steps")
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, func(w *world) { w.cfg.AuditInterval = 20 * time.Second })
			eu := w.owners["eu"]
			eu.save(books(10)...)
			backups := []map[string]memRow{eu.backup()}
			w.declare("eu")
			w.start()
			defer func() { w.stop() }()
			if two {
				other := *w
				other.start()
				defer other.stop()
			}
			faults := func(mu interface {
				Lock()
				Unlock()
			}, fault *func(string) error, f func(string) error) {
				mu.Lock()
				defer mu.Unlock()
				*fault = f
			}
			sometimes := func(op string) error {
				if rand.N(4) == 0 { // from the runtime: the calls come from many goroutines
					return &SourceError{PeerFailed, op, errors.New("injected")}
				}
				return nil
			}
			for _, s := range steps {
				name := book(rnd.IntN(12))
				switch s {
				case 0, 1, 2, 3:
					eu.save(name)
				case 4, 5:
					if _, ok := eu.live()[name]; ok {
						eu.put(name, true)
					}
				case 6:
					eu.cut()
				case 7:
					eu.heal()
				case 8:
					eu.purge()
				case 9:
					backups = append(backups, eu.backup())
				case 10:
					eu.restore(backups[rnd.IntN(len(backups))])
				case 11:
					faults(&eu.mu, &eu.fault, sometimes)
				case 12:
					faults(&w.target.mu, &w.target.fault, sometimes)
				case 13:
					w.stop()
					w.start()
				case 14:
					faults(&eu.mu, &eu.fault, nil)
					faults(&w.target.mu, &w.target.fault, nil)
				default:
					time.Sleep(time.Duration(rnd.IntN(4000)) * time.Millisecond)
				}
				time.Sleep(time.Duration(rnd.IntN(50)) * time.Millisecond)
			}
			eu.heal()
			faults(&eu.mu, &eu.fault, nil)
			faults(&w.target.mu, &w.target.fault, nil)
			w.settle(time.Minute, "eu")
			if t.Failed() {
				t.Logf("seed %d, steps %v", seed, steps)
			}
		})
	})
}

// A Deployment that is missing in a view of the topology, because it is stale or torn, and comes back before the purge loses no copy (P23, X35).
func TestADeploymentThatComesBackLosesNothing(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		w.settle(5*time.Second, "eu")
		copies := len(w.target.live("eu"))
		for range 3 {
			w.declare()
			time.Sleep(DefaultPurgeAfter - time.Second)
			w.declare("eu")
			w.settle(time.Minute, "eu")
			if n := len(w.target.live("eu")); n != copies || copies == 0 {
				t.Fatalf("%d copies, there were %d", n, copies)
			}
		}
	})
}

// While a Deployment is suspended or disabled, or its peer is disabled, nothing is copied and nothing is lost; afterwards it goes on by itself.
func TestPausesEndWithoutLoss(t *testing.T) {
	for name, pause := range map[string]func(*v1alpha1.Deployment){
		"suspended": func(d *v1alpha1.Deployment) { d.Spec.Suspend = d.Spec.Region == "us" },
		"disabled":  func(d *v1alpha1.Deployment) { d.Spec.Disabled = d.Spec.Region == "us" },
		"peer disabled": func(d *v1alpha1.Deployment) {
			d.Spec.Disabled = d.Spec.Region == "eu"
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, nil, func(t *testing.T, w *world) {
				w.settle(5*time.Second, "eu")
				copies := len(w.target.live("eu"))
				w.declareWith(pause, "eu")
				time.Sleep(time.Second)
				w.owners["eu"].save(book(1))
				time.Sleep(2 * DefaultPurgeAfter)
				if n := len(w.target.live("eu")); n != copies || copies == 0 {
					t.Errorf("%d copies, there were %d", n, copies)
				}
				if w.equal("eu") == nil {
					t.Error("a change was applied in spite of the pause")
				}
				w.declare("eu")
				w.settle(time.Minute, "eu")
			})
		})
	}
}
