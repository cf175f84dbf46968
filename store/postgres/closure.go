package postgres

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
)

// maxBlockers is more than one batch can have writes, so that a blocker which the batch does not itself remove is among them.
const maxBlockers = store.MaxBatch + 100

// Closure plans the deletion of roots in this database (spec 4.3): what goes with them, what is cleared, and what objects. limit bounds the rows, depth the hops;
// with async > 0 up to so many referrers that would be handled afterwards are listed too. Missing roots are left out. It is a plan: the write checks everything again
// under locks.
func (s *Store) Closure(ctx context.Context, roots []string, limit, depth, async int) (*store.Closure, error) {
	c := new(store.Closure)
	via := map[string]store.Doomed{}
	for _, r := range roots {
		via[r] = store.Doomed{}
	}
	frontier := roots
	for level := 1; len(frontier) > 0; level++ {
		incoming, err := s.incoming(ctx, frontier, []int32{int32(store.Unset), int32(store.Cascade)}, limit+1)
		if err != nil {
			return nil, err
		}
		frontier = nil
		for _, in := range incoming {
			if _, seen := via[in.Referrer]; seen {
				continue
			}
			if in.Behavior == store.Unset {
				c.Unset = append(c.Unset, in)
				continue
			}
			via[in.Referrer] = store.Doomed{Via: in, Depth: level}
			frontier = append(frontier, in.Referrer)
		}
		if len(via)+len(c.Unset) > limit || level > depth && len(frontier) > 0 {
			c.Truncated = true
			break
		}
	}
	// What is cleared in a row that goes itself need not be.
	c.Unset = slices.DeleteFunc(c.Unset, func(in store.Incoming) bool { _, doomed := via[in.Referrer]; return doomed })
	names := make([]string, 0, len(via))
	for n := range via {
		names = append(names, n)
	}
	slices.Sort(names)
	return c, s.describe(ctx, c, names, via, async)
}

// referrersSQL finds the live local referrers of the targets in $1, by the index on the target of each and then by the referrer's name, whatever the planner thinks of their
// number: it has made its plan for one target, and there may be a hundred thousand.
const referrersSQL = ` FROM unnest($1::text[]) AS n,
	LATERAL (SELECT referrer, field, target, kind, behavior FROM refs WHERE target = n AND location = '' OFFSET 0) r,
	LATERAL (SELECT type, state, epoch, resource_version FROM resources WHERE name = r.referrer OFFSET 0) t
	WHERE t.state = 0`

func (s *Store) incoming(ctx context.Context, targets []string, behaviors []int32, limit int) ([]store.Incoming, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+incomingColumns+referrersSQL+" AND r.kind <> 2 AND r.behavior = ANY ($2) LIMIT $3", targets, behaviors, limit)
	if err != nil {
		return nil, wrap(err, "list referrers of %d resources", len(targets))
	}
	all, err := pgx.CollectRows(rows, scanIncoming)
	return all, wrap(err, "list referrers of %d resources", len(targets))
}

// describe reads, in one round trip, what is known about the doomed rows and who objects.
func (s *Store) describe(ctx context.Context, c *store.Closure, names []string, via map[string]store.Doomed, async int) error {
	sources := map[string][]store.Source{}
	var b pgx.Batch
	b.Queue("SELECT epoch FROM ctl.feed_epoch").QueryRow(func(r pgx.Row) error { return r.Scan(&c.Epoch) })
	b.Queue("SELECT name, location, blocking, subscriber, ownee FROM sources WHERE name = ANY ($1) ORDER BY name, location", names).Query(func(rows pgx.Rows) error {
		var name, location string
		var src store.Source
		_, err := pgx.ForEachRow(rows, []any{&name, &location, &src.Blocking, &src.Subscriber, &src.Ownee}, func() (err error) {
			src.Location, err = store.ParseLocation(location)
			sources[name] = append(sources[name], src)
			return err
		})
		return err
	})
	b.Queue("SELECT "+blockadeColumns+" FROM blockades WHERE name = ANY ($1) AND expires_at > now() LIMIT $2", names, maxBlockers).Query(func(rows pgx.Rows) error {
		all, err := pgx.CollectRows(rows, scanBlockade)
		for _, x := range all {
			c.Blockers = append(c.Blockers, store.Blocker{Target: x.Name, Location: x.Location, Referrer: x.Referrer, TentativeUntil: x.ExpireTime})
		}
		return err
	})
	b.Queue("SELECT "+incomingColumns+referrersSQL+" AND r.behavior = 1 AND r.referrer NOT IN (SELECT unnest($1::text[])) LIMIT $2", names, maxBlockers).Query(func(rows pgx.Rows) error {
		all, err := pgx.CollectRows(rows, scanIncoming)
		for _, in := range all {
			c.Blockers = append(c.Blockers, store.Blocker{Target: in.Target, Referrer: in.Referrer, Field: in.Field})
		}
		return err
	})
	if async > 0 {
		b.Queue("SELECT "+incomingColumns+referrersSQL+" AND r.kind <> 2 AND r.behavior IN (4, 5) AND r.referrer NOT IN (SELECT unnest($1::text[])) LIMIT $2", names, async).Query(func(rows pgx.Rows) (err error) {
			c.Async, err = pgx.CollectRows(rows, scanIncoming)
			return err
		})
	}
	b.Queue(`SELECT name, type, uuid::text, epoch, resource_version, row_version, block_deletion FROM resources WHERE name = ANY ($1) AND state = 0 ORDER BY name`, names).Query(func(rows pgx.Rows) error {
		var d store.Doomed
		var blocked bool
		_, err := pgx.ForEachRow(rows, []any{&d.Name, &d.Type, &d.UUID, &d.Version.Epoch, &d.Version.Number, &d.RowVersion, &blocked}, func() error {
			d.Via, d.Depth, d.Sources = via[d.Name].Via, via[d.Name].Depth, sources[d.Name]
			c.Delete = append(c.Delete, d)
			if blocked {
				c.Blockers = append(c.Blockers, store.Blocker{Target: d.Name, BlockDeletion: true})
			}
			return nil
		})
		return err
	})
	if err := s.pool.SendBatch(ctx, &b).Close(); err != nil {
		return wrap(err, "plan the deletion of %d resources", len(names))
	}
	slices.SortStableFunc(c.Delete, func(a, b store.Doomed) int {
		return min(a.Depth, 1) - min(b.Depth, 1) // the roots first
	})
	return nil
}

