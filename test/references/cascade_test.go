package references

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

// TestDeletionsRemoveExactlyWhatFollows makes random graphs over all services and regions, with cycles, diamonds, self references, children, owners and every
// behavior, and deletes from them. A deletion that something blocks changes nothing; any other ends with exactly that removed, and those fields cleared, that a
// walk of our own over the graph as it was says, and nothing else is touched (P9, P10, R6, I16, I17, I18, X13).
func TestDeletionsRemoveExactlyWhatFollows(t *testing.T) {
	t.Logf("seed %d (repeat with %s=%d)", seed(), seedVar, seed())
	w := newWorld(t, config{versions: map[string]string{low: []string{"v2", "v1"}[seed()%2]}})
	rng := rand.New(rand.NewPCG(seed(), 5))
	until := time.Now().Add(howLong(t) / 2)
	var sum tally
	for round := 0; round < 2 || time.Now().Before(until) || sum.simple() && round < 20; round++ {
		graphs := make([]*graph, 4) // apart from each other, so that what happens in one is no matter of another's
		var making sync.WaitGroup
		for i := range graphs {
			own := rand.New(rand.NewPCG(rng.Uint64(), 6))
			making.Go(func() { graphs[i] = w.makeGraph(own, fmt.Sprintf("g%d-%d", round, i)) })
		}
		making.Wait()
		if t.Failed() {
			t.FailNow()
		}
		sum.graphs += len(graphs)
		images := w.mustHold(30*time.Second, nil)
		for range 4 {
			images = w.deleteRoots(graphs, images, rng, &sum)
		}
	}
	t.Logf("%+v", sum)
	if sum.simple() {
		t.Error("the graphs are too simple: the run proves little")
	}
}

// tally is what the test has seen.
type tally struct{ graphs, accepted, refused, removed, cleared int }

// simple says that the graphs have not shown much yet.
func (s tally) simple() bool { return s.refused == 0 || s.cleared == 0 || s.removed < s.accepted*3/2 }

// deleteRoots deletes one resource of each graph and compares what happens with a walk. It returns the world afterwards.
func (w *world) deleteRoots(graphs []*graph, images map[key]*image, rng *rand.Rand, sum *tally) map[key]*image {
	w.t.Helper()
	walks := make([]*walk, len(graphs))
	errs := make([]error, len(graphs))
	var deleting sync.WaitGroup
	for i, g := range graphs {
		root := g.next
		for tries := 0; root.name == "" || !images[root.key].owned[root.name].live(); tries++ {
			if root = g.things[rng.IntN(len(g.things))]; tries > 1000 {
				break // nothing is left of it
			}
		}
		g.next = thing{}
		walks[i] = newWalk(g, images)
		walks[i].remove(root)
		deleting.Go(func() { errs[i] = whileUnavailable(func() error { return w.delete(root.Service, root.name) }) })
	}
	deleting.Wait()
	l := w.newWorkload()
	unstick := func(now map[key]*image) { l.unstick(now) }
	after := w.mustHold(60*time.Second, unstick)
	for i, v := range walks {
		blockers := v.refusals()
		switch code := store.CodeOf(errs[i]); {
		case !images[v.root.key].owned[v.root.name].live():
		case len(blockers) > 0:
			if code != store.FailedPrecondition {
				w.t.Fatalf("seed %d: delete %s: %v, but %s block it", seed(), v.root, errs[i], show(blockers))
			}
			if diff := v.unchanged(after); len(diff) > 0 {
				w.fail(fmt.Sprintf("the deletion of %s was refused and has changed something", v.root), diff)
			}
			sum.refused++
			l.drop(images, blockers) // and the next time it is not refused
			graphs[i].next = v.root
		case errs[i] != nil:
			w.t.Fatalf("seed %d: delete %s: %v, but nothing blocks it", seed(), v.root, errs[i])
		default:
			if diff := v.compare(after); len(diff) > 0 {
				w.fail(fmt.Sprintf("the deletion of %s did not do what it should", v.root), diff)
			}
			sum.accepted++
			sum.removed += len(v.gone)
			sum.cleared += len(v.unset)
		}
	}
	return w.mustHold(30*time.Second, nil)
}

// graph is some resources that refer to each other.
type graph struct {
	things []thing
	next   thing // to be deleted, after it could not be
	refs   map[thing]refs
	owner  map[thing]store.OwnerReference
}

