package references

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

// How many names there are in each Deployment. Few, so that they meet.
const (
	nodesPerPlace, secretsPerPlace, boxesPerPlace = 12, 4, 4
	anchorsPerWorker                              = 1
	workersPerPlace                               = 3
)

// thing is a name that may be referred to.
type thing struct {
	key
	name string
}

// things are all names that the workload uses as targets, by service and type.
func (w *world) things() map[string][]thing {
	all := map[string][]thing{}
	for _, k := range w.keys {
		add := func(typ, name string) {
			all[k.Service+"/"+typ] = append(all[k.Service+"/"+typ], thing{k, name})
		}
		for i := range nodesPerPlace {
			if k.Service != low {
				add("Node", node(k.Region, fmt.Sprint("n", i)))
				continue
			}
			add("Node", lowNode(k.Region, fmt.Sprint("n", i)))
			if i < secretsPerPlace {
				add("Secret", w.cfg.secret(k.Region, fmt.Sprint("s", i)))
			}
			if i < boxesPerPlace {
				add("Box", box(k.Region, fmt.Sprint("b", i)))
			}
		}
		if k.Service == low && w.cfg.version(low) == "v2" { // a name that v1 cannot express
			other := w.cfg.regions[(slices.Index(w.cfg.regions, k.Region)+1)%len(w.cfg.regions)]
			add("Secret", project(other)+"/regions/"+k.Region+"/secrets/far")
		}
	}
	return all
}

// workload is what all workers share.
type workload struct {
	*world
	things map[string][]thing
	hints  sync.Map // thing -> bool: it was there when somebody last looked

	mu    sync.Mutex
	found []finding
	count map[string]int
}

// worker writes to one Deployment. Of each name below its partition it is the only user.
type worker struct {
	*workload
	id      string
	place   *place
	rng     *rand.Rand
	mine    []string
	anchors []*anchor
	serial  int
}

// anchor is a resource that only blocks: nothing removes it but its worker. So while a reference of it is known to be committed, the target must be
// there, whatever anybody does (I1).
type anchor struct {
	name  string
	known bool             // what it refers to
	held  map[thing]string // the targets, with their uuid once it has been seen
}

func (w *world) newWorkload() *workload {
	return &workload{world: w, things: w.things(), count: map[string]int{}}
}

func (l *workload) workers() []*worker {
	var all []*worker
	for i, k := range l.keys {
		for j := range workersPerPlace {
			wk := &worker{workload: l, id: fmt.Sprintf("%s-%d", k, j), place: l.places[k], rng: rand.New(rand.NewPCG(seed(), uint64(100+10*i+j)))}
			for _, typ := range []string{"Node", "Secret", "Box"} {
				n := 0
				for _, t := range l.things[k.Service+"/"+typ] {
					if t.key != k {
						continue
					}
					if n%workersPerPlace == j {
						wk.mine = append(wk.mine, t.name)
					}
					n++
				}
			}
			for a := range anchorsPerWorker {
				wk.anchors = append(wk.anchors, &anchor{name: nodeOf(k, fmt.Sprintf("anchor-%d-%d", j, a))})
			}
			all = append(all, wk)
		}
	}
	return all
}

// nodeOf is the name of a Node in a Deployment.
func nodeOf(k key, id string) string {
	if k.Service == low {
		return lowNode(k.Region, id)
	}
	return node(k.Region, id)
}

func (l *workload) report(names []string, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.found = append(l.found, finding{fmt.Sprintf(format, args...), names})
}

func (l *workload) broken() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.found) > 0
}

func (l *workload) saw(t thing, there bool) { l.hints.Store(t, there) }

func (l *workload) there(t thing) bool {
	there, _ := l.hints.Load(t)
	return there == true
}

