package references

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
)

// record is a row of resources that its Deployment owns, or a read copy.
type record struct {
	name, typ, uuid, region string
	state, shadow, tasks    int
	version                 int64
	body, meta, problem     string
	epoch                   int64
	refs                    refs // of an owned, live resource
	owners                  []store.OwnerReference
}

func (r *record) live() bool { return r != nil && r.state == 0 }

// link is one row of refs, or one computed from a body.
type link struct {
	referrer, field, target, at string
	kind, behavior              int
}

type source struct{ blocking, subscriber, ownee bool }

type located struct{ name, at string }

type blockade struct{ name, at, referrer string }

// image is one database.
type image struct {
	place     *place
	owned     map[string]*record
	copies    map[string]*record
	links     map[link]bool
	open      []link // those that are not confirmed, or there twice
	sources   map[located]source
	blockades []blockade
}

// finding is a broken promise, with the names that it is about.
type finding struct {
	text  string
	names []string
}

// read reads a whole database in one snapshot.
func (p *place) read(ctx context.Context) (*image, error) {
	conn, err := p.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close(ctx) }()
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	return p.readIn(ctx, tx)
}

// readIn reads a whole database as a transaction sees it.
func (p *place) readIn(ctx context.Context, tx pgx.Tx) (*image, error) {
	var err error
	m := &image{place: p, owned: map[string]*record{}, copies: map[string]*record{}, links: map[link]bool{}, sources: map[located]source{}}
	each := func(sql string, into []any, do func() error) {
		if err != nil {
			return
		}
		var rows pgx.Rows
		if rows, err = tx.Query(ctx, sql); err == nil {
			_, err = pgx.ForEachRow(rows, into, do)
		}
	}
	var r record
	each(`SELECT name, type, uuid::text, owning_region, state, shadow, tasks, resource_version, epoch, coalesce(body::text, ''), meta::text, coalesce(task_error, '') FROM resources`,
		[]any{&r.name, &r.typ, &r.uuid, &r.region, &r.state, &r.shadow, &r.tasks, &r.version, &r.epoch, &r.body, &r.meta, &r.problem}, func() error {
			row := r
			if row.region != p.Region {
				m.copies[row.name] = &row
				return nil
			}
			m.owned[row.name] = &row
			return row.decode(p.Service)
		})
	var l link
	var txID string
	each(`SELECT referrer, field, target, location, kind, behavior, coalesce(tx_id::text, '') FROM refs`,
		[]any{&l.referrer, &l.field, &l.target, &l.at, &l.kind, &l.behavior, &txID}, func() error {
			if m.links[l] || txID != "" {
				m.open = append(m.open, l)
			}
			m.links[l] = true
			return nil
		})
	var at located
	var s source
	each(`SELECT name, location, blocking, subscriber, ownee FROM sources`, []any{&at.name, &at.at, &s.blocking, &s.subscriber, &s.ownee}, func() error { m.sources[at] = s; return nil })
	var b blockade
	each(`SELECT name, location, referrer FROM blockades`, []any{&b.name, &b.at, &b.referrer}, func() error { m.blockades = append(m.blockades, b); return nil })
	return m, err
}

func (r *record) decode(service string) error {
	if r.state == 2 {
		return nil
	}
	var meta struct{ OwnerReferences []store.OwnerReference }
	if err := json.Unmarshal([]byte(r.meta), &meta); err != nil {
		return fmt.Errorf("metadata of %s: %w", r.name, err)
	}
	r.owners = meta.OwnerReferences
	var err error
	r.refs, err = refsIn(service, r.name, []byte(r.body))
	return err
}

// read reads all databases, one after the other: nothing may be going on.
func (w *world) read(ctx context.Context) (map[key]*image, error) {
	all := map[key]*image{}
	for k, p := range w.places {
		m, err := p.read(ctx)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", k, err)
		}
		all[k] = m
	}
	return all, nil
}

// edge is a reference as the whole world sees it: where both ends are, each under its owner's name.
type edge struct {
	from, to      thing
	path, spelled string
	behavior      store.Behavior
	parent        bool
}

