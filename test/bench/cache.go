package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/cache"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// cacheBatch is how many names a BatchGet of the bench asks for.
const cacheBatch = 100

// cached measures reads that the cache answers against the same reads from the database, and against GET and MGET of values of the same size by go-redis: what remains above
// those is the price of the layer. The ratio is that of Get to the plain GET; at most 1.
func cached(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 20_000)
	server, err := pgserver.Start(ctx, pgserver.Config{Version: opt.postgres, Settings: settings})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	if err := server.CreateDatabase(ctx, "cached"); err != nil {
		return res, err
	}
	core, err := postgres.Open(ctx, postgres.Config{DSN: server.DSN("cached"), Service: service, Region: sourceRegion, Version: "v1", Ring: ring, Logger: quiet})
	if err != nil {
		return res, err
	}
	defer core.Close()
	conn, err := server.Connect(ctx, "cached")
	if err != nil {
		return res, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := seed(ctx, conn, rows); err != nil {
		return res, err
	}

	rs, err := redisserver.Start(ctx, nil)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, rs.Stop()) }()
	ro, err := redis.ParseURL(rs.URL())
	if err != nil {
		return res, err
	}
	rdb := redis.NewClient(ro)
	defer rdb.Close()
	layer, err := cache.Layer(core, cache.Config{URL: rs.URL(), Identity: "bench", Timeout: time.Second, Logger: quiet})
	if err != nil {
		return res, err
	}
	g, gctx := errgroup.WithContext(ctx)
	gctx, cancel := context.WithCancel(gctx)
	g.Go(func() error { return core.Run(gctx) })
	g.Go(func() error { return layer.Run(gctx, core.Feed()) })
	defer func() {
		cancel()
		err = errors.Join(err, g.Wait())
	}()
	if err := poll(ctx, time.Minute, "the cache to be live", func(context.Context) (bool, error) { return layer.Live(), nil }); err != nil {
		return res, err
	}

	names := make([]string, rows)
	for i := range names {
		names[i] = itemName(i)
	}
	if err := fillRival(ctx, rdb, layer, names); err != nil {
		return res, err
	}
	kinds := []struct {
		name string
		each int // resources of one call
		call func(ctx context.Context, first int) error
	}{
		{"cached Get", 1, func(ctx context.Context, i int) error { _, err := layer.Get(ctx, names[i]); return err }},
		{"uncached Get", 1, func(ctx context.Context, i int) error { _, err := core.Get(ctx, names[i]); return err }},
		{"plain GET", 1, func(ctx context.Context, i int) error { return rdb.Get(ctx, "plain:"+names[i]).Err() }},
		{"cached BatchGet", cacheBatch, func(ctx context.Context, i int) error {
			_, err := layer.BatchGet(ctx, names[i:i+cacheBatch])
			return err
		}},
		{"uncached BatchGet", cacheBatch, func(ctx context.Context, i int) error {
			_, err := core.BatchGet(ctx, names[i:i+cacheBatch])
			return err
		}},
		{"plain MGET", cacheBatch, func(ctx context.Context, i int) error {
			keys := make([]string, cacheBatch)
			for j := range keys {
				keys[j] = "plain:" + names[i+j]
			}
			return rdb.MGet(ctx, keys...).Err()
		}},
	}
	rates := make([][]float64, len(kinds))
	for run := range opt.runs {
		for k := range kinds {
			k := (k + run) % len(kinds)
			rate, err := readRate(ctx, opt, rows, kinds[k].each, kinds[k].call)
			if err != nil {
				return res, fmt.Errorf("%s: %w", kinds[k].name, err)
			}
			rates[k] = append(rates[k], rate)
			fmt.Fprintf(opt.out, "run %d  %-17s  %9.0f resources/s  %s\n", run+1, kinds[k].name, rate, load())
		}
	}
	m := make([]float64, len(kinds))
	for k := range kinds {
		m[k] = median(rates[k])
	}
	fmt.Fprintf(opt.out, "Get: cached %.2f times uncached, %.2f times plain GET. BatchGet of %d: cached %.2f times uncached, %.2f times plain MGET\n",
		m[0]/m[1], m[0]/m[2], cacheBatch, m[3]/m[4], m[3]/m[5])
	return result{Ratio: m[0] / m[2], Ours: m[0], Rival: m[2], Unit: "resources/s, cached Get against plain GET"}, nil
}

// fillRival warms the cache, and stores beside each of its entries a copy under a key of the rival's, so that both move the same bytes.
func fillRival(ctx context.Context, rdb *redis.Client, s store.Reader, names []string) error {
	for i := 0; i < len(names); i += cacheBatch {
		if _, err := s.BatchGet(ctx, names[i:min(i+cacheBatch, len(names))]); err != nil {
			return err
		}
	}
	copied := 0
	keys := rdb.Scan(ctx, 0, "dbc1:*:r:*", 1000).Iterator()
	for keys.Next(ctx) {
		key := keys.Val()
		name := key[len(key)-len(names[0]):]
		if err := rdb.Copy(ctx, key, "plain:"+name, 0, true).Err(); err != nil {
			return err
		}
		copied++
	}
	if err := keys.Err(); err != nil {
		return err
	}
	if copied < len(names) {
		return fmt.Errorf("only %d of %d resources are in the cache", copied, len(names))
	}
	return nil
}

// readRate returns how many resources a second the clients read.
func readRate(ctx context.Context, opt options, rows, each int, call func(ctx context.Context, first int) error) (float64, error) {
	limit, cancel := context.WithTimeout(ctx, cmp.Or(opt.duration, 3*time.Second))
	defer cancel()
	var done atomic.Int64
	begin := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	for c := range opt.clients {
		g.Go(func() error {
			for i := c * 7919; limit.Err() == nil; i += 104729 {
				if err := call(gctx, i%(rows-each)); err != nil {
					return err
				}
				done.Add(int64(each))
			}
			return nil
		})
	}
	err := g.Wait()
	return float64(done.Load()) / time.Since(begin).Seconds(), err
}
