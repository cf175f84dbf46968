package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/dbcontroller/db-controller/test/e2e/cluster"
)

// reshard runs two regions on a real control plane, scales the managers of one under load, kills its leader together with an owner, and pauses another for longer than its
// Lease. Ours is the longest time for which not every shard had a live owner after a death; the rival is what is promised, one and a half lease times.
func reshard(ctx context.Context, opt options) (res result, err error) {
	const (
		lease = 15 * time.Second
		rows  = 5000
	)
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	say := func(format string, args ...any) { fmt.Fprintf(opt.out, format+"\n", args...) }
	c, err := cluster.Start(ctx, cluster.Options{Lease: lease, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second, Managers: 1, Log: say})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for _, name := range []string{"eu", "us"} {
		if _, err := c.Install(ctx, name); err != nil {
			return res, err
		}
	}
	if err := c.Declare(ctx, "eu", "us"); err != nil {
		return res, err
	}
	us := c.Region("us")
	for _, name := range c.Regions() {
		if _, err := cluster.Until(ctx, 5*time.Minute, name+" is ready", func() (bool, string) { return c.Region(name).Ready(ctx) }); err != nil {
			return res, err
		}
		if err := c.Region(name).Audit(ctx); err != nil {
			return res, err
		}
	}
	if err := errors.Join(c.SetPolicy(ctx, "eu", "eu", "us"), c.Fill(ctx, "eu", 0, rows)); err != nil {
		return res, err
	}
	writers := c.Load(ctx, cmp.Or(opt.changes, 100), rows, "us", "eu", "us")
	defer func() { err = errors.Join(err, writers.Stop()) }()

	figures := map[string]any{"seed": seed, "lease_seconds": lease.Seconds()}
	paused := ""
	alive := func(holder string) bool {
		for _, p := range us.Managers() {
			if p.Pod != paused && strings.HasPrefix(holder, p.Pod+"_") {
				return true
			}
		}
		return false
	}
	var owners []string
	covered := func(n int, what string) (time.Duration, error) {
		return cluster.Until(ctx, 5*time.Minute, what, func() (bool, string) {
			var err error
			if owners, err = us.Owners(ctx, "syncing"); err != nil {
				return false, err.Error()
			}
			sizes := cluster.Sizes(owners)
			return cluster.Covered(owners, alive) && len(sizes) == n, fmt.Sprint(sizes)
		})
	}
	measure := func(what string, n int, do func() error) (time.Duration, error) {
		before := owners
		writers.Reset()
		if err := do(); err != nil {
			return 0, err
		}
		took, err := covered(n, what)
		if err != nil {
			return 0, err
		}
		select { // the tail of what it does to the writers
		case <-time.After(10 * time.Second):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		f := writers.Reset()
		moved := 1.0
		if before != nil {
			moved = cluster.Moved(before, owners)
		}
		say("%-28s covered after %6.2f s  moved %.2f  %4d writes, %d failed  visible p50 %4.0f ms p99 %5.0f ms max %5.0f ms  %s", what, took.Seconds(), moved,
			f.Writes, f.Failed, milliseconds(f.P50), milliseconds(f.P99), milliseconds(f.Max), load())
		figures[what] = map[string]any{"covered_seconds": took.Seconds(), "moved": moved, "writes": f.Writes, "failed": f.Failed, "p50_ms": milliseconds(f.P50), "p99_ms": milliseconds(f.P99), "max_ms": milliseconds(f.Max)}
		return took, nil
	}
	scale := func(n int32) func() error { return func() error { return us.Scale(ctx, n) } }
	if _, err := measure("steady", 1, func() error { return nil }); err != nil {
		return res, err
	}
	for _, step := range []struct {
		what string
		n    int32
	}{{"scale 1 to 3", 3}, {"scale 3 to 7", 7}, {"scale 7 to 2", 2}, {"scale 2 to 3", 3}} {
		if _, err := measure(step.what, int(step.n), scale(step.n)); err != nil {
			return res, err
		}
	}
	var worst time.Duration
	deaths := 0
	for range opt.runs {
		took, err := measure("leader and owner killed", 1, func() error {
			managers := us.Managers()
			return errors.Join(managers[0].Kill(), managers[1].Kill())
		})
		if err != nil {
			return res, err
		}
		worst = max(worst, took)
		deaths += 2
		if _, err := measure("and back", 3, func() error { return us.Sync(ctx) }); err != nil {
			return res, err
		}
		victim := cluster.Pick(random, us.Managers())
		took, err = measure("one paused", 2, func() error { paused = victim.Pod; return victim.Pause() })
		if err != nil {
			return res, err
		}
		worst = max(worst, took)
		deaths++
		if _, err := measure("and awake", 3, func() error { paused = ""; return victim.Resume() }); err != nil {
			return res, err
		}
	}
	a, err := us.Audited(ctx)
	if err != nil {
		return res, err
	}
	if a.Regressed+a.Outside+a.Unknown > 0 {
		return res, fmt.Errorf("stale owners have written: %+v", a)
	}
	figures["killed_or_paused"], figures["audited_writes"], figures["claims"] = deaths, a.Writes, a.Claims
	promised := (lease + lease/2).Seconds()
	return result{Bench: "reshard", Ratio: promised / worst.Seconds(), Ours: worst.Seconds(), Rival: promised,
		Unit: "seconds without an owner of every shard after a death, against one and a half lease times", Runs: opt.runs, Figures: figures}, nil
}
