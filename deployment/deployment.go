// Package deployment opens one Deployment, one service in one region, and runs its parts: the store stack, the API server and the nodes.
//
// The parts may run in one process or in several on the same database. The walk through the code starts here:
//
//	Open     database, migrations, feed epoch; store stack: region on constraint on postgres; policies kept from the feed; the mixin of this Deployment and of the others
//	Server   the API server on a listener
//	Manage   the node managers: read copies of all other regions, and references; tombstones are purged
package deployment

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/apiserver"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/cache"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/region"
	"github.com/dbcontroller/db-controller/syncing"
)

// Config says which Deployment to open, and with what.
type Config struct {
	registry.Key
	// Registry must know the Deployment and its service: wait for it before Open.
	Registry *registry.Registry
	// DSN of the Deployment's database; never logged.
	DSN string
	// CacheURL is that of the Redis that answers reads of the API server in place of the database; never logged. Empty: there is no cache.
	CacheURL string
	// SearchURL is the connection string of the search store that the Deployment's spec.search says; never logged. Empty: there is no search.
	SearchURL string
	// TLS is the identity of the Deployment and the CAs that it trusts; nil is plain text on loopback, for development.
	TLS pki.Source
	// DialContext opens connections to other Deployments; nil is a plain dialer. Where others than this process's administrator declare Deployments, it should be
	// that of a dialguard.Guard.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
	// MaxShardsPerNode, AuditInterval and PurgeAfter are those of syncing.Config.
	MaxShardsPerNode int
	AuditInterval    time.Duration
	PurgeAfter       time.Duration
	// VerifyInterval is the time between two verifications of the same copies by content, in the background. 0 is DefaultVerifyInterval; negative is never.
	VerifyInterval time.Duration
	// PolicyRate is how many resources a second are changed because of a policy. 0 is syncing.DefaultUpdateRate; negative is no limit.
	PolicyRate int
	// Retention is how long tombstones are kept. A consumer of the change feed that is away for longer compares when it comes back. Default 24 h.
	Retention time.Duration
	// References has the times of references; zero values mean their defaults.
	References References
	// MaxConns bounds the connections to the database. Default 16.
	MaxConns int
	// Nodes is how many nodes of each kind the process runs. Default 1.
	Nodes int
	// Membership returns where the replicas that share the work on the shards of a Deployment meet, for the given kinds of nodes. Nil: there is no other replica.
	Membership func(of registry.Key, kinds []string) (nodemanager.Membership, error)
	// Settle is that of nodemanager.Config.
	Settle time.Duration
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// References are the times of references between Deployments.
type References struct {
	// TTL is how long a target is protected while a save that refers to it is under way. CallTimeout is the deadline of one call to another Deployment. As in
	// constraint.LayerConfig.
	TTL, CallTimeout time.Duration
	// The others are those of constraint.NodeConfig.
	Grace, GoneAfter, Debounce, ScanInterval, Resync, SweepAfter time.Duration
	Poll, DeleteRetry, Away, Reconnect                           constraint.Retry
}

// Deployment is an open Deployment.
type Deployment struct {
	cfg           Config
	spec          registry.Deployment
	log           *slog.Logger
	core          *postgres.Store
	constraints   *constraint.Store
	stack         *region.Store
	cache         *cache.Store // on top of stack, for the API server; nil without
	search        search.Store // nil without
	policy        *policy.Cache
	peers         *mixin.Peers
	mixin         *mixin.Server
	metrics       *prometheus.Registry
	purged        *prometheus.CounterVec // by kind
	nodes         *nodes                 // those that Manage runs
	verified      atomic.Pointer[[]postgres.Verified]
	servicePolicy servicePolicy
}

// Open opens the database, migrates it, and stacks the store's layers. Close it after Run has returned.
func Open(ctx context.Context, cfg Config) (*Deployment, error) {
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default())
	cfg.Retention = cmp.Or(cfg.Retention, 24*time.Hour)
	d := &Deployment{cfg: cfg, log: cfg.Logger.With("service", cfg.Service, "region", cfg.Region), metrics: prometheus.NewRegistry(), nodes: newNodes()}
	var ok bool
	if d.spec, ok = cfg.Registry.View().Deployment(cfg.Key); !ok {
		return nil, fmt.Errorf("open %s: no such Deployment is declared", cfg.Key)
	}
	if err := d.checkVersion(); err != nil {
		return nil, err
	}
	if cfg.TLS == nil && d.spec.TLS.Name != "" {
		return nil, fmt.Errorf("open %s: spec.tls names secret %s, which has not been given", cfg.Key, d.spec.TLS.Name)
	}

	var err error
	d.core, err = postgres.Open(ctx, postgres.Config{DSN: cfg.DSN, Service: cfg.Service, Region: cfg.Region, Version: d.spec.Version,
		Ring: d.spec.Ring, MaxConns: cfg.MaxConns, Logger: d.log})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", cfg.Key, err)
	}
	if err = d.stackUp(); err == nil {
		err = errors.Join(d.openPolicy(ctx), d.openCache(ctx))
	}
	if err == nil {
		d.openSearch(ctx)
		err = d.measure()
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("open %s: %w", cfg.Key, err)
	}
	return d, nil
}

