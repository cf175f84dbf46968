package nodemanager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
)

// A node that fails is made anew after a wait between these, doubling and with full jitter; so is a claim that could not be made.
const (
	minRestart = time.Second
	maxRestart = time.Minute
)

// worker is the place of one node: it has a node while it is granted shards. All but its node's goroutine is one goroutine's.
type worker struct {
	crew  *crew
	kind  Kind
	index int
	id    NodeID
	log   *slog.Logger

	plan  Plan                  // the newest one seen
	held  descriptor.ShardRange // what the node works on
	node  *running              // nil without shards
	claim claim
	epoch atomic.Int64 // of the claim, for the node to read

	wait      time.Duration // before the next start
	notBefore time.Time     // of the next start, or try at growing
	checked   time.Time     // when the claim was looked at last
	wanted    time.Time     // since when the plan has wanted more of it than it holds
}

// running is a node at work.
type running struct {
	node   Node
	ctx    context.Context // ends when Run has returned
	cancel context.CancelFunc
	began  time.Time
	ended  chan struct{}
	err    error         // of Run, once ended is closed
	update chan struct{} // closed when the last UpdateShardRange has returned
}

// claim is what the fence lets the node write for.
type claim struct {
	shards descriptor.ShardRange
	epoch  int64
}

func newWorker(c *crew, k Kind, index int, id NodeID) *worker {
	return &worker{crew: c, kind: k, index: index, id: id, wait: minRestart, log: c.m.cfg.Logger.With("kind", k.Name, "node", string(id))}
}

// run does what the plans say, with nodes of version, until ctx is done. Its only error is ErrNotStopped.
func (w *worker) run(ctx context.Context, version string) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		changed := w.crew.changes()
		next, err := w.step(ctx, version)
		if err != nil {
			return err
		}
		timer.Reset(next)
		var ended chan struct{}
		if w.node != nil {
			ended = w.node.ended
		}
		select {
		case <-changed:
		case <-ended:
		case <-timer.C:
		case <-ctx.Done():
			err := w.stop(ctx)
			w.report()
			return err
		}
	}
}

// step does what is due now, and says when to look again if nothing happens.
func (w *worker) step(ctx context.Context, version string) (next time.Duration, err error) {
	cfg := &w.crew.m.cfg
	if w.node != nil {
		select {
		case <-w.node.ended:
			w.log.ErrorContext(ctx, "node failed; starting it again", "shards", w.held.String(), "error", w.node.err)
			if err := w.failed(ctx); err != nil {
				return 0, err
			}
		default:
		}
	}
	if v := w.crew.session.View(w.kind.Name); v.Plan.Version > w.plan.Version {
		w.plan = v.Plan
	}
	var given PlanNode
	if w.plan.Ring == cfg.Ring {
		given = w.plan.Node(w.id)
	}
	if done(ctx) {
		return cfg.CheckEvery, nil
	}

	// First what others wait for.
	if keep := intersect(w.held, given.Granted); keep != w.held {
		if err := w.shrink(ctx, keep); err != nil {
			return 0, err
		}
	}
	if w.node != nil && w.claim.shards != w.held || w.node != nil && time.Since(w.checked) >= cfg.CheckEvery {
		if err := w.keepClaim(ctx); err != nil {
			return w.again(ctx, "keep shards "+w.held.String(), err)
		}
	}
	w.report()

	w.wants(given.Target)
	if given.Granted != w.held {
		if until := time.Until(w.notBefore); until > 0 {
			return until, nil
		}
		if err := w.grow(ctx, given.Granted, version); err != nil {
			return w.again(ctx, "take shards "+given.Granted.String(), err)
		}
		w.report()
		w.wants(given.Target)
	}
	return cfg.CheckEvery, nil
}

// again says when to try again after a failure, if another try may get over it.
func (w *worker) again(ctx context.Context, what string, err error) (time.Duration, error) {
	switch {
	case errors.Is(err, ErrNotStopped):
		return 0, err
	case done(ctx): // which is why
		return w.crew.m.cfg.CheckEvery, nil
	case errors.Is(err, ErrStalePlan):
		w.log.InfoContext(ctx, "waiting for a newer plan", "doing", what, "plan", w.plan.Version)
	default:
		w.log.ErrorContext(ctx, "node cannot go on; trying again", "doing", what, "error", err)
	}
	if time.Until(w.notBefore) <= 0 {
		w.notBefore = time.Now().Add(rand.N(minRestart) + time.Millisecond)
	}
	return time.Until(w.notBefore), nil
}

func (w *worker) putOff() {
	w.notBefore = time.Now().Add(rand.N(w.wait) + time.Millisecond)
	w.wait = min(2*w.wait, maxRestart)
}

// shrink gives up all but keep, and returns when nothing works on the rest. The node is stopped if that is quicker than arguing.
func (w *worker) shrink(ctx context.Context, keep descriptor.ShardRange) error {
	if !empty(keep) {
		err := w.update(keep)
		if err == nil {
			w.held = keep
			return nil
		}
		w.log.WarnContext(ctx, "node does not give shards up; stopping it", "from", w.held.String(), "to", keep.String(), "error", err)
		w.putOff()
	}
	return w.stop(ctx)
}

