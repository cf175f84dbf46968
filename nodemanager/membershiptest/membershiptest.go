// Package membershiptest is what every nodemanager.Membership must pass.
package membershiptest

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
)

// Kind is the kind of nodes that the members of a Place have.
const Kind = "work"

// Place is a ring to be a member of.
type Place interface {
	// Member returns the membership of a process of that name.
	Member(name string) nodemanager.Membership
	// Cut makes the process of that name deaf and mute, or heals it.
	Cut(name string, cut bool)
	Timing() nodemanager.Timing
}

// Run runs the suite; each part of it has a fresh place.
func Run(t *testing.T, part func(t *testing.T, f func(t *testing.T, p Place))) {
	for name, f := range map[string]func(*testing.T, Place){
		"members hear of each other": hear, "what they tell is asked for at each renewal": tell, "one leads": lead, "one plan is in force": plan, "who leaves is gone": leave,
		"who is silent stops and is dead": silence, "who does not stop stays until it is dead": stubborn, "who lives stays": stay,
	} {
		t.Run(name, func(t *testing.T) { part(t, func(t *testing.T, p Place) { f(t, p) }) })
	}
}

// process is a member with nothing to do.
type process struct {
	nodemanager.Session
	work   context.Context // that of the work
	cancel context.CancelFunc
	ended  chan struct{}
	err    error // of Run
	result error // for the work to return
	go1    sync.Once
	goOn   chan struct{} // closed: the work may return when its context has ended
}

func start(t *testing.T, p Place, name string) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	x := &process{cancel: cancel, ended: make(chan struct{}), goOn: make(chan struct{})}
	joined := make(chan struct{})
	m := p.Member(name)
	go func() {
		defer close(x.ended)
		x.err = m.Run(ctx, func(ctx context.Context, s nodemanager.Session) error {
			x.Session, x.work = s, ctx
			close(joined)
			<-ctx.Done()
			<-x.goOn
			return x.result
		})
	}()
	t.Cleanup(func() {
		cancel()
		x.free()
		<-x.ended
	})
	select {
	case <-joined:
	case <-time.After(5 * p.Timing().Lease):
		t.Fatalf("%s has not joined", name)
	}
	return x
}

func (x *process) free() { x.go1.Do(func() { close(x.goOn) }) }

func (x *process) end(t *testing.T) {
	t.Helper()
	x.Report(Kind, nodemanager.Report{Leaving: true})
	x.cancel()
	x.free()
	<-x.ended
	if x.err != nil {
		t.Errorf("%s ended with %v", x.Member(), x.err)
	}
}

