package syncing

import (
	"context"
	"iter"
	"net/http"

	"connectrpc.com/connect"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// ContentSource is what verification asks of the owner. It is safe for concurrent use; errors are as those of Source.
type ContentSource interface {
	// Ranges returns digests of the rows of the types (none: all) that this region should hold, in up to parts ranges of size rows of the owner's table, behind after.
	Ranges(ctx context.Context, types []string, after string, size, parts int) (postgres.Ranges, error)
	// Hashes yields a hash of each of these rows with a name in (after, to], ordered by name.
	Hashes(ctx context.Context, types []string, after, to string) iter.Seq2[postgres.RowHash, error]
	// Look returns the rows of these names, whoever should hold them, and the owner's epoch. At most fetchBatch names.
	Look(ctx context.Context, names []string) ([]postgres.RowHash, int64, error)
	// Fetch and Close are those of Source.
	Fetch(ctx context.Context, names []string) iter.Seq2[Chunk, error]
	Close()
}

// NewContentSource returns the ContentSource of a Deployment's API server, as NewSource does its Source.
func NewContentSource(transport http.RoundTripper, endpoint string, peer Peer) ContentSource {
	return NewSource(transport, endpoint, peer).(*client)
}

func (c *client) Ranges(ctx context.Context, types []string, after string, size, parts int) (postgres.Ranges, error) {
	ctx, cancel := context.WithTimeout(ctx, digestTimeout)
	defer cancel()
	r, err := c.feed.Ranges(ctx, connect.NewRequest(&v1.RangesRequest{Peer: c.peer, Types: types, After: after, Size: int32(size), Parts: int32(parts)}))
	if err != nil {
		return postgres.Ranges{}, classify("digest ranges", err)
	}
	all := postgres.Ranges{Scanned: r.Msg.GetScanned(), Epoch: r.Msg.GetEpoch(), Time: r.Msg.GetTime().AsTime(), Total: r.Msg.GetTotal()}
	for _, d := range r.Msg.GetRanges() {
		all.Ranges = append(all.Ranges, postgres.RangeDigest{To: d.GetTo(), Count: d.GetCount(), Hash: int64(d.GetHash())})
	}
	return all, nil
}

func (c *client) Hashes(ctx context.Context, types []string, after, to string) iter.Seq2[postgres.RowHash, error] {
	return func(yield func(postgres.RowHash, error) bool) {
		for m, err := range c.hashes(ctx, &v1.HashesRequest{Peer: c.peer, Types: types, After: after, To: to}) {
			if err != nil {
				yield(postgres.RowHash{}, err)
				return
			}
			for _, r := range m.GetRows() {
				if !yield(rowHash(r), nil) {
					return
				}
			}
		}
	}
}

func (c *client) Look(ctx context.Context, names []string) (rows []postgres.RowHash, epoch int64, err error) {
	for m, err := range c.hashes(ctx, &v1.HashesRequest{Peer: c.peer, Names: names}) {
		if err != nil {
			return nil, 0, err
		}
		epoch = m.GetEpoch()
		for _, r := range m.GetRows() {
			rows = append(rows, rowHash(r))
		}
	}
	return rows, epoch, nil
}

func (c *client) hashes(ctx context.Context, request *v1.HashesRequest) iter.Seq2[*v1.HashesResponse, error] {
	return stream(ctx, "list hashes", listSilence, func(ctx context.Context) (*connect.ServerStreamForClient[v1.HashesResponse], error) {
		return c.feed.Hashes(ctx, connect.NewRequest(request))
	})
}

func rowHash(r *v1.RowHash) postgres.RowHash {
	return postgres.RowHash{
		Name: r.GetName(), Type: r.GetType(), Owner: r.GetOwningRegion(), Version: store.Version{Epoch: r.GetEpoch(), Number: r.GetResourceVersion()},
		Hash: int64(r.GetHash()), Held: r.GetHeld(), Change: r.GetChange(),
	}
}
