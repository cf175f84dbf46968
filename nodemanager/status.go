package nodemanager

import (
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
)

// Status is what a process knows of its ring. It may be of a moment ago.
type Status struct {
	// Member is the ID of this process; empty while it is not a member.
	Member string       `json:"member,omitempty"`
	Kinds  []KindStatus `json:"kinds,omitempty"`
}

// KindStatus is the state of a kind of nodes.
type KindStatus struct {
	Kind string `json:"kind"`
	// Ring is the number of shards. Owned of them living nodes work on; Unowned is the rest.
	Ring    int `json:"ring"`
	Owned   int `json:"owned"`
	Unowned int `json:"unowned"`
	// PlanVersion is that of the plan in force, 0 if there is none; Leader the ID of the member that makes the plans, empty if unknown.
	PlanVersion int64          `json:"planVersion"`
	Leader      string         `json:"leader,omitempty"`
	Members     []MemberStatus `json:"members,omitempty"`
	Draining    []Drain        `json:"draining,omitempty"`
}

// MemberStatus is the state of a process.
type MemberStatus struct {
	ID      string       `json:"id"`
	Alive   bool         `json:"alive"`
	Leaving bool         `json:"leaving,omitempty"`
	Nodes   []NodeStatus `json:"nodes,omitempty"`
	// Status is what Kind.Status returned there at Heard, by the clock here; the zero time says that it may be of long before.
	Status []byte    `json:"status,omitempty"`
	Heard  time.Time `json:"heard,omitzero"`
}

// NodeStatus is the state of a node.
type NodeStatus struct {
	ID NodeID `json:"id"`
	// Held is what it works on, Granted what it may work on, Target what it is to work on in the end.
	Held    descriptor.ShardRange `json:"held"`
	Granted descriptor.ShardRange `json:"granted"`
	Target  descriptor.ShardRange `json:"target"`
	// Seen is the version of the last plan it has acted on.
	Seen int64 `json:"seen"`
}

// Status returns what the process knows of its ring.
func (m *Manager) Status() Status {
	m.mu.Lock()
	c := m.crew
	m.mu.Unlock()
	if c == nil {
		return Status{}
	}
	s := Status{Member: c.session.Member()}
	for _, k := range m.cfg.Kinds {
		v := c.session.View(k.Name)
		has := owned(m.cfg.Ring, v)
		ks := KindStatus{
			Kind: k.Name, Ring: m.cfg.Ring, Owned: has, Unowned: m.cfg.Ring - has,
			PlanVersion: v.Plan.Version, Leader: v.Leader, Draining: v.Plan.Draining,
		}
		for _, member := range v.Members {
			ms := MemberStatus{ID: member.ID, Alive: member.Alive, Leaving: member.Leaving, Status: member.Status, Heard: member.Heard}
			for _, n := range member.Nodes {
				p := v.Plan.Node(n.ID)
				ms.Nodes = append(ms.Nodes, NodeStatus{n.ID, n.Held, p.Granted, p.Target, n.Seen})
			}
			ks.Members = append(ks.Members, ms)
		}
		s.Kinds = append(s.Kinds, ks)
	}
	return s
}

// owned is the number of shards that living nodes work on.
func owned(ring int, v View) int {
	has, n := make([]bool, ring), 0
	for _, m := range v.Members {
		if !m.Alive {
			continue
		}
		for _, r := range m.Nodes {
			for i := max(0, r.Held.From); i < min(r.Held.To, int32(ring)); i++ {
				if !has[i] {
					has[i] = true
					n++
				}
			}
		}
	}
	return n
}
