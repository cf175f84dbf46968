package feed

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// Hub carries the hint that something was committed: at once to the readers of this process, and coalesced, as a NOTIFY sent by itself after the
// commit, to other processes on the same database. A NOTIFY inside the writing transaction would take a lock that serialises all commits of
// the server. Hints may be lost; polling is the safety net.
type Hub struct {
	mu   sync.Mutex
	wake chan struct{} // closed and replaced at each hint

	outgoing chan struct{} // capacity 1: a hint for other processes is due
	sender   atomic.Uint32 // backend that sends our hints; our readers have heard them already
}

// NewHub returns a hub that works within the process; Run connects it to others.
func NewHub() *Hub {
	return &Hub{wake: make(chan struct{}), outgoing: make(chan struct{}, 1)}
}

// Committed tells everybody that this process has committed a change. It never blocks.
func (h *Hub) Committed() {
	h.broadcast()
	select {
	case h.outgoing <- struct{}{}:
	default:
	}
}

// Hint returns a channel that is closed at the next hint.
func (h *Hub) Hint() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.wake
}

func (h *Hub) broadcast() {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.wake)
	h.wake = make(chan struct{})
}

// channel is the NOTIFY channel of a database; one database holds one Deployment.
const channel = "dbcontroller_feed"

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
	h.broadcast() // something may have happened while nobody listened
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		if n.PID != h.sender.Load() {
			h.broadcast()
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
		if _, err := conn.Exec(ctx, "NOTIFY "+channel); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(gap):
		}
	}
}
