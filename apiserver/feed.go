package apiserver

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

// Replica is the source's side of replication: postgres.Store.
type Replica interface {
	Digests(ctx context.Context, shards feed.Range, region string) (digests []postgres.ShardDigest, epoch int64, err error)
	Versions(ctx context.Context, shards []int32, region string, emit func(name string, v store.Version) error) error
	FetchNames(ctx context.Context, names []string, region string, emit func(tuple []byte) error) error
	FetchShards(ctx context.Context, shards feed.Range, region string, emit func(tuple []byte) error) error
	Content
}

// Limits of the feed.
const (
	// A frame has at most so many bytes and rows. A row is never split: a larger one travels alone.
	frameBytes = 1 << 20
	frameRows  = 2000
	// tailHeld is how many bytes of one read are held, so that the read ends before its rows are sent. The part of a larger
	// read is sent during it, and keeps a connection of the database as long as its reader lets it.
	tailHeld = 8 << 20
	// heartbeat is the least time between frames without rows. Reads are at most a second apart, and so, about, are frames.
	heartbeat = 250 * time.Millisecond
)

// feedService is the RPC form of the feed.
type feedService struct{ s *Server }

// asked is what a Peer message says, once it is believed.
type asked struct {
	region string
	ring   int32
}

// admitPeer checks who asks, and that it finds what it expects. The first is answered with the same words whatever is wrong.
func (s *Server) admitPeer(ctx context.Context, p *dbcontrollerv1.Peer) (asked, error) {
	id := pki.Identity{TrustDomain: s.cfg.TrustDomain, Service: p.GetService(), Region: p.GetForRegion()}
	if s.cfg.TLS != nil && requestOf(ctx).caller != id || !s.isPeer(id) {
		return asked{}, denied()
	}
	wrong := func(what string, theirs, ours any) (asked, error) {
		return asked{}, fail(connect.CodeFailedPrecondition, dbcontrollerv1.ReasonWrongPeer, nil, nil,
			"this is %s of %s: %s is %v, the caller expects %v", s.cfg.Region, s.cfg.Service, what, ours, theirs)
	}
	self, declared := s.cfg.Topology.View().Deployment(registry.Key{Service: s.cfg.Service, Region: s.cfg.Region})
	switch {
	case p.GetOfRegion() != s.cfg.Region:
		return wrong("the region", p.GetOfRegion(), s.cfg.Region)
	case p.GetVersion() != s.cfg.Version:
		return wrong("the API version", p.GetVersion(), s.cfg.Version)
	case p.GetLayout() != row.Layout:
		return wrong("the row layout", p.GetLayout(), row.Layout)
	case !declared:
		return asked{}, fail(connect.CodeFailedPrecondition, dbcontrollerv1.ReasonWrongPeer, nil, nil,
			"no Deployment of %s is declared in %s, where this server runs", s.cfg.Service, s.cfg.Region)
	case int(p.GetRing()) != self.Ring:
		return wrong("the ring size", p.GetRing(), self.Ring)
	}
	return asked{region: p.GetForRegion(), ring: p.GetRing()}, nil
}

// openStream counts a stream of a region until release.
func (s *Server) openStream(region string) (release func(), err error) {
	s.streams.Lock()
	defer s.streams.Unlock()
	if s.streams.open[region] >= s.cfg.MaxPeerStreams {
		return nil, fail(connect.CodeResourceExhausted, "TOO_MANY_STREAMS", nil, nil,
			"region %s has %d streams open already: close one, or follow larger ranges", region, s.cfg.MaxPeerStreams)
	}
	s.streams.open[region]++
	return func() {
		s.streams.Lock()
		defer s.streams.Unlock()
		if s.streams.open[region]--; s.streams.open[region] == 0 {
			delete(s.streams.open, region)
		}
	}, nil
}

func (a asked) shards(r *dbcontrollerv1.Shards) (feed.Range, error) {
	if r.GetFrom() < 0 || r.GetFrom() >= r.GetTo() || r.GetTo() > a.ring {
		return feed.Range{}, invalid("shards", "[%d, %d) is no range of the ring: want 0 <= from < to <= %d", r.GetFrom(), r.GetTo(), a.ring)
	}
	return feed.Range{From: r.GetFrom(), To: r.GetTo()}, nil
}

