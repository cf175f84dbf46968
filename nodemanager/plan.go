package nodemanager

import (
	"strconv"

	"github.com/dbcontroller/db-controller/descriptor"
)

// NodeID names one node of a kind, for as long as its process is the same member. A process that joins again has nodes of new names.
type NodeID string

func nodeID(member string, index int) NodeID { return NodeID(member + "/" + strconv.Itoa(index)) }

// Plan says which nodes of one kind serve which shards. It is immutable: a change is a plan of a higher version.
type Plan struct {
	Version int64 `json:"version"`
	Ring    int   `json:"ring"`
	// Cause is why the targets are not what they were before: start, join, leave, death or ring.
	Cause string `json:"cause,omitempty"`
	// Nodes in order of their ID.
	Nodes []PlanNode `json:"nodes,omitempty"`
	// Draining are shards that have been taken from a node which may still work on them. Nobody else is granted them.
	Draining []Drain `json:"draining,omitempty"`
}

// PlanNode is what a plan gives a node.
type PlanNode struct {
	ID NodeID `json:"id"`
	// Target is what the node is to serve in the end; the targets cover the ring. Granted is the part of it that nobody else serves any
	// more: what the node may serve now.
	Target  descriptor.ShardRange `json:"target"`
	Granted descriptor.ShardRange `json:"granted"`
}

// Drain is over when the node has reported of plan Since, or a later one, and does not hold the shards; or when its member is dead.
type Drain struct {
	Node   NodeID                `json:"node"`
	Shards descriptor.ShardRange `json:"shards"`
	Since  int64                 `json:"since"`
}

// Node returns what the plan gives a node: nothing if it does not know it.
func (p Plan) Node(id NodeID) PlanNode {
	for _, n := range p.Nodes {
		if n.ID == id {
			return n
		}
	}
	return PlanNode{ID: id}
}

// Report is what a member says of its nodes of a kind.
type Report struct {
	Nodes []NodeReport `json:"nodes,omitempty"`
	// Leaving: the member is about to end, and wants no shards.
	Leaving bool `json:"leaving,omitempty"`
	// Status is what Session.Tell asks for: of the kind, for others to read. The node manager does not look at it.
	Status []byte `json:"status,omitempty"`
}

// NodeReport is what a node says of itself.
type NodeReport struct {
	ID NodeID `json:"id"`
	// Held is what it works on.
	Held descriptor.ShardRange `json:"held"`
	// Seen is the version of the last plan it knows of. It does not work any more on what that plan does not grant it, and may have begun
	// to work on what the plan grants without holding it yet.
	Seen int64 `json:"seen"`
	// Left: the node has stopped for good, and takes no grant any more.
	Left bool `json:"left,omitempty"`
}

func empty(r descriptor.ShardRange) bool { return r.From >= r.To }

func size(r descriptor.ShardRange) int { return max(0, int(r.To-r.From)) }

// intersect returns what both have; the zero range if that is nothing.
func intersect(a, b descriptor.ShardRange) descriptor.ShardRange {
	r := descriptor.ShardRange{From: max(a.From, b.From), To: min(a.To, b.To)}
	if empty(r) {
		return descriptor.ShardRange{}
	}
	return r
}

// subtract returns what a has and b has not.
func subtract(a, b descriptor.ShardRange) []descriptor.ShardRange {
	b = intersect(a, b)
	if empty(a) || a == b {
		return nil
	}
	if empty(b) {
		return []descriptor.ShardRange{a}
	}
	var rest []descriptor.ShardRange
	for _, r := range []descriptor.ShardRange{{From: a.From, To: b.From}, {From: b.To, To: a.To}} {
		if !empty(r) {
			rest = append(rest, r)
		}
	}
	return rest
}