// run works until ctx is done.
func (wk *worker) run(ctx context.Context) {
	for ctx.Err() == nil && !wk.broken() {
		switch p := wk.rng.IntN(100); {
		case p < 38:
			wk.saveOne()
		case p < 58:
			wk.deleteOne()
		case p < 68:
			wk.savePair()
		case p < 78:
			wk.saveOwned()
		case p < 85:
			wk.child()
		default:
			wk.anchor()
		}
		if wk.place.store() == nil {
			pause(ctx, 20*time.Millisecond)
		}
	}
}

// pause is part of the load: a client without a server to talk to.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (wk *worker) pick() string { return wk.mine[wk.rng.IntN(len(wk.mine))] }

// do writes, and judges the error: what a fault or another user may cause is none of the product's.
func (wk *worker) do(writes ...store.Write) (ok, unknown bool) {
	// Not the context of the run: a write is not given up because the run ends.
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := wk.write(ctx, wk.place, writes...)
	var names []string
	for _, w := range writes {
		names = append(names, w.Name)
	}
	switch store.CodeOf(err) {
	case 0:
		if err != nil {
			if !interrupted(err) {
				wk.report(names, "%s: an error of no kind: %v", wk.id, err)
			}
			return false, true
		}
		for _, w := range writes {
			wk.saw(thing{wk.place.key, w.Name}, w.Op != store.Delete)
		}
		return true, false
	case store.FailedPrecondition:
		return false, false
	case store.NotFound:
		wk.saw(thing{wk.place.key, names[0]}, false)
		return false, false
	case store.Aborted: // nothing was written
		return false, false
	case store.Unavailable:
		time.Sleep(time.Duration(wk.rng.IntN(100)) * time.Millisecond) // the load: a client that is told to come back later
		return false, true
	}
	wk.report(names, "%s: an error that nobody could expect: %v", wk.id, err)
	return false, true
}

// interrupted says whether a process that was killed under the call explains the error.
func interrupted(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, io.EOF) || strings.Contains(err.Error(), "closed pool")
}

func (wk *worker) next() int { wk.serial++; return wk.serial }

// target chooses one for a field, and returns it with its spelling there; only, unless nil, says which may be chosen. ok is false if none was found.
func (wk *worker) target(f field) (t thing, spelled string, ok bool) {
	all := wk.things[f.service+"/"+f.typ]
	for range 8 {
		t = all[wk.rng.IntN(len(all))]
		if !wk.there(t) && wk.rng.IntN(20) > 0 {
			continue
		}
		if spelled, ok = nameIn(wk.place.Service, f.service, t.name); ok {
			return t, spelled, true
		}
	}
	return t, "", false
}

// randomRefs makes references for a resource.
func (wk *worker) randomRefs(name string, most int) refs {
	all := fields[wk.place.Service+"/"+typeOf(name)]
	r := refs{}
	if len(all) == 0 {
		return r
	}
	for range wk.rng.IntN(most + 1) {
		f := all[wk.rng.IntN(len(all))]
		if f.behavior == store.Block && wk.rng.IntN(3) > 0 {
			continue // otherwise little can be deleted
		}
		if t, spelled, ok := wk.target(f); ok && (t.name != name || f.behavior != store.Block) {
			r[f.path] = append(r[f.path], spelled)
		}
	}
	return r
}

func (wk *worker) saveOne() {
	name := wk.pick()
	wk.do(store.Write{Op: store.Save, Name: name, Body: wk.randomRefs(name, 4).body(wk.next())})
}

func (wk *worker) deleteOne() {
	name := wk.pick()
	if ok, _ := wk.do(store.Write{Op: store.Delete, Name: name}); ok {
		wk.saw(thing{wk.place.key, name}, false)
		// Nobody else writes this name: it must be gone, or going.
		if st := wk.place.store(); st != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			r, err := st.Get(ctx, name)
			if err == nil && r.State == store.Active {
				wk.report([]string{name}, "%s: %s was deleted and is still there", wk.id, name)
			}
		}
	}
}

