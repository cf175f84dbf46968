package postgres

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/row"
)

// This file is the destination's side of replication: rows of another region become read copies.

// Peer is the Deployment whose rows are copied, and the epoch in which they were read.
type Peer struct {
	Service, Region string
	Epoch           int64
}

// Batch is a number of rows of one peer that are merged in one transaction.
type Batch struct {
	Peer Peer
	// Tuples of package row; Rows is their number.
	Tuples []byte
	Rows   int
	// Shards in which every row must lie.
	Shards feed.Range
	// Cursor, unless zero, is saved for Shards in the same transaction: everything up to it has been merged.
	Cursor feed.Cursor
	// Empty says that hardly any of the rows is here yet: they are copied straight into the table, and merged only if that fails.
	Empty bool
}

// Merged is what became of a Batch.
type Merged struct {
	// Applied rows were newer than what was held; the others had been applied before.
	Applied int
	// Quarantined rows could not be applied; they are in ctl.quarantine with the cause.
	Quarantined int
}

// ErrStaleEpoch means that the rows were read in an epoch of the peer that has ended.
var ErrStaleEpoch = errors.New("the peer has started a new epoch since these rows were read")

// mergeSQL takes a row if it is newer than the one held, or if the one held is of an older epoch and differs: about those the owner is right, which
// may have lost the state that was copied here. Names that another region owns go to the quarantine; a row that is taken leaves it. Nothing
// happens once the peer has started a newer epoch than the one in which the rows were read. For the subqueries see writeSQL.
const mergeSQL = `
WITH input AS MATERIALIZED (
	SELECT name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions::text[] AS regions, state, block_deletion,
		create_time, update_time, delete_time, meta, body
	FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::uuid[]), (SELECT $4::bigint[]), (SELECT $5::bigint[]), (SELECT $6::bigint[]),
			(SELECT $7::int[]), (SELECT $8::text[]), (SELECT $9::text[]), (SELECT $10::smallint[]), (SELECT $11::bool[]), (SELECT $12::timestamptz[]),
			(SELECT $13::timestamptz[]), (SELECT $14::timestamptz[]), (SELECT $15::jsonb[]), (SELECT $16::jsonb[]))
		AS i (` + row.Columns + `)
	WHERE ` + epochStands + `
), merged AS (
	INSERT INTO resources AS t (` + row.Columns + `) SELECT ` + row.Columns + ` FROM input ORDER BY name
	ON CONFLICT (name) DO UPDATE SET type = excluded.type, uuid = excluded.uuid, epoch = excluded.epoch, resource_version = excluded.resource_version,
		generation = excluded.generation, change = pg_current_xact_id(), regions = excluded.regions, left_regions = '{}', state = excluded.state,
		block_deletion = excluded.block_deletion, create_time = excluded.create_time, update_time = excluded.update_time, delete_time = excluded.delete_time,
		meta = excluded.meta, body = excluded.body
	WHERE t.owning_region = excluded.owning_region AND ((t.epoch, t.resource_version) < (excluded.epoch, excluded.resource_version)
		OR t.epoch < $17 AND (t.epoch, t.resource_version, t.uuid, t.state) <> (excluded.epoch, excluded.resource_version, excluded.uuid, excluded.state))
	RETURNING name
), disputed AS (
	INSERT INTO ctl.quarantine AS q (version, name, source_region, epoch, resource_version, cause)
	SELECT $20, s.name, $19, s.epoch, s.resource_version, 'OwnerDispute: the row here is owned by region ' || t.owning_region
	FROM input s CROSS JOIN LATERAL (SELECT owning_region FROM resources WHERE name = s.name OFFSET 0) t
	WHERE s.name NOT IN (SELECT name FROM merged) AND t.owning_region <> s.owning_region
	ON CONFLICT (version, source_region, name) DO UPDATE SET epoch = excluded.epoch, resource_version = excluded.resource_version, cause = excluded.cause,
		tries = q.tries + 1, last_seen = now()
	RETURNING name
), cleared AS (
	DELETE FROM ctl.quarantine q USING merged m WHERE q.version = $20 AND q.source_region = $19 AND q.name = m.name
)
SELECT (SELECT count(*) FROM merged), (SELECT count(*) FROM disputed), ` + epochStands

// epochStands is the condition that the epoch in $17 is the latest one seen of the peer $18, $19.
const epochStands = `(SELECT epoch FROM ctl.peer_epoch WHERE service = $18 AND region = $19) = $17`

