package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

const cascadeSQL = `
	CREATE SCHEMA native;
	CREATE TABLE native.parents (name text COLLATE "C" PRIMARY KEY);
	CREATE TABLE native.children (
		name text COLLATE "C" PRIMARY KEY, uuid uuid NOT NULL, resource_version bigint NOT NULL, generation bigint NOT NULL,
		create_time timestamptz NOT NULL, update_time timestamptz NOT NULL, meta jsonb NOT NULL, body jsonb NOT NULL,
		parent text COLLATE "C" NOT NULL REFERENCES native.parents ON DELETE CASCADE
	);
	CREATE INDEX ON native.children (parent);
	CREATE SCHEMA noting;
	CREATE TABLE noting.parents (LIKE native.parents INCLUDING ALL);
	CREATE TABLE noting.children (LIKE native.children INCLUDING ALL, FOREIGN KEY (parent) REFERENCES noting.parents ON DELETE CASCADE);
	CREATE TABLE noting.gone (name text COLLATE "C" PRIMARY KEY, uuid uuid NOT NULL, resource_version bigint NOT NULL, change xid8 NOT NULL DEFAULT pg_current_xact_id(), delete_time timestamptz NOT NULL);
	CREATE INDEX ON noting.gone (change);
	CREATE INDEX ON noting.gone (delete_time);
	CREATE FUNCTION noting.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		INSERT INTO noting.gone SELECT name, uuid, resource_version + 1, pg_current_xact_id(), now() FROM old;
		RETURN NULL;
	END $$;
	CREATE TRIGGER note AFTER DELETE ON noting.children REFERENCING OLD TABLE AS old FOR EACH STATEMENT EXECUTE FUNCTION noting.note()`

// cascade measures the deletion of a resource with its children in one transaction. The rival forgets them; ours leaves a tombstone of each, for the copies and
// the watches. What that alone costs is shown by a third way: the rival with a trigger that notes what is gone, in one statement, indexed as a feed needs it.
func cascade(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 100_000)
	w, err := newSavingWorld(ctx, opt, 4, cascadeSQL)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	var ours, native, noting []float64
	for run := range opt.runs {
		parent := fmt.Sprintf("targets/p%d", run)
		if err := w.family(ctx, parent, rows); err != nil {
			return res, err
		}
		ways := []func() error{
			func() error {
				took, err := timed(func() error {
					_, err := store.Apply(ctx, w.stack, store.Write{Op: store.Delete, Name: parent, Type: "Target", OwningRegion: sourceRegion})
					return err
				})
				ours = append(ours, float64(rows)/took.Seconds())
				fmt.Fprintf(opt.out, "run %d  ours    %8.0f rows/s  %s\n", run+1, ours[len(ours)-1], load())
				return err
			},
			func() error {
				took, err := timed(func() error {
					_, err := w.pool.Exec(ctx, "DELETE FROM native.parents WHERE name = $1", parent)
					return err
				})
				native = append(native, float64(rows)/took.Seconds())
				fmt.Fprintf(opt.out, "run %d  native  %8.0f rows/s  %s\n", run+1, native[len(native)-1], load())
				return err
			},
			func() error {
				took, err := timed(func() error {
					_, err := w.pool.Exec(ctx, "DELETE FROM noting.parents WHERE name = $1", parent)
					return err
				})
				noting = append(noting, float64(rows)/took.Seconds())
				fmt.Fprintf(opt.out, "run %d  noting  %8.0f rows/s  %s\n", run+1, noting[len(noting)-1], load())
				return err
			},
		}
		for i := range ways {
			if _, err := w.pool.Exec(ctx, "CHECKPOINT"); err != nil {
				return res, err
			}
			if err := ways[(i+run)%len(ways)](); err != nil {
				return res, err
			}
		}
		var left int
		const count = "SELECT (SELECT count(*) FROM v1.resources WHERE state <> 2) + (SELECT count(*) FROM v1.refs) + (SELECT count(*) FROM native.children) + (SELECT count(*) FROM noting.children)"
		if err := w.pool.QueryRow(ctx, count).Scan(&left); err != nil || left > 0 {
			return res, fmt.Errorf("%d rows are left: %w", left, err)
		}
	}
	fmt.Fprintf(opt.out, "against ON DELETE CASCADE with a trigger that notes what is gone: %.2f\n", median(ours)/median(noting))
	return faster(median(ours), median(native), "rows/s, against ON DELETE CASCADE"), nil
}

// family makes a parent with children for both.
func (w *savingWorld) family(ctx context.Context, parent string, rows int) error {
	if _, err := store.Apply(ctx, w.stack, store.Write{Op: store.Create, Name: parent, Type: "Target", OwningRegion: sourceRegion}); err != nil {
		return err
	}
	for _, rival := range []string{"native", "noting"} {
		if _, err := w.pool.Exec(ctx, "INSERT INTO "+rival+".parents VALUES ($1)", parent); err != nil {
			return err
		}
	}
	conn, err := w.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	r, now := newRand(), time.Now()
	payload := body(r, 1)
	rivalColumns := []string{"name", "uuid", "resource_version", "generation", "create_time", "update_time", "meta", "body", "parent"}
	rivalRow := func(i int) []any {
		return []any{fmt.Sprintf("%s/leaves/l%07d", parent, i), uuid.New(), 1, 1, now, now, []byte("{}"), payload, parent}
	}
	child := func(i int) string { return fmt.Sprintf("%s/leaves/l%07d", parent, i) }
	for _, c := range []struct {
		table   pgx.Identifier
		columns []string
		row     func(i int) []any
	}{
		{pgx.Identifier{"v1", "resources"}, []string{"name", "type", "uuid", "epoch", "resource_version", "generation", "shard", "owning_region", "regions", "create_time", "update_time", "body", "shadow"},
			func(i int) []any {
				return []any{child(i), "Leaf", uuid.New(), 1, 1, 1, descriptor.Shard(child(i), ring), sourceRegion, []string{sourceRegion}, now, now, payload, 1}
			}},
		{pgx.Identifier{"v1", "refs"}, []string{"referrer", "field", "target", "location", "kind", "behavior"},
			func(i int) []any {
				return []any{child(i), "name", parent, "", int(store.ParentReference), int(store.Cascade)}
			}},
		{pgx.Identifier{"native", "children"}, rivalColumns, rivalRow},
		{pgx.Identifier{"noting", "children"}, rivalColumns, rivalRow},
	} {
		if _, err := conn.Conn().CopyFrom(ctx, c.table, c.columns, pgx.CopyFromSlice(rows, func(i int) ([]any, error) { return c.row(i), nil })); err != nil {
			return fmt.Errorf("seed %s: %w", c.table.Sanitize(), err)
		}
	}
	_, err = w.pool.Exec(ctx, "VACUUM ANALYZE")
	return err
}

func timed(do func() error) (time.Duration, error) {
	began := time.Now()
	err := do()
	return time.Since(began), err
}
