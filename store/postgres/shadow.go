package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Outgoing returns the schema references of names to other Deployments, by name, and where this database stands: read before grants are asked for.
func (s *Store) Outgoing(ctx context.Context, names []string) (map[string][]store.Reference, store.Mark, error) {
	var mark store.Mark
	var b pgx.Batch
	b.Queue("SELECT epoch, (SELECT fences FROM horizon) FROM ctl.feed_epoch").QueryRow(func(r pgx.Row) error { return r.Scan(&mark.Epoch, &mark.Fence) })
	out := map[string][]store.Reference{}
	if len(names) > 0 {
		b.Queue("SELECT "+referenceColumns+" FROM refs WHERE referrer = ANY ($1) AND location <> '' AND kind <> 2", names).Query(func(rows pgx.Rows) error {
			return eachReference(rows, func(referrer string, r store.Reference, _ bool) error {
				out[referrer] = append(out[referrer], r)
				return nil
			})
		})
	}
	err := s.pool.SendBatch(ctx, &b).Close()
	return out, mark, wrap(err, "read references of %d resources", len(names))
}

const referenceColumns = "referrer, field, target, location, kind, behavior, tx_id::text"

// eachReference reads referenceColumns. An unconfirmed reference has a grant with its transaction.
func eachReference(rows pgx.Rows, emit func(referrer string, r store.Reference, unconfirmed bool) error) error {
	var referrer, location string
	var r store.Reference
	var tx *string
	_, err := pgx.ForEachRow(rows, []any{&referrer, &r.Field, &r.Target, &location, &r.Kind, &r.Behavior, &tx}, func() (err error) {
		if r.At, err = store.ParseLocation(location); err != nil {
			return err
		}
		r.Grant = nil
		if tx != nil {
			r.Grant = &store.Grant{TxID: *tx}
		}
		return emit(referrer, r, tx != nil)
	})
	return err
}

// BeginAttempt makes the row_version of names odd: from now on a new grant, and only that, ends the attempt. It returns what a question about each
// name needs; missing names are left out.
func (s *Store) BeginAttempt(ctx context.Context, names []string) (map[string]store.Question, error) {
	questions := make(map[string]store.Question, len(names))
	rows, err := s.pool.Query(ctx, `WITH here AS (SELECT ctl.enter_write($2)), begun AS (
			UPDATE resources SET row_version = row_version | 1 FROM here WHERE name = ANY ($1) AND shadow <> 0 AND row_version % 2 = 0 RETURNING name, row_version
		)
		SELECT t.name, t.uuid::text, (SELECT epoch FROM ctl.feed_epoch), coalesce(b.row_version, t.row_version)
		FROM resources t LEFT JOIN begun b USING (name) WHERE t.name = ANY ($1) AND t.shadow <> 0`, names, s.cfg.Version)
	if err != nil {
		return nil, wrap(err, "begin to delete %d resources", len(names))
	}
	var q store.Question
	_, err = pgx.ForEachRow(rows, []any{&q.Name, &q.UUID, &q.Epoch, &q.RowVersion}, func() error {
		questions[q.Name] = q
		return nil
	})
	return questions, s.fail(err, "begin to delete %d resources", len(names))
}

// fail is wrap for the functions of the schema, which refuse while another API version takes the writes.
func (s *Store) fail(err error, format string, args ...any) error {
	var pe *pgconn.PgError
	if errors.As(err, &pe) && pe.Code == stateFrozen {
		return refusal("frozen", store.Write{}, nil)
	}
	return wrap(err, format, args...)
}

