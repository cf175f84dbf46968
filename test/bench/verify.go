package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/syncing"
	"github.com/dbcontroller/db-controller/verify"
)

// verification measures a pass over all copies, and what writers at the owner lose while passes go on, at full speed and as gently as in the background. The rival is one
// statement that digests the whole table, on both sides at once: it can neither be resumed nor throttled, nor tell rows that are being written.
func verification(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 2_000_000)
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
	at, err := listen()
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, at.close()) }()
	p := &product{w: w, endpoint: at}
	if err := p.start(ctx, func() error { return nil }); err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, p.stop(ctx)) }()
	dest, err := w.dest.Connect(ctx, w.oursDB)
	if err != nil {
		return res, err
	}
	defer dest.Close(context.WithoutCancel(ctx))
	if err := p.copied(ctx, dest); err != nil {
		return res, err
	}
	if err := w.tidy(ctx); err != nil {
		return res, err
	}
	v, err := w.verifier(ctx, at)
	if err != nil {
		return res, err
	}
	defer v.close()

	var ours, rival []float64
	for run := range opt.runs {
		for _, way := range []string{"ours", "one statement"} {
			start := time.Now()
			if way == "ours" {
				if err := v.pass(ctx, 0, int64(rows)); err != nil {
					return res, err
				}
				ours = append(ours, time.Since(start).Seconds())
			} else {
				if err := w.compare(ctx, dest); err != nil {
					return res, err
				}
				rival = append(rival, time.Since(start).Seconds())
			}
			fmt.Fprintf(opt.out, "run %d  %-14s %6.2f s for %d rows  %s\n", run+1, way, time.Since(start).Seconds(), rows, load())
		}
	}
	if err := v.writers(ctx, opt, rows); err != nil {
		return res, err
	}
	return smaller(median(ours), median(rival), "s for all rows"), nil
}

// verifier is a process beside the two of the product.
type verifier struct {
	source       syncing.ContentSource
	owner, store *postgres.Store
	copies       *verify.Copies
}

func (w *world) verifier(ctx context.Context, at *sites) (*verifier, error) {
	pair, err := w.certificate(destRegion)
	if err != nil {
		return nil, err
	}
	identity, err := pki.Static(pair, w.ca.CertPEM())
	if err != nil {
		return nil, err
	}
	v := &verifier{source: syncing.NewContentSource(
		syncing.NewTransport(identity, pki.Identity{TrustDomain: trustDomain, Service: service, Region: sourceRegion}, nil), at.endpoints[sourceRegion],
		syncing.Peer{Service: service, ForRegion: destRegion, OfRegion: sourceRegion, Version: "v1", Ring: ring})}
	open := func(dsn, region string) (*postgres.Store, error) {
		return postgres.Open(ctx, postgres.Config{DSN: dsn, Service: service, Region: region, Version: "v1", Ring: ring, Logger: quiet})
	}
	if v.store, err = open(w.dest.DSN(w.oursDB), destRegion); err != nil {
		return nil, err
	}
	if v.owner, err = open(w.source.DSN(w.sourceDB), sourceRegion); err != nil {
		v.store.Close()
		return nil, err
	}
	v.copies = &verify.Copies{Store: v.store, Service: service, Region: destRegion, Peer: sourceRegion, Ring: ring, Fetch: v.source.Fetch}
	return v, nil
}

func (v *verifier) close() {
	v.source.Close()
	v.owner.Close()
	v.store.Close()
}

// pass verifies everything; rows is what must have been compared at least, 0 to pass over that.
func (v *verifier) pass(ctx context.Context, pause float64, rows int64) error {
	state, err := verify.Run(ctx, v.source, v.copies, verify.Options{Pause: pause}, verify.State{}, func(p verify.Progress) error {
		for _, d := range p.Found {
			return fmt.Errorf("%s differs: %s", d.Name, d.Kind)
		}
		return nil
	})
	if err == nil && state.Compared < rows {
		err = fmt.Errorf("%d rows of %d were compared", state.Compared, rows)
	}
	return err
}

// writers measures updates of single rows at the owner, alone and with passes going on.
func (v *verifier) writers(ctx context.Context, opt options, rows int) error {
	ways := []struct {
		name  string
		pause float64 // negative: no pass
	}{{"alone", -1}, {"at full speed", 0}, {"in the background", 9}}
	rates := map[string][]float64{}
	for run := range opt.runs {
		for i := range ways {
			way := ways[(i+run)%len(ways)]
			rate, err := v.writeRate(ctx, opt, rows, way.pause)
			if err != nil {
				return err
			}
			rates[way.name] = append(rates[way.name], rate)
		}
	}
	alone := median(rates["alone"])
	for _, way := range ways {
		m := median(rates[way.name])
		fmt.Fprintf(opt.out, "writers, verification %-18s %8.0f writes/s  ratio %.3f\n", way.name, m, m/alone)
	}
	return nil
}

func (v *verifier) writeRate(ctx context.Context, opt options, rows int, pause float64) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(opt.duration, 10*time.Second))
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	counts := make([]int, opt.clients)
	start := time.Now()
	for c := range counts {
		g.Go(func() error {
			r := rand.New(rand.NewPCG(uint64(c), uint64(start.UnixNano())))
			for gctx.Err() == nil {
				n := r.IntN(rows)
				_, err := store.Apply(gctx, v.owner, store.Write{Op: store.Save, Name: itemName(n), Type: "Item", Body: body(r, n), Regions: []string{sourceRegion, destRegion}})
				if err != nil {
					return err
				}
				counts[c]++
			}
			return gctx.Err()
		})
	}
	if pause >= 0 {
		g.Go(func() error {
			for gctx.Err() == nil {
				if err := v.pass(gctx, pause, 0); err != nil {
					return err
				}
			}
			return gctx.Err()
		})
	}
	err := g.Wait()
	took := time.Since(start)
	if ctx.Err() == nil { // it did not end by its time
		return 0, err
	}
	total := 0
	for _, n := range counts {
		total += n
	}
	return float64(total) / took.Seconds(), nil
}
