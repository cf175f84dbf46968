// Package netsim simulates distance and faults between two ends of a network
// connection: a Link is a TCP proxy with adjustable latency and bandwidth that
// can be cut, reset and healed while connections run through it.
//
// Bytes are delayed, not connections: many bytes are under way at the same
// time, in order, up to a bound per connection and direction. Beyond it the
// sender is held back, as by a full TCP window.
//
// A cut is a black hole: nothing arrives, neither bytes nor the end of a
// connection, and nobody is told. Since TCP retransmits, what was sent during a
// cut arrives after Heal, unless one of the ends gave up before. What the proxy
// cannot simulate is the handshake: connecting to a link always succeeds,
// even while it is cut; only then nothing comes back.
package netsim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// maxInFlight bounds the bytes under way, per connection and direction. It
	// also bounds the throughput, to maxInFlight per latency.
	maxInFlight = 8 << 20
	chunkSize   = 32 << 10
	dialTimeout = 10 * time.Second
)

// Link is one simulated connection line: a listener, and whatever connects to
// it. Its methods may be called at any time from any goroutine; settings apply
// to connections that exist as well as to new ones.
type Link struct {
	target   string
	listener net.Listener
	up, down direction // from the client to the target, and back

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	conns map[*context.CancelFunc]struct{} // to reset each connection
}

// Listen makes a link from addr (port 0 for a free one) to target, which is
// host:port or the path of a unix socket. The target need not exist yet. The
// link works, without delay or limit at first, until Close or the end of ctx.
func Listen(ctx context.Context, addr, target string) (*Link, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for link to %s: %w", target, err)
	}
	l := &Link{target: target, listener: listener, conns: map[*context.CancelFunc]struct{}{}}
	l.up.changed, l.down.changed = make(chan struct{}), make(chan struct{})
	l.ctx, l.cancel = context.WithCancel(ctx)
	context.AfterFunc(l.ctx, func() { listener.Close() })
	l.wg.Go(l.accept)
	return l, nil
}

// Addr returns the address (host:port) to connect to instead of the target's.
func (l *Link) Addr() string { return l.listener.Addr().String() }

// SetLatency delays the bytes of each direction by oneWay plus a random part of
// up to jitter. They stay in order. Bytes under way keep their old delay.
func (l *Link) SetLatency(oneWay, jitter time.Duration) {
	for _, d := range []*direction{&l.up, &l.down} {
		d.set(func() { d.latency, d.jitter = oneWay, jitter })
	}
}

// SetBandwidth limits each direction, for all connections together. Zero is
// no limit.
func (l *Link) SetBandwidth(bytesPerSecond int) {
	for _, d := range []*direction{&l.up, &l.down} {
		d.set(func() { d.bandwidth = bytesPerSecond })
	}
}

// Cut makes a black hole of both directions, until Heal.
func (l *Link) Cut() {
	l.CutUpstream()
	l.CutDownstream()
}

// CutUpstream makes a black hole of the direction from client to target.
func (l *Link) CutUpstream() { l.up.set(func() { l.up.cut = true }) }

// CutDownstream makes a black hole of the direction from target to client.
func (l *Link) CutDownstream() { l.down.set(func() { l.down.cut = true }) }

// Heal ends every cut. Latency and bandwidth stay.
func (l *Link) Heal() {
	for _, d := range []*direction{&l.up, &l.down} {
		d.set(func() { d.cut = false })
	}
}

// Reset breaks all connections that exist now: both ends see them reset, even
// during a cut.
func (l *Link) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for cancel := range l.conns {
		(*cancel)()
	}
}

// Close stops listening and resets all connections. It returns when nothing of
// the link runs any more.
func (l *Link) Close() {
	l.cancel()
	l.listener.Close() // not only by AfterFunc: the port is free when Close returns
	l.wg.Wait()
}

func (l *Link) accept() {
	for {
		client, err := l.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of file descriptors, most likely: let others free some.
			select {
			case <-time.After(10 * time.Millisecond):
				continue
			case <-l.ctx.Done():
				return
			}
		}
		l.wg.Go(func() { l.serve(client) })
	}
}