// Establish accepts new references of another Deployment, all or none (spec 3.1). The error names the first target that does not exist (NotFound) or
// cannot be referred to (FailedPrecondition), and all of them as violations.
func (s *Store) Establish(ctx context.Context, e store.Establish) ([]store.Grant, error) {
	n := len(e.Targets)
	names, blocking, subscriber := make([]string, n), make([]bool, n), make([]bool, n)
	for i, t := range e.Targets {
		names[i], blocking[i], subscriber[i] = t.Name, t.Blocking, t.Subscriber
	}
	rows, err := s.pool.Query(ctx, "SELECT target, problem, target_uuid::text, target_epoch, target_version, owner FROM establish($1, $2, $3, $4, $5, $6, $7, $8, $9)",
		s.cfg.Version, e.Requester.String(), e.Referrer, e.TxID, e.Attempt, e.TTL, names, blocking, subscriber)
	if err != nil {
		return nil, wrap(err, "establish references of %s", e.Referrer)
	}
	var name string
	var problem, uuid, owner *string
	var epoch, rowVersion *int64
	byName := make(map[string]store.Grant, n)
	var refused *store.Error
	_, err = pgx.ForEachRow(rows, []any{&name, &problem, &uuid, &epoch, &rowVersion, &owner}, func() error {
		if *problem == "" {
			byName[name] = store.Grant{TxID: e.TxID, UUID: *uuid, Epoch: *epoch, RowVersion: *rowVersion}
			return nil
		}
		code, reason := store.FailedPrecondition, ""
		switch *problem {
		case "missing":
			code, reason = store.NotFound, "does not exist"
		case "deleting":
			reason = "is being deleted"
		case "elsewhere":
			reason = "is owned by region " + *owner
		case "unconstrained":
			reason = "cannot be referred to: its type takes no part in references"
		}
		if refused == nil || code == store.NotFound && refused.Code != code {
			violations := []store.Violation(nil)
			if refused != nil {
				violations = refused.Violations
			}
			refused = &store.Error{Code: code, Name: name, Reason: reason, Violations: violations}
		}
		refused.Violations = append(refused.Violations, store.Violation{Field: name, Description: reason})
		return nil
	})
	if err != nil {
		return nil, s.fail(err, "establish references of %s", e.Referrer)
	}
	if refused != nil {
		return nil, refused
	}
	grants := make([]store.Grant, n)
	for i, name := range names {
		grants[i] = byName[name]
	}
	return grants, nil
}

// Confirm says that references of another Deployment are committed (spec 3.2). It returns the targets that do not exist.
func (s *Store) Confirm(ctx context.Context, requester store.Location, refs []store.Confirmed) (missing []string, err error) {
	n := len(refs)
	referrers, names, txs := make([]string, n), make([]string, n), make([]*string, n)
	blocking, subscriber := make([]bool, n), make([]bool, n)
	for i, r := range refs {
		referrers[i], names[i], blocking[i], subscriber[i] = r.Referrer, r.Name, r.Blocking, r.Subscriber
		if r.TxID != "" {
			txs[i] = &refs[i].TxID
		}
	}
	rows, err := s.pool.Query(ctx, "SELECT missing FROM confirm_references($1, $2, $3, $4, $5, $6, $7)", s.cfg.Version, requester.String(), referrers, names, blocking, subscriber, txs)
	if err != nil {
		return nil, wrap(err, "confirm references of %s", requester)
	}
	missing, err = pgx.CollectRows(rows, pgx.RowTo[string])
	return missing, s.fail(err, "confirm references of %s", requester)
}

// ConfirmEpoch says that a Deployment has confirmed all its references since the epoch began. An epoch that is not the present one changes nothing.
func (s *Store) ConfirmEpoch(ctx context.Context, requester store.Location, epoch int64) error {
	_, err := s.pool.Exec(ctx, `INSERT INTO ctl.referrer_epoch (location, epoch) SELECT $1, $2 WHERE $2 = (SELECT epoch FROM ctl.feed_epoch)
		ON CONFLICT (location) DO UPDATE SET epoch = excluded.epoch`, requester.String(), epoch)
	return wrap(err, "note the references of %s as complete", requester)
}

// Suspects returns those of candidates whose references may be unknown here, because a failover has lost them and they have not confirmed them since. In
// the first epoch of a database nothing has been lost.
func (s *Store) Suspects(ctx context.Context, candidates []store.Location) ([]store.Location, error) {
	if len(candidates) == 0 {
		return nil, nil
	}
	texts := make([]string, len(candidates))
	for i, c := range candidates {
		texts[i] = c.String()
	}
	rows, err := s.pool.Query(ctx, `SELECT c FROM ctl.feed_epoch f, unnest($1::text[]) AS c WHERE f.epoch > 1
		AND NOT EXISTS (SELECT FROM ctl.referrer_epoch r WHERE r.location = c AND r.epoch = f.epoch)`, texts)
	if err != nil {
		return nil, wrap(err, "read who has confirmed its references")
	}
	suspects, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (store.Location, error) {
		text, err := pgx.RowTo[string](r)
		if err != nil {
			return store.Location{}, err
		}
		return store.ParseLocation(text)
	})
	return suspects, wrap(err, "read who has confirmed its references")
}

