package nodemanager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

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
	// Name for logs and errors, for example "syncing".
	Name string
	// Nodes of this kind in this process. Default 1.
	Nodes int
	// New returns a node for an API version, without a range. It is called again when a node has failed.
	New func(version string) (Node, error)
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
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Manager is the outer manager.
type Manager struct {
	cfg      Config
	requests chan request
	stopped  chan struct{} // closed when Run has returned
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
	return &Manager{cfg: cfg, requests: make(chan request), stopped: make(chan struct{})}, nil
}

// ErrStopped means that the manager does not run any more.
var ErrStopped = errors.New("the node manager has stopped")

// Run keeps the nodes going until ctx is done. Being told to stop is no error. It may be called once.
func (m *Manager) Run(ctx context.Context) error {
	defer close(m.stopped)
	if err := m.cfg.Topology.WaitSynced(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("node manager: %w", err)
	}
	version := m.cfg.Version
	var replaced chan struct{}
	for ctx.Err() == nil {
		inner, cancel := context.WithCancel(ctx)
		var nodes sync.WaitGroup
		m.start(inner, version, &nodes)
		if replaced != nil {
			close(replaced)
			replaced = nil
		}
		select {
		case r := <-m.requests:
			m.cfg.Logger.InfoContext(ctx, "replacing all nodes", "from_version", version, "to_version", r.version)
			version, replaced = r.version, r.done
		case <-ctx.Done():
		}
		cancel()
		nodes.Wait()
	}
	return nil
}

// Replace stops all nodes and then starts those of version. It returns once they are started, with ctx's error if that ends first, or with
// ErrStopped.
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

// start is the inner manager: one goroutine for each node of each kind.
func (m *Manager) start(ctx context.Context, version string, nodes *sync.WaitGroup) {
	for _, k := range m.cfg.Kinds {
		for _, shards := range Split(m.cfg.Ring, max(1, k.Nodes)) {
			nodes.Go(func() { m.keep(ctx, k, version, shards) })
		}
	}
}

// A node that fails is made anew after a wait between these, doubling and with full jitter.
const (
	minRestart = time.Second
	maxRestart = time.Minute
)

// keep runs one node until ctx is done, a new one whenever it fails.
func (m *Manager) keep(ctx context.Context, k Kind, version string, shards descriptor.ShardRange) {
	for wait := minRestart; ; wait = min(2*wait, maxRestart) {
		err := runNode(ctx, k, version, shards)
		if ctx.Err() != nil {
			if err != nil && !errors.Is(err, context.Canceled) {
				m.cfg.Logger.WarnContext(ctx, "node did not stop cleanly", "kind", k.Name, "shards", shards.String(), "error", err)
			}
			return
		}
		m.cfg.Logger.ErrorContext(ctx, "node failed; starting it again", "kind", k.Name, "shards", shards.String(), "error", err)
		select {
		case <-time.After(rand.N(wait) + time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

func runNode(ctx context.Context, k Kind, version string, shards descriptor.ShardRange) error {
	n, err := k.New(version)
	if err != nil {
		return fmt.Errorf("make %s node of %s: %w", k.Name, version, err)
	}
	if err := n.UpdateShardRange(ctx, shards); err != nil {
		return fmt.Errorf("give %s node shards %s: %w", k.Name, shards, err)
	}
	if err := n.Run(ctx); err != nil {
		return fmt.Errorf("run %s node of shards %s: %w", k.Name, shards, err)
	}
	if ctx.Err() == nil {
		return fmt.Errorf("run %s node of shards %s: it returned without being told to", k.Name, shards)
	}
	return nil
}