// savePair creates two resources that refer to each other in one transaction, in either order (I10).
func (wk *worker) savePair() {
	a, b := wk.pick(), wk.pick()
	for _, n := range []*string{&a, &b} {
		for typeOf(*n) != "Node" {
			*n = wk.pick()
		}
	}
	if a == b {
		return
	}
	ra, rb := wk.randomRefs(a, 1), wk.randomRefs(b, 1)
	ra["asyncCascade[]"] = append(ra["asyncCascade[]"], b)
	if wk.rng.IntN(2) == 0 {
		rb["cascade[]"] = append(rb["cascade[]"], a)
	}
	writes := []store.Write{{Op: store.Save, Name: a, Body: ra.body(wk.next())}, {Op: store.Save, Name: b, Body: rb.body(wk.next())}}
	if wk.rng.IntN(2) == 0 {
		slices.Reverse(writes)
	}
	wk.do(writes...)
}

// saveOwned saves a resource with owners. Some require a reference of the owner, and some of those have it.
func (wk *worker) saveOwned() {
	name := wk.pick()
	if typeOf(name) == "Secret" {
		return
	}
	var writes []store.Write
	var owners []store.OwnerReference
	for range 1 + wk.rng.IntN(2) {
		services := []string{low, mid, high}
		service := services[wk.rng.IntN(len(services))]
		candidates := wk.things[service+"/Node"]
		if len(candidates) == 0 {
			return
		}
		t := candidates[wk.rng.IntN(len(candidates))]
		if !wk.there(t) && wk.rng.IntN(10) > 0 || t.key == wk.place.key && t.name == name {
			continue
		}
		version := wk.places[t.key].version
		if service == low && wk.rng.IntN(3) == 0 {
			version = []string{"v1", "v2"}[wk.rng.IntN(2)]
		}
		owners = append(owners, store.OwnerReference{Kind: service + "/Node", Version: version, Name: t.name, Region: t.Region,
			RequiresOwnerReference: wk.rng.IntN(6) == 0, UnsetOnDelete: wk.rng.IntN(3) == 0})
	}
	if owner := wk.pick(); wk.rng.IntN(3) == 0 && owner != name && typeOf(owner) == "Node" && typeOf(name) == "Node" {
		owners = []store.OwnerReference{{Kind: wk.place.Service + "/Node", Version: wk.place.version, Name: owner, Region: wk.place.Region,
			RequiresOwnerReference: true, UnsetOnDelete: wk.rng.IntN(2) == 0}}
		writes = append(writes, store.Write{Op: store.Save, Name: owner, Body: refs{"links[].asyncUnset": {name}}.body(wk.next())})
	}
	if len(owners) == 2 && owners[0].Name == owners[1].Name && owners[0].Kind == owners[1].Kind {
		owners = owners[:1]
	}
	if len(owners) == 2 && owners[0].Name == owners[1].Name {
		owners = owners[:1] // owners are told apart by their names (spec 2.4)
	}
	writes = append(writes, store.Write{Op: store.Save, Name: name, Meta: store.Meta{OwnerReferences: owners}, Body: wk.randomRefs(name, 1).body(wk.next())})
	wk.do(writes...)
}

// child makes and removes children of low's Nodes.
func (wk *worker) child() {
	parent := wk.pick()
	if wk.place.Service != low || typeOf(parent) != "Node" {
		wk.saveOne()
		return
	}
	name := parent + []string{"/leaves/l", "/twigs/t", "/pins/p"}[wk.rng.IntN(3)]
	if wk.rng.IntN(3) == 0 || strings.Contains(name, "/pins/") && wk.rng.IntN(2) == 0 {
		wk.do(store.Write{Op: store.Delete, Name: name, AllowMissing: true})
		return
	}
	wk.do(store.Write{Op: store.Save, Name: name, Body: refs{}.body(wk.next())})
}