const quarantineSQL = `
	INSERT INTO ctl.quarantine AS q (version, name, source_region, epoch, resource_version, cause) VALUES ($1, $2, $3, $4, $5, $6)
	ON CONFLICT (version, source_region, name) DO UPDATE SET epoch = excluded.epoch, resource_version = excluded.resource_version, cause = excluded.cause,
		tries = q.tries + 1, last_seen = now()`

const saveCursorSQL = `SELECT ctl.save_cursor($1, $2, $3, $4::text::int4range, $5, $6)`

// Merge applies a batch. Rows that PostgreSQL refuses are found by halving the batch and quarantined; the rest is applied. An error means that
// the batch must be repeated; repeating it is harmless. Bytes that are not rows of the peer in the given shards are an error.
func (s *Store) Merge(ctx context.Context, b Batch) (Merged, error) {
	if err := check(b); err != nil {
		return Merged{}, err
	}
	if err := s.noteEpoch(ctx, b.Peer); err != nil {
		return Merged{}, err
	}
	merged, err := s.merge(ctx, b)
	if merged.Applied > 0 {
		s.hub.Committed(false)
	}
	return merged, err
}

func check(b Batch) error {
	n := 0
	err := row.Walk(b.Tuples, func(t *row.Tuple) error {
		n++
		if !t.OwnedBy(b.Peer.Region) {
			return fmt.Errorf("%w: %s is sent by region %s as owned by %s", row.ErrMalformed, t.Name(), b.Peer.Region, t.Owner())
		}
		if t.Shard() < b.Shards.From || t.Shard() >= b.Shards.To {
			return fmt.Errorf("%w: %s is in shard %d, outside %v", row.ErrMalformed, t.Name(), t.Shard(), b.Shards)
		}
		return nil
	})
	if err == nil && n != b.Rows {
		err = fmt.Errorf("%w: %d rows announced, %d sent", row.ErrMalformed, b.Rows, n)
	}
	return err
}

func (s *Store) merge(ctx context.Context, b Batch) (Merged, error) {
	merged, err := s.mergeOnce(ctx, b)
	if b.Empty && isUnique(err) {
		b.Empty = false
		merged, err = s.mergeOnce(ctx, b)
	}
	if err == nil || !isPoison(err) {
		return merged, wrap(err, "merge %d rows of %s", b.Rows, b.Peer.Region)
	}
	if b.Rows <= 1 {
		return s.quarantine(ctx, b, err)
	}
	first, second := halve(b)
	m1, err := s.merge(ctx, first)
	if err != nil {
		return m1, err
	}
	m2, err := s.merge(ctx, second)
	return Merged{m1.Applied + m2.Applied, m1.Quarantined + m2.Quarantined}, err
}

// halve cuts b in two; the second half carries the cursor, so that it is saved last.
func halve(b Batch) (first, second Batch) {
	first, second = b, b
	first.Cursor = feed.Cursor{}
	first.Rows = b.Rows / 2
	second.Rows = b.Rows - first.Rows
	at, n := 0, 0
	_ = row.Walk(b.Tuples, func(t *row.Tuple) error { // checked before
		if n < first.Rows {
			at += len(t.Raw())
			n++
		}
		return nil
	})
	first.Tuples, second.Tuples = b.Tuples[:at], b.Tuples[at:]
	return first, second
}

func (s *Store) mergeOnce(ctx context.Context, b Batch) (merged Merged, err error) {
	err = reclaim(ctx, func() error {
		return s.pool.AcquireFunc(ctx, func(pc *pgxpool.Conn) error {
			if b.Empty && b.Rows > 0 {
				merged, err = s.copyIn(ctx, pc.Conn(), b)
			} else {
				merged, err = s.mergeIn(ctx, pc.Conn(), b)
			}
			return err
		})
	})
	if err != nil {
		return Merged{}, err
	}
	return merged, nil
}

