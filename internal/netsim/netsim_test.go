package netsim_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dbcontroller/db-controller/internal/netsim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo returns the address of a server that sends back what it gets, and ends
// when its client does.
func echo(t *testing.T, network, addr string) string {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

func newLink(t *testing.T, target string) *netsim.Link {
	t.Helper()
	l, err := netsim.Listen(context.Background(), "127.0.0.1:0", target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func dial(t *testing.T, l *netsim.Link) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", l.Addr(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func write(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, c net.Conn, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("want %q: %v", text, err)
	}
	if string(got) != text {
		t.Fatalf("got %q, want %q", got, text)
	}
}

// expectSilence fails if anything, also the connection's end, arrives soon.
func expectSilence(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(make([]byte, 1))
	var timeout net.Error
	if n != 0 || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Fatalf("read %d bytes, %v; want silence", n, err)
	}
	if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
}

func expectReset(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read = %v, want a reset", err)
	}
}

func TestBytesPassUnchanged(t *testing.T) {
	for network, addr := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "s")} {
		t.Run(network, func(t *testing.T) {
			l := newLink(t, echo(t, network, addr))
			l.SetLatency(time.Millisecond, 5*time.Millisecond) // jitter must not reorder
			c := dial(t, l)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			sent := make([]byte, 3<<20)
			_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(sent)
			go func() {
				_, _ = c.Write(sent)
				_ = c.CloseWrite() // the end passes through the link and back
			}()
			got, err := io.ReadAll(c)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, sent) {
				t.Fatalf("got %d bytes that differ from the %d sent", len(got), len(sent))
			}
		})
	}
}

func TestLatencyDelaysBytesNotThroughput(t *testing.T) {
	const oneWay, messages = 50 * time.Millisecond, 100
	l := newLink(t, echo(t, "tcp", "127.0.0.1:0"))
	l.SetLatency(oneWay, 0)
	c := dial(t, l)
	start := time.Now()
	go func() {
		pace := time.NewTicker(time.Millisecond) // so that each is a chunk of its own
		defer pace.Stop()
		for range messages {
			_, _ = c.Write([]byte("x"))
			<-pace.C
		}
	}()
	expect(t, c, "x")
	if first := time.Since(start); first < 2*oneWay {
		t.Errorf("first answer after %s, want at least %s", first, 2*oneWay)
	}
	for range messages - 1 {
		expect(t, c, "x")
	}
	if all := time.Since(start); all > messages*oneWay/2 {
		t.Errorf("all answers after %s: the delays add up", all)
	}
}

func TestBandwidth(t *testing.T) {
	l := newLink(t, echo(t, "tcp", "127.0.0.1:0"))
	l.SetBandwidth(1 << 20)
	c := dial(t, l)
	start := time.Now()
	sent := make([]byte, 256<<10)
	go func() { _, _ = c.Write(sent) }()
	if _, err := io.CopyN(io.Discard, c, int64(len(sent))); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 240*time.Millisecond {
		t.Errorf("a quarter of a second's bytes took %s", took)
	}
}

func TestCutIsSilentAndHeals(t *testing.T) {
	for name, cut := range map[string]func(*netsim.Link){
		"both ways":  (*netsim.Link).Cut,
		"upstream":   (*netsim.Link).CutUpstream,
		"downstream": (*netsim.Link).CutDownstream,
	} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, echo(t, "tcp", "127.0.0.1:0"))
			before := dial(t, l)
			write(t, before, "a")
			expect(t, before, "a")

			cut(l)
			write(t, before, "b")
			if err := before.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			during := dial(t, l)
			write(t, during, "c")
			expectSilence(t, before)
			expectSilence(t, during)

			l.Heal()
			expect(t, before, "b")
			if _, err := before.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("read = %v, want the end", err)
			}
			expect(t, during, "c")
		})
	}
}

func TestOneWayCutLeavesTheOtherWay(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	l := newLink(t, target.Addr().String())
	client := dial(t, l)
	server, err := target.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()

	l.CutUpstream()
	write(t, client, "lost")
	write(t, server, "down")
	expect(t, client, "down")
	expectSilence(t, server)
	l.Heal()
	expect(t, server, "lost")
	l.CutDownstream()
	write(t, server, "lost")
	write(t, client, "up")
	expect(t, server, "up")
	expectSilence(t, client)
}

func TestReset(t *testing.T) {
	l := newLink(t, echo(t, "tcp", "127.0.0.1:0"))
	open := dial(t, l)
	write(t, open, "a")
	expect(t, open, "a")
	l.Cut()
	hanging := dial(t, l)
	expectSilence(t, hanging) // it has been accepted
	l.Reset()
	expectReset(t, open)
	expectReset(t, hanging)
	l.Heal()
	again := dial(t, l)
	write(t, again, "b")
	expect(t, again, "b")
}

func TestNobodyListens(t *testing.T) {
	l := newLink(t, filepath.Join(t.TempDir(), "nobody"))
	c, err := net.Dial("tcp", l.Addr())
	if err == nil {
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("connect and read = %v, want a reset", err)
	}
}

func TestBrokenConnectionPassesOn(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	c := dial(t, newLink(t, target.Addr().String()))
	server, err := target.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = server.(*net.TCPConn).SetLinger(0)
	server.Close()
	expectReset(t, c)
}

func TestSenderIsHeldBack(t *testing.T) {
	l := newLink(t, echo(t, "tcp", "127.0.0.1:0"))
	c := dial(t, l)
	l.Cut()
	if err := c.SetWriteDeadline(time.Now().Add(2 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Write(make([]byte, 64<<20))
	if err == nil {
		t.Fatalf("a cut link took all of %d bytes", n)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	l, err := netsim.Listen(ctx, "127.0.0.1:0", echo(t, "tcp", "127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	l.SetLatency(time.Hour, 0)
	c := dial(t, l)
	write(t, c, "under way")
	expectSilence(t, c)
	cancel()
	expectReset(t, c)
	l.Close()
	l.Close()
	if c, err := net.Dial("tcp", l.Addr()); err == nil {
		c.Close()
		t.Error("a closed link still listens")
	}
}
