package nodemanager_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
)

// fence is a Fencer that remembers every effect: what P12 is about.
type fence struct {
	mu     sync.Mutex
	down   error
	claims []fenceClaim // the epoch is the index plus one
	last   map[int32]int64
	writer map[string]string // by shard and epoch
	wrong  []string
	// Effects that were accepted, and those that were not.
	accepted, refused int
}

type fenceClaim struct {
	kind, holder string
	shards       descriptor.ShardRange
	plan         int64
	over         bool
}

func newFence() *fence { return &fence{last: map[int32]int64{}, writer: map[string]string{}} }

func (f *fence) Raise(_ context.Context, kind string, shards descriptor.ShardRange, plan int64, holder string) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down != nil {
		return 0, f.down
	}
	for _, c := range f.claims {
		if c.kind == kind && length(overlap(c.shards, shards)) > 0 && c.plan > plan {
			return 0, nodemanager.ErrStalePlan
		}
	}
	for i, c := range f.claims {
		if c.kind == kind && length(overlap(c.shards, shards)) > 0 {
			f.claims[i].over = true
		}
	}
	f.claims = append(f.claims, fenceClaim{kind: kind, holder: holder, shards: shards, plan: plan})
	return int64(len(f.claims)), nil
}

func (f *fence) Highest(_ context.Context, kind string) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	highest := int64(0)
	for _, c := range f.claims {
		if c.kind == kind {
			highest = max(highest, c.plan)
		}
	}
	return highest, f.down
}

func (f *fence) Holds(_ context.Context, epoch int64) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.claims[epoch-1].over, f.down
}

func (f *fence) Drop(_ context.Context, epoch int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.claims[epoch-1].over = true
	return f.down
}

func (f *fence) setDown(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = err
}

// write has an effect for a shard, if epoch allows it.
func (f *fence) write(epoch int64, shard int32, by string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if epoch == 0 || f.claims[epoch-1].over || shard < f.claims[epoch-1].shards.From || shard >= f.claims[epoch-1].shards.To {
		f.refused++
		return
	}
	f.accepted++
	if epoch < f.last[shard] {
		f.wrong = append(f.wrong, fmt.Sprintf("shard %d: epoch %d after %d", shard, epoch, f.last[shard]))
	}
	f.last[shard] = epoch
	key := fmt.Sprintf("%d in %d", epoch, shard)
	if was := f.writer[key]; was != "" && was != by {
		f.wrong = append(f.wrong, fmt.Sprintf("%s: both %s and %s", key, was, by))
	}
	f.writer[key] = by
}

func (f *fence) sofar() (accepted, refused int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.accepted, f.refused
}

type epochKey struct{}

func withClaim(ctx context.Context, epoch func() int64) context.Context {
	return context.WithValue(ctx, epochKey{}, epoch)
}

// busyNode has an effect on each of its shards all the time.
type busyNode struct {
	p    *proc
	name string
	work chan struct{} // filled while there are effects under way; a mutex would stop the clock of synctest

	mu     sync.Mutex
	shards descriptor.ShardRange
}

func (n *busyNode) UpdateShardRange(ctx context.Context, r descriptor.ShardRange) error {
	if n.p.deaf() {
		<-n.p.world.end
	}
	if n.p.hangs() {
		<-ctx.Done()
		return ctx.Err()
	}
	if ctx.Value(epochKey{}) == nil {
		return errors.New("no claim in the context")
	}
	n.mu.Lock()
	n.shards = r
	n.mu.Unlock()
	n.work <- struct{}{} // until what is under way has ended
	<-n.work
	return ctx.Err()
}

func (n *busyNode) Run(ctx context.Context) error {
	epoch := ctx.Value(epochKey{}).(func() int64)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	done := ctx.Done()
	for {
		select {
		case <-tick.C:
		case <-done:
			if !n.p.stubborn() {
				return nil
			}
			done = nil
		case <-n.p.world.end:
			return nil
		}
		n.work <- struct{}{}
		n.mu.Lock()
		r := n.shards
		n.mu.Unlock()
		under := epoch()
		time.Sleep(7 * time.Millisecond) // an effect takes its time
		for i := r.From; i < r.To; i++ {
			n.p.world.fence.write(under, i, n.name)
		}
		<-n.work
	}
}

