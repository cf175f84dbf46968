package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/syncing"
)

// plainChangeSQL is what the updater does to each resource, as one statement on a table with the same columns and indexes.
const plainChangeSQL = `
	UPDATE plain.resources SET regions = $1, left_regions = v1.left_after(regions, left_regions, $1, 'eu'), resource_version = resource_version + 1,
		change = pg_current_xact_id(), update_time = now()
	WHERE state <> 2 AND regions <> $1`

// policyChange measures how long a change of the service's policy takes to reach all resources at their owner, from the moment when it is
// declared to the last commit, without a limit of the rate: in pages whose progress is durable. The rival is one UPDATE of all rows.
func policyChange(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 200_000)
	w, err := newSavingWorld(ctx, opt, 8, "CREATE SCHEMA plain; CREATE TABLE plain.resources (LIKE v1.resources INCLUDING ALL)")
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.seedItems(ctx, rows); err != nil {
		return res, err
	}
	reg := registry.New()
	both := []string{sourceRegion, destRegion}
	slices.Sort(both)
	policies := [][]string{both, {sourceRegion}}
	declare := func(run int) error {
		deployments, spec := topology(map[string]string{})
		spec.Spec.MultiRegionPolicy.EnabledRegions = policies[run%2]
		if problems := reg.Apply(registry.Snapshot{Deployments: deployments, Services: []*v1alpha1.ServiceDescriptor{spec}}); len(problems) > 0 {
			return fmt.Errorf("declare the topology: %s", problems[0])
		}
		return nil
	}
	if err := declare(0); err != nil {
		return res, err
	}
	version := func() *descriptor.Version {
		s, _ := reg.View().Service(service)
		return s.Version("v1")
	}
	set := syncing.NewSyncingMetaSet(syncing.MetaSetConfig{Service: service, Region: sourceRegion, Version: version,
		Holders: w.core, Changes: w.core.Feed(), Logger: quiet})
	u, err := syncing.NewMetaUpdater(syncing.MetaUpdaterConfig{Ring: ring, Set: set, Store: w.core, Rate: -1, Settle: -1, Resync: -1, Logger: quiet})
	if err != nil {
		return res, err
	}
	if err := u.UpdateShardRange(ctx, feed.Range{From: 0, To: ring}); err != nil {
		return res, err
	}
	running, stop := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error { return u.Run(running) })
	defer func() { stop(); err = errors.Join(err, g.Wait()) }()
	carriedOut := func() error {
		says := func() bool {
			return set.Says("") != "" && slices.Equal(version().Service.Policy.EnabledRegions(), regionsSaid(set))
		}
		return poll(ctx, 10*time.Minute, "the policy is carried out", func(ctx context.Context) (bool, error) {
			walk, err := w.core.PolicyWalk(ctx, "")
			return err == nil && walk != nil && walk.Done && says() && walk.Says == set.Says(""), err
		})
	}
	if err := carriedOut(); err != nil {
		return res, err
	}
	var ours, plain []float64
	for run := range opt.runs {
		ways := []func() error{
			func() error {
				took, err := timed(func() error { return errors.Join(declare(run+1), carriedOut()) })
				ours = append(ours, float64(rows)/took.Seconds())
				fmt.Fprintf(opt.out, "run %d  ours   %8.0f rows/s  %s\n", run+1, ours[len(ours)-1], load())
				return err
			},
			func() error {
				took, err := timed(func() error {
					_, err := w.pool.Exec(ctx, plainChangeSQL, policies[(run+1)%2])
					return err
				})
				plain = append(plain, float64(rows)/took.Seconds())
				fmt.Fprintf(opt.out, "run %d  plain  %8.0f rows/s  %s\n", run+1, plain[len(plain)-1], load())
				return err
			},
		}
		for i := range ways {
			for _, tidy := range []string{"VACUUM ANALYZE v1.resources", "VACUUM ANALYZE plain.resources", "CHECKPOINT"} {
				if _, err := w.pool.Exec(ctx, tidy); err != nil {
					return res, err
				}
			}
			if err := ways[(i+run)%2](); err != nil {
				return res, err
			}
		}
		var left int
		if err := w.pool.QueryRow(ctx, "SELECT count(*) FROM v1.resources WHERE regions <> $1", policies[(run+1)%2]).Scan(&left); err != nil || left > 0 {
			return res, fmt.Errorf("%d resources are not as the policy says: %w", left, err)
		}
	}
	return faster(median(ours), median(plain), "rows/s, against one UPDATE"), nil
}

// regionsSaid is what the set knows of the service's policy.
func regionsSaid(set *syncing.SyncingMetaSet) []string {
	meta, _ := set.Meta("", "Item")
	return meta.Regions
}

// seedItems fills both tables with the same rows.
func (w *savingWorld) seedItems(ctx context.Context, rows int) error {
	conn, err := w.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	now := time.Now()
	columns := []string{"name", "type", "uuid", "epoch", "resource_version", "generation", "shard", "owning_region", "regions", "create_time", "update_time", "body"}
	for _, schema := range []string{"v1", "plain"} {
		r := newRand()
		_, err := conn.Conn().CopyFrom(ctx, pgx.Identifier{schema, "resources"}, columns, pgx.CopyFromSlice(rows, func(i int) ([]any, error) {
			name := itemName(i)
			return []any{name, "Item", uuid.New(), 1, 1, 1, descriptor.Shard(name, ring), sourceRegion, []string{sourceRegion, destRegion}, now, now, body(r, i)}, nil
		}))
		if err != nil {
			return fmt.Errorf("seed %s: %w", schema, err)
		}
	}
	return nil
}