// AddOwnee writes down that at holds an ownee of owner, unless that does not exist or is being deleted.
func (s *Store) AddOwnee(ctx context.Context, owner string, at store.Location) (found bool, state store.ShadowState, err error) {
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT ctl.enter_write($1)", s.cfg.Version); err != nil {
			return err
		}
		// The lock conflicts with that of a deletion.
		err := tx.QueryRow(ctx, "SELECT shadow FROM resources WHERE name = $1 AND shadow <> 0 FOR KEY SHARE", owner).Scan(&state)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if found = err == nil; err != nil || state != store.ShadowActive {
			return err
		}
		_, err = tx.Exec(ctx, `INSERT INTO sources (name, location, blocking, subscriber, ownee) VALUES ($1, $2, false, false, true)
			ON CONFLICT (name, location) DO UPDATE SET ownee = true WHERE NOT sources.ownee`, owner, at.String())
		return err
	})
	return found, state, s.fail(err, "add an ownee of %s", owner)
}

// Which behaviors a question is about: blocking ones, or those that are handled after the deletion of a target in another Deployment.
var (
	blockingBehaviors   = []int32{int32(store.Block)}
	subscriberBehaviors = []int32{int32(store.Unset), int32(store.Cascade), int32(store.AsyncUnset), int32(store.AsyncCascade)}
)

// CheckBlocked answers whether references of this Deployment block the deletion of targets of owner. A negative answer leaves a fence (spec 3.3).
func (s *Store) CheckBlocked(ctx context.Context, owner store.Location, targets []store.Question, excluding []string) ([]store.BlockedAnswer, error) {
	answers := make([]store.BlockedAnswer, 0, len(targets))
	err := s.check(ctx, owner, targets, blockingBehaviors, excluding, 10, func(count int, hasAny bool, sample []string) {
		answers = append(answers, store.BlockedAnswer{Blocked: count > 0, HasAny: hasAny, Sample: sample})
	})
	return answers, err
}

// CheckSubscriber counts, up to 1000, the references of this Deployment that must be handled because target is deleted. At 0 it leaves a fence (spec 3.4).
func (s *Store) CheckSubscriber(ctx context.Context, owner store.Location, target store.Question) (count int, sample []string, err error) {
	err = s.check(ctx, owner, []store.Question{target}, subscriberBehaviors, nil, 1000, func(c int, _ bool, names []string) { count, sample = c, names })
	return count, sample, err
}

func (s *Store) check(ctx context.Context, owner store.Location, targets []store.Question, behaviors []int32, excluding []string, limit int, emit func(count int, hasAny bool, sample []string)) error {
	n := len(targets)
	names, uuids, epochs, rowVersions := make([]string, n), make([]string, n), make([]int64, n), make([]int64, n)
	for i, t := range targets {
		names[i], uuids[i], epochs[i], rowVersions[i] = t.Name, t.UUID, t.Epoch, t.RowVersion
	}
	if excluding == nil {
		excluding = []string{} // an array, not NULL
	}
	rows, err := s.pool.Query(ctx, "SELECT found, has_any, sample FROM check_references($1, $2, $3, $4::text[]::uuid[], $5, $6, $7, $8, $9)",
		s.cfg.Version, owner.String(), names, uuids, epochs, rowVersions, behaviors, excluding, limit)
	if err != nil {
		return wrap(err, "check references to %d resources of %s", n, owner)
	}
	var count int
	var hasAny bool
	var sample []string
	_, err = pgx.ForEachRow(rows, []any{&count, &hasAny, &sample}, func() error {
		emit(count, hasAny, sample)
		sample = nil
		return nil
	})
	return s.fail(err, "check references to %d resources of %s", n, owner)
}

// CheckOwnee says whether a resource here names one of names at a Deployment as its owner (spec 3.5).
func (s *Store) CheckOwnee(ctx context.Context, _ string, at store.Location, names []string) (bool, error) {
	ownees, err := s.Ownees(ctx, at, names, "", 1)
	return len(ownees) > 0, err
}

// Ownees returns up to limit resources, by name and after one, that name one of names at a Deployment as their owner.
func (s *Store) Ownees(ctx context.Context, at store.Location, names []string, after string, limit int) ([]string, error) {
	rows, err := s.pool.Query(ctx, "SELECT DISTINCT referrer FROM refs WHERE target = ANY ($1) AND location = $2 AND kind = 2 AND referrer > $3 ORDER BY referrer LIMIT $4",
		names, at.String(), after, limit)
	if err != nil {
		return nil, wrap(err, "list ownees")
	}
	ownees, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return ownees, wrap(err, "list ownees")
}

