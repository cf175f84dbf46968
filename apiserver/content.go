package apiserver

import (
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Content is what verification by other regions asks of the database: postgres.Store.
type Content interface {
	OwnedRanges(ctx context.Context, region string, types []string, after string, size, parts int) (postgres.Ranges, error)
	OwnedHashes(ctx context.Context, region string, types []string, after, to string, emit func(postgres.RowHash) error) error
	LookOwned(ctx context.Context, region string, names []string) ([]postgres.RowHash, error)
	Epoch(ctx context.Context) (int64, error)
}

// Limits of one answer of Ranges: some ten seconds of work at most.
const (
	maxRangeSize  = 100_000
	maxRangeParts = 100
	maxRangeRows  = 200_000
)

// Ranges answers digests of the content that the caller should hold.
func (f feedService) Ranges(ctx context.Context, req *connect.Request[dbcontrollerv1.RangesRequest]) (*connect.Response[dbcontrollerv1.RangesResponse], error) {
	peer, err := f.s.admitPeer(ctx, req.Msg.GetPeer())
	if err != nil {
		return nil, err
	}
	size, parts := int(req.Msg.GetSize()), int(req.Msg.GetParts())
	if size < 1 || size > maxRangeSize || parts < 1 || parts > maxRangeParts || size*parts > maxRangeRows {
		return nil, invalid("size", "%d rows in each of %d parts: want at least one of each, and at most %d rows in all", size, parts, maxRangeRows)
	}
	r, err := f.s.cfg.Replica.OwnedRanges(ctx, peer.region, req.Msg.GetTypes(), req.Msg.GetAfter(), size, parts)
	if err != nil {
		return nil, err
	}
	res := &dbcontrollerv1.RangesResponse{Scanned: r.Scanned, Epoch: r.Epoch, Time: timestamppb.New(r.Time), Total: r.Total}
	for _, d := range r.Ranges {
		res.Ranges = append(res.Ranges, &dbcontrollerv1.RangeDigest{To: d.To, Count: d.Count, Hash: uint64(d.Hash)})
	}
	return connect.NewResponse(res), nil
}

// Hashes streams the hashes of a range, or of names.
func (f feedService) Hashes(ctx context.Context, req *connect.Request[dbcontrollerv1.HashesRequest], stream *connect.ServerStream[dbcontrollerv1.HashesResponse]) error {
	s, c := f.s, f.s.cfg.Replica
	peer, err := s.admitPeer(ctx, req.Msg.GetPeer())
	if err != nil {
		return err
	}
	names := req.Msg.GetNames()
	if len(names) > postgres.MaxFetch {
		return invalid("names", "has %d entries, at most %d are allowed", len(names), postgres.MaxFetch)
	}
	release, err := s.openStream(peer.region)
	if err != nil {
		return err
	}
	defer release()
	// Before the rows: if a failover comes between, the caller sees the older epoch, to which no cursor of the new one compares.
	epoch, err := c.Epoch(ctx)
	if err != nil {
		return err
	}
	res := &dbcontrollerv1.HashesResponse{Epoch: epoch}
	flush := func() error {
		err := s.within(ctx, func() error { return stream.Send(res) })
		res.Rows = res.Rows[:0]
		return err
	}
	emit := func(r postgres.RowHash) error {
		res.Rows = append(res.Rows, &dbcontrollerv1.RowHash{
			Name: r.Name, Type: r.Type, Epoch: r.Version.Epoch, ResourceVersion: r.Version.Number, Hash: uint64(r.Hash), Held: r.Held, Change: r.Change,
			OwningRegion: r.Owner,
		})
		if len(res.Rows) == frameRows {
			return flush()
		}
		return nil
	}
	if len(names) == 0 {
		err = c.OwnedHashes(ctx, peer.region, req.Msg.GetTypes(), req.Msg.GetAfter(), req.Msg.GetTo(), emit)
	} else {
		var rows []postgres.RowHash
		if rows, err = c.LookOwned(ctx, peer.region, names); err == nil {
			for _, r := range rows {
				if err = emit(r); err != nil {
					break
				}
			}
		}
	}
	if err == nil {
		err = flush() // even without rows: the epoch
	}
	return err
}
