// Package feed is the change feed of one Deployment's database. Everything that follows changes uses it: read copies, watches, the policy
// cache, and later search, references and upgrades.
//
// Every row carries the id of the transaction that last wrote it (column change). What became visible between a snapshot P and now
// are exactly the rows with change >= xmax(P) or change in xip(P), however transactions overlapped, rolled back, were prepared or
// committed out of order; so a cursor is a snapshot, and reading it needs no replication slot and no log. Several writes of one row are delivered
// once, as its latest state.
//
// What a reader may rely on:
//
//   - every committed state of a row that stays is delivered after the cursor from before its commit: nothing is skipped
//   - delivery is at least once, and unordered between rows; the row's version decides
//   - a removal is delivered as a tombstone, until the retention purges it; a cursor from before that purge is refused with ErrCursorLost
//   - each read takes one short snapshot, whatever the backlog and however slow the reader
package feed

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/row"
)

// DefaultLimit is how many rows one read delivers at most, besides those of the same transaction as the last one.
const DefaultLimit = 5000

// Range is a half-open range of shard numbers.
type Range = descriptor.ShardRange

// Feed reads the change feed of one API version's schema. It is safe for concurrent use.
type Feed struct {
	pool  *pgxpool.Pool
	hub   *Hub
	limit int
}

// New returns the feed behind pool, whose connections have the version's schema as their search_path. limit is the most rows of a
// read; 0 is DefaultLimit.
func New(pool *pgxpool.Pool, hub *Hub, limit int) *Feed {
	if limit <= 0 {
		limit = DefaultLimit
	}
	return &Feed{pool: pool, hub: hub, limit: limit}
}

// Read is what one read of the feed found.
type Read struct {
	// Cursor after everything delivered.
	Cursor Cursor
	// SourceTime is the database's clock just before the snapshot: everything committed by then has been delivered, unless More.
	SourceTime time.Time
	// More says that the read was cut short at the limit.
	More bool
	// Rows delivered.
	Rows int
}

// positionSQL reads now() rather than clock_timestamp(): the start of the transaction is before its snapshot.
const positionSQL = `SELECT now(), pg_current_snapshot()::text, e.epoch, h.purged::text FROM ctl.feed_epoch e, horizon h`

// Now returns the present position, and the database's clock just before it.
func (f *Feed) Now(ctx context.Context) (Cursor, time.Time, error) {
	var p position
	if err := f.pool.QueryRow(ctx, positionSQL).Scan(p.dest()...); err != nil {
		return Cursor{}, time.Time{}, fmt.Errorf("read position of the change feed: %w", err)
	}
	c, err := p.cursor()
	return c, p.time, err
}

// ReadTuples delivers, as tuples of package row, what became visible after c in the shards, as region should see it: only rows owned
// here. emit gets one tuple at a time; it is valid during the call. The error is ErrCursorLost when c has no history any more.
func (f *Feed) ReadTuples(ctx context.Context, c Cursor, shards Range, region string, emit func(tuple []byte) error) (Read, error) {
	const where = ` AND shard >= $5 AND shard < $6 AND owning_region = (SELECT region FROM ctl.deployment_state) AND ` + row.Concerns
	var buf []byte
	return f.read(ctx, changes, c, row.Wire, row.Source, where, []any{row.RegionKeys(region), shards.From, shards.To}, func(rows pgx.Rows) error {
		buf = row.Append(buf[:0], rows.RawValues()[1:])
		return emit(buf)
	})
}

// Selection limits a read to some resources. The zero Selection is all.
type Selection struct {
	// Type is a short type name; empty is every type.
	Type string
	// Prefix of the names; empty is every name.
	Prefix string
	// Shards of the names; the zero Range is every shard.
	Shards Range
}

// ReadResources delivers what became visible after c: owned rows and read copies. A tombstone has state Gone and no content.
func (f *Feed) ReadResources(ctx context.Context, c Cursor, sel Selection, emit func(*store.Resource) error) (Read, error) {
	const where = ` AND ($1 = '' OR type = $1) AND ($5 = '' OR starts_with(name, $5)) AND ($7 = 0 OR shard >= $6 AND shard < $7)`
	return f.read(ctx, changes, c, row.ResourceColumns, resources, where, []any{sel.Type, sel.Prefix, sel.Shards.From, sel.Shards.To}, func(rows pgx.Rows) error {
		var change string
		r, err := row.ScanResource(rows, &change)
		if err != nil {
			return err
		}
		return emit(r)
	})
}

func resources(rest string) string { return "(SELECT * FROM resources " + rest + ") r" }

// ReadTasks delivers shadows that have had work due since c; the zero Cursor is all that have work due now. Work that is done is not delivered, so no
// tombstone can be missed. The error is ErrCursorLost after a rise of the epoch: start again from the zero Cursor.
func (f *Feed) ReadTasks(ctx context.Context, c Cursor, shards Range, emit func(store.Task) error) (Read, error) {
	if c.IsZero() {
		now, _, err := f.Now(ctx)
		if err != nil {
			return Read{}, err
		}
		c = Cursor{now.Epoch, Snapshot{Xmin: 3, Xmax: 3}} // before every transaction
	}
	const columns = "name, type, uuid::text, shard, shadow, tasks, coalesce(task_time, update_time)"
	return f.read(ctx, tasks, c, columns, resources, ` AND shard >= $1 AND shard < $5`, []any{shards.From, shards.To}, func(rows pgx.Rows) error {
		var t store.Task
		if err := rows.Scan(&t.Seen, &t.Name, &t.Type, &t.UUID, &t.Shard, &t.State, &t.Tasks, &t.TaskTime); err != nil {
			return fmt.Errorf("read tasks: %w", err)
		}
		return emit(t)
	})
}

