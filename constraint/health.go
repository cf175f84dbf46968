package constraint

import (
	"cmp"
	"slices"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

// Health says how the references of a node's shards are, as far as the node has read what is to be done.
type Health struct {
	// Dangling is how many committed references were found to point to nothing since the node was made. It must be 0.
	Dangling int64 `json:"dangling,omitempty"`
	// Cascading is how many deleted resources there are of which others must still be told.
	Cascading int `json:"cascading,omitempty"`
	// Refused is how many deletions that nobody waits for are refused, because something refers to the resource. They are tried again.
	Refused int `json:"refused,omitempty"`
	// Oldest is the age of the oldest work that should have been done, and OldestKind its kind; 0 without any. A deletion that is refused is as it should
	// be, and so is a cascade that waits while there is one.
	Oldest     time.Duration `json:"oldest,omitempty"`
	OldestKind string        `json:"oldestKind,omitempty"`
	// Unreachable are the Deployments that work waits for, in order.
	Unreachable []store.Location `json:"unreachable,omitempty"`
}

// Health returns the present state. It may be called from any goroutine and asks no database.
func (n *Node) Health() Health {
	n.mu.Lock()
	s := n.work
	n.mu.Unlock()
	var jobs []pendingJob
	var away []store.Location
	if s != nil {
		jobs = s.pending()
		s.jobsMu.Lock()
		for at := range s.unwell {
			away = append(away, at)
		}
		s.jobsMu.Unlock()
	}
	h := healthOf(jobs, time.Now())
	h.Dangling = n.metrics.danglings.Load()
	slices.SortFunc(away, func(a, b store.Location) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Region, b.Region))
	})
	h.Unreachable = away
	return h
}

// healthOf judges the work that is pending.
func healthOf(jobs []pendingJob, now time.Time) Health {
	var h Health
	for _, j := range jobs {
		switch j.kind {
		case jobDelete:
			h.Refused++
		case jobDrain:
			h.Cascading++
		}
	}
	for _, j := range jobs {
		if j.kind == jobDelete || h.Refused > 0 && (j.kind == jobDrain || j.kind == jobHandle) {
			continue
		}
		if age := now.Sub(j.since); age > h.Oldest {
			h.Oldest, h.OldestKind = age.Truncate(time.Second), string(j.kind)
		}
	}
	return h
}