// edges computes all references of the live resources of a database from their bodies and names; those of owners are not among them.
func (m *image) edges() []edge {
	var all []edge
	for _, r := range m.owned {
		if !r.live() {
			continue
		}
		e := edge{}
		e.from.key, e.from.name = m.place.key, r.name
		for _, f := range fields[m.place.Service+"/"+r.typ] {
			for _, spelled := range r.refs[f.path] {
				e.to.name = m.place.world.cfg.ownName(f.service, spelled)
				e.to.key = key{Service: f.service, Region: regionOf(e.to.name)}
				e.path, e.spelled, e.behavior = f.path, spelled, f.behavior
				all = append(all, e)
			}
		}
		if parent, b, ok := parentOf(m.place.Service, r.name); ok {
			e.to.name, e.to.key = parent, key{Service: m.place.Service, Region: regionOf(parent)}
			e.path, e.spelled, e.behavior, e.parent = "name", parent, b, true
			all = append(all, e)
		}
	}
	return all
}

// unfinished says what the Deployments still have to do.
func (m *image) unfinished() []finding {
	var todo []finding
	add := func(names []string, format string, args ...any) {
		todo = append(todo, finding{fmt.Sprintf("%s: ", m.place.key) + fmt.Sprintf(format, args...), names})
	}
	for _, r := range m.owned {
		if r.tasks != 0 {
			row := "I14"
			if store.Tasks(r.tasks)&store.PendingDelete != 0 {
				row = "I17"
			}
			add([]string{r.name}, "%s: %s has tasks %v: %s", row, r.name, store.Tasks(r.tasks).Strings(), r.problem)
		}
		if r.shadow == 2 || r.state == 1 {
			add([]string{r.name}, "I16: %s is being deleted, its state is %d and its shadow %d: %s", r.name, r.state, r.shadow, r.problem)
		}
	}
	for _, b := range m.blockades {
		add([]string{b.name}, "I15: there is a blockade on %s by %s of %s", b.name, b.referrer, b.at)
	}
	for _, l := range m.open {
		add([]string{l.referrer}, "I14: reference %+v is not confirmed, or twice there", l)
	}
	return todo
}

// inspect checks the invariants as far as states show them: I1, I2, I4 to I9, I14 to I18, I20 and I21; the others are about what happens. Nothing may be going on.
func (w *world) inspect(images map[key]*image) []finding {
	var found []finding
	for _, k := range w.keys {
		m := images[k]
		found = append(found, m.unfinished()...)
		add := func(names []string, format string, args ...any) {
			found = append(found, finding{fmt.Sprintf("%s: ", k) + fmt.Sprintf(format, args...), names})
		}
		// I7: shadows and resources are one to one.
		for _, r := range m.owned {
			want := 0
			if r.state != 2 {
				want = 1
			}
			if r.shadow != want {
				add([]string{r.name}, "I7: %s in state %d has shadow %d", r.name, r.state, r.shadow)
			}
		}
		for _, r := range m.copies {
			if r.shadow != 0 || r.tasks != 0 {
				add([]string{r.name}, "I7: the read copy %s has shadow %d, tasks %d", r.name, r.shadow, r.tasks)
			}
		}
		// I8: what the tables say is what the bodies say.
		want := map[link]bool{}
		for _, e := range m.edges() {
			l := link{referrer: e.from.name, field: e.path, target: e.spelled, behavior: int(e.behavior)}
			if e.parent {
				l.kind = int(store.ParentReference)
			}
			if e.to.key != k {
				l.at = e.to.key.String()
			}
			if e.behavior == store.AllowDangling {
				l.at = "?" // nobody is asked, so it is a guess
			}
			want[l] = true
			if e.behavior == store.AllowDangling {
				continue
			}
			// I1, I2, I6: the target lives; what is handled later has a shadow at least.
			owner := images[e.to.key]
			if owner == nil || !owner.owned[e.to.name].live() {
				row := "I1, I2"
				if e.behavior != store.Block {
					row = "I2, I6"
				}
				add([]string{e.from.name, e.to.name}, row+": %s refers in %s (%s) to %s of %s, which does not live", e.from.name, e.path, e.behavior, e.to.name, e.to.key)
				continue
			}
			// I4, I5: its Deployment knows that somebody here refers to it.
			if e.to.key == k {
				continue
			}
			s, ok := owner.sources[located{e.to.name, k.String()}]
			if !ok || e.behavior == store.Block && !s.blocking || e.behavior.Handled(false) && !s.subscriber {
				add([]string{e.from.name, e.to.name}, "I4, I5: %s refers to %s of %s (%s), which knows of it: %v %+v", e.from.name, e.to.name, e.to.key, e.behavior, ok, s)
			}
		}
		for _, r := range m.owned {
			for _, o := range r.owners {
				service, _, _ := strings.Cut(o.Kind, "/")
				want[link{referrer: r.name, field: "metadata.ownerReferences", target: o.Name, at: service + "/" + o.Region, kind: int(store.OwnerRef)}] = true
				found = append(found, w.inspectOwner(images, k, r, o)...)
			}
		}
		have := map[link]bool{}
		for l := range m.links {
			if l.behavior == int(store.AllowDangling) {
				l.at = "?"
			}
			have[l] = true
		}
		for l := range have {
			if !want[l] {
				add([]string{l.referrer, l.target}, "I8: the table has %+v, the body has not", l)
			}
		}
		for l := range want {
			if !have[l] {
				add([]string{l.referrer, l.target}, "I8: the body has %+v, the table has not", l)
			}
		}
		// I9: locations are Deployments that may refer to us, and they belong to something.
		for at, s := range m.sources {
			importer, _, _ := strings.Cut(at.at, "/")
			if (s.blocking || s.subscriber) && importer != k.Service && imports[importer][k.Service] == "" {
				add([]string{at.name}, "I9: %s is a source of %s: %+v", at.at, at.name, s)
			}
			if r := m.owned[at.name]; r == nil || r.shadow == 0 {
				add([]string{at.name}, "I7: %s is a source of %s, which has no shadow", at.at, at.name)
			}
		}
	}
	slices.SortFunc(found, func(a, b finding) int { return strings.Compare(a.text, b.text) })
	return found
}

