// Package postgres is a search store on PostgreSQL full text, in a database of its own.
//
// A batch is one transaction in one round trip, its cursor included; so the store is always as of some cursor, whatever is lost in a crash or undone by a
// restore. Texts are parsed with PostgreSQL's english configuration.
package postgres

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/dbcontroller/db-controller/internal/dsn"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// format is the version of the schema. A store of another one is made anew and filled again.
const format = 2

//go:embed schema.sql
var schemaSQL string

// Config says which database a Store works on.
type Config struct {
	// DSN is a libpq connection string or URL. Never logged.
	DSN string
	// Service, Region and Version are what the store belongs to. A database may hold the stores of several versions of one Deployment, and of no other.
	Service, Region, Version string
	// MaxConns bounds the pool. Default 8.
	MaxConns int
}

// Store is a search.Store on PostgreSQL.
type Store struct {
	cfg    Config
	schema string
	pool   *pgxpool.Pool
}

var _ search.Store = (*Store)(nil)

var versionName = regexp.MustCompile(`^v[1-9][0-9]*((alpha|beta)[1-9][0-9]*)?$`)

// Open returns a store. It connects when it is first used, so a database that is away is no error yet.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if !versionName.MatchString(cfg.Version) {
		return nil, store.Invalid("version", fmt.Sprintf("%q is not an API version such as v1 or v2beta1", cfg.Version))
	}
	pc, err := dsn.Parse(cfg.DSN)
	if err != nil {
		return nil, fmt.Errorf("open search store: %w", err)
	}
	s := &Store{cfg: cfg, schema: "search_" + cfg.Version}
	if pc.MaxConns = int32(cfg.MaxConns); pc.MaxConns == 0 {
		pc.MaxConns = 8
	}
	pc.ConnConfig.RuntimeParams["search_path"] = s.schema
	pc.ConnConfig.RuntimeParams["application_name"] = "db-controller search " + cfg.Service + " " + cfg.Region
	pc.ConnConfig.RuntimeParams["jit"] = "off"
	// A crash may undo the last batches, whole and in order: the leases notice.
	pc.ConnConfig.RuntimeParams["synchronous_commit"] = "off"
	// What a query costs depends on its words.
	pc.ConnConfig.RuntimeParams["plan_cache_mode"] = "force_custom_plan"
	pc.ConnConfig.RuntimeParams["idle_in_transaction_session_timeout"] = "60s"
	pc.ConnConfig.RuntimeParams["lock_timeout"] = "10s"
	pc.ConnConfig.ConnectTimeout = 5 * time.Second
	pc.PingTimeout = 5 * time.Second
	if s.pool, err = pgxpool.NewWithConfig(ctx, pc); err != nil {
		return nil, fmt.Errorf("open search store of %s in %s: %w", cfg.Service, cfg.Region, err)
	}
	return s, nil
}

// Close ends all connections, after those in use are returned.
func (s *Store) Close() { s.pool.Close() }

// Ping returns nil if the database answers.
func (s *Store) Ping(ctx context.Context) error {
	return wrap(s.pool.Ping(ctx), "be reached")
}

// wrap makes the error of the contract. A table that is not there is one that was dropped: Begin makes it again.
func wrap(err error, format string, args ...any) error {
	var sql interface{ SQLState() string }
	if errors.As(err, &sql) {
		switch sql.SQLState() {
		case "DB001", "42P01", "42883", "3F000":
			return search.ErrLost
		}
	}
	return search.Unavailable(err, format, args...)
}

// ensure makes the schema if it is not there, and proves that it is this Deployment's.
func (s *Store) ensure(ctx context.Context, tx pgx.Tx) error {
	var there bool
	if err := tx.QueryRow(ctx, "SELECT pg_advisory_xact_lock(7283645), to_regclass($1) IS NOT NULL AND to_regclass($2) IS NOT NULL AND to_regclass($3) IS NOT NULL",
		s.schema+".owner", s.schema+".documents", s.schema+".leases").Scan(nil, &there); err != nil {
		return err
	}
	if there {
		var service, region string
		var have int
		err := tx.QueryRow(ctx, "SELECT service, region, format FROM owner").Scan(&service, &region, &have)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
		case err != nil:
			return err
		case service != s.cfg.Service || region != s.cfg.Region:
			return store.Errorf(store.FailedPrecondition, "", "the search database belongs to %s in %s: give %s in %s a database of its own", service, region, s.cfg.Service, s.cfg.Region)
		case have == format:
			return nil
		}
	}
	schema := pgx.Identifier{s.schema}.Sanitize()
	_, err := tx.Exec(ctx, "DROP SCHEMA IF EXISTS "+schema+" CASCADE; CREATE SCHEMA "+schema+";"+schemaSQL, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, "INSERT INTO owner (service, region, format) VALUES ($1, $2, $3)", s.cfg.Service, s.cfg.Region, format)
	return err
}

