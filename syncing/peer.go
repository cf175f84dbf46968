package syncing

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

const (
	pingInterval = 2 * time.Second
	// quarantineInterval is how often the quarantine is counted.
	quarantineInterval = 10 * time.Second
)

// peer is one foreign Deployment of the service. It outlives its links, so the clocks go on when its address changes.
type peer struct {
	cfg   *Config
	key   registry.Key
	log   *slog.Logger
	clock pairClock

	metrics     *metrics
	propagation prometheus.Observer
	retries     prometheus.Counter
	applied     atomic.Int64
	quarantined atomic.Int64
	epoch       atomic.Int64 // of the owner, as the stream that was opened last has learned it

	mu      sync.Mutex
	link    *link
	nodes   map[feed.Range]*remoteNode
	lastErr error
	errTime time.Time
}

// link is the present attempt to follow a peer. Any change of its plan replaces it.
type link struct {
	plan   plan
	cancel context.CancelFunc
	done   chan struct{}
}

// plan says how to follow a peer.
type plan struct {
	deployment registry.Deployment
	suspended  bool
	ranges     []feed.Range
}

// same says whether a link of p also serves o. Of the Deployment, only what Dial may look at matters.
func (p plan) same(o plan) bool {
	a, b := p.deployment, o.deployment
	if a.Endpoint != b.Endpoint || a.TrustDomain != b.TrustDomain || a.TLS != b.TLS || a.Ring != b.Ring || a.Namespace != b.Namespace ||
		p.suspended != o.suspended || len(p.ranges) != len(o.ranges) {
		return false
	}
	for i := range p.ranges {
		if p.ranges[i] != o.ranges[i] {
			return false
		}
	}
	return true
}

func newPeer(cfg *Config, key registry.Key, m *metrics) *peer {
	p := &peer{cfg: cfg, key: key, log: cfg.Logger.With("source_region", key.Region), metrics: m, nodes: map[feed.Range]*remoteNode{}}
	m.follow(key.Region)
	p.propagation = m.propagation.WithLabelValues(key.Region)
	p.retries = m.retries.WithLabelValues(key.Region)
	return p
}

// follow makes next the plan of the peer and returns what is closed when nothing of another plan runs any more.
func (p *peer) follow(ctx context.Context, next plan, start func(func())) <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	stopped := make(chan struct{})
	if p.link == nil {
		close(stopped)
	} else {
		if p.link.plan.same(next) {
			close(stopped)
			return stopped
		}
		p.link.cancel()
		stopped = p.link.done
	}
	nodes := map[feed.Range]*remoteNode{}
	for _, r := range next.ranges {
		if nodes[r] = p.nodes[r]; nodes[r] == nil {
			nodes[r] = newRemoteNode(p, r)
		}
	}
	p.nodes = nodes
	ctx, cancel := context.WithCancel(ctx)
	l := &link{plan: next, cancel: cancel, done: make(chan struct{})}
	p.link = l
	before := stopped
	start(func() {
		defer close(l.done)
		<-before // the nodes that stay must not run twice
		p.run(ctx, next, nodes)
	})
	return stopped
}

// stop ends the link and returns what is closed when nothing runs any more.
func (p *peer) stop() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.link.cancel()
	return p.link.done
}

// run dials and keeps the nodes going until ctx is done.
func (p *peer) run(ctx context.Context, plan plan, nodes map[feed.Range]*remoteNode) {
	source, ok := p.dial(ctx, plan.deployment)
	if !ok {
		return
	}
	defer source.Close()
	p.ping(ctx, source) // so that the first frame's age is known
	var running sync.WaitGroup
	defer running.Wait()
	for _, n := range nodes {
		if plan.suspended {
			n.enter(Suspended)
			continue
		}
		running.Go(func() { n.run(ctx, source) })
	}
	running.Go(func() { p.watchQuarantine(ctx) })
	p.keepContact(ctx, source)
}

func (p *peer) dial(ctx context.Context, d registry.Deployment) (Source, bool) {
	for retry := (backoff{}); ; {
		source, err := p.cfg.Dial(d)
		if err == nil {
			return source, true
		}
		p.failed(&SourceError{Unreachable, "dial", err})
		p.log.Warn("peer cannot be dialed", "error", err)
		if !retry.sleep(ctx) {
			return nil, false
		}
	}
}

// keepContact pings until ctx is done.
func (p *peer) keepContact(ctx context.Context, source Source) {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.ping(ctx, source)
		case <-ctx.Done():
			return
		}
	}
}

func (p *peer) ping(ctx context.Context, source Source) {
	sent := p.cfg.Clock()
	t, err := source.Ping(ctx)
	switch {
	case err == nil:
		p.clock.ping(sent, p.cfg.Clock(), t)
	case ctx.Err() == nil:
		p.failed(err)
	}
}

// watchQuarantine counts the rows that could not be applied. It stays apart from the pings, which a slow local database must not delay.
func (p *peer) watchQuarantine(ctx context.Context) {
	tick := time.NewTicker(quarantineInterval)
	defer tick.Stop()
	for {
		_, total, err := p.cfg.Target.Quarantine(ctx, p.key.Region, 1)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			p.failed(fmt.Errorf("count the quarantine of %s: %w", p.key.Region, err))
		default:
			p.quarantined.Store(int64(total))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (p *peer) failed(err error) {
	p.metrics.errors.WithLabelValues(p.key.Region, string(reasonOf(err))).Inc()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lastErr, p.errTime = err, p.cfg.Clock()
}

func (p *peer) count(op string, m postgres.Merged, bytes int) {
	p.applied.Add(int64(m.Applied))
	p.quarantined.Add(int64(m.Quarantined)) // until it is counted again
	p.metrics.quarantined.WithLabelValues(p.key.Region).Add(float64(m.Quarantined))
	p.metrics.rows.WithLabelValues(p.key.Region, op).Add(float64(m.Applied))
	p.metrics.bytes.WithLabelValues(p.key.Region).Add(float64(bytes))
}

func (p *peer) audited(shards feed.Range, mismatched int) {
	p.metrics.mismatched.WithLabelValues(p.key.Region, shards.String()).Set(float64(mismatched))
}

// status reads the clocks of the pair.
func (p *peer) status() PeerStatus {
	now := p.cfg.Clock()
	p.mu.Lock()
	defer p.mu.Unlock()
	s := PeerStatus{
		Service: p.key.Service, Region: p.key.Region, State: Live, Progress: 1,
		RowsApplied: p.applied.Load(), Quarantined: p.quarantined.Load(), Suspended: p.link.plan.suspended,
	}
	p.clock.mu.Lock()
	s.ContactAge = age(p.clock.contact, now)
	if p.clock.measured {
		s.ClockOffset = new(p.clock.offset)
	}
	p.clock.mu.Unlock()

	first := true
	var all lags
	done := worst{share: 1}
	for _, n := range p.nodes {
		l, state, share, remaining := n.reading(now)
		if first {
			all, first = l, false
		} else {
			all = all.worse(l)
		}
		if why := n.throttle(); why != "" {
			s.Throttled = why
		}
		if badness[state] > badness[s.State] {
			s.State = state
		}
		done.add(share, remaining)
	}
	s.Progress, s.Remaining = done.share, done.remaining
	s.Freshness, s.ApplyLag, s.PendingRows = all.freshness, all.apply, all.pending
	if p.lastErr != nil && s.State != Live {
		s.LastError, s.LastErrorTime = p.lastErr.Error(), p.errTime
	}
	return s
}
