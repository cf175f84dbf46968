package row

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
)

// ResourceColumns are the columns that ScanResource reads.
const ResourceColumns = Columns

// ScanResource reads one row of ResourceColumns. first are destinations for columns that the SELECT lists before them.
func ScanResource(rows pgx.CollectableRow, first ...any) (*store.Resource, error) {
	var r store.Resource
	var state int16
	var deleted *time.Time
	var meta []byte
	err := rows.Scan(append(first, &r.Name, &r.Type, &r.UUID, &r.Version.Epoch, &r.Version.Number, &r.Generation, &r.Shard, &r.OwningRegion,
		&r.Regions, &state, &r.BlockDeletion, &r.CreateTime, &r.UpdateTime, &deleted, &meta, &r.Body)...)
	if err != nil {
		return nil, fmt.Errorf("read resource: %w", err)
	}
	if err := json.Unmarshal(meta, &r.Meta); err != nil {
		return nil, fmt.Errorf("read metadata of %s: %w", r.Name, err)
	}
	r.State = store.State(state)
	if deleted != nil {
		r.DeleteTime = *deleted
	}
	return &r, nil
}
