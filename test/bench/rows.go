package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/descriptor"
)

// ring is the number of shards, the product's default.
const ring = 4096

// markers are rows of their own that a backlog changes last. There are enough of them for every subrange to have some, so a destination
// that has them all has applied everything before them.
const markers = 64

func itemName(i int) string   { return fmt.Sprintf("items/item-%07d", i) }
func markerName(i int) string { return fmt.Sprintf("items/marker-%02d", i) }

func markerNames() []string {
	all := make([]string, markers)
	for i := range all {
		all[i] = markerName(i)
	}
	return all
}

// body returns a JSON object of about 1 KB that does not compress well, as of a resource with a dozen fields.
func body(r *rand.Rand, serial int) json.RawMessage {
	text := func(n int) string {
		const letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789"
		b := make([]byte, n)
		for i := range b {
			b[i] = letters[r.IntN(len(letters))]
		}
		return string(b)
	}
	b, err := json.Marshal(map[string]any{
		"serial": serial, "displayName": text(30), "description": text(320), "summary": text(120), "maintainer": text(50),
		"homepage": "https://example.com/" + text(30), "checksum": text(64), "size": r.IntN(1 << 30), "priority": r.IntN(5), "enabled": true,
		"tags": []string{text(12), text(12), text(12)}, "spec": map[string]any{"replicas": r.IntN(9), "image": text(60), "command": text(90)},
	})
	if err != nil {
		panic(err) // nothing in it can fail
	}
	return b
}

func newRand() *rand.Rand { return rand.New(rand.NewPCG(1, 1)) }

// seed fills an empty resources table with rows, and the markers, all owned by source and to be copied to dest.
func seed(ctx context.Context, c *pgx.Conn, rows int) error {
	r := rand.New(rand.NewPCG(1, uint64(rows)))
	now := time.Now()
	columns := []string{"name", "type", "uuid", "epoch", "resource_version", "generation", "shard", "owning_region", "regions", "create_time", "update_time", "body"}
	_, err := c.CopyFrom(ctx, pgx.Identifier{"v1", "resources"}, columns, pgx.CopyFromSlice(rows+markers, func(i int) ([]any, error) {
		name := itemName(i)
		if i >= rows {
			name = markerName(i - rows)
		}
		return []any{name, "Item", uuid.New(), 1, 1, 1, descriptor.Shard(name, ring), sourceRegion, []string{sourceRegion, destRegion}, now, now, body(r, i)}, nil
	}))
	if err != nil {
		return fmt.Errorf("seed %d rows: %w", rows, err)
	}
	return nil
}

// backlogSQL makes single-row transactions, as a writer does that knows of nothing but the table. A procedure makes them as fast as the
// server can.
const backlogSQL = `
	CREATE SCHEMA bench;
	CREATE PROCEDURE bench.touch(first int, past int, rows int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN first .. past - 1 LOOP
			UPDATE v1.resources SET resource_version = resource_version + 1, generation = generation + 1, change = pg_current_xact_id(),
				update_time = clock_timestamp(), body = jsonb_set(body, '{serial}', to_jsonb(resource_version))
			WHERE name = 'items/item-' || lpad((i % rows)::text, 7, '0');
			COMMIT;
		END LOOP;
	END $$;
	CREATE PROCEDURE bench.mark() LANGUAGE sql AS $$
		UPDATE v1.resources SET resource_version = resource_version + 1, change = pg_current_xact_id() WHERE name LIKE 'items/marker-%'
	$$`

// writers of a backlog work side by side, so that transactions overlap as they do in life.
const writers = 4

// backlog changes rows in the source, one in each transaction, then the markers.
func (w *world) backlog(ctx context.Context, changes, rows int) error {
	g, gctx := errgroup.WithContext(ctx)
	for i := range writers {
		g.Go(func() error {
			c, err := w.source.Connect(gctx, w.sourceDB)
			if err != nil {
				return err
			}
			defer c.Close(context.WithoutCancel(gctx))
			_, err = c.Exec(gctx, "CALL bench.touch($1, $2, $3)", i*changes/writers, (i+1)*changes/writers, rows)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("write a backlog of %d transactions: %w", changes, err)
	}
	if _, err := w.sourceConn.Exec(ctx, "CALL bench.mark()"); err != nil {
		return fmt.Errorf("mark the end of the backlog: %w", err)
	}
	return nil
}

// caughtUp waits until a destination has the markers as the source has them.
func (w *world) caughtUp(ctx context.Context, dest *pgx.Conn) error {
	const sql = `SELECT sum(resource_version) FROM v1.resources WHERE name = ANY ($1)`
	var want int64
	if err := w.sourceConn.QueryRow(ctx, sql, markerNames()).Scan(&want); err != nil {
		return fmt.Errorf("read markers: %w", err)
	}
	return poll(ctx, longest, "catch up", func(ctx context.Context) (bool, error) {
		var have *int64
		err := dest.QueryRow(ctx, sql, markerNames()).Scan(&have)
		return have != nil && *have == want, err
	})
}

// longest is how long anything may take before the bench gives up.
const longest = 20 * time.Minute

var errDifferent = errors.New("the destination does not hold what the source holds")

// compare reads both tables with SQL that the product knows nothing of.
func (w *world) compare(ctx context.Context, dest *pgx.Conn) error {
	const sql = `SELECT count(*), coalesce(bit_xor(hashtextextended(concat_ws('|', name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions,
		state, create_time, update_time, meta, body), 0)), 0) FROM v1.resources`
	var sums [2][2]int64
	g, gctx := errgroup.WithContext(ctx)
	for i, c := range []*pgx.Conn{w.sourceConn, dest} {
		g.Go(func() error { return c.QueryRow(gctx, sql).Scan(&sums[i][0], &sums[i][1]) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("compare: %w", err)
	}
	if sums[0] == sums[1] {
		return nil
	}
	return errors.Join(fmt.Errorf("%w: source has %d rows (hash %d), destination %d (hash %d)", errDifferent, sums[0][0], sums[0][1], sums[1][0], sums[1][1]),
		w.explain(ctx, dest))
}

// explain says how many rows differ, and shows the first ones.
func (w *world) explain(ctx context.Context, dest *pgx.Conn) error {
	const sql = `SELECT name, concat_ws(' ', epoch, resource_version, generation, state, update_time, owning_region, regions, md5(concat(uuid, create_time, meta, body)))
		FROM v1.resources`
	var sides [2]map[string]string
	for i, c := range []*pgx.Conn{w.sourceConn, dest} {
		sides[i] = map[string]string{}
		rows, err := c.Query(ctx, sql)
		if err != nil {
			return err
		}
		var name, content string
		if _, err := pgx.ForEachRow(rows, []any{&name, &content}, func() error { sides[i][name] = content; return nil }); err != nil {
			return err
		}
	}
	var different []string
	for name, content := range sides[0] {
		if sides[1][name] != content {
			different = append(different, name)
		}
	}
	for name := range sides[1] {
		if _, ok := sides[0][name]; !ok {
			different = append(different, name)
		}
	}
	slices.Sort(different)
	err := fmt.Errorf("%d rows differ", len(different))
	for _, name := range different[:min(3, len(different))] {
		err = fmt.Errorf("%w; %s: source %q, destination %q", err, name, sides[0][name], sides[1][name])
	}
	return err
}
