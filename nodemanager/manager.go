package nodemanager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/descriptor"
)

// Node works on a range of shards.
type Node interface {
	// Run works until ctx is done, and returns after everything it started has. It is called once.
	Run(ctx context.Context) error
	// UpdateShardRange makes shards the node's range, before or during Run. It returns when no work on other shards goes on.
	UpdateShardRange(ctx context.Context, shards descriptor.ShardRange) error
}

// Kind is one kind of nodes.
type Kind struct {
	// Name for Leases, metrics, logs and errors, for example "syncing". Lower-case letters, digits and dashes.
	Name string
	// Nodes of this kind in this process. Default 1.
	Nodes int
	// New returns a node for an API version, without a range. It is called when a node is granted shards, and again when it has failed.
	New func(version string) (Node, error)
	// Status, if there is any, returns what this process has to say of the kind to others: Status().Kinds[].Members[].Status there. It is asked at each renewal of the membership, which
	// waits for it: it must return at once.
	Status func() []byte
}

// Topology says when the topology is known: registry.Registry. No node does work before.
type Topology interface {
	WaitSynced(ctx context.Context) error
}

// Config says what a Manager runs.
type Config struct {
	Topology Topology
	// Ring is the number of shards; Version is the API version to start with.
	Ring    int
	Version string
	Kinds   []Kind
	// Membership defaults to being alone.
	Membership Membership
	// Fencer defaults to none, which is right for one process that is alone, and for tests.
	Fencer Fencer
	// WithClaim hands the epoch of a node's claim to what writes for it. It is called once for the context of each node's Run, which is
	// that of its UpdateShardRange too. epoch returns the epoch of now: it changes when the range does, and a write that was refused
	// under an epoch that is not the one of now is worth another try. Default: the context as it is.
	WithClaim func(ctx context.Context, epoch func() int64) context.Context
	// Settle is how long the leader waits for more new members before it gives shards to new ones, so that those that start together move
	// them once. Default 0.
	Settle time.Duration
	// CheckEvery is the time between looks at claims, and at what only time changes. Default 5 s.
	CheckEvery time.Duration
	// HandoverTimeout is how long a node may take to change its range before it is stopped and started again, and to stop before the
	// process gives up. Default 30 s.
	HandoverTimeout time.Duration
	// Metrics of the nodes are registered here while Run goes on. Default: nowhere.
	Metrics prometheus.Registerer
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Manager is the outer manager.
type Manager struct {
	cfg      Config
	metrics  *metrics
	requests chan request
	stopped  chan struct{} // closed when Run has returned

	mu      sync.Mutex
	version string
	replace chan struct{} // of the request that is being served, closed when it is done
	crew    *crew         // of the present membership; nil between two
}

type request struct {
	version string
	done    chan struct{}
}

// New returns a manager that runs nothing yet.
func New(cfg Config) (*Manager, error) {
	if cfg.Ring <= 0 || cfg.Version == "" || cfg.Topology == nil {
		return nil, fmt.Errorf("node manager: ring %d, version %q: want a topology, a ring of at least one shard and a version", cfg.Ring, cfg.Version)
	}
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default())
	cfg.CheckEvery, cfg.HandoverTimeout = cmp.Or(cfg.CheckEvery, 5*time.Second), cmp.Or(cfg.HandoverTimeout, 30*time.Second)
	if cfg.Fencer == nil {
		cfg.Fencer = noFence{}
	}
	if cfg.WithClaim == nil {
		cfg.WithClaim = func(ctx context.Context, _ func() int64) context.Context { return ctx }
	}
	if cfg.Membership == nil {
		alone, err := NewLocal(Timing{})
		if err != nil {
			return nil, err
		}
		cfg.Membership = alone.Member("alone")
	}
	return &Manager{cfg: cfg, version: cfg.Version, metrics: newMetrics(), requests: make(chan request), stopped: make(chan struct{})}, nil
}

