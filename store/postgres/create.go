package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
)

// The creation of one resource that refers to nothing, or to resources of this Deployment, needs no judgement: it is written if all is as it should be, and if it is
// not, the general statement judges why. That is half of the server's work for the general statement, and creations are what there is most of (decision 0015).
//
// A target that somebody deletes at the moment is waited for by FOR KEY SHARE, and looked at again as it is then.
const (
	createSQL = `
INSERT INTO resources (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, meta, body, shadow)
` + createSelectSQL + `
ON CONFLICT (name) DO NOTHING RETURNING epoch, resource_version, create_time`

	createSelectSQL = `SELECT $1, $2, $3, (SELECT epoch FROM ctl.feed_epoch), (SELECT floor + 1 FROM horizon), 1, $4, $5, $6::text[], now(), now(), $7, $8, $9
WHERE (SELECT (writable_version, region) = ($10::text, $5) FROM ctl.deployment_state)`

	createWithReferencesSQL = `
WITH targets AS MATERIALIZED (
	SELECT FROM resources WHERE name = ANY ($11::text[]) AND state = 0 AND shadow = 1 FOR KEY SHARE
), new AS (
	INSERT INTO resources (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, meta, body, shadow)
	` + createSelectSQL + ` AND (SELECT count(*) FROM targets) = cardinality($11::text[])
	ON CONFLICT (name) DO NOTHING RETURNING name, epoch, resource_version, create_time
), refer AS (
	INSERT INTO refs (referrer, field, target, location, kind, behavior)
	SELECT new.name, f, t, '', k, b FROM new, unnest($12::text[], $13::text[], $14::int[], $15::int[]) AS x (f, t, k, b)
)
SELECT epoch, resource_version, create_time FROM new`
)

// createAlone writes the creation of one resource. It returns nil if the write is another one, or was not as it should be: nothing has been written then.
func (s *Store) createAlone(ctx context.Context, writes []store.Write) ([]store.Result, error) {
	if len(writes) != 1 || writes[0].Op != store.Create || writes[0].IfVersion != (store.Version{}) || writes[0].BlockDeletion != nil {
		return nil, nil
	}
	w := writes[0]
	id, err := uuid.NewV7()
	if err != nil {
		return nil, fmt.Errorf("make a uuid for %s: %w", w.Name, err)
	}
	meta, err := json.Marshal(w.Meta)
	if err != nil {
		return nil, fmt.Errorf("encode metadata of %s: %w", w.Name, err)
	}
	r := &store.Resource{
		Name: w.Name, Type: w.Type, UUID: id.String(), Generation: 1, OwningRegion: w.OwningRegion, Regions: w.Regions, Meta: w.Meta, Body: w.Body,
	}
	if r.OwningRegion == "" {
		r.OwningRegion = s.cfg.Region
	}
	if len(r.Regions) == 0 {
		r.Regions = []string{s.cfg.Region}
	}
	if len(r.Body) == 0 {
		r.Body = json.RawMessage("{}")
	}
	sql := createSQL
	args := []any{r.Name, r.Type, r.UUID, s.shard(r.Name), r.OwningRegion, r.Regions, string(meta), string(r.Body), 0, s.cfg.Version}
	if c := w.Constraint; c != nil {
		args[8] = int(store.ShadowActive)
		if len(c.References) > 0 {
			more, ok := localReferences(w.Name, c.References)
			if !ok {
				return nil, nil
			}
			sql, args = createWithReferencesSQL, append(args, more...)
		}
	}
	var b pgx.Batch
	b.Queue(fenceSQL, lockClass, lockFence)
	created := false
	b.Queue(sql, args...).Query(func(rows pgx.Rows) error {
		var at time.Time
		_, err := pgx.ForEachRow(rows, []any{&r.Version.Epoch, &r.Version.Number, &at}, func() error {
			created, r.CreateTime, r.UpdateTime = true, at, at
			return nil
		})
		return err
	})
	if err := s.pool.SendBatch(ctx, &b).Close(); err != nil || !created {
		return nil, err
	}
	return []store.Result{{Resource: r, Changed: true}}, nil
}

// localReferences returns the parameters for references that are all to other resources of this Deployment; otherwise not ok.
func localReferences(referrer string, refs []store.Reference) (args []any, ok bool) {
	var live, fields, targets []string
	var kinds, behaviors []int32
	for _, r := range refs {
		if r.At != (store.Location{}) || r.Target == referrer {
			return nil, false
		}
		if r.Behavior != store.AllowDangling && !slices.Contains(live, r.Target) {
			live = append(live, r.Target)
		}
		fields, targets = append(fields, r.Field), append(targets, r.Target)
		kinds, behaviors = append(kinds, int32(r.Kind)), append(behaviors, int32(r.Behavior))
	}
	slices.Sort(live) // locked in the order of names, as everywhere
	if live == nil {
		live = []string{}
	}
	return []any{live, fields, targets, kinds, behaviors}, true
}
