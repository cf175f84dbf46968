package syncing

import (
	"context"
	"errors"
	"iter"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// trace is what a node asks of both sides, in order.
type trace struct {
	mu    sync.Mutex
	steps []string
	tails int // open now
	most  int // open at once

	digests int // questions for digests
}

func (t *trace) step(s string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.steps) == 0 || t.steps[len(t.steps)-1] != s {
		t.steps = append(t.steps, s)
	}
}

func (t *trace) take() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	steps := t.steps
	t.steps = nil
	return steps
}

type tracedSource struct {
	Source
	*trace
}

func (s tracedSource) Tail(ctx context.Context, shards feed.Range, cursor string) iter.Seq2[*Frame, error] {
	return func(yield func(*Frame, error) bool) {
		s.mu.Lock()
		s.tails++
		s.most = max(s.most, s.tails)
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			s.tails--
			s.mu.Unlock()
		}()
		s.step("tail")
		s.Source.Tail(ctx, shards, cursor)(yield)
	}
}

func (s tracedSource) Digest(ctx context.Context, shards feed.Range) ([]postgres.ShardDigest, int64, error) {
	s.step("digests of the source")
	s.mu.Lock()
	s.digests++
	s.mu.Unlock()
	return s.Source.Digest(ctx, shards)
}

func (s tracedSource) Versions(ctx context.Context, shards []int32) iter.Seq2[NameVersion, error] {
	s.step("versions of the source")
	return s.Source.Versions(ctx, shards)
}

func (s tracedSource) Fetch(ctx context.Context, names []string) iter.Seq2[Chunk, error] {
	s.step("fetch")
	return s.Source.Fetch(ctx, names)
}

func (s tracedSource) FetchShards(ctx context.Context, shards feed.Range) iter.Seq2[Chunk, error] {
	s.step("fetch all")
	return s.Source.FetchShards(ctx, shards)
}

type tracedTarget struct {
	Target
	*trace
}

func (t tracedTarget) CopyDigests(ctx context.Context, shards feed.Range, owner string) ([]postgres.ShardDigest, error) {
	t.step("digests of the copies")
	return t.Target.CopyDigests(ctx, shards, owner)
}

func (t tracedTarget) DeleteExtras(ctx context.Context, p postgres.Peer, extras []postgres.NameVersion) (int, error) {
	t.step("delete extras")
	return t.Target.DeleteExtras(ctx, p, extras)
}

func (w *world) traced() *trace {
	t := &trace{}
	w.cfg.Target = tracedTarget{w.target, t}
	dial := w.cfg.Dial
	w.cfg.Dial = func(d registry.Deployment) (Source, error) {
		s, err := dial(d)
		return tracedSource{s, t}, err
	}
	return t
}

// The order of spec 5.6: live first; then what the destination has; then the source's set; deletions last; then live only. What happens in the meantime arrives at once, however long the
// comparison takes. (The look-back of a minute has no counterpart: the position of the tail is taken in the owner's database before anything is compared, so no clock decides what is repeated.)
func TestOrderOfAComparison(t *testing.T) { // F91, F92, F93, F94, I28
	var tr *trace
	bubble(t, func(w *world) { w.cfg.MaxShardsPerNode = -1; tr = w.traced() }, func(t *testing.T, w *world) {
		eu := w.owners["eu"]
		w.settle(5*time.Second, "eu")
		if got, want := tr.take(), []string{"tail", "digests of the copies", "fetch all"}; !slices.Equal(got, want) {
			t.Errorf("first copy: %v, want %v", got, want)
		}
		w.stop()
		eu.put(book(1), true)
		eu.put(book(2), true)
		eu.save(book(3))
		eu.purge() // the cursor is lost
		arrived := false
		once := sync.OnceFunc(func() {
			eu.save("shelves/9/books/live")
			for waited := time.Duration(0); waited < time.Second && !arrived; waited += 10 * time.Millisecond {
				time.Sleep(10 * time.Millisecond)
				_, arrived = w.target.live("eu")["shelves/9/books/live"]
			}
			time.Sleep(time.Minute) // a database that takes long
		})
		eu.mu.Lock()
		eu.fault = func(op string) error {
			if op == "digest" {
				once()
			}
			return nil
		}
		eu.mu.Unlock()
		w.start()
		time.Sleep(30 * time.Second)
		if s := w.status("eu"); s.State != Comparing {
			t.Errorf("%s while comparing", s.State)
		}
		w.settle(time.Minute, "eu")
		if !arrived {
			t.Error("a change did not arrive within a second while the databases were compared")
		}
		want := []string{"tail", "digests of the copies", "digests of the source", "digests of the copies", "versions of the source", "fetch", "delete extras"}
		if got := tr.take(); !slices.Equal(got, want) {
			t.Errorf("comparison: %v, want %v", got, want)
		}
		eu.save(book(4))
		w.settle(10*time.Minute, "eu")
		if got := tr.take(); len(got) > 0 {
			t.Errorf("live: %v, want nothing but the tail", got)
		}
	})
}

