package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store/feed"
)

// hash is that of search.RowHash. What is not current is hashed with its sums, so it is another one, and one that says whether the document changes.
const hash = `CASE WHEN ` + current + ` THEN ('x' || left(md5(r.name || r.uuid || r.epoch || '.' || r.resource_version || r.fingerprint), 16))::bit(64)::bigint
	ELSE hashtextextended(r.sum::text || ` + sum + ` || r.fingerprint, 1) END`

// looked are the columns of a look at documents.
const looked = `r.name, r.type, CASE WHEN r.fingerprint = t.fingerprint THEN r.epoch ELSE -1 END, CASE WHEN r.fingerprint = t.fingerprint THEN r.resource_version ELSE 0 END, ` + hash

// ofTypes is the condition that a document is of one of the types in $3; none means every one.
const ofTypes = `(cardinality($3::text[]) = 0 OR r.type = ANY ($3))`

// Ranges implements search.Store.
func (s *Store) Ranges(ctx context.Context, types search.Types, only []string, after string, to []string) ([]search.RangeDigest, error) {
	from := append([]string{after}, to[:max(0, len(to)-1)]...)
	names, fingerprints := lists(types)
	rows, err := s.pool.Query(ctx, `SELECT x.upto, d.count, d.hash FROM unnest($4::text[], $5::text[]) WITH ORDINALITY AS x (after, upto, i),
		LATERAL (SELECT count(*) AS count, coalesce(bit_xor(`+hash+`), 0) AS hash`+withTypes+`WHERE r.name > x.after AND r.name <= x.upto AND `+ofTypes+` OFFSET 0) d
		ORDER BY x.i`, names, fingerprints, notNil(only), from, to)
	if err != nil {
		return nil, wrap(err, "digest documents")
	}
	digests, err := pgx.CollectRows(rows, pgx.RowToStructByPos[search.RangeDigest])
	return digests, wrap(err, "digest documents")
}

// Hashes implements search.Store.
func (s *Store) Hashes(ctx context.Context, types search.Types, only []string, after, to string, emit func(search.RowHash) error) error {
	names, fingerprints := lists(types)
	rows, err := s.pool.Query(ctx, "SELECT "+looked+withTypes+"WHERE r.name > $4 AND r.name <= $5 AND "+ofTypes+" ORDER BY r.name", names, fingerprints, notNil(only), after, to)
	if err != nil {
		return wrap(err, "list documents")
	}
	return wrap(eachHash(rows, emit), "list documents")
}

// Look implements search.Store.
func (s *Store) Look(ctx context.Context, types search.Types, names []string) (all []search.RowHash, err error) {
	all, err = look(ctx, s.pool, types, names, "")
	return all, wrap(err, "look at %d documents", len(names))
}

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func look(ctx context.Context, q querier, types search.Types, names []string, lock string) (all []search.RowHash, err error) {
	of, fingerprints := lists(types)
	rows, err := q.Query(ctx, "SELECT "+looked+withTypes+"WHERE r.name = ANY ($3) ORDER BY r.name"+lock, of, fingerprints, names)
	if err != nil {
		return nil, err
	}
	err = eachHash(rows, func(r search.RowHash) error { all = append(all, r); return nil })
	return all, err
}

func eachHash(rows pgx.Rows, emit func(search.RowHash) error) error {
	r := search.RowHash{Held: true}
	_, err := pgx.ForEachRow(rows, []any{&r.Name, &r.Type, &r.Version.Epoch, &r.Version.Number, &r.Hash}, func() error { return emit(r) })
	return err
}

// Mend implements search.Store. What stands as it was seen is deleted under its lock, and what is there by then is left to its version.
func (s *Store) Mend(ctx context.Context, types search.Types, docs []search.Document, ghosts []string, seen []search.RowHash) error {
	stood := map[string]int64{}
	for _, r := range seen {
		stood[r.Name] = r.Hash
	}
	names := ghosts[:len(ghosts):len(ghosts)]
	for _, d := range docs {
		names = append(names, d.Name)
	}
	return wrap(pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		there, err := look(ctx, tx, types, names, " FOR UPDATE OF r")
		if err != nil {
			return err
		}
		var gone []string
		moved := map[string]bool{}
		for _, r := range there {
			if h, was := stood[r.Name]; was && h == r.Hash {
				gone = append(gone, r.Name)
			} else {
				moved[r.Name] = true
			}
		}
		if _, err := tx.Exec(ctx, "DELETE FROM documents WHERE name = ANY ($1)", gone); err != nil {
			return err
		}
		var put []search.Document
		for _, d := range docs {
			if !moved[d.Name] {
				put = append(put, d)
			}
		}
		if len(put) == 0 {
			return nil
		}
		_, err = tx.Exec(ctx, upsertSQL, append(columns(put), false)...)
		return err
	}), "mend %d documents", len(names))
}

// Filled implements search.Store.
func (s *Store) Filled(ctx context.Context, shards feed.Range) ([]search.Filled, error) {
	rows, err := s.pool.Query(ctx, "SELECT first_shard, end_shard, schema, cursor FROM leases WHERE first_shard < $2 AND $1 < end_shard", shards.From, shards.To)
	if err != nil {
		return nil, wrap(err, "say how far it is")
	}
	filled, err := pgx.CollectRows(rows, scanFilled)
	return filled, wrap(err, "say how far it is")
}

func scanFilled(row pgx.CollectableRow) (f search.Filled, err error) {
	return f, row.Scan(&f.Shards.From, &f.Shards.To, &f.Schema, &f.Cursor)
}

// notNil makes an empty array of what would be NULL.
func notNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
