package syncing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// LocalSource is the local database as what a search store follows: *postgres.Store. It is safe for concurrent use.
type LocalSource interface {
	// SearchDigests and SearchVersions (ordered by name, behind after) tell which rows are to be searched.
	SearchDigests(ctx context.Context, shards feed.Range, types postgres.SearchTypes) ([]postgres.ShardDigest, error)
	SearchVersions(ctx context.Context, shards []int32, types postgres.SearchTypes, after string, emit func(name string, v store.Version) error) error
	// SearchNames reads rows as they are now.
	SearchNames(ctx context.Context, names []string, types postgres.SearchTypes, emit func(*store.Resource) error) error
	Feed() *feed.Feed
}

// LocalConfig says which search store a LocalNode fills, and from what.
type LocalConfig struct {
	// Service and Region are the own Deployment; Ring is the number of shards of the service.
	Service, Region string
	Ring            int
	// MaxShardsPerNode is the widest subrange that is filled by one writer. 0 is DefaultMaxShardsPerNode; negative is no limit.
	MaxShardsPerNode int
	Source           LocalSource
	Search           search.Store
	// Schema says what is searched. Its changes apply live.
	Schema func() *descriptor.Version
	// AuditInterval is how often the store is compared by digest. 0 is DefaultAuditInterval; negative is never.
	AuditInterval time.Duration
	// Metrics, unless nil, holds the node's metrics while it runs.
	Metrics prometheus.Registerer
	// Clock defaults to time.Now, Logger to slog.Default.
	Clock  func() time.Time
	Logger *slog.Logger
}

// LocalNode keeps a search store equal to the local database for a range of shards, owned rows and copies alike (spec F97, F98). It shares nothing with the
// nodes that copy but the database, so a search store that is slow or down delays no copy. All methods may be called from any goroutine.
type LocalNode struct {
	cfg     LocalConfig
	metrics *metrics
	drift   *prometheus.CounterVec
	clock   pairClock
	applied atomic.Int64

	mu      sync.Mutex
	ctx     context.Context // of Run; nil while it does not run
	shards  feed.Range
	nodes   map[feed.Range]*searchNode
	running sync.WaitGroup
	found   []Drift
	lastErr error
	errTime time.Time
}

// maxDrift is how many differences of the last audits are kept for people.
const maxDrift = 1000

// DriftKind says how a search store differed from the database.
type DriftKind string

// The kinds of drift.
const (
	// Ghost: there was a document, and no row.
	Ghost DriftKind = "ghost"
	// Hole: there was a row, and no document.
	Hole DriftKind = "hole"
	// Stale: the document was of another version, or was not what had been written.
	Stale DriftKind = "stale"
)

// Drift is a difference that an audit has found, and repaired.
type Drift struct {
	Name  string    `json:"name"`
	Kind  DriftKind `json:"kind"`
	Found time.Time `json:"found"`
}

// NewLocalNode returns a node that serves no shard yet.
func NewLocalNode(cfg LocalConfig) (*LocalNode, error) {
	switch {
	case cfg.Service == "" || cfg.Region == "" || cfg.Ring <= 0:
		return nil, errors.New("search node: service, region and ring are required")
	case cfg.Source == nil || cfg.Search == nil || cfg.Schema == nil:
		return nil, errors.New("search node: source, search store and schema are required")
	}
	cfg.MaxShardsPerNode = cmp.Or(cfg.MaxShardsPerNode, DefaultMaxShardsPerNode)
	cfg.AuditInterval = cmp.Or(cfg.AuditInterval, DefaultAuditInterval)
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default()).With("db_service", cfg.Service, "region", cfg.Region, "kind", "search")
	n := &LocalNode{cfg: cfg, nodes: map[feed.Range]*searchNode{}}
	n.metrics = newMetrics(n.measured)
	n.drift = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_search_drift_total",
		Help: "Documents that an audit found different from their rows and repaired, by kind: ghost, hole or stale."}, []string{"drift"})
	for _, kind := range []DriftKind{Ghost, Hole, Stale} {
		n.drift.WithLabelValues(string(kind))
	}
	n.metrics.follow(cfg.Region)
	return n, nil
}

