package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/row"
)

// This file is what verification asks of a database: digests of the whole content of rows, in the order of their names, and the repair of single copies.
// A comparison of versions (replica.go) cannot see an edit that leaves the version as it is; this one does.
//
// Rows are compared in ranges of names, not of shards: a range is one short index scan, so a pass is a sequence of small snapshots that can stop and go on
// anywhere, and both sides of a range are read within moments, so that few rows change in between.

// LastName is behind every name.
const LastName = "\U0010FFFF"

// contentHash is a hash of everything that a copy shares with its owner's row. It is made by PostgreSQL's own hash functions, which are the same in all its versions on machines of the same
// byte order. The text of the body is hashed, not its jsonb: the hash of jsonb does not tell {"a": {"b": 1}} from {"a": {}, "b": 1}.
const contentHash = `hash_record_extended(ROW(t.name, t.type, t.uuid, t.epoch, t.resource_version, t.generation, t.shard, t.owning_region, t.regions, t.state, t.block_deletion,
	t.create_time, t.update_time, t.delete_time, t.meta::text), hashtextextended(coalesce(t.body::text, ''), 0))`

// ofTypes is the condition that a row is of one of the types in $2; none means every one.
const ofTypes = `(cardinality($2::text[]) = 0 OR type = ANY ($2))`

// RangeDigest is the digest of the rows with names in (end of the range before, To].
type RangeDigest struct {
	To    string
	Count int64
	Hash  int64
}

// Ranges is a run of consecutive ranges, as one side cut them.
type Ranges struct {
	Ranges []RangeDigest
	// Scanned is how many rows were read, those that are not compared among them.
	Scanned int64
	// Epoch and Time of the database: what was written before Time is in the digests.
	Epoch int64
	Time  time.Time
	// Total is about how many rows the whole table has, whatever they are; only known where a pass begins.
	Total int64
}

// RowHash is a row as a look at it found it.
type RowHash struct {
	Name, Type, Owner string
	Version           store.Version
	// Hash of the content, as it is held here.
	Hash int64
	// Held says that the row is live and belongs to what is compared. A look by name also returns rows that do not.
	Held bool
	// Change is the transaction that last wrote the row, in the database where it was read.
	Change uint64
}

// side is one of the sets that are compared: a condition with the parameter $1, and the hash of what is compared of a row.
type side struct {
	condition string
	param     any
	hash      string
}

func owned(region string) side {
	return side{`owning_region = (SELECT region FROM ctl.deployment_state) AND state <> 2 AND regions && $1`, row.RegionKeys(region), contentHash}
}

func copies(owner string) side { return side{`owning_region = $1 AND state <> 2`, owner, contentHash} }

// countRows is for progress: of a large table it is what the last VACUUM or ANALYZE has seen, as a count would take as long as reading all of it, and hold a snapshot meanwhile.
func (s *Store) countRows(ctx context.Context) (n int64, err error) {
	err = s.scan(ctx, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, `SELECT CASE WHEN reltuples >= 100000 THEN reltuples::bigint ELSE (SELECT count(*) FROM resources) END FROM pg_class WHERE oid = 'resources'::regclass`).Scan(&n)
	})
	return n, wrap(err, "count rows")
}

// OwnedRanges digests the owned rows that region should hold, of the given types (none: all), in up to parts ranges behind after, of size rows of the table each. The last range of
// all ends with LastName.
func (s *Store) OwnedRanges(ctx context.Context, region string, types []string, after string, size, parts int) (Ranges, error) {
	r, err := s.ranges(ctx, owned(region), types, after, size, parts)
	return r, wrap(err, "digest rows for %s", region)
}

