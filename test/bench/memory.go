package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// settled is how long an idle process is left alone before it is measured.
const settled = 5 * time.Second

// footprint is resident memory in MiB of the process that copies (manager and API server of the destination) and of the one that serves
// (API server of the source).
type footprint struct{ copying, idle, catching, serving float64 }

// memory measures a Deployment's processes at two sizes: the peak during an initial copy, at rest, and the peak while a new process
// catches up with 100,000 changes. The result compares the last one: at the small size (rival) and at the large one (ours).
func memory(ctx context.Context, opt options) (res result, err error) {
	small := cmp.Or(opt.rows, 100_000)
	large := 20 * small
	changes := cmp.Or(opt.changes, small)
	peaks := map[int][]float64{}
	worlds := map[int]*world{}
	for _, rows := range []int{small, large} {
		w, err := newWorld(ctx, opt)
		if err != nil {
			return res, err
		}
		defer func() { err = errors.Join(err, w.close()) }()
		if err := seed(ctx, w.sourceConn, rows); err != nil {
			return res, err
		}
		if err := w.tidy(ctx); err != nil {
			return res, err
		}
		worlds[rows] = w
	}
	for run := range opt.runs {
		for _, rows := range []int{small, large} {
			f, err := worlds[rows].footprint(ctx, changes)
			if err != nil {
				return res, fmt.Errorf("%d resources: %w", rows, err)
			}
			fmt.Fprintf(opt.out, "run %d  %8d resources  copying %5.1f  idle %5.1f  catching up %5.1f  serving %5.1f MiB\n", run+1, rows, f.copying, f.idle, f.catching, f.serving)
			peaks[rows] = append(peaks[rows], f.catching)
		}
	}
	return smaller(median(peaks[large]), median(peaks[small]), fmt.Sprintf("MiB resident at most while catching up, %d resources against %d", large, small)), nil
}

func (w *world) footprint(ctx context.Context, changes int) (f footprint, err error) {
	c := &product{w: w}
	if err := c.reset(ctx); err != nil {
		return f, err
	}
	dest, err := w.dest.Connect(ctx, w.oursDB)
	if err != nil {
		return f, err
	}
	defer dest.Close(context.WithoutCancel(ctx))
	if f.copying, f.idle, f.serving, err = w.peak(ctx, c, dest, c.copied); err != nil {
		return f, err
	}
	if err := w.backlog(ctx, changes, changes); err != nil {
		return f, err
	}
	if err := w.tidy(ctx); err != nil {
		return f, err
	}
	var idle, serving float64
	if f.catching, idle, serving, err = w.peak(ctx, c, dest, w.caughtUp); err != nil {
		return f, err
	}
	f.idle, f.serving = max(f.idle, idle), max(f.serving, serving)
	return f, w.compare(ctx, dest)
}

// peak runs fresh processes to the end and leaves them alone for a while.
func (w *world) peak(ctx context.Context, c *product, dest *pgx.Conn, end func(context.Context, *pgx.Conn) error) (peak, idle, serving float64, err error) {
	defer func() { err = errors.Join(err, c.stop(ctx)) }()
	if err := c.start(ctx, func() error { return nil }); err != nil {
		return 0, 0, 0, err
	}
	if err := end(ctx, dest); err != nil {
		return 0, 0, 0, err
	}
	select {
	case <-time.After(min(settled, cmp.Or(w.opt.duration, settled))):
	case <-ctx.Done():
		return 0, 0, 0, ctx.Err()
	}
	idle, peak, err = resident(c.dest.pid())
	_, serving, err2 := resident(c.source.pid())
	return peak, idle, serving, errors.Join(err, err2)
}
