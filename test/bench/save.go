package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// targetRows are what the saves of a bench refer to.
const targetRows = 10_000

// foreignKeySQL is how an application keeps the same resources without the product: a table with the metadata that every resource has, and one with as
// many columns for references, each a foreign key with the index that its deletion needs.
const foreignKeySQL = `
	CREATE SCHEMA native;
	CREATE TABLE native.targets (name text COLLATE "C" PRIMARY KEY);
	INSERT INTO native.targets SELECT 'targets/t' || i FROM generate_series(0, %[1]d - 1) AS i;
	CREATE TABLE native.plain (
		name text COLLATE "C" PRIMARY KEY, uuid uuid NOT NULL, resource_version bigint NOT NULL, generation bigint NOT NULL,
		create_time timestamptz NOT NULL, update_time timestamptz NOT NULL, meta jsonb NOT NULL, body jsonb NOT NULL
	);
	CREATE TABLE native.one (LIKE native.plain INCLUDING ALL, a text COLLATE "C" NOT NULL REFERENCES native.targets);
	CREATE INDEX ON native.one (a);
	CREATE TABLE native.three (LIKE native.plain INCLUDING ALL, a text COLLATE "C" NOT NULL REFERENCES native.targets,
		b text COLLATE "C" NOT NULL REFERENCES native.targets, c text COLLATE "C" NOT NULL REFERENCES native.targets);
	CREATE INDEX ON native.three (a);
	CREATE INDEX ON native.three (b);
	CREATE INDEX ON native.three (c)`

// referenceTopology is one Deployment of a service whose nodes refer to targets, and whose leaves go with the node above them.
func referenceTopology() (*registry.Registry, *descriptor.Version, error) {
	refs := func(on v1alpha1.DeleteBehavior, fields ...string) (all []v1alpha1.ReferenceField) {
		for _, f := range fields {
			all = append(all, v1alpha1.ReferenceField{Field: f, Target: "Target", OnTargetDeleted: on})
		}
		return all
	}
	policy := &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{sourceRegion}, DefaultControlRegion: sourceRegion}
	d := &v1alpha1.Deployment{Spec: v1alpha1.DeploymentSpec{Service: service, Region: sourceRegion, Version: "v1", Endpoint: "http://127.0.0.1:1", Shards: ring}}
	s := &v1alpha1.ServiceDescriptor{Spec: v1alpha1.ServiceDescriptorSpec{Service: service, MultiRegionPolicy: policy, Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
		{Type: "Target", Plural: "targets", Patterns: []string{"targets/{target}"}},
		{Type: "Plain", Plural: "plains", Patterns: []string{"plains/{plain}"}},
		{Type: "One", Plural: "ones", Patterns: []string{"ones/{one}"}, References: refs(v1alpha1.DeleteBlock, "a")},
		{Type: "Three", Plural: "threes", Patterns: []string{"threes/{three}"}, References: refs(v1alpha1.DeleteBlock, "a", "b", "c")},
		{Type: "Leaf", Plural: "leaves", Patterns: []string{"targets/{target}/leaves/{leaf}"}, Parent: "Target", OnParentDeleted: v1alpha1.DeleteCascade},
		{Type: "Late", Plural: "lates", Patterns: []string{"targets/{target}/lates/{late}"}, Parent: "Target", OnParentDeleted: v1alpha1.DeleteAsyncCascade},
	}}}}}
	reg := registry.New()
	if problems := reg.Apply(registry.Snapshot{Deployments: []*v1alpha1.Deployment{d}, Services: []*v1alpha1.ServiceDescriptor{s}}); len(problems) > 0 {
		return nil, nil, fmt.Errorf("the topology is refused: %v", problems)
	}
	compiled, _ := reg.View().Service(service)
	return reg, compiled.Version("v1"), nil
}

// savingWorld is one database with both: the product's schema and that of an application.
type savingWorld struct {
	server *pgserver.Server
	core   *postgres.Store
	stack  store.Store
	pool   *pgxpool.Pool
}

func newSavingWorld(ctx context.Context, opt options, conns int, sql string) (_ *savingWorld, err error) {
	w := new(savingWorld)
	if w.server, err = pgserver.Start(ctx, pgserver.Config{Version: opt.postgres, Durable: true, Settings: settings}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	const db = "saving"
	if err = w.server.CreateDatabase(ctx, db); err != nil {
		return nil, err
	}
	w.core, err = postgres.Open(ctx, postgres.Config{DSN: w.server.DSN(db), Service: service, Region: sourceRegion, Version: "v1", Ring: ring, MaxConns: conns, Logger: quiet})
	if err != nil {
		return nil, err
	}
	reg, schema, err := referenceTopology()
	if err != nil {
		return nil, err
	}
	w.stack = constraint.Layer(w.core, constraint.LayerConfig{
		Self: store.Location{Service: service, Region: sourceRegion}, Core: w.core, Logger: quiet, ClosureLimit: store.MaxClosure,
		Version: func() *descriptor.Version { return schema }, View: reg.View,
		Owner: func(context.Context, descriptor.Name, []store.Write) (string, error) { return sourceRegion, nil },
		Peers: nobody{},
	})
	pc, err := pgxpool.ParseConfig(w.server.DSN(db))
	if err != nil {
		return nil, err
	}
	pc.MaxConns = int32(conns)
	if w.pool, err = pgxpool.NewWithConfig(ctx, pc); err != nil {
		return nil, err
	}
	_, err = w.pool.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol)
	return w, err
}

