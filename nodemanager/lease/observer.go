package lease

import (
	"cmp"
	"encoding/json"
	"slices"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"

	"github.com/dbcontroller/db-controller/nodemanager"
)

// observer turns what the watch says into views. It is told the time.
type observer struct {
	self     string // the ID of this member
	clock    string // the name of the one of its Leases that is the clock
	duration time.Duration

	mu      sync.Mutex
	members map[string]*seenMember // by name of their Lease
	plans   map[string]*seenPlan   // by kind
	// Our own renewals of one Lease as they came through the watch, the last and the one before. Everything that happened before the one before has been
	// seen by now, also when the watch has been made anew in between and told what there is in any order.
	latest, before time.Time
}

// seenMember is a member's Lease.
type seenMember struct {
	id, kind string
	report   nodemanager.Report
	renewed  string        // what changes with each renewal
	changed  time.Time     // when it was seen to
	heard    time.Time     // the same, but zero if that may have happened long before
	duration time.Duration // until it is dead, from then
	lease    *coordinationv1.Lease
	gone     bool // the Lease has been deleted
}

// seenPlan is a plan's Lease.
type seenPlan struct {
	plan    nodemanager.Plan // none if it cannot be read, or is older than one we have seen
	highest int64
	lease   *coordinationv1.Lease // nil if there is none
	version string                // resourceVersion of what is known
}

func newObserver(self, clock string, duration time.Duration) *observer {
	return &observer{self: self, clock: clock, duration: duration, members: map[string]*seenMember{}, plans: map[string]*seenPlan{}}
}

// see takes a Lease in, and says whether it says anything new besides that its holder lives, and how.
func (o *observer) see(l *coordinationv1.Lease, deleted bool, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch l.Labels[labelRole] {
	case roleMember:
		return o.seeMember(l, deleted, now)
	case rolePlan:
		return o.seePlan(l, deleted)
	}
	return false
}

func (o *observer) seeMember(l *coordinationv1.Lease, deleted bool, now time.Time) bool {
	was := o.members[l.Name]
	if deleted {
		switch {
		case was == nil:
			return false
		case was.report.Leaving: // a clean end
			delete(o.members, l.Name)
		default: // by hand, perhaps: it counts as alive for as long as it would have
			was.gone = true
		}
		return true
	}
	m := &seenMember{kind: l.Labels[labelKind], duration: o.duration, changed: now, lease: l}
	if l.Spec.HolderIdentity != nil {
		m.id = *l.Spec.HolderIdentity
	}
	if l.Spec.RenewTime != nil {
		m.renewed = l.Spec.RenewTime.String()
	}
	if s := l.Spec.LeaseDurationSeconds; s != nil && *s > 0 {
		m.duration = time.Duration(*s) * time.Second
	}
	if err := json.Unmarshal([]byte(l.Annotations[annotationReport]), &m.report); err != nil {
		m.report = nodemanager.Report{} // not ours; the member writes it again
	}
	switch {
	case was != nil && was.id == m.id && was.renewed == m.renewed:
		m.changed, m.heard = was.changed, was.heard
	case now.Sub(o.before) <= o.duration: // the watch is not made anew, for it has told of our own renewals just now
		m.heard = now
	}
	o.members[l.Name] = m
	if m.id == o.self && l.Name == o.clock && (was == nil || was.renewed != m.renewed) {
		o.before, o.latest = o.latest, now
	}
	return was == nil || was.gone || was.id != m.id || was.report.Leaving != m.report.Leaving || !slices.Equal(was.report.Nodes, m.report.Nodes)
}

func (o *observer) seePlan(l *coordinationv1.Lease, deleted bool) bool {
	kind := l.Labels[labelKind]
	p := o.plans[kind]
	if p == nil {
		p = &seenPlan{}
		o.plans[kind] = p
	}
	if p.version != "" {
		// The watch may tell of something older than what we have written ourselves.
		if order, err := resourceversion.CompareResourceVersion(l.ResourceVersion, p.version); err == nil && order < 0 {
			return false
		}
	}
	was := p.plan.Version
	p.version, p.lease, p.plan = l.ResourceVersion, l, nodemanager.Plan{}
	if deleted {
		p.lease = nil
		return was != 0
	}
	var plan nodemanager.Plan
	if err := json.Unmarshal([]byte(l.Annotations[annotationPlan]), &plan); err == nil && plan.Version >= p.highest {
		p.plan, p.highest = plan, plan.Version
	}
	return p.plan.Version != was
}

// planGone notes that the plan's Lease is not there, whatever the watch says yet.
func (o *observer) planGone(kind string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if p := o.plans[kind]; p != nil {
		p.lease, p.plan = nil, nodemanager.Plan{}
	}
}

// planLease returns the Lease of the plan and the version of the plan in it, 0 if it has none that is good.
func (o *observer) planLease(kind string) (*coordinationv1.Lease, int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if p := o.plans[kind]; p != nil {
		return p.lease, p.plan.Version
	}
	return nil, 0
}

// alive says whether a member is, by the clock that our own renewals are. With mu held.
func (o *observer) alive(m *seenMember) bool {
	return m.id == o.self || o.before.Sub(m.changed) <= m.duration
}

// view returns what is known of a kind, without who leads.
func (o *observer) view(kind string) nodemanager.View {
	o.mu.Lock()
	defer o.mu.Unlock()
	var v nodemanager.View
	if p := o.plans[kind]; p != nil {
		v.Plan = p.plan
	}
	for name, m := range o.members {
		alive := o.alive(m)
		if m.gone && !alive {
			delete(o.members, name)
			continue
		}
		if m.kind == kind && m.id != "" {
			v.Members = append(v.Members, nodemanager.Member{ID: m.id, Alive: alive, Heard: m.heard, Report: m.report})
		}
	}
	slices.SortFunc(v.Members, func(a, b nodemanager.Member) int { return cmp.Compare(a.ID, b.ID) })
	return v
}

// living returns how many members are alive, which time alone changes.
func (o *observer) living() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for _, m := range o.members {
		if o.alive(m) {
			n++
		}
	}
	return n
}

// longDead returns the Leases of members that have been dead for a while.
func (o *observer) longDead() []*coordinationv1.Lease {
	o.mu.Lock()
	defer o.mu.Unlock()
	var dead []*coordinationv1.Lease
	for _, m := range o.members {
		if !m.gone && m.id != o.self && o.before.Sub(m.changed) > 4*m.duration {
			dead = append(dead, m.lease)
		}
	}
	return dead
}