// anchor verifies that the targets of an anchor are there, and then lets it hold others.
func (wk *worker) anchor() {
	a := wk.anchors[wk.rng.IntN(len(wk.anchors))]
	if a.known {
		wk.verify(a)
		if wk.rng.IntN(2) == 0 {
			return
		}
	}
	r, held := refs{}, map[thing]string{}
	for _, f := range fields[wk.place.Service+"/Node"] {
		if f.behavior != store.Block || wk.rng.IntN(2) == 0 {
			continue
		}
		if t, spelled, ok := wk.target(f); ok && wk.there(t) {
			r[f.path] = append(r[f.path], spelled)
			held[t] = ""
		}
	}
	ok, unknown := wk.do(store.Write{Op: store.Save, Name: a.name, Body: r.body(wk.next())})
	switch {
	case ok:
		a.known, a.held = true, held
		wk.verify(a)
	case unknown:
		a.known = false
	}
}

func (wk *worker) verify(a *anchor) {
	for t, uuid := range a.held {
		st := wk.places[t.key].store()
		if st == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		r, err := st.Get(ctx, t.name)
		cancel()
		names := []string{a.name, t.name}
		switch {
		case store.CodeOf(err) == store.NotFound:
			wk.report(names, "I1: %s holds a blocking reference to %s of %s, which is gone", a.name, t.name, t.key)
		case err != nil:
		case r.State != store.Active:
			wk.report(names, "I1: %s holds a blocking reference to %s of %s, which is %s", a.name, t.name, t.key, r.State)
		case uuid != "" && r.UUID != uuid:
			wk.report(names, "I1: %s holds a blocking reference to %s of %s, which has been deleted and made anew", a.name, t.name, t.key)
		default:
			a.held[t] = r.UUID
			wk.mu.Lock()
			wk.count["anchored targets verified"]++
			wk.mu.Unlock()
		}
	}
}

// unstick does what users do whose deletions are blocked: they take the blocking references away, and the children that block.
func (l *workload) unstick(images map[key]*image) {
	stuck := map[thing]bool{}
	for k, m := range images {
		for _, r := range m.owned {
			if store.Tasks(r.tasks)&store.PendingDelete != 0 {
				stuck[thing{k, r.name}] = true
			}
		}
	}
	if len(stuck) == 0 {
		return
	}
	var inTheWay []edge
	for _, m := range images {
		for _, e := range m.edges() {
			if e.behavior == store.Block && l.blocks(images, e, stuck) {
				inTheWay = append(inTheWay, e)
			}
		}
	}
	l.drop(images, inTheWay)
}

// drop takes references away as users do, and deletes children that block.
func (l *workload) drop(images map[key]*image, edges []edge) {
	by := map[thing][]edge{}
	for _, e := range edges {
		by[e.from] = append(by[e.from], e)
	}
	for t, edges := range by {
		r := images[t.key].owned[t.name]
		left := refs{}
		for path, names := range r.refs {
			left[path] = slices.Clone(names)
		}
		child := false
		for _, e := range edges {
			child = child || e.parent
			left[e.path] = slices.DeleteFunc(left[e.path], func(s string) bool { return s == e.spelled })
		}
		wr := store.Write{Op: store.Update, Name: t.name, Body: left.body(1_000_000), Meta: store.Meta{OwnerReferences: r.owners}}
		if child {
			wr = store.Write{Op: store.Delete, Name: t.name, AllowMissing: true}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, _ = l.write(ctx, l.places[t.key], wr) // if it fails, it is seen again
		cancel()
		l.mu.Lock()
		l.count["users unblocked"]++
		l.mu.Unlock()
	}
}

// blocks says whether a blocking reference is in the way of the deletion of something stuck: its target is that, or goes with it in the same transaction.
func (l *workload) blocks(images map[key]*image, e edge, stuck map[thing]bool) bool {
	m := images[e.to.key]
	doomed := map[string]bool{}
	for t := range stuck {
		if t.key == e.to.key {
			doomed[t.name] = true
		}
	}
	if len(doomed) == 0 {
		return false
	}
	for grown := true; grown; {
		grown = false
		for _, c := range m.edges() {
			if c.behavior == store.Cascade && c.to.key == c.from.key && doomed[c.to.name] && !doomed[c.from.name] {
				doomed[c.from.name], grown = true, true
			}
		}
	}
	return doomed[e.to.name]
}
