package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/dbcontroller/db-controller/store"
)

// Owned returns the placements of the resources owned here among the first limit names from r.From on, and the range that is left; an empty
// one when that was all.
func (s *Store) Owned(ctx context.Context, r store.NameRange, limit int) (owned []store.Placement, rest store.NameRange, err error) {
	rows, err := s.pool.Query(ctx, `
		SELECT r.name, r.type, r.owning_region, r.regions, r.state <> 2 AND r.owning_region = d.region
		FROM ctl.deployment_state d, LATERAL (SELECT name, type, owning_region, regions, state FROM resources WHERE name >= $1 AND name < $2 ORDER BY name LIMIT $3) r
		ORDER BY r.name`, r.From, r.To, limit)
	if err != nil {
		return nil, rest, wrap(err, "read placements")
	}
	n, last := 0, ""
	var p store.Placement
	var ours bool
	_, err = pgx.ForEachRow(rows, []any{&p.Name, &p.Type, &p.OwningRegion, &p.Regions, &ours}, func() error {
		n++
		last = p.Name
		if ours {
			owned = append(owned, p)
		}
		p.Regions = nil
		return nil
	})
	if err != nil {
		return nil, rest, wrap(err, "read placements")
	}
	if n == limit {
		rest = store.NameRange{From: last + "\x01", To: r.To} // before every other name that follows it
	}
	return owned, rest, nil
}

// placeSQL is the effect of an empty update on metadata.syncing: a new version of each row that is not as it should be, and nothing else. A row that
// somebody changes at the same time is judged as it is then.
const placeSQL = `
UPDATE resources t SET regions = i.regions::text[], left_regions = left_after(t.regions, t.left_regions, i.regions::text[], d.region),
	epoch = greatest(t.epoch, f.epoch), resource_version = t.resource_version + 1, change = pg_current_xact_id(), update_time = now()
FROM unnest((SELECT $2::text[]), (SELECT $3::text[])) AS i (name, regions), ctl.deployment_state d, ctl.feed_epoch f
WHERE t.name = i.name AND t.state <> 2 AND t.owning_region = d.region AND d.writable_version = $1 AND t.regions <> i.regions::text[]
RETURNING t.shard`

// Place writes metadata.syncing.regions of resources that are owned here, and returns how many were not so before. Like an empty update it raises
// their versions, so that their copies follow; bodies, generations and references stay.
func (s *Store) Place(ctx context.Context, placements []store.Placement) (int, error) {
	names, regions := make([]string, len(placements)), make([]string, len(placements))
	for i, p := range placements {
		names[i], regions[i] = p.Name, arrayLiteral(p.Regions)
	}
	for attempt := 0; ; attempt++ {
		var b pgx.Batch
		b.Queue(fenceSQL, lockClass, lockFence)
		if attempt > 0 {
			b.Queue(lockRowsSQL, names)
		}
		b.Queue(placeSQL, s.cfg.Version, names, regions)
		shards, err := s.place(ctx, &b)
		var pe *pgconn.PgError
		if errors.As(err, &pe) && (pe.Code == "40001" || pe.Code == "40P01") && attempt < maxAttempts {
			if err := pause(ctx, attempt); err != nil {
				return 0, wrap(err, "place resources")
			}
			continue
		}
		if err != nil {
			return 0, wrap(err, "place resources")
		}
		if len(shards) > 0 {
			s.hub.Committed(true, shards...)
		}
		return len(shards), nil
	}
}

func (s *Store) place(ctx context.Context, b *pgx.Batch) (shards []int32, err error) {
	br := s.pool.SendBatch(ctx, b)
	defer func() { err = errors.Join(err, br.Close()) }()
	for range b.Len() - 1 {
		if _, err := br.Exec(); err != nil {
			return nil, err
		}
	}
	rows, err := br.Query()
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[int32])
}

// CountOwned counts the resources owned here in r.
func (s *Store) CountOwned(ctx context.Context, r store.NameRange) (n int64, err error) {
	err = s.pool.QueryRow(ctx, `SELECT count(*) FROM resources WHERE name >= $1 AND name < $2 AND state <> 2 AND owning_region = (SELECT region FROM ctl.deployment_state)`,
		r.From, r.To).Scan(&n)
	return n, wrap(err, "count resources")
}

