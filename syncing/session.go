package syncing

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

// idleSave is how often the cursor is stored while nothing changes: often enough never to meet the purge of tombstones.
const idleSave = 10 * time.Second

// session is one stream of the owner's changes and what is done with them. It ends with its first error.
type session struct {
	n      *remoteNode
	source Source

	started chan struct{} // closed at the first frame: the owner has taken the position from which it will tell everything
	epoch   int64         // of the owner; set before started is closed
	frames  chan *Frame   // unbuffered: the reader holds one frame while another is applied
	work    chan func(context.Context)
	caught  watermark
	took    atomic.Int64 // nanoseconds of the last piece of bulk work

	// Of the applier only.
	proven bool // nothing before the tail is missing, so its cursor may be stored
	cursor feed.Cursor
	saved  time.Time
	dirty  bool // rows were applied since the cursor was stored
	rate   rate
}

func (n *remoteNode) session(ctx context.Context, source Source, from feed.Cursor, proven bool) error {
	s := &session{
		n: n, source: source, proven: proven,
		started: make(chan struct{}),
		frames:  make(chan *Frame),
		work:    make(chan func(context.Context)),
		caught:  watermark{changed: make(chan struct{})},
		saved:   n.now(),
	}
	n.set.SetSourceInSync(false)
	n.set.Forget()
	n.enter(Connecting)
	defer n.clock.dropped()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.read(ctx, from) })
	g.Go(func() error { return s.apply(ctx) })
	g.Go(func() error { return s.supervise(ctx, proven) })
	return g.Wait()
}