// RaiseTasks gives the owned-pending handler work. Names without a shadow, or whose shadow is being deleted, are passed over.
func (s *Store) RaiseTasks(ctx context.Context, names []string, t store.Tasks) error {
	tag, err := s.pool.Exec(ctx, `WITH here AS (SELECT ctl.enter_write($3))
		UPDATE resources SET tasks = tasks | $2::int::smallint, task_time = CASE WHEN tasks = 0 THEN now() ELSE task_time END, shadow_change = pg_current_xact_id()
		FROM here WHERE name = ANY ($1) AND shadow = 1`, names, int32(t), s.cfg.Version)
	if err == nil && tag.RowsAffected() > 0 {
		s.hub.Committed(true)
	}
	return s.fail(err, "raise tasks of %d resources", len(names))
}

// ClearTasks takes work off a shadow, unless something was raised since its Task was read.
func (s *Store) ClearTasks(ctx context.Context, name, uuid, seen string, t store.Tasks) (bool, error) {
	tag, err := s.pool.Exec(ctx, `WITH here AS (SELECT ctl.enter_write($5))
		UPDATE resources SET tasks = tasks & ~$4::int::smallint,
			task_time = CASE WHEN tasks & ~$4::int::smallint = 0 THEN NULL ELSE task_time END, task_error = NULL, task_retry = NULL,
			shadow_change = CASE WHEN tasks & ~$4::int::smallint = 0 THEN NULL ELSE shadow_change END
		FROM here WHERE name = $1 AND uuid = $2 AND shadow = 1 AND shadow_change = $3::text::xid8`, name, uuid, seen, int32(t), s.cfg.Version)
	return tag.RowsAffected() > 0, s.fail(err, "clear tasks of %s", name)
}

// NoteFailure writes down, for people, why work on a shadow is not done and when it is tried again.
func (s *Store) NoteFailure(ctx context.Context, name, reason string, next time.Time) error {
	_, err := s.pool.Exec(ctx, "UPDATE resources SET task_error = left($2, 2000), task_retry = $3 WHERE name = $1 AND shadow_change IS NOT NULL", name, reason, next)
	return wrap(err, "note a failure of %s", name)
}

// Unconfirmed returns the references of a resource whose grant has not been confirmed yet.
func (s *Store) Unconfirmed(ctx context.Context, name string) (refs []store.Reference, err error) {
	rows, err := s.pool.Query(ctx, "SELECT "+referenceColumns+" FROM refs WHERE referrer = $1 AND tx_id IS NOT NULL", name)
	if err != nil {
		return nil, wrap(err, "read unconfirmed references of %s", name)
	}
	err = eachReference(rows, func(_ string, r store.Reference, _ bool) error {
		refs = append(refs, r)
		return nil
	})
	return refs, wrap(err, "read unconfirmed references of %s", name)
}

// MarkConfirmed notes that the target's Deployment knows of references as their transaction wrote them, and takes the task off when none is left.
func (s *Store) MarkConfirmed(ctx context.Context, name string, refs []store.Reference) error {
	n := len(refs)
	fields, targets, locations, txs := make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	for i, r := range refs {
		fields[i], targets[i], locations[i] = r.Field, r.Target, r.At.String()
		if r.Grant != nil {
			txs[i] = r.Grant.TxID
		}
	}
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		var b pgx.Batch
		b.Queue("SELECT ctl.enter_write($1)", s.cfg.Version)
		// References are written under the lock of their referrer.
		b.Queue("SELECT FROM resources WHERE name = $1 FOR NO KEY UPDATE", name)
		b.Queue(`UPDATE refs o SET tx_id = NULL FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]::uuid[]) AS n (f, t, l, tx)
			WHERE o.referrer = $1 AND (o.field, o.target, o.location, o.tx_id) = (n.f, n.t, n.l, n.tx)`, name, fields, targets, locations, txs)
		b.Queue(`UPDATE resources SET tasks = tasks & ~1::smallint, task_time = CASE WHEN tasks = 1 THEN NULL ELSE task_time END, task_error = NULL, task_retry = NULL,
			shadow_change = CASE WHEN tasks = 1 THEN NULL ELSE shadow_change END
			WHERE name = $1 AND shadow = 1 AND tasks & 1 <> 0 AND NOT EXISTS (SELECT FROM refs WHERE referrer = $1 AND tx_id IS NOT NULL)`, name)
		return tx.SendBatch(ctx, &b).Close()
	})
	return s.fail(err, "note confirmed references of %s", name)
}

