package feed

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// Hub carries the hint that something was committed: at once to the readers of this process that it may concern, and coalesced, as a NOTIFY sent
// by itself after the commit, to other processes on the same database. A NOTIFY inside the writing transaction would take a lock that
// serialises all commits of the server. Hints may be lost; polling is the safety net.
type Hub struct {
	mu      sync.Mutex
	waiting map[*waiter]struct{}

	outgoing chan struct{} // capacity 1: a hint for other processes is due
	owned    atomic.Bool   // owned rows are among what is due
	sender   atomic.Uint32 // backend that sends our hints; our readers have heard them already
}

// Interest says which commits a reader wants to be woken for.
type Interest struct {
	// Owned leaves out commits that only changed read copies.
	Owned bool
	// Shards leaves out commits in other shards; the zero Range is all.
	Shards Range
	// Gap is the least time between two reads, however many commits there are.
	Gap time.Duration
}

type waiter struct {
	Interest
	wake chan struct{} // closed at the first hint
}

// NewHub returns a hub that works within the process; Run connects it to others.
func NewHub() *Hub {
	return &Hub{waiting: map[*waiter]struct{}{}, outgoing: make(chan struct{}, 1)}
}

// Committed tells everybody concerned that this process has committed a change of owned rows, or else of copies, in these shards; none stands for
// any shard. It never blocks.
func (h *Hub) Committed(owned bool, shards ...int32) {
	h.broadcast(owned, shards)
	if owned {
		h.owned.Store(true)
	}
	select {
	case h.outgoing <- struct{}{}:
	default:
	}
}

// wait registers a reader until its first hint.
func (h *Hub) wait(want Interest) *waiter {
	w := &waiter{want, make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting[w] = struct{}{}
	return w
}

// leave ends a wait that may not have been hinted.
func (h *Hub) leave(w *waiter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.waiting, w)
}

func (h *Hub) broadcast(owned bool, shards []int32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.waiting {
		if w.concerns(owned, shards) {
			close(w.wake)
			delete(h.waiting, w)
		}
	}
}

func (i Interest) concerns(owned bool, shards []int32) bool {
	if i.Owned && !owned {
		return false
	}
	return len(shards) == 0 || i.Shards == Range{} || slices.ContainsFunc(shards, func(s int32) bool { return s >= i.Shards.From && s < i.Shards.To })
}

// channel is the NOTIFY channel of a database; one database holds one Deployment.
const channel = "dbcontroller_feed"

// ownedPayload marks a NOTIFY after which owned rows, and not only copies, have changed.
const ownedPayload = "owned"

// gap is the shortest time between two NOTIFYs: it costs latency to other processes only, and spares the server under load.
const gap = 2 * time.Millisecond

// Run sends hints to and receives hints from other processes until ctx is done, over two connections that it opens with connect and reopens after
// errors, which report gets. It returns nil.
func (h *Hub) Run(ctx context.Context, connect func(context.Context) (*pgx.Conn, error), report func(error)) error {
	var wg sync.WaitGroup
	for _, loop := range []func(context.Context, *pgx.Conn) error{h.listen, h.send} {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := with(ctx, connect, loop)
				if ctx.Err() != nil {
					return
				}
				report(fmt.Errorf("hints of the change feed: %w", err))
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		})
	}
	wg.Wait()
	return nil
}

func with(ctx context.Context, connect func(context.Context) (*pgx.Conn, error), loop func(context.Context, *pgx.Conn) error) error {
	conn, err := connect(ctx)
	if err != nil {
		return err
	}
	return errors.Join(loop(ctx, conn), conn.Close(context.WithoutCancel(ctx)))
}

func (h *Hub) listen(ctx context.Context, conn *pgx.Conn) error {
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return err
	}
	h.broadcast(true, nil) // something may have happened while nobody listened
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		if n.PID != h.sender.Load() {
			h.broadcast(n.Payload == ownedPayload, nil)
		}
	}
}

func (h *Hub) send(ctx context.Context, conn *pgx.Conn) error {
	h.sender.Store(conn.PgConn().PID())
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.outgoing:
		}
		payload := ""
		if h.owned.Swap(false) {
			payload = ownedPayload
		}
		if _, err := conn.Exec(ctx, "SELECT pg_notify($1, $2)", channel, payload); err != nil {
			h.owned.Store(true) // said again with the next one
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(gap):
		}
	}
}
