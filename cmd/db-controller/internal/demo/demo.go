// Package demo runs three regions on this machine with the same code as in production, shows them, and judges the result by itself.
//
//	demo.go     one run from the start to the verdict
//	world.go    PostgreSQL, certificates, manifests, links with distance, three Deployments; and their end
//	input.go    the resources to load, and their references
//	order.go    in which order they are written: every reference after its target
//	load.go     the load and synthetic writes, through the API servers
//	choose.go   which deletions the input is good for
//	delete.go   a deletion that is refused and one that cascades, planned before, judged after
//	policy.go   a policy gets a region and loses it again, and the copies follow
//	search.go   a search in each region, also in one that is cut off
//	verify.go   copies that are changed by hand, found and repaired
//	probe.go    commit to visible, measured from outside
//	sample.go   what the regions hold and say, now and again
//	compare.go  the verdict: the databases compared by queries of its own
//	screen.go   the table, or lines
//
// What the demo starts and writes is gone when Run returns: processes, databases and files.
package demo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Pair is two regions, in alphabetical order.
type Pair [2]string

// PairOf returns the pair of two regions.
func PairOf(a, b string) Pair {
	if a > b {
		a, b = b, a
	}
	return Pair{a, b}
}

// Cut makes a region unreachable for a while.
type Cut struct {
	Region string
	For    time.Duration
}

// Config of a run.
type Config struct {
	// DSN of an existing PostgreSQL server, on which databases are created and dropped again; empty starts a private one.
	DSN string
	// Latency is the round trip between two regions; a pair that is not in it has none.
	Latency map[Pair]time.Duration
	// Load is a file of resources, one JSON object per line, that is written in eu; empty loads a small data set.
	Load string
	// Rate is how many synthetic writes are made per second; only with the small data set.
	Rate int
	// Cuts happen one after the other, once the load has begun.
	Cuts []Cut
	// ExitWhenSynced ends the run when the load and the cuts are over and all databases agree.
	ExitWhenSynced bool
	// Version of the program, for the metrics.
	Version string
	// Timeout of a run with ExitWhenSynced.
	Timeout time.Duration
	// Insecure is plain text on loopback instead of mTLS.
	Insecure bool
	// Verbose shows the log of the Deployments.
	Verbose bool
	// JSON prints the summary as one line of JSON.
	JSON bool
	// Out gets the summary; Err everything else, drawn as a table if Terminal.
	Out, Err io.Writer
	Terminal bool
}

// ErrInterrupted is returned when a run was ended before there was something to judge.
var ErrInterrupted = errors.New("interrupted before the load and the deletions were complete, so nothing was compared")

// settleTimeout is how long an interrupted run waits for the copies of the last writes.
const settleTimeout = 20 * time.Second

// cutDelay is from the start of the load, or the end of a cut, to the next cut.
const cutDelay = 2 * time.Second