// Run fills the store until ctx is done, and returns after everything it started has. Being told to stop is no error. It may be called once.
func (l *LocalNode) Run(ctx context.Context) error {
	if l.cfg.Metrics != nil {
		reg := prometheus.WrapRegistererWith(prometheus.Labels{"db_service": l.cfg.Service, "target_region": l.cfg.Region, "kind": "search"}, l.cfg.Metrics)
		for _, c := range []prometheus.Collector{l.metrics, l.drift} {
			if err := reg.Register(c); err != nil {
				return fmt.Errorf("register search metrics of %s in %s: %w", l.cfg.Service, l.cfg.Region, err)
			}
			defer reg.Unregister(c)
		}
	}
	l.mu.Lock()
	l.ctx = ctx
	l.reconcile()
	l.mu.Unlock()
	<-ctx.Done()
	l.mu.Lock() // a reconcile that is under way ends first, and the next one starts nothing
	//nolint:staticcheck // nothing is protected here
	l.mu.Unlock()
	l.running.Wait()
	return nil
}

// UpdateShardRange makes shards the range that the node serves, and returns when nothing works on other shards any more, or with ctx's error.
func (l *LocalNode) UpdateShardRange(ctx context.Context, shards feed.Range) error {
	if shards.From < 0 || shards.From > shards.To || int(shards.To) > l.cfg.Ring {
		return fmt.Errorf("shard range %s does not fit a ring of %d", shards, l.cfg.Ring)
	}
	l.mu.Lock()
	l.shards = shards
	stopped := l.reconcile()
	l.mu.Unlock()
	for _, n := range stopped {
		select {
		case <-n.done:
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of work on other shards than %s: %w", shards, ctx.Err())
		}
	}
	return nil
}

// reconcile makes the subranges those of the node's shards, and returns those that it has stopped. l.mu is held.
func (l *LocalNode) reconcile() (stopped []*searchNode) {
	if l.ctx == nil || l.ctx.Err() != nil {
		return nil
	}
	var wanted []feed.Range
	if l.shards.From < l.shards.To {
		wanted = subranges(l.shards, l.cfg.MaxShardsPerNode)
	}
	for shards, n := range l.nodes {
		if !slices.Contains(wanted, shards) {
			n.cancel()
			stopped = append(stopped, n)
			delete(l.nodes, shards)
		}
	}
	for _, shards := range wanted {
		if l.nodes[shards] == nil {
			ctx, cancel := context.WithCancel(l.ctx)
			n := newSearchNode(l, shards, cancel)
			l.nodes[shards] = n
			l.running.Go(func() {
				defer close(n.done)
				defer cancel()
				for _, before := range stopped { // two writers of one shard would take it from each other
					<-before.done
				}
				n.run(ctx)
			})
		}
	}
	return stopped
}

// Status returns how well the store follows the database. Its region is the own one, and its contact is that with the own database.
func (l *LocalNode) Status() PeerStatus {
	now := l.cfg.Clock()
	l.mu.Lock()
	defer l.mu.Unlock()
	s := PeerStatus{Service: l.cfg.Service, Region: l.cfg.Region, State: Live, Progress: 1, RowsApplied: l.applied.Load()}
	l.clock.mu.Lock()
	s.ContactAge = age(l.clock.contact, now)
	if l.clock.measured {
		s.ClockOffset = new(l.clock.offset)
	}
	l.clock.mu.Unlock()
	var all *lags
	done := worst{share: 1}
	for _, n := range l.nodes {
		r, state, share, remaining := n.reading(now)
		if all != nil {
			r = all.worse(r)
		}
		all = &r
		if badness[state] > badness[s.State] {
			s.State = state
		}
		done.add(share, remaining)
	}
	s.Progress, s.Remaining = done.share, done.remaining
	if all != nil {
		s.Freshness, s.ApplyLag, s.PendingRows = all.freshness, all.apply, all.pending
	} else {
		s.State = Connecting
	}
	if l.lastErr != nil && s.State != Live {
		s.LastError, s.LastErrorTime = l.lastErr.Error(), l.errTime
	}
	return s
}