// stackUp puts the layers of the store together. They refer to each other in one circle: the constraint layer reaches other Deployments and asks the region layer who owns a
// name; the mixin of this Deployment writes through the whole stack.
func (d *Deployment) stackUp() (err error) {
	cfg, self := d.cfg, store.Location{Service: d.cfg.Service, Region: d.cfg.Region}
	d.policy = policy.New(d.version, d.core, d.log)
	d.peers = mixin.NewPeers(mixin.PeersConfig{Service: cfg.Service, Region: cfg.Region, Version: d.spec.Version, Topology: cfg.Registry,
		TLS: cfg.TLS, DialContext: cfg.DialContext, Timeout: cfg.References.CallTimeout})
	d.constraints = constraint.Layer(d.core, constraint.LayerConfig{
		Self: self, Version: d.version, View: cfg.Registry.View, Core: d.core, Peers: d.peers,
		Owner: func(ctx context.Context, n descriptor.Name, batch []store.Write) (string, error) {
			return d.stack.Owner(ctx, n, batch)
		},
		TTL: cfg.References.TTL, CallTimeout: cfg.References.CallTimeout, Registerer: d.metrics, Logger: d.log,
	})
	d.stack = region.Layer(d.constraints, cfg.Region, d.version, d.policy)
	d.stack.Guard(d.census)
	d.mixin, err = mixin.NewServer(mixin.Config{Service: cfg.Service, Region: cfg.Region, Version: d.spec.Version, Topology: cfg.Registry,
		Core: d.core, Store: d.stack, Owners: d.stack, Policies: d.policy, Changes: d.core.Feed(), Holdings: d.holdings, ServicePolicy: d.ServicePolicy, Logger: d.log})
	if err != nil {
		return err
	}
	d.peers.SetLocal(d.mixin)
	return nil
}

// Close closes the connections to other Deployments and the database.
func (d *Deployment) Close() {
	if d.peers != nil {
		d.peers.Close()
	}
	if d.search != nil {
		d.search.Close()
	}
	d.core.Close()
}

// Store is the whole stack below the cache.
func (d *Deployment) Store() *region.Store { return d.stack }

// Core is the store on PostgreSQL, without the layers.
func (d *Deployment) Core() *postgres.Store { return d.core }

// Metrics of this Deployment alone: those of the process and of the registry are whoever's who runs it.
func (d *Deployment) Metrics() *prometheus.Registry { return d.metrics }

// Peers tells how far the copies of every other region are, whichever replica makes them: mergePeers. Empty where Manage does not run.
func (d *Deployment) Peers() []syncing.PeerStatus {
	all, _ := d.nodes.reports(kindSyncing)
	return mergePeers(d.spec.Ring, all)
}

func (d *Deployment) checkVersion() error {
	s, ok := d.cfg.Registry.View().Service(d.cfg.Service)
	if !ok {
		return fmt.Errorf("open %s: no ServiceDescriptor of %s is declared", d.cfg.Key, d.cfg.Service)
	}
	if s.Version(d.spec.Version) == nil {
		return fmt.Errorf("open %s: the ServiceDescriptor has no version %s", d.cfg.Key, d.spec.Version)
	}
	return nil
}

// version is the schema in force: edits of the descriptor apply live, those of its policy when they are taken.
func (d *Deployment) version() *descriptor.Version { return d.servicePolicy.apply(d.declared()) }

// declared is the schema as the registry has it.
func (d *Deployment) declared() *descriptor.Version {
	if s, ok := d.cfg.Registry.View().Service(d.cfg.Service); ok {
		if v := s.Version(d.spec.Version); v != nil {
			return v
		}
	}
	return noVersion
}

