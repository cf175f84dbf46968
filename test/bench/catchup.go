package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
)

// catchupDistinct changes every row once.
func catchupDistinct(ctx context.Context, opt options) (result, error) {
	changes := cmp.Or(opt.changes, opt.rows, 300_000)
	return catchup(ctx, opt, changes, cmp.Or(opt.rows, changes), cmp.Or(opt.rows, changes))
}

// catchupHot changes few rows of many again and again.
func catchupHot(ctx context.Context, opt options) (result, error) {
	changes := cmp.Or(opt.changes, opt.rows, 300_000)
	return catchup(ctx, opt, changes, cmp.Or(opt.rows, changes), min(opt.hot, changes))
}

// catchup measures how fast a destination that was away gets a backlog of single-row transactions on the first hot rows of the table. Both
// contenders work off the same backlog, one after the other.
func catchup(ctx context.Context, opt options, changes, rows, hot int) (res result, err error) {
	w, err := newWorld(ctx, opt)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := seed(ctx, w.sourceConn, rows); err != nil {
		return res, err
	}
	ours, rival, closeAll, err := w.contenders(ctx)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	for _, c := range []contender{ours, rival} {
		if _, _, err := w.measure(ctx, c, c.copied); err != nil {
			return res, fmt.Errorf("initial copy: %w", err)
		}
	}

	rates := map[contender][]float64{}
	for run := range opt.runs {
		if err := w.backlog(ctx, changes, hot); err != nil {
			return res, err
		}
		if err := w.tidy(ctx); err != nil {
			return res, err
		}
		for _, c := range order(run, ours, rival) {
			took, used, err := w.measure(ctx, c, w.caughtUp)
			if err != nil {
				return res, err
			}
			report(opt, run, c, changes, took, used)
			rates[c] = append(rates[c], float64(changes)/took.Seconds())
		}
	}
	return faster(median(rates[ours]), median(rates[rival]), "changes/s"), nil
}