func (s *Store) ranges(ctx context.Context, of side, types []string, after string, size, parts int) (Ranges, error) {
	var r Ranges
	if after == "" {
		var err error
		if r.Total, err = s.countRows(ctx); err != nil {
			return r, err
		}
	}
	rows, err := s.pool.Query(ctx, `
		WITH scanned AS MATERIALIZED (
			SELECT name, hash, (row_number() OVER (ORDER BY name) - 1) / $4::bigint AS part FROM (
				SELECT name, CASE WHEN `+of.condition+` AND `+ofTypes+` THEN `+of.hash+` END AS hash
				FROM (SELECT * FROM resources WHERE name > $3 ORDER BY name LIMIT $4::bigint * $5::bigint) t OFFSET 0) h
		), digests AS (
			SELECT max(name) AS upto, count(hash) AS count, coalesce(bit_xor(hash), 0) AS hash, count(*) AS scanned FROM scanned GROUP BY part
		)
		SELECT upto, count, hash, scanned, epoch, clock_timestamp() FROM ctl.feed_epoch LEFT JOIN digests ON true ORDER BY upto`, of.param, notNil(types), after, size, parts)
	if err != nil {
		return r, err
	}
	var to *string
	var count, hash, scanned *int64
	_, err = pgx.ForEachRow(rows, []any{&to, &count, &hash, &scanned, &r.Epoch, &r.Time}, func() error {
		if to != nil {
			r.Ranges = append(r.Ranges, RangeDigest{*to, *count, *hash})
			r.Scanned += *scanned
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	if r.Scanned < int64(size)*int64(parts) { // the table ends here
		if len(r.Ranges) == 0 {
			r.Ranges = []RangeDigest{{}}
		}
		r.Ranges[len(r.Ranges)-1].To = LastName
	}
	return r, nil
}

// CopyRanges digests the copies of owner's rows in given ranges, the first of which begins behind after.
func (s *Store) CopyRanges(ctx context.Context, owner string, types []string, after string, to []string) ([]RangeDigest, error) {
	from := append([]string{after}, to[:max(0, len(to)-1)]...)
	of := copies(owner)
	rows, err := s.pool.Query(ctx, `SELECT r.upto, d.count, d.hash FROM unnest($3::text[], $4::text[]) WITH ORDINALITY AS r (after, upto, i),
		LATERAL (SELECT count(*) AS count, coalesce(bit_xor(`+of.hash+`), 0) AS hash FROM resources t
			WHERE name > r.after AND name <= r.upto AND `+of.condition+` AND `+ofTypes+` OFFSET 0) d ORDER BY r.i`, of.param, notNil(types), from, to)
	if err != nil {
		return nil, wrap(err, "digest copies of %s", owner)
	}
	digests, err := pgx.CollectRows(rows, pgx.RowToStructByPos[RangeDigest])
	return digests, wrap(err, "digest copies of %s", owner)
}

// OwnedHashes calls emit, ordered by name, for each owned row of the types with a name in (after, to] that region should hold.
func (s *Store) OwnedHashes(ctx context.Context, region string, types []string, after, to string, emit func(RowHash) error) error {
	return wrap(s.hashes(ctx, owned(region), types, after, to, emit), "list rows for %s", region)
}

// CopyHashes is OwnedHashes for the copies of owner's rows.
func (s *Store) CopyHashes(ctx context.Context, owner string, types []string, after, to string, emit func(RowHash) error) error {
	return wrap(s.hashes(ctx, copies(owner), types, after, to, emit), "list copies of %s", owner)
}

func (s *Store) hashes(ctx context.Context, of side, types []string, after, to string, emit func(RowHash) error) error {
	rows, err := s.pool.Query(ctx, "SELECT name, type, owning_region, epoch, resource_version, "+of.hash+", true, change::text::bigint FROM resources t WHERE name > $3 AND name <= $4 AND "+
		of.condition+" AND "+ofTypes+" ORDER BY name", of.param, notNil(types), after, to)
	if err != nil {
		return err
	}
	return eachHash(rows, emit)
}

// LookOwned returns the rows of these names, by name, whoever owns them: Held are those that region should hold. A name that is not known is left out.
func (s *Store) LookOwned(ctx context.Context, region string, names []string) ([]RowHash, error) {
	all, err := s.look(ctx, owned(region), names)
	return all, wrap(err, "look at %d rows", len(names))
}

// LookCopies is LookOwned for copies of owner's rows.
func (s *Store) LookCopies(ctx context.Context, owner string, names []string) ([]RowHash, error) {
	all, err := s.look(ctx, copies(owner), names)
	return all, wrap(err, "look at %d copies of %s", len(names), owner)
}

func (s *Store) look(ctx context.Context, of side, names []string) (all []RowHash, err error) {
	rows, err := s.pool.Query(ctx, `SELECT r.* FROM unnest($2::text[]) AS n, LATERAL (
			SELECT name, type, owning_region, epoch, resource_version, `+of.hash+`, `+of.condition+`, change::text::bigint
			FROM resources t WHERE name = n OFFSET 0) r ORDER BY 1`, of.param, notNil(names))
	if err != nil {
		return nil, err
	}
	err = eachHash(rows, func(r RowHash) error { all = append(all, r); return nil })
	return all, err
}

func eachHash(rows pgx.Rows, emit func(RowHash) error) error {
	var r RowHash
	var change int64
	_, err := pgx.ForEachRow(rows, []any{&r.Name, &r.Type, &r.Owner, &r.Version.Epoch, &r.Version.Number, &r.Hash, &r.Held, &change}, func() error {
		r.Change = uint64(change)
		return emit(r)
	})
	return err
}

// Overwrite writes rows of a peer over the copies here although these may be of the same version or of a later one, each only if the copy is still the one that was seen (its hash; a name that is
// not in seen had no copy) or is older. What this region owns is never touched. It returns how many rows were written. Rows that PostgreSQL refuses are quarantined.
func (s *Store) Overwrite(ctx context.Context, b Batch, seen []RowHash) (int, error) {
	if err := check(b); err != nil {
		return 0, err
	}
	if err := s.noteEpoch(ctx, b.Peer); err != nil {
		return 0, err
	}
	names, hashes := make([]string, len(seen)), make([]int64, len(seen))
	for i, r := range seen {
		names[i], hashes[i] = r.Name, r.Hash
	}
	n, err := s.overwrite(ctx, b, names, hashes)
	if n > 0 {
		s.hub.Committed(false)
	}
	return n, err
}

func (s *Store) overwrite(ctx context.Context, b Batch, names []string, hashes []int64) (written int, err error) {
	err = s.pool.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
		written, err = overwriteIn(ctx, c.Conn(), b, names, hashes, s.cfg.Version)
		return err
	})
	switch {
	case err == nil || !isPoison(err):
		return written, wrap(err, "repair %d copies of %s", b.Rows, b.Peer.Region)
	case b.Rows <= 1:
		_, err := s.quarantine(ctx, b, err)
		return 0, err
	}
	first, second := halve(b)
	n1, err := s.overwrite(ctx, first, names, hashes)
	if err != nil {
		return n1, err
	}
	n2, err := s.overwrite(ctx, second, names, hashes)
	return n1 + n2, err
}

// overwriteSQL is mergeSQL without the rule that only a newer row is taken: what was seen and judged before may be replaced, as long as it is still what was seen.
const overwriteSQL = `
WITH input AS MATERIALIZED (
	SELECT name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions::text[] AS regions, state, block_deletion,
		create_time, update_time, delete_time, meta, body
	FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::uuid[]), (SELECT $4::bigint[]), (SELECT $5::bigint[]), (SELECT $6::bigint[]),
			(SELECT $7::int[]), (SELECT $8::text[]), (SELECT $9::text[]), (SELECT $10::smallint[]), (SELECT $11::bool[]), (SELECT $12::timestamptz[]),
			(SELECT $13::timestamptz[]), (SELECT $14::timestamptz[]), (SELECT $15::jsonb[]), (SELECT $16::jsonb[]))
		AS i (` + row.Columns + `)
	WHERE ` + epochStands + `
), seen AS MATERIALIZED (SELECT name, hash FROM unnest((SELECT $21::text[]), (SELECT $22::bigint[])) AS s (name, hash)
), written AS (
	INSERT INTO resources AS t (` + row.Columns + `) SELECT ` + row.Columns + ` FROM input ORDER BY name
	ON CONFLICT (name) DO UPDATE SET type = excluded.type, uuid = excluded.uuid, epoch = excluded.epoch, resource_version = excluded.resource_version,
		generation = excluded.generation, shard = excluded.shard, change = pg_current_xact_id(), owning_region = excluded.owning_region, regions = excluded.regions,
		left_regions = '{}', state = excluded.state, block_deletion = excluded.block_deletion, create_time = excluded.create_time,
		update_time = excluded.update_time, delete_time = excluded.delete_time, meta = excluded.meta, body = excluded.body
	WHERE t.owning_region <> (SELECT region FROM ctl.deployment_state) AND (
		t.owning_region = excluded.owning_region AND (t.epoch, t.resource_version) < (excluded.epoch, excluded.resource_version)
		OR ` + contentHash + ` = (SELECT hash FROM seen WHERE name = t.name))
	RETURNING name
), cleared AS (
	DELETE FROM ctl.quarantine q USING written w WHERE q.version = $20 AND q.source_region = $19 AND q.name = w.name
)
SELECT count(*) FROM written`

const overwriteName = "dbcontroller_overwrite"

func overwriteIn(ctx context.Context, c *pgx.Conn, b Batch, names []string, hashes []int64, version string) (int, error) {
	pg := c.PgConn()
	if pg.CustomData()[overwriteName] == nil {
		if _, err := pg.Prepare(ctx, overwriteName, overwriteSQL, nil); err != nil {
			return 0, fmt.Errorf("prepare repair: %w", err)
		}
		pg.CustomData()[overwriteName] = true
	}
	params, formats := row.Transpose(b.Tuples, b.Rows)
	params = append(params, binary.BigEndian.AppendUint64(nil, uint64(b.Peer.Epoch)), []byte(b.Peer.Service), []byte(b.Peer.Region), []byte(version))
	formats = append(formats, 1, 0, 0, 0)
	seenNames, err := c.TypeMap().Encode(pgtype.TextArrayOID, pgtype.BinaryFormatCode, names, nil)
	if err != nil {
		return 0, fmt.Errorf("encode what was seen: %w", err)
	}
	seenHashes, err := c.TypeMap().Encode(pgtype.Int8ArrayOID, pgtype.BinaryFormatCode, hashes, nil)
	if err != nil {
		return 0, fmt.Errorf("encode what was seen: %w", err)
	}
	params, formats = append(params, seenNames, seenHashes), append(formats, 1, 1)
	r := pg.ExecPrepared(ctx, overwriteName, params, formats, nil).Read()
	if r.Err != nil {
		return 0, r.Err
	}
	return strconv.Atoi(string(r.Rows[0][0]))
}

// notNil makes an empty array of what would be NULL.
func notNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// Verified is what is known about the copies of one type of a peer.
type Verified struct {
	Peer, Type string
	// Through is the owner's time up to which the copies were verified without a gap; zero: never.
	Through time.Time
	// FinishedAt is when the last pass ended, by the clock here; Compared and Differences are what it saw.
	FinishedAt            time.Time
	Compared, Differences int64
}

// NoteVerified writes down what a pass that began at the owner's time through found. A type with differences keeps the time of its last pass without.
func (s *Store) NoteVerified(ctx context.Context, peer string, through time.Time, types []Verified) error {
	var b pgx.Batch
	for _, t := range types {
		b.Queue(`INSERT INTO ctl.verified AS v (version, service, peer, type, verified_through, finished_at, compared, differences)
			VALUES ($1, $2, $3, $4, CASE WHEN $7 = 0 THEN $5::timestamptz END, clock_timestamp(), $6, $7::bigint)
			ON CONFLICT (version, service, peer, type) DO UPDATE SET verified_through = coalesce(greatest(v.verified_through, excluded.verified_through), v.verified_through),
				finished_at = excluded.finished_at, compared = excluded.compared, differences = excluded.differences`,
			s.cfg.Version, s.cfg.Service, peer, t.Type, through, t.Compared, t.Differences)
	}
	return wrap(s.pool.SendBatch(ctx, &b).Close(), "note what was verified of %s", peer)
}

// Verified lists up to when copies are verified, by peer and type.
func (s *Store) Verified(ctx context.Context) ([]Verified, error) {
	rows, err := s.pool.Query(ctx, `SELECT peer, type, coalesce(verified_through, '-infinity'), finished_at, compared, differences FROM ctl.verified
		WHERE version = $1 AND service = $2 ORDER BY peer, type`, s.cfg.Version, s.cfg.Service)
	if err != nil {
		return nil, wrap(err, "list what is verified")
	}
	all, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (v Verified, err error) {
		var through pgtype.Timestamptz
		err = r.Scan(&v.Peer, &v.Type, &through, &v.FinishedAt, &v.Compared, &v.Differences)
		if through.InfinityModifier == pgtype.Finite {
			v.Through = through.Time
		}
		return v, err
	})
	return all, wrap(err, "list what is verified")
}

