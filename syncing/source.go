package syncing

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/internal/dialguard"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

// Source is what a remote node asks of the owner. It is safe for concurrent use. Errors are *SourceError; a sequence ends after its first
// error. A sequence that is left early ends its stream.
type Source interface {
	// Ping returns the peer's clock.
	Ping(ctx context.Context) (time.Time, error)
	// Tail yields what changed in the shards since a cursor, for ever; an empty cursor is now. The first frame comes at once and the next ones at
	// least every second. The error is a feed.ErrCursorLost when the cursor has no history.
	Tail(ctx context.Context, shards feed.Range, cursor string) iter.Seq2[*Frame, error]
	// Digest returns a count and a hash of the rows that this region should hold, for each shard that has any, and the owner's epoch.
	Digest(ctx context.Context, shards feed.Range) ([]postgres.ShardDigest, int64, error)
	// Versions yields the rows of these shards that this region should hold, ordered by name.
	Versions(ctx context.Context, shards []int32) iter.Seq2[NameVersion, error]
	// Fetch yields the rows of these names, as removals if this region should drop them; one that it should not know of is not sent. At most
	// fetchBatch names.
	Fetch(ctx context.Context, names []string) iter.Seq2[Chunk, error]
	// FetchShards yields all rows of the shards that this region should hold.
	FetchShards(ctx context.Context, shards feed.Range) iter.Seq2[Chunk, error]
	// Close gives connections back. It is called when nothing uses the source any more.
	Close()
}

// Chunk is a number of whole rows as tuples of package row.
type Chunk struct {
	Rows  []byte
	Count int
}

// Frame is a part of one read of the owner's feed.
type Frame struct {
	Rows     []byte
	RowCount int
	// Cursor is set on the last part of a read.
	Cursor string
	// SourceTime is the owner's clock just before the read, SinceTime that of the read before: no change in this one was visible by then.
	SourceTime, SinceTime time.Time
	// More says that the read was cut short and the next one follows at once.
	More bool
	// Epoch of the owner; like all fields below Cursor it is set with Cursor.
	Epoch int64
}

// Reason classifies what went wrong, for people and for the label reason of the metrics.
type Reason string

// The reasons.
const (
	Unreachable   Reason = "unreachable"    // no connection, or it went silent
	WrongIdentity Reason = "wrong_identity" // the certificate is not that of the Deployment
	WrongEndpoint Reason = "wrong_endpoint" // no Deployment may be where its endpoint leads (package dialguard)
	WrongPeer     Reason = "wrong_peer"     // another Deployment answers, or with another version, ring or row layout: its message says
	CursorLost    Reason = "cursor_lost"    // normal after a failover of the owner or a long absence
	Denied        Reason = "denied"         // the peer does not know or does not want us
	Unimplemented Reason = "not_implemented"
	PeerFailed    Reason = "peer_failed" // the peer had an error of its own
	Malformed     Reason = "malformed"   // the peer sent what cannot be read
	ApplyFailed   Reason = "apply"       // the local database did not take the rows
)

var reasons = []Reason{Unreachable, WrongIdentity, WrongEndpoint, WrongPeer, CursorLost, Denied, Unimplemented, PeerFailed, Malformed, ApplyFailed}

// SourceError is an error of a peer.
type SourceError struct {
	Reason Reason
	// Op is what was asked, for example "tail".
	Op  string
	Err error
}

// Error returns one line.
func (e *SourceError) Error() string { return e.Op + ": " + string(e.Reason) + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *SourceError) Unwrap() error { return e.Err }

// Is makes a lost cursor a feed.ErrCursorLost.
func (e *SourceError) Is(target error) bool {
	return target == feed.ErrCursorLost && e.Reason == CursorLost
}

// reasonOf returns the reason of an error of a session.
func reasonOf(err error) Reason {
	var s *SourceError
	switch {
	case errors.As(err, &s):
		return s.Reason
	case errors.Is(err, postgres.ErrStaleEpoch):
		return CursorLost
	case errors.Is(err, row.ErrMalformed):
		return Malformed
	}
	return ApplyFailed
}

// Limits of one question to a peer.
const (
	// fetchBatch is how many names one Fetch asks for.
	fetchBatch = 1000
	// tailSilence: a Tail has a frame every second, so one that is silent for so long is dead, whatever TCP believes.
	tailSilence = 5 * time.Second
	// listSilence and digestTimeout leave the peer time to read its whole table first.
	listSilence   = time.Minute
	digestTimeout = 2 * time.Minute
	pingTimeout   = 2 * time.Second
	// maxMessage is far above what a server sends in one piece, and far below what would hurt.
	maxMessage = 32 << 20
)