// mergeIn merges rows and saves the cursor in one round trip: one implicit transaction of two statements, whose parameters are the fields of the
// tuples as they came, a column at a time.
func (s *Store) mergeIn(ctx context.Context, c *pgx.Conn, b Batch) (merged Merged, err error) {
	pg := c.PgConn()
	if err := prepareMerge(ctx, pg); err != nil {
		return Merged{}, err
	}
	var batch pgconn.Batch
	params, formats := row.Transpose(b.Tuples, b.Rows)
	batch.ExecPrepared(mergeName, append(params, binary.BigEndian.AppendUint64(nil, uint64(b.Peer.Epoch)), []byte(b.Peer.Service), []byte(b.Peer.Region), []byte(s.cfg.Version)),
		append(formats, 1, 0, 0, 0), nil)
	if !b.Cursor.IsZero() {
		batch.ExecPrepared(saveCursorName, [][]byte{[]byte(b.Peer.Service), []byte(b.Peer.Region), []byte(s.cfg.Version), []byte(b.Shards.String()),
			strconv.AppendInt(nil, b.Cursor.Epoch, 10), []byte(b.Cursor.Snapshot.String()), strconv.AppendInt(nil, b.Peer.Epoch, 10)}, nil, nil)
	}
	results, err := pg.ExecBatch(ctx, &batch).ReadAll()
	if err != nil {
		return Merged{}, err
	}
	counts := results[0].Rows[0]
	if merged.Applied, err = strconv.Atoi(string(counts[0])); err != nil {
		return Merged{}, err
	}
	if merged.Quarantined, err = strconv.Atoi(string(counts[1])); err != nil {
		return Merged{}, err
	}
	if string(counts[2]) != "t" {
		return Merged{}, ErrStaleEpoch
	}
	return merged, nil
}

// Names of the statements that each connection prepares before its first merge.
const (
	mergeName      = "dbcontroller_merge"
	saveCursorName = "dbcontroller_save_cursor"
)

// prepareMerge remembers each statement by itself: after the first one the caller may lose patience, and the connection lives on.
func prepareMerge(ctx context.Context, pg *pgconn.PgConn) error {
	const saveMergedSQL = `SELECT ctl.save_cursor($1, $2, $3, $4::text::int4range, $5, $6) WHERE (SELECT epoch FROM ctl.peer_epoch WHERE service = $1 AND region = $2) = $7::bigint`
	for _, s := range []struct{ name, sql string }{{mergeName, mergeSQL}, {saveCursorName, saveMergedSQL}} {
		if pg.CustomData()[s.name] != nil {
			continue
		}
		if _, err := pg.Prepare(ctx, s.name, s.sql, nil); err != nil {
			return fmt.Errorf("prepare merge: %w", err)
		}
		pg.CustomData()[s.name] = true
	}
	return nil
}

// copyIn copies rows straight into the table. The rows are all new: those that a crash takes back come again, and no reader has seen one of them go
// back to an older version; so the commit need not wait for the disk.
func (s *Store) copyIn(ctx context.Context, c *pgx.Conn, b Batch) (merged Merged, err error) {
	defer func() {
		if c.PgConn().TxStatus() != 'I' && !c.IsClosed() {
			if _, rerr := c.Exec(context.WithoutCancel(ctx), "ROLLBACK"); rerr != nil {
				_ = c.Close(context.WithoutCancel(ctx)) // the pool replaces it
			}
		}
	}()
	if _, err := c.Exec(ctx, "BEGIN; SET LOCAL synchronous_commit = off", pgx.QueryExecModeSimpleProtocol); err != nil {
		return Merged{}, err
	}
	tag, err := c.PgConn().CopyFrom(ctx, io.MultiReader(bytes.NewReader(copyHeader), bytes.NewReader(b.Tuples), bytes.NewReader(copyTrailer)),
		"COPY resources ("+row.Columns+") FROM STDIN (FORMAT binary)")
	if err != nil {
		return Merged{}, err
	}
	last := pgx.Batch{}
	if !b.Cursor.IsZero() {
		last.Queue(saveCursorSQL, b.Peer.Service, b.Peer.Region, s.cfg.Version, b.Shards.String(), b.Cursor.Epoch, b.Cursor.Snapshot.String())
	}
	var epoch int64
	last.Queue("SELECT epoch FROM ctl.peer_epoch WHERE service = $1 AND region = $2", b.Peer.Service, b.Peer.Region).
		QueryRow(func(r pgx.Row) error { return r.Scan(&epoch) })
	if err := c.SendBatch(ctx, &last).Close(); err != nil {
		return Merged{}, err
	}
	if epoch != b.Peer.Epoch {
		return Merged{}, ErrStaleEpoch
	}
	_, err = c.Exec(ctx, "COMMIT", pgx.QueryExecModeSimpleProtocol)
	return Merged{Applied: int(tag.RowsAffected())}, err
}

var (
	copyHeader  = append([]byte("PGCOPY\n\xff\r\n\x00"), 0, 0, 0, 0, 0, 0, 0, 0)
	copyTrailer = binary.BigEndian.AppendUint16(nil, 0xffff)
)