// ErrStopped means that the manager does not run any more.
var ErrStopped = errors.New("the node manager has stopped")

// Run keeps the nodes going until ctx is done. Being told to stop is no error. A lost membership is none either: all nodes stop, and start
// again when the process has joined as a new member. ErrNotStopped is one after which the process must end. Run may be called once.
func (m *Manager) Run(ctx context.Context) error {
	defer close(m.stopped)
	if err := m.cfg.Topology.WaitSynced(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("node manager: %w", err)
	}
	if m.cfg.Metrics != nil {
		if err := m.cfg.Metrics.Register(m.metrics); err != nil {
			return fmt.Errorf("register metrics of nodes: %w", err)
		}
		defer m.cfg.Metrics.Unregister(m.metrics)
	}
	for ctx.Err() == nil {
		err := m.cfg.Membership.Run(ctx, m.serve)
		switch {
		case errors.Is(err, ErrNotStopped):
			return fmt.Errorf("node manager: %w", err)
		case ctx.Err() != nil:
		case errors.Is(err, ErrLost):
			m.cfg.Logger.WarnContext(ctx, "all nodes were stopped; joining as a new member", "error", err)
		case err != nil:
			return fmt.Errorf("node manager: %w", err)
		}
	}
	return nil
}

// Replace stops all nodes and then starts those of version. It returns once they are started, with ctx's error if that ends first, or with
// ErrStopped. Between two memberships it waits for the next one.
func (m *Manager) Replace(ctx context.Context, version string) error {
	r := request{version, make(chan struct{})}
	select {
	case m.requests <- r:
	case <-m.stopped:
		return ErrStopped
	case <-ctx.Done():
		return fmt.Errorf("replace nodes by those of %s: %w", version, ctx.Err())
	}
	select {
	case <-r.done:
		return nil
	case <-m.stopped:
		return ErrStopped
	case <-ctx.Done():
		return fmt.Errorf("replace nodes by those of %s: %w", version, ctx.Err())
	}
}

// serve is the manager as one member.
func (m *Manager) serve(ctx context.Context, s Session) error {
	c := newCrew(m, s)
	m.mu.Lock()
	m.crew = c
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.crew = nil
		m.mu.Unlock()
		m.metrics.reset()
	}()
	m.cfg.Logger.InfoContext(ctx, "joined", "member", s.Member())
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.listen(ctx) })
	g.Go(func() error { return c.lead(ctx) })
	g.Go(func() error { return m.keep(ctx, c) })
	result := make(chan error, 1)
	go func() { result <- g.Wait() }()
	select {
	case err := <-result:
		return err
	case <-s.Lost():
	}
	grace := time.NewTimer(s.Grace())
	defer grace.Stop()
	select {
	case err := <-result:
		return err
	case <-grace.C:
		return fmt.Errorf("%w: %w", ErrLost, ErrNotStopped)
	}
}

// keep keeps one inner set of nodes going, of one version after the other.
func (m *Manager) keep(ctx context.Context, c *crew) error {
	for ctx.Err() == nil {
		inner, cancel := context.WithCancel(ctx)
		g, inner := errgroup.WithContext(inner)
		m.mu.Lock()
		version, replaced := m.version, m.replace
		m.replace = nil
		m.mu.Unlock()
		for _, w := range c.workers {
			g.Go(func() error { return w.run(inner, version) })
		}
		if replaced != nil {
			close(replaced)
		}
		select {
		case r := <-m.requests:
			m.cfg.Logger.InfoContext(ctx, "replacing all nodes", "from_version", version, "to_version", r.version)
			m.mu.Lock()
			m.version, m.replace = r.version, r.done
			m.mu.Unlock()
		case <-inner.Done():
		}
		if ctx.Err() != nil {
			c.leave()
		}
		cancel()
		if err := g.Wait(); err != nil {
			return err
		}
	}
	c.left()
	return nil
}