// NewTransport returns an HTTP/2 transport for the streams of one peer, which must prove to be want. Without a source it speaks plain text, for
// development. A connection that carries nothing for five seconds is probed, and dropped after five more, so that a link that swallows
// packets is noticed. dial, unless nil, opens the connections.
func NewTransport(source pki.Source, want pki.Identity, dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Transport {
	t := pki.Transport(source, want, dial)
	t.HTTP2 = &http.HTTP2Config{
		SendPingTimeout:  5 * time.Second,
		PingTimeout:      5 * time.Second,
		MaxReadFrameSize: 1 << 20, // a frame of rows in few writes and reads
		// What one stream may have under way, beyond the frame that is applied and the one that is held.
		MaxReceiveBufferPerStream: 4 << 20,
	}
	if t.TLSClientConfig != nil {
		verify := t.TLSClientConfig.VerifyConnection
		t.TLSClientConfig.VerifyConnection = func(cs tls.ConnectionState) error {
			if err := verify(cs); err != nil {
				return identityError{err}
			}
			return nil
		}
	}
	return t
}

// identityError marks a refused certificate, which otherwise looks like any failed connection.
type identityError struct{ error }

func (e identityError) Unwrap() error { return e.error }

// Peer says who asks and who should answer.
type Peer struct {
	Service   string
	ForRegion string
	OfRegion  string
	Version   string // API version
	Ring      int
}

// NewSource returns the Source of a Deployment's API server at endpoint, over transport, whose idle connections its Close closes.
func NewSource(transport http.RoundTripper, endpoint string, peer Peer) Source {
	c := pki.Client(transport)
	return &client{
		http: c,
		feed: dbcontrollerv1connect.NewFeedClient(c, endpoint,
			connect.WithGRPC(), connect.WithReadMaxBytes(maxMessage)),
		peer: &v1.Peer{Service: peer.Service, ForRegion: peer.ForRegion, OfRegion: peer.OfRegion, Version: peer.Version,
			Layout: row.Layout, Ring: int32(peer.Ring)},
	}
}

type client struct {
	http *http.Client
	feed dbcontrollerv1connect.FeedClient
	peer *v1.Peer
}

func (c *client) Close() { c.http.CloseIdleConnections() }

func (c *client) Ping(ctx context.Context) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	r, err := c.feed.Ping(ctx, connect.NewRequest(&v1.PingRequest{Peer: c.peer}))
	if err != nil {
		return time.Time{}, classify("ping", err)
	}
	return r.Msg.GetServerTime().AsTime(), nil
}

func (c *client) Tail(ctx context.Context, shards feed.Range, cursor string) iter.Seq2[*Frame, error] {
	open := func(ctx context.Context) (*connect.ServerStreamForClient[v1.TailResponse], error) {
		return c.feed.Tail(ctx, connect.NewRequest(&v1.TailRequest{Peer: c.peer, Shards: wire(shards), Cursor: cursor}))
	}
	return func(yield func(*Frame, error) bool) {
		for m, err := range stream(ctx, "tail", tailSilence, open) {
			if err != nil {
				yield(nil, err)
				return
			}
			f := &Frame{Rows: m.GetRows(), RowCount: int(m.GetRowCount()), Cursor: m.GetCursor(), More: m.GetMore(), Epoch: m.GetEpoch()}
			if t := m.GetSourceTime(); t != nil {
				f.SourceTime = t.AsTime()
			}
			if t := m.GetSinceTime(); t != nil {
				f.SinceTime = t.AsTime()
			}
			if !yield(f, nil) {
				return
			}
		}
		// The server has ended a stream that never ends: it is shutting down.
		yield(nil, &SourceError{Unreachable, "tail", errors.New("the peer has closed the stream")})
	}
}

func (c *client) Digest(ctx context.Context, shards feed.Range) ([]postgres.ShardDigest, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, digestTimeout)
	defer cancel()
	r, err := c.feed.Digest(ctx, connect.NewRequest(&v1.DigestRequest{Peer: c.peer, Shards: wire(shards)}))
	if err != nil {
		return nil, 0, classify("digest", err)
	}
	digests := make([]postgres.ShardDigest, len(r.Msg.GetDigests()))
	for i, d := range r.Msg.GetDigests() {
		digests[i] = postgres.ShardDigest{Shard: d.GetShard(), Count: d.GetCount(), Hash: int64(d.GetHash())}
	}
	return digests, r.Msg.GetEpoch(), nil
}

