package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// cascadeAsync measures the deletion of a resource whose children follow afterwards, a page at a time: what it takes of the heap must not depend on how many
// they are. The rival is the same with a tenth of the children.
func cascadeAsync(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 1_000_000)
	server, err := pgserver.Start(ctx, pgserver.Config{Version: opt.postgres, Settings: settings})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	if err := server.CreateDatabase(ctx, "lates"); err != nil {
		return res, err
	}
	reg, _, err := referenceTopology()
	if err != nil {
		return res, err
	}
	d, err := deployment.Open(ctx, deployment.Config{Key: registry.Key{Service: service, Region: sourceRegion}, Registry: reg, DSN: server.DSN("lates"), AuditInterval: -1, Logger: quiet})
	if err != nil {
		return res, err
	}
	defer d.Close()
	running, stop := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error { return d.Run(running, d.Manage) })
	defer func() { stop(); err = errors.Join(err, g.Wait()) }()
	conn, err := pgx.Connect(ctx, server.DSN("lates"))
	if err != nil {
		return res, err
	}
	defer conn.Close(ctx)

	var few, many []float64
	for run := range opt.runs {
		for _, n := range []int{rows / 10, rows} {
			took, grown, err := deleteLates(ctx, d, conn, fmt.Sprintf("targets/p%d-%d", run, n), n)
			if err != nil {
				return res, err
			}
			fmt.Fprintf(opt.out, "run %d  %9d children  %8.0f rows/s  heap grew by %5.1f MiB  %s\n", run+1, n, float64(n)/took.Seconds(), grown, load())
			if n == rows {
				many = append(many, grown)
			} else {
				few = append(few, grown)
			}
		}
	}
	return smaller(median(many), median(few), "MiB of heap while the children follow, against a tenth of them"), nil
}

// deleteLates makes a parent with children, deletes it, and waits until nothing is left. grown is what the heap took at most, in MiB, garbage included.
func deleteLates(ctx context.Context, d *deployment.Deployment, conn *pgx.Conn, parent string, n int) (took time.Duration, grown float64, err error) {
	if _, err := store.Apply(ctx, d.Store(), store.Write{Op: store.Create, Name: parent, Type: "Target"}); err != nil {
		return 0, 0, err
	}
	now, payload := time.Now(), body(newRand(), 1)
	child := func(i int) string { return fmt.Sprintf("%s/lates/l%07d", parent, i) }
	_, err = conn.CopyFrom(ctx, pgx.Identifier{"v1", "resources"},
		[]string{"name", "type", "uuid", "epoch", "resource_version", "generation", "shard", "owning_region", "regions", "create_time", "update_time", "body", "shadow"},
		pgx.CopyFromSlice(n, func(i int) ([]any, error) {
			return []any{child(i), "Late", uuid.New(), 1, 1, 1, descriptor.Shard(child(i), ring), sourceRegion, []string{sourceRegion}, now, now, payload, 1}, nil
		}))
	if err != nil {
		return 0, 0, err
	}
	_, err = conn.CopyFrom(ctx, pgx.Identifier{"v1", "refs"}, []string{"referrer", "field", "target", "location", "kind", "behavior"},
		pgx.CopyFromSlice(n, func(i int) ([]any, error) {
			return []any{child(i), "name", parent, "", int(store.ParentReference), int(store.AsyncCascade)}, nil
		}))
	if err != nil {
		return 0, 0, err
	}
	if _, err := conn.Exec(ctx, "VACUUM ANALYZE"); err != nil {
		return 0, 0, err
	}
	runtime.GC()
	before := heapMiB()
	began := time.Now()
	if _, err := store.Apply(ctx, d.Store(), store.Write{Op: store.Delete, Name: parent, Type: "Target"}); err != nil {
		return 0, 0, err
	}
	for {
		grown = max(grown, heapMiB()-before)
		var left bool
		if err := conn.QueryRow(ctx, "SELECT shadow <> 0 FROM v1.resources WHERE name = $1", parent).Scan(&left); err != nil {
			return 0, 0, err
		}
		if !left {
			break
		}
		select {
		case <-ctx.Done():
			return 0, 0, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	took = time.Since(began)
	var alive int
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM v1.resources WHERE state <> 2").Scan(&alive); err != nil || alive > 0 {
		return 0, 0, fmt.Errorf("%d resources are left: %w", alive, err)
	}
	return took, grown, nil
}

func heapMiB() float64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}