// ClaimVerification makes holder the one that verifies a peer in the background for the given time, and returns where the pass stands, empty for a new one. It is not ok while another holder
// does, or until the next pass is due.
func (s *Store) ClaimVerification(ctx context.Context, peer, holder string, hold time.Duration) (state string, ok bool, err error) {
	err = s.pool.QueryRow(ctx, `INSERT INTO ctl.verification AS v (version, service, peer, holder, held_until) VALUES ($1, $2, $3, $4, clock_timestamp() + $5::interval)
		ON CONFLICT (version, service, peer) DO UPDATE SET holder = excluded.holder, held_until = excluded.held_until
		WHERE v.next_at <= clock_timestamp() AND (v.holder = excluded.holder OR v.held_until <= clock_timestamp()) RETURNING state`,
		s.cfg.Version, s.cfg.Service, peer, holder, hold).Scan(&state)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", false, nil
	}
	return state, err == nil, wrap(err, "claim the verification of %s", peer)
}

// SaveVerification stores where the pass of a holder stands and when it goes on. It returns whether it still was the holder.
func (s *Store) SaveVerification(ctx context.Context, peer, holder, state string, next time.Duration) (bool, error) {
	tag, err := s.pool.Exec(ctx, `UPDATE ctl.verification SET state = $5, next_at = clock_timestamp() + $6::interval
		WHERE version = $1 AND service = $2 AND peer = $3 AND holder = $4`, s.cfg.Version, s.cfg.Service, peer, holder, state, next)
	return tag.RowsAffected() > 0, wrap(err, "save the verification of %s", peer)
}