// One stream per subrange serves live changes, comparisons and audits of all types (F96); the load on the owner does not grow with what is done with its rows.
func TestOneStreamForEverything(t *testing.T) {
	var tr *trace
	bubble(t, func(w *world) { w.cfg.MaxShardsPerNode = 4; w.cfg.AuditInterval = time.Second; tr = w.traced() }, func(t *testing.T, w *world) {
		w.owners["eu"].save("shelves/1", "authors/7", "shelves/1/books/1/pages/3") // other types
		w.settle(time.Minute, "eu")
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if want := memRing / 4; tr.tails != want || tr.most != want {
			t.Errorf("%d streams, at most %d, for %d subranges", tr.tails, tr.most, want)
		}
	})
}

// The audit comes once an interval on average, half an interval early or late, so that subranges do not read at the same time; never when it is negative.
func TestAuditInterval(t *testing.T) { // F87
	for _, c := range []struct {
		interval time.Duration
		min, max int // audits in a day
	}{{0, 100, 190}, {time.Hour, 17, 33}, {-1, 0, 0}} {
		var tr *trace
		bubble(t, func(w *world) { w.cfg.MaxShardsPerNode, w.cfg.AuditInterval = -1, c.interval; tr = w.traced() }, func(t *testing.T, w *world) {
			w.settle(time.Minute, "eu")
			tr.take()
			tr.mu.Lock()
			tr.digests = 0
			tr.mu.Unlock()
			w.settle(24*time.Hour, "eu")
			tr.mu.Lock()
			defer tr.mu.Unlock()
			if tr.digests < c.min || tr.digests > c.max {
				t.Errorf("interval %v: %d audits in a day, want %d to %d", c.interval, tr.digests, c.min, c.max)
			}
		})
	}
}

// fakeDestination holds what a base syncer gives it.
type fakeDestination[C chunk] struct {
	held  map[string]store.Version
	fails int // that many calls, before they have an effect
	puts  int
}

var errFull = errors.New("full")

func (d *fakeDestination[C]) fail() error {
	if d.fails > 0 {
		d.fails--
		return errFull
	}
	return nil
}

func (d *fakeDestination[C]) put(_ context.Context, c C) error {
	d.puts++
	if err := d.fail(); err != nil {
		return err
	}
	return c.each(func(name string, v store.Version) { d.held[name] = v })
}

func (d *fakeDestination[C]) drop(_ context.Context, extras []NameVersion) error {
	if err := d.fail(); err != nil {
		return err
	}
	for _, e := range extras {
		if d.held[e.Name] == e.Version {
			delete(d.held, e.Name)
		}
	}
	return nil
}

// One base syncer works for copies and for search (F99): what is fetched may be rows or documents, and the destination a database or a search store.
func TestBaseSyncer(t *testing.T) {
	var _ destination[Chunk] = (*dbSyncer)(nil)
	var _ destination[documents] = (*searchSyncer)(nil)
	t.Run("rows", func(t *testing.T) {
		testBaseSyncer(t, func(name string, v store.Version) Chunk {
			return Chunk{Rows: memRow{version: v}.tuple(name, "eu"), Count: 1}
		})
	})
	t.Run("documents", func(t *testing.T) {
		testBaseSyncer(t, func(name string, v store.Version) documents {
			return documents{search.Document{Name: name, Version: v}}
		})
	})
}

func testBaseSyncer[C chunk](t *testing.T, one func(string, store.Version) C) {
	source := map[string]store.Version{"missing": v(1, 2), "old": v(1, 3), "back": v(2, 1), "equal": v(1, 1)}
	dest := &fakeDestination[C]{held: map[string]store.Version{"old": v(1, 1), "gone": v(1, 1), "ghost": v(1, 7), "back": v(1, 9), "equal": v(1, 1)}}
	set := NewVersionSet(nil)
	for name, v := range map[string]store.Version{"missing": v(1, 2), "old": v(1, 2), "gone": v(1, 2)} { // as it was listed a while ago
		set.SetSynced(name, dest.held[name])
		set.SetSource(name, v)
	}
	for _, extra := range []string{"ghost", "back"} {
		set.SetSynced(extra, dest.held[extra])
	}
	b := &baseSyncer[C]{set: set, dest: dest, fetch: func(_ context.Context, names []string) iter.Seq2[C, error] {
		return func(yield func(C, error) bool) {
			for _, n := range names {
				if v, ok := source[n]; ok && !yield(one(n, v), nil) {
					return
				}
			}
		}
	}}
	for failures := range 4 { // each repetition goes on with what is left
		dest.fails = min(1, 3-failures)
		before, _ := set.Len()
		err := b.putMissing(t.Context())
		if err == nil {
			err = b.dropExtras(t.Context())
		}
		if failures < 3 != errors.Is(err, errFull) {
			t.Fatalf("with failure %d: %v", failures, err)
		}
		if after, _ := set.Len(); failures == 0 && after != before {
			t.Errorf("the set learned of what was not acknowledged: %d of %d missing", after, before)
		}
	}
	if !maps.Equal(dest.held, source) {
		t.Errorf("the destination has %v, want %v", dest.held, source)
	}
	if m, e := set.Len(); m+e != 0 {
		t.Errorf("%d missing, %d extra in the set", m, e)
	}
	if err := errors.Join(b.putMissing(t.Context()), b.dropExtras(t.Context())); err != nil || dest.puts > 10 {
		t.Errorf("with nothing to do: %v, %d puts", err, dest.puts)
	}
}