// measured is the status for the metrics: none without a shard, since then another replica tells.
func (l *LocalNode) measured() []PeerStatus {
	l.mu.Lock()
	idle := len(l.nodes) == 0
	l.mu.Unlock()
	if idle {
		return nil
	}
	return []PeerStatus{l.Status()}
}

// Drift returns the differences that audits have found last, at most 1000, the latest ones last.
func (l *LocalNode) Drift() []Drift {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.found)
}

func (l *LocalNode) drifted(found []Drift) {
	for _, d := range found {
		l.drift.WithLabelValues(string(d.Kind)).Inc()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.found = append(l.found, found...)
	l.found = slices.Clone(l.found[max(0, len(l.found)-maxDrift):])
}

func (l *LocalNode) failed(err error) {
	l.metrics.errors.WithLabelValues(l.cfg.Region, string(reasonOf(err))).Inc()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lastErr, l.errTime = err, l.cfg.Clock()
}

// searchNode fills one subrange.
type searchNode struct {
	local  *LocalNode
	shards feed.Range
	log    *slog.Logger
	clock  rangeClock
	set    *VersionSet
	cancel context.CancelFunc
	done   chan struct{}

	mu       sync.Mutex
	state    State
	inSync   bool // no name is known to differ
	progress progress
	failing  string // the last failure; empty after a success
}

func newSearchNode(l *LocalNode, shards feed.Range, cancel context.CancelFunc) *searchNode {
	n := &searchNode{
		local: l, shards: shards, log: l.cfg.Logger.With("shards", shards.String()), clock: rangeClock{pair: &l.clock},
		cancel: cancel, done: make(chan struct{}), state: Connecting,
	}
	n.set = NewVersionSet(func(ready bool) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.inSync = ready
	})
	return n
}

// String names the subrange for errors.
func (n *searchNode) String() string { return "search " + n.shards.String() }

// run fills the subrange until ctx is done.
func (n *searchNode) run(ctx context.Context) {
	var retry backoff
	for {
		began := n.local.cfg.Clock()
		err := n.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		again := errors.Is(err, errSearchDeclared)
		if !again {
			n.failed(err)
			n.local.metrics.retries.WithLabelValues(n.local.cfg.Region).Inc()
		}
		n.enter(Disconnected)
		if again || n.local.cfg.Clock().Sub(began) > steady {
			retry = backoff{}
		}
		if !retry.sleep(ctx) {
			return
		}
	}
}

func (n *searchNode) enter(s State) {
	n.mu.Lock()
	was := n.state
	n.state = s
	if s == Live {
		n.failing, n.progress.share = "", 1
	}
	n.mu.Unlock()
	if was != s {
		n.log.Debug("state changed", "from", was, "to", s)
	}
}

// failed reports an error after which the node goes on.
func (n *searchNode) failed(err error) {
	n.local.failed(err)
	n.mu.Lock()
	again := n.failing == err.Error()
	n.failing = err.Error()
	n.mu.Unlock()
	level := slog.LevelWarn
	if again {
		level = slog.LevelDebug // a store that is away for an hour fills no log
	}
	n.log.Log(context.Background(), level, "filling the search store failed, will be retried", "error", err)
}

func (n *searchNode) progressed(done, of int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.progress.note(done, of, n.local.cfg.Clock())
}

func (n *searchNode) reading(now time.Time) (l lags, state State, share float64, remaining *time.Duration) {
	n.mu.Lock()
	state, share, remaining = n.state, n.progress.share, n.progress.remaining(now)
	inSync := n.inSync
	n.mu.Unlock()
	l = n.clock.read(now, !inSync)
	missing, extra := n.set.Len()
	l.pending += int64(missing + extra)
	if state == Live || state == CatchingUp {
		share, remaining = 1, new(time.Duration(0))
	}
	return l, state, share, remaining
}
