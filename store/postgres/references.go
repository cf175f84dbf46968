package postgres

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/dbcontroller/db-controller/store"
)

const writeReferencesSQL = `SELECT write_references($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)`

// references are the parameters of write_references: what the constrained writes of one batch refer to, and what is deleted. It is the second half
// of the write, in the same transaction.
type references struct {
	saved []string

	deleted []string
	planned []*string // the uuids that the plan was made for
	attempt []int64
	asked   []string // array literals: unnest would flatten an array of arrays
	async   []bool
	told    []bool
	// plannedIn is the epoch in which the deletions were planned.
	plannedIn int64

	referrer, field, target, location []string
	kind, behavior                    []int32
	tx, uuid                          []*string
	epoch, rowVersion                 []int64
	home                              store.Mark
}

func referencesOf(writes []store.Write) *references {
	r := new(references)
	for _, w := range writes {
		c := w.Constraint
		switch {
		case c == nil:
		case w.Op == store.Delete:
			asked := make([]string, len(c.Asked))
			for i, at := range c.Asked {
				asked[i] = at.String()
			}
			r.deleted = append(r.deleted, w.Name)
			r.attempt = append(r.attempt, c.Attempt)
			r.asked = append(r.asked, arrayLiteral(asked))
			r.async = append(r.async, c.AsyncDeletion)
			r.told = append(r.told, c.Tell)
			r.plannedIn = c.Epoch
			var id *string
			if c.UUID != "" && (!cascades(w) || w.IfVersion == (store.Version{})) { // a version that is compared is of one incarnation
				id = &c.UUID
			}
			r.planned = append(r.planned, id)
		case w.Op != store.Create || len(c.References) > 0: // what is new and refers to nothing has nothing to be written
			r.saved = append(r.saved, w.Name)
			for _, ref := range c.References {
				r.add(w.Name, ref)
			}
		}
	}
	return r
}

func (r *references) add(referrer string, ref store.Reference) {
	r.referrer, r.field = append(r.referrer, referrer), append(r.field, ref.Field)
	r.target, r.location = append(r.target, ref.Target), append(r.location, ref.At.String())
	r.kind, r.behavior = append(r.kind, int32(ref.Kind)), append(r.behavior, int32(ref.Behavior))
	if g := ref.Grant; g != nil {
		r.tx, r.uuid = append(r.tx, &g.TxID), append(r.uuid, &g.UUID)
		r.epoch, r.rowVersion = append(r.epoch, g.Epoch), append(r.rowVersion, g.RowVersion)
		r.home = g.Home
		return
	}
	r.tx, r.uuid = append(r.tx, nil), append(r.uuid, nil)
	r.epoch, r.rowVersion = append(r.epoch, 0), append(r.rowVersion, 0)
}

func (r *references) empty() bool { return len(r.saved) == 0 && len(r.deleted) == 0 }

// localTargets are the targets in this database that must stay while the write is under way.
func (r *references) localTargets() []string {
	var targets []string
	for i, at := range r.location {
		if at == "" && store.Behavior(r.behavior[i]) != store.AllowDangling {
			targets = append(targets, r.target[i])
		}
	}
	return targets
}

func (r *references) args() []any {
	return []any{r.saved, r.deleted, r.planned, r.attempt, r.asked, r.async, r.told, r.plannedIn, r.referrer, r.field, r.target, r.location, r.kind, r.behavior,
		r.tx, r.uuid, r.epoch, r.rowVersion, r.home.Epoch, r.home.Fence}
}

func granted(refs []store.Reference) bool {
	for _, r := range refs {
		if r.Grant != nil {
			return true
		}
	}
	return false
}

// SQLSTATEs that the functions of the schema raise.
const (
	stateChanged = "DB001"
	stateTarget  = "DB002"
	stateFrozen  = "DB003"
)

// refusal makes the errors that write_references raises into those of package store.
func (r *references) refusal(err error) error {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return err
	}
	switch pe.Code {
	case stateChanged:
		return &store.Error{Code: store.Aborted, Reason: pe.Message + ": repeat", Cause: store.ErrChanged}
	case stateTarget:
		var d struct{ Referrer, Field, Target, Problem string }
		if json.Unmarshal([]byte(pe.Detail), &d) != nil {
			return err
		}
		problem := map[string]string{
			"missing":       "%s does not exist: create it first, or in the same transaction",
			"deleting":      "%s is being deleted",
			"unconstrained": "%s cannot be referred to: its type takes no part in references, or it is a read copy",
		}[d.Problem]
		return &store.Error{Code: store.FailedPrecondition, Name: d.Referrer, Violations: []store.Violation{{Field: d.Field, Description: fmt.Sprintf(problem, d.Target)}}}
	}
	return err
}