// Summary is the result of a run.
type Summary struct {
	Regions int `json:"regions"`
	// Owned and Copies are rows of all regions together.
	Owned  int64 `json:"owned"`
	Copies int64 `json:"copies"`
	// Missing, Extra and Different are copies that are not as their owner's database says.
	Missing   int64 `json:"missing"`
	Extra     int64 `json:"extra"`
	Different int64 `json:"different"`
	// Deleted are the rows that the demo's deletion has taken along, RefusedBlockers the resources that have forbidden the other one.
	Deleted         int `json:"deleted"`
	RefusedBlockers int `json:"refused_blockers"`
	// PolicyAdded and PolicyRemoved are the copies that a change of a policy has made, and that taking it back has removed.
	PolicyAdded   int64 `json:"policy_added"`
	PolicyRemoved int64 `json:"policy_removed"`
	// Searches have been judged, each in one region.
	Searches int `json:"searches"`
	// Edited are the rows that were changed by hand; Found, Repaired and Left are the differences that verifications have told of them: before, at, and after
	// the repair.
	Edited   int `json:"edited"`
	Found    int `json:"found"`
	Repaired int `json:"repaired"`
	Left     int `json:"left"`
	// P50 and P99 are from commit to visible, in milliseconds.
	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`
	// RowsPerSecond are copies applied in all regions together, from the start of the load until they were complete.
	RowsPerSecond float64 `json:"rows_per_second"`
}

// Run runs the demo. It returns nil if what it shows went as it must, and a comparison of all databases has found nothing missing, extra or different. When
// ctx is done before load and deletions are complete, it stops at once with ErrInterrupted; later, it stops writing, waits for the last copies, and compares.
func Run(ctx context.Context, cfg Config) (err error) {
	r := &run{cfg: cfg, screen: newScreen(cfg.Err, cfg.Terminal)}
	level := slog.LevelError + 1 // what goes wrong is in the table
	if cfg.Verbose {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(r.screen, &slog.HandlerOptions{Level: level}))

	data := builtInData()
	if cfg.Load != "" {
		if data, err = os.ReadFile(cfg.Load); err != nil {
			return fmt.Errorf("--load: %w", err)
		}
	}
	r.screen.note("starting PostgreSQL and three regions of %s", service)
	var planning errgroup.Group // while the regions start
	planning.Go(func() error { return r.plan(data) })
	r.world, err = open(ctx, cfg, log)
	planned := planning.Wait()
	if err != nil {
		if ctx.Err() != nil {
			return errors.Join(ErrInterrupted, err)
		}
		return err
	}
	defer func() { err = errors.Join(err, r.world.close()) }()
	if planned != nil {
		return fmt.Errorf("load %s: %w", r.source(), planned)
	}
	r.introduce()
	return r.all(ctx)
}

// plan reads the input and finds the order in which it is written.
func (r *run) plan(data []byte) error {
	schema, err := sampleSchema()
	if err != nil {
		return err
	}
	if r.input, err = parseInput(schema, data); err != nil {
		return err
	}
	r.order = r.input.plan(loadLimits)
	r.deletes = &deletions{run: r, input: r.input}
	r.deletes.refusal, r.deletes.cascade = r.input.chooseDeletions()
	r.words = r.input.searchWords(r.deletes.doomed())
	return nil
}

// source says what is loaded.
func (r *run) source() string { return cmp.Or(r.cfg.Load, "the small data set") }

// run is the state of one run.
type run struct {
	cfg     Config
	world   *world
	screen  *screen
	sampler *sampler
	loader  *loader
	prober  *prober
	writer  *synthetic
	input   *input
	order   *order
	deletes *deletions
	words   []string // that are searched for
	moves   *moves
	// verification is made after the searches; searches are those that have been judged.
	verification *verification
	searches     int
	// shown says that all that the demo shows has gone as it must.
	shown bool
	began time.Time
	// perSecond is how many rows all regions together applied per second, until the copies were complete.
	perSecond float64

	mu       sync.Mutex
	loadTook time.Duration // 0 until the load is over
}

// introduce says where to look.
func (r *run) introduce() {
	w := r.world
	r.screen.note("three regions are up, on PostgreSQL %s", w.postgres)
	for _, name := range Regions {
		r.screen.note("  %s   API %s   status and metrics http://%s/statusz", name, w.regions[name].url, w.regions[name].ops.Addr())
	}
	for i, a := range Regions {
		for _, b := range Regions[i+1:] {
			r.screen.note("  %s-%s   %s round trip", a, b, r.cfg.Latency[PairOf(a, b)])
		}
	}
	curl := "curl"
	if !r.cfg.Insecure {
		curl = fmt.Sprintf("curl --cacert %[1]s/ca.crt --cert %[1]s/you.crt --key %[1]s/you.key", w.dir)
	}
	r.screen.note("try, in another terminal:")
	r.screen.note("  %s '%s/v1/sections'", curl, w.regions["us"].url)
	r.screen.note("  %s -X PATCH -H 'Content-Type: application/json' -d '{\"title\":\"written in ap, owned by eu\"}' '%s/v1/sections/admin?update_mask=title'", curl, w.regions["ap"].url)
	if c := r.deletes.refusal; c != nil {
		r.screen.note("  %s -X DELETE '%s/v1/%s?validateOnly=true'", curl, w.regions["us"].url, r.deletes.name(c.root))
	}
	r.screen.note("  topology: %s (edits apply at once)", w.manifests)
}

// all loads, cuts and writes, and judges.
func (r *run) all(ctx context.Context) error {
	// What shows and measures goes on after ctx is done, until the verdict.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop()
	r.began = time.Now()
	r.sampler = newSampler(r.world)
	r.loader = &loader{world: r.world, region: r.world.regions[Regions[0]], input: r.input, order: r.order}
	r.deletes.region = r.world.regions[Regions[1]]
	r.moves = &moves{run: r, region: r.world.regions[Regions[1]]}
	r.verification = &verification{run: r, region: r.world.regions[Regions[1]]}
	r.prober = newProber(r.world)
	r.writer = &synthetic{world: r.world}
	r.screen.sampler, r.screen.extra = r.sampler, r.progress

	limited := ctx
	if r.cfg.ExitWhenSynced {
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeoutCause(ctx, r.cfg.Timeout, errTimeout)
		defer cancel()
	}
	writing, stopWriting := context.WithCancel(limited)
	defer stopWriting()
	before := r.sampler.now()
	watching.Go(func() { r.sampler.run(background) })
	watching.Go(func() { r.screen.run(background) })
	watching.Go(func() { r.prober.run(writing, background) })

	if err := r.act(limited, writing, &watching); err != nil {
		return r.cause(ctx, limited, err)
	}
	if err := r.waitComplete(limited); err == nil {
		after := r.sampler.now()
		took := after.at.Sub(r.began)
		r.perSecond = float64(after.applied-before.applied) / took.Seconds()
		r.screen.note("all copies are there, %.1fs after the load began: %s rows applied, %s rows/s", took.Seconds(),
			grouped(after.applied-before.applied), grouped(int64(r.perSecond)))
		if r.cfg.ExitWhenSynced || r.cfg.Load == "" {
			if err := r.show(limited); err != nil {
				return r.cause(ctx, limited, err)
			}
		}
	} else if r.cfg.ExitWhenSynced && ctx.Err() != nil {
		return ErrInterrupted
	}

	settling := limited
	if !r.cfg.ExitWhenSynced {
		r.screen.note("running until Ctrl-C, which ends the writes and compares the databases")
		select {
		case <-ctx.Done():
		case <-r.world.ctx.Done():
			return r.failure()
		}
		var cancel context.CancelFunc
		settling, cancel = context.WithTimeout(background, settleTimeout)
		defer cancel()
	}
	stopWriting()
	found, err := r.judge(settling, background)
	if err != nil {
		return r.cause(ctx, limited, err)
	}
	if r.cfg.ExitWhenSynced && ctx.Err() != nil && !found.equal() {
		return ErrInterrupted
	}
	stop()
	watching.Wait() // nothing shall be printed after the summary
	return r.summarize(found)
}

// show does, when all copies are there, what the demo is there to show. It returns the first thing that did not go as it must.
func (r *run) show(ctx context.Context) error {
	if err := r.deletes.all(ctx); err != nil {
		return err
	}
	// What follows counts rows, and compares copies with owners at one moment.
	r.writer.paused.Store(true)
	defer r.writer.paused.Store(false)
	for _, step := range []func(context.Context) error{r.moves.all, r.search, r.verification.all} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	r.shown = true
	return nil
}

var errTimeout = errors.New("the regions were not in sync in time (--timeout)")

// cause says why a run ended early: because the user wanted it, because the time was up, or because of err.
func (r *run) cause(ctx, limited context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ErrInterrupted
	case limited.Err() != nil:
		return fmt.Errorf("%w: %w", context.Cause(limited), err)
	}
	return err
}

func (r *run) failure() error {
	return fmt.Errorf("a part of the demo has failed: %w", context.Cause(r.world.ctx))
}

// act loads and cuts, and starts the synthetic writes. It returns when load and cuts are over.
func (r *run) act(ctx, writing context.Context, watching *sync.WaitGroup) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.world.ctx, cancel)()
	acts, ctx := errgroup.WithContext(ctx)
	acts.Go(func() error {
		if err := r.load(ctx); err != nil {
			return err
		}
		if r.cfg.Load == "" && r.cfg.Rate > 0 {
			r.screen.note("writing %d times a second", r.cfg.Rate)
			watching.Go(func() { r.writer.run(writing, r.cfg.Rate) })
		}
		return nil
	})
	acts.Go(func() error { return r.cut(ctx) })
	err := acts.Wait()
	if r.world.ctx.Err() != nil {
		return r.failure() // which is why the others ended
	}
	return err
}

func (r *run) load(ctx context.Context) error {
	if err := r.loader.load(ctx); err != nil {
		return fmt.Errorf("load %s: %w", r.source(), err)
	}
	took := time.Since(r.began)
	r.mu.Lock()
	r.loadTook = took
	r.mu.Unlock()
	rows := r.loader.rows.Load()
	r.screen.note("loaded %s resources in %s in %.1fs, %s rows/s", grouped(rows), Regions[0], took.Seconds(), grouped(int64(float64(rows)/took.Seconds())))
	how := "every reference after its target"
	if n := r.order.cycles; n > 0 {
		how += fmt.Sprintf("; %s of references, each in one of them", count(n, "circle"))
	}
	if n := r.order.leftOut; n > 0 {
		how += fmt.Sprintf("; %s of larger circles added afterwards, to %s", count(n, "reference"), count(r.order.updated(), "resource"))
	}
	r.screen.note("  in %s, %s", count(len(r.order.writes)+len(r.order.updates), "transaction"), how)
	return nil
}

// cut makes the cuts, one after the other.
func (r *run) cut(ctx context.Context) error {
	for _, c := range r.cfg.Cuts {
		if err := sleep(ctx, cutDelay); err != nil {
			return err
		}
		r.screen.note("CUT: %s is unreachable for %s", c.Region, c.For)
		r.world.cut(c.Region)
		over := time.Now().Add(c.For)
		err := errors.Join(r.searchDuring(ctx, c), sleep(ctx, time.Until(over)))
		r.world.heal(c.Region)
		if err != nil {
			return err
		}
		r.screen.note("HEALED: %s is back", c.Region)
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// waitComplete returns when every region holds as many copies as it must.
func (r *run) waitComplete(ctx context.Context) error {
	for {
		r.sampler.count(ctx)
		if now := r.sampler.now(); now.complete() && ctx.Err() == nil {
			return nil
		}
		if r.world.ctx.Err() != nil {
			return r.failure()
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// compareTime is how long a last comparison may take when the time is up.
const compareTime = time.Minute

// judge takes the probe away and compares until everything is equal, or ctx is done; then it tells what is not.
func (r *run) judge(ctx, background context.Context) (*result, error) {
	r.prober.wait(ctx)
	if err := r.prober.remove(ctx); err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("remove the probe: %w", err)
	}
	r.screen.note("comparing all rows of all databases")
	for {
		start := time.Now()
		found, err := r.world.compare(ctx)
		if ctx.Err() != nil {
			last, cancel := context.WithTimeout(background, compareTime)
			defer cancel()
			return r.world.compare(last)
		}
		if err != nil || found.equal() {
			return found, err
		}
		_ = sleep(ctx, max(200*time.Millisecond, time.Since(start))) // the loop sees that ctx is done
	}
}

// summarize prints the summary, and returns an error if the databases differ.
func (r *run) summarize(found *result) error {
	p50, p99 := r.prober.percentiles()
	s := Summary{
		Regions: len(Regions), Owned: found.owned, Copies: found.copies, Missing: found.missing, Extra: found.extra, Different: found.different,
		Deleted: r.deletes.deleted, RefusedBlockers: r.deletes.refused,
		PolicyAdded: r.moves.added, PolicyRemoved: r.moves.removed, Searches: r.searches,
		Edited: r.verification.edited, Found: r.verification.found, Repaired: r.verification.repaired, Left: r.verification.left,
		P50: milliseconds(p50), P99: milliseconds(p99), RowsPerSecond: math.Round(r.perSecond*10) / 10,
	}
	if r.cfg.JSON {
		if err := json.NewEncoder(r.cfg.Out).Encode(s); err != nil {
			return fmt.Errorf("print the summary: %w", err)
		}
	} else {
		verdict := "every copy equals its owner"
		if !found.equal() {
			verdict = fmt.Sprintf("%s missing, %s extra, %s different", grouped(s.Missing), grouped(s.Extra), grouped(s.Different))
		}
		fmt.Fprintf(r.cfg.Out, "%d regions, %s owned rows, %s copies: %s. %s deleted by a cascade, one deletion refused by %s. %s moved by a policy and back. %s changed by hand, %s repaired. Commit to visible: median %.1f ms, 99th percentile %.1f ms. %s copies/s.\n",
			s.Regions, grouped(s.Owned), grouped(s.Copies), verdict, count(s.Deleted, "row"), count(s.RefusedBlockers, "blocker"),
			count(int(s.PolicyAdded), "row"), count(s.Edited, "row"), grouped(int64(s.Repaired)), s.P50, s.P99, grouped(int64(s.RowsPerSecond)))
	}
	switch {
	case found.equal() && r.cfg.ExitWhenSynced && !r.shown:
		return fmt.Errorf("%w: not all was shown", errTimeout)
	case found.equal():
		return nil
	}
	return fmt.Errorf("the databases differ: %d missing, %d extra, %d different; for example: %s", s.Missing, s.Extra, s.Different, strings.Join(found.examples, "; "))
}

func milliseconds(d time.Duration) float64 { return math.Round(float64(d.Microseconds())/100) / 10 }

// progress is the first line of the screen.
func (r *run) progress() string {
	var b strings.Builder
	r.mu.Lock()
	loaded := r.loadTook
	r.mu.Unlock()
	rows := r.loader.rows.Load()
	if loaded == 0 {
		took := time.Since(r.began).Seconds()
		updated := r.loader.updated.Load()
		fmt.Fprintf(&b, "loading %d%%, %s rows, %s/s", 100*(rows+updated)/int64(max(1, len(r.input.nodes)+r.order.updated())), grouped(rows), grouped(int64(float64(rows+updated)/took)))
	} else {
		fmt.Fprintf(&b, "loaded %s rows", grouped(rows))
	}
	if n := r.writer.writes.Load(); n > 0 {
		fmt.Fprintf(&b, ", %s writes", grouped(n))
		if failed := r.writer.failed.Load(); failed > 0 {
			fmt.Fprintf(&b, " (%s failed)", grouped(failed))
		}
	}
	if p50, p99 := r.prober.percentiles(); p50 > 0 {
		fmt.Fprintf(&b, " | visible p50 %s p99 %s", age(&p50), age(&p99))
	}
	return b.String()
}
