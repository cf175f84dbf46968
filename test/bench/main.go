package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options of a run. Zero sizes mean what the bench itself thinks right.
type options struct {
	runs     int
	rows     int
	changes  int
	hot      int
	rate     int
	duration time.Duration
	clients  int

	postgres         string
	maxShardsPerNode int
	binary           bool
	profiles         string

	out      io.Writer
	clusters *clusters
}

// bench is one measurement.
type bench struct {
	name, about string
	run         func(context.Context, options) (result, error)
}

var benches = []bench{
	{"initial-copy", "rows/s of an initial copy (1,000,000 rows)", initialCopy},
	{"catchup-distinct", "changes/s of catching up with single-row transactions on distinct rows (300,000)", catchupDistinct},
	{"catchup-hot", "changes/s of catching up with single-row transactions on few rows (300,000 on 5,000)", catchupHot},
	{"latency", "commit to visible at a steady rate (500/s)", latency},
	{"writer-cost", "writes/s with the change index against without", writerCost},
	{"save", "creations/s without references, against inserts without and with a foreign key, at 1, 8 and 32 connections", save},
	{"save-references", "creations/s with three local references, against three foreign keys", saveReferences},
	{"cascade", "rows/s of deleting a resource with its children (100,000), against ON DELETE CASCADE", cascade},
	{"cascade-async", "heap while the children (1,000,000) of a deleted resource follow it, against a tenth of them", cascadeAsync},
	{"save-remote", "creation that refers to a region 80 ms away, against one round trip by hand", saveRemote},
	{"feed-read", "CPU for reading a changed row (300,000), against logical decoding", feedRead},
	{"search", "rows/s of filling an empty search database (100,000), against COPY into a table with the same indexes", searchPostgres},
	{"search-redis", "rows/s of filling an empty Redis with indexes (100,000), against pipelined HSET", searchRedis},
	{"verify", "seconds of verifying all copies by content (2,000,000), against one statement; and what writers lose meanwhile", verification},
	{"cache", "resources/s that the cache answers (20,000), against the database and against plain GETs of the same bytes", cached},
	{"policy-change", "resources/s that a change of a policy reaches at their owner (200,000), against one UPDATE", policyChange},
	{"restart", "seconds from the start of a manager until its copies (2,000,000) are live, against a tenth of them", restart},
	{"reshard", "seconds until every shard has a live owner again after deaths, on a real control plane; lag of writes while managers are scaled", reshard},
	{"memory", "resident memory at 100,000 and at 2,000,000 resources", memory},
}

// result is the line of JSON at the end of a bench. Ratio above 1 means that ours is better.
type result struct {
	Bench string  `json:"bench"`
	Ratio float64 `json:"ratio"`
	Ours  float64 `json:"ours"`
	Rival float64 `json:"rival"`
	Unit  string  `json:"unit"`
	Runs  int     `json:"runs"`
	// Figures are those of a bench that measures more than one thing.
	Figures map[string]any `json:"figures,omitempty"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if isNode() {
		err = nodeMain(ctx)
	} else {
		err = run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	}
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is left to be deferred
	}
}

// run is the command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	opt := options{out: stdout, clusters: new(clusters)}
	defer func() { err = errors.Join(err, opt.clusters.stop()) }()
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&opt.runs, "runs", 5, "measurements of each contender; they alternate")
	flags.IntVar(&opt.rows, "rows", 0, "rows in the table (0: as the bench is defined)")
	flags.IntVar(&opt.changes, "changes", 0, "single-row transactions of a backlog (0: as the bench is defined)")
	flags.IntVar(&opt.hot, "hot", 5000, "rows that catchup-hot changes again and again")
	flags.IntVar(&opt.rate, "rate", 500, "transactions per second of latency")
	flags.DurationVar(&opt.duration, "duration", 0, "how long one measurement of latency (20s) or writer-cost (5s) takes")
	flags.IntVar(&opt.clients, "clients", 4, "concurrent writers of writer-cost")
	flags.StringVar(&opt.postgres, "postgres", "", "major version of PostgreSQL (empty: the newest installed)")
	flags.IntVar(&opt.maxShardsPerNode, "max-shards-per-node", 0, "width of one stream of ours (0: the product's default)")
	flags.BoolVar(&opt.binary, "binary", false, "let the rival send values in binary form")
	flags.StringVar(&opt.profiles, "profiles", "", "folder for CPU profiles of our processes (empty: none)")
	flags.Usage = func() {
		fmt.Fprintln(stderr, "usage: bench [flags] [NAME...]")
		for _, b := range benches {
			fmt.Fprintf(stderr, "  %-17s %s\n", b.name, b.about)
		}
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if opt.runs < 1 {
		return errors.New("-runs: want at least 1")
	}

	chosen := benches
	if flags.NArg() > 0 {
		chosen = nil
		for _, name := range flags.Args() {
			i := slices.IndexFunc(benches, func(b bench) bool { return b.name == name })
			if i < 0 {
				return fmt.Errorf("no bench %q: choose from %s", name, names())
			}
			chosen = append(chosen, benches[i])
		}
	}
	for _, b := range chosen {
		fmt.Fprintf(stdout, "# %s: %s\n# %s\n", b.name, b.about, load())
		r, err := b.run(ctx, opt)
		if err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
		r.Bench, r.Ratio, r.Ours, r.Rival = b.name, round(r.Ratio), round(r.Ours), round(r.Rival)
		r.Runs = opt.runs
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "# %s\n%s\n", load(), line)
	}
	return nil
}

func names() string {
	var all []string
	for _, b := range benches {
		all = append(all, b.name)
	}
	return strings.Join(all, ", ")
}

// round keeps three significant digits after the point, which is more than a measurement is worth.
func round(f float64) float64 { return float64(int64(f*1000+0.5)) / 1000 }

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// quantile of sorted values.
func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// poll calls done every few milliseconds until it says so.
func poll(ctx context.Context, limit time.Duration, what string, done func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s: not within %s", what, limit))
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := done(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