// makeGraph creates a random graph. Blocking references point to things earlier in the list, so that they never wait for each other.
func (w *world) makeGraph(rng *rand.Rand, id string) *graph {
	g := &graph{refs: map[thing]refs{}, owner: map[thing]store.OwnerReference{}}
	byType := map[string][]int{}
	add := func(k key, name string) {
		byType[k.Service+"/"+typeOf(name)] = append(byType[k.Service+"/"+typeOf(name)], len(g.things))
		g.things = append(g.things, thing{k, name})
	}
	for _, k := range w.keys {
		for i := range 3 {
			name := nodeOf(k, fmt.Sprintf("%s-%d", id, i))
			add(k, name)
			if k.Service != low {
				continue
			}
			if child := []string{"/leaves/l", "/twigs/t", "/pins/p", ""}[rng.IntN(4)]; child != "" {
				add(k, name+child)
			}
		}
		if k.Service == low {
			add(k, w.cfg.secret(k.Region, id))
			add(k, box(k.Region, id))
		}
	}
	for i, t := range g.things {
		r := refs{}
		mine := fields[t.Service+"/"+typeOf(t.name)]
		for range 3 {
			if len(mine) == 0 || rng.IntN(3) == 0 {
				continue
			}
			f := mine[rng.IntN(len(mine))]
			candidates := byType[f.service+"/"+f.typ]
			j := candidates[rng.IntN(len(candidates))]
			if f.behavior == store.Block && j >= i {
				continue
			}
			spelled, _ := nameIn(t.Service, f.service, g.things[j].name)
			if !slices.Contains(r[f.path], spelled) {
				r[f.path] = append(r[f.path], spelled)
			}
		}
		g.refs[t] = r
		if nodes := byType[[]string{low, mid, high}[rng.IntN(3)]+"/Node"]; rng.IntN(6) == 0 && len(nodes) > 0 && typeOf(t.name) != "Secret" {
			o := g.things[nodes[rng.IntN(len(nodes))]]
			if o != t {
				g.owner[t] = store.OwnerReference{Kind: o.Service + "/Node", Version: w.places[o.key].version, Name: o.name, Region: o.Region, UnsetOnDelete: rng.IntN(2) == 0}
			}
		}
	}
	// First they are there, then they refer to each other.
	var wg sync.WaitGroup
	for _, k := range w.keys {
		wg.Go(func() {
			var bare []store.Write
			for _, t := range g.things {
				if t.key == k {
					bare = append(bare, store.Write{Op: store.Create, Name: t.name, Body: []byte(`{}`)})
				}
			}
			if _, err := w.write(w.t.Context(), w.places[k], bare...); err != nil {
				w.t.Errorf("create: %v", err)
			}
		})
	}
	wg.Wait()
	for _, k := range w.keys {
		wg.Go(func() {
			for i, t := range g.things {
				if t.key != k {
					continue
				}
				wr := store.Write{Op: store.Update, Name: t.name, Body: g.refs[t].body(i)}
				if o, ok := g.owner[t]; ok {
					wr.Meta.OwnerReferences = []store.OwnerReference{o}
				}
				if err := whileUnavailable(func() error { _, err := w.write(w.t.Context(), w.places[k], wr); return err }); err != nil {
					w.t.Errorf("save %s: %v", t.name, err)
				}
			}
		})
	}
	wg.Wait()
	return g
}

// walk knows what follows from a deletion, from an image of the world alone.
type walk struct {
	graph  *graph
	images map[key]*image
	root   thing
	edges  []edge // of all resources, those to owners among them: with behavior Cascade, or Unset
	// gone is removed, within the transaction of the deletion or later; at once is the part that goes within.
	gone, atOnce map[thing]bool
	// unset are the references that are cleared, and blocked those that must be taken away by users.
	unset, blocked []edge
	owners         map[thing]bool // that lose their owner, and stay
}

const ownerPath = "metadata.ownerReferences"

func newWalk(g *graph, images map[key]*image) *walk {
	v := &walk{graph: g, images: images, gone: map[thing]bool{}, atOnce: map[thing]bool{}, owners: map[thing]bool{}}
	for k, m := range images {
		v.edges = append(v.edges, m.edges()...)
		for _, r := range m.owned {
			for _, o := range r.owners { // one at most
				e := edge{path: ownerPath, behavior: store.AsyncCascade, spelled: o.Name}
				e.from.key, e.from.name = k, r.name
				e.to.key, e.to.name = key{Service: o.Kind[:len(o.Kind)-len("/Node")], Region: o.Region}, o.Name
				if o.UnsetOnDelete {
					e.behavior = store.AsyncUnset
				}
				v.edges = append(v.edges, e)
			}
		}
	}
	return v
}

