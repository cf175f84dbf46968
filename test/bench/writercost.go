package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

// plainSQL is the table without the change feed: the same columns and indexes, but neither the column change nor the index on it.
const plainSQL = `
	CREATE SCHEMA plain;
	CREATE TABLE plain.resources AS SELECT ` + row.Columns + `, left_regions FROM v1.resources;
	ALTER TABLE plain.resources ADD PRIMARY KEY (name);
	CREATE INDEX ON plain.resources (type);
	CREATE INDEX ON plain.resources (delete_time) WHERE state = 2`

const writerDB = "writer"

// writing is one way to change a row.
type writing struct {
	name  string
	write func(ctx context.Context, name string, b json.RawMessage) error
}

// writerCost measures updates of single rows by concurrent writers, with commits that wait for the disk and with commits that do not: a
// table without the change feed, the same with it, and the store as a whole. The result is about the first two where commits wait.
func writerCost(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 100_000)
	server, err := pgserver.Start(ctx, pgserver.Config{Version: opt.postgres, Durable: true, Settings: settings})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	if err := prepare(ctx, server, writerDB, sourceRegion); err != nil {
		return res, err
	}
	conn, err := server.Connect(ctx, writerDB)
	if err != nil {
		return res, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := seed(ctx, conn, rows); err != nil {
		return res, err
	}
	if _, err := conn.Exec(ctx, plainSQL); err != nil {
		return res, fmt.Errorf("make the plain table: %w", err)
	}
	pool, err := pgxpool.New(ctx, server.DSN(writerDB))
	if err != nil {
		return res, err
	}
	defer pool.Close()
	st, err := postgres.Open(ctx, postgres.Config{DSN: server.DSN(writerDB), Service: service, Region: sourceRegion, Version: "v1", Ring: ring, Logger: quiet})
	if err != nil {
		return res, err
	}
	defer func() { st.Close() }() // the last one: it is opened again

	const update = "UPDATE %s SET resource_version = resource_version + 1, generation = generation + 1, update_time = now(), body = $2%s WHERE name = $1"
	statement := func(table, more string) func(context.Context, string, json.RawMessage) error {
		sql := fmt.Sprintf(update, table, more)
		return func(ctx context.Context, name string, b json.RawMessage) error {
			_, err := pool.Exec(ctx, sql, name, b)
			return err
		}
	}
	ways := []writing{
		{"plain", statement("plain.resources", "")},
		{"change", statement("v1.resources", ", change = pg_current_xact_id()")},
		{"store", func(ctx context.Context, name string, b json.RawMessage) error {
			_, err := store.Apply(ctx, st, store.Write{Op: store.Save, Name: name, Type: "Item", Body: b, Regions: []string{sourceRegion, destRegion}})
			return err
		}},
	}
	type cell struct{ way, mode string }
	rates := map[cell][]float64{}
	for run := range opt.runs {
		for _, mode := range []string{"on", "off"} {
			// New connections start with it; it is the database's, so that all ways have the same.
			if _, err := conn.Exec(ctx, "ALTER DATABASE "+writerDB+" SET synchronous_commit = "+mode); err != nil {
				return res, err
			}
			for i := range ways {
				way := ways[(i+run)%len(ways)]
				if _, err := conn.Exec(ctx, "VACUUM plain.resources"); err != nil {
					return res, err
				}
				if _, err := conn.Exec(ctx, "VACUUM v1.resources"); err != nil {
					return res, err
				}
				if _, err := conn.Exec(ctx, "CHECKPOINT"); err != nil {
					return res, err
				}
				if way.name == "store" {
					st.Close()
					if st, err = postgres.Open(ctx, postgres.Config{DSN: server.DSN(writerDB), Service: service, Region: sourceRegion, Version: "v1", Ring: ring, Logger: quiet}); err != nil {
						return res, err
					}
				}
				pool.Reset()
				before, err := serverCPU(server)
				if err != nil {
					return res, err
				}
				n, took, err := writeFor(ctx, opt, way, rows, run)
				if err != nil {
					return res, fmt.Errorf("%s: %w", way.name, err)
				}
				after, err := serverCPU(server)
				if err != nil {
					return res, err
				}
				rate := float64(n) / took.Seconds()
				rates[cell{way.name, mode}] = append(rates[cell{way.name, mode}], rate)
				fmt.Fprintf(opt.out, "run %d  synchronous_commit %-3s  %-6s  %7.0f writes/s  server %5.1f us/write  %s\n", run+1, mode, way.name, rate,
					float64((after-before).Microseconds())/float64(max(1, n)), load())
			}
		}
	}
	for _, mode := range []string{"on", "off"} {
		plain := median(rates[cell{"plain", mode}])
		fmt.Fprintf(opt.out, "synchronous_commit %-3s: of %.0f writes/s, the change index leaves %.1f %%, the whole store %.1f %%\n", mode, plain,
			100*median(rates[cell{"change", mode}])/plain, 100*median(rates[cell{"store", mode}])/plain)
	}
	return faster(median(rates[cell{"change", "on"}]), median(rates[cell{"plain", "on"}]), "writes/s at synchronous_commit = on"), nil
}

// writeFor writes random rows for a while with all clients, and returns how many and how long it took.
func writeFor(ctx context.Context, opt options, way writing, rows, run int) (n int64, took time.Duration, err error) {
	var count atomic.Int64
	began := time.Now()
	end := began.Add(cmp.Or(opt.duration, 5*time.Second))
	g, ctx := errgroup.WithContext(ctx)
	for client := range opt.clients {
		g.Go(func() error {
			r := rand.New(rand.NewPCG(uint64(run), uint64(client)))
			bodies := make([]json.RawMessage, 64) // made before, so that the client costs little
			for i := range bodies {
				bodies[i] = body(r, i)
			}
			for i := 0; i == 0 || time.Now().Before(end); i++ { // at least one, on however slow a machine
				if err := way.write(ctx, itemName(r.IntN(rows)), bodies[i%len(bodies)]); err != nil {
					return err
				}
				count.Add(1)
			}
			return nil
		})
	}
	err = g.Wait()
	return count.Load(), time.Since(began), err
}