// grow makes shards the node's range, with a node made for it if there is none. The right to write comes first.
func (w *worker) grow(ctx context.Context, shards descriptor.ShardRange, version string) error {
	if err := w.raise(ctx, shards); err != nil {
		return err // it goes on with what it has
	}
	started := w.node != nil
	if !started {
		n, err := w.kind.New(version)
		if err != nil {
			w.putOff()
			return fmt.Errorf("make %s node of %s: %w", w.kind.Name, version, err)
		}
		nctx, cancel := context.WithCancel(ctx)
		w.node = &running{node: n, ctx: w.crew.m.cfg.WithClaim(nctx, w.epoch.Load), cancel: cancel, began: time.Now(), ended: make(chan struct{})}
	}
	if err := w.update(shards); err != nil {
		if !started {
			close(w.node.ended) // there is no Run to wait for
		}
		return errors.Join(err, w.failed(ctx))
	}
	w.held, w.checked = shards, time.Now()
	if !started {
		w.node.start()
	}
	return nil
}

func (n *running) start() {
	go func() {
		defer close(n.ended)
		defer n.cancel()
		n.err = n.node.Run(n.ctx)
		if n.err == nil && n.ctx.Err() == nil {
			n.err = errors.New("it returned without being told to")
		}
	}()
}

// update changes the range of the node. After an error the node is to be stopped: it may not have returned from the change.
func (w *worker) update(shards descriptor.ShardRange) error {
	timeout := w.crew.m.cfg.HandoverTimeout
	ctx, cancel := context.WithTimeoutCause(w.node.ctx, timeout, fmt.Errorf("it took longer than the handover timeout, %s", timeout))
	defer cancel()
	n, returned, result := w.node, make(chan struct{}), make(chan error, 1)
	n.update = returned
	go func() {
		defer close(returned)
		result <- n.node.UpdateShardRange(ctx, shards)
	}()
	var err error
	select {
	case err = <-result:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("give node shards %s: %w", shards, err)
	}
	return nil
}

// raise claims shards for the node.
func (w *worker) raise(ctx context.Context, shards descriptor.ShardRange) error {
	ctx, cancel := context.WithTimeout(ctx, w.crew.m.cfg.HandoverTimeout)
	defer cancel()
	epoch, err := w.crew.m.cfg.Fencer.Raise(ctx, w.kind.Name, shards, w.plan.Version, string(w.id))
	if err != nil {
		return fmt.Errorf("claim shards %s under plan %d: %w", shards, w.plan.Version, err)
	}
	w.claim = claim{shards, epoch}
	w.epoch.Store(epoch)
	return nil
}

// keepClaim makes the claim that of what the node holds, and looks whether it is in force. A node that may not have one is stopped.
func (w *worker) keepClaim(ctx context.Context) error {
	if w.claim.shards == w.held {
		if !w.revoked(ctx) {
			w.checked = time.Now()
			return nil
		}
		w.log.WarnContext(ctx, "the claim was revoked although the plan grants the shards", "shards", w.held.String(), "plan", w.plan.Version)
	}
	err := w.raise(ctx, w.held)
	switch {
	case err == nil:
		w.checked = time.Now()
		return nil
	case errors.Is(err, ErrStalePlan):
		return errors.Join(err, w.stop(ctx))
	}
	return err
}

// revoked says whether the claim is known not to be in force. Not to know changes nothing: the fence is asked again with every write.
func (w *worker) revoked(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, w.crew.m.cfg.CheckEvery)
	defer cancel()
	holds, err := w.crew.m.cfg.Fencer.Holds(ctx, w.claim.epoch)
	return err == nil && !holds
}

// failed is stop, with a wait before the next start.
func (w *worker) failed(ctx context.Context) error {
	if w.node != nil && time.Since(w.node.began) > maxRestart {
		w.wait = minRestart
	}
	w.putOff()
	return w.stop(ctx)
}

// stop ends the node, if there is one, and then gives its claim back. ErrNotStopped if the node does not end in time.
func (w *worker) stop(ctx context.Context) error {
	if w.node != nil {
		if err := w.end(ctx); err != nil {
			return err
		}
	}
	w.drop(ctx)
	w.held, w.claim = descriptor.ShardRange{}, claim{}
	return nil
}

// drop gives the claim back, if there is time: the next one revokes it anyway.
func (w *worker) drop(ctx context.Context) {
	if w.claim.epoch == 0 {
		return
	}
	select {
	case <-w.crew.session.Lost():
		return
	default:
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(2*time.Second, w.crew.session.Grace()/2))
	defer cancel()
	if err := w.crew.m.cfg.Fencer.Drop(ctx, w.claim.epoch); err != nil {
		w.log.DebugContext(ctx, "the claim was not given back", "error", err)
	}
}

// end is stop for the node.
func (w *worker) end(ctx context.Context) error {
	w.node.cancel()
	limit := time.NewTimer(w.crew.m.cfg.HandoverTimeout)
	defer limit.Stop()
	for _, ended := range []<-chan struct{}{w.node.ended, w.node.update} {
		select {
		case <-ended:
		case <-limit.C:
			return fmt.Errorf("%s node of shards %s: %w", w.kind.Name, w.held, ErrNotStopped)
		}
	}
	if err := w.node.err; err != nil && ctx.Err() != nil && !errors.Is(err, context.Canceled) {
		w.log.WarnContext(ctx, "node did not stop cleanly", "shards", w.held.String(), "error", err)
	}
	w.node = nil
	return nil
}

func done(ctx context.Context) bool { return ctx.Err() != nil }

func (w *worker) report() {
	w.crew.report(w.kind, w.index, NodeReport{ID: w.id, Held: w.held, Seen: w.plan.Version})
}

// wants measures how long it takes to hold what the plan wants.
func (w *worker) wants(target descriptor.ShardRange) {
	switch missing := len(subtract(target, w.held)) > 0; {
	case missing && w.wanted.IsZero():
		w.wanted = time.Now()
	case !missing && !w.wanted.IsZero():
		w.crew.m.metrics.handover.WithLabelValues(w.kind.Name).Observe(time.Since(w.wanted).Seconds())
		w.wanted = time.Time{}
	}
}
