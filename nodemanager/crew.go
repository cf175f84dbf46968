package nodemanager

import (
	"context"
	"sync"
)

// crew are the nodes of a process while it is one member.
type crew struct {
	m       *Manager
	session Session
	workers []*worker

	mu      sync.Mutex
	changed chan struct{} // closed, and made anew, when views have changed
	leaving bool
	reports map[string][]NodeReport // by kind, in order of the workers
}

func newCrew(m *Manager, s Session) *crew {
	c := &crew{m: m, session: s, changed: make(chan struct{}), reports: map[string][]NodeReport{}}
	for _, k := range m.cfg.Kinds {
		for i := range max(1, k.Nodes) {
			id := nodeID(s.Member(), i)
			c.reports[k.Name] = append(c.reports[k.Name], NodeReport{ID: id})
			c.workers = append(c.workers, newWorker(c, k, i, id))
		}
		if k.Status != nil {
			s.Tell(k.Name, k.Status)
		}
		c.publish(k)
	}
	return c
}

// changes returns a channel that is closed at the next change of views. To be asked before looking.
func (c *crew) changes() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// listen passes changes on to whoever waits for them.
func (c *crew) listen(ctx context.Context) error {
	for {
		select {
		case <-c.session.Changes():
			c.mu.Lock()
			close(c.changed)
			c.changed = make(chan struct{})
			c.mu.Unlock()
		case <-ctx.Done():
			return nil
		}
	}
}

// report says what worker i of a kind does.
func (c *crew) report(k Kind, i int, r NodeReport) {
	c.mu.Lock()
	same := c.reports[k.Name][i] == r
	c.reports[k.Name][i] = r
	owned := 0
	for _, n := range c.reports[k.Name] {
		owned += size(n.Held)
	}
	c.mu.Unlock()
	c.m.metrics.owned.WithLabelValues(k.Name).Set(float64(owned))
	if !same {
		c.publish(k)
	}
}

func (c *crew) publish(k Kind) {
	c.mu.Lock()
	defer c.mu.Unlock() // reports in order
	c.session.Report(k.Name, Report{Nodes: append([]NodeReport(nil), c.reports[k.Name]...), Leaving: c.leaving})
}

// leave says that the nodes are about to stop; left that they have.
func (c *crew) leave() {
	c.mu.Lock()
	c.leaving = true
	c.mu.Unlock()
	c.publishAll()
}

func (c *crew) left() {
	c.mu.Lock()
	c.leaving = true
	for _, nodes := range c.reports {
		for i := range nodes {
			nodes[i].Left = true
		}
	}
	c.mu.Unlock()
	c.publishAll()
}

func (c *crew) publishAll() {
	for _, k := range c.m.cfg.Kinds {
		c.publish(k)
	}
}
