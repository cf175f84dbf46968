package references

import (
	"context"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// enough is how many operations a run should have; a slow machine gets twice the time for them.
const enough = 2000

// howLong is how long faults are made.
func howLong(t *testing.T) time.Duration {
	if s := os.Getenv(forVar); s != "" {
		d, err := time.ParseDuration(s)
		check(t, err)
		return d
	}
	if testing.Short() {
		return 8 * time.Second
	}
	return 30 * time.Second
}

// TestReferencesHoldUnderFaults: users of nine Deployments save, change and delete resources that refer to each other in every way, while links, managers, API servers and the
// databases fail. All the time, what an anchor refers to is there. After healing everything becomes quiet, and then the tables show
// that the references hold (I1, I2, I4 to I12, I14 to I20; P7, P8, P9, P11; F5, D1, R1, R3 to R5).
func TestReferencesHoldUnderFaults(t *testing.T) {
	t.Logf("seed %d (repeat with %s=%d)", seed(), seedVar, seed())
	// low runs the version that mid imports, or the one that high imports.
	w := newWorld(t, config{impatient: true, versions: map[string]string{low: []string{"v2", "v1"}[seed()%2]}})
	l := w.newWorkload()
	working, stopWorking := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, wk := range l.workers() {
		wg.Go(func() { wk.run(working) })
	}
	until := time.Now().Add(howLong(t))
	fired := w.nemesis(rand.New(rand.NewPCG(seed(), 99)), func() bool {
		return !l.broken() && (time.Now().Before(until) || w.books.operations() < enough && time.Now().Before(until.Add(howLong(t))))
	})
	stopWorking()
	wg.Wait()
	w.heal()
	if l.broken() {
		w.fail("a promise was broken under way", l.found)
	}
	healed := time.Now()
	images := w.mustHold(60*time.Second, l.unstick)
	links, rows := 0, 0
	for _, m := range images {
		links += len(m.links)
		for _, r := range m.owned {
			if r.live() {
				rows++
			}
		}
	}
	t.Logf("quiet after %s: %d resources with %d references", time.Since(healed).Round(time.Millisecond), rows, links)
	t.Logf("operations: %v; %v; faults: %v", w.books.counts(), l.count, fired)
	calls := map[string]int{}
	for _, p := range w.places {
		for k, n := range p.wire.seen {
			calls[k] += n
		}
	}
	t.Logf("calls: %v", calls)
	if howLong(t) >= 30*time.Second {
		for _, f := range faults {
			if fired[f.name] == 0 {
				t.Errorf("the fault %q never fired: the run proves nothing about it", f.name)
			}
		}
		for _, k := range []string{"lose request", "lose answer", "twice", "again", "EstablishReferences", "ConfirmBlockades", "CheckIfResourceIsBlocked", "CheckIfResourceHasDeletionSubscriber", "ConfirmMetaOwner"} {
			if calls[k] == 0 {
				t.Errorf("%q never happened: the run proves nothing about it", k)
			}
		}
	}
}

// fault is something that happens for a while.
type fault struct {
	name string
	// weight is how often, against the others.
	weight int
	do     func(w *world, rng *rand.Rand, p *place, wait func(time.Duration))
}

var faults = []fault{
	{"cut", 3, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		for r, links := range w.links {
			if r != p.Region || rng.IntN(2) == 0 {
				links[p.key].Cut()
			}
		}
		wait(1500 * time.Millisecond)
		for _, links := range w.links {
			links[p.key].Heal()
		}
	}},
	{"one-way cut", 2, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		for _, links := range w.links {
			links[p.key].CutDownstream() // it hears, and its answers are lost
		}
		wait(time.Second)
		for _, links := range w.links {
			links[p.key].Heal()
		}
	}},
	{"reset", 2, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		for _, links := range w.links {
			links[p.key].Reset()
		}
	}},
	{"bad wire", 4, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		p.wire.setTrouble(trouble{0.1, 0.1, 0.15, 0.15})
		wait(2 * time.Second)
		p.wire.setTrouble(trouble{})
	}},
	{"kill manager", 3, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		p.killManager()
		wait(time.Second)
		p.startManager()
	}},
	{"two managers", 1, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		d := p.open(w.reg, 4)
		if d == nil {
			return
		}
		second := run(d, d.Manage)
		wait(2 * time.Second)
		second.cancel()
		<-second.ended
	}},
	{"kill API server", 2, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		p.killAPI()
		wait(500 * time.Millisecond)
		p.startAPI()
	}},
	{"early expiry", 3, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		// Clocks go as they like: nothing rests on how long a blockade lasts (P21).
		_ = p.tryExec(w.t.Context(), "UPDATE blockades SET expires_at = now()") // the database may be down
	}},
	{"failover that forgets", 1, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		p.stopManager()
		p.stopAPI()
		if err := p.forget(); err != nil {
			w.books.note("faults", "forget %s: %v", p.key, err) // the databases are down
		}
		p.startAPI()
		p.startManager()
	}},
	{"stop databases at once", 1, func(w *world, rng *rand.Rand, p *place, wait func(time.Duration)) {
		if err := w.pg.Crash(syscall.SIGQUIT); err != nil {
			w.t.Errorf("stop databases: %v", err)
		}
		wait(300 * time.Millisecond)
		if err := w.pg.Restart(context.Background()); err != nil {
			w.t.Errorf("start databases: %v", err)
		}
	}},
}

// nemesis makes random faults, a few at a time and one for a Deployment, as long as it shall go on.
func (w *world) nemesis(rng *rand.Rand, goOn func() bool) map[string]int {
	for _, links := range w.links {
		for _, l := range links {
			l.SetLatency(0, 2*time.Millisecond)
		}
	}
	var bag []fault
	for _, f := range faults {
		for range f.weight {
			bag = append(bag, f)
		}
	}
	first := slices.Clone(faults) // each at least once
	rng.Shuffle(len(first), func(i, j int) { first[i], first[j] = first[j], first[i] })
	fired := map[string]int{}
	var wg sync.WaitGroup
	var busy sync.Map
	crashed := time.Time{}
	for goOn() {
		f := bag[rng.IntN(len(bag))]
		p := w.places[w.keys[rng.IntN(len(w.keys))]]
		if len(first) > 0 {
			f = first[0]
		} else if f.name == "stop databases at once" && time.Since(crashed) < 20*time.Second {
			continue
		}
		if _, taken := busy.LoadOrStore(p.key, true); !taken {
			fired[f.name]++
			if len(first) > 0 {
				first = first[1:]
			}
			if f.name == "stop databases at once" {
				crashed = time.Now()
			}
			own := rand.New(rand.NewPCG(rng.Uint64(), 1))
			wg.Go(func() {
				defer busy.Delete(p.key)
				w.books.note("faults", "%s %s", f.name, p.key)
				f.do(w, own, p, func(most time.Duration) { time.Sleep(time.Duration(own.Int64N(int64(most)))) }) // how long the fault lasts
			})
		}
		time.Sleep(time.Duration(rng.IntN(800)) * time.Millisecond) // the rhythm of the faults
	}
	wg.Wait()
	return fired
}