// proc is a process with a manager.
type proc struct {
	world   *ringWorld
	name    string
	manager *nodemanager.Manager
	metrics *prometheus.Registry
	cancel  context.CancelFunc
	ended   chan struct{}
	err     error

	mu sync.Mutex
	// Nodes do not stop when told to; do not change their range when told to; do not even return from that.
	isStubborn, isStuck, isDeaf bool
	made                        int
}

func (p *proc) deaf() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.isDeaf
}

func (p *proc) stubborn() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.isStubborn
}

func (p *proc) hangs() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.isStuck
}

func (p *proc) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

type ringWorld struct {
	t     *testing.T
	place *localPlace
	fence *fence
	ring  int
	end   chan struct{}
	procs []*proc // alive
}

func newRingWorld(t *testing.T) *ringWorld {
	w := &ringWorld{t: t, place: newLocalPlace(t, nodemanager.Timing{}), fence: newFence(), ring: 64, end: make(chan struct{})}
	t.Cleanup(func() {
		close(w.end)
		time.Sleep(time.Second) // nodes that were told nothing else end
		w.fence.mu.Lock()
		defer w.fence.mu.Unlock()
		for _, what := range w.fence.wrong {
			t.Error("P12:", what)
		}
		if w.fence.accepted == 0 {
			t.Error("nothing has happened")
		}
	})
	return w
}

func (w *ringWorld) start(name string) *proc {
	p := &proc{world: w, name: name, metrics: prometheus.NewRegistry(), ended: make(chan struct{})}
	known := make(topology)
	close(known)
	m, err := nodemanager.New(nodemanager.Config{
		Topology: known, Ring: w.ring, Version: "v1", Membership: w.place.Member(name), Fencer: w.fence, WithClaim: withClaim, Settle: time.Second,
		Metrics: p.metrics, Logger: slog.New(slog.DiscardHandler),
		Kinds: []nodemanager.Kind{{Name: "busy", Nodes: 2, Status: func() []byte { return []byte(name) }, New: func(string) (nodemanager.Node, error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.made++
			return &busyNode{p: p, name: fmt.Sprintf("%s's %d", name, p.made), work: make(chan struct{}, 1)}, nil
		}}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	p.manager = m
	ctx, cancel := context.WithCancel(w.t.Context())
	p.cancel = cancel
	go func() {
		defer close(p.ended)
		p.err = m.Run(ctx)
	}()
	w.t.Cleanup(func() {
		cancel()
		p.set(func() { p.isStubborn, p.isStuck = false, false })
		<-p.ended
	})
	w.procs = append(w.procs, p)
	return p
}

func (w *ringWorld) gone(p *proc) {
	w.procs = slices.DeleteFunc(w.procs, func(x *proc) bool { return x == p })
}

// leave ends a process as one does.
func (w *ringWorld) leave(p *proc) {
	w.gone(p)
	p.cancel()
	<-p.ended
	if p.err != nil {
		w.t.Errorf("%s ended with %v", p.name, p.err)
	}
}

// kill ends it without a word.
func (w *ringWorld) kill(p *proc) {
	w.gone(p)
	w.place.Cut(p.name, true)
	p.cancel()
	<-p.ended
}

// covered waits until every shard is served, evenly, and says how long it took.
func (w *ringWorld) covered(within time.Duration) time.Duration {
	w.t.Helper()
	began := time.Now()
	for {
		synctest.Wait()
		err := w.isCovered()
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > within {
			w.t.Fatalf("not covered after %s: %v", within, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (w *ringWorld) isCovered() error {
	var leader *proc
	for _, p := range w.procs {
		if testutil.ToFloat64(gauge(p.metrics, "dbcontroller_node_leader")) == 1 {
			leader = p
		}
	}
	if leader == nil {
		return errors.New("nobody leads")
	}
	k := leader.manager.Status().Kinds[0]
	if k.Unowned > 0 || len(k.Draining) > 0 {
		return fmt.Errorf("%d unowned, draining %v", k.Unowned, k.Draining)
	}
	var nodes []nodemanager.NodeID
	holds := ranges{}
	for _, m := range k.Members {
		for _, n := range m.Nodes {
			if n.Held != n.Granted || n.Held != n.Target {
				return fmt.Errorf("%s holds %s, is granted %s of %s", n.ID, n.Held, n.Granted, n.Target)
			}
			nodes = append(nodes, n.ID)
			holds[n.ID] = n.Held
		}
	}
	if len(nodes) != 2*len(w.procs) {
		return fmt.Errorf("%d nodes of %d processes", len(nodes), len(w.procs))
	}
	return wrong(w.ring, nodes, holds)
}

// gauge reads one gauge of a registry.
func gauge(r *prometheus.Registry, name string) prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "read"})
	families, _ := r.Gather()
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				g.Add(m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount()))
			}
		}
	}
	return g
}

