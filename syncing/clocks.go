package syncing

import (
	"sync"
	"time"
)

// All clocks are kept as local instants, so that they go on running while nothing arrives, and so that a jump of the peer's clock after
// a measurement does not change what was measured.

// pairClock is what the two ends of a pair know of each other's time. The zero value knows nothing.
type pairClock struct {
	mu       sync.Mutex
	contact  time.Time     // last answer of any kind
	offset   time.Duration // the peer's clock minus ours
	measured bool
	trip     time.Duration // of the last ping, there and back
}

// roundTrip returns how long the last ping took; 0 before the first.
func (c *pairClock) roundTrip() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.trip
}

// answered notes that the peer has sent something.
func (c *pairClock) answered(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.contact = now
}

// ping takes a measurement: the peer's clock showed peer at some moment between sent and received. The middle is wrong by half the
// round trip at most.
func (c *pairClock) ping(sent, received, peer time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.contact = received
	c.offset = peer.Sub(received) + received.Sub(sent)/2
	c.measured, c.trip = true, received.Sub(sent)
}

// local returns the earliest local instant, never after now, at which the peer's clock may have shown t: the measurement is wrong by half its round trip at most, and what is told
// of a copy must not be better than it is. The zero time when that is not known.
func (c *pairClock) local(t, now time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.measured || t.IsZero() {
		return time.Time{}
	}
	return now.Add(-max(0, now.Add(c.offset+c.trip/2).Sub(t)))
}

// age returns how long the instant from is past; nil when from is unknown.
func age(from, now time.Time) *time.Duration {
	if from.IsZero() {
		return nil
	}
	d := max(0, now.Sub(from))
	return &d
}

// rangeClock holds freshness and apply lag of one subrange.
type rangeClock struct {
	pair *pairClock

	mu       sync.Mutex
	complete time.Time // the copy holds everything that was visible at the peer by then; zero: never yet
	reached  time.Time // the same for what was applied while comparing, which proves nothing until the comparison ends
	queue    []waiting // frames received and not applied, oldest first
	behind   bool      // something known is not applied: a frame, or the rest of a read of which a part is applied
	oldest   time.Time // what is behind was not visible at the peer by then; zero: unknown
}

type waiting struct {
	since   time.Time
	rows    int
	matters bool // it changes something, or more follows it
}

// received notes a frame before it is applied.
func (c *rangeClock) received(f *Frame, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := waiting{since: c.pair.local(f.SinceTime, now), rows: f.RowCount, matters: f.RowCount > 0 || f.More}
	if w.since.IsZero() {
		w.since = c.complete // whatever came after that
	}
	c.queue = append(c.queue, w)
	if w.matters && !c.behind {
		c.behind, c.oldest = true, w.since
	}
}

// applied notes that the oldest frame received has been applied. proven says that nothing before it is missing.
func (c *rangeClock) applied(f *Frame, now time.Time, proven bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = c.queue[1:]
	if f.Cursor == "" || f.More {
		return // a part of a read: its other rows may be as old
	}
	c.behind = len(c.queue) > 0 && c.queue[0].matters
	if c.behind {
		c.oldest = c.queue[0].since
	}
	c.reached = c.pair.local(f.SourceTime, now)
	if proven && !c.reached.IsZero() {
		c.complete = c.reached
	}
}

// waits says whether something received is not applied.
func (c *rangeClock) waits() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.queue) > 0 && c.queue[0].matters
}

// proved notes that a comparison has ended: the copy is complete as far as reads have been applied.
func (c *rangeClock) proved() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.reached.IsZero() {
		c.complete = c.reached
	}
}

// dropped notes that the frames received will not be applied: the stream has ended, they will come again. What is behind stays so.
func (c *rangeClock) dropped() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = nil
	c.reached = time.Time{}
}

// lags is a reading of a rangeClock. A nil duration is not known.
type lags struct {
	freshness, apply *time.Duration
	pending          int64 // rows
}

// read returns the clocks at now. comparing says that rows may differ that no frame tells of: then the lag is that of the whole copy.
func (c *rangeClock) read(now time.Time, comparing bool) lags {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := lags{freshness: age(c.complete, now), apply: new(time.Duration)}
	switch {
	case comparing:
		l.apply = l.freshness
	case c.behind && c.oldest.IsZero():
		l.apply = l.freshness
	case c.behind:
		l.apply = age(c.oldest, now)
	}
	for _, w := range c.queue {
		l.pending += int64(w.rows)
	}
	return l
}

// worse merges two readings of one pair.
func (l lags) worse(o lags) lags {
	return lags{freshness: older(l.freshness, o.freshness), apply: older(l.apply, o.apply), pending: l.pending + o.pending}
}

// older returns the larger age; unknown is larger than all.
func older(a, b *time.Duration) *time.Duration {
	if a == nil || b == nil {
		return nil
	}
	if *a > *b {
		return a
	}
	return b
}