func (c *client) Versions(ctx context.Context, shards []int32) iter.Seq2[NameVersion, error] {
	open := func(ctx context.Context) (*connect.ServerStreamForClient[v1.VersionsResponse], error) {
		return c.feed.Versions(ctx, connect.NewRequest(&v1.VersionsRequest{Peer: c.peer, Shards: shards}))
	}
	return func(yield func(NameVersion, error) bool) {
		for m, err := range stream(ctx, "list versions", listSilence, open) {
			if err != nil {
				yield(NameVersion{}, err)
				return
			}
			for _, r := range m.GetRows() {
				if !yield(NameVersion{r.GetName(), store.Version{Epoch: r.GetEpoch(), Number: r.GetResourceVersion()}}, nil) {
					return
				}
			}
		}
	}
}

func (c *client) Fetch(ctx context.Context, names []string) iter.Seq2[Chunk, error] {
	return c.fetch(ctx, &v1.FetchRequest{Peer: c.peer, Names: names})
}

func (c *client) FetchShards(ctx context.Context, shards feed.Range) iter.Seq2[Chunk, error] {
	return c.fetch(ctx, &v1.FetchRequest{Peer: c.peer, Shards: wire(shards)})
}

func (c *client) fetch(ctx context.Context, request *v1.FetchRequest) iter.Seq2[Chunk, error] {
	open := func(ctx context.Context) (*connect.ServerStreamForClient[v1.FetchResponse], error) {
		return c.feed.Fetch(ctx, connect.NewRequest(request))
	}
	return func(yield func(Chunk, error) bool) {
		for m, err := range stream(ctx, "fetch", listSilence, open) {
			if err != nil {
				yield(Chunk{}, err)
				return
			}
			if !yield(Chunk{m.GetRows(), int(m.GetRowCount())}, nil) {
				return
			}
		}
	}
}

func wire(r feed.Range) *v1.Shards { return &v1.Shards{From: r.From, To: r.To} }

// stream yields the messages of a server stream. It is cut when nothing comes for silence while the consumer is waiting.
func stream[T any](ctx context.Context, op string, silence time.Duration,
	open func(context.Context) (*connect.ServerStreamForClient[T], error),
) iter.Seq2[*T, error] {
	return func(yield func(*T, error) bool) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		silent := fmt.Errorf("nothing for %s", silence)
		watchdog := time.AfterFunc(silence, func() { cancel(silent) })
		defer watchdog.Stop()
		fail := func(err error) {
			if errors.Is(context.Cause(ctx), silent) {
				yield(nil, &SourceError{Unreachable, op, silent})
				return
			}
			yield(nil, classify(op, err))
		}

		s, err := open(ctx)
		if err != nil {
			fail(err)
			return
		}
		defer func() { _ = s.Close() }() // the context is cancelled next: nothing is left to be told
		for s.Receive() {
			watchdog.Stop() // how long the consumer takes is no fault of the peer
			if !yield(s.Msg(), nil) {
				return
			}
			watchdog.Reset(silence)
		}
		if err := s.Err(); err != nil {
			fail(err)
		}
	}
}

// classify turns an error of the RPC client into a SourceError.
func classify(op string, err error) error {
	e := &SourceError{PeerFailed, op, err}
	var id identityError
	var endpoint *dialguard.Error
	var rpc *connect.Error
	switch {
	case errors.As(err, &endpoint):
		e.Reason = WrongEndpoint
		return e
	case errors.As(err, &id):
		e.Reason = WrongIdentity
		return e
	case !errors.As(err, &rpc):
		return e
	}
	switch rpc.Code() {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeCanceled:
		e.Reason = Unreachable
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		e.Reason = Denied
	case connect.CodeUnimplemented:
		e.Reason = Unimplemented
	case connect.CodeFailedPrecondition:
		e.Reason = WrongPeer
		if info(rpc) == v1.ReasonCursorLost {
			e.Reason = CursorLost
		}
	}
	return e
}

// info returns the reason that the server attached, or "".
func info(e *connect.Error) string {
	for _, d := range e.Details() {
		if m, err := d.Value(); err == nil {
			if i, ok := m.(*errdetails.ErrorInfo); ok && i.GetDomain() == v1.ErrorDomain {
				return i.GetReason()
			}
		}
	}
	return ""
}