func TestScaled(t *testing.T) { // P12, P13, X24
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		for step, n := range []int{1, 3, 7, 2, 5, 1} {
			for i := len(w.procs); i < n; i++ {
				w.start(fmt.Sprintf("p%d-%d", step, i))
			}
			for len(w.procs) > n {
				w.leave(w.procs[0]) // the leader too
			}
			t.Logf("%d processes: covered after %s", n, w.covered(10*time.Second))
			if _, refused := w.fence.sofar(); refused > 0 {
				t.Logf("%d effects refused so far", refused)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if err := w.isCovered(); err != nil {
				t.Fatal(err)
			}
		}
		p := w.procs[0]
		k := p.manager.Status().Kinds[0]
		if k.Kind != "busy" || k.Leader != p.manager.Status().Member || k.Owned != 64 || k.PlanVersion == 0 || string(k.Members[0].Status) != p.name {
			t.Errorf("status %+v", k)
		}
		for name, least := range map[string]float64{
			"dbcontroller_shards_owned": 64, "dbcontroller_shard_moves_total": 1, "dbcontroller_shard_handover_duration_seconds": 1,
		} {
			if got := testutil.ToFloat64(gauge(p.metrics, name)); got < least {
				t.Errorf("%s is %v", name, got)
			}
		}
		if got := testutil.ToFloat64(gauge(p.metrics, "dbcontroller_shards_unowned")); got != 0 {
			t.Errorf("unowned: %v", got)
		}
	})
}

// TestStatusIsAsOldAsARenewal: what others say of themselves is not older than the time between two renewals, or copies that are fresh look stale.
func TestStatusIsAsOldAsARenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		a, b := w.start("a"), w.start("b")
		w.covered(10 * time.Second)
		var oldest time.Duration
		looks := 0
		for range 1000 {
			time.Sleep(37 * time.Millisecond)
			for _, m := range a.manager.Status().Kinds[0].Members {
				if m.ID == b.manager.Status().Member && !m.Heard.IsZero() {
					looks++
					oldest = max(oldest, time.Since(m.Heard))
					if string(m.Status) != "b" {
						t.Fatalf("b says %q", m.Status)
					}
				}
			}
		}
		if looks < 900 {
			t.Errorf("the status was known in %d of 1000 looks", looks)
		}
		if oldest > 2*time.Second { // the default of RetryPeriod
			t.Errorf("the status of another member was up to %s old", oldest)
		}
	})
}

func TestKilled(t *testing.T) { // P13: covered again within the lease and two retries
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		for i := range 4 {
			w.start(fmt.Sprintf("p%d", i))
		}
		w.covered(10 * time.Second)
		for len(w.procs) > 1 {
			w.kill(w.procs[0]) // leader and owner together
			took := w.covered(time.Minute)
			t.Logf("covered after %s", took)
			if took > w.place.timing.Lease+2*w.place.timing.RetryPeriod {
				t.Errorf("covered after %s", took)
			}
		}
	})
}

