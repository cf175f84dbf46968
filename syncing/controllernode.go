package syncing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Defaults of Config.
const (
	// DefaultMaxShardsPerNode cuts a full ring of 4096 into 2 streams per peer. The protocol's original cap of ten was a limit of one
	// database's IN filter; here a range of any width is one index scan, so the cut only sets how many streams run in parallel.
	DefaultMaxShardsPerNode = 2048
	DefaultAuditInterval    = 10 * time.Minute
	DefaultPurgeAfter       = 24 * time.Hour
)

// dropBatch is how many copies of a removed Deployment are dropped in one transaction.
const dropBatch = 1000

// Config says what a ControllerNode copies, from where and to where.
type Config struct {
	// Service and Region are the own Deployment; Version is the API version to copy, Ring the number of shards of the service.
	Service, Region string
	Version         string
	Ring            int
	// MaxShardsPerNode is the widest subrange that one stream serves. 0 is DefaultMaxShardsPerNode; negative is no limit.
	MaxShardsPerNode int
	// Registry tells which Deployments there are.
	Registry *registry.Registry
	// Target is the own database.
	Target Target
	// Dial returns the Source of a Deployment. It is called again when the Deployment's address or TLS settings, its suspension or the shard range
	// change, and with backoff while it fails.
	Dial func(registry.Deployment) (Source, error)
	// AuditInterval is how often live copies are compared by digest. 0 is DefaultAuditInterval; negative is never.
	AuditInterval time.Duration
	// PurgeAfter is how long copies outlive the removal of their owner's Deployment. 0 is DefaultPurgeAfter; negative is for ever. The time is counted
	// while the process runs.
	PurgeAfter time.Duration
	// Metrics, unless nil, holds the node's metrics while it runs.
	Metrics prometheus.Registerer
	// Clock defaults to time.Now.
	Clock func() time.Time
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	switch {
	case c.Service == "" || c.Region == "" || c.Version == "":
		return c, errors.New("syncing: service, region and version are required")
	case c.Ring <= 0:
		return c, fmt.Errorf("syncing: ring %d: want the number of shards of the service", c.Ring)
	case c.Registry == nil || c.Target == nil || c.Dial == nil:
		return c, errors.New("syncing: registry, target and dial are required")
	}
	c.MaxShardsPerNode = cmp.Or(c.MaxShardsPerNode, DefaultMaxShardsPerNode)
	c.AuditInterval = cmp.Or(c.AuditInterval, DefaultAuditInterval)
	c.PurgeAfter = cmp.Or(c.PurgeAfter, DefaultPurgeAfter)
	if c.Clock == nil {
		c.Clock = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	c.Logger = c.Logger.With("db_service", c.Service, "region", c.Region)
	return c, nil
}

// ControllerNode follows the other Deployments of its service for a range of shards. All methods may be called from any goroutine.
type ControllerNode struct {
	cfg     Config
	metrics *metrics

	mu      sync.Mutex
	shards  feed.Range
	ctx     context.Context // of Run; nil while it does not run
	view    *registry.View  // nil until the registry is synced
	peers   map[string]*peer
	known   map[string]bool               // foreign regions in the view, followed or not
	purges  map[string]context.CancelFunc // of regions that were known
	running sync.WaitGroup
}

// NewControllerNode returns a node that serves no shard yet.
func NewControllerNode(cfg Config) (*ControllerNode, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &ControllerNode{cfg: cfg, peers: map[string]*peer{}, purges: map[string]context.CancelFunc{}}
	c.metrics = newMetrics(c.Status)
	return c, nil
}

// Run follows the topology until ctx is done, and returns after everything it started has. Being told to stop is no error. It may be called once.
func (c *ControllerNode) Run(ctx context.Context) error {
	if c.cfg.Metrics != nil {
		reg := prometheus.WrapRegistererWith(prometheus.Labels{"db_service": c.cfg.Service, "target_region": c.cfg.Region, "kind": "copy"}, c.cfg.Metrics)
		if err := reg.Register(c.metrics); err != nil {
			return fmt.Errorf("register metrics of %s in %s: %w", c.cfg.Service, c.cfg.Region, err)
		}
		defer reg.Unregister(c.metrics)
	}
	known, err := c.copyOwners(ctx)
	if err != nil {
		return nil // told to stop
	}
	c.mu.Lock()
	c.ctx = ctx
	c.known = known
	c.mu.Unlock()
	for range c.cfg.Registry.Subscribe(ctx) {
		c.mu.Lock()
		c.view = c.cfg.Registry.View() // at least as new as the event
		c.reconcile()
		c.mu.Unlock()
	}
	c.mu.Lock() // no reconcile may start anything any more
	c.view = nil
	c.mu.Unlock()
	c.running.Wait()
	return nil
}

// copyOwners returns the regions of which there may be copies: one that was removed while no process ran must be missed, too. It waits for the own
// database as long as it must.
func (c *ControllerNode) copyOwners(ctx context.Context) (map[string]bool, error) {
	for retry := (backoff{}); ; {
		regions, err := c.cfg.Target.CopyOwners(ctx, c.cfg.Service)
		if err == nil {
			known := map[string]bool{}
			for _, r := range regions {
				known[r] = true
			}
			return known, nil
		}
		c.cfg.Logger.Warn("the owners of copies cannot be read yet", "error", err)
		if !retry.sleep(ctx) {
			return nil, ctx.Err()
		}
	}
}

// UpdateShardRange makes shards the range that the node serves, and returns when nothing works on other shards any more, or with ctx's error.
func (c *ControllerNode) UpdateShardRange(ctx context.Context, shards feed.Range) error {
	if shards.From < 0 || shards.From > shards.To || int(shards.To) > c.cfg.Ring {
		return fmt.Errorf("shard range %s does not fit a ring of %d", shards, c.cfg.Ring)
	}
	c.mu.Lock()
	c.shards = shards
	stopped := c.reconcile()
	c.mu.Unlock()
	for _, s := range stopped {
		select {
		case <-s:
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of work on other shards than %s: %w", shards, ctx.Err())
		}
	}
	return nil
}

// Status returns how well each peer is followed, ordered by region.
func (c *ControllerNode) Status() []PeerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]PeerStatus, 0, len(c.peers))
	for _, p := range c.peers {
		all = append(all, p.status())
	}
	slices.SortFunc(all, func(a, b PeerStatus) int { return strings.Compare(a.Region, b.Region) })
	return all
}