// Residency is how many rows of an owner and type this database holds for one reason.
type Residency struct {
	Owner, Type string
	// Reason is why the rows must not be here; empty: they may.
	Reason string
	Rows   int64
	// Example is the first of their names.
	Example string
}

// ResidencySQL is the query of a residency report, to be run with search_path set to the API version: $1 is the region, $2 what in regions names it, $3 the regions of all
// Deployments of the service.
const ResidencySQL = `SELECT owning_region, type, reason, count(*), min(name) FROM (
	SELECT name, owning_region, type, CASE
		WHEN state = 2 AND owning_region <> $1 AND (meta <> '{}' OR body IS NOT NULL) THEN 'a removed copy still has content'
		WHEN state = 2 THEN NULL
		WHEN NOT owning_region = ANY ($3) THEN 'its owner is no Deployment of the service'
		WHEN $1 = ANY (left_regions) THEN 'it has left this region'
		WHEN NOT regions && $2 THEN 'its regions do not name this one'
		ELSE '' END AS reason
	FROM resources) r
WHERE reason IS NOT NULL GROUP BY owning_region, type, reason ORDER BY owning_region, type, reason`

// ResidencyParameters are the parameters of ResidencySQL, as PostgreSQL writes them.
func ResidencyParameters(region string, regions []string) []string {
	list := func(names []string) string { return "{" + strings.Join(names, ",") + "}" } // names of regions need no quotes
	return []string{region, list(row.RegionKeys(region)), list(regions)}
}

// ResidencyReport counts the rows that this database holds, by owner, type and the reason why they must not be here. regions are those of all Deployments of the service.
func (s *Store) ResidencyReport(ctx context.Context, regions []string) (report []Residency, err error) {
	err = s.scan(ctx, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, ResidencySQL, s.cfg.Region, row.RegionKeys(s.cfg.Region), notNil(regions))
		if err != nil {
			return err
		}
		report, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Residency])
		return err
	})
	return report, wrap(err, "report what region %s holds", s.cfg.Region)
}