// noVersion has no types and no service.
var noVersion = new(descriptor.Version)

// Run runs what every process of a Deployment needs, change hints and fresh policies, and the given parts, until ctx is done or one of them fails.
func (d *Deployment) Run(ctx context.Context, parts ...func(context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.core.Run(ctx) })
	g.Go(func() error { return d.policy.Run(ctx, d.core.Feed()) })
	g.Go(func() error { return d.followPolicy(ctx) })
	for _, part := range parts {
		g.Go(func() error { return part(ctx) })
	}
	return g.Wait()
}

// Server returns the part that serves the API on l.
func (d *Deployment) Server(l net.Listener) (func(context.Context) error, error) {
	s, err := apiserver.New(apiserver.Config{
		Service: d.cfg.Service, Region: d.cfg.Region, Version: d.spec.Version,
		Store: d.served(), Owners: d.stack, Changes: d.core.Feed(), Replica: d.core, Topology: d.cfg.Registry, Mixin: d.mixin,
		Searcher: d.searcher(), Planner: d.constraints, Census: d.peers, ServicePolicy: d.ServicePolicy, Verifier: d.Verifier(),
		Explainer: &apiserver.Explainer{Policies: d.policy, Core: d.core, Peers: d.peers},
		TLS:       d.cfg.TLS, TrustDomain: d.spec.TrustDomain, DialContext: d.cfg.DialContext,
		Registerer: d.registerer(), Logger: d.log,
	})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		return d.withCache(ctx, func(ctx context.Context) error { return s.Run(ctx, l) })
	}, nil
}

// Manage is the part that runs the nodes and the housekeeping.
func (d *Deployment) Manage(ctx context.Context) error {
	kinds := append(d.searchKinds(),
		kind(d, kindConstraint, d.newConstraintNode, func(n *constraint.Node) nodeReport { return nodeReport{References: new(n.Health())} }),
		kind(d, kindSyncing, d.newNode, func(n *syncing.ControllerNode) nodeReport { return nodeReport{Peers: n.Status()} }),
		kind(d, kindPolicy, d.newMetaUpdater, func(u *syncing.MetaUpdater) nodeReport { return nodeReport{Policies: policies(u.Walks())} }))
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.manageNodes(ctx, kinds) })
	g.Go(func() error { return d.purge(ctx) })
	g.Go(func() error { return d.verifyCopies(ctx) })
	g.Go(func() error { return d.watchVerified(ctx) })
	return g.Wait()
}

func (d *Deployment) newConstraintNode(version string, metrics prometheus.Registerer) (*constraint.Node, error) {
	t := d.cfg.References
	return constraint.NewNode(constraint.NodeConfig{
		Service: d.cfg.Service, Region: d.cfg.Region, Version: version, Ring: d.spec.Ring, Registry: d.cfg.Registry, Core: d.core, Store: d.stack, Peers: d.peers,
		Grace: t.Grace, GoneAfter: t.GoneAfter, Debounce: t.Debounce, ScanInterval: t.ScanInterval, Resync: t.Resync, SweepAfter: t.SweepAfter, CallTimeout: t.CallTimeout,
		Poll: t.Poll, DeleteRetry: t.DeleteRetry, Away: t.Away, Reconnect: t.Reconnect, Metrics: metrics, Logger: d.log,
	})
}

func (d *Deployment) newNode(version string, metrics prometheus.Registerer) (*syncing.ControllerNode, error) {
	return syncing.NewControllerNode(syncing.Config{
		Service: d.cfg.Service, Region: d.cfg.Region, Version: version, Ring: d.spec.Ring,
		MaxShardsPerNode: d.cfg.MaxShardsPerNode, AuditInterval: d.cfg.AuditInterval, PurgeAfter: d.cfg.PurgeAfter,
		Registry: d.cfg.Registry, Target: d.core, Dial: d.source, Metrics: metrics, Logger: d.log,
	})
}

// holdings measures what is owned here under a policy.
func (d *Deployment) holdings(ctx context.Context, holder string, bytes bool) ([]store.Holding, map[string]float64, error) {
	owned, err := policy.Holdings(ctx, d.version(), d.core, holder, bytes)
	if err != nil {
		return nil, nil, err
	}
	measured, err := d.core.Rates(ctx)
	rates := make(map[string]float64, len(measured))
	for what, r := range measured {
		rates[what] = r.RowsPerSecond
	}
	return owned, rates, err
}