// Shadow returns the shadow of one resource.
func (s *Store) Shadow(ctx context.Context, name string) (*store.Shadow, error) {
	found, err := s.shadows(ctx, "name = $1", name, 1)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, store.Errorf(store.NotFound, name, "has no shadow here: it does not exist, is a read copy, or its type takes no part in references")
	}
	return found[0], nil
}

// Shadows returns a page of shadows by name, and the name that the next one begins after, empty at the end.
func (s *Store) Shadows(ctx context.Context, f store.ShadowFilter) (page []*store.Shadow, next string, err error) {
	where := "name > $1 AND starts_with(name, $3)"
	const due = " AND shadow_change IS NOT NULL AND shadow = "
	switch f.State {
	case "":
	case "ACTIVE":
		where += " AND shadow = 1 AND tasks = 0"
	case "PENDING":
		where += due + "1"
	case "DELETING":
		where += due + "2"
	default:
		return nil, "", store.Invalid("state", fmt.Sprintf("%q is no state of a shadow: ACTIVE, PENDING or DELETING", f.State))
	}
	if page, err = s.shadows(ctx, where, f.After, f.Limit, f.Prefix); err != nil {
		return nil, "", err
	}
	if len(page) == f.Limit && f.Limit > 0 {
		next = page[len(page)-1].Name
	}
	return page, next, nil
}

func (s *Store) shadows(ctx context.Context, where string, args ...any) ([]*store.Shadow, error) {
	var all []*store.Shadow
	byName := map[string]*store.Shadow{}
	err := s.scan(ctx, func(tx pgx.Tx) error { // one snapshot for all tables
		rows, err := tx.Query(ctx, `SELECT name, type, uuid::text, shadow, state, tasks, coalesce(task_time, 'epoch'), coalesce(delete_time, 'epoch'), row_version, block_deletion,
			coalesce(task_error, ''), coalesce(task_retry, 'epoch'), (SELECT epoch FROM ctl.feed_epoch) FROM resources WHERE shadow <> 0 AND `+where+` ORDER BY name LIMIT $2`, args...)
		if err != nil {
			return err
		}
		all, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (*store.Shadow, error) {
			h := &store.Shadow{Unconfirmed: map[int]bool{}}
			err := r.Scan(&h.Name, &h.Type, &h.UUID, &h.State, &h.ResourceState, &h.Tasks, &h.TaskTime, &h.DeleteTime, &h.RowVersion, &h.BlockDeletion, &h.LastError, &h.NextRetry, &h.Epoch)
			h.TaskTime, h.DeleteTime, h.NextRetry = known(h.TaskTime), known(h.DeleteTime), known(h.NextRetry)
			byName[h.Name] = h
			return h, err
		})
		if err != nil {
			return err
		}
		names := make([]string, len(all))
		for i, h := range all {
			names[i] = h.Name
		}
		if rows, err = tx.Query(ctx, "SELECT "+referenceColumns+" FROM refs WHERE referrer = ANY ($1) ORDER BY referrer, kind, field, target", names); err != nil {
			return err
		}
		err = eachReference(rows, func(referrer string, r store.Reference, unconfirmed bool) error {
			h := byName[referrer]
			if unconfirmed {
				h.Unconfirmed[len(h.References)] = true
			}
			h.References = append(h.References, r)
			return nil
		})
		if err != nil {
			return err
		}
		// Local referrers have no row among the sources: the references themselves say that they are there.
		rows, err = tx.Query(ctx, `SELECT name, location, blocking, subscriber, ownee FROM sources WHERE name = ANY ($1)
			UNION ALL SELECT n, '', EXISTS (SELECT FROM refs WHERE target = n AND location = '' AND behavior = 1), EXISTS (SELECT FROM refs WHERE target = n AND location = '' AND behavior IN (4, 5)), false
				FROM unnest($1::text[]) AS n WHERE EXISTS (SELECT FROM refs WHERE target = n AND location = '')
			ORDER BY 1, 2`, names)
		if err != nil {
			return err
		}
		var name, location string
		var src store.Source
		_, err = pgx.ForEachRow(rows, []any{&name, &location, &src.Blocking, &src.Subscriber, &src.Ownee}, func() (err error) {
			src.Location, err = store.ParseLocation(location)
			byName[name].Sources = append(byName[name].Sources, src)
			return err
		})
		if err != nil {
			return err
		}
		if rows, err = tx.Query(ctx, "SELECT "+blockadeColumns+" FROM blockades WHERE name = ANY ($1) ORDER BY name, expires_at", names); err != nil {
			return err
		}
		blockades, err := pgx.CollectRows(rows, scanBlockade)
		for _, b := range blockades {
			byName[b.Name].Blockades = append(byName[b.Name].Blockades, b)
		}
		return err
	})
	return all, wrap(err, "read shadows %s", strings.TrimSpace(fmt.Sprint(args[0])))
}

// known makes the zero time of what the database does not know.
func known(t time.Time) time.Time {
	if t.Unix() == 0 {
		return time.Time{}
	}
	return t
}