// inspectOwner checks an owner reference of r (I18 to I21).
func (w *world) inspectOwner(images map[key]*image, at key, r *record, o store.OwnerReference) (found []finding) {
	service, _, _ := strings.Cut(o.Kind, "/")
	k := key{Service: service, Region: o.Region}
	owner := images[k]
	name := w.cfg.ownName(service, o.Name)
	add := func(format string, args ...any) {
		found = append(found, finding{fmt.Sprintf("%s: ", at) + fmt.Sprintf(format, args...), []string{r.name, name}})
	}
	if owner == nil || !owner.owned[name].live() {
		add("I18: owner %s of %s does not live", o.Name, r.name)
		return found
	}
	if o.Version != owner.place.version || o.Name != name {
		add("I21: %s names its owner as %s in version %s, it is %s in %s", r.name, o.Name, o.Version, name, owner.place.version)
	}
	if !owner.sources[located{name, at.String()}].ownee {
		add("I4: owner %s does not know of its ownee %s", name, r.name)
	}
	if o.RequiresOwnerReference && !slices.ContainsFunc(owner.edges(), func(e edge) bool { return e.from.name == name && !e.parent && e.to.key == at && e.to.name == r.name }) {
		add("I20: owner %s of %s does not refer to it", name, r.name)
	}
	return found
}

// waitQuiet waits until nothing is left to be done anywhere, and returns the databases. unstick, unless nil, may act as users do who find
// something in the way of what they have asked for.
func (w *world) waitQuiet(limit time.Duration, unstick func(map[key]*image)) map[key]*image {
	w.t.Helper()
	var images map[key]*image
	var todo []finding
	var same string
	err := retry(w.t.Context(), limit, func() (err error) {
		if images, err = w.read(w.t.Context()); err != nil {
			return err
		}
		todo = nil
		var now strings.Builder
		for _, k := range w.keys {
			todo = append(todo, images[k].unfinished()...)
			for _, name := range slices.Sorted(maps.Keys(images[k].owned)) {
				r := images[k].owned[name]
				fmt.Fprintln(&now, k, name, r.uuid, r.epoch, r.version, r.state)
			}
		}
		if len(todo) > 0 {
			if unstick != nil {
				unstick(images)
			}
			return fmt.Errorf("%d things are not done", len(todo))
		}
		if was := same; now.String() != was {
			same = now.String()
			return fmt.Errorf("something still changes")
		}
		return nil
	})
	if err != nil {
		w.fail("it does not become quiet: "+err.Error(), todo)
	}
	return images
}

// fail ends the test with the first findings, each with the history of its names.
func (w *world) fail(what string, found []finding) {
	w.t.Helper()
	var text strings.Builder
	for _, f := range found[:min(len(found), 12)] {
		fmt.Fprintln(&text, f.text)
		for _, n := range slices.Compact(slices.Sorted(slices.Values(f.names))) {
			text.WriteString(w.books.of(n))
		}
	}
	w.t.Fatalf("%s (seed %d): %d findings\n%s", what, seed(), len(found), text.String())
}

// mustHold waits for quiet and checks every invariant.
func (w *world) mustHold(limit time.Duration, unstick func(map[key]*image)) map[key]*image {
	w.t.Helper()
	images := w.waitQuiet(limit, unstick)
	if found := w.inspect(images); len(found) > 0 {
		w.fail("the references do not hold", found)
	}
	return images
}
