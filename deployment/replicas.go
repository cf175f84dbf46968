package deployment

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/syncing"
)

// A Deployment's shards are divided among replicas. Each tells the others how its own nodes do, with its membership (nodemanager); what is shown of the Deployment is put together here.

// nodeReport is what one node tells of itself.
type nodeReport struct {
	// Shards that it works on.
	Shards descriptor.ShardRange `json:"shards"`
	// Peers is what a node that copies, or that fills the search store, says of whom it follows.
	Peers []syncing.PeerStatus `json:"peers,omitempty"`
	// Drift is what audits of the search store have found.
	Drift []syncing.Drift `json:"drift,omitempty"`
	// Policies that a node carries out.
	Policies []PolicyStatus `json:"policies,omitempty"`
	// References is what a node that works on references says of them.
	References *constraint.Health `json:"references,omitempty"`
}

// aged is a report as it arrived some time ago.
type aged struct {
	nodeReport
	age time.Duration
}

// readReports adds the nodes of a replica's report to all. A replica of another version, whose report cannot be read, counts as one that has not reported.
func readReports(all []aged, data []byte, age time.Duration) []aged {
	var nodes []nodeReport
	if json.Unmarshal(data, &nodes) != nil {
		return all
	}
	for _, n := range nodes {
		all = append(all, aged{n, max(0, age)})
	}
	return all
}

// mergePeers returns how a Deployment whose nodes report all follows its peers: clocks are the worst of any node's, as old as the report, and unknown (nil) if a node does not know
// them or nobody reports some shards of the ring; counts are sums; progress counts by shards.
func mergePeers(ring int, all []aged) []syncing.PeerStatus {
	covered := 0
	merged := map[string]syncing.PeerStatus{}
	known := map[string]int{} // shards whose nodes know the region
	for _, n := range all {
		shards := int(n.Shards.To - n.Shards.From)
		if shards <= 0 {
			continue
		}
		covered += shards
		for _, p := range n.Peers {
			known[p.Region] += shards
			p.ContactAge, p.Freshness, p.ApplyLag = older(p.ContactAge, n.age), older(p.Freshness, n.age), older(p.ApplyLag, n.age)
			p.Progress *= float64(shards) / float64(ring)
			if m, ok := merged[p.Region]; ok {
				p = mergePeer(m, p)
			}
			merged[p.Region] = p
		}
	}
	for region, p := range merged {
		if covered < ring || known[region] < covered {
			p.ContactAge, p.Freshness, p.ApplyLag = nil, nil, nil
			p.State = p.State.Worse(syncing.Connecting)
		}
		p.Progress = min(p.Progress, 1)
		merged[region] = p
	}
	return slices.SortedFunc(maps.Values(merged), func(a, b syncing.PeerStatus) int { return strings.Compare(a.Region, b.Region) })
}

func mergePeer(m, p syncing.PeerStatus) syncing.PeerStatus {
	m.State = m.State.Worse(p.State)
	m.ContactAge, m.Freshness, m.ApplyLag = worst(m.ContactAge, p.ContactAge), worst(m.Freshness, p.Freshness), worst(m.ApplyLag, p.ApplyLag)
	m.PendingRows += p.PendingRows
	m.RowsApplied += p.RowsApplied
	m.Quarantined += p.Quarantined
	m.Progress += p.Progress
	m.Remaining = worst(m.Remaining, p.Remaining)
	m.ClockOffset = cmp.Or(m.ClockOffset, p.ClockOffset)
	m.Suspended = m.Suspended || p.Suspended
	m.Throttled = cmp.Or(m.Throttled, p.Throttled)
	if p.LastErrorTime.After(m.LastErrorTime) {
		m.LastError, m.LastErrorTime = p.LastError, p.LastErrorTime
	}
	return m
}

// worst returns the longer of two times; one that is not known is worse than any.
func worst(a, b *time.Duration) *time.Duration {
	if a == nil || b == nil {
		return nil
	}
	return new(max(*a, *b))
}

// older adds the age of a report to a clock that it has. An apply lag of 0 says that there was nothing to apply.
func older(d *time.Duration, age time.Duration) *time.Duration {
	if d == nil || *d == 0 {
		return d
	}
	return new(*d + age)
}

// running is the nodes of one kind that run in this process. The zero value is ready for use.
type running struct {
	moves atomic.Int64 // how often shards came to a node

	mu      sync.Mutex
	nodes   []*runningNode
	numbers map[int]bool // those that tell the metrics of nodes apart
}

// runningNode is a node that is in its running while it runs.
type runningNode struct {
	nodemanager.Node
	in     *running
	report func() nodeReport

	mu     sync.Mutex
	shards descriptor.ShardRange
}

// track returns n, which reports with report, without its shards, while it runs.
func (r *running) track(n nodemanager.Node, report func() nodeReport) nodemanager.Node {
	return &runningNode{Node: n, in: r, report: report}
}

// UpdateShardRange implements nodemanager.Node.
func (n *runningNode) UpdateShardRange(ctx context.Context, shards descriptor.ShardRange) error {
	if err := n.Node.UpdateShardRange(ctx, shards); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if shards.From < shards.To && (shards.From < n.shards.From || shards.To > n.shards.To) {
		n.in.moves.Add(1)
	}
	n.shards = shards
	return nil
}

// Run implements nodemanager.Node.
func (n *runningNode) Run(ctx context.Context) error {
	n.in.mu.Lock()
	n.in.nodes = append(n.in.nodes, n)
	n.in.mu.Unlock()
	defer func() {
		n.in.mu.Lock()
		defer n.in.mu.Unlock()
		n.in.nodes = slices.DeleteFunc(n.in.nodes, func(o *runningNode) bool { return o == n })
	}()
	return n.Node.Run(ctx)
}

// reports returns what the nodes that have shards tell.
func (r *running) reports() []nodeReport {
	r.mu.Lock()
	nodes := slices.Clone(r.nodes)
	r.mu.Unlock()
	all := []nodeReport{}
	for _, n := range nodes {
		n.mu.Lock()
		shards := n.shards
		n.mu.Unlock()
		if shards.From < shards.To {
			report := n.report()
			report.Shards = shards
			all = append(all, report)
		}
	}
	return all
}