// sees is the IDs of the living members.
func (x *process) sees() []string {
	var ids []string
	for _, m := range x.View(Kind).Members {
		if m.Alive {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// member is how x sees a member.
func (x *process) member(id string) nodemanager.Member {
	for _, m := range x.View(Kind).Members {
		if m.ID == id {
			return m
		}
	}
	return nodemanager.Member{}
}

// within waits for ok.
func within(t *testing.T, d time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(d); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

func sorted(ids ...string) []string {
	slices.Sort(ids)
	return ids
}

func hear(t *testing.T, p Place) {
	a, b := start(t, p, "a"), start(t, p, "b")
	soon := p.Timing().Lease
	for _, x := range []*process{a, b} {
		within(t, soon, "both see both", func() bool { return slices.Equal(x.sees(), sorted(a.Member(), b.Member())) })
	}
	// A report is heard before the next renewal, and the change is told.
	held := nodemanager.NodeReport{ID: "x", Held: descriptor.ShardRange{From: 1, To: 5}, Seen: 3}
	for len(b.Changes()) > 0 {
		<-b.Changes()
	}
	a.Report(Kind, nodemanager.Report{Nodes: []nodemanager.NodeReport{held}})
	within(t, soon, "b hears a", func() bool {
		r := b.member(a.Member()).Report
		return len(r.Nodes) == 1 && r.Nodes[0] == held && !r.Leaving
	})
	select {
	case <-b.Changes():
	case <-time.After(soon):
		t.Error("nobody told b")
	}
}

func tell(t *testing.T, p Place) {
	a, b := start(t, p, "a"), start(t, p, "b")
	var asked atomic.Int64
	a.Tell(Kind, func() []byte { return strconv.AppendInt(nil, asked.Add(1), 10) })
	a.Tell("other", func() []byte { return []byte("another kind\x00") })
	heard := func() (n int64) {
		n, _ = strconv.ParseInt(string(b.member(a.Member()).Status), 10, 64)
		return n
	}
	within(t, 2*p.Timing().Lease, "b hears a again and again, although a reports nothing", func() bool { return heard() > 3 })
	m := b.member(a.Member())
	if age := time.Since(m.Heard); age < 0 || age > p.Timing().Lease {
		t.Errorf("heard %s ago", age)
	}
	a.Report(Kind, nodemanager.Report{Nodes: []nodemanager.NodeReport{{ID: "x"}}})
	within(t, p.Timing().Lease, "a report leaves it", func() bool {
		m := b.member(a.Member())
		return len(m.Nodes) == 1 && heard() > 3
	})
	within(t, p.Timing().Lease, "another kind tells something else", func() bool {
		return slices.ContainsFunc(b.View("other").Members, func(m nodemanager.Member) bool { return m.ID == a.Member() && string(m.Status) == "another kind\x00" })
	})
}

func lead(t *testing.T, p Place) {
	a, b := start(t, p, "a"), start(t, p, "b")
	soon := 2 * p.Timing().Lease
	one := func() bool {
		return a.View(Kind).Leading != b.View(Kind).Leading && a.View(Kind).Leader != "" && a.View(Kind).Leader == b.View(Kind).Leader
	}
	within(t, soon, "one leads, and both know who", one)
	first, other := a, b
	if b.View(Kind).Leading {
		first, other = b, a
	}
	if first.View(Kind).Leader != first.Member() {
		t.Errorf("%s leads, and %s is said to", first.Member(), first.View(Kind).Leader)
	}
	first.end(t)
	within(t, p.Timing().Lease, "the other leads", func() bool { return other.View(Kind).Leading && other.View(Kind).Leader == other.Member() })
}

func plan(t *testing.T, p Place) {
	a, b := start(t, p, "a"), start(t, p, "b")
	if v := a.View(Kind).Plan.Version; v != 0 {
		t.Fatalf("there is a plan %d", v)
	}
	give := func(version int64, to int32) nodemanager.Plan {
		return nodemanager.Plan{
			Version: version, Ring: 10, Cause: nodemanager.CauseJoin,
			Nodes:    []nodemanager.PlanNode{{ID: "x", Target: descriptor.ShardRange{To: 10}, Granted: descriptor.ShardRange{To: to}}},
			Draining: []nodemanager.Drain{{Node: "y", Shards: descriptor.ShardRange{From: to, To: 10}, Since: version}},
		}
	}
	ctx := t.Context()
	if err := a.Publish(ctx, Kind, give(4, 3), 0); err != nil {
		t.Fatal(err)
	}
	same := func(p nodemanager.Plan, version int64, to int32) bool {
		return p.Version == version && p.Ring == 10 && p.Node("x").Granted.To == to && len(p.Draining) == 1 && p.Draining[0].Since == version
	}
	if !same(a.View(Kind).Plan, 4, 3) {
		t.Errorf("a does not see its own plan at once: %+v", a.View(Kind).Plan)
	}
	soon := p.Timing().Lease
	within(t, soon, "b sees the plan", func() bool { return same(b.View(Kind).Plan, 4, 3) })
	for _, after := range []int64{0, 3, 5} {
		if err := b.Publish(ctx, Kind, give(6, 4), after); !errors.Is(err, nodemanager.ErrConflict) {
			t.Errorf("a plan after %d: %v", after, err)
		}
	}
	// Of two that replace the same plan one wins.
	results := make([]error, 2)
	var both sync.WaitGroup
	for i, x := range []*process{a, b} {
		both.Go(func() { results[i] = x.Publish(ctx, Kind, give(5, int32(i)), 4) })
	}
	both.Wait()
	winner := slices.Index(results, nil)
	if winner < 0 || !errors.Is(results[1-winner], nodemanager.ErrConflict) {
		t.Fatalf("two plans at once: %v", results)
	}
	for _, x := range []*process{a, b} {
		within(t, soon, "the winner's plan is in force", func() bool { return same(x.View(Kind).Plan, 5, int32(winner)) })
	}
	c := start(t, p, "c")
	within(t, soon, "who comes later sees it", func() bool { return same(c.View(Kind).Plan, 5, int32(winner)) })
	if other := c.View("other"); other.Plan.Version != 0 {
		t.Errorf("another kind has %+v", other)
	}
}

func leave(t *testing.T, p Place) {
	a, b := start(t, p, "a"), start(t, p, "b")
	soon := p.Timing().Lease / 2
	within(t, p.Timing().Lease, "both are there", func() bool { return len(b.sees()) == 2 })
	a.end(t)
	within(t, soon, "a is gone", func() bool { return slices.Equal(b.sees(), []string{b.Member()}) })
	again := start(t, p, "a")
	if again.Member() == a.Member() {
		t.Errorf("a is %s again", a.Member())
	}
	within(t, p.Timing().Lease, "a is back", func() bool { return slices.Equal(b.sees(), sorted(again.Member(), b.Member())) })
}

func silence(t *testing.T, p Place) { // O1 to O3
	a, b := start(t, p, "a"), start(t, p, "b")
	within(t, p.Timing().Lease, "both are there", func() bool { return len(b.sees()) == 2 })
	cut := time.Now()
	p.Cut("a", true)
	within(t, p.Timing().Lease, "a is told to stop", func() bool { return a.work.Err() != nil })
	if took := time.Since(cut); took > p.Timing().RenewDeadline+p.Timing().RetryPeriod {
		t.Errorf("it took %s to stop", took)
	}
	select {
	case <-a.Lost():
	case <-time.After(p.Timing().RetryPeriod):
		t.Error("Lost is not closed")
	}
	if !slices.Contains(b.sees(), a.Member()) {
		t.Error("a is dead to b before it has had the time to stop")
	}
	if a.View(Kind).Leading {
		t.Error("a leads still")
	}
	a.free()
	within(t, 2*p.Timing().Lease, "a is dead", func() bool { return slices.Equal(b.sees(), []string{b.Member()}) })
	within(t, 2*p.Timing().Lease, "b leads", func() bool { return b.View(Kind).Leading })
	if took := time.Since(cut); took < p.Timing().RenewDeadline || took > p.Timing().Lease*3/2+p.Timing().RetryPeriod {
		t.Errorf("dead after %s", took)
	}
	<-a.ended
	if !errors.Is(a.err, nodemanager.ErrLost) {
		t.Errorf("Run ended with %v", a.err)
	}
	p.Cut("a", false)
	again := start(t, p, "a")
	within(t, p.Timing().Lease, "a is back as another", func() bool { return slices.Equal(b.sees(), sorted(again.Member(), b.Member())) })
}

func stubborn(t *testing.T, p Place) {
	a, b := start(t, p, "a"), start(t, p, "b")
	within(t, p.Timing().Lease, "both are there", func() bool { return len(b.sees()) == 2 })
	a.result = nodemanager.ErrNotStopped
	a.cancel()
	a.free()
	<-a.ended
	if !errors.Is(a.err, nodemanager.ErrNotStopped) {
		t.Errorf("Run ended with %v", a.err)
	}
	if !slices.Contains(b.sees(), a.Member()) {
		t.Error("a has a node at work, and is gone")
	}
	within(t, 2*p.Timing().Lease, "a is dead", func() bool { return slices.Equal(b.sees(), []string{b.Member()}) })
}

func stay(t *testing.T, p Place) {
	a, b := start(t, p, "a"), start(t, p, "b")
	within(t, p.Timing().Lease, "both are there", func() bool { return len(a.sees()) == 2 && len(b.sees()) == 2 })
	tick := time.NewTicker(p.Timing().RetryPeriod / 3)
	defer tick.Stop()
	for end := time.Now().Add(2 * p.Timing().Lease); time.Now().Before(end); <-tick.C {
		if len(a.sees()) != 2 || len(b.sees()) != 2 || a.work.Err() != nil || b.work.Err() != nil {
			t.Fatalf("a sees %v, b sees %v", a.sees(), b.sees())
		}
	}
}