// holdingsSQL groups what is owned here in some ranges of names. Names of one group have the same form: as many segments, or, for the types that have several forms
// of that length, the same collections.
const holdingsSQL = `
SELECT r.type, r.regions, min(r.name), count(*), coalesce(sum(r.bytes), 0)
FROM unnest((SELECT $1::text[]), (SELECT $2::text[])) AS g (lo, hi), LATERAL (
	SELECT type, regions, name, length(name) - length(replace(name, '/', '')) AS segments,
		CASE WHEN type = ANY ($3) THEN regexp_replace(name, '([^/]+)/[^/]+', '\1', 'g') END AS form,
		CASE WHEN $4 THEN octet_length(meta::text) + octet_length(body::text) END::bigint AS bytes
	FROM resources
	WHERE name >= g.lo AND name < g.hi AND state <> 2 AND owning_region = (SELECT region FROM ctl.deployment_state) OFFSET 0) r
GROUP BY r.type, r.regions, r.segments, r.form ORDER BY 1, 2, 3`

// Holdings groups the resources owned here in the ranges by type, form of name and regions; Regional is left to the caller. formed are the types with several forms of
// names of one length.
func (s *Store) Holdings(ctx context.Context, in []store.NameRange, formed []string, bytes bool) ([]store.Holding, error) {
	from, to := make([]string, len(in)), make([]string, len(in))
	for i, r := range in {
		from[i], to[i] = r.From, r.To
	}
	if formed == nil {
		formed = []string{}
	}
	rows, err := s.pool.Query(ctx, holdingsSQL, from, to, formed, bytes)
	if err != nil {
		return nil, wrap(err, "measure holdings")
	}
	groups, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (h store.Holding, err error) {
		return h, row.Scan(&h.Type, &h.Regions, &h.Example, &h.Rows, &h.Bytes)
	})
	return groups, wrap(err, "measure holdings")
}

const walkColumns = `holder, says, after, round, done, total, checked, changed, misplaced, started, updated`

func scanWalk(row pgx.CollectableRow) (w store.PolicyWalk, err error) {
	return w, row.Scan(&w.Holder, &w.Says, &w.After, &w.Round, &w.Done, &w.Total, &w.Checked, &w.Changed, &w.Misplaced, &w.Started, &w.Updated)
}

// PolicyWalks returns what is known of policies and of how far they are carried out, by holder: of all of them, or only of those that are not done.
func (s *Store) PolicyWalks(ctx context.Context, due bool) ([]store.PolicyWalk, error) {
	sql := `SELECT ` + walkColumns + ` FROM ctl.policy_progress WHERE version = $1 ORDER BY holder`
	if due {
		sql = `SELECT ` + walkColumns + ` FROM ctl.policy_progress WHERE version = $1 AND NOT done ORDER BY holder`
	}
	rows, err := s.pool.Query(ctx, sql, s.cfg.Version)
	if err != nil {
		return nil, wrap(err, "read progress of policies")
	}
	walks, err := pgx.CollectRows(rows, scanWalk)
	return walks, wrap(err, "read progress of policies")
}

// PolicyWalk returns the walk of one holder, nil if there has been none.
func (s *Store) PolicyWalk(ctx context.Context, holder string) (*store.PolicyWalk, error) {
	rows, err := s.pool.Query(ctx, `SELECT `+walkColumns+` FROM ctl.policy_progress WHERE version = $1 AND holder = $2`, s.cfg.Version, holder)
	if err != nil {
		return nil, wrap(err, "read progress of a policy")
	}
	w, err := pgx.CollectExactlyOneRow(rows, scanWalk)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	return &w, wrap(err, "read progress of a policy")
}