// Ping answers with the clock of the database, the same that stamps the frames of a tail.
func (f feedService) Ping(ctx context.Context, req *connect.Request[dbcontrollerv1.PingRequest]) (*connect.Response[dbcontrollerv1.PingResponse], error) {
	if _, err := f.s.admitPeer(ctx, req.Msg.GetPeer()); err != nil {
		return nil, err
	}
	now, clock, err := f.s.cfg.Changes.Now(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&dbcontrollerv1.PingResponse{Epoch: now.Epoch, ServerTime: timestamppb.New(clock)}), nil
}

// Tail follows the change feed. The first frame comes at once: without a cursor it says where the stream begins.
func (f feedService) Tail(ctx context.Context, req *connect.Request[dbcontrollerv1.TailRequest], stream *connect.ServerStream[dbcontrollerv1.TailResponse]) error {
	s := f.s
	peer, err := s.admitPeer(ctx, req.Msg.GetPeer())
	if err != nil {
		return err
	}
	shards, err := peer.shards(req.Msg.GetShards())
	if err != nil {
		return err
	}
	t := tail{s: s, region: peer.region, shards: shards, send: func(res *dbcontrollerv1.TailResponse) error {
		return s.within(ctx, func() error { return stream.Send(res) })
	}}
	if t.cursor, err = feed.ParseToken(req.Msg.GetCursor()); err != nil {
		return err
	}
	release, err := s.openStream(peer.region)
	if err != nil {
		return err
	}
	defer release()
	if t.cursor.IsZero() {
		now, sourceTime, err := s.cfg.Changes.Now(ctx)
		if err != nil {
			return err
		}
		if err := t.end(nil, feed.Read{Cursor: now, SourceTime: sourceTime}); err != nil {
			return err
		}
	}
	return s.cfg.Changes.Follow(ctx, feed.Interest{Owned: true, Shards: shards}, t.step)
}

// tail is one open stream.
type tail struct {
	s      *Server
	region string
	shards feed.Range
	send   func(*dbcontrollerv1.TailResponse) error

	cursor feed.Cursor
	since  time.Time // source clock of the last read; zero before the first
	sent   time.Time // when the last frame was sent
}

// step sends one read. Its last frame says how far it went; the frames before have rows only.
func (t *tail) step(ctx context.Context) (more bool, err error) {
	var held []frame
	var current frame
	size := 0
	read, err := t.s.cfg.Changes.ReadTuples(ctx, t.cursor, t.shards, t.region, func(tuple []byte) error {
		if current.full(tuple) {
			held = append(held, current)
			current = frame{}
		}
		current.add(tuple)
		if size += len(tuple); size <= tailHeld {
			return nil
		}
		for _, f := range held {
			if err := t.send(&dbcontrollerv1.TailResponse{Rows: f.tuples, RowCount: f.rows}); err != nil {
				return err
			}
		}
		held, size = nil, len(current.tuples)
		return nil
	})
	if err != nil {
		return false, err
	}
	for _, f := range held {
		if err := t.send(&dbcontrollerv1.TailResponse{Rows: f.tuples, RowCount: f.rows}); err != nil {
			return false, err
		}
	}
	if read.Rows == 0 && !read.More && time.Since(t.sent) < heartbeat {
		t.cursor, t.since = read.Cursor, read.SourceTime
		return false, nil
	}
	return read.More, t.end(&current, read)
}

// end sends the last frame of a read.
func (t *tail) end(rows *frame, read feed.Read) error {
	res := &dbcontrollerv1.TailResponse{
		Cursor:     read.Cursor.Token(),
		SourceTime: timestamppb.New(read.SourceTime),
		More:       read.More,
		Epoch:      read.Cursor.Epoch,
	}
	if rows != nil {
		res.Rows, res.RowCount = rows.tuples, rows.rows
	}
	if !t.since.IsZero() {
		res.SinceTime = timestamppb.New(t.since)
	}
	t.cursor, t.since, t.sent = read.Cursor, read.SourceTime, time.Now()
	return t.send(res)
}

// frame gathers tuples.
type frame struct {
	tuples []byte
	rows   int32
}

// full says that tuple belongs into the next frame.
func (f *frame) full(tuple []byte) bool {
	return f.rows == frameRows || f.rows > 0 && len(f.tuples)+len(tuple) > frameBytes
}