// ExpiredBlockades returns up to limit blockades of targets in the shards that block no more, oldest first. Their locations must be asked before they go.
func (s *Store) ExpiredBlockades(ctx context.Context, shards feed.Range, limit int) ([]store.Blockade, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+blockadeColumns+" FROM blockades WHERE expires_at <= now() AND shard >= $1 AND shard < $2 ORDER BY expires_at LIMIT $3", shards.From, shards.To, limit)
	if err != nil {
		return nil, wrap(err, "list expired blockades")
	}
	all, err := pgx.CollectRows(rows, scanBlockade)
	return all, wrap(err, "list expired blockades")
}

// Blockades counts the tentative blockades that are held, expired ones among them.
func (s *Store) Blockades(ctx context.Context, shards feed.Range) (held int, err error) {
	err = s.pool.QueryRow(ctx, "SELECT count(*) FROM blockades WHERE shard >= $1 AND shard < $2", shards.From, shards.To).Scan(&held)
	return held, wrap(err, "count blockades")
}

const blockadeColumns = "name, location, referrer, tx_id::text, attempt, expires_at"

func scanBlockade(r pgx.CollectableRow) (b store.Blockade, err error) {
	var location string
	if err = r.Scan(&b.Name, &location, &b.Referrer, &b.TxID, &b.Attempt, &b.ExpireTime); err == nil {
		b.Location, err = store.ParseLocation(location)
	}
	return b, err
}

// DropBlockades removes blockades that have expired. One that an attempt has renewed stays.
func (s *Store) DropBlockades(ctx context.Context, blockades []store.Blockade) error {
	n := len(blockades)
	names, locations, referrers, txs := make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	for i, b := range blockades {
		names[i], locations[i], referrers[i], txs[i] = b.Name, b.Location.String(), b.Referrer, b.TxID
	}
	_, err := s.pool.Exec(ctx, `WITH here AS (SELECT ctl.enter_write($5))
		DELETE FROM blockades b USING here, unnest($1::text[], $2::text[], $3::text[], $4::text[]::uuid[]) AS x (n, l, r, tx)
		WHERE (b.name, b.location, b.referrer, b.tx_id) = (x.n, x.l, x.r, x.tx) AND b.expires_at <= now()`, names, locations, referrers, txs, s.cfg.Version)
	return s.fail(err, "drop %d expired blockades", n)
}

// PruneSource makes what is known of a source of references keep, all false removing it, if the attempt under which it was asked (q) still stands: nothing was granted since,
// and no failover has taken back what was.
func (s *Store) PruneSource(ctx context.Context, q store.Question, at store.Location, keep store.Source) (pruned bool, err error) {
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT ctl.enter_write($1)", s.cfg.Version); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, "SELECT FROM resources WHERE name = $1 AND uuid = $2 AND row_version = $3 AND $4 = (SELECT epoch FROM ctl.feed_epoch) FOR UPDATE",
			q.Name, q.UUID, q.RowVersion, q.Epoch)
		if pruned = tag.RowsAffected() > 0; err != nil || !pruned {
			return err
		}
		if keep.Blocking || keep.Subscriber || keep.Ownee {
			_, err = tx.Exec(ctx, `UPDATE sources SET blocking = blocking AND $3, subscriber = subscriber AND $4, ownee = ownee AND $5 WHERE name = $1 AND location = $2
				AND NOT EXISTS (SELECT FROM blockades b WHERE b.name = $1 AND b.location = $2)`,
				q.Name, at.String(), keep.Blocking, keep.Subscriber, keep.Ownee)
			return err
		}
		_, err = tx.Exec(ctx, "DELETE FROM sources WHERE name = $1 AND location = $2 AND NOT EXISTS (SELECT FROM blockades b WHERE b.name = $1 AND b.location = $2)", q.Name, at.String())
		return err
	})
	return pruned, s.fail(err, "prune a source of %s", q.Name)
}

// FinishDeletion ends the deletion of a resource if every source that had to be told is in checked, no local referrer is left, and the service does not hold it
// up. Only then can the name be used again. What was learned in another epoch than the present one does not count: a failover may have taken it back.
func (s *Store) FinishDeletion(ctx context.Context, name, uuid string, epoch int64, checked []store.Location) (done bool, err error) {
	texts := make([]string, len(checked))
	for i, c := range checked {
		texts[i] = c.String()
	}
	err = s.pool.QueryRow(ctx, "SELECT finish_deletion($1, $2, $3, $4, $5)", s.cfg.Version, name, uuid, epoch, texts).Scan(&done)
	if done {
		s.hub.Committed(true, s.shard(name))
	}
	return done, s.fail(err, "finish the deletion of %s", name)
}

