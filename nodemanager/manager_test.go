package nodemanager_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSplitCoversTheRingEvenly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ring := rapid.IntRange(1, 8192).Draw(t, "ring")
		n := rapid.IntRange(1, 100).Draw(t, "n")
		next, least, most := int32(0), int32(ring), int32(0)
		for _, r := range nodemanager.Split(ring, n) {
			if r.From != next || r.To < r.From {
				t.Fatalf("range %v does not follow %d", r, next)
			}
			next = r.To
			least, most = min(least, r.To-r.From), max(most, r.To-r.From)
		}
		if int(next) != ring || most-least > 1 {
			t.Fatalf("ends at %d of %d; sizes %d to %d", next, ring, least, most)
		}
	})
}

func TestSplitAmongNobody(t *testing.T) {
	if got := nodemanager.Split(16, 0); len(got) != 0 {
		t.Fatalf("Split(16, 0) = %v", got)
	}
}

// story writes down what happens to nodes.
type story struct {
	mu    sync.Mutex
	lines []string
	alive map[string]int // by version
	fail  int            // how many of the next nodes fail
}

func (s *story) tell(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

func (s *story) sorted() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	lines := slices.Sorted(slices.Values(s.lines))
	s.lines = nil
	return lines
}

type node struct {
	s       *story
	version string
	shards  descriptor.ShardRange
	fails   bool
}

func (n *node) UpdateShardRange(_ context.Context, r descriptor.ShardRange) error {
	n.shards = r
	return nil
}

func (n *node) Run(ctx context.Context) error {
	n.s.mu.Lock()
	n.s.alive[n.version]++
	if len(n.s.alive) > 1 && n.s.alive["v1"] > 0 && n.s.alive["v2"] > 0 {
		panic("two versions at once")
	}
	n.s.mu.Unlock()
	n.s.tell("start %s %s", n.version, n.shards)
	defer func() {
		n.s.mu.Lock()
		n.s.alive[n.version]--
		n.s.mu.Unlock()
	}()
	if n.fails {
		return errors.New("broken")
	}
	<-ctx.Done()
	time.Sleep(time.Second) // work in flight takes its time
	n.s.tell("stop %s %s", n.version, n.shards)
	return nil
}

type topology chan struct{}

func (t topology) WaitSynced(ctx context.Context) error {
	select {
	case <-t:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func setUp(t *testing.T) (*nodemanager.Manager, *story, topology) {
	s := &story{alive: map[string]int{}}
	synced := make(topology)
	m, err := nodemanager.New(nodemanager.Config{Topology: synced, Ring: 10, Version: "v1", Kinds: []nodemanager.Kind{{
		Name: "test", Nodes: 2, New: func(version string) (nodemanager.Node, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			n := &node{s: s, version: version, fails: s.fail > 0}
			s.fail = max(0, s.fail-1)
			return n, nil
		},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return m, s, synced
}

func expect(t *testing.T, s *story, want ...string) {
	t.Helper()
	synctest.Wait()
	if got := s.sorted(); !slices.Equal(got, want) {
		t.Fatalf("happened: %q\nwant: %q", got, want)
	}
}

func TestNothingRunsBeforeTheTopologyIsKnown(t *testing.T) { // F57, I39
	synctest.Test(t, func(t *testing.T) {
		m, s, synced := setUp(t)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- m.Run(ctx) }()
		expect(t, s)
		close(synced)
		expect(t, s, "start v1 [0,5)", "start v1 [5,10)")
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		expect(t, s, "stop v1 [0,5)", "stop v1 [5,10)")
	})
}

func TestReplacedAsAWhole(t *testing.T) { // F60, I43
	synctest.Test(t, func(t *testing.T) {
		m, s, synced := setUp(t)
		close(synced)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- m.Run(ctx) }()
		expect(t, s, "start v1 [0,5)", "start v1 [5,10)")
		if err := m.Replace(ctx, "v2"); err != nil { // the nodes panic if two versions run at once
			t.Fatal(err)
		}
		expect(t, s, "start v2 [0,5)", "start v2 [5,10)", "stop v1 [0,5)", "stop v1 [5,10)")
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := m.Replace(t.Context(), "v3"); !errors.Is(err, nodemanager.ErrStopped) {
			t.Fatalf("Replace after the end = %v", err)
		}
	})
}

func TestFailedNodeStartsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, s, synced := setUp(t)
		s.fail = 3
		close(synced)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- m.Run(ctx) }()
		time.Sleep(time.Minute)
		synctest.Wait()
		s.mu.Lock()
		if s.alive["v1"] != 2 {
			t.Errorf("%d nodes run, want 2", s.alive["v1"])
		}
		s.mu.Unlock()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