func (w *savingWorld) close() error {
	if w.pool != nil {
		w.pool.Close()
	}
	if w.core != nil {
		w.core.Close()
	}
	return w.server.Stop()
}

// nobody is a topology of one Deployment.
type nobody struct{ constraint.LayerPeers }

func (nobody) Importers() []store.Location { return nil }

// saver is one way to create a resource.
type saver struct {
	name string
	save func(ctx context.Context, n int64, body []byte) error
}

func target(n int64) string { return fmt.Sprintf("targets/t%d", n%targetRows) }

// savers are ours, which refers to so many targets, and the rivals, who come after it.
func (w *savingWorld) savers(references int) []saver {
	typ, collection := map[int]string{0: "Plain", 1: "One", 3: "Three"}[references], map[int]string{0: "plains", 1: "ones", 3: "threes"}[references]
	ours := saver{fmt.Sprintf("ours, %d references", references), func(ctx context.Context, n int64, body []byte) error {
		for i := range references {
			body = append(fmt.Appendf(nil, `{"%c":%q,`, 'a'+i, target(n*7+int64(i)*3331)), body[1:]...)
		}
		_, err := store.Apply(ctx, w.stack, store.Write{Op: store.Create, Name: fmt.Sprintf("%s/x%012d", collection, n), Type: typ, Body: body, OwningRegion: sourceRegion})
		return err
	}}
	const columns, values = "name, uuid, resource_version, generation, create_time, update_time, meta, body", "$1, gen_random_uuid(), 1, 1, now(), now(), '{}', $2"
	native := func(label, sql string, keys int) saver {
		return saver{label, func(ctx context.Context, n int64, body []byte) error {
			args := []any{fmt.Sprintf("%s/x%012d", collection, n), body}
			for i := range keys {
				args = append(args, target(n*7+int64(i)*3331))
			}
			_, err := w.pool.Exec(ctx, sql, args...)
			return err
		}}
	}
	plain := native("plain insert", "INSERT INTO native.plain ("+columns+") VALUES ("+values+")", 0)
	one := native("insert with a foreign key", "INSERT INTO native.one ("+columns+", a) VALUES ("+values+", $3)", 1)
	if references == 3 {
		return []saver{ours, native("insert with three foreign keys", "INSERT INTO native.three ("+columns+", a, b, c) VALUES ("+values+", $3, $4, $5)", 3)}
	}
	return []saver{ours, plain, one}
}

func save(ctx context.Context, opt options) (result, error)           { return saving(ctx, opt, 0) }
func saveReferences(ctx context.Context, opt options) (result, error) { return saving(ctx, opt, 3) }

// saving measures creations by 1, 8 and 32 connections with commits that wait for the disk. The result is about 8 connections, against foreign keys.
func saving(ctx context.Context, opt options, references int) (res result, err error) {
	w, err := newSavingWorld(ctx, opt, 32, fmt.Sprintf(foreignKeySQL, targetRows))
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	for first := 0; first < targetRows; first += store.MaxBatch {
		var writes []store.Write
		for i := range store.MaxBatch {
			writes = append(writes, store.Write{Op: store.Create, Name: target(int64(first + i)), Type: "Target", OwningRegion: sourceRegion})
		}
		if _, err := w.stack.BatchWrite(ctx, writes); err != nil {
			return res, err
		}
	}
	if _, err := w.pool.Exec(ctx, "VACUUM ANALYZE"); err != nil {
		return res, err
	}
	ways := w.savers(references)
	rates := map[string]map[int][]float64{}
	var serial atomic.Int64
	payload := body(newRand(), 1)
	levels := []int{1, 8, 32}
	for run := range opt.runs {
		for _, clients := range levels {
			for i := range ways {
				way := ways[(i+run)%len(ways)]
				if _, err := w.pool.Exec(ctx, "CHECKPOINT"); err != nil {
					return res, err
				}
				before, err := serverCPU(w.server)
				if err != nil {
					return res, err
				}
				n, took, err := saveFor(ctx, cmp.Or(opt.duration, 4*time.Second), clients, way, &serial, payload)
				if err != nil {
					return res, fmt.Errorf("%s: %w", way.name, err)
				}
				after, err := serverCPU(w.server)
				if err != nil {
					return res, err
				}
				if rates[way.name] == nil {
					rates[way.name] = map[int][]float64{}
				}
				rate := float64(n) / took.Seconds()
				rates[way.name][clients] = append(rates[way.name][clients], rate)
				fmt.Fprintf(opt.out, "run %d  %2d connections  %-31s %7.0f/s  server %5.1f us each  %s\n", run+1, clients, way.name, rate, float64((after-before).Microseconds())/float64(n), load())
			}
		}
	}
	for _, clients := range levels {
		for _, rival := range ways[1:] {
			fmt.Fprintf(opt.out, "%2d connections: %.2f of %s\n", clients, median(rates[ways[0].name][clients])/median(rates[rival.name][clients]), rival.name)
		}
	}
	rival := ways[len(ways)-1].name
	return faster(median(rates[ways[0].name][8]), median(rates[rival][8]), "creations/s at 8 connections, against "+rival), nil
}

// saveFor creates with all clients for a while.
func saveFor(ctx context.Context, length time.Duration, clients int, way saver, serial *atomic.Int64, payload []byte) (n int64, took time.Duration, err error) {
	var count atomic.Int64
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for range clients {
		g.Go(func() error {
			for i := 0; i == 0 || time.Since(began) < length; i++ {
				if err := way.save(ctx, serial.Add(1), payload); err != nil {
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