// Begin implements search.Store.
func (s *Store) Begin(ctx context.Context, shards feed.Range, schema string) (*search.Lease, feed.Cursor, error) {
	lease := search.NewLease(shards, schema)
	var cursor feed.Cursor
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if err := s.ensure(ctx, tx); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, "DELETE FROM leases WHERE first_shard < $2 AND $1 < end_shard RETURNING first_shard, end_shard, schema, cursor", shards.From, shards.To)
		if err != nil {
			return err
		}
		filled, err := pgx.CollectRows(rows, scanFilled)
		if err != nil {
			return err
		}
		token, left := search.Carve(filled, shards, schema)
		if cursor, err = feed.ParseToken(token); err != nil {
			token, cursor = "", feed.Cursor{} // written by hand
		}
		const insert = "INSERT INTO leases (first_shard, end_shard, holder, schema, cursor) VALUES ($1, $2, $3, $4, $5)"
		for _, f := range left {
			if _, err := tx.Exec(ctx, insert, f.Shards.From, f.Shards.To, "", f.Schema, f.Cursor); err != nil {
				return err
			}
		}
		_, err = tx.Exec(ctx, insert, shards.From, shards.To, lease.Holder, schema, token)
		return err
	})
	if err != nil {
		return nil, feed.Cursor{}, wrap(err, "be opened")
	}
	return lease, cursor, nil
}

// Check implements search.Store.
func (s *Store) Check(ctx context.Context, l *search.Lease) error {
	var one int
	err := s.pool.QueryRow(ctx, "SELECT 1 FROM leases WHERE first_shard = $1 AND end_shard = $2 AND holder = $3 AND seq = $4",
		l.Shards.From, l.Shards.To, l.Holder, l.Seq).Scan(&one)
	if errors.Is(err, pgx.ErrNoRows) {
		return search.ErrLost
	}
	return wrap(err, "be checked")
}

// sum is of all that was written into a document; r is a row of the form of documents. The parts have lengths before them, so that none can pass for
// another.
const sum = `md5(r.name || '/' || r.type || r.uuid || '.' || r.epoch || '.' || r.resource_version || '.' || r.shard || r.fingerprint ||
	length(r.a) || ',' || length(r.b) || ',' || length(r.c) || ',' || length(r.d) || r.a || r.b || r.c || r.d || r.body::text)::uuid`

const upsertSQL = `
	INSERT INTO documents AS o (name, type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body, sum)
	SELECT r.*, ` + sum + `
	FROM (SELECT name, type, uuid::uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body::jsonb
	      FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::int[], $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[])
	      x (name, type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body) OFFSET 0) r
	ON CONFLICT (name) DO UPDATE SET type = excluded.type, uuid = excluded.uuid, epoch = excluded.epoch, resource_version = excluded.resource_version,
	    shard = excluded.shard, fingerprint = excluded.fingerprint, a = excluded.a, b = excluded.b, c = excluded.c, d = excluded.d, body = excluded.body, sum = excluded.sum
	WHERE $13 OR (o.epoch, o.resource_version) <= (excluded.epoch, excluded.resource_version)`

const deleteSQL = `
	DELETE FROM documents o USING unnest($1::text[], $2::bigint[], $3::bigint[]) x (name, epoch, resource_version)
	WHERE o.name = x.name AND ($4 OR (o.epoch, o.resource_version) <= (x.epoch, x.resource_version))`

// Apply implements search.Store.
func (s *Store) Apply(ctx context.Context, l *search.Lease, b search.Batch) error {
	var batch pgx.Batch
	batch.Queue("SELECT step($1, $2, $3, $4, $5)", l.Shards.From, l.Shards.To, l.Holder, l.Seq, b.Cursor.Token())
	if len(b.Upserts) > 0 {
		batch.Queue(upsertSQL, append(columns(b.Upserts), b.Force)...)
	}
	if len(b.Deletions) > 0 {
		names, epochs, versions := make([]string, len(b.Deletions)), make([]int64, len(b.Deletions)), make([]int64, len(b.Deletions))
		for i, d := range b.Deletions {
			names[i], epochs[i], versions[i] = d.Name, d.Version.Epoch, d.Version.Number
		}
		batch.Queue(deleteSQL, names, epochs, versions, b.Force)
	}
	// Without BEGIN a batch is one implicit transaction.
	if err := s.pool.SendBatch(ctx, &batch).Close(); err != nil {
		return wrap(err, "take %d changes", len(b.Upserts)+len(b.Deletions))
	}
	l.Seq++
	return nil
}

