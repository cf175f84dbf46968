package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

// maxAttempts bounds the repeats of a write that meets concurrent writes of the same rows: about five seconds with the pauses between them. From the
// second attempt on the rows are locked first, so only a name that is created or purged at that very moment, or a row that a masked write has
// read and another then changed, can make it fail again.
const maxAttempts = 64

// pause waits before the attempt after the given number of failures, longer each time, with full jitter: two masked writers of one row that
// repeat at once would take turns in failing.
func pause(ctx context.Context, failures int) error {
	limit := min(time.Millisecond<<min(failures, 10), 160*time.Millisecond)
	timer := time.NewTimer(rand.N(limit))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// fenceSQL takes the shared form of the write fence. It is a statement of its own because writeSQL's snapshot must be taken after it.
const fenceSQL = `SELECT pg_advisory_xact_lock_shared($1, $2)`

const (
	lockRowsSQL = `SELECT FROM resources WHERE name = ANY ($1) ORDER BY name FOR UPDATE`
	// lockTargetsSQL conflicts with lockRowsSQL, by which a deletion begins, and with nothing else.
	lockTargetsSQL = `SELECT FROM resources WHERE name = ANY ($1) ORDER BY name FOR KEY SHARE`
)

// writeSQL judges all rows against the stored ones and, if none is refused, writes those that differ. It returns a row for each name that it wrote,
// refused or left as it was. A concurrent write that the snapshot does not show is found by the guard of ON CONFLICT, where ctl.conflict aborts
// the transaction. The arrays come through subqueries so that their lengths look the same in every plan: only then does the server keep one generic plan, whose
// making costs several times its execution. OFFSET 0 keeps the planner from reading the whole table while it still believes it to be small.
const (
	batchWriteSQL = `
WITH input AS MATERIALIZED (
	SELECT name, type, op, id, shard, owning_region, regions::text[] AS regions, meta::jsonb AS meta, body::jsonb AS body, if_epoch, if_number, allow_missing,
		block, constrained, async, tasks
	FROM unnest((SELECT $2::text[]), (SELECT $3::text[]), (SELECT $4::int[]), (SELECT $5::uuid[]), (SELECT $6::int[]), (SELECT $7::text[]), (SELECT $8::text[]),
			(SELECT $9::text[]), (SELECT $10::text[]), (SELECT $11::bigint[]), (SELECT $12::bigint[]), (SELECT $13::bool[]), (SELECT $14::bool[]),
			(SELECT $15::bool[]), (SELECT $16::bool[]), (SELECT $17::int[]))
		AS i (name, type, op, id, shard, owning_region, regions, meta, body, if_epoch, if_number, allow_missing, block, constrained, async, tasks)
), ` + judgeAndWriteSQL

	singleWriteSQL = `
WITH input (name, type, op, id, shard, owning_region, regions, meta, body, if_epoch, if_number, allow_missing, block, constrained, async, tasks) AS (
	VALUES ($2::text, $3::text, $4::int, $5::uuid, $6::int, $7::text, $8::text::text[], $9::jsonb, $10::jsonb, $11::bigint, $12::bigint, $13::bool,
		$14::bool, $15::bool, $16::bool, $17::int)
), ` + judgeAndWriteSQL

	judgeAndWriteSQL = `judged AS MATERIALIZED (
	SELECT i.name, i.op, i.id, i.shard, CASE WHEN i.async THEN r.meta ELSE coalesce(i.meta, '{}') END AS meta, CASE WHEN i.async THEN r.body ELSE i.body END AS body,
		i.async, i.constrained, d.region AS self, coalesce(i.type, r.type) AS type,
		coalesce(i.owning_region, d.region) AS owning_region, coalesce(i.regions, CASE WHEN r.state <> 2 THEN r.regions END, ARRAY[d.region]) AS regions,
		coalesce(i.block, r.state <> 2 AND r.block_deletion, false) AS block,
		i.tasks | CASE WHEN i.constrained AND i.meta ? 'ownerReferences' AND (i.meta -> 'ownerReferences' = r.meta -> 'ownerReferences') IS NOT TRUE THEN 2 ELSE 0 END AS new_tasks,
		CASE WHEN r.state = 0 THEN r.tasks ELSE 0 END AS old_tasks, r.task_time AS old_task_time,
		greatest((SELECT epoch FROM ctl.feed_epoch), r.epoch) AS epoch, coalesce(r.resource_version, (SELECT floor FROM horizon)) AS version,
		r.name IS NOT NULL AS found, coalesce(r.state <> 2, false) AS live,
		r.type AS old_type, r.uuid AS old_uuid, r.epoch AS old_epoch, r.resource_version AS old_version, r.generation AS old_generation,
		r.owning_region AS old_owner, r.regions AS old_regions, r.left_regions AS old_left, r.state AS old_state, r.block_deletion,
		r.create_time, r.update_time, r.delete_time,
		r.body IS NOT DISTINCT FROM i.body AS same_body,
		CASE
			WHEN d.writable_version <> $1 THEN 'frozen'
			WHEN i.owning_region <> d.region THEN 'misrouted'
			WHEN r.state <> 2 AND r.owning_region <> d.region THEN 'copy'
			WHEN i.if_number > 0 AND (r.state <> 2 AND (r.epoch, r.resource_version) = (i.if_epoch, i.if_number)) IS NOT TRUE THEN 'changed'
			WHEN i.op = 1 AND r.state <> 2 THEN 'exists'
			WHEN i.op IN (2, 4) AND (r.state <> 2) IS NOT TRUE THEN CASE WHEN i.allow_missing THEN 'absent' ELSE 'missing' END
			WHEN i.op = 4 AND r.state = 1 THEN 'same'
			WHEN i.op = 4 AND r.block_deletion THEN 'blocked'
			WHEN i.op <> 4 AND (r.state = 1 OR r.shadow = 2) THEN 'deleting'
			WHEN i.op <> 4 AND r.state = 0 AND r.type = i.type AND r.meta = i.meta AND r.body = i.body
				AND r.regions = coalesce(i.regions, r.regions) AND r.block_deletion = coalesce(i.block, r.block_deletion) THEN 'same'
			ELSE 'write'
		END AS outcome
	FROM input i CROSS JOIN ctl.deployment_state d
		LEFT JOIN LATERAL (SELECT * FROM resources WHERE name = i.name OFFSET 0) r ON true
), written AS (
	INSERT INTO resources AS t (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, left_regions, state,
		block_deletion, create_time, update_time, delete_time, meta, body, shadow, tasks, task_time, shadow_change)
	SELECT name, type, CASE WHEN live THEN old_uuid ELSE id END, epoch, version + 1,
		CASE WHEN live THEN old_generation + (op <> 4 AND NOT same_body)::int ELSE 1 END,
		shard, owning_region, CASE WHEN op = 4 THEN old_regions ELSE regions END,
		CASE WHEN NOT found THEN '{}' WHEN op = 4 OR old_regions = regions THEN old_left ELSE left_after(old_regions, old_left, regions, self) END,
		CASE WHEN op <> 4 THEN 0 WHEN async THEN 1 ELSE 2 END,
		block, CASE WHEN live THEN create_time ELSE now() END, now(), CASE WHEN op = 4 THEN now() END, meta, body,
		CASE WHEN op <> 4 AND constrained THEN 1 ELSE 0 END, CASE WHEN op = 4 THEN 0 ELSE old_tasks | new_tasks END,
		CASE WHEN op = 4 THEN NULL WHEN new_tasks <> 0 THEN now() WHEN old_tasks <> 0 THEN old_task_time END,
		CASE WHEN op <> 4 AND old_tasks | new_tasks <> 0 THEN pg_current_xact_id() END
	FROM judged
	WHERE outcome = 'write' AND NOT EXISTS (SELECT FROM judged WHERE outcome NOT IN ('write', 'same', 'absent'))
	ON CONFLICT (name) DO UPDATE SET type = excluded.type, uuid = excluded.uuid, epoch = excluded.epoch, resource_version = excluded.resource_version,
		generation = excluded.generation, change = pg_current_xact_id(), owning_region = excluded.owning_region, regions = excluded.regions,
		left_regions = excluded.left_regions, state = excluded.state, block_deletion = excluded.block_deletion, create_time = excluded.create_time,
		update_time = excluded.update_time, delete_time = excluded.delete_time, meta = excluded.meta, body = excluded.body,
		shadow = excluded.shadow, tasks = excluded.tasks, task_time = excluded.task_time, shadow_change = excluded.shadow_change
	WHERE CASE WHEN (t.epoch, t.resource_version) < (excluded.epoch, excluded.resource_version) THEN true ELSE ctl.conflict(t.name) IS NULL END
	RETURNING t.name, t.type, t.uuid, t.epoch, t.resource_version, t.generation, t.owning_region, t.regions, t.state, t.block_deletion, t.create_time, t.update_time, t.delete_time
)
SELECT 'write', name, type, uuid, epoch, resource_version, generation, owning_region, regions, state, block_deletion, create_time, update_time, delete_time
FROM written
UNION ALL
SELECT outcome, name, coalesce(type, ''), coalesce(old_uuid, id), coalesce(old_epoch, 0), coalesce(old_version, 0), coalesce(old_generation, 0),
	coalesce(old_owner, owning_region), coalesce(old_regions, '{}'), coalesce(old_state, 0::smallint), coalesce(block_deletion, false),
	coalesce(create_time, now()), coalesce(update_time, now()), delete_time
FROM judged WHERE outcome <> 'write'`
)

// BatchWrite implements store.Writer.
func (s *Store) BatchWrite(ctx context.Context, writes []store.Write) ([]store.Result, error) {
	if err := checkBatch(writes); err != nil {
		return nil, err
	}
	var err error
	for attempt := range maxAttempts {
		var results []store.Result
		err = reclaim(ctx, func() (err error) {
			if attempt == 0 {
				results, err = s.createAlone(ctx, writes)
			}
			if results == nil && (err == nil || attempt > 0) {
				results, err = s.tryWrite(ctx, writes, attempt > 0)
			}
			return err
		})
		if err == nil {
			if shards := s.changed(results); len(writes) > store.MaxBatch {
				s.hub.Committed(true) // everybody: a cascade that large is everywhere
			} else if len(shards) > 0 {
				s.hub.Committed(true, shards...)
			}
			return results, nil
		}
		var pe *pgconn.PgError
		retry := errors.Is(err, errReread) || errors.As(err, &pe) && (pe.Code == "40001" || pe.Code == "40P01")
		if !retry {
			return nil, wrap(err, "write")
		}
		if perr := pause(ctx, attempt); perr != nil {
			return nil, wrap(perr, "write")
		}
	}
	return nil, &store.Error{Code: store.Aborted, Name: writes[0].Name, Reason: "too many concurrent writes of the same resources: read them again and repeat", Cause: err}
}

func checkBatch(writes []store.Write) error {
	n := 0
	for _, w := range writes {
		if !cascades(w) {
			n++
		}
	}
	if n == 0 || n > store.MaxBatch || len(writes) > store.MaxClosure {
		return store.Invalid("writes", fmt.Sprintf("has %d entries: send 1 to %d", n, store.MaxBatch))
	}
	seen := make(map[string]bool, len(writes))
	for i, w := range writes {
		if seen[w.Name] {
			return store.Invalid(fmt.Sprintf("writes[%d].name", i), fmt.Sprintf("%q appears twice: a transaction writes a resource once", w.Name))
		}
		seen[w.Name] = true
	}
	return nil
}

// cascades reports whether w only follows from another Delete of its batch, so that nobody waits for its result.
func cascades(w store.Write) bool {
	return w.Op == store.Delete && w.Constraint != nil && w.Constraint.Closure
}

// changed returns the shards in which something was written.
func (s *Store) changed(results []store.Result) (shards []int32) {
	for _, r := range results {
		if r.Changed {
			shards = append(shards, s.shard(r.Resource.Name))
		}
	}
	return shards
}

func (s *Store) shard(name string) int32 {
	return int32(descriptor.Shard(name, s.cfg.Ring))
}

// errReread means that a row changed between the read for a mask and the write.
var errReread = errors.New("changed since it was read")

func (s *Store) tryWrite(ctx context.Context, writes []store.Write, lockFirst bool) ([]store.Result, error) {
	whole, outdated, err := store.Unmask(ctx, s, writes)
	if err != nil {
		return nil, err
	}
	// In the order of names: transactions that write the same rows must lock them in the same order.
	ordered := slices.SortedFunc(slices.Values(whole), func(a, b store.Write) int { return strings.Compare(a.Name, b.Name) })
	sql, args, err := s.statement(slices.DeleteFunc(slices.Clone(ordered), cascades))
	if err != nil {
		return nil, err
	}
	refs := referencesOf(whole)
	var b pgx.Batch // without an explicit BEGIN a batch is one implicit transaction, committed by its one round trip
	b.Queue(fenceSQL, lockClass, lockFence)
	if targets := refs.localTargets(); len(targets) > 0 {
		b.Queue(lockTargetsSQL, targets)
	}
	if lockFirst {
		b.Queue(lockRowsSQL, names(whole))
	} else if len(refs.deleted) > 0 {
		b.Queue(lockRowsSQL, refs.deleted)
	}
	skip := b.Len()
	b.Queue(sql, args...)
	s.queueCascade(&b, ordered)
	if !refs.empty() {
		b.Queue(writeReferencesSQL, refs.args()...)
	}

	br := s.pool.SendBatch(ctx, &b)
	results, err := readResults(br, whole, skip)
	for n := skip + 1; err == nil && n < b.Len(); n++ {
		_, err = br.Exec()
	}
	if cerr := br.Close(); err == nil {
		err = cerr
	}
	err = refs.refusal(err)
	if err != nil && outdated(err) {
		return nil, errReread // the caller did not ask for that version, we did
	}
	if err != nil {
		return nil, err
	}
	return results, nil
}

// cascadeSQL deletes what goes with others: a set, not judged row by row. A row that is not as the plan says may not belong to it any more: then nothing is written. Nothing
// happens either where the other writes have been refused.
const cascadeSQL = `
WITH gone AS (
	UPDATE resources t SET epoch = greatest(t.epoch, (SELECT epoch FROM ctl.feed_epoch)), resource_version = t.resource_version + 1, change = pg_current_xact_id(), state = CASE WHEN c.async THEN 1 ELSE 2 END,
		update_time = now(), delete_time = now(), meta = CASE WHEN c.async THEN t.meta ELSE '{}' END, body = CASE WHEN c.async THEN t.body END,
		shadow = 0, tasks = 0, task_time = NULL, shadow_change = NULL
	FROM unnest((SELECT $2::text[]), (SELECT $3::bool[]), (SELECT $4::bigint[]), (SELECT $5::bigint[])) AS c (name, async, epoch, number)
	WHERE t.name = c.name AND t.state = 0 AND (c.number = 0 OR (t.epoch, t.resource_version) = (c.epoch, c.number)) AND NOT t.block_deletion
		AND t.owning_region = (SELECT region FROM ctl.deployment_state)
		AND EXISTS (SELECT FROM resources w WHERE w.name = ANY ($1) AND w.change = pg_current_xact_id_if_assigned())
	RETURNING 1
)
SELECT ctl.changed('a resource that would be deleted too has changed') WHERE (SELECT count(*) FROM gone) NOT IN (0, cardinality($2::text[]))`

func (s *Store) queueCascade(b *pgx.Batch, writes []store.Write) {
	var others, names []string
	var async []bool
	var epochs, numbers []int64
	for _, w := range writes {
		if !cascades(w) {
			others = append(others, w.Name)
			continue
		}
		names, async = append(names, w.Name), append(async, w.Constraint.AsyncDeletion)
		epochs, numbers = append(epochs, w.IfVersion.Epoch), append(numbers, w.IfVersion.Number)
	}
	if len(names) > 0 {
		b.Queue(cascadeSQL, others, names, async, epochs, numbers)
	}
}

// statement returns the statement for writes and its parameters.
func (s *Store) statement(writes []store.Write) (sql string, args []any, err error) {
	n := len(writes)
	names, types, ids := make([]string, n), make([]*string, n), make([]uuid.UUID, n)
	ops, shards := make([]int32, n), make([]int32, n)
	owners, regions, metas, bodies := make([]*string, n), make([]*string, n), make([]*string, n), make([]*string, n)
	ifEpoch, ifNumber, allow := make([]int64, n), make([]int64, n), make([]bool, n)
	block, constrained, async, tasks := make([]*bool, n), make([]bool, n), make([]bool, n), make([]int32, n)
	for i, w := range writes {
		names[i], ops[i] = w.Name, int32(w.Op)
		shards[i] = s.shard(w.Name)
		if w.OwningRegion != "" {
			owners[i] = &w.OwningRegion
		}
		ifEpoch[i], ifNumber[i], allow[i] = w.IfVersion.Epoch, w.IfVersion.Number, w.AllowMissing
		block[i] = w.BlockDeletion
		if c := w.Constraint; c != nil {
			constrained[i], async[i] = true, w.Op == store.Delete && c.AsyncDeletion
			if granted(c.References) {
				tasks[i] = int32(store.ConfirmBlockades)
			}
		}
		if w.Op == store.Delete {
			continue
		}
		id, err := uuid.NewV7()
		if err != nil {
			return "", nil, fmt.Errorf("make a uuid for %s: %w", w.Name, err)
		}
		meta, err := json.Marshal(w.Meta)
		if err != nil {
			return "", nil, fmt.Errorf("encode metadata of %s: %w", w.Name, err)
		}
		ids[i], types[i] = id, &w.Type
		metas[i], bodies[i] = ptr(string(meta)), ptr("{}")
		if len(w.Body) > 0 {
			bodies[i] = ptr(string(w.Body))
		}
		if len(w.Regions) > 0 {
			regions[i] = ptr(arrayLiteral(w.Regions))
		}
	}
	if n == 1 {
		return singleWriteSQL, []any{s.cfg.Version, names[0], types[0], ops[0], ids[0], shards[0], owners[0], regions[0], metas[0], bodies[0], ifEpoch[0], ifNumber[0], allow[0],
			block[0], constrained[0], async[0], tasks[0]}, nil
	}
	return batchWriteSQL, []any{s.cfg.Version, names, types, ops, ids, shards, owners, regions, metas, bodies, ifEpoch, ifNumber, allow,
		block, constrained, async, tasks}, nil
}

func names(writes []store.Write) []string {
	names := make([]string, len(writes))
	for i, w := range writes {
		names[i] = w.Name
	}
	return names
}

func ptr[T any](v T) *T { return &v }

// arrayLiteral is PostgreSQL's text form of a text array: unnest would flatten an array of arrays.
func arrayLiteral(values []string) string {
	quote := strings.NewReplacer(`\`, `\\`, `"`, `\"`)
	var b strings.Builder
	b.WriteByte('{')
	for i, v := range values {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte('"')
		b.WriteString(quote.Replace(v))
		b.WriteByte('"')
	}
	b.WriteByte('}')
	return b.String()
}

// readResults reads the outcome of the write statement, which skip others come before.
func readResults(br pgx.BatchResults, writes []store.Write, skip int) ([]store.Result, error) {
	for range skip {
		if _, err := br.Exec(); err != nil {
			return nil, err
		}
	}
	rows, err := br.Query()
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	type judged struct {
		outcome  string
		resource *store.Resource
	}
	byName := make(map[string]judged, len(writes))
	for rows.Next() {
		r := new(store.Resource)
		var outcome string
		var state int16
		var deleted *time.Time
		err := rows.Scan(&outcome, &r.Name, &r.Type, &r.UUID, &r.Version.Epoch, &r.Version.Number, &r.Generation, &r.OwningRegion, &r.Regions, &state, &r.BlockDeletion,
			&r.CreateTime, &r.UpdateTime, &deleted)
		if err != nil {
			return nil, err
		}
		r.State = store.State(state)
		if deleted != nil {
			r.DeleteTime = *deleted
		}
		byName[r.Name] = judged{outcome, r}
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	results := make([]store.Result, len(writes))
	for i, w := range writes {
		j, ok := byName[w.Name]
		if !ok {
			continue // would have been written, but another one was refused
		}
		if err := refusal(j.outcome, w, j.resource); err != nil {
			return nil, err
		}
		if j.outcome == "absent" {
			continue
		}
		if w.Op != store.Delete {
			j.resource.Meta, j.resource.Body = w.Meta, w.Body
			if len(w.Body) == 0 {
				j.resource.Body = json.RawMessage("{}")
			}
		}
		results[i] = store.Result{Resource: j.resource, Changed: j.outcome == "write"}
	}
	return results, nil
}

// refusal is the error for an outcome of writeSQL, nil for those that are none.
func refusal(outcome string, w store.Write, stored *store.Resource) error {
	if w.Constraint != nil && w.Constraint.Closure && (outcome == "changed" || outcome == "missing" || outcome == "deleting") {
		return &store.Error{Code: store.Aborted, Name: w.Name, Reason: "changed while a resource that it refers to was being deleted: repeat", Cause: store.ErrChanged}
	}
	switch outcome {
	case "frozen":
		return store.Errorf(store.Unavailable, w.Name, "this API version does not take writes at the moment: repeat in a few seconds")
	case "misrouted":
		return store.Errorf(store.FailedPrecondition, w.Name, "is owned by region %s: write there", w.OwningRegion)
	case "copy":
		return store.Errorf(store.FailedPrecondition, w.Name, "is a read copy owned by region %s: write there", stored.OwningRegion)
	case "changed":
		return store.Errorf(store.Aborted, w.Name, "has another etag than the one sent: read it again and repeat")
	case "exists":
		return store.Errorf(store.AlreadyExists, w.Name, "exists already")
	case "missing":
		return store.Errorf(store.NotFound, w.Name, "does not exist")
	case "blocked":
		return store.Errorf(store.FailedPrecondition, w.Name, "its deletion is blocked by the service")
	case "deleting":
		return store.Errorf(store.FailedPrecondition, w.Name, "is being deleted")
	}
	return nil
}
