package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// contender copies the source's rows to a database of its own in the destination cluster.
type contender interface {
	name() string
	// database of the destination.
	database() string
	// reset empties the destination and forgets everything, so that the next start copies all.
	reset(ctx context.Context) error
	// start begins, or continues, to copy. What it prepares before the clock may run (processes, connections) is done when ready is called.
	start(ctx context.Context, ready func() error) error
	// copied waits for the end of an initial copy.
	copied(ctx context.Context, dest *pgx.Conn) error
	// cpu of our own processes at the source and at the destination.
	cpu() (source, dest time.Duration)
	// stop stops copying so that start can continue later.
	stop(ctx context.Context) error
}

// contenders returns ours and the rival, and what ends them.
func (w *world) contenders(ctx context.Context) (ours *product, rival *native, closeAll func() error, err error) {
	ours = &product{w: w}
	if rival, err = newNative(ctx, w); err != nil {
		return nil, nil, nil, err
	}
	return ours, rival, func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		return errors.Join(ours.stop(ctx), rival.close(ctx))
	}, nil
}

// order of the contenders in a run: it alternates, so that neither always has the warmer cache.
func order(run int, ours, rival contender) []contender {
	if run%2 == 0 {
		return []contender{ours, rival}
	}
	return []contender{rival, ours}
}

// usage so far.
func (w *world) usage(c contender) (usage, error) {
	src, err1 := serverCPU(w.source)
	dst, err2 := serverCPU(w.dest)
	u := usage{sourceServer: src, destServer: dst}
	u.sourceNode, u.destNode = c.cpu()
	return u, errors.Join(err1, err2)
}

// measure starts c, waits for the end, stops c, and returns how long it took and what it used.
func (w *world) measure(ctx context.Context, c contender, end func(context.Context, *pgx.Conn) error) (took time.Duration, used usage, err error) {
	dest, err := w.dest.Connect(ctx, c.database())
	if err != nil {
		return 0, usage{}, err
	}
	defer dest.Close(context.WithoutCancel(ctx))
	var began time.Time
	var before usage
	err = c.start(ctx, func() (err error) {
		before, err = w.usage(c)
		began = time.Now()
		return err
	})
	if err == nil {
		err = end(ctx, dest)
	}
	if err == nil {
		took = time.Since(began)
		used, err = w.usage(c)
		used = used.minus(before)
	}
	if err = errors.Join(err, c.stop(ctx)); err != nil {
		return 0, usage{}, fmt.Errorf("%s: %w", c.name(), err)
	}
	if err := w.compare(ctx, dest); err != nil {
		return 0, usage{}, fmt.Errorf("%s: %w", c.name(), err)
	}
	return took, used, nil
}
