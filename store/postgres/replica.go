package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/row"
)

// This file is the source's side of replication: what another region should hold of the rows owned here, and what is held here of another's.

// ShardDigest is the digest of the live rows of one shard: their number and the exclusive or of 64 bits of md5(name, uuid, version), which does not
// depend on their order and is the same on every version of PostgreSQL.
type ShardDigest struct {
	Shard int32
	Count int64
	Hash  int64
}

const digestSQL = `
	SELECT shard, count(*), bit_xor(('x' || left(md5(name || uuid || epoch || '.' || resource_version), 16))::bit(64)::bigint)
	FROM resources WHERE state <> 2 AND shard >= $2 AND shard < $3`

const ownedHere = ` AND owning_region = (SELECT region FROM ctl.deployment_state)`

// Digests returns, ordered by shard, the digests of the owned rows that region should hold, and the epoch in which they were read. Shards
// without a row are left out.
func (s *Store) Digests(ctx context.Context, shards feed.Range, region string) (digests []ShardDigest, epoch int64, err error) {
	err = s.scan(ctx, func(tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, "SELECT epoch FROM ctl.feed_epoch").Scan(&epoch); err != nil {
			return err
		}
		digests, err = collectDigests(tx.Query(ctx, digestSQL+ownedHere+" AND regions && $1 GROUP BY shard ORDER BY shard", row.RegionKeys(region), shards.From, shards.To))
		return err
	})
	return digests, epoch, wrap(err, "digest shards %v for %s", shards, region)
}

// CopyDigests returns the digests of the copies held here of owner's rows.
func (s *Store) CopyDigests(ctx context.Context, shards feed.Range, owner string) ([]ShardDigest, error) {
	var digests []ShardDigest
	err := s.scan(ctx, func(tx pgx.Tx) (err error) {
		digests, err = collectDigests(tx.Query(ctx, digestSQL+" AND owning_region = $1 GROUP BY shard ORDER BY shard", owner, shards.From, shards.To))
		return err
	})
	return digests, wrap(err, "digest copies of %s in shards %v", owner, shards)
}

// scan runs do in a read-only snapshot whose statements are planned for their parameters and may read a table from end to end.
func (s *Store) scan(ctx context.Context, do func(pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL enable_seqscan = on; SET LOCAL plan_cache_mode = auto", pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		return do(tx)
	})
}

func collectDigests(rows pgx.Rows, err error) ([]ShardDigest, error) {
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[ShardDigest])
}

const versionsSQL = `SELECT name, epoch, resource_version FROM resources WHERE state <> 2 AND shard = ANY ($2)`

// Versions calls emit, ordered by name, for each owned row in the shards that region should hold.
func (s *Store) Versions(ctx context.Context, shards []int32, region string, emit func(name string, v store.Version) error) error {
	return s.versions(ctx, versionsSQL+ownedHere+" AND regions && $1 ORDER BY name", []any{row.RegionKeys(region), shards}, emit)
}

// CopyVersions calls emit, ordered by name, for each copy held here of owner's rows in the shards.
func (s *Store) CopyVersions(ctx context.Context, shards []int32, owner string, emit func(name string, v store.Version) error) error {
	return s.versions(ctx, versionsSQL+" AND owning_region = $1 ORDER BY name", []any{owner, shards}, emit)
}

func (s *Store) versions(ctx context.Context, sql string, args []any, emit func(string, store.Version) error) error {
	err := s.scan(ctx, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		var name string
		var v store.Version
		_, err = pgx.ForEachRow(rows, []any{&name, &v.Epoch, &v.Number}, func() error { return emit(name, v) })
		return err
	})
	return wrap(err, "read versions")
}

// MaxFetch is the most names of one FetchNames.
const MaxFetch = 5000

// FetchNames emits, as a tuple of package row, each named row that is owned here and concerns region: whole, or as a removal. A name that
// region should not know of is not emitted.
func (s *Store) FetchNames(ctx context.Context, names []string, region string, emit func(tuple []byte) error) error {
	if len(names) > MaxFetch {
		return store.Invalid("names", "has more than 5000 entries: ask in several calls")
	}
	err := emitTuples(ctx, s.pool, emit, "SELECT "+row.Wire+" FROM "+row.Source("WHERE name = ANY ($2)"+ownedHere+" AND "+row.Concerns+" OFFSET 0"), row.RegionKeys(region), names)
	return wrap(err, "fetch rows by name")
}

// FetchShards emits every live row of the shards that region should hold.
func (s *Store) FetchShards(ctx context.Context, shards feed.Range, region string, emit func(tuple []byte) error) error {
	err := s.scan(ctx, func(tx pgx.Tx) error {
		return emitTuples(ctx, tx, emit, "SELECT "+row.WireHeld+" FROM resources WHERE shard >= $2 AND shard < $3"+ownedHere+" AND "+row.Held,
			row.RegionKeys(region), shards.From, shards.To)
	})
	return wrap(err, "fetch rows of shards %v", shards)
}

func emitTuples(ctx context.Context, db interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}, emit func([]byte) error, sql string, args ...any) error {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	var buf []byte
	for rows.Next() {
		buf = row.Append(buf[:0], rows.RawValues())
		if err := emit(buf); err != nil {
			return err
		}
	}
	return rows.Err()
}