// noteEpoch writes down a peer's epoch that is new, and refuses one that has ended.
func (s *Store) noteEpoch(ctx context.Context, p Peer) error {
	if known, ok := s.peerEpochs.Load(p.Region); ok && known == p.Epoch {
		return nil
	}
	var epoch int64
	err := s.pool.QueryRow(ctx, `INSERT INTO ctl.peer_epoch AS e (service, region, epoch) VALUES ($1, $2, $3)
		ON CONFLICT (service, region) DO UPDATE SET epoch = greatest(e.epoch, excluded.epoch) RETURNING epoch`, p.Service, p.Region, p.Epoch).Scan(&epoch)
	if err != nil {
		return wrap(err, "note the epoch of %s", p.Region)
	}
	if epoch != p.Epoch {
		return ErrStaleEpoch
	}
	s.peerEpochs.Store(p.Region, epoch)
	return nil
}

// isPoison says whether the rows themselves are the reason: PostgreSQL refuses their values or a constraint does.
func isPoison(err error) bool {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return false
	}
	switch pe.Code[:2] {
	case "22", "23", "44", "54", "P0":
		return true
	}
	return false
}

func isUnique(err error) bool {
	var pe *pgconn.PgError
	return errors.As(err, &pe) && pe.Code == "23505"
}

func (s *Store) quarantine(ctx context.Context, b Batch, cause error) (Merged, error) {
	var pe *pgconn.PgError
	reason := cause.Error()
	if errors.As(cause, &pe) {
		reason = pe.Code + ": " + pe.Message // not the detail, which repeats the row's content
	}
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		err := row.Walk(b.Tuples, func(t *row.Tuple) error {
			_, err := tx.Exec(ctx, quarantineSQL, s.cfg.Version, t.Name(), b.Peer.Region, t.Version().Epoch, t.Version().Number, reason)
			return err
		})
		if err != nil || b.Cursor.IsZero() {
			return err
		}
		_, err = tx.Exec(ctx, saveCursorSQL, b.Peer.Service, b.Peer.Region, s.cfg.Version, b.Shards.String(), b.Cursor.Epoch, b.Cursor.Snapshot.String())
		return err
	})
	return Merged{Quarantined: b.Rows}, wrap(err, "quarantine a row of %s", b.Peer.Region)
}

// NameVersion is a row as a comparison saw it.
type NameVersion struct {
	Name    string
	Version store.Version
}

// DeleteExtras turns copies that their owner does not know into tombstones, each only if it is still at the version given. It returns how many.
func (s *Store) DeleteExtras(ctx context.Context, p Peer, extras []NameVersion) (int, error) {
	if err := s.noteEpoch(ctx, p); err != nil {
		return 0, err
	}
	names, epochs, numbers := make([]string, len(extras)), make([]int64, len(extras)), make([]int64, len(extras))
	for i, e := range extras {
		names[i], epochs[i], numbers[i] = e.Name, e.Version.Epoch, e.Version.Number
	}
	tag, err := s.pool.Exec(ctx, `UPDATE resources t SET state = 2, body = NULL, meta = '{}', regions = '{}', delete_time = now(), change = pg_current_xact_id()
		FROM unnest($2::text[], $3::bigint[], $4::bigint[]) AS x (name, epoch, number)
		WHERE t.name = x.name AND t.owning_region = $1 AND t.state <> 2 AND (t.epoch, t.resource_version) = (x.epoch, x.number)
		AND EXISTS (SELECT FROM ctl.peer_epoch WHERE service = $5 AND region = $1 AND epoch = $6)`,
		p.Region, names, epochs, numbers, p.Service, p.Epoch)
	if err != nil {
		return 0, wrap(err, "delete %d copies of %s", len(extras), p.Region)
	}
	if tag.RowsAffected() > 0 {
		s.hub.Committed(false)
	}
	return int(tag.RowsAffected()), nil
}