// serve carries one connection.
func (l *Link) serve(client net.Conn) {
	ctx, cancel := context.WithCancel(l.ctx)
	l.mu.Lock()
	l.conns[&cancel] = struct{}{}
	l.mu.Unlock()
	defer func() {
		cancel()
		l.mu.Lock()
		delete(l.conns, &cancel)
		l.mu.Unlock()
	}()

	target, err := l.dial(ctx)
	if err != nil {
		abort(client) // nobody listens there: what a client sees is a refusal
		return
	}
	keep := context.AfterFunc(ctx, func() {
		abort(client)
		abort(target)
	})
	var wg sync.WaitGroup
	wg.Go(func() { l.up.carry(ctx, cancel, target, client) })
	wg.Go(func() { l.down.carry(ctx, cancel, client, target) })
	wg.Wait()
	if keep() { // nobody aborted: both ends have said all they had to say
		client.Close()
		target.Close()
	}
}

// dial connects to the target, unless the link is cut: then it waits.
func (l *Link) dial(ctx context.Context) (net.Conn, error) {
	if err := errors.Join(l.up.waitOpen(ctx), l.down.waitOpen(ctx)); err != nil {
		return nil, err
	}
	network := "tcp"
	if strings.HasPrefix(l.target, "/") {
		network = "unix"
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	return dialer.DialContext(ctx, network, l.target)
}

// abort closes a connection so that its peer sees a reset, not an end.
func abort(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails only if it is closed already
	}
	c.Close()
}

// direction is one way of a link, with its settings.
type direction struct {
	mu        sync.Mutex
	latency   time.Duration
	jitter    time.Duration
	bandwidth int
	cut       bool
	free      time.Time     // when the line can take the next byte, if bandwidth is limited
	changed   chan struct{} // closed and replaced by every change of the settings
}

func (d *direction) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
	close(d.changed)
	d.changed = make(chan struct{})
}

// delay returns the latency of a chunk that is sent now.
func (d *direction) delay() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	delay := d.latency
	if d.jitter > 0 {
		delay += rand.N(d.jitter)
	}
	return delay
}

// waitOpen returns when the direction is not cut.
func (d *direction) waitOpen(ctx context.Context) error {
	for {
		d.mu.Lock()
		cut, changed := d.cut, d.changed
		d.mu.Unlock()
		if !cut {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// reserve returns when the line has taken n bytes that it gets now.
func (d *direction) reserve(n int) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if d.bandwidth == 0 {
		return now
	}
	if d.free.Before(now) {
		d.free = now
	}
	d.free = d.free.Add(time.Duration(n) * time.Second / time.Duration(d.bandwidth))
	return d.free
}

// chunk is some bytes under way, or what ends them: io.EOF or a broken
// connection.
type chunk struct {
	data []byte
	end  error
	due  time.Time // not delivered before
}

// carry moves bytes from src to dst until src ends, and ends dst in the same
// way. A failure of either calls abort.
func (d *direction) carry(ctx context.Context, abort func(), dst, src net.Conn) {
	queue := make(chan chunk, maxInFlight/chunkSize)
	room := semaphore.NewWeighted(maxInFlight)

	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { receive(ctx, src, queue, room, d) })

	for {
		var c chunk
		select {
		case c = <-queue:
		case <-ctx.Done():
			return
		}
		if err := d.deliver(ctx, dst, c); err != nil {
			abort()
			return
		}
		if c.end != nil {
			return
		}
		room.Release(int64(len(c.data)))
	}
}

// receive reads src into the queue, as long as there is room.
func receive(ctx context.Context, src net.Conn, queue chan<- chunk, room *semaphore.Weighted, d *direction) {
	buf := make([]byte, chunkSize)
	var due time.Time
	for {
		n, err := src.Read(buf)
		if room.Acquire(ctx, int64(n)) != nil {
			return
		}
		if t := time.Now().Add(d.delay()); t.After(due) {
			due = t // otherwise a chunk would overtake the one before it
		}
		select {
		case queue <- chunk{data: append([]byte(nil), buf[:n]...), end: err, due: due}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// deliver writes a chunk to dst when its time has come and the line is open.
func (d *direction) deliver(ctx context.Context, dst net.Conn, c chunk) error {
	if err := sleepUntil(ctx, c.due); err != nil {
		return err
	}
	if err := d.waitOpen(ctx); err != nil {
		return err
	}
	if len(c.data) > 0 {
		if err := sleepUntil(ctx, d.reserve(len(c.data))); err != nil {
			return err
		}
		if _, err := dst.Write(c.data); err != nil {
			return err
		}
	}
	if errors.Is(c.end, io.EOF) {
		return dst.(interface{ CloseWrite() error }).CloseWrite()
	}
	return c.end
}

func sleepUntil(ctx context.Context, t time.Time) error {
	wait := time.Until(t)
	if wait <= 0 {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
