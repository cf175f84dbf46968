package nodemanager

import (
	"context"
	"errors"
	"time"
)

// lead makes the plans while this member is the leader.
func (c *crew) lead(ctx context.Context) error {
	leads := map[string]*leadership{}
	for _, k := range c.m.cfg.Kinds {
		leads[k.Name] = &leadership{crew: c, kind: k.Name, since: map[NodeID]time.Time{}}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		changed := c.changes()
		next, leading := c.m.cfg.CheckEvery, false
		for _, l := range leads {
			v := c.session.View(l.kind)
			leading = leading || v.Leading
			next = min(next, l.step(ctx, v))
		}
		c.m.metrics.leads(leading)
		timer.Reset(next)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// leadership is what a leader keeps of a kind between two looks. Nothing of it is needed by the next leader.
type leadership struct {
	crew  *crew
	kind  string
	since map[NodeID]time.Time // nodes without a place in the plan, and since when they are known

	floor   int64
	floorAt time.Time // when floor was asked for; zero: never, or not as this leader
}

// step publishes the plan that is due, if one is, and says when to look again.
func (l *leadership) step(ctx context.Context, v View) time.Duration {
	cfg := &l.crew.m.cfg
	if !v.Leading {
		l.floorAt, l.since = time.Time{}, map[NodeID]time.Time{}
		l.crew.m.metrics.unowned.DeleteLabelValues(l.kind)
		return cfg.CheckEvery
	}
	l.crew.m.metrics.unowned.WithLabelValues(l.kind).Set(float64(cfg.Ring - owned(cfg.Ring, v)))
	log := cfg.Logger.With("kind", l.kind)
	if time.Since(l.floorAt) >= cfg.CheckEvery {
		asking, cancel := context.WithTimeout(ctx, cfg.CheckEvery)
		floor, err := cfg.Fencer.Highest(asking, l.kind)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				log.WarnContext(ctx, "no new plan without knowing under which claims were made; trying again", "error", err)
			}
			return min(cfg.CheckEvery, time.Second)
		}
		l.floor, l.floorAt = floor, time.Now()
	}
	state := State{Ring: cfg.Ring, Plan: v.Plan, Floor: l.floor}
	var wait time.Duration
	state.Members, wait = l.settled(v)
	for _, m := range v.Members {
		for _, n := range m.Nodes {
			state.Floor = max(state.Floor, n.Seen) // of a plan that has been lost since
		}
	}
	plan, due := Step(state)
	if !due {
		return min(wait, cfg.CheckEvery)
	}
	if err := l.crew.session.Publish(ctx, l.kind, plan, v.Plan.Version); err != nil {
		if !errors.Is(err, ErrConflict) && ctx.Err() == nil {
			log.WarnContext(ctx, "plan was not published; trying again", "version", plan.Version, "error", err)
		}
		return min(cfg.CheckEvery, time.Second)
	}
	moved := 0
	for _, n := range plan.Nodes {
		for _, more := range subtract(n.Granted, v.Plan.Node(n.ID).Granted) {
			moved += size(more)
		}
	}
	l.crew.m.metrics.moves.WithLabelValues(l.kind, plan.Cause).Add(float64(moved))
	log.InfoContext(ctx, "new plan", "version", plan.Version, "cause", plan.Cause, "nodes", len(plan.Nodes), "moved", moved, "draining", len(plan.Draining))
	return min(wait, cfg.CheckEvery)
}

// settled returns the members with those left out that are so new that more may come, and how long to wait for that.
func (l *leadership) settled(v View) ([]Member, time.Duration) {
	cfg := &l.crew.m.cfg
	placed, known := map[NodeID]bool{}, map[NodeID]time.Time{}
	for _, n := range v.Plan.Nodes {
		placed[n.ID] = true
	}
	var last time.Time
	for _, m := range v.Members {
		for _, n := range m.Nodes {
			if !m.Alive || m.Leaving || placed[n.ID] {
				continue
			}
			known[n.ID] = time.Now()
			if t, ok := l.since[n.ID]; ok {
				known[n.ID] = t
			}
			if known[n.ID].After(last) {
				last = known[n.ID]
			}
		}
	}
	l.since = known
	wait := cfg.Settle - time.Since(last)
	if wait <= 0 {
		return v.Members, cfg.CheckEvery
	}
	members := append([]Member(nil), v.Members...)
	for i, m := range members {
		for _, n := range m.Nodes {
			if _, isNew := known[n.ID]; isNew {
				members[i].Leaving = true // it gets no shards yet, and what it holds nobody else gets
			}
		}
	}
	return members, wait
}