// Columns that order rows by the transactions that wrote them: one for the resources, one for the work that is due for their shadows.
const (
	changes = "change"
	tasks   = "shadow_change"
)

// read runs one read of the rows in source by column order. Parameter $1 is the first of filter (columns may use it), $2 the ids in progress at c, $3 xmax of c, $4 the limit,
// and from $5 on the rest of filter.
func (f *Feed) read(ctx context.Context, order string, c Cursor, columns string, source func(rest string) string, where string, filter []any, deliver func(pgx.Rows) error) (read Read, err error) {
	if c.IsZero() {
		return Read{}, errors.New("read the change feed: no cursor")
	}
	running := make([]string, len(c.Snapshot.Xip))
	for i, x := range c.Snapshot.Xip {
		running[i] = strconv.FormatUint(x, 10)
	}
	args := append([]any{filter[0], running, strconv.FormatUint(c.Snapshot.Xmax, 10), f.limit}, filter[1:]...)

	conn, err := f.pool.Acquire(ctx)
	if err != nil {
		return Read{}, fmt.Errorf("read the change feed: %w", err)
	}
	defer conn.Release()

	// One round trip. The transaction makes both statements see one snapshot.
	var b pgx.Batch
	b.Queue("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
	b.Queue(positionSQL)
	columns = "SELECT " + order + "::text, " + columns + " FROM "
	b.Queue(columns+source("WHERE "+order+" = ANY ($2::text[]::xid8[])"+where+" OFFSET 0")+" UNION ALL "+
		columns+source("WHERE "+order+" >= $3::text::xid8"+where+" ORDER BY "+order+" FETCH FIRST ($4::bigint) ROWS WITH TIES"), args...)
	b.Queue("COMMIT")
	results := conn.SendBatch(ctx, &b)
	defer func() {
		if cerr := results.Close(); cerr != nil && err == nil {
			read, err = Read{}, fmt.Errorf("read the change feed: %w", cerr)
		}
		if err != nil && conn.Conn().PgConn().TxStatus() != 'I' {
			_ = conn.Conn().Close(context.WithoutCancel(ctx)) // the pool replaces it; the error is err
		}
	}()

	if _, err := results.Exec(); err != nil {
		return Read{}, fmt.Errorf("read the change feed: %w", err)
	}
	var p position
	if err := results.QueryRow().Scan(p.dest()...); err != nil {
		return Read{}, fmt.Errorf("read position of the change feed: %w", err)
	}
	next, err := p.cursor()
	if err != nil {
		return Read{}, err
	}
	if order == tasks {
		p.purged = nil
	}
	if err := p.covers(c, next); err != nil {
		return Read{}, err
	}

	rows, err := results.Query()
	if err != nil {
		return Read{}, fmt.Errorf("read the change feed: %w", err)
	}
	defer rows.Close()
	var last uint64 // largest change delivered
	beyond := 0     // rows of the part that the limit applies to
	n := 0
	for rows.Next() {
		x, err := strconv.ParseUint(string(rows.RawValues()[0]), 10, 64)
		if err != nil {
			return Read{}, fmt.Errorf("read the change feed: %w", err)
		}
		if x >= c.Snapshot.Xmax {
			beyond++
			last = max(last, x)
		}
		if err := deliver(rows); err != nil {
			return Read{}, err
		}
		n++
	}
	if err := rows.Err(); err != nil {
		return Read{}, fmt.Errorf("read the change feed: %w", err)
	}
	more := beyond >= f.limit
	if more {
		next.Snapshot = next.Snapshot.Until(last)
	}
	return Read{Cursor: next, SourceTime: p.time, More: more, Rows: n}, nil
}

// position is a row of positionSQL.
type position struct {
	time     time.Time
	snapshot string
	epoch    int64
	purged   *string
}

func (p *position) dest() []any { return []any{&p.time, &p.snapshot, &p.epoch, &p.purged} }

func (p *position) cursor() (Cursor, error) {
	s, err := ParseSnapshot(p.snapshot)
	if err != nil {
		return Cursor{}, fmt.Errorf("read position of the change feed: %w", err)
	}
	return Cursor{p.epoch, s}, nil
}

// covers says whether the history from c to now is whole: the same epoch, not in the future, and no tombstone purged that c had not seen.
// Since only the largest purged id is kept, a transaction that ended between c and now with a smaller id counts as purged too.
func (p *position) covers(c, now Cursor) error {
	switch {
	case c.Epoch != p.epoch:
		return fmt.Errorf("%w: it is of epoch %d, the database is in epoch %d", ErrCursorLost, c.Epoch, p.epoch)
	case c.Snapshot.Xmax > now.Snapshot.Xmax:
		return fmt.Errorf("%w: it lies in the future of the database", ErrCursorLost)
	case p.purged == nil:
		return nil
	}
	purged, err := strconv.ParseUint(*p.purged, 10, 64)
	if err != nil {
		return fmt.Errorf("read position of the change feed: %w", err)
	}
	if purged >= c.Snapshot.Xmax {
		return fmt.Errorf("%w: tombstones after it have been purged", ErrCursorLost)
	}
	for _, x := range c.Snapshot.Xip {
		if x <= purged && now.Snapshot.Sees(x) {
			return fmt.Errorf("%w: tombstones after it may have been purged", ErrCursorLost)
		}
	}
	return nil
}