// HandledReferrers returns up to limit local references that must be handled because the incarnation uuid of target, at a Deployment or here, is deleted; without uuid
// those that would have to be. Referrers whose own deletion is pending are left out: something blocks it, and it is tried again by itself.
// The resources are looked up one by one: a merge of both tables would pass all that the pages before have deleted.
func (s *Store) HandledReferrers(ctx context.Context, at store.Location, target, uuid string, limit int) ([]store.Incoming, error) {
	behaviors, incarnation := subscriberBehaviors, "r.uuid = nullif($5, '')::uuid"
	if at == (store.Location{}) {
		behaviors = []int32{int32(store.AsyncUnset), int32(store.AsyncCascade)}
		incarnation = "EXISTS (SELECT FROM resources x WHERE x.name = $1 AND x.uuid = nullif($5, '')::uuid AND x.shadow = 2)"
	}
	rows, err := s.pool.Query(ctx, "SELECT "+incomingColumns+` FROM refs r, LATERAL (SELECT * FROM resources WHERE name = r.referrer AND state = 0 OFFSET 0) t
		WHERE r.target = $1 AND r.location = $2 AND r.kind <> 2 AND r.behavior = ANY ($3) AND NOT (t.tasks & 8 <> 0 AND r.behavior IN (3, 5)) AND ($5 = '' OR `+incarnation+`) LIMIT $4`,
		target, at.String(), behaviors, limit, uuid)
	if err != nil {
		return nil, wrap(err, "list referrers of %s", target)
	}
	all, err := pgx.CollectRows(rows, scanIncoming)
	return all, wrap(err, "list referrers of %s", target)
}

const incomingColumns = "r.referrer, t.type, r.field, r.target, r.kind, r.behavior, t.epoch, t.resource_version"

func scanIncoming(r pgx.CollectableRow) (i store.Incoming, err error) {
	err = r.Scan(&i.Referrer, &i.Type, &i.Field, &i.Target, &i.Kind, &i.Behavior, &i.Version.Epoch, &i.Version.Number)
	return i, err
}

// ReferencesTo returns the established references to a Deployment, a page in the order of referrers, and the referrer that the next page begins after, empty at
// the end. A referrer is never split.
func (s *Store) ReferencesTo(ctx context.Context, at store.Location, after string, limit int) (refs []store.Confirmed, next string, err error) {
	rows, err := s.pool.Query(ctx, `SELECT referrer, target, bool_or(behavior = 1), bool_or(behavior IN (2, 3, 4, 5)), coalesce(min(field) FILTER (WHERE behavior = 1), min(field)) FROM refs
		WHERE location = $1 AND kind <> 2 AND behavior <> 6 AND referrer > $2 GROUP BY referrer, target ORDER BY referrer FETCH FIRST ($3::bigint) ROWS WITH TIES`, at.String(), after, limit)
	if err != nil {
		return nil, "", wrap(err, "list references to %s", at)
	}
	refs, err = pgx.CollectRows(rows, func(r pgx.CollectableRow) (c store.Confirmed, err error) {
		err = r.Scan(&c.Referrer, &c.Name, &c.Blocking, &c.Subscriber, &c.Field)
		return c, err
	})
	if len(refs) >= limit {
		next = refs[len(refs)-1].Referrer
	}
	return refs, next, wrap(err, "list references to %s", at)
}

// BeginSweep says that all references to a Deployment are about to be confirmed again, because its feed has begun an epoch. From now on no grant of an older epoch can be
// used: the sweep might already have passed the place of its reference.
func (s *Store) BeginSweep(ctx context.Context, at store.Location, epoch int64) error {
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT ctl.lock_target(true, $1, '')", at.String()); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `INSERT INTO ctl.swept_epoch AS s (location, epoch) VALUES ($1, $2)
			ON CONFLICT (location) DO UPDATE SET epoch = greatest(s.epoch, excluded.epoch)`, at.String(), epoch)
		return err
	})
	return wrap(err, "begin the sweep of references to %s", at)
}

// ReadTasks delivers shadows that have had work due since c; the zero cursor is all that have work due now.
func (s *Store) ReadTasks(ctx context.Context, c feed.Cursor, shards feed.Range, emit func(store.Task) error) (feed.Read, error) {
	return s.feed.ReadTasks(ctx, c, shards, emit)
}
