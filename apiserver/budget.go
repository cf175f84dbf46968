package apiserver

import (
	"io"
	"net/http"
	"sync"

	"connectrpc.com/connect"

	"github.com/dbcontroller/db-controller/internal/pki"
)

// budget bounds the bytes of requests that are in flight, over all callers and for each, so that no caller can fill the memory, or take the room of the
// others. A call counts with what has arrived of its body, and never with less than callBytes.
type budget struct {
	total, share int64

	mu   sync.Mutex
	used int64
	of   map[pki.Identity]int64
}

// callBytes is what a call costs besides its body: goroutines and buffers.
const callBytes = 16 << 10

func newBudget(total int64) *budget {
	return &budget{total: total, share: total / 4, of: map[pki.Identity]int64{}}
}

func (b *budget) take(id pki.Identity, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	share := b.share
	if id == (pki.Identity{}) { // without TLS all callers are nobody
		share = b.total
	}
	if b.used+n > b.total || b.of[id]+n > share {
		return false
	}
	b.used += n
	b.of[id] += n
	return true
}

func (b *budget) give(id pki.Identity, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	if b.of[id] -= n; b.of[id] == 0 {
		delete(b.of, id)
	}
}

// errTooMuch is the refusal of a request for which there is no room.
func errTooMuch() error {
	return fail(connect.CodeResourceExhausted, "TOO_MUCH_IN_FLIGHT", nil, nil, "this caller, or all together, have too many bytes of requests in flight here: repeat later")
}

// charge counts the body of r while it is read, until its release, and reports false if there is no room for the call. A body that is compressed counts
// as the largest that it may become.
func (s *Server) charge(r *http.Request, id pki.Identity) (body *countedBody, ok bool) {
	var first int64 = callBytes
	for _, h := range []string{"Content-Encoding", "Connect-Content-Encoding", "Grpc-Encoding"} {
		if e := r.Header.Get(h); e != "" && e != "identity" {
			first = int64(s.cfg.MaxMessageBytes)
		}
	}
	if !s.budget.take(id, first) {
		return nil, false
	}
	body = &countedBody{ReadCloser: r.Body, budget: s.budget, id: id, taken: first}
	r.Body = body
	return body, true
}

// countedBody takes from the budget what is read. Handlers read a body from one goroutine, but may leave that behind.
type countedBody struct {
	io.ReadCloser
	budget *budget
	id     pki.Identity

	mu          sync.Mutex
	read, taken int64
	released    bool
}

// Read implements io.Reader.
func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.read += int64(n); b.read > b.taken && !b.released {
		more := max(b.read-b.taken, callBytes)
		if !b.budget.take(b.id, more) {
			return 0, errTooMuch()
		}
		b.taken += more
	}
	return n, err
}

// consumed gives back all but callBytes: the message has been read, and a stream may go on for days.
func (b *countedBody) consumed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.released {
		b.budget.give(b.id, b.taken-callBytes)
		b.read, b.taken = 0, callBytes
	}
}

func (b *countedBody) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.released {
		b.released = true
		b.budget.give(b.id, b.taken)
	}
}