// BeginPolicyWalks notes in one transaction what policies say now. Those that are not Done begin anew; the others count as carried out.
func (s *Store) BeginPolicyWalks(ctx context.Context, walks []store.PolicyWalk) error {
	holders, says, done := make([]string, len(walks)), make([]string, len(walks)), make([]bool, len(walks))
	for i, w := range walks {
		holders[i], says[i], done[i] = w.Holder, w.Says, w.Done
	}
	_, err := s.pool.Exec(ctx, `
		INSERT INTO ctl.policy_progress (version, holder, says, done)
		SELECT $1, i.holder, i.says, i.done FROM unnest((SELECT $2::text[]), (SELECT $3::text[]), (SELECT $4::bool[])) AS i (holder, says, done)
		ON CONFLICT (version, holder) DO UPDATE SET says = excluded.says, done = excluded.done, after = '', round = 1,
			total = 0, checked = 0, changed = 0, misplaced = 0, started = now(), updated = now()`, s.cfg.Version, holders, says, done)
	return wrap(err, "begin to carry out policies")
}

// SavePolicyWalk stores progress. It reports false, and stores nothing, if the policy says something else by now or is gone.
func (s *Store) SavePolicyWalk(ctx context.Context, w store.PolicyWalk) (bool, error) {
	tag, err := s.pool.Exec(ctx, `
		UPDATE ctl.policy_progress SET after = $4, round = $5, done = $6, total = $7, checked = $8, changed = $9, misplaced = $10, updated = now()
		WHERE version = $1 AND holder = $2 AND says = $3 AND started = $11`,
		s.cfg.Version, w.Holder, w.Says, w.After, w.Round, w.Done, w.Total, w.Checked, w.Changed, w.Misplaced, w.Started)
	return tag.RowsAffected() > 0, wrap(err, "store progress of a policy")
}

// ForgetPolicyWalks drops what is known of holders that are gone.
func (s *Store) ForgetPolicyWalks(ctx context.Context, holders []string) error {
	_, err := s.pool.Exec(ctx, `DELETE FROM ctl.policy_progress p USING unnest((SELECT $2::text[])) AS i (holder) WHERE p.version = $1 AND p.holder = i.holder`,
		s.cfg.Version, holders)
	return wrap(err, "forget progress of policies")
}

// SaveRate notes how many rows a second were handled: what is "policy", or "copy" and the region that owns them.
func (s *Store) SaveRate(ctx context.Context, what string, rowsPerSecond float64) error {
	_, err := s.pool.Exec(ctx, `
		INSERT INTO ctl.measured_rate (what, rows_per_second) VALUES ($1, $2)
		ON CONFLICT (what) DO UPDATE SET rows_per_second = excluded.rows_per_second, measured_at = now()`, what, rowsPerSecond)
	return wrap(err, "store a rate")
}

// ServicePolicy returns the policy of the service that is in force here, as TakeServicePolicy has stored it. It reports false if none was stored yet.
func (s *Store) ServicePolicy(ctx context.Context) (policy string, known bool, err error) {
	err = s.pool.QueryRow(ctx, `SELECT policy FROM ctl.service_policy`).Scan(&policy)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", false, nil
	}
	return policy, err == nil, wrap(err, "read the policy of the service")
}

// TakeServicePolicy brings a policy of the service into force, unless one is in force that is not was: then it reports false.
func (s *Store) TakeServicePolicy(ctx context.Context, was, now string) (bool, error) {
	tag, err := s.pool.Exec(ctx, `
		INSERT INTO ctl.service_policy AS p (policy) VALUES ($2)
		ON CONFLICT (one) DO UPDATE SET policy = excluded.policy, taken_at = now() WHERE p.policy = $1`, was, now)
	return tag.RowsAffected() == 1, wrap(err, "store the policy of the service")
}

// Rate is a measurement.
type Rate struct {
	RowsPerSecond float64
	At            time.Time
}

// Rates returns what SaveRate has noted.
func (s *Store) Rates(ctx context.Context) (map[string]Rate, error) {
	rows, err := s.pool.Query(ctx, `SELECT what, rows_per_second, measured_at FROM ctl.measured_rate`)
	if err != nil {
		return nil, wrap(err, "read rates")
	}
	all := map[string]Rate{}
	var what string
	var r Rate
	_, err = pgx.ForEachRow(rows, []any{&what, &r.RowsPerSecond, &r.At}, func() error {
		all[what] = r
		return nil
	})
	return all, wrap(err, "read rates")
}