func TestCutOffAndBack(t *testing.T) { // O1, O3: the work ends before the lease does
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		a := w.start("a")
		w.covered(10 * time.Second)
		for _, name := range []string{"b", "c"} {
			w.start(name)
		}
		w.covered(10 * time.Second)
		was := a.manager.Status().Member
		w.place.Cut("a", true)
		w.gone(a)
		time.Sleep(w.place.timing.RenewDeadline + w.place.timing.RetryPeriod + time.Second)
		synctest.Wait()
		if got := a.manager.Status().Member; got == was {
			t.Errorf("it is still %s", got)
		}
		if _, refused := w.fence.sofar(); refused > 0 {
			t.Logf("%d refused", refused)
		}
		w.covered(10 * time.Second)
		w.place.Cut("a", false)
		w.procs = append(w.procs, a)
		w.covered(30 * time.Second)
		if now := a.manager.Status().Member; now == was || now == "" {
			t.Errorf("back as %q", now)
		}
	})
}

func TestPausedInAnUpdate(t *testing.T) { // O3: whatever it is that does not end, the process does
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		a := w.start("a")
		w.start("b")
		w.covered(10 * time.Second)
		a.set(func() { a.isDeaf = true })
		c := w.start("c")
		time.Sleep(3 * time.Second)
		w.place.Cut("a", true)
		w.gone(a)
		<-a.ended
		if !errors.Is(a.err, nodemanager.ErrNotStopped) {
			t.Errorf("the process goes on: %v", a.err)
		}
		w.covered(w.place.timing.Lease + 2*w.place.timing.RetryPeriod)
		w.leave(c)
		w.covered(10 * time.Second)
	})
}

func TestPaused(t *testing.T) { // D6, O1: it believes, and may not act
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		a := w.start("a")
		w.start("b")
		w.covered(10 * time.Second)
		a.set(func() { a.isStubborn = true })
		w.place.Cut("a", true)
		w.gone(a)
		w.covered(w.place.timing.Lease + 2*w.place.timing.RetryPeriod)
		_, before := w.fence.sofar()
		time.Sleep(10 * time.Second)
		if _, after := w.fence.sofar(); after == before {
			t.Error("it has not tried")
		}
		<-a.ended
		if !errors.Is(a.err, nodemanager.ErrNotStopped) { // O3
			t.Errorf("the process goes on: %v", a.err)
		}
	})
}

func TestRevokedClaimIsMadeAgain(t *testing.T) { // O4
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		p := w.start("a")
		w.covered(10 * time.Second)
		made := p.made
		for i := range 2 { // a claim by nobody, under a plan of this version, and then under a later one that is lost
			if _, err := w.fence.Raise(t.Context(), "busy", descriptor.ShardRange{To: 64}, p.manager.Status().Kinds[0].PlanVersion+int64(7*i), "nobody"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(15 * time.Second)
			before, _ := w.fence.sofar()
			time.Sleep(time.Second)
			if after, _ := w.fence.sofar(); after == before {
				t.Errorf("%d: it does not write", i)
			}
		}
		w.covered(time.Second)
		t.Logf("%d nodes made, %d before", p.made, made)
	})
}

func TestFenceIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		w.fence.setDown(errors.New("no database"))
		w.start("a")
		time.Sleep(time.Hour)
		w.fence.setDown(nil)
		w.covered(10 * time.Second)
		w.fence.setDown(errors.New("no database"))
		w.start("b")
		time.Sleep(time.Hour)
		w.fence.setDown(nil)
		w.covered(10 * time.Second)
	})
}

func TestNodeThatHoldsOnIsStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		a := w.start("a")
		w.covered(10 * time.Second)
		a.set(func() { a.isStuck = true })
		w.start("b")
		time.Sleep(31 * time.Second) // the handover timeout
		a.set(func() { a.isStuck = false })
		w.covered(2 * time.Minute)
	})
}

func TestNodeThatDoesNotEndEndsTheProcess(t *testing.T) { // O3
	synctest.Test(t, func(t *testing.T) {
		w := newRingWorld(t)
		a := w.start("a")
		w.covered(10 * time.Second)
		a.set(func() { a.isStuck, a.isStubborn = true, true })
		w.start("b")
		w.gone(a)
		<-a.ended
		if !errors.Is(a.err, nodemanager.ErrNotStopped) {
			t.Errorf("it ended with %v", a.err)
		}
		w.covered(time.Minute)
	})
}