func (f *frame) add(tuple []byte) {
	f.tuples = append(f.tuples, tuple...)
	f.rows++
}

// Digest answers the digests of what the caller should hold.
func (f feedService) Digest(ctx context.Context, req *connect.Request[dbcontrollerv1.DigestRequest]) (*connect.Response[dbcontrollerv1.DigestResponse], error) {
	peer, err := f.s.admitPeer(ctx, req.Msg.GetPeer())
	if err != nil {
		return nil, err
	}
	shards, err := peer.shards(req.Msg.GetShards())
	if err != nil {
		return nil, err
	}
	digests, epoch, err := f.s.cfg.Replica.Digests(ctx, shards, peer.region)
	if err != nil {
		return nil, err
	}
	res := &dbcontrollerv1.DigestResponse{Epoch: epoch}
	for _, d := range digests {
		res.Digests = append(res.Digests, &dbcontrollerv1.ShardDigest{Shard: d.Shard, Count: d.Count, Hash: uint64(d.Hash)})
	}
	return connect.NewResponse(res), nil
}

// Versions streams names and versions.
func (f feedService) Versions(ctx context.Context, req *connect.Request[dbcontrollerv1.VersionsRequest], stream *connect.ServerStream[dbcontrollerv1.VersionsResponse]) error {
	peer, err := f.s.admitPeer(ctx, req.Msg.GetPeer())
	if err != nil {
		return err
	}
	shards := req.Msg.GetShards()
	if len(shards) == 0 || len(shards) > int(peer.ring) {
		return invalid("shards", "has %d entries, want 1 to %d", len(shards), peer.ring)
	}
	for _, n := range shards {
		if n < 0 || n >= peer.ring {
			return invalid("shards", "%d is no shard of a ring of %d", n, peer.ring)
		}
	}
	release, err := f.s.openStream(peer.region)
	if err != nil {
		return err
	}
	defer release()
	res := &dbcontrollerv1.VersionsResponse{}
	flush := func() error {
		err := f.s.within(ctx, func() error { return stream.Send(res) })
		res.Rows = res.Rows[:0]
		return err
	}
	var sendErr error
	err = f.s.cfg.Replica.Versions(ctx, shards, peer.region, func(name string, v store.Version) error {
		res.Rows = append(res.Rows, &dbcontrollerv1.RowVersion{Name: name, Epoch: v.Epoch, ResourceVersion: v.Number})
		if len(res.Rows) == frameRows {
			sendErr = flush()
		}
		return sendErr
	})
	if sendErr != nil {
		return sendErr
	}
	if err == nil && len(res.Rows) > 0 {
		err = flush()
	}
	return err
}

// Fetch streams rows by name, or all of a range.
func (f feedService) Fetch(ctx context.Context, req *connect.Request[dbcontrollerv1.FetchRequest], stream *connect.ServerStream[dbcontrollerv1.FetchResponse]) error {
	s := f.s
	peer, err := s.admitPeer(ctx, req.Msg.GetPeer())
	if err != nil {
		return err
	}
	names := req.Msg.GetNames()
	if len(names) > postgres.MaxFetch {
		return invalid("names", "has %d entries, at most %d are allowed", len(names), postgres.MaxFetch)
	}
	var shards feed.Range
	if len(names) == 0 {
		if shards, err = peer.shards(req.Msg.GetShards()); err != nil {
			return err
		}
	} else if req.Msg.GetShards() != nil {
		return invalid("shards", "must be empty when names are given")
	}
	release, err := s.openStream(peer.region)
	if err != nil {
		return err
	}
	defer release()
	var current frame
	send := func() error {
		return s.within(ctx, func() error {
			return stream.Send(&dbcontrollerv1.FetchResponse{Rows: current.tuples, RowCount: current.rows})
		})
	}
	emit := func(tuple []byte) error {
		if current.full(tuple) {
			if err := send(); err != nil {
				return err
			}
			current = frame{tuples: current.tuples[:0]}
		}
		current.add(tuple)
		return nil
	}
	if len(names) > 0 {
		err = s.cfg.Replica.FetchNames(ctx, names, peer.region, emit)
	} else {
		err = s.cfg.Replica.FetchShards(ctx, shards, peer.region, emit)
	}
	if err == nil && current.rows > 0 {
		err = send()
	}
	return err
}
