package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/store"
)

// sampleEvery is the share of the writes that are watched for at the destination. Watching is a loop of single-row selects by key, which costs
// CPU: watching all writes would slow down what is measured.
const sampleEvery = 10

// latency measures the time from the return of a commit at the source to the first select at the destination that sees the row. Both
// contenders copy what the product's store in the source's process writes: one row in each transaction, at a steady rate.
func latency(ctx context.Context, opt options) (res result, err error) {
	w, err := newWorld(ctx, opt)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := seed(ctx, w.sourceConn, cmp.Or(opt.rows, 100_000)); err != nil {
		return res, err
	}
	ours, rival, closeAll, err := w.contenders(ctx)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, closeAll()) }()

	at, err := listen()
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, at.close()) }()
	ours.inProcess, ours.endpoint = true, at
	spec, err := w.spec(sourceRegion, w.source.DSN(w.sourceDB), at)
	if err != nil {
		return res, err
	}
	d, err := spec.open(ctx)
	if err != nil {
		return res, err
	}
	defer d.Close()
	server, err := d.Server(at.listeners[sourceRegion])
	if err != nil {
		return res, err
	}
	g, gctx := errgroup.WithContext(ctx)
	gctx, cancel := context.WithCancel(gctx)
	g.Go(func() error {
		if err := d.Run(gctx, server); gctx.Err() == nil {
			return fmt.Errorf("the source's Deployment has ended: %w", err)
		}
		return nil
	})
	defer func() {
		cancel()
		err = errors.Join(err, g.Wait())
	}()

	p50, p99 := map[contender][]float64{}, map[contender][]float64{}
	serial := 0
	for run := range opt.runs {
		for _, c := range order(run, ours, rival) {
			samples, used, err := w.latencyOf(gctx, c, d.Store(), &serial)
			if err != nil {
				return res, fmt.Errorf("%s: %w", c.name(), err)
			}
			a, b := milliseconds(quantile(samples, 0.5)), milliseconds(quantile(samples, 0.99))
			p50[c], p99[c] = append(p50[c], a), append(p99[c], b)
			fmt.Fprintf(opt.out, "run %d  %-6s  p50 %6.2f ms  p90 %6.2f ms  p99 %6.2f ms  max %6.1f ms  of %d  %s  %s\n", run+1, c.name(), a,
				milliseconds(quantile(samples, 0.9)), b, milliseconds(samples[len(samples)-1]), len(samples), used, load())
		}
	}
	fmt.Fprintf(opt.out, "medians of p99: ours %.2f ms, native %.2f ms\n", median(p99[ours]), median(p99[rival]))
	return smaller(median(p50[ours]), median(p50[rival]), "ms from commit to visible, p50"), nil
}

// latencyOf measures one contender. The samples are sorted; used says what CPU each write cost.
func (w *world) latencyOf(ctx context.Context, c contender, writer store.Writer, serial *int) (samples []time.Duration, used string, err error) {
	dest, err := w.dest.Connect(ctx, c.database())
	if err != nil {
		return nil, "", err
	}
	defer dest.Close(context.WithoutCancel(ctx))
	watchers, err := pgxpool.New(ctx, w.dest.DSN(c.database()))
	if err != nil {
		return nil, "", err
	}
	defer watchers.Close()
	if err := w.tidy(ctx); err != nil {
		return nil, "", err
	}
	if err := c.start(ctx, func() error { return nil }); err != nil {
		return nil, "", err
	}
	defer func() {
		err = errors.Join(err, c.stop(context.WithoutCancel(ctx)))
		if err == nil {
			err = w.compare(ctx, dest)
		}
	}()
	if err := c.copied(ctx, dest); err != nil {
		return nil, "", err
	}

	// The first second is not counted: connections are made and statements prepared.
	duration := cmp.Or(w.opt.duration, 20*time.Second)
	writes := int(duration.Seconds()*float64(w.opt.rate)) + w.opt.rate
	first := *serial
	*serial += writes
	var before usage
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	queue := make(chan int)
	for range 16 {
		g.Go(func() error {
			r := rand.New(rand.NewPCG(2, uint64(first)))
			for i := range queue {
				name := fmt.Sprintf("items/latency-%09d", first+i)
				if _, err := store.Apply(gctx, writer, store.Write{Op: store.Create, Name: name, Type: "Item", Body: body(r, i)}); err != nil {
					return err
				}
				committed := time.Now()
				if i < w.opt.rate || i%sampleEvery > 0 {
					continue
				}
				g.Go(func() error {
					seen, err := watch(gctx, watchers, name, committed)
					mu.Lock()
					defer mu.Unlock()
					samples = append(samples, seen.Sub(committed))
					return err
				})
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(queue)
		tick := time.NewTicker(time.Second / time.Duration(w.opt.rate))
		defer tick.Stop()
		for i := range writes {
			select {
			case <-tick.C:
			case <-gctx.Done():
				return gctx.Err()
			}
			if i == w.opt.rate {
				if before, err = w.usage(c); err != nil {
					return err
				}
			}
			select {
			case queue <- i:
			case <-gctx.Done():
				return gctx.Err()
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, "", err
	}
	after, err := w.usage(c)
	if err != nil {
		return nil, "", err
	}
	if _, err := w.sourceConn.Exec(ctx, "CALL bench.mark()"); err != nil {
		return nil, "", err
	}
	if err := w.caughtUp(ctx, dest); err != nil {
		return nil, "", err
	}
	slices.Sort(samples)
	return samples, after.minus(before).per(writes - w.opt.rate), nil
}

// watch returns when a row becomes visible. It asks again after a tenth of the time that has passed: a tight loop would take the CPU from those
// that are to make the row visible.
func watch(ctx context.Context, pool *pgxpool.Pool, name string, since time.Time) (time.Time, error) {
	c, err := pool.Acquire(ctx)
	if err != nil {
		return time.Time{}, err
	}
	defer c.Release()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		var there bool
		if err := c.QueryRow(ctx, "SELECT EXISTS (SELECT FROM v1.resources WHERE name = $1)", name).Scan(&there); err != nil {
			return time.Time{}, fmt.Errorf("watch for %s: %w", name, err)
		}
		now := time.Now()
		if there {
			return now, nil
		}
		select {
		case <-time.After(now.Sub(since) / 10):
		case <-ctx.Done():
			return time.Time{}, ctx.Err()
		}
	}
}