// DropCopies turns up to limit copies of owner's rows into tombstones, for an owner that is no more, and forgets its cursors and quarantine. It
// returns how many there were; call it until that is 0.
func (s *Store) DropCopies(ctx context.Context, service, owner string, limit int) (int, error) {
	var n int64
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE resources SET state = 2, body = NULL, meta = '{}', regions = '{}', delete_time = now(), change = pg_current_xact_id()
			WHERE name = ANY (ARRAY(SELECT name FROM resources WHERE owning_region = $1 AND owning_region <> (SELECT region FROM ctl.deployment_state) AND state <> 2 LIMIT $2))`, owner, limit)
		if err != nil {
			return err
		}
		n = tag.RowsAffected()
		if _, err := tx.Exec(ctx, "DELETE FROM ctl.sync_cursor WHERE service = $1 AND region = $2 AND version = $3", service, owner, s.cfg.Version); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "DELETE FROM ctl.quarantine WHERE version = $1 AND source_region = $2", s.cfg.Version, owner)
		return err
	})
	if n > 0 {
		s.hub.Committed(false)
	}
	return int(n), wrap(err, "drop copies of %s", owner)
}

// CopyOwners returns the peers of which this database has ever taken rows.
func (s *Store) CopyOwners(ctx context.Context, service string) ([]string, error) {
	rows, err := s.pool.Query(ctx, "SELECT region FROM ctl.peer_epoch WHERE service = $1 ORDER BY region", service)
	if err != nil {
		return nil, wrap(err, "list owners of copies")
	}
	regions, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return regions, wrap(err, "list owners of copies")
}

// LoadCursor returns up to where the copies of a peer's shards are complete: what all stored ranges that overlap have in common. It is zero
// unless they cover the shards and are of one epoch.
func (s *Store) LoadCursor(ctx context.Context, service, region string, shards feed.Range) (feed.Cursor, error) {
	rows, err := s.pool.Query(ctx, `SELECT lower(shards), upper(shards), epoch, position FROM ctl.sync_cursor
		WHERE service = $1 AND region = $2 AND version = $3 AND shards && $4::text::int4range ORDER BY 1`, service, region, s.cfg.Version, shards.String())
	if err != nil {
		return feed.Cursor{}, wrap(err, "load cursor of %s", region)
	}
	var merged feed.Cursor
	covered := shards.From
	var from, to int32
	var epoch int64
	var position string
	gap := false
	_, err = pgx.ForEachRow(rows, []any{&from, &to, &epoch, &position}, func() error {
		snapshot, err := feed.ParseSnapshot(position)
		if err != nil {
			return err
		}
		switch {
		case from > covered, !merged.IsZero() && merged.Epoch != epoch:
			gap = true
		case merged.IsZero():
			merged = feed.Cursor{Epoch: epoch, Snapshot: snapshot}
		default:
			merged.Snapshot = feed.Merge(merged.Snapshot, snapshot)
		}
		covered = max(covered, to)
		return nil
	})
	if err != nil || gap || covered < shards.To {
		return feed.Cursor{}, wrap(err, "load cursor of %s", region)
	}
	return merged, nil
}

// SaveCursor stores a cursor without rows.
func (s *Store) SaveCursor(ctx context.Context, service, region string, shards feed.Range, c feed.Cursor) error {
	err := reclaim(ctx, func() error {
		_, err := s.pool.Exec(ctx, saveCursorSQL, service, region, s.cfg.Version, shards.String(), c.Epoch, c.Snapshot.String())
		return err
	})
	return wrap(err, "save cursor of %s", region)
}

// Quarantined is a row that could not be applied.
type Quarantined struct {
	Name, SourceRegion string
	Version            store.Version
	Cause              string
	Tries              int
}

// Quarantine lists up to limit rows that could not be applied, by name, and says how many there are. An empty region is every one.
func (s *Store) Quarantine(ctx context.Context, region string, limit int) (rows []Quarantined, total int, err error) {
	r, err := s.pool.Query(ctx, `SELECT name, source_region, epoch, resource_version, cause, tries, count(*) OVER () FROM ctl.quarantine
		WHERE version = $1 AND ($2 = '' OR source_region = $2) ORDER BY name LIMIT $3`, s.cfg.Version, region, limit)
	if err != nil {
		return nil, 0, wrap(err, "list quarantine")
	}
	rows, err = pgx.CollectRows(r, func(r pgx.CollectableRow) (q Quarantined, err error) {
		err = r.Scan(&q.Name, &q.SourceRegion, &q.Version.Epoch, &q.Version.Number, &q.Cause, &q.Tries, &total)
		return q, err
	})
	return rows, total, wrap(err, "list quarantine")
}

// QuarantineOf returns the version of a resource that could not be applied, nil if there is none; of several sources the one that was tried last.
func (s *Store) QuarantineOf(ctx context.Context, name string) (*Quarantined, error) {
	q := Quarantined{Name: name}
	err := s.pool.QueryRow(ctx, `SELECT source_region, epoch, resource_version, cause, tries FROM ctl.quarantine
		WHERE version = $1 AND name = $2 ORDER BY last_seen DESC LIMIT 1`, s.cfg.Version, name).Scan(&q.SourceRegion, &q.Version.Epoch, &q.Version.Number, &q.Cause, &q.Tries)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	return &q, wrap(err, "look up %s in quarantine", name)
}
