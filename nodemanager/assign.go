package nodemanager

import (
	"cmp"
	"maps"
	"slices"

	"github.com/dbcontroller/db-controller/descriptor"
)

// cutsPerNode is how finely Assign looks for cuts: so many places for each node.
const cutsPerNode = 40

// Assign gives each node one contiguous range, so that the ranges cover the ring in disjoint pieces. Sizes are within 20 % of ring/n, or
// differ by one at most where the ring is too small for that. Of all such assignments it takes one that leaves as many shards as possible
// where current has them, and of those the most even one. The result depends on nothing but the arguments, and is its own fixed point.
// current may name nodes that are gone; their shards move. More nodes than shards leave some nodes with empty ranges.
func Assign(ring int, nodes []NodeID, current map[NodeID]descriptor.ShardRange) map[NodeID]descriptor.ShardRange {
	return assignOnGrid(ring, nodes, current, max(1, ring/(cutsPerNode*max(1, len(nodes)))))
}

// holding is a node that has a range already.
type holding struct {
	node     NodeID
	from, to int
}

// assignOnGrid is Assign with cuts at multiples of step, at the boundaries that are there, and at those of an even split.
//
// It is dynamic programming over (segments placed, position, whether the node whose range goes on beyond the position has its segment
// already). That flag is all one needs to know of the nodes placed: contiguous ranges that overlap what their nodes have now are in the
// same order as what they have, so a node that ends before the position cannot be placed any more, and one that begins after it has not been.
func assignOnGrid(ring int, nodes []NodeID, current map[NodeID]descriptor.ShardRange, step int) map[NodeID]descriptor.ShardRange {
	nodes = slices.Compact(slices.Sorted(slices.Values(nodes)))
	n := len(nodes)
	if n == 0 || ring <= 0 {
		return map[NodeID]descriptor.ShardRange{}
	}
	olds := holdings(ring, nodes, current)
	cuts := cutPositions(ring, n, olds, step)
	lo, hi := sizeBounds(ring, n)

	straddler := make([]int, len(cuts)) // the index in olds of who has shards on both sides of the cut, or -1
	first := make([]int, len(cuts))     // the first of olds that ends after the cut
	for c, cut := range cuts {
		first[c] = len(olds)
		for o := range olds {
			if olds[o].to > cut {
				first[c] = o
				break
			}
		}
		straddler[c] = -1
		if f := first[c]; f < len(olds) && olds[f].from < cut {
			straddler[c] = f
		}
	}

	// A place is 2*cut, plus one if the straddler has its segment. score is the best way to be there, back how one came.
	type score struct {
		kept, uneven int64
		ok           bool
	}
	type came struct{ from, old int32 }
	scores, back := make([]score, 2*len(cuts)), make([][]came, n)
	scores[0].ok = true
	for j := range n {
		next := make([]score, len(scores))
		back[j] = make([]came, len(scores))
		for at, s := range scores {
			if !s.ok {
				continue
			}
			p, used := at/2, at%2 == 1
			begin, _ := slices.BinarySearch(cuts, cuts[p]+lo)
			for q := begin; q < len(cuts) && cuts[q] <= cuts[p]+hi; q++ {
				if rest, left := ring-cuts[q], n-j-1; rest < left*lo || rest > left*hi {
					continue
				}
				d := int64((cuts[q]-cuts[p])*n - ring)
				place := func(old int, kept int64) {
					to := 2 * q
					if s := straddler[q]; s >= 0 && (s == old || used && s == straddler[p]) {
						to++
					}
					here := score{s.kept + kept, s.uneven + d*d, true}
					if was := next[to]; !was.ok || here.kept > was.kept || here.kept == was.kept && here.uneven < was.uneven {
						next[to], back[j][to] = here, came{int32(at), int32(old)}
					}
				}
				place(-1, 0)
				for o := first[p]; o < len(olds) && olds[o].from < cuts[q]; o++ {
					kept := min(olds[o].to, cuts[q]) - max(olds[o].from, cuts[p])
					if kept > 0 && (!used || o != straddler[p]) {
						place(o, int64(kept))
					}
				}
			}
		}
		scores = next
	}

	type segment struct{ old, from, to int }
	segments, at := make([]segment, n), int32(2*(len(cuts)-1)) // nobody straddles the end
	placed := map[NodeID]bool{}
	for j := n - 1; j >= 0; j-- {
		b := back[j][at]
		segments[j] = segment{int(b.old), cuts[b.from/2], cuts[at/2]}
		if b.old >= 0 {
			placed[olds[b.old].node] = true
		}
		at = b.from
	}
	free := slices.DeleteFunc(nodes, func(id NodeID) bool { return placed[id] })
	ranges := make(map[NodeID]descriptor.ShardRange, n)
	for _, s := range segments {
		var id NodeID
		if s.old >= 0 {
			id = olds[s.old].node
		} else {
			id, free = free[0], free[1:]
		}
		ranges[id] = descriptor.ShardRange{From: int32(s.from), To: int32(s.to)}
	}
	return ranges
}

// holdings are the ranges of nodes that are there still, in ring order, without what is beyond the ring or said twice.
func holdings(ring int, nodes []NodeID, current map[NodeID]descriptor.ShardRange) []holding {
	var olds []holding
	for _, id := range nodes {
		if r := current[id]; r.From < r.To {
			olds = append(olds, holding{id, max(0, int(r.From)), min(ring, int(r.To))})
		}
	}
	slices.SortStableFunc(olds, func(a, b holding) int { return cmp.Compare(a.from, b.from) })
	end, kept := 0, olds[:0]
	for _, o := range olds {
		if o.from = max(o.from, end); o.from < o.to {
			kept, end = append(kept, o), o.to
		}
	}
	return kept
}

func cutPositions(ring, n int, olds []holding, step int) []int {
	cuts := map[int]bool{0: true, ring: true}
	for c := step; c < ring; c += step {
		cuts[c] = true
	}
	for _, o := range olds {
		cuts[o.from], cuts[o.to] = true, true
	}
	for _, r := range Split(ring, n) {
		cuts[int(r.To)] = true
	}
	return slices.Sorted(maps.Keys(cuts))
}

// sizeBounds are the least and the greatest size of a range.
func sizeBounds(ring, n int) (lo, hi int) {
	lo = min((4*ring+5*n-1)/(5*n), ring/n)
	hi = max(6*ring/(5*n), (ring+n-1)/n)
	return lo, hi
}
