package syncing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// remoteNode copies one subrange of one foreign Deployment.
type remoteNode struct {
	peer   *peer
	shards feed.Range
	log    *slog.Logger
	clock  rangeClock
	set    *VersionSet
	epoch  atomic.Int64 // of the owner, in the stream's history

	mu       sync.Mutex
	state    State
	inSync   bool // no name is known to differ
	progress progress
	toCopy   int64  // rows of an initial copy that are still to come
	failing  Reason // of the last failure; empty after a success
	held     Throttle
}

func newRemoteNode(p *peer, shards feed.Range) *remoteNode {
	n := &remoteNode{peer: p, shards: shards, log: p.log.With("shards", shards.String()), clock: rangeClock{pair: &p.clock}, state: Connecting}
	n.set = NewVersionSet(func(ready bool) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.inSync = ready
	})
	return n
}

// String names the subrange for errors, for example "eu [0,1024)".
func (n *remoteNode) String() string { return n.peer.key.Region + " " + n.shards.String() }

func (n *remoteNode) now() time.Time { return n.peer.cfg.Clock() }

// owner names the peer at the moment when it sent rows.
func (n *remoteNode) owner(epoch int64) postgres.Peer {
	return postgres.Peer{Service: n.peer.key.Service, Region: n.peer.key.Region, Epoch: epoch}
}

// run copies until ctx is done.
func (n *remoteNode) run(ctx context.Context, source Source) {
	var retry backoff
	for {
		began := n.now()
		err := n.follow(ctx, source)
		if ctx.Err() != nil {
			return
		}
		n.failed(err)
		n.enter(Disconnected)
		if n.now().Sub(began) > steady {
			retry = backoff{}
		}
		n.peer.retries.Inc()
		if !retry.sleep(ctx) {
			return
		}
	}
}

// follow runs a session with the stored cursor, or without one if its history is gone.
func (n *remoteNode) follow(ctx context.Context, source Source) error {
	c, err := n.peer.cfg.Target.LoadCursor(ctx, n.peer.key.Service, n.peer.key.Region, n.shards)
	if err != nil {
		return fmt.Errorf("load cursor of %s: %w", n, err)
	}
	if !c.IsZero() {
		n.progressed(1, 1) // until a comparison turns out to be needed
		err := n.session(ctx, source, c, true)
		if !errors.Is(err, feed.ErrCursorLost) {
			return err
		}
		n.failed(err)
	}
	return n.session(ctx, source, feed.Cursor{}, false)
}

func (n *remoteNode) enter(s State) {
	n.mu.Lock()
	was := n.state
	n.state = s
	if s == Live {
		n.failing, n.progress.share = "", 1
	}
	n.mu.Unlock()
	if was != s {
		n.log.Debug("state changed", "from", was, "to", s)
	}
}

// failed reports an error after which the node goes on.
func (n *remoteNode) failed(err error) {
	n.peer.failed(err)
	reason := reasonOf(err)
	n.mu.Lock()
	again := n.failing == reason
	n.failing = reason
	n.mu.Unlock()
	level := slog.LevelWarn
	if again {
		level = slog.LevelDebug // a peer that is away for an hour fills no log
	}
	n.log.Log(context.Background(), level, "copying failed, will be retried", "reason", reason, "error", err)
}

// throttled notes whether bulk work is held back.
func (n *remoteNode) throttled(why Throttle) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.held = why
}

func (n *remoteNode) throttle() Throttle {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.held
}

// progressed notes how much of a comparison is done.
func (n *remoteNode) progressed(done, of int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.progress.note(done, of, n.now())
}

// copying notes how many rows of an initial copy are still to come.
func (n *remoteNode) copying(rows int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.toCopy = max(0, rows)
}

// count notes rows that the database has taken.
func (n *remoteNode) count(op string, m postgres.Merged, bytes int) { n.peer.count(op, m, bytes) }

// audited notes the result of an audit.
func (n *remoteNode) audited(shards int) {
	if shards > 0 {
		n.log.Warn("audit found copies that were not equal to their owner's rows", "mismatched_shards", shards)
	}
	n.peer.audited(n.shards, shards)
}

// reading returns the node's part of the pair's status.
func (n *remoteNode) reading(now time.Time) (l lags, state State, share float64, remaining *time.Duration) {
	n.mu.Lock()
	state, share, remaining = n.state, n.progress.share, n.progress.remaining(now)
	inSync, toCopy := n.inSync, n.toCopy
	n.mu.Unlock()
	l = n.clock.read(now, !inSync)
	missing, extra := n.set.Len()
	l.pending += int64(missing+extra) + toCopy
	if state != Live && state != CatchingUp {
		return l, state, share, remaining
	}
	if n.epoch.Load() != n.peer.epoch.Load() {
		state = Connecting // another subrange knows already that the owner's history has ended: what is held here is to be compared
	}
	return l, state, 1, new(time.Duration(0))
}

const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 5 * time.Second
	// steady is how long a session must have lasted to count as a success.
	steady = 10 * time.Second
)

// backoff waits longer after each failure, with full jitter: peers that come back meet no crowd.
type backoff struct{ failures int }

// sleep returns false when ctx is done.
func (b *backoff) sleep(ctx context.Context) bool {
	limit := min(maxBackoff, minBackoff<<min(b.failures, 10))
	b.failures++
	timer := time.NewTimer(rand.N(limit) + time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