// newMetaUpdater returns the node that carries policies out for the resources owned here.
func (d *Deployment) newMetaUpdater(_ string, metrics prometheus.Registerer) (*syncing.MetaUpdater, error) {
	set := syncing.NewSyncingMetaSet(syncing.MetaSetConfig{
		Service: d.cfg.Service, Region: d.cfg.Region, Version: d.version, Holders: d.core, Changes: d.core.Feed(), Logger: d.log,
	})
	return syncing.NewMetaUpdater(syncing.MetaUpdaterConfig{
		Ring: d.spec.Ring, Set: set, Store: d.core, Rate: d.cfg.PolicyRate, Metrics: metrics, Logger: d.log,
		Labels: prometheus.Labels{"db_service": d.cfg.Service, "target_region": d.cfg.Region},
	})
}

// purgeBatch keeps the transactions of the purge short.
const purgeBatch = 1000

func (d *Deployment) purge(ctx context.Context) error {
	for {
		n, err := d.core.Purge(ctx, d.cfg.Retention, purgeBatch)
		fences, ferr := d.core.PurgeFences(ctx, d.cfg.Retention, purgeBatch)
		d.purged.WithLabelValues(purgedTombstones).Add(float64(n))
		d.purged.WithLabelValues(purgedFences).Add(float64(fences))
		if err := errors.Join(err, ferr); err != nil && ctx.Err() == nil {
			d.log.WarnContext(ctx, "tombstones and fences were not purged", "error", err)
		}
		if n == purgeBatch || fences == purgeBatch {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(min(d.cfg.Retention/10+time.Second, 10*time.Minute)):
		}
	}
}

// source connects to another Deployment's feed.
func (d *Deployment) source(peer registry.Deployment) (syncing.Source, error) {
	t := syncing.NewTransport(d.cfg.TLS, pki.Identity{TrustDomain: d.spec.TrustDomain, Service: peer.Service, Region: peer.Region}, d.cfg.DialContext)
	return syncing.NewSource(t, peer.Endpoint, syncing.Peer{Service: peer.Service, ForRegion: d.cfg.Region, OfRegion: peer.Region, Version: d.spec.Version, Ring: d.spec.Ring}), nil
}

// Status is what /statusz shows of a Deployment.
type Status struct {
	Service string               `json:"service"`
	Region  string               `json:"region"`
	Version string               `json:"version"`
	Peers   []syncing.PeerStatus `json:"peers"`
	// Policies that are being carried out for the resources owned here.
	Policies []PolicyStatus `json:"policies,omitempty"`
	// PolicyHeld says why the policy of the service that is declared is not in force.
	PolicyHeld []string `json:"policyHeld,omitempty"`
	// Search is nil without a search store.
	Search *SearchStatus `json:"search,omitempty"`
	// Shards says which replica works on which shards, by kind of nodes.
	Shards []nodemanager.KindStatus `json:"shards,omitempty"`
}

// PolicyStatus is how far a policy is carried out.
type PolicyStatus struct {
	// Holder is empty for the policy of the service.
	Holder    string    `json:"holder"`
	Total     int64     `json:"total"`
	Checked   int64     `json:"checked"`
	Changed   int64     `json:"changed"`
	Misplaced int64     `json:"misplaced,omitempty"`
	Since     time.Time `json:"since"`
	// Settling: all resources are right, and those written meanwhile by processes that did not know the policy yet are looked for.
	Settling bool `json:"settling,omitempty"`
}

func policies(walks []store.PolicyWalk) (all []PolicyStatus) {
	for _, w := range walks {
		all = append(all, PolicyStatus{
			Holder: w.Holder, Total: w.Total, Checked: w.Checked, Changed: w.Changed, Misplaced: w.Misplaced, Since: w.Started, Settling: w.Round > 1,
		})
	}
	return all
}

// Status returns the state of the Deployment for people and tools.
func (d *Deployment) Status() Status {
	s := Status{Service: d.cfg.Service, Region: d.cfg.Region, Version: d.spec.Version, Peers: d.Peers(), PolicyHeld: d.PolicyHeld(), Search: d.Search(), Shards: d.Shards()}
	walks, _ := d.nodes.reports(kindPolicy)
	for _, w := range walks {
		s.Policies = append(s.Policies, w.Policies...)
	}
	return s
}

// ServeHTTP serves h on l until ctx is done; calls in flight get five seconds to end.
func ServeHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stopped <- s.Shutdown(grace)
	}()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}
