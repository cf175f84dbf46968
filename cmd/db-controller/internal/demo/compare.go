package demo

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// The comparison trusts nothing of the product but the rows: which region must hold which rows follows from the column regions in the database of
// the rows' owner.

// result is what a comparison of all databases found.
type result struct {
	owned, copies             int64
	missing, extra, different int64
	// examples of what is wrong, a few.
	examples []string
}

func (r *result) equal() bool { return r.missing+r.extra+r.different == 0 }

const maxExamples = 5

func (r *result) example(format string, args ...any) {
	if len(r.examples) < maxExamples {
		r.examples = append(r.examples, fmt.Sprintf(format, args...))
	}
}

// row is what must be equal.
type row struct {
	name, uuid, content string
	epoch, version      int64
}

// columns of a row; content is everything else that an owner and a copy share.
const columns = `name, uuid::text, epoch, resource_version,
	md5(ROW(type, generation, shard, owning_region, regions, state, block_deletion, create_time, update_time, delete_time, meta, body)::text)`

const (
	dueSQL  = "SELECT " + columns + " FROM " + table + " WHERE owning_region = $1 AND state <> 2 AND (regions @> ARRAY[$2] OR regions @> ARRAY['*']) ORDER BY name"
	heldSQL = "SELECT " + columns + " FROM " + table + " WHERE owning_region = $1 AND state <> 2 ORDER BY name"
	// strangers are copies of regions that do not exist.
	countSQL = `SELECT count(*) FILTER (WHERE owning_region = $1), count(*) FILTER (WHERE owning_region <> $1),
		count(*) FILTER (WHERE owning_region <> ALL ($2)) FROM ` + table + " WHERE state <> 2"
)

// compare compares every copy with its owner. Nobody should be writing meanwhile.
func (w *world) compare(ctx context.Context) (*result, error) {
	all := &result{}
	for _, target := range Regions {
		for _, owner := range Regions {
			if owner == target {
				continue
			}
			if err := comparePair(ctx, w.regions[owner], w.regions[target], all); err != nil {
				return nil, fmt.Errorf("compare the copies of %s in %s: %w", owner, target, err)
			}
		}
	}
	// Counted last: what was under way when the comparison began has arrived if that has found everything equal.
	for _, r := range Regions {
		var owned, copies, strangers int64
		if err := w.regions[r].pool.QueryRow(ctx, countSQL, r, Regions).Scan(&owned, &copies, &strangers); err != nil {
			return nil, fmt.Errorf("count rows in %s: %w", r, err)
		}
		all.owned += owned
		all.copies += copies
		all.extra += strangers
	}
	return all, nil
}

// comparePair merges two ordered streams of rows.
func comparePair(ctx context.Context, owner, target *region, found *result) error {
	g, ctx := errgroup.WithContext(ctx)
	due, held := make(chan row, 1000), make(chan row, 1000)
	g.Go(func() error { return owner.stream(ctx, due, dueSQL, owner.name, target.name) })
	g.Go(func() error { return target.stream(ctx, held, heldSQL, owner.name) })
	d, more := <-due
	h, moreHeld := <-held
	for more || moreHeld {
		switch {
		case !moreHeld || more && d.name < h.name:
			found.missing++
			found.example("%s lacks %s of %s", target.name, d.name, owner.name)
			d, more = <-due
		case !more || h.name < d.name:
			found.extra++
			found.example("%s holds %s, which it should not have of %s", target.name, h.name, owner.name)
			h, moreHeld = <-held
		default:
			if d != h {
				found.different++
				found.example("%s in %s is at version %d, in %s at %d", d.name, target.name, h.version, owner.name, d.version)
			}
			d, more = <-due
			h, moreHeld = <-held
		}
	}
	return g.Wait()
}

// stream sends the rows of a query, and closes to.
func (r *region) stream(ctx context.Context, to chan<- row, sql string, args ...any) error {
	defer close(to)
	rows, err := r.pool.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	var x row
	_, err = pgx.ForEachRow(rows, []any{&x.name, &x.uuid, &x.epoch, &x.version, &x.content}, func() error {
		select {
		case to <- x:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return err
}