func (v *walk) remove(root thing) {
	v.root, v.gone[root], v.atOnce[root] = root, true, true
	for grown := true; grown; {
		grown = false
		for _, e := range v.edges {
			from, to := e.from, e.to
			if !v.gone[from] && v.gone[to] && (e.behavior == store.Cascade || e.behavior == store.AsyncCascade) {
				v.gone[from], grown = true, true
			}
			if !v.atOnce[from] && v.atOnce[to] && e.behavior == store.Cascade && e.from.key == e.to.key {
				v.atOnce[from], grown = true, true
			}
		}
	}
	for _, e := range v.edges {
		if v.gone[e.from] || !v.gone[e.to] {
			continue
		}
		switch {
		case e.path == ownerPath:
			v.owners[e.from] = true
		case e.behavior == store.Unset || e.behavior == store.AsyncUnset:
			v.unset = append(v.unset, e)
		case e.behavior == store.Block:
			v.blocked = append(v.blocked, e)
		}
	}
}

// refusals are the references that make the deletion fail at once.
func (v *walk) refusals() (all []edge) {
	for _, e := range v.edges {
		if e.behavior == store.Block && v.atOnce[e.to] && !v.atOnce[e.from] {
			all = append(all, e)
		}
	}
	return all
}

func show(edges []edge) (s []string) {
	for _, e := range edges {
		s = append(s, fmt.Sprintf("%s %s of %s", e.from.name, e.path, e.from.key))
	}
	return s
}

// unchanged says what is not as it was.
func (v *walk) unchanged(after map[key]*image) (found []finding) {
	for _, t := range v.graph.things {
		if was, now := v.images[t.key].owned[t.name], after[t.key].owned[t.name]; was != nil && (now.uuid != was.uuid || now.version != was.version || now.state != was.state) {
			found = append(found, finding{fmt.Sprintf("%s: %+v, it was %+v", t, now, was), []string{t.name}})
		}
	}
	return found
}

// compare says where the world is not as the walk says.
func (v *walk) compare(after map[key]*image) (found []finding) {
	add := func(t thing, format string, args ...any) {
		found = append(found, finding{fmt.Sprintf("%s of %s ", t.name, t.key) + fmt.Sprintf(format, args...), []string{t.name}})
	}
	changed := map[thing][]edge{}
	for _, e := range v.unset {
		changed[e.from] = append(changed[e.from], e)
	}
	byUser := map[thing]bool{}
	for _, e := range v.blocked {
		byUser[e.from] = true
		changed[e.from] = append(changed[e.from], e)
	}
	for _, t := range v.graph.things {
		if was, now := v.images[t.key].owned[t.name], after[t.key].owned[t.name]; was != nil {
			switch {
			case !was.live():
				if now != nil && now.state != 2 {
					add(t, "has come back")
				}
			case v.gone[t]:
				if now != nil && (now.state != 2 || now.shadow != 0) {
					add(t, "should be gone, its state is %d and its shadow %d", now.state, now.shadow)
				}
			case !now.live():
				if !byUser[t] || typeOf(t.name) != "Pin" { // users delete a child that blocks
					add(t, "should have stayed")
				}
			case now.uuid != was.uuid:
				add(t, "is another one now")
			case byUser[t]:
				if want := without(was.body, changed[t]); !reflect.DeepEqual(refsOf(t, want), now.refs) {
					add(t, "should refer to %v, it does to %v", refsOf(t, want), now.refs)
				}
			case len(changed[t]) > 0:
				if want := without(was.body, changed[t]); !reflect.DeepEqual(want, decoded(now.body)) {
					add(t, "should be %v, it is %v", want, now.body)
				}
			case v.owners[t]:
				if len(now.owners) != 0 {
					add(t, "should have lost its owner, it has %v", now.owners)
				}
			case now.version != was.version:
				add(t, "should not have been touched: version %d, it was %d", now.version, was.version)
			}
		}
	}
	return found
}

func decoded(body string) (object map[string]any) {
	_ = json.Unmarshal([]byte(body), &object) // nil is unlike anything
	return object
}

func refsOf(t thing, object map[string]any) refs {
	r := refs{}
	for _, f := range fields[t.Service+"/"+typeOf(t.name)] {
		if names := namesAt(object, f.path); len(names) > 0 {
			r[f.path] = names
		}
	}
	return r
}

// without takes references from a body: a value and a field of an object are removed, an item of a list too.
func without(body string, edges []edge) map[string]any {
	object := decoded(body)
	for _, e := range edges {
		name, tail := e.path, ""
		if i := slices.Index([]byte(e.path), '['); i >= 0 {
			name, tail = e.path[:i], e.path[i+2:]
		}
		items, list := object[name].([]any)
		switch {
		case !list:
			delete(object, name)
		case tail != "":
			for _, item := range items {
				if inner, ok := item.(map[string]any); ok && inner[tail[1:]] == e.spelled {
					delete(inner, tail[1:])
				}
			}
		default:
			object[name] = slices.DeleteFunc(slices.Clone(items), func(item any) bool { return item == e.spelled })
		}
	}
	return object
}
