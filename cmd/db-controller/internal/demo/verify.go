package demo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
)

// edits are what somebody might do to copies by hand; each is of another row, and kind is what a verification must call it.
var edits = []struct{ what, kind, sql string }{
	{"another body under the same version", "content", `UPDATE ` + table + ` SET body = body || '{"title":"written by hand"}' WHERE name = $1`},
	{"an older version", "stale", `UPDATE ` + table + ` SET resource_version = 0, body = '{"title":"written by hand"}' WHERE name = $1`},
	{"a newer version", "ahead", `UPDATE ` + table + ` SET resource_version = resource_version + 1000 WHERE name = $1`},
	{"deleted", "missing", `DELETE FROM ` + table + ` WHERE name = $1`},
}

// forged is the name of a row that no owner knows, and forgedSQL makes it of another one.
const (
	forged    = "sources/written-by-hand"
	forgedSQL = `INSERT INTO ` + table + ` (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, body)
		SELECT $2, type, gen_random_uuid(), epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, body FROM ` + table + ` WHERE name = $1`
)

// verification changes a few copies of one region by hand, and judges what the product's verification finds and repairs.
type verification struct {
	run    *run
	region *region
	// edited rows, and how many differences the verification found, repaired, and found again after that.
	edited                int
	found, repaired, left int
}

func (v *verification) all(ctx context.Context) error {
	wrong, err := v.edit(ctx)
	if err != nil {
		return fmt.Errorf("change rows of %s by hand: %w", v.region.name, err)
	}
	if wrong == nil {
		v.run.screen.note("%s has too few copies of %s for changing some by hand", v.region.name, Regions[0])
		return nil
	}
	v.edited = len(wrong)
	dry, err := v.pass(ctx, dbcontrollerv1.RepairMode_REPAIR_MODE_DRY_RUN, true)
	if err != nil {
		return err
	}
	if v.found = len(dry); !maps.Equal(kinds(dry), wrong) {
		return fmt.Errorf("the verification of %s has found %v, and changed by hand were %v", v.region.name, kinds(dry), wrong)
	}
	done, err := v.pass(ctx, dbcontrollerv1.RepairMode_REPAIR_MODE_REPAIR, false)
	if err != nil {
		return err
	}
	for _, d := range done {
		if d.GetRepaired() {
			v.repaired++
		}
	}
	if !maps.Equal(kinds(done), wrong) || v.repaired != len(wrong) {
		return fmt.Errorf("the verification of %s has repaired %d of %d rows, and found %v", v.region.name, v.repaired, len(wrong), kinds(done))
	}
	again, err := v.pass(ctx, dbcontrollerv1.RepairMode_REPAIR_MODE_UNSPECIFIED, false)
	if err != nil {
		return err
	}
	if v.left = len(again); v.left > 0 {
		return fmt.Errorf("after its repair the verification of %s still finds %v", v.region.name, kinds(again))
	}
	return nil
}

// edit makes the changes and returns what must be found: kinds by name, nil if there is too little to change. Nobody should write meanwhile: a write
// would put a copy right.
func (v *verification) edit(ctx context.Context) (map[string]string, error) {
	rows, err := v.region.pool.Query(ctx, `SELECT name FROM `+table+` WHERE owning_region = $1 AND state = 0 AND type IN ('Package', 'Source') ORDER BY type, name`, Regions[0])
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var names []string
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	source := slices.IndexFunc(names, func(name string) bool { return strings.HasPrefix(name, "sources/") })
	if source < 0 || len(names) < len(edits) {
		return nil, nil
	}
	wrong := map[string]string{forged: "extra"}
	if _, err := v.region.pool.Exec(ctx, forgedSQL, names[source], forged); err != nil {
		return nil, err
	}
	told := []string{forged + ": inserted"}
	for i, e := range edits {
		name := names[i*(len(names)-1)/(len(edits)-1)] // far from each other
		if tag, err := v.region.pool.Exec(ctx, e.sql, name); err != nil || tag.RowsAffected() != 1 {
			return nil, errors.Join(err, fmt.Errorf("%s: %d rows", name, tag.RowsAffected()))
		}
		wrong[name] = e.kind
		told = append(told, name+": "+e.what)
	}
	v.run.screen.note("changed by hand in the database of %s: %s", v.region.name, strings.Join(told, "; "))
	return wrong, nil
}

// pass lets the region compare all its copies, and returns the differences.
func (v *verification) pass(ctx context.Context, mode dbcontrollerv1.RepairMode, show bool) ([]*dbcontrollerv1.RowDifference, error) {
	command := "verify in " + v.region.name + map[dbcontrollerv1.RepairMode]string{
		dbcontrollerv1.RepairMode_REPAIR_MODE_DRY_RUN: " --repair",
		dbcontrollerv1.RepairMode_REPAIR_MODE_REPAIR:  " --repair --apply",
	}[mode]
	c := dbcontrollerv1connect.NewVerificationClient(v.region.client, v.region.url)
	others := slices.DeleteFunc(slices.Clone(Regions), func(r string) bool { return r == v.region.name }) // the search store follows a repair by itself
	stream, err := c.Verify(ctx, connect.NewRequest(&dbcontrollerv1.VerifyRequest{Peers: others, Repair: mode}))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	defer stream.Close()
	var found []*dbcontrollerv1.RowDifference
	var compared int64
	var repaired int
	began := time.Now()
	for stream.Receive() {
		found = append(found, stream.Msg().GetDifferences()...)
		if p := stream.Msg().GetProgress(); p.GetFinished() {
			compared += p.GetCompared()
			repaired += int(p.GetRepaired())
		}
	}
	if err := stream.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	v.run.screen.note("%s: %s rows compared in %.1fs, %s, %d repaired", command, grouped(compared), time.Since(began).Seconds(), count(len(found), "difference"), repaired)
	if show {
		for _, d := range found {
			v.run.screen.note("  %s %s: %s", d.GetKind(), d.GetName(), d.GetAction())
		}
	}
	return found, nil
}

// kinds of differences, by name.
func kinds(found []*dbcontrollerv1.RowDifference) map[string]string {
	all := map[string]string{}
	for _, d := range found {
		all[d.GetName()] = d.GetKind()
	}
	return all
}
