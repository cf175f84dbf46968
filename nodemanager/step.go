package nodemanager

import (
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
)

// Member is a process as others see it.
type Member struct {
	ID string
	// Alive: its registration has not run out. A dead member works on nothing, or is fenced when it tries.
	Alive bool
	// Heard is when its Report was heard, by the clock here: what its Status says was so then. Zero if that may have been said long before.
	Heard time.Time
	Report
}

// State is all that a leader knows of a kind. No memory of its own enters a decision, so that any leader can go on where another stopped.
type State struct {
	Ring int
	// Plan in force; its Version is 0 if there is none.
	Plan    Plan
	Members []Member
	// Floor is a version that the next plan must be above, because somebody has acted under it: Fencer.Highest.
	Floor int64
}

// Why targets have changed.
const (
	CauseStart = "start" // there was no plan
	CauseJoin  = "join"
	CauseLeave = "leave"
	CauseDeath = "death"
	CauseRing  = "ring" // the size of the ring
)

// Step returns the plan that follows the one in force, and whether there is any.
//
// Targets change when nodes come or go, and only then. A shard that is to move is first taken from the node that has it, and is granted to
// the next one by a later plan, when no living node can work on it any more: none is granted it, none holds it, none is draining it. What
// is taken stays in Draining until the node says that it has seen a plan without it; that it does not hold it is not enough, for it may
// be about to take what an older plan grants.
func Step(s State) (Plan, bool) {
	reports, eligible := map[NodeID]NodeReport{}, []NodeID{}
	for _, m := range s.Members {
		if !m.Alive {
			continue
		}
		for _, n := range m.Nodes {
			if _, twice := reports[n.ID]; twice {
				continue
			}
			reports[n.ID] = n
			if !m.Leaving && !n.Left {
				eligible = append(eligible, n.ID)
			}
		}
	}
	slices.Sort(eligible)
	granted := map[NodeID]descriptor.ShardRange{}
	if s.Plan.Ring == s.Ring {
		for _, n := range s.Plan.Nodes {
			granted[n.ID] = n.Granted
		}
	}

	next := Plan{Version: max(s.Plan.Version, s.Floor) + 1, Ring: s.Ring, Cause: s.Plan.Cause}
	targets, changed := targetsOf(s, eligible, granted, reports)
	if changed {
		next.Cause = cause(s, eligible, reports)
	}
	kept := map[NodeID]descriptor.ShardRange{}
	for _, id := range eligible {
		kept[id] = intersect(granted[id], targets[id])
	}
	var drains []Drain
	for _, d := range s.Plan.Draining {
		if r, lives := reports[d.Node]; lives && !(r.Seen >= d.Since || r.Left) || lives && !empty(intersect(r.Held, d.Shards)) {
			drains = append(drains, d)
		}
	}
	for _, n := range s.Plan.Nodes {
		r, lives := reports[n.ID]
		if !lives || r.Left && empty(r.Held) {
			continue
		}
		for _, taken := range subtract(n.Granted, kept[n.ID]) {
			drains = append(drains, Drain{n.ID, taken, next.Version})
		}
	}

	busy := newBusy(s.Ring)
	for id, r := range kept {
		busy.mark(id, r)
	}
	for id, r := range reports {
		busy.mark(id, r.Held)
	}
	for _, d := range drains {
		busy.mark(d.Node, d.Shards)
	}
	for _, id := range eligible {
		next.Nodes = append(next.Nodes, PlanNode{id, targets[id], busy.grow(id, kept[id], targets[id])})
	}
	for _, d := range drains {
		// What it is granted again it does not have to give up.
		for _, rest := range subtract(d.Shards, next.Node(d.Node).Granted) {
			next.Draining = append(next.Draining, Drain{d.Node, rest, d.Since})
		}
	}
	if s.Plan.Version > 0 && s.Floor <= s.Plan.Version && same(s.Plan, next) {
		return Plan{}, false
	}
	return next, true
}

func same(a, b Plan) bool {
	a.Version, b.Version = 0, 0
	return reflect.DeepEqual(a, b)
}

// targetsOf returns the targets of the plan in force if they are for these nodes, and otherwise new ones.
func targetsOf(s State, eligible []NodeID, granted map[NodeID]descriptor.ShardRange, reports map[NodeID]NodeReport) (map[NodeID]descriptor.ShardRange, bool) {
	targets := map[NodeID]descriptor.ShardRange{}
	for _, n := range s.Plan.Nodes {
		targets[n.ID] = n.Target
	}
	if s.Plan.Version > 0 && s.Plan.Ring == s.Ring && slices.Equal(slices.Sorted(maps.Keys(targets)), eligible) && covers(s.Ring, targets) {
		return targets, false
	}
	current := map[NodeID]descriptor.ShardRange{}
	for _, id := range eligible {
		var known bool
		if current[id], known = granted[id]; !known {
			current[id] = reports[id].Held // the plan has been lost, but not the work
		}
	}
	return Assign(s.Ring, eligible, current), true
}

func covers(ring int, targets map[NodeID]descriptor.ShardRange) bool {
	ranges := slices.SortedFunc(maps.Values(targets), func(a, b descriptor.ShardRange) int {
		if a.From != b.From {
			return int(a.From - b.From)
		}
		return int(a.To - b.To)
	})
	next := int32(0)
	for _, r := range ranges {
		if r.From != next || r.To < r.From {
			return false
		}
		next = r.To
	}
	return int(next) == ring || len(ranges) == 0
}

func cause(s State, eligible []NodeID, reports map[NodeID]NodeReport) string {
	switch {
	case s.Plan.Version == 0 || len(s.Plan.Nodes) == 0:
		return CauseStart
	case s.Plan.Ring != s.Ring:
		return CauseRing
	}
	why := ""
	for _, n := range s.Plan.Nodes {
		if _, lives := reports[n.ID]; lives && !slices.Contains(eligible, n.ID) {
			why = CauseLeave
		} else if !lives && why == "" {
			why = CauseDeath
			for _, m := range s.Members {
				if m.Leaving && slices.ContainsFunc(m.Nodes, func(r NodeReport) bool { return r.ID == n.ID }) {
					why = CauseLeave
				}
			}
		}
	}
	if why == "" {
		return CauseJoin
	}
	return why
}

// busy knows for each shard which nodes can work on it.
type busy []struct {
	by   NodeID
	many bool
}

func newBusy(ring int) busy { return make(busy, max(0, ring)) }

func (b busy) mark(id NodeID, r descriptor.ShardRange) {
	for i := max(0, r.From); i < min(r.To, int32(len(b))); i++ {
		switch b[i].by {
		case "", id:
			b[i].by = id
		default:
			b[i].many = true
		}
	}
}

func (b busy) freeFor(id NodeID, shard int32) bool {
	return !b[shard].many && (b[shard].by == "" || b[shard].by == id)
}

// grow returns have and what is next to it inside of target and free. With nothing to begin with it is the longest free run in target.
func (b busy) grow(id NodeID, have, target descriptor.ShardRange) descriptor.ShardRange {
	if empty(have) {
		var best, run descriptor.ShardRange
		for i := target.From; i < target.To; i++ {
			if !b.freeFor(id, i) {
				continue
			}
			if run.To != i || empty(run) {
				run.From = i
			}
			run.To = i + 1
			if size(run) > size(best) {
				best = run
			}
		}
		return best
	}
	for have.From > target.From && b.freeFor(id, have.From-1) {
		have.From--
	}
	for have.To < target.To && b.freeFor(id, have.To) {
		have.To++
	}
	return have
}
