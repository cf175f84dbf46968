package demo

import (
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// small makes circles too large for a transaction soon.
var small = limits{rows: 5, bytes: 60, cycleRows: 8, cycleBytes: 100, inFlight: 2}

// randomGraph has sections that hold policies, packages below them, and global resources; all refer to each other.
func randomGraph(rnd *rand.Rand) *graph {
	g := &graph{}
	regions := []string{"eu", "us", "ap"}
	sections := rnd.IntN(4)
	for i := range sections {
		g.nodes = append(g.nodes, node{name: fmt.Sprintf("s%d", i), place: place{"", "eu"}, governs: true, controls: regions[rnd.IntN(1+rnd.IntN(3))]})
	}
	for i := range 1 + rnd.IntN(60) {
		n := node{name: fmt.Sprintf("n%d", i), place: place{"", "eu"}}
		if h := rnd.IntN(sections + 2); h < sections {
			n.place = place{g.nodes[h].name, g.nodes[h].controls}
		} else if h == sections+1 {
			n.holder = "not in the input"
		}
		g.nodes = append(g.nodes, n)
	}
	rnd.Shuffle(len(g.nodes), func(i, j int) { g.nodes[i], g.nodes[j] = g.nodes[j], g.nodes[i] })
	index := map[string]int32{}
	for i, n := range g.nodes {
		index[n.name] = int32(i)
	}
	behaviors := []v1alpha1.DeleteBehavior{v1alpha1.DeleteBlock, v1alpha1.DeleteUnset, v1alpha1.DeleteCascade, v1alpha1.DeleteAsyncUnset}[:1+rnd.IntN(4)]
	edges := rnd.Float64() * 4
	for i := range g.nodes {
		n := &g.nodes[i]
		n.first, n.bytes = len(g.edges), 1+rnd.IntN(30)
		if h, ok := index[n.holder]; ok {
			g.edges = append(g.edges, edge{from: int32(i), to: h})
		}
		for k := 0; rnd.Float64() < edges/(edges+1); k++ {
			to := rnd.IntN(len(g.nodes))
			if rnd.IntN(3) > 0 { // circles are short more often than not
				to = (i + rnd.IntN(7)) % len(g.nodes)
			}
			g.edges = append(g.edges, edge{int32(i), int32(to), fmt.Sprintf("f[%d]", k), behaviors[rnd.IntN(len(behaviors))]})
		}
	}
	return g
}

func TestOrderOfRandomGraphs(t *testing.T) {
	first := uint64(time.Now().UnixNano())
	if again, err := strconv.ParseUint(os.Getenv("DBC_SEED"), 10, 64); err == nil {
		first = again
	}
	circles, left := 0, 0
	for seed := first; seed < first+3000 && !t.Failed(); seed++ {
		g := randomGraph(rand.New(rand.NewPCG(seed, 0)))
		o := g.plan(small)
		checkOrder(t, g, o)
		if !reflect.DeepEqual(o, g.plan(small)) {
			t.Error("the order is another one the second time")
		}
		if t.Failed() {
			t.Logf("seed %d (repeat with DBC_SEED=%d)", seed, seed)
		}
		circles, left = circles+o.cycles, left+o.leftOut
	}
	if circles == 0 || left == 0 {
		t.Errorf("seeds from %d: %d circles and %d references left out, so the test shows nothing", first, circles, left)
	}
}

// checkOrder checks an order only by what it promises, as if each step were written when no more than its needs are committed.
func checkOrder(t *testing.T, g *graph, o *order) {
	t.Helper()
	reach := reachable(g, func(*edge) bool { return true })
	hard := reachable(g, func(e *edge) bool { return !e.unsets() })
	at := map[int32]int{}
	for i, s := range o.writes {
		for _, n := range s.rows {
			if before, twice := at[n]; twice {
				t.Errorf("%s is written by step %d and %d", g.nodes[n].name, before, i)
			}
			at[n] = i
		}
	}
	if len(at) != len(g.nodes) {
		t.Errorf("%d of %d resources are written", len(at), len(g.nodes))
	}
	updated, left := map[int32]bool{}, 0
	for _, s := range o.updates {
		checkTransaction(t, g, s)
		for _, n := range s.rows {
			if updated[n] || len(s.without) > 0 {
				t.Errorf("%s is updated twice, or not completely", g.nodes[n].name)
			}
			updated[n] = true
		}
	}
	for i, s := range o.writes {
		checkTransaction(t, g, s)
		committed := map[int]bool{i: true}
		for _, need := range s.needs {
			if need >= i {
				t.Errorf("step %d waits for %d", i, need)
			}
			committed[need] = true
		}
		for _, n := range s.rows {
			out := map[int]bool{}
			for _, e := range s.without[n] {
				out[e] = true
				left++
			}
			if len(out) > 0 && !updated[n] {
				t.Errorf("%s never gets all its references", g.nodes[n].name)
			}
			first, end := g.of(n)
			for e := first; e < end; e++ {
				x := &g.edges[e]
				switch {
				case !out[e] && !committed[at[x.to]]:
					t.Errorf("step %d writes %s before its reference %q to %s, which step %d writes", i, g.nodes[n].name, x.path, g.nodes[x.to].name, at[x.to])
				case !out[e]:
				case x.path == "":
					t.Errorf("%s is written without its parent", g.nodes[n].name)
				case !reach[x.to][n]:
					t.Errorf("%s is written without a reference to %s, which is on no circle", g.nodes[n].name, g.nodes[x.to].name)
				case !x.unsets() && !hard[x.to][n]:
					t.Errorf("%s is written without a reference to %s, although the circle could have been broken elsewhere", g.nodes[n].name, g.nodes[x.to].name)
				}
			}
		}
	}
	if left != o.leftOut || len(updated) > left || left > 0 && len(updated) == 0 {
		t.Errorf("%d references are left out, %d are reported, %d resources updated", left, o.leftOut, len(updated))
	}
}

// checkTransaction checks what a transaction may hold.
func checkTransaction(t *testing.T, g *graph, s step) {
	t.Helper()
	holders, owners, bytes := map[string]bool{}, map[string]bool{}, 0
	for _, n := range s.rows {
		if h := g.nodes[n].holder; h != "" {
			holders[h] = true
		}
		owners[g.nodes[n].owner] = true
		bytes += g.nodes[n].bytes
	}
	if len(s.rows) == 0 || len(holders) > 1 || len(owners) > 1 {
		t.Errorf("a transaction has %d rows of %v in %v", len(s.rows), holders, owners)
	}
	for _, n := range s.rows {
		if g.nodes[n].governs && holders[g.nodes[n].name] {
			t.Errorf("a transaction has %s and what it governs", g.nodes[n].name)
		}
	}
	if len(s.rows) > small.cycleRows || bytes > small.cycleBytes+small.bytes {
		t.Errorf("a transaction has %d rows, %d bytes", len(s.rows), bytes)
	}
}

// reachable says for each node which ones its edges lead to.
func reachable(g *graph, follow func(*edge) bool) []map[int32]bool {
	all := make([]map[int32]bool, len(g.nodes))
	for n := range g.nodes {
		seen := map[int32]bool{int32(n): true}
		for open := []int32{int32(n)}; len(open) > 0; {
			first, end := g.of(open[0])
			open = open[1:]
			for e := first; e < end; e++ {
				if to := g.edges[e].to; follow(&g.edges[e]) && !seen[to] {
					seen[to] = true
					open = append(open, to)
				}
			}
		}
		all[n] = seen
	}
	return all
}

// TestOrderOfOneCircle: the forms that a circle can have.
func TestOrderOfOneCircle(t *testing.T) {
	const block, unset = v1alpha1.DeleteBlock, v1alpha1.DeleteUnset
	here, there := place{"a", "eu"}, place{"b", "eu"}
	for _, tt := range []struct {
		situation       string
		places          []place
		behaviors       []v1alpha1.DeleteBehavior // of the reference of each node to the next one
		cycles, leftOut int
		without         int32 // the node that is written without its reference
	}{
		{"under one policy holder", []place{here, here, here}, []v1alpha1.DeleteBehavior{block, unset, block}, 1, 0, -1},
		{"under one policy holder, with a global resource", []place{here, {"", "eu"}, here}, []v1alpha1.DeleteBehavior{block, block, block}, 1, 0, -1},
		{"under two, one reference can be unset", []place{here, there, there}, []v1alpha1.DeleteBehavior{block, unset, block}, 0, 1, 1},
		{"under two, none can be unset", []place{here, there, there}, []v1alpha1.DeleteBehavior{block, block, block}, 0, 1, 2},
		{"global resources of two owners", []place{{"", "eu"}, {"", "us"}}, []v1alpha1.DeleteBehavior{block, block}, 0, 1, 1},
		{"too many rows", make([]place, 9), make([]v1alpha1.DeleteBehavior, 9), 0, 1, 8},
	} {
		t.Run(tt.situation, func(t *testing.T) {
			g := &graph{}
			for i, p := range tt.places {
				g.nodes = append(g.nodes, node{name: fmt.Sprint(i), place: p, bytes: 1, first: i})
				g.edges = append(g.edges, edge{int32(i), int32((i + 1) % len(tt.places)), "f", tt.behaviors[i]})
			}
			o := g.plan(small)
			checkOrder(t, g, o)
			if o.cycles != tt.cycles || o.leftOut != tt.leftOut {
				t.Errorf("%d circles in a transaction, %d references left out; want %d and %d", o.cycles, o.leftOut, tt.cycles, tt.leftOut)
			}
			for _, s := range o.writes {
				for n := range s.without {
					if n != tt.without {
						t.Errorf("node %d is written without its reference, want %d", n, tt.without)
					}
				}
			}
		})
	}
}

// TestOrderOfALongChain: a chain as long as the input needs no deep stack, and what follows each other under one policy holder shares transactions.
func TestOrderOfALongChain(t *testing.T) {
	const n = 30_000
	for circle := range 2 {
		g := &graph{}
		for i := range n {
			g.nodes = append(g.nodes, node{name: fmt.Sprint(i), bytes: 1, first: len(g.edges)})
			if i < n-1+circle {
				g.edges = append(g.edges, edge{int32(i), int32((i + 1) % n), "f", v1alpha1.DeleteBlock})
			}
		}
		o := g.plan(loadLimits)
		if min(o.leftOut, 1) != circle || len(o.writes) > n/loadLimits.rows+o.leftOut || len(o.updates) != circle {
			t.Errorf("%d references left out, %d writes, %d updates", o.leftOut, len(o.writes), len(o.updates))
		}
	}
}
