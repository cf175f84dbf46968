package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/syncing"
)

// restart measures the time from the start of a manager, with all copies in place, until it is live: it opens its database, meets its peer and goes on from durable
// cursors. The rival is the same with a tenth of the rows: the size must not matter.
func restart(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 2_000_000)
	large, err := restartWith(ctx, opt, rows)
	if err != nil {
		return res, err
	}
	small, err := restartWith(ctx, opt, max(1, rows/10))
	if err != nil {
		return res, err
	}
	return smaller(large, small, "seconds until live, against a tenth of the rows"), nil
}

func restartWith(ctx context.Context, opt options, rows int) (_ float64, err error) {
	w, err := newWorld(ctx, opt)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := seed(ctx, w.sourceConn, rows); err != nil {
		return 0, err
	}
	at, err := listen()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, at.close()) }()
	open := func(region, dsn string) (*deployment.Deployment, error) {
		spec, err := w.spec(region, dsn, at)
		if err != nil {
			return nil, err
		}
		return spec.open(ctx)
	}
	source, err := open(sourceRegion, w.source.DSN(w.sourceDB))
	if err != nil {
		return 0, err
	}
	server, err := source.Server(at.listeners[sourceRegion])
	if err != nil {
		return 0, err
	}
	serving, stop := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error { return source.Run(serving, server) })
	defer func() { stop(); err = errors.Join(err, g.Wait()); source.Close() }()

	start := func() (took time.Duration, err error) {
		began := time.Now()
		dest, err := open(destRegion, w.dest.DSN(w.oursDB))
		if err != nil {
			return 0, err
		}
		defer dest.Close()
		managing, stop := context.WithCancel(ctx)
		var g errgroup.Group
		g.Go(func() error { return dest.Run(managing, dest.Manage) })
		defer func() { stop(); err = errors.Join(err, g.Wait()) }()
		err = poll(ctx, time.Hour, "live", func(context.Context) (bool, error) {
			peers := dest.Peers()
			for _, p := range peers {
				if p.State != syncing.Live {
					return false, nil
				}
			}
			return len(peers) > 0, nil
		})
		return time.Since(began), err
	}
	if _, err := start(); err != nil {
		return 0, fmt.Errorf("initial copy: %w", err)
	}
	var seconds []float64
	for run := range max(3, opt.runs) {
		took, err := start()
		if err != nil {
			return 0, err
		}
		fmt.Fprintf(opt.out, "%d rows  run %d  live after %s  %s\n", rows, run+1, took.Round(time.Millisecond), load())
		seconds = append(seconds, took.Seconds())
	}
	return median(seconds), nil
}