// columns are the documents as arrays, ordered by name: two writers must meet in one order.
func columns(docs []search.Document) []any {
	docs = slices.SortedFunc(slices.Values(docs), func(a, b search.Document) int { return strings.Compare(a.Name, b.Name) })
	n := len(docs)
	var (
		name, typ, uuid, fingerprint, body = make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		epoch, version                     = make([]int64, n), make([]int64, n)
		shard                              = make([]int32, n)
		texts                              = [4][]string{make([]string, n), make([]string, n), make([]string, n), make([]string, n)}
	)
	for i, d := range docs {
		name[i], typ[i], uuid[i], fingerprint[i], body[i] = d.Name, d.Type, d.UUID, d.Fingerprint, string(d.Values)
		epoch[i], version[i], shard[i] = d.Version.Epoch, d.Version.Number, d.Shard
		for w := range texts {
			texts[w][i] = joined(d, 'A'+byte(w))
		}
	}
	return []any{name, typ, uuid, epoch, version, shard, fingerprint, texts[0], texts[1], texts[2], texts[3], body}
}

// separator stands between the texts of several fields of one weight.
const separator = "\x1f"

func joined(d search.Document, weight byte) string {
	var parts []string
	for i, text := range d.Texts {
		if d.Weights[i] == weight {
			parts = append(parts, text)
		}
	}
	return strings.Join(parts, separator)
}

// current says whether a document is whole and of the present declarations: $1 has the types, $2 their fingerprints.
const current = `(r.sum = ` + sum + ` AND r.fingerprint = t.fingerprint)`

// withTypes is the documents r with the fingerprint of their type in t; NULL for a type that is not searched any more.
const withTypes = ` FROM documents r LEFT JOIN unnest($1::text[], $2::text[]) t (type, fingerprint) USING (type) `

func lists(types search.Types) (names, fingerprints []string) {
	for n, f := range types {
		names, fingerprints = append(names, n), append(fingerprints, f)
	}
	return names, fingerprints
}

// Digests implements search.Store. A document that is not current makes the digest differ from any that the database can have.
func (s *Store) Digests(ctx context.Context, shards feed.Range, types search.Types) ([]search.ShardDigest, error) {
	names, fingerprints := lists(types)
	rows, err := s.pool.Query(ctx, `
		SELECT r.shard, count(*) + 1000000000000 * count(*) FILTER (WHERE `+current+` IS NOT TRUE),
		       bit_xor(('x' || left(md5(r.name || r.uuid || r.epoch || '.' || r.resource_version || t.fingerprint), 16))::bit(64)::bigint)
		`+withTypes+`WHERE r.shard >= $3 AND r.shard < $4 GROUP BY r.shard ORDER BY r.shard`, names, fingerprints, shards.From, shards.To)
	if err != nil {
		return nil, wrap(err, "digest shards %v", shards)
	}
	digests, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d search.ShardDigest, err error) {
		var hash *int64
		err = row.Scan(&d.Shard, &d.Count, &hash)
		if hash != nil {
			d.Hash = *hash
		}
		return d, err
	})
	return digests, wrap(err, "digest shards %v", shards)
}

// Versions implements search.Store.
func (s *Store) Versions(ctx context.Context, shards []int32, types search.Types, after string, emit func(name string, v store.Version) error) error {
	names, fingerprints := lists(types)
	rows, err := s.pool.Query(ctx, `SELECT r.name, CASE WHEN `+current+` THEN r.epoch ELSE $4 END, CASE WHEN `+current+` THEN r.resource_version ELSE $5 END
		`+withTypes+`WHERE r.shard = ANY ($3) AND r.name > $6 ORDER BY r.name`, names, fingerprints, shards, search.Damaged.Epoch, search.Damaged.Number, after)
	if err != nil {
		return wrap(err, "list versions")
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		var v store.Version
		if err := rows.Scan(&name, &v.Epoch, &v.Number); err != nil {
			return wrap(err, "list versions")
		}
		if err := emit(name, v); err != nil {
			return err
		}
	}
	return wrap(rows.Err(), "list versions")
}
