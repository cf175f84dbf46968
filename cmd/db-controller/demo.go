package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dbcontroller/db-controller/cmd/db-controller/internal/demo"
)

// defaultLatency is roughly Frankfurt, Virginia and Singapore.
var defaultLatency = []string{"eu-us=80ms", "eu-ap=160ms", "us-ap=140ms"}

func newDemo() *cobra.Command {
	var (
		cfg     demo.Config
		latency []string
		cuts    []string
		lengths []time.Duration
		summary string
	)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run three regions on this machine and watch them agree",
		Long: `Demo runs three regions (eu, us, ap) of a packages service on this machine, with the code that runs in production: three
databases on one private PostgreSQL, three API servers on loopback with certificates of their own, three managers, a folder
of manifests as the topology. Links with simulated distance connect them, and can be cut.

On a terminal it shows a table, elsewhere a line every three seconds (on standard error): what each region owns and holds, and
for each pair the three clocks contact, freshness and apply lag.

Without --load it writes a small data set and then goes on writing. With --load it writes the resources of a file in eu, in
transactions of up to 250 rows, two at a time: one JSON object per line, with name, metadata and the resource's own fields.
The lines may be in any order. A reference to a resource that does not exist is refused, so each one is written after what it
refers to; a circle of references is written in one transaction, or some of its references are added afterwards.

When all copies are there it plans and makes two deletions (with --load only if also --exit-when-synced is given): of a source that
other packages need, which must be refused, and of one that nobody needs. That takes the packages of the source along, and those
that only recommend them lose the reference, in all regions. Then, each step only if the input has something for it:

- A region is added to the policy of one section of up to 500 packages, and taken away again. What-if is asked before, and must have
  said how many copies then appear and vanish, by the databases.
- Each region searches its packages for words of their descriptions; after that one region is cut off and searches alone (a region
  that --cut cuts off does so in that time, too). What is found must be in its database, and something must be if its packages have it.
- Four copies in us are changed by hand in its database, and a row that nobody owns is inserted. The verification must find exactly
  these five, repair them, and then find nothing.

At the end it compares all databases with queries of its own: which rows each region must hold follows from the column
"regions" of their owner's database. Compared are name, uuid, version, times and a hash of all contents.

The exit code is 0 only if all of this went as it must and that comparison found nothing missing, extra or different; 1
otherwise, or if the time was up; 130 if it was interrupted before. Processes and files are removed in any case.

Commit to visible (p50, p99) is measured with a resource that is written in eu five times a second: from the answer to the write
until a query, repeated every 2 ms (less often for what takes longer), finds it in the database of another region. It contains the distance
and, while a region is cut, the cut. Rows per second are the copies that all regions together applied, from the start of the
load until all were there.`,
		Example: `  db-controller demo                                             # until Ctrl-C
  db-controller demo --cut ap --for 10s                          # and cut a region off
  db-controller demo --load packages.ndjson --exit-when-synced
  db-controller demo --load packages.ndjson --latency 0 --exit-when-synced --summary json
  db-controller demo --latency 50ms --latency eu-ap=200ms --rate 200`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if cfg.Latency, err = parseLatency(latency); err != nil {
				return err
			}
			if cfg.Cuts, err = parseCuts(cuts, lengths); err != nil {
				return err
			}
			switch {
			case summary != "" && summary != "text" && summary != "json":
				return usageError{fmt.Errorf("--summary %q: is neither text nor json", summary)}
			case cfg.Rate < 0 || cfg.Rate > 10_000:
				return usageError{fmt.Errorf("--rate %d: want 0 to 10000 writes per second", cfg.Rate)}
			case cfg.Timeout <= 0:
				return usageError{errors.New("--timeout: must be more than 0")}
			case cfg.Load != "" && cmd.Flags().Changed("rate"):
				return usageError{errors.New("--rate and --load exclude each other: synthetic writes are for the small data set")}
			}
			cfg.JSON = summary == "json"
			cfg.Version = version
			cfg.Out, cfg.Err = os.Stdout, os.Stderr
			cfg.Terminal = term.IsTerminal(int(os.Stderr.Fd()))
			err = demo.Run(cmd.Context(), cfg)
			if errors.Is(err, demo.ErrInterrupted) {
				return exitError{err, 130}
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Load, "load", "", "`file` of resources to write in eu, one JSON object per line (hack/debian-packages makes one)")
	f.BoolVar(&cfg.ExitWhenSynced, "exit-when-synced", false, "end when the load and the cuts are over and all databases agree")
	f.DurationVar(&cfg.Timeout, "timeout", 15*time.Minute, "with --exit-when-synced: give up after so long")
	f.StringSliceVar(&latency, "latency", defaultLatency, "round `trips` between regions: one for all (80ms, 0), pairs (eu-us=80ms), or both")
	f.StringArrayVar(&cuts, "cut", nil, "cut this `region` off from the others once the load has begun; may be repeated")
	f.DurationSliceVar(&lengths, "for", []time.Duration{10 * time.Second}, "how `long` the cut lasts; one for each --cut, the last one for the rest")
	f.IntVar(&cfg.Rate, "rate", 50, "synthetic `writes` per second, without --load")
	f.StringVar(&summary, "summary", "text", "text or json (one line, the last on standard output)")
	f.StringVar(&cfg.DSN, "dsn", "", "`connection string` of a PostgreSQL server to use, as a user who may create databases; they are dropped at the end. Default: a private server")
	f.BoolVar(&cfg.Insecure, "insecure", false, "plain text on loopback instead of TLS with certificates on both sides")
	f.BoolVarP(&cfg.Verbose, "verbose", "v", false, "show the log of the regions")
	return cmd
}

