package syncing

import (
	"context"
	"time"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Target is the local database as the destination of copies: *postgres.Store. It is safe for concurrent use.
type Target interface {
	// CopyDigests and CopyVersions (ordered by name) tell which of owner's rows are held here.
	CopyDigests(ctx context.Context, shards feed.Range, owner string) ([]postgres.ShardDigest, error)
	CopyVersions(ctx context.Context, shards []int32, owner string, emit func(name string, v store.Version) error) error
	// Merge writes rows, and the cursor if there is one, in one transaction. Rows that cannot be written go to the quarantine.
	Merge(ctx context.Context, b postgres.Batch) (postgres.Merged, error)
	// DeleteExtras deletes copies that are still at exactly the version given.
	DeleteExtras(ctx context.Context, p postgres.Peer, extras []postgres.NameVersion) (int, error)
	// LoadCursor returns the zero cursor when there is none for all the shards.
	LoadCursor(ctx context.Context, service, region string, shards feed.Range) (feed.Cursor, error)
	SaveCursor(ctx context.Context, service, region string, shards feed.Range, c feed.Cursor) error
	// CopyOwners lists the regions of which rows have ever been written.
	CopyOwners(ctx context.Context, service string) ([]string, error)
	// DropCopies deletes up to limit copies of owner's rows and returns how many.
	DropCopies(ctx context.Context, service, owner string, limit int) (int, error)
	// SaveRate notes how many rows a second were written: what is RateCopy and the region that owns them.
	SaveRate(ctx context.Context, what string, rowsPerSecond float64) error
	// Quarantine lists rows that could not be applied, and says how many there are.
	Quarantine(ctx context.Context, region string, limit int) ([]postgres.Quarantined, int, error)
}

// What an applied row was, as the label op of the metrics.
const (
	opTail    = "tail"    // a change as it happened
	opCopy    = "copy"    // the bulk of an initial copy
	opCompare = "compare" // found missing or old by a comparison
	opRepair  = "repair"  // found missing or old by an audit
	opDelete  = "delete"  // an extra copy
)

// dbSyncer is the local database as a destination. It writes in the session's applier, so that a live frame never waits for more than one chunk.
type dbSyncer struct {
	s     *session
	epoch int64 // of the owner, when it was asked
	empty bool  // hardly any row is here yet
	op    string
	// sent, unless nil, is told of the chunks that the database has been given.
	sent func(Chunk)
}

func (d *dbSyncer) put(ctx context.Context, c Chunk) error {
	return d.s.inApplier(ctx, func(ctx context.Context) error {
		n := d.s.n
		began := time.Now()
		merged, err := n.peer.cfg.Target.Merge(ctx, postgres.Batch{Peer: n.owner(d.epoch), Tuples: c.Rows, Rows: c.Count, Shards: n.shards, Empty: d.empty})
		if err != nil {
			return err
		}
		n.count(d.op, merged, len(c.Rows))
		if err := d.s.measure(ctx, c.Count, time.Since(began)); err != nil {
			return err
		}
		if d.sent != nil {
			d.sent(c)
		}
		return nil
	})
}

func (d *dbSyncer) drop(ctx context.Context, extras []NameVersion) error {
	if len(extras) == 0 {
		return nil
	}
	at := make([]postgres.NameVersion, len(extras))
	for i, e := range extras {
		at[i] = postgres.NameVersion(e)
	}
	return d.s.inApplier(ctx, func(ctx context.Context) error {
		n := d.s.n
		deleted, err := n.peer.cfg.Target.DeleteExtras(ctx, n.owner(d.epoch), at)
		if err != nil {
			return err
		}
		n.count(opDelete, postgres.Merged{Applied: deleted}, 0)
		return nil
	})
}