// read receives frames, one ahead of the applier. Behind it, the stream's flow control holds the rest at the source.
func (s *session) read(ctx context.Context, from feed.Cursor) error {
	epoch, first := from.Epoch, true
	for f, err := range s.source.Tail(ctx, s.n.shards, from.Token()) {
		if err != nil {
			return err
		}
		now := s.n.now()
		s.n.peer.clock.answered(now)
		epoch = cmp.Or(epoch, f.Epoch)
		f.Epoch = cmp.Or(f.Epoch, epoch) // only the last part of a read carries it
		if f.Epoch != epoch {
			return &SourceError{CursorLost, "tail", fmt.Errorf("the owner's epoch rose from %d to %d", epoch, f.Epoch)}
		}
		if first {
			s.epoch = epoch
			s.n.epoch.Store(epoch)
			s.n.peer.epoch.Store(epoch)
			close(s.started)
			first = false
		}
		s.n.clock.received(f, now)
		select {
		case s.frames <- f:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return ctx.Err()
}

// apply is the only writer of the subrange: a live frame first, else a piece of bulk work.
func (s *session) apply(ctx context.Context) error {
	for {
		select {
		case f := <-s.frames:
			if err := s.applyFrame(ctx, f); err != nil {
				return err
			}
			continue
		default:
		}
		select {
		case f := <-s.frames:
			if err := s.applyFrame(ctx, f); err != nil {
				return err
			}
		case do := <-s.work:
			do(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// inApplier runs a piece of bulk work in the applier and returns its error.
func (s *session) inApplier(ctx context.Context, do func(context.Context) error) error {
	if err := s.pace(ctx); err != nil {
		return err
	}
	done := make(chan error, 1)
	select {
	case s.work <- func(ctx context.Context) {
		began := time.Now()
		err := do(ctx)
		s.took.Store(int64(time.Since(began)))
		done <- err
	}:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *session) applyFrame(ctx context.Context, f *Frame) error {
	n := s.n
	target, owner := n.peer.cfg.Target, n.owner(f.Epoch)
	if f.Cursor != "" {
		c, err := feed.ParseToken(f.Cursor)
		if err != nil {
			return &SourceError{Malformed, "tail", err}
		}
		s.cursor = c
	}
	save := s.proven && f.Cursor != "" && (f.RowCount > 0 || s.dirty || n.now().Sub(s.saved) >= idleSave)

	switch {
	case f.RowCount > 0:
		batch := postgres.Batch{Peer: owner, Tuples: f.Rows, Rows: f.RowCount, Shards: n.shards}
		if save {
			batch.Cursor = s.cursor
		}
		began := time.Now()
		merged, err := target.Merge(ctx, batch)
		if err != nil {
			return fmt.Errorf("apply %d changes of %s: %w", f.RowCount, n, err)
		}
		n.count(opTail, merged, len(f.Rows))
		if err := s.measure(ctx, f.RowCount, time.Since(began)); err != nil {
			return err
		}
		s.dirty = true
	case save:
		if err := target.SaveCursor(ctx, owner.Service, owner.Region, n.shards, s.cursor); err != nil {
			return fmt.Errorf("store cursor of %s: %w", n, err)
		}
	}
	now := n.now()
	if save {
		s.saved, s.dirty = now, false
	}
	n.clock.applied(f, now, s.proven)
	if f.RowCount > 0 {
		s.observe(f, now)
	}
	if f.Cursor != "" && !f.More {
		s.caught.advance(f.SourceTime)
		if s.proven {
			n.enter(Live)
		}
	} else if s.proven {
		n.enter(CatchingUp)
	}
	return nil
}

// measure stores, now and then, how many rows a second the database takes: estimates need it.
func (s *session) measure(ctx context.Context, rows int, took time.Duration) error {
	n := s.n
	perSecond, due := s.rate.add(rows, took, n.now())
	if !due {
		return nil
	}
	if err := n.peer.cfg.Target.SaveRate(ctx, RateCopy+n.peer.key.Region, perSecond); err != nil {
		return fmt.Errorf("store the rate of %s: %w", n, err)
	}
	return nil
}

// observe measures how long the changes of a frame took from the owner's write to here.
func (s *session) observe(f *Frame, now time.Time) {
	pair := &s.n.peer.clock
	_ = row.Walk(f.Rows, func(t *row.Tuple) error { // has just been applied, so it is well-formed
		if took := age(pair.local(t.UpdateTime(), now), now); took != nil {
			s.n.peer.propagation.Observe(took.Seconds())
		}
		return nil
	})
}

// supervise compares if that must be done, and then audits from time to time.
func (s *session) supervise(ctx context.Context, proven bool) error {
	n := s.n
	if !proven {
		select {
		case <-s.started: // what is listed from now on is not older than the tail's position
		case <-ctx.Done():
			return ctx.Err()
		}
		n.enter(Comparing)
		if err := s.compare(ctx); err != nil {
			return err
		}
		if err := s.inApplier(ctx, s.prove); err != nil {
			return err
		}
	}
	n.set.SetSourceInSync(true)
	for interval := n.peer.cfg.AuditInterval; interval > 0; {
		select {
		case <-time.After(interval/2 + rand.N(interval)): // spread: the subranges would all read at once
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := s.audit(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			n.failed(fmt.Errorf("audit of %s: %w", n, err)) // live goes on
		}
	}
	return nil
}

// prove runs in the applier when a comparison has ended: everything before the last applied frame is here.
func (s *session) prove(ctx context.Context) error {
	n := s.n
	s.proven = true
	if s.cursor.IsZero() {
		n.enter(CatchingUp) // no read is complete yet; the first one's cursor will be stored
		return nil
	}
	if err := n.peer.cfg.Target.SaveCursor(ctx, n.peer.key.Service, n.peer.key.Region, n.shards, s.cursor); err != nil {
		return fmt.Errorf("store cursor of %s: %w", n, err)
	}
	s.saved, s.dirty = n.now(), false
	n.throttled("")
	n.clock.proved()
	n.enter(Live)
	return nil
}

// watermark is a source time up to which reads have been applied, and a way to wait for it.
type watermark struct {
	mu      sync.Mutex
	at      time.Time
	changed chan struct{}
}

func (w *watermark) advance(to time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at = to
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *watermark) wait(ctx context.Context, until time.Time) error {
	for {
		w.mu.Lock()
		at, changed := w.at, w.changed
		w.mu.Unlock()
		if !at.Before(until) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