// reconcile makes the peers what the view and the shards ask for. It returns what is closed when nothing of the plans before runs any more. c.mu
// is held.
func (c *ControllerNode) reconcile() (stopped []<-chan struct{}) {
	if c.view == nil || c.ctx.Err() != nil {
		return nil
	}
	own, _ := c.view.Deployment(registry.Key{Service: c.cfg.Service, Region: c.cfg.Region})
	wanted := map[string]plan{}
	known := map[string]bool{}
	for _, d := range c.view.DeploymentsOf(c.cfg.Service) {
		if d.Region == c.cfg.Region {
			continue
		}
		known[d.Region] = true
		if !d.Disabled && !own.Disabled && c.shards.From < c.shards.To {
			wanted[d.Region] = plan{
				deployment: d,
				suspended:  own.Suspends(d.Region),
				ranges:     subranges(c.shards, c.cfg.MaxShardsPerNode),
			}
		}
	}
	for region, p := range c.peers {
		if _, ok := wanted[region]; !ok {
			stopped = append(stopped, p.stop())
			delete(c.peers, region)
			c.metrics.forget(region)
		}
	}
	for region := range c.known {
		if !known[region] {
			c.purgeLater(region)
		}
	}
	for region := range known {
		if cancel := c.purges[region]; cancel != nil {
			cancel() // it has come back
			delete(c.purges, region)
		}
	}
	c.known = known
	for region, plan := range wanted {
		p := c.peers[region]
		if p == nil {
			p = newPeer(&c.cfg, plan.deployment.Key, c.metrics)
			c.peers[region] = p
		}
		stopped = append(stopped, p.follow(c.ctx, plan, c.running.Go))
	}
	return stopped
}

// purgeLater drops the copies of a Deployment that has been removed, unless it comes back.
func (c *ControllerNode) purgeLater(region string) {
	if c.cfg.PurgeAfter < 0 {
		return
	}
	ctx, cancel := context.WithCancel(c.ctx)
	c.purges[region] = cancel
	log := c.cfg.Logger.With("source_region", region)
	c.running.Go(func() {
		defer cancel()
		select {
		case <-time.After(c.cfg.PurgeAfter):
		case <-ctx.Done():
			return
		}
		total := 0
		for retry := (backoff{}); ; {
			n, err := c.cfg.Target.DropCopies(ctx, c.cfg.Service, region, dropBatch)
			total += n
			switch {
			case err != nil && ctx.Err() == nil:
				log.Warn("copies of a removed Deployment are not dropped yet", "error", err)
				if !retry.sleep(ctx) {
					return
				}
			case err != nil:
				return
			case n == 0:
				log.Info("dropped the copies of a removed Deployment", "rows", total)
				return
			}
		}
	})
}

// subranges cuts shards at the multiples of width, so that a range that grows or shrinks keeps most of its subranges and their cursors.
func subranges(shards feed.Range, width int) []feed.Range {
	if width <= 0 {
		return []feed.Range{shards}
	}
	w := int32(min(width, 1<<30))
	var cut []feed.Range
	for from := shards.From; from < shards.To; {
		to := min((from/w+1)*w, shards.To)
		cut = append(cut, feed.Range{From: from, To: to})
		from = to
	}
	return cut
}
