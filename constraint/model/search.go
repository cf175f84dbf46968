package model

import (
	"fmt"
	"hash/maphash"
	"slices"
)

// Result is what the search of one world has found.
type Result struct {
	States, Transitions int
	// Violation is empty if every reachable state is right.
	Violation string
	// Trace is a shortest way to the violation.
	Trace []Step

	taken [ops]bool
}

// Search visits every state of w that the protocol with the bugs reaches, breadth first, until one violates an invariant. Then it looks for states from
// which a promised end cannot be reached any more.
func Search(w World, bugs Bug) Result {
	g := &graph{world: &w, bugs: bugs, seed: maphash.MakeSeed(), table: make([]int32, 1<<12)}
	if at, why := g.explore(); why != "" {
		return g.result(at, why)
	}
	if at, why := g.stuck(); why != "" {
		return g.result(at, why)
	}
	return g.result(0, "")
}

// graph is what has been explored. States are numbered in the order in which they were found, so also by their distance.
type graph struct {
	world *World
	bugs  Bug
	seed  maphash.Seed

	states []state
	parent []int32
	table  []int32 // open addressing over states; 0 is free, else the number plus 1

	edges  []int32 // targets of the steps of each state
	first  []int32 // where those of a state begin in edges
	taken  [ops]bool
	leaves []byte // commitLeaves and acceptLeaves: steps that are possible in this state
}

const (
	commitLeaves = 1
	acceptLeaves = 2
)

// find returns the number of s, and whether it is new.
func (g *graph) find(s state, parent int32) (int32, bool) {
	if 2*len(g.states) >= len(g.table) {
		g.table = make([]int32, 2*len(g.table))
		for i := range g.states {
			*g.slot(&g.states[i]) = int32(i + 1)
		}
	}
	at := g.slot(&s)
	if *at != 0 {
		return *at - 1, false
	}
	g.states, g.parent = append(g.states, s), append(g.parent, parent)
	*at = int32(len(g.states))
	return *at - 1, true
}

func (g *graph) slot(s *state) *int32 {
	mask := uint64(len(g.table) - 1)
	for h := maphash.Comparable(g.seed, *s) & mask; ; h = (h + 1) & mask {
		if n := g.table[h]; n == 0 || g.states[n-1] == *s {
			return &g.table[h]
		}
	}
}

// explore builds the graph, and returns the first state that is wrong.
func (g *graph) explore() (at int32, why string) {
	symmetric := g.world.symmetric()
	g.find(g.world.initial().canonical(symmetric), -1)
	for i := int32(0); int(i) < len(g.states) && why == ""; i++ {
		from := g.states[i]
		g.first, g.leaves = append(g.first, int32(len(g.edges))), append(g.leaves, 0)
		steps{World: g.world, bug: g.bugs, from: &from, emit: func(step Step, n state) {
			to, isNew := g.find(n.canonical(symmetric), i)
			g.edges = append(g.edges, to)
			g.taken[step.op] = true
			switch step.op {
			case opCommit:
				g.leaves[i] |= commitLeaves
			case opAccept:
				g.leaves[i] |= acceptLeaves
			}
			if why != "" {
				return
			}
			if why = g.world.wrongStep(&from, step, &n); why != "" {
				at = i
			} else if isNew {
				why, at = g.world.wrong(&n), to
			}
		}}.all()
	}
	return at, why
}

func (g *graph) result(at int32, why string) Result {
	r := Result{States: len(g.states), Transitions: len(g.edges), Violation: why, taken: g.taken}
	if why != "" {
		r.Trace = g.trace(at)
	}
	return r
}

// trace walks from the initial state to state number at and, if it is a step from there that is wrong, takes it. The states of the graph are
// representatives: on the way it is kept which Deployment and which task is which.
func (g *graph) trace(at int32) (trace []Step) {
	var way []int32
	for i := at; i > 0; i = g.parent[i] {
		way = append(way, i)
	}
	now, found := g.world.initial(), false
	take := func(right func(Step, state) bool) {
		from := now
		found = false
		steps{World: g.world, bug: g.bugs, from: &from, emit: func(step Step, n state) {
			if !found && right(step, n) {
				found, now = true, n
				trace = append(trace, step)
			}
		}}.all()
	}
	for _, i := range slices.Backward(way) {
		take(func(_ Step, n state) bool { return n.same(g.states[i], g.world.symmetric()) })
		if !found {
			panic(fmt.Sprintf("model: no step leads to state %d: the regions of world %s are not symmetric", i, g.world.Name))
		}
	}
	from := now
	if g.world.wrong(&now) == "" {
		take(func(step Step, n state) bool { return g.world.wrongStep(&from, step, &n) != "" })
	}
	return trace
}

// stuck returns the first state from which something that must stay possible is not.
func (g *graph) stuck() (int32, string) {
	into := g.reverse()
	finished := g.reaches(into, func(i int) bool { return g.states[i].target.state == gone })
	saved := g.reaches(into, func(i int) bool { return g.leaves[i]&commitLeaves != 0 })
	accepted := g.reaches(into, func(i int) bool { return g.leaves[i]&acceptLeaves != 0 })
	for i := range g.states {
		s := &g.states[i]
		if s.target.state == deleting && !finished[i] {
			return int32(i), "the deletion can never be finished (I16)"
		}
		if !accepted[i] && g.world.canDelete(s) {
			return int32(i), "the target can never be deleted although nothing refers to it (X1)"
		}
		if !saved[i] && g.world.canSave(s) {
			return int32(i), "no new reference can ever be committed to a target that is live"
		}
	}
	return 0, ""
}

// edgesInto is the graph with its steps turned around.
type edgesInto struct{ first, from []int32 }

func (g *graph) reverse() edgesInto {
	n := len(g.states)
	in := edgesInto{first: make([]int32, n+1), from: make([]int32, len(g.edges))}
	for _, to := range g.edges {
		in.first[to+1]++
	}
	for i := range n {
		in.first[i+1] += in.first[i]
	}
	next := append([]int32(nil), in.first...)
	for i := range n {
		end := len(g.edges)
		if i+1 < n {
			end = int(g.first[i+1])
		}
		for _, to := range g.edges[g.first[i]:end] {
			in.from[next[to]] = int32(i)
			next[to]++
		}
	}
	return in
}

// reaches marks all states from which a good one can be reached.
func (g *graph) reaches(in edgesInto, good func(int) bool) []bool {
	marked := make([]bool, len(g.states))
	var todo []int32
	for i := range marked {
		if good(i) {
			marked[i], todo = true, append(todo, int32(i))
		}
	}
	for len(todo) > 0 {
		i := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, from := range in.from[in.first[i]:in.first[i+1]] {
			if !marked[from] {
				marked[from], todo = true, append(todo, from)
			}
		}
	}
	return marked
}
