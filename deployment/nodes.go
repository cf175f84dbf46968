package deployment

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Kinds of nodes. Each divides the shards among the replicas by itself.
const (
	kindSearch     = "search"
	kindConstraint = "constraint"
	kindSyncing    = "syncing"
	kindPolicy     = "policy"
)

// fencer makes the database of the Deployment the judge of who may write for shards.
type fencer struct{ *postgres.Store }

// Raise implements nodemanager.Fencer.
func (f fencer) Raise(ctx context.Context, kind string, shards descriptor.ShardRange, plan int64, holder string) (int64, error) {
	epoch, err := f.Store.Raise(ctx, kind, shards, plan, holder)
	if errors.Is(err, store.ErrStalePlan) {
		return 0, fmt.Errorf("%w: %w", nodemanager.ErrStalePlan, err)
	}
	return epoch, err
}

// nodes is what Manage runs of a Deployment.
type nodes struct {
	kinds map[string]*running

	mu      sync.Mutex
	manager *nodemanager.Manager // nil while Manage does not run
}

func newNodes() *nodes {
	n := &nodes{kinds: map[string]*running{}}
	for _, kind := range []string{kindSearch, kindConstraint, kindSyncing, kindPolicy} {
		n.kinds[kind] = &running{}
	}
	return n
}

// kind is a kind of nodes that report with report.
func kind[N nodemanager.Node](d *Deployment, name string, make func(version string, metrics prometheus.Registerer) (N, error), report func(N) nodeReport) nodemanager.Kind {
	r := d.nodes.kinds[name]
	count := max(1, d.cfg.Nodes)
	k := nodemanager.Kind{
		Name: name, Nodes: count,
		New: func(version string) (nodemanager.Node, error) {
			n, err := make(version, r.registerer(d.metrics, count))
			if err != nil {
				return nil, err
			}
			return r.track(n, func() nodeReport { return report(n) }), nil
		},
	}
	k.Status = func() []byte {
		data, err := json.Marshal(r.reports())
		if err != nil {
			d.log.Error("the report of nodes for other replicas cannot be encoded", "kind", name, "error", err)
		}
		return data
	}
	return k
}

// manageNodes runs the nodes of the kinds.
func (d *Deployment) manageNodes(ctx context.Context, kinds []nodemanager.Kind) error {
	cfg := nodemanager.Config{
		Topology: d.cfg.Registry, Ring: d.spec.Ring, Version: d.spec.Version, Kinds: kinds, Fencer: fencer{d.core}, WithClaim: store.WithClaim, Settle: d.cfg.Settle,
		Metrics: d.registerer(), Logger: d.log,
	}
	if d.cfg.Membership != nil {
		var names []string
		for _, k := range kinds {
			names = append(names, k.Name)
		}
		var err error
		if cfg.Membership, err = d.cfg.Membership(d.cfg.Key, names); err != nil {
			return fmt.Errorf("join the replicas of %s: %w", d.cfg.Key, err)
		}
	}
	m, err := nodemanager.New(cfg)
	if err != nil {
		return err
	}
	d.nodes.set(m)
	defer d.nodes.set(nil)
	return m.Run(ctx)
}

func (n *nodes) set(m *nodemanager.Manager) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.manager = m
}

// status returns what is known of the replicas; the zero value where no nodes run.
func (n *nodes) status() nodemanager.Status {
	n.mu.Lock()
	m := n.manager
	n.mu.Unlock()
	if m == nil {
		return nodemanager.Status{}
	}
	return m.Status()
}

// reports returns what the nodes of a kind say of themselves, in all living replicas, and how many shards of the ring they work on.
func (n *nodes) reports(kind string) (all []aged, owned int) {
	s, now := n.status(), time.Now()
	for _, k := range s.Kinds {
		if k.Kind != kind {
			continue
		}
		owned = k.Owned
		for _, m := range k.Members {
			switch {
			case m.ID == s.Member:
				for _, r := range n.kinds[kind].reports() {
					all = append(all, aged{r, 0})
				}
			case m.Alive && !m.Heard.IsZero():
				all = readReports(all, m.Status, now.Sub(m.Heard))
			}
		}
	}
	return all, owned
}

// Shards says how the shards of a Deployment are divided among its replicas, by kind of nodes; nil where no nodes run.
func (d *Deployment) Shards() []nodemanager.KindStatus {
	kinds := d.nodes.status().Kinds
	for _, k := range kinds {
		for i := range k.Members {
			k.Members[i].Status = nil // it has been put together with those of others
		}
	}
	return kinds
}

// OwnedShards is how many shards of the ring living replicas copy.
func (d *Deployment) OwnedShards() int {
	_, owned := d.nodes.reports(kindSyncing)
	return owned
}

// ShardMoves returns how often shards have come to a node of this process since Open.
func (d *Deployment) ShardMoves() (moves int64) {
	for _, r := range d.nodes.kinds {
		moves += r.moves.Load()
	}
	return moves
}

// FencedWrites returns how many writes of nodes the database has refused, since Open, because their claim on shards had been revoked.
func (d *Deployment) FencedWrites() int64 { return d.core.Fenced() }

// fencedWrites is the metric of FencedWrites.
func (d *Deployment) fencedWrites() prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "dbcontroller_fenced_writes_total",
		Help: "Statements of nodes that the database refused because their claim on shards had been revoked. A few are normal while shards move.",
	}, func() float64 { return float64(d.core.Fenced()) })
}

// registerer takes the metrics of a node. Where a process has several nodes of a kind, the label node_number tells their series apart: the lowest number that is free while the node runs.
func (r *running) registerer(parent prometheus.Registerer, nodes int) prometheus.Registerer {
	if nodes <= 1 {
		return parent
	}
	return &numbered{parent: parent, in: r}
}

// numbered is a Registerer with a number of its own while it has collectors. One goroutine uses it.
type numbered struct {
	parent prometheus.Registerer
	in     *running
	number int
	count  int // of collectors
}

func (r *numbered) wrapped() prometheus.Registerer {
	return prometheus.WrapRegistererWith(prometheus.Labels{"node_number": fmt.Sprint(r.number)}, r.parent)
}

// Register implements prometheus.Registerer.
func (r *numbered) Register(c prometheus.Collector) error {
	if r.count == 0 {
		r.number = r.in.take()
	}
	err := r.wrapped().Register(c)
	if err == nil {
		r.count++
	} else if r.count == 0 {
		r.in.give(r.number)
	}
	return err
}

// MustRegister implements prometheus.Registerer.
func (r *numbered) MustRegister(all ...prometheus.Collector) {
	for _, c := range all {
		if err := r.Register(c); err != nil {
			panic(err)
		}
	}
}

// Unregister implements prometheus.Registerer.
func (r *numbered) Unregister(c prometheus.Collector) bool {
	if r.count == 0 || !r.wrapped().Unregister(c) {
		return false
	}
	if r.count--; r.count == 0 {
		r.in.give(r.number)
	}
	return true
}

// take returns the lowest number that is free.
func (r *running) take() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	for n := 0; ; n++ {
		if !r.numbers[n] {
			if r.numbers == nil {
				r.numbers = map[int]bool{}
			}
			r.numbers[n] = true
			return n
		}
	}
}

func (r *running) give(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.numbers, n)
}
