package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/row"
)

// This file is what a search store is compared with: all rows held here, owned and copies alike, of the types that are searched.

// SearchTypes are the types that are searched, each with the fingerprint of what is searched of it.
type SearchTypes map[string]string

// lists returns the types and their fingerprints in the same order.
func (t SearchTypes) lists() (types, fingerprints []string) {
	for name, fingerprint := range t {
		types, fingerprints = append(types, name), append(fingerprints, fingerprint)
	}
	return types, fingerprints
}

// SearchDigests returns, ordered by shard, the digests of the live rows of types. Shards without a row are left out. The fingerprint of its type is
// part of what is digested of a row.
func (s *Store) SearchDigests(ctx context.Context, shards feed.Range, types SearchTypes) ([]ShardDigest, error) {
	names, fingerprints := types.lists()
	var digests []ShardDigest
	err := s.scan(ctx, func(tx pgx.Tx) (err error) {
		digests, err = collectDigests(tx.Query(ctx, `
			SELECT shard, count(*), bit_xor(('x' || left(md5(name || uuid || epoch || '.' || resource_version || t.fingerprint), 16))::bit(64)::bigint)
			FROM resources JOIN unnest($1::text[], $2::text[]) t (type, fingerprint) USING (type)
			WHERE state <> 2 AND shard >= $3 AND shard < $4 GROUP BY shard ORDER BY shard`, names, fingerprints, shards.From, shards.To))
		return err
	})
	return digests, wrap(err, "digest shards %v for search", shards)
}

// SearchVersions calls emit, ordered by name, for each live row of types in the shards whose name is behind after.
func (s *Store) SearchVersions(ctx context.Context, shards []int32, types SearchTypes, after string, emit func(name string, v store.Version) error) error {
	names, _ := types.lists()
	return s.versions(ctx, versionsSQL+" AND type = ANY ($1) AND name > $3 ORDER BY name", []any{names, shards, after}, emit)
}

// SearchNames calls emit for each of the named rows that is live and of one of types. At most MaxFetch names.
func (s *Store) SearchNames(ctx context.Context, names []string, types SearchTypes, emit func(*store.Resource) error) error {
	if len(names) > MaxFetch {
		return store.Invalid("names", "has more than 5000 entries: ask in several calls")
	}
	of, _ := types.lists()
	return wrap(func() error {
		rows, err := s.pool.Query(ctx, "SELECT "+row.ResourceColumns+" FROM unnest($1::text[]) n, LATERAL "+
			"(SELECT * FROM resources WHERE name = n AND state <> 2 AND type = ANY ($2) OFFSET 0) r", names, of)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			r, err := row.ScanResource(rows)
			if err != nil {
				return err
			}
			if err := emit(r); err != nil {
				return err
			}
		}
		return rows.Err()
	}(), "read rows by name for search")
}

// searched are the rows of types, with the hash of what the digests of shards take of a row.
func searched(types SearchTypes) side {
	return side{`state <> 2 AND $1::jsonb ? t.type`, types,
		`('x' || left(md5(t.name || t.uuid || t.epoch || '.' || t.resource_version || coalesce($1::jsonb ->> t.type, '')), 16))::bit(64)::bigint`}
}

// SearchRanges is OwnedRanges for the rows of types that are searched; only narrows them down (none: all).
func (s *Store) SearchRanges(ctx context.Context, types SearchTypes, only []string, after string, size, parts int) (Ranges, error) {
	r, err := s.ranges(ctx, searched(types), only, after, size, parts)
	return r, wrap(err, "digest rows for search")
}

// SearchHashes is OwnedHashes for the rows of types that are searched.
func (s *Store) SearchHashes(ctx context.Context, types SearchTypes, only []string, after, to string, emit func(RowHash) error) error {
	return wrap(s.hashes(ctx, searched(types), only, after, to, emit), "list rows for search")
}

// LookSearched is LookOwned for the rows of types that are searched, with the epoch in which Change counts.
func (s *Store) LookSearched(ctx context.Context, types SearchTypes, names []string) (all []RowHash, epoch int64, err error) {
	if epoch, err = s.Epoch(ctx); err != nil {
		return nil, 0, err
	}
	all, err = s.look(ctx, searched(types), names)
	return all, epoch, wrap(err, "look at %d rows for search", len(names))
}
