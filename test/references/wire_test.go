package references

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// wire stands before the API server of one Deployment, for as long as the world lives: servers behind it come and go. What passes it are whole calls, so
// it can do to them what a network under retrying clients does: lose the request, or only the answer; deliver twice, or again much later.
type wire struct {
	addr     string
	listener net.Listener
	server   *http.Server
	client   *http.Transport
	streams  *httputil.ReverseProxy
	target   atomic.Pointer[string] // host:port of the server; nil while there is none

	ctx    context.Context
	cancel context.CancelFunc
	late   sync.WaitGroup

	mu      sync.Mutex
	rng     *rand.Rand
	trouble trouble
	hook    func(*exchange) *answer
	seen    map[string]int // calls by method, and troubles by kind
}

// trouble is how probable it is that something happens to a call of the mixin.
type trouble struct{ loseRequest, loseAnswer, twice, again float64 }

// exchange is one call of the mixin.
type exchange struct {
	method string // EstablishReferences
	wire   *wire
	path   string
	header http.Header
	body   []byte
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   []byte
}

const mixinPath = "/dbcontroller.v1.SchemaMixin/"

func plainHTTP2() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

func newWire(seed uint64) (*wire, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &wire{addr: l.Addr().String(), listener: l, rng: rand.New(rand.NewPCG(seed, 7)), seen: map[string]int{},
		client: &http.Transport{Protocols: plainHTTP2(), IdleConnTimeout: 5 * time.Second}}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.streams = &httputil.ReverseProxy{FlushInterval: -1, Transport: w.client,
		Rewrite: func(r *httputil.ProxyRequest) {
			if to := w.target.Load(); to != nil {
				r.SetURL(&url.URL{Scheme: "http", Host: *to})
			}
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	w.server = &http.Server{Handler: w, Protocols: plainHTTP2(), ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = w.server.Serve(l) }() // ends with Close
	return w, nil
}

func (w *wire) close() {
	w.cancel()
	_ = w.server.Close()
	w.late.Wait()
	w.client.CloseIdleConnections()
}

// ServeHTTP implements http.Handler.
func (w *wire) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	if w.target.Load() == nil {
		panic(http.ErrAbortHandler) // nobody is there
	}
	method, ok := strings.CutPrefix(r.URL.Path, mixinPath)
	if !ok || strings.HasPrefix(method, "Watch") {
		w.streams.ServeHTTP(out, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	e := &exchange{method: method, wire: w, path: r.URL.RequestURI(), header: r.Header.Clone(), body: body}
	w.mu.Lock()
	w.seen[method]++
	hook := w.hook
	w.mu.Unlock()
	var a *answer
	if hook != nil {
		a = hook(e)
	} else {
		a = w.carry(r.Context(), e)
	}
	if a == nil {
		panic(http.ErrAbortHandler) // the connection breaks
	}
	for k, v := range a.header {
		out.Header()[k] = v
	}
	out.WriteHeader(a.status)
	_, _ = out.Write(a.body) // a caller that has gone does not matter
}

// carry delivers a call, with the trouble of the time.
func (w *wire) carry(ctx context.Context, e *exchange) *answer {
	switch w.roll() {
	case "lose request":
		return nil
	case "lose answer":
		e.send(ctx)
		return nil
	case "twice":
		e.send(ctx)
	case "again":
		wait := time.Duration(rand.Int64N(int64(3 * time.Second)))
		w.late.Go(func() {
			select {
			case <-time.After(wait): // how late it is
				e.send(w.ctx)
			case <-w.ctx.Done():
			}
		})
	}
	return e.send(ctx)
}

func (w *wire) roll() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	x := w.rng.Float64()
	for _, t := range []struct {
		kind string
		p    float64
	}{{"lose request", w.trouble.loseRequest}, {"lose answer", w.trouble.loseAnswer}, {"twice", w.trouble.twice}, {"again", w.trouble.again}} {
		if x -= t.p; x < 0 {
			w.seen[t.kind]++
			return t.kind
		}
	}
	return ""
}

// send delivers the call once. It returns nil when that fails.
func (e *exchange) send(ctx context.Context) *answer {
	to := e.wire.target.Load()
	if to == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+*to+e.path, bytes.NewReader(e.body))
	if err != nil {
		return nil
	}
	req.Header = e.header.Clone()
	res, err := e.wire.client.RoundTrip(req)
	if err != nil {
		return nil
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return nil
	}
	return &answer{res.StatusCode, res.Header, body}
}

func (w *wire) setTrouble(t trouble) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trouble = t
}

// intercept gives every call of the mixin to hook, nil to nobody. A nil answer breaks the connection.
func (w *wire) intercept(hook func(*exchange) *answer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hook = hook
}

func (w *wire) count(what string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen[what]
}

// gate holds the calls of one method: each is delivered, and its answer waits, or, with before, it waits to be delivered.
type gate struct {
	wire    *wire
	arrived chan *exchange // one for each call that is held
	opened  chan struct{}
	once    sync.Once
}

// hold closes a gate for the calls of a method that match; nil matches all. Open it before the world ends.
func (w *wire) hold(method string, before bool, match func(*exchange) bool) *gate {
	g := &gate{wire: w, arrived: make(chan *exchange, 100), opened: make(chan struct{})}
	w.intercept(func(e *exchange) *answer {
		if e.method != method || match != nil && !match(e) {
			return e.send(w.ctx)
		}
		if before {
			g.wait(e)
			return e.send(w.ctx)
		}
		a := e.send(w.ctx)
		g.wait(e)
		return a
	})
	return g
}

func (g *gate) wait(e *exchange) {
	select {
	case <-g.opened:
		return
	default:
	}
	select {
	case g.arrived <- e:
	case <-g.opened:
		return
	}
	select {
	case <-g.opened:
	case <-g.wire.ctx.Done():
	}
}

// open lets everything pass, now and later.
func (g *gate) open() {
	g.once.Do(func() {
		close(g.opened)
		g.wire.intercept(nil)
	})
}