// parseLatency reads "80ms" for all pairs and "eu-us=80ms" for one.
func parseLatency(values []string) (map[demo.Pair]time.Duration, error) {
	latency := map[demo.Pair]time.Duration{}
	one := map[demo.Pair]time.Duration{}
	for _, v := range values {
		pair, text, named := strings.Cut(v, "=")
		if !named {
			text = v
		}
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 || d > time.Minute {
			return nil, usageError{fmt.Errorf("--latency %q: %q is not a duration from 0 to 1m, for example 80ms", v, text)}
		}
		if !named {
			for i, a := range demo.Regions {
				for _, b := range demo.Regions[i+1:] {
					latency[demo.PairOf(a, b)] = d
				}
			}
			continue
		}
		a, b, ok := strings.Cut(pair, "-")
		if !ok || a == b || !slices.Contains(demo.Regions, a) || !slices.Contains(demo.Regions, b) {
			return nil, usageError{fmt.Errorf("--latency %q: %q is not a pair of %s, for example eu-us=80ms", v, pair, strings.Join(demo.Regions, ", "))}
		}
		one[demo.PairOf(a, b)] = d
	}
	for pair, d := range one {
		latency[pair] = d
	}
	return latency, nil
}

func parseCuts(regions []string, lengths []time.Duration) ([]demo.Cut, error) {
	if len(lengths) == 0 || len(lengths) > max(1, len(regions)) {
		return nil, usageError{fmt.Errorf("--for: there are %d, but %d times --cut", len(lengths), len(regions))}
	}
	var cuts []demo.Cut
	for i, region := range regions {
		c := demo.Cut{Region: region, For: lengths[min(i, len(lengths)-1)]}
		if !slices.Contains(demo.Regions, region) {
			return nil, usageError{fmt.Errorf("--cut %q: is not one of %s", region, strings.Join(demo.Regions, ", "))}
		}
		if c.For <= 0 {
			return nil, usageError{fmt.Errorf("--for %s: must be more than 0", c.For)}
		}
		cuts = append(cuts, c)
	}
	return cuts, nil
}
