package verify

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/store/postgres"
)

// Ledger is where passes in the background are kept, so that one process at a time runs each and the next one goes on with it: postgres.Store.
type Ledger interface {
	ClaimVerification(ctx context.Context, peer, holder string, hold time.Duration) (state string, ok bool, err error)
	SaveVerification(ctx context.Context, peer, holder, state string, next time.Duration) (bool, error)
	NoteVerified(ctx context.Context, peer string, through time.Time, types []postgres.Verified) error
	Verified(ctx context.Context) ([]postgres.Verified, error)
}

// Background verifies the copies of every peer again and again, without writing anything: what it finds is for people to look at.
type Background struct {
	Ledger Ledger
	// Peers are the regions to verify now.
	Peers func() []string
	// Types, unless nil, are the types that the metrics show: the ledger also remembers those that the schema has no more.
	Types func() []string
	// Verify runs a pass over a peer, as Run does, and writes down what a finished one has proved (Note).
	Verify func(ctx context.Context, peer string, opt Options, from State, report func(Progress) error) (State, error)
	// Interval is the time between two passes. Default 1 h.
	Interval time.Duration
	// Pause is Options.Pause. Default 9: a tenth of the time is spent reading.
	Pause float64
	// Metrics, unless nil, holds the metrics while it runs.
	Metrics prometheus.Registerer
	Logger  *slog.Logger
}

const (
	// slice is how long a pass goes on before its state is stored. Claims outlast it by far.
	slice = 10 * time.Second
	hold  = 5 * time.Minute
	// idle is the time between two looks at what is due.
	idle = 10 * time.Second
	// shown is how many differences of a slice are logged by name.
	shown = 10
)

// Run verifies until ctx is done, which is no error.
func (b Background) Run(ctx context.Context) error {
	if b.Interval == 0 {
		b.Interval = time.Hour
	}
	if b.Pause == 0 {
		b.Pause = 9
	}
	m := newMetrics()
	m.interval.Set(b.Interval.Seconds())
	if b.Metrics != nil {
		if err := b.Metrics.Register(m); err != nil {
			return fmt.Errorf("register metrics of the verification: %w", err)
		}
		defer b.Metrics.Unregister(m)
	}
	holder := fmt.Sprintf("%016x", rand.Uint64())
	wait := min(idle, b.Interval)
	for {
		var running sync.WaitGroup
		for _, peer := range b.Peers() {
			running.Go(func() { b.pass(ctx, peer, holder, m) })
		}
		running.Wait()
		b.observe(ctx, m)
		if sleep(ctx, wait/2+rand.N(wait)) != nil {
			return nil
		}
	}
}

// pass goes on with the pass over a peer, if it is due and nobody else does, until it is finished.
func (b Background) pass(ctx context.Context, peer, holder string, m *metrics) {
	for ctx.Err() == nil {
		more, err := b.slice(ctx, peer, holder, m)
		if err != nil && ctx.Err() == nil {
			b.Logger.WarnContext(ctx, "verification interrupted, will go on", "source_region", peer, "error", err)
		}
		if err != nil || !more {
			return
		}
	}
}

func (b Background) slice(ctx context.Context, peer, holder string, m *metrics) (more bool, err error) {
	token, ok, err := b.Ledger.ClaimVerification(ctx, peer, holder, hold)
	if err != nil || !ok {
		return false, err
	}
	from, err := ParseState(token)
	if err != nil {
		from = State{} // of a version that is no more: from the beginning
	}
	compared := from.Compared
	state, err := b.Verify(ctx, peer, Options{Pause: b.Pause, For: slice}, from, func(p Progress) error {
		m.compared.WithLabelValues(peer).Add(float64(p.State.Compared - compared))
		compared = p.State.Compared
		for i, d := range p.Found {
			if i == shown {
				b.Logger.WarnContext(ctx, "and more", "source_region", peer, "differences", len(p.Found)-shown)
				break
			}
			b.Logger.WarnContext(ctx, "a copy is not what its owner has", "source_region", peer, "name", d.Name, "kind", d.Kind, "behind", d.Behind)
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	next, left := time.Duration(0), state.Token()
	if state.Finished {
		next, left = b.Interval, ""
	}
	held, err := b.Ledger.SaveVerification(ctx, peer, holder, left, next)
	return held && !state.Finished, err
}

// Note writes down what a finished pass has proved of each of types, which are those it was asked for, or all of the service.
func Note(ctx context.Context, l Ledger, peer string, s State, types []string) error {
	all := map[string]bool{}
	for _, t := range types {
		all[t] = true
	}
	for t := range s.Differences {
		all[t] = true // also one that there should not be
	}
	rows := make([]postgres.Verified, 0, len(all))
	for _, t := range slices.Sorted(maps.Keys(all)) {
		rows = append(rows, postgres.Verified{Type: t, Compared: s.Compared, Differences: s.Left(t)})
	}
	return l.NoteVerified(ctx, peer, s.Began, rows)
}

// observe shows what all processes together have verified.
func (b Background) observe(ctx context.Context, m *metrics) {
	all, err := b.Ledger.Verified(ctx)
	if err != nil {
		return // the next round tries again
	}
	peers := b.Peers()
	var types []string
	if b.Types != nil {
		types = b.Types()
	}
	for _, v := range all {
		if !slices.Contains(peers, v.Peer) || b.Types != nil && !slices.Contains(types, v.Type) {
			m.mismatched.DeleteLabelValues(v.Peer, v.Type)
			m.through.DeleteLabelValues(v.Peer, v.Type)
			continue
		}
		m.mismatched.WithLabelValues(v.Peer, v.Type).Set(float64(v.Differences))
		if !v.Through.IsZero() {
			m.through.WithLabelValues(v.Peer, v.Type).Set(float64(v.Through.UnixNano()) / 1e9)
		}
	}
}

type metrics struct {
	mismatched, through *prometheus.GaugeVec
	compared            *prometheus.CounterVec
	interval            prometheus.Gauge
}

func newMetrics() *metrics {
	return &metrics{
		mismatched: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dbcontroller_verify_mismatched_rows", Help: "Copies that differed from their owner's rows in the last pass that was finished, by resource type."}, []string{"source_region", "resource"}),
		through: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dbcontroller_verify_verified_through_timestamp_seconds", Help: "Unix time in seconds, by the owner's clock, up to which copies were verified without a gap, by resource type.",
		}, []string{"source_region", "resource"}),
		compared: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_verify_compared_rows_total", Help: "Rows that were compared with their owner by content."}, []string{"source_region"}),
		interval: prometheus.NewGauge(prometheus.GaugeOpts{Name: "dbcontroller_verify_interval_seconds", Help: "Seconds from the end of a verification of all copies of a region to the next one; absent where none is made."}),
	}
}

// Describe is part of prometheus.Collector.
func (m *metrics) Describe(c chan<- *prometheus.Desc) {
	m.mismatched.Describe(c)
	m.through.Describe(c)
	m.compared.Describe(c)
	m.interval.Describe(c)
}

// Collect is part of prometheus.Collector.
func (m *metrics) Collect(c chan<- prometheus.Metric) {
	m.mismatched.Collect(c)
	m.through.Collect(c)
	m.compared.Collect(c)
	m.interval.Collect(c)
}
