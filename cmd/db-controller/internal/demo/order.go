package demo

import (
	"cmp"
	"container/heap"
	"slices"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// Resources are written after what they refer to. Where references go round in a circle, the circle is written in one transaction if one may hold it;
// otherwise some of its references are left out at first, and added when everything is there.

// graph is what the planner knows of the input: its resources, and the references between them.
type graph struct {
	nodes []node
	edges []edge // ordered by from
}

// node is one resource of the input.
type node struct {
	name string
	place
	// governs says that it is a policy holder, and controls which region its policy puts in control.
	governs  bool
	controls string
	bytes    int
	first    int // of its edges
}

// place is what the resources of one transaction have in common, but for those without a holder, which go with any.
type place struct{ holder, owner string }

// edge is a reference whose target must exist when its referrer is written.
type edge struct {
	from, to int32
	// path of the reference in the body, for example depends[3]. Without one it cannot be left out: it is the parent or the policy holder.
	path     string
	behavior v1alpha1.DeleteBehavior
}

func (e *edge) unsets() bool {
	return e.behavior == v1alpha1.DeleteUnset || e.behavior == v1alpha1.DeleteAsyncUnset
}

// of returns where the edges of a node begin and end.
func (g *graph) of(n int32) (first, end int) {
	first, end = g.nodes[n].first, len(g.edges)
	if int(n)+1 < len(g.nodes) {
		end = g.nodes[n+1].first
	}
	return first, end
}

// limits of a transaction.
type limits struct {
	rows, bytes int
	// cycleRows and cycleBytes are allowed to a circle of references.
	cycleRows, cycleBytes int
	// inFlight is how many transactions may be on their way: one is not expected to be committed when the next inFlight-1 are formed.
	inFlight int
}

// step is one transaction.
type step struct {
	rows []int32
	// without are references that are left out, by their row: places in graph.edges.
	without map[int32][]int
	// needs are the steps that must have been committed before.
	needs []int
}

// order is how the input is written.
type order struct {
	// writes create everything, one step after the other as far as their needs allow; then updates add what was left out.
	writes, updates []step
	// cycles are circles of references that are written in one transaction, and leftOut the references that are added by updates.
	cycles, leftOut int
}

// updated returns how many rows are written twice.
func (o *order) updated() (rows int) {
	for _, s := range o.updates {
		rows += len(s.rows)
	}
	return rows
}

// plan finds an order. It is the same every time.
func (g *graph) plan(l limits) *order {
	s := &scheduler{graph: g, limits: l, order: &order{}}
	s.cut()
	s.connect()
	s.schedule()
	s.update()
	return s.order
}

// scheduler makes an order. A unit is what must be written in one transaction: a resource, or a circle.
type scheduler struct {
	graph  *graph
	limits limits
	order  *order

	loose []bool // the edges that order nothing: they may be left out
	units [][]int32
	unit  []int32 // of each node

	dependents [][]int32 // of each unit
	height     []int32   // of the longest chain of dependents
	missing    []int32   // how many units each one refers to that are in no step yet
	step       []int     // of each unit, -1 before it has one
	// last is the last step that a unit refers to, before the one before that: -1 without one.
	last, before []int
	ready        map[place]*queue
	later        [][]int32 // by step: units that can be written when it is committed
	released     int       // steps of which the later units are ready
}

// cut finds the units. It makes edges loose until every circle that remains fits into a transaction.
func (s *scheduler) cut() {
	g := s.graph
	s.loose, s.unit = make([]bool, len(g.edges)), make([]int32, len(g.nodes))
	all := make([]int32, len(g.nodes))
	for i := range all {
		all[i] = int32(i)
	}
	t := newTarjan(s)
	label := int32(0) // of a set of nodes that is looked at by itself
	for work := [][]int32{all}; len(work) > 0; {
		set := work[len(work)-1]
		work = work[:len(work)-1]
		for _, c := range t.components(set) {
			label++
			for _, n := range c {
				s.unit[n] = label
			}
			if s.fits(c) {
				slices.Sort(c)
				s.units = append(s.units, c)
				continue
			}
			s.loosen(c)
			work = append(work, c)
		}
	}
	slices.SortFunc(s.units, func(a, b []int32) int { return cmp.Compare(a[0], b[0]) })
	for u, rows := range s.units {
		for _, n := range rows {
			s.unit[n] = int32(u)
		}
		if len(rows) > 1 {
			s.order.cycles++
		}
	}
}

// fits says whether a circle may be one transaction.
func (s *scheduler) fits(c []int32) bool {
	if len(c) == 1 {
		return true
	}
	if len(c) > s.limits.cycleRows {
		return false
	}
	bytes, holder, owner := 0, "", s.graph.nodes[c[0]].owner
	for _, i := range c {
		n := &s.graph.nodes[i]
		bytes += n.bytes
		if n.holder != "" {
			if holder != "" && n.holder != holder {
				return false
			}
			holder = n.holder
		}
		if n.owner != owner {
			return false
		}
	}
	governs := func(i int32) bool { return s.graph.nodes[i].governs && s.graph.nodes[i].name == holder }
	return bytes <= s.limits.cycleBytes && !slices.ContainsFunc(c, governs)
}

// loosen makes edges inside of a circle loose: all that would be unset if their target went, else the last ones that no transaction may span, else the
// last ones. A large circle loses several at once, because each time it is taken apart anew.
func (s *scheduler) loosen(c []int32) {
	var unsets, spanning, others []int
	for _, n := range c {
		first, end := s.graph.of(n)
		for e := first; e < end; e++ {
			x := &s.graph.edges[e]
			switch {
			case s.loose[e] || x.path == "" || x.from == x.to || s.unit[x.to] != s.unit[n]:
			case x.unsets():
				unsets = append(unsets, e)
			case s.spans(x):
				spanning = append(spanning, e)
			default:
				others = append(others, e)
			}
		}
	}
	chosen := unsets
	if len(chosen) == 0 {
		if chosen = spanning; len(chosen) == 0 {
			chosen = others
		}
		slices.Sort(chosen)
		chosen = chosen[len(chosen)-max(1, len(chosen)/64):] // names have an end, so a circle has an edge with a path
	}
	for _, e := range chosen {
		s.loose[e] = true
	}
}

// spans says whether both ends of an edge cannot be in one transaction.
func (s *scheduler) spans(e *edge) bool {
	a, b := &s.graph.nodes[e.from], &s.graph.nodes[e.to]
	return a.owner != b.owner || a.holder != b.holder && a.holder != "" && b.holder != "" || a.governs && b.holder == a.name || b.governs && a.holder == b.name
}

// connect prepares the schedule: which unit waits for which.
func (s *scheduler) connect() {
	n := len(s.units)
	s.dependents, s.height, s.missing = make([][]int32, n), make([]int32, n), make([]int32, n)
	s.step, s.last, s.before = make([]int, n), make([]int, n), make([]int, n)
	s.ready = map[place]*queue{}
	for i := range s.graph.edges {
		e := &s.graph.edges[i]
		if from, to := s.unit[e.from], s.unit[e.to]; !s.loose[i] && from != to {
			s.dependents[to] = append(s.dependents[to], from)
		}
	}
	for u, list := range s.dependents {
		slices.Sort(list)
		s.dependents[u] = slices.Compact(list)
		for _, d := range s.dependents[u] {
			s.missing[d]++
		}
		s.step[u], s.last[u], s.before[u] = -1, -1, -1
	}
	waits := slices.Clone(s.missing)
	var sorted []int32 // targets first
	for u := range s.units {
		if waits[u] == 0 {
			sorted = append(sorted, int32(u))
		}
	}
	for i := 0; i < len(sorted); i++ {
		for _, d := range s.dependents[sorted[i]] {
			if waits[d]--; waits[d] == 0 {
				sorted = append(sorted, d)
			}
		}
	}
	for _, u := range slices.Backward(sorted) {
		for _, d := range s.dependents[u] {
			s.height[u] = max(s.height[u], s.height[d]+1)
		}
	}
	for u := range s.units {
		if s.missing[u] == 0 {
			s.add(int32(u))
		}
	}
}

// place of a unit.
func (s *scheduler) place(u int32) place {
	p := s.graph.nodes[s.units[u][0]].place
	for _, n := range s.units[u] {
		if h := s.graph.nodes[n].holder; h != "" {
			p.holder = h
		}
	}
	return p
}

// add makes a unit ready.
func (s *scheduler) add(u int32) {
	p := s.place(u)
	q := s.ready[p]
	if q == nil {
		q = &queue{height: s.height}
		s.ready[p] = q
	}
	q.rows += len(s.units[u])
	heap.Push(q, u)
}

// schedule puts units into steps. Each step takes units of one place, those first on which the longest chains depend; what depends on the step itself alone
// joins it.
func (s *scheduler) schedule() {
	for left := len(s.units); left > 0; {
		i := len(s.order.writes)
		for s.released <= i-s.limits.inFlight {
			s.release()
		}
		p, ok := s.choose()
		for !ok {
			s.release() // it is in flight, and must be waited for
			p, ok = s.choose()
		}
		s.later = append(s.later, nil)
		rows := s.fill(i, p)
		for _, n := range rows {
			if s.units[s.unit[n]][0] == n {
				left--
			}
		}
		s.order.writes = append(s.order.writes, s.finish(i, rows))
	}
}

func (s *scheduler) release() {
	for _, u := range s.later[s.released] {
		s.add(u)
	}
	s.later[s.released] = nil
	s.released++
}

// choose returns the place of the unit on which the longest chain depends; of several places the one that has most to write.
func (s *scheduler) choose() (best place, ok bool) {
	highest, most := int32(-1), 0
	for p, q := range s.ready {
		if q.Len() == 0 {
			continue
		}
		height := s.height[q.units[0]]
		if !ok || cmp.Or(cmp.Compare(height, highest), cmp.Compare(q.rows, most), cmp.Compare(best.holder, p.holder), cmp.Compare(best.owner, p.owner)) > 0 {
			best, highest, most, ok = p, height, q.rows, true
		}
	}
	return best, ok
}

// fill takes the rows of step i.
func (s *scheduler) fill(i int, p place) (rows []int32) {
	q, bytes := s.ready[p], 0
	for q.Len() > 0 && bytes <= s.limits.bytes && (len(rows) == 0 || len(rows)+len(s.units[q.units[0]]) <= s.limits.rows) {
		u := heap.Pop(q).(int32)
		q.rows -= len(s.units[u])
		s.step[u] = i
		for _, n := range s.units[u] {
			rows, bytes = append(rows, n), bytes+s.graph.nodes[n].bytes
		}
		for _, d := range s.dependents[u] {
			if s.last[d] < i {
				s.before[d], s.last[d] = s.last[d], i
			}
			if s.missing[d]--; s.missing[d] > 0 {
				continue
			}
			if s.before[d] < max(0, i-s.limits.inFlight+1) && s.place(d) == p {
				s.add(d)
			} else {
				s.later[i] = append(s.later[i], d)
			}
		}
	}
	// What has been added and found no room waits for the commit.
	q.units = slices.DeleteFunc(q.units, func(u int32) bool {
		if s.last[u] == i {
			s.later[i] = append(s.later[i], u)
			q.rows -= len(s.units[u])
		}
		return s.last[u] == i
	})
	heap.Init(q)
	return rows
}

// finish makes a step of rows: loose references to what is not expected to be there are left out.
func (s *scheduler) finish(i int, rows []int32) step {
	t := step{rows: rows, without: map[int32][]int{}}
	for _, n := range rows {
		first, end := s.graph.of(n)
		for e := first; e < end; e++ {
			at := s.step[s.unit[s.graph.edges[e].to]]
			switch {
			case at == i:
			case s.loose[e] && (at < 0 || at > i-s.limits.inFlight):
				t.without[n] = append(t.without[n], e)
				s.order.leftOut++
			default:
				t.needs = append(t.needs, at)
			}
		}
	}
	slices.Sort(t.needs)
	t.needs = slices.Compact(t.needs)
	return t
}

// update plans to write again, with all references, what was written without some.
func (s *scheduler) update() {
	open := map[place]*step{}
	bytes := map[place]int{}
	var places []place
	for i := range s.graph.nodes {
		n := &s.graph.nodes[i]
		w := s.order.writes[s.step[s.unit[i]]]
		if len(w.without[int32(i)]) == 0 {
			continue
		}
		if open[n.place] == nil {
			open[n.place] = &step{}
			places = append(places, n.place)
		}
		t := open[n.place]
		t.rows = append(t.rows, int32(i))
		if bytes[n.place] += n.bytes; len(t.rows) == s.limits.rows || bytes[n.place] > s.limits.bytes {
			s.order.updates = append(s.order.updates, *t)
			*t, bytes[n.place] = step{}, 0
		}
	}
	for _, p := range places {
		if t := open[p]; len(t.rows) > 0 {
			s.order.updates = append(s.order.updates, *t)
		}
	}
}

// queue is a heap of units that are ready: those with the longest chain of dependents first.
type queue struct {
	units  []int32
	height []int32
	rows   int
}

func (q *queue) Len() int { return len(q.units) }
func (q *queue) Less(i, j int) bool {
	a, b := q.units[i], q.units[j]
	return q.height[a] > q.height[b] || q.height[a] == q.height[b] && a < b
}
func (q *queue) Swap(i, j int) { q.units[i], q.units[j] = q.units[j], q.units[i] }
func (q *queue) Push(u any)    { q.units = append(q.units, u.(int32)) }
func (q *queue) Pop() any {
	u := q.units[len(q.units)-1]
	q.units = q.units[:len(q.units)-1]
	return u
}

// tarjan finds strongly connected components without recursion: chains of references may be as long as the input.
type tarjan struct {
	s       *scheduler
	index   []int32 // of the visit, 0 before it
	low     []int32
	onStack []bool
	next    []int // edge to follow
}

func newTarjan(s *scheduler) *tarjan {
	n := len(s.graph.nodes)
	return &tarjan{s: s, index: make([]int32, n), low: make([]int32, n), onStack: make([]bool, n), next: make([]int, n)}
}

// components returns those of a set of nodes that share a label, over the edges inside of the set that are not loose.
func (t *tarjan) components(set []int32) (found [][]int32) {
	for _, n := range set {
		t.index[n] = 0
	}
	count := int32(0)
	var path, stack []int32
	visit := func(n int32) {
		count++
		t.index[n], t.low[n], t.onStack[n] = count, count, true
		t.next[n], _ = t.s.graph.of(n)
		path, stack = append(path, n), append(stack, n)
	}
	for _, root := range set {
		if t.index[root] != 0 {
			continue
		}
		visit(root)
		for len(path) > 0 {
			n := path[len(path)-1]
			if m, more := t.step(n); more {
				if t.index[m] == 0 {
					visit(m)
				} else if t.onStack[m] {
					t.low[n] = min(t.low[n], t.index[m])
				}
				continue
			}
			path = path[:len(path)-1]
			if len(path) > 0 {
				parent := path[len(path)-1]
				t.low[parent] = min(t.low[parent], t.low[n])
			}
			if t.low[n] == t.index[n] {
				at := len(stack) - 1
				for stack[at] != n {
					at--
				}
				found = append(found, slices.Clone(stack[at:]))
				for _, m := range stack[at:] {
					t.onStack[m] = false
				}
				stack = stack[:at]
			}
		}
	}
	return found
}

// step returns the next neighbor of n.
func (t *tarjan) step(n int32) (int32, bool) {
	_, end := t.s.graph.of(n)
	for t.next[n] < end {
		e := t.next[n]
		t.next[n]++
		if m := t.s.graph.edges[e].to; !t.s.loose[e] && t.s.unit[m] == t.s.unit[n] {
			return m, true
		}
	}
	return 0, false
}
