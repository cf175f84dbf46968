package references

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/dbcontroller/db-controller/store"
)

// TestTheCheckerSees: one fact of a world that is in order is made wrong in the raw tables, and the checker names it. Each change is rolled back.
func TestTheCheckerSees(t *testing.T) {
	w := newWorld(t, config{services: []string{low, mid}, regions: []string{"eu", "us"}})
	s := &scene{world: w}
	blocked, told, free := s.low("eu", "blocked"), s.low("eu", "told"), s.low("eu", "free")
	for _, n := range []string{blocked, told, free} {
		s.put(low, n, nil)
	}
	referrer, owner, ownee := s.node("us", "referrer"), s.node("us", "owner"), s.node("eu", "ownee")
	s.put(mid, referrer, refs{"lowBlock[]": {blocked}, "lowAsyncCascade[]": {told}})
	o := ownerOf(mid, "v1", owner)
	o.RequiresOwnerReference = true
	s.save(mid, ownee, store.Write{Meta: store.Meta{OwnerReferences: []store.OwnerReference{o}}})
	s.put(mid, owner, refs{"links[].asyncUnset": {ownee}})
	eventually(t, soon, "the copy is there", func() error { _, err := s.at(low, "us").store().Get(t.Context(), project("eu")); return err })
	w.mustHold(soon, nil)
	for _, p := range w.places {
		p.stopManager()
	}
	lowEU, lowUS, midEU, midUS := s.at(low, "eu"), s.at(low, "us"), s.at(mid, "eu"), s.at(mid, "us")
	for _, row := range []struct {
		want  string
		names []string // all in one finding, in any order
		at    *place
		sql   string
		args  []any
	}{
		{"I1, I2", []string{referrer, blocked}, lowEU, "UPDATE resources SET state = 2, body = NULL, shadow = 0 WHERE name = $1", []any{blocked}},
		{"I1, I2", []string{referrer, blocked}, lowEU, "DELETE FROM resources WHERE name = $1", []any{blocked}},
		{"I2, I6", []string{referrer, told}, lowEU, "DELETE FROM resources WHERE name = $1", []any{told}},
		{"I4, I5", []string{referrer, blocked}, lowEU, "DELETE FROM sources WHERE name = $1", []any{blocked}},
		{"I4, I5", []string{referrer, blocked}, lowEU, "UPDATE sources SET location = 'mid.example.com/eu' WHERE name = $1", []any{blocked}},
		{"I4, I5", []string{referrer, blocked}, lowEU, "UPDATE sources SET blocking = false WHERE name = $1", []any{blocked}},
		{"I4, I5", []string{referrer, told}, lowEU, "UPDATE sources SET subscriber = false WHERE name = $1", []any{told}},
		{"I4", []string{owner, ownee}, midUS, "UPDATE sources SET ownee = false WHERE name = $1", []any{owner}},
		{"I7", []string{free}, lowEU, "UPDATE resources SET shadow = 0 WHERE name = $1", []any{free}},
		{"I7", []string{free}, lowEU, "UPDATE resources SET state = 2, body = NULL WHERE name = $1", []any{free}},
		{"I7", []string{project("eu")}, lowUS, "UPDATE resources SET shadow = 1 WHERE name = $1", []any{project("eu")}},
		{"I7", []string{free + "x"}, lowEU, "INSERT INTO sources VALUES ($1, 'mid.example.com/eu', true, false, false)", []any{free + "x"}},
		{"I8", []string{referrer, told}, midUS, "DELETE FROM refs WHERE target = $1", []any{told}},
		{"I8", []string{referrer, told}, midUS, "UPDATE refs SET behavior = 1 WHERE target = $1", []any{told}},
		{"I8", []string{referrer, told}, midUS, "UPDATE resources SET body = body - 'lowAsyncCascade' WHERE name = $1", []any{referrer}},
		{"I8", []string{owner, ownee}, midEU, "DELETE FROM refs WHERE referrer = $1", []any{ownee}},
		{"I9", []string{referrer}, midUS, "INSERT INTO sources VALUES ($1, 'low.example.com/eu', true, false, false)", []any{referrer}},
		{"I14", []string{referrer}, midUS, "UPDATE resources SET tasks = 1 WHERE name = $1", []any{referrer}},
		{"I14", []string{referrer}, midUS, "UPDATE refs SET tx_id = gen_random_uuid() WHERE target = $1", []any{told}},
		{"I15", []string{free}, lowEU, "INSERT INTO blockades VALUES ($1, 'mid.example.com/us', 'r', gen_random_uuid(), 0, 0, now())", []any{free}},
		{"I16", []string{free}, lowEU, "UPDATE resources SET state = 2, body = NULL, shadow = 2 WHERE name = $1", []any{free}},
		{"I16", []string{free}, lowEU, "UPDATE resources SET state = 1, shadow = 2 WHERE name = $1", []any{free}},
		{"I17", []string{referrer}, midUS, "UPDATE resources SET tasks = 8 WHERE name = $1", []any{referrer}},
		{"I18", []string{owner, ownee}, midUS, "UPDATE resources SET state = 2, body = NULL, shadow = 0 WHERE name = $1", []any{owner}},
		{"I20", []string{owner, ownee}, midUS, "UPDATE resources SET body = '{}' WHERE name = $1", []any{owner}},
		{"I21", []string{owner, ownee}, midEU, `UPDATE resources SET meta = replace(meta::text, '"v1"', '"v9"')::jsonb WHERE name = $1`, []any{ownee}},
	} {
		found := w.inspect(w.readCorrupted(row.at, row.sql, row.args...))
		slices.Sort(row.names)
		if !slices.ContainsFunc(found, func(f finding) bool {
			return strings.Contains(f.text, ": "+row.want+": ") && slices.Equal(slices.Sorted(slices.Values(f.names)), row.names)
		}) {
			t.Errorf("%s %v: it is not among the findings %+v", row.sql, row.args, found)
		}
	}
	if found := w.inspect(w.readCorrupted(lowEU, "SELECT")); len(found) > 0 {
		t.Errorf("nothing is wrong, and it finds %+v", found)
	}

	// What workers see under way: the target of a blocking reference is gone, or another one (I1).
	l := w.newWorkload()
	wk := l.workers()[0]
	wk.verify(&anchor{name: referrer, held: map[thing]string{{lowEU.key, blocked}: ""}})
	if l.broken() {
		t.Errorf("nothing is wrong, and a worker finds %+v", l.found)
	}
	for target, uuid := range map[string]string{free + "x": "", blocked: "another"} {
		l.found = nil
		wk.verify(&anchor{name: referrer, held: map[thing]string{{lowEU.key, target}: uuid}})
		if !l.broken() {
			t.Errorf("a worker does not see that %s is not the one it was", target)
		}
	}
}

// readCorrupted reads all databases as they would be after a change of one of them.
func (w *world) readCorrupted(p *place, sql string, args ...any) map[key]*image {
	w.t.Helper()
	images, err := w.read(w.t.Context())
	check(w.t, err)
	conn, err := p.connect(w.t.Context())
	check(w.t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	tx, err := conn.Begin(w.t.Context())
	check(w.t, err)
	defer func() { _ = tx.Rollback(context.Background()) }()
	_, err = tx.Exec(w.t.Context(), sql, args...)
	check(w.t, err)
	images[p.key], err = p.readIn(w.t.Context(), tx)
	check(w.t, err)
	return images
}
