package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

// initialCopy measures how fast an empty destination gets all rows.
func initialCopy(ctx context.Context, opt options) (res result, err error) {
	rows := cmp.Or(opt.rows, 1_000_000)
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

	rates := map[contender][]float64{}
	for run := range opt.runs {
		for _, c := range order(run, ours, rival) {
			if err := c.reset(ctx); err != nil {
				return res, err
			}
			if err := w.tidy(ctx); err != nil {
				return res, err
			}
			took, used, err := w.measure(ctx, c, c.copied)
			if err != nil {
				return res, err
			}
			report(opt, run, c, rows, took, used)
			rates[c] = append(rates[c], float64(rows)/took.Seconds())
		}
	}
	return faster(median(rates[ours]), median(rates[rival]), "rows/s"), nil
}

func report(opt options, run int, c contender, rows int, took time.Duration, used usage) {
	fmt.Fprintf(opt.out, "run %d  %-6s  %8.2f s  %8.0f rows/s  %s  %s\n", run+1, c.name(), took.Seconds(), float64(rows)/took.Seconds(), used.per(rows), load())
}

// faster compares rates.
func faster(ours, rival float64, unit string) result {
	return result{Ratio: ours / rival, Ours: ours, Rival: rival, Unit: unit}
}

// smaller compares costs.
func smaller(ours, rival float64, unit string) result {
	return result{Ratio: rival / ours, Ours: ours, Rival: rival, Unit: unit}
}
