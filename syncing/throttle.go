package syncing

import (
	"context"
	"time"
)

// Throttle says why bulk work (an initial copy, a comparison) is held back; empty while it is not.
type Throttle string

// The reasons, the first that applies.
const (
	// LiveWaits: live changes have been received and are not applied yet; they go first.
	LiveWaits Throttle = "live_changes_wait"
	// TargetSlow: the local database takes long for what it is given.
	TargetSlow Throttle = "target_slow"
	// SourceSlow: the peer takes long to answer.
	SourceSlow Throttle = "source_slow"
)

var throttles = []Throttle{LiveWaits, TargetSlow, SourceSlow}

// health is what is known of the two ends before a piece of bulk work.
type health struct {
	liveWaits bool
	target    time.Duration // that the last piece of work took
	source    time.Duration // round trip to the peer
}

const (
	// slowTarget and slowSource are what a piece of work and a question take at most while all is well. A peer on the other side of the world
	// is half as far as that.
	slowTarget = 500 * time.Millisecond
	slowSource = 500 * time.Millisecond
	// maxThrottle keeps bulk work going, however bad things are: it is needed, too.
	maxThrottle = 2 * time.Second
	// liveTurn is how long live changes are waited for before one piece of bulk work.
	liveTurn = 100 * time.Millisecond
)

// throttle returns how long to rest before the next piece of bulk work, and why. A slow end gets as much rest as it took: it has half of its time for others.
func throttle(h health) (time.Duration, Throttle) {
	switch {
	case h.target > slowTarget:
		return min(h.target, maxThrottle), TargetSlow
	case h.source > slowSource:
		return min(h.source, maxThrottle), SourceSlow
	case h.liveWaits:
		return liveTurn, LiveWaits
	}
	return 0, ""
}

// pace rests before a piece of bulk work if the ends are not well. Live changes go on meanwhile.
func (s *session) pace(ctx context.Context) error {
	n := s.n
	rest, why := throttle(health{liveWaits: n.clock.waits(), target: time.Duration(s.took.Load()), source: n.peer.clock.roundTrip()})
	n.throttled(why)
	if rest == 0 {
		return nil
	}
	n.peer.metrics.throttled.WithLabelValues(n.peer.key.Region, string(why)).Add(rest.Seconds())
	timer := time.NewTimer(rest)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// rate measures how many rows a second the local database takes, by the time that it is busy with them.
type rate struct {
	rows int
	busy time.Duration
	told time.Time
}

// rateInterval is how often a rate is stored.
const rateInterval = 10 * time.Second

// add returns a rate when it is time to store one.
func (r *rate) add(rows int, took time.Duration, now time.Time) (perSecond float64, due bool) {
	r.rows += rows
	r.busy += took
	if r.rows < measurable || r.busy <= 0 || now.Sub(r.told) < rateInterval {
		return 0, false
	}
	perSecond = float64(r.rows) / r.busy.Seconds()
	*r = rate{told: now}
	return perSecond, true
}

// RateCopy names, before the region that owns them, the measured rate of copies.
const RateCopy = "copy "
