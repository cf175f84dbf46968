package nodemanager_test

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
)

type ranges = map[nodemanager.NodeID]descriptor.ShardRange

func nodeIDs(n int) []nodemanager.NodeID {
	var ids []nodemanager.NodeID
	for i := range n {
		ids = append(ids, nodemanager.NodeID(fmt.Sprintf("n%02d", i)))
	}
	return ids
}

func length(r descriptor.ShardRange) int { return max(0, int(r.To-r.From)) }

// kept is the number of shards that stay where they are.
func kept(was, is ranges) int {
	n := 0
	for id, r := range is {
		n += length(descriptor.ShardRange{From: max(r.From, was[id].From), To: min(r.To, was[id].To)})
	}
	return n
}

// wrong says what is wrong with an assignment: not one range for each node, a hole, an overlap, uneven sizes.
func wrong(ring int, nodes []nodemanager.NodeID, is ranges) error {
	if len(is) != len(nodes) {
		return fmt.Errorf("%d ranges for %d nodes", len(is), len(nodes))
	}
	all := slices.SortedFunc(maps.Values(is), func(a, b descriptor.ShardRange) int {
		if a.From != b.From {
			return int(a.From - b.From)
		}
		return int(a.To - b.To)
	})
	next, least, most := int32(0), ring, 0
	for _, r := range all {
		if r.From != next || r.To < r.From {
			return fmt.Errorf("%s does not follow %d", r, next)
		}
		next = r.To
		least, most = min(least, length(r)), max(most, length(r))
	}
	if int(next) != ring {
		return fmt.Errorf("the ring ends at %d", next)
	}
	n := len(nodes)
	if (10*least*n < 8*ring || 10*most*n > 12*ring) && most-least > 1 {
		return fmt.Errorf("sizes %d to %d of %d shards on %d nodes", least, most, ring, n)
	}
	return nil
}

// drawCurrent draws disjoint ranges of some nodes, some of which are gone.
func drawCurrent(t *rapid.T, ring int, names []nodemanager.NodeID) ranges {
	was, from := ranges{}, int32(0)
	for _, id := range rapid.Permutation(names).Draw(t, "order") {
		from = min(int32(ring), from+int32(rapid.IntRange(0, 1+ring/4).Draw(t, "hole"))*int32(rapid.IntRange(0, 1).Draw(t, "holes")))
		to := min(int32(ring), from+int32(rapid.IntRange(0, 1+ring/2).Draw(t, "size")))
		if from < to {
			was[id] = descriptor.ShardRange{From: from, To: to}
		}
		from = to
	}
	return was
}

func TestAssignmentsAreGood(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ring := rapid.IntRange(1, 2048).Draw(t, "ring")
		names := nodeIDs(rapid.IntRange(1, 24).Draw(t, "known"))
		was := drawCurrent(t, ring, names)
		nodes := names[rapid.IntRange(0, len(names)-1).Draw(t, "gone"):]
		is := nodemanager.Assign(ring, nodes, was)
		if err := wrong(ring, nodes, is); err != nil {
			t.Fatal(err)
		}
		if again := nodemanager.Assign(ring, rapid.Permutation(nodes).Draw(t, "other order"), maps.Clone(was)); !maps.Equal(again, is) {
			t.Fatalf("not the same twice: %v, %v", is, again)
		}
		if after := nodemanager.Assign(ring, nodes, is); !maps.Equal(after, is) {
			t.Fatalf("not at rest: %v, then %v", is, after)
		}
	})
}

func TestWhatIsEvenEnoughStays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 12).Draw(t, "n")
		ring := n * rapid.IntRange(10, 100).Draw(t, "shards per node")
		nodes, was, from := rapid.Permutation(nodeIDs(n)).Draw(t, "order"), ranges{}, 0
		for i, id := range nodes {
			rest, avg := n-i-1, ring/n
			size := rapid.IntRange(max((8*avg+9)/10, ring-from-rest*(12*avg/10)), min(12*avg/10, ring-from-rest*((8*avg+9)/10))).Draw(t, "size")
			was[id] = descriptor.ShardRange{From: int32(from), To: int32(from + size)}
			from += size
		}
		if is := nodemanager.Assign(ring, nodes, was); !maps.Equal(is, was) {
			t.Fatalf("%v became %v", was, is)
		}
	})
}

// best is the most shards that any good assignment keeps, found by trying them all.
func best(ring int, nodes []nodemanager.NodeID, was ranges) int {
	most := -1
	is := ranges{}
	var try func(from int, left []nodemanager.NodeID)
	try = func(from int, left []nodemanager.NodeID) {
		if len(left) == 0 {
			if from == ring && wrong(ring, nodes, is) == nil {
				most = max(most, kept(was, is))
			}
			return
		}
		for i, id := range left {
			rest := slices.Delete(slices.Clone(left), i, i+1)
			for to := from; to <= ring; to++ {
				is[id] = descriptor.ShardRange{From: int32(from), To: int32(to)}
				try(to, rest)
			}
			delete(is, id)
		}
	}
	try(0, nodes)
	return most
}

func TestNothingMovesWithoutNeed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ring := rapid.IntRange(1, 14).Draw(t, "ring")
		names := nodeIDs(rapid.IntRange(1, 5).Draw(t, "known"))
		was := drawCurrent(t, ring, names)
		nodes := names[max(0, len(names)-rapid.IntRange(1, 4).Draw(t, "here")):]
		is := nodemanager.Assign(ring, nodes, was)
		if got, want := kept(was, is), best(ring, nodes, was); got != want {
			t.Fatalf("keeps %d shards, %d is possible: %v became %v", got, want, was, is)
		}
	})
}

func TestNobody(t *testing.T) {
	if is := nodemanager.Assign(16, nil, ranges{"gone": {To: 16}}); len(is) != 0 {
		t.Fatal(is)
	}
}

// TestScaling: P13, a scale event moves at most 1.25 times what it has to, and loads stay within 20 %.
func TestScaling(t *testing.T) {
	for _, ring := range []int{256, 1024, 4096} {
		was := ranges{}
		for _, n := range []int{1, 3, 7, 2, 5, 100, 3} {
			nodes := nodeIDs(n)
			is, least := nodemanager.Assign(ring, nodes, was), nodemanager.AssignOnGrid(ring, nodes, was, 1)
			if err := wrong(ring, nodes, is); err != nil {
				t.Errorf("ring %d, %d nodes: %v", ring, n, err)
			}
			moved, must := ring-kept(was, is), ring-kept(was, least)
			if len(was) > 0 {
				t.Logf("ring %4d, %3d -> %3d nodes: %4d shards move, %4d must, ratio %.3f", ring, len(was), n, moved, must, float64(moved)/float64(must))
				if 100*moved > 125*must {
					t.Errorf("ring %d, %d -> %d nodes: %d shards move, %d must", ring, len(was), n, moved, must)
				}
			}
			was = is
		}
	}
}

func BenchmarkAssign(b *testing.B) {
	was := nodemanager.Assign(1024, nodeIDs(99), nil)
	for b.Loop() {
		nodemanager.Assign(1024, nodeIDs(100), was)
	}
}
