package demo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/protojson"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// goneTime is how long a deletion may take until it is complete in all regions.
const goneTime = 30 * time.Second

// deletions plans and makes the two deletions that the input is best for, and judges what the regions say by what the input tells: one must be
// refused by those that depend on it, and the other must be complete everywhere, the resources that stay without their references.
type deletions struct {
	run              *run
	input            *input
	region           *region       // whose API server is asked; it need not own anything
	refusal, cascade *consequences // nil if the input has nothing of the kind

	// refused are the blockers of the one; deleted are the rows that the other has taken along.
	refused, deleted int
}

func (d *deletions) all(ctx context.Context) error {
	if d.refusal == nil {
		d.run.screen.note("nothing in the input is such that its deletion must be refused")
	} else if err := d.refuse(ctx, d.refusal); err != nil {
		return fmt.Errorf("delete %s, which must be refused: %w", d.name(d.refusal.root), err)
	}
	if d.cascade == nil {
		d.run.screen.note("nothing in the input is such that its deletion takes others along")
	} else if err := d.grant(ctx, d.cascade); err != nil {
		return fmt.Errorf("delete %s: %w", d.name(d.cascade.root), err)
	}
	return nil
}

func (d *deletions) name(n int32) string { return d.input.nodes[n].name }

// names of nodes, as a set.
func (d *deletions) names(nodes []int32) map[string]bool {
	set := map[string]bool{}
	for _, n := range nodes {
		set[d.name(n)] = true
	}
	return set
}

// doomed are the names that the cascade takes along.
func (d *deletions) doomed() map[string]bool {
	if d.cascade == nil {
		return nil
	}
	return d.names(d.cascade.deletes)
}

// plan asks what a deletion would do. A reference from another region that was made a moment ago blocks until its region has confirmed it; such blockers are
// waited for.
func (d *deletions) plan(ctx context.Context, name string) (*dbcontrollerv1.DeletionPlan, error) {
	deadline := time.Now().Add(settleTimeout)
	for {
		p, err := d.ask(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("plan: %w", err)
		}
		tentative := slices.ContainsFunc(p.GetBlockers(), func(b *dbcontrollerv1.PlannedBlocker) bool { return b.GetTentativeUntil() != nil })
		if !tentative || time.Now().After(deadline) {
			d.show(name, p)
			return p, nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

func (d *deletions) ask(ctx context.Context, name string) (*dbcontrollerv1.DeletionPlan, error) {
	var res dbcontrollerv1.DeleteResponse
	err := retry(ctx, func() error {
		answer, err := d.region.call(ctx, http.MethodDelete, "/"+name+"?validateOnly=true", nil)
		if err != nil {
			return err
		}
		return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(answer, &res)
	})
	if err == nil && res.GetPlan() == nil {
		err = errors.New("the answer has none")
	}
	return res.GetPlan(), err
}

// show prints a plan.
func (d *deletions) show(name string, p *dbcontrollerv1.DeletionPlan) {
	var parts []string
	for _, at := range p.GetDeployments() {
		_, region, _ := strings.Cut(at.GetLocation(), "/")
		if n := int(at.GetDeletes()); n > 0 {
			parts = append(parts, fmt.Sprintf("%s deletes %s", region, count(n, "resource")))
		}
		if n := int(at.GetUnsets()); n > 0 {
			parts = append(parts, fmt.Sprintf("%s clears %s", region, count(n, "reference")))
		}
	}
	if n := len(p.GetBlockers()); n > 0 {
		parts = append(parts, "but "+count(n, "blocker"))
	}
	d.run.screen.note("DELETE %s?validateOnly=true in %s: %s", name, d.region.name, strings.Join(parts, ", "))
}

// blockersOf returns the names of the resources that forbid a deletion, sorted.
func blockersOf(p *dbcontrollerv1.DeletionPlan) []string {
	set := map[string]bool{}
	for _, b := range p.GetBlockers() {
		set[b.GetReferrer()] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// refuse makes a deletion that must be refused.
func (d *deletions) refuse(ctx context.Context, c *consequences) error {
	name := d.name(c.root)
	p, err := d.plan(ctx, name)
	if err != nil {
		return err
	}
	blockers := blockersOf(p)
	if !p.GetRefused() || len(blockers) == 0 {
		return fmt.Errorf("the plan says that it would not be refused, but %s resources depend on what goes, for example %s", grouped(int64(len(c.blockers))), d.name(c.blockers[0]))
	}
	known := d.names(c.blockers)
	for _, b := range blockers {
		if !known[b] {
			return fmt.Errorf("the plan names %s as a blocker, which does not depend on anything that goes", b)
		}
	}
	_, err = d.region.call(ctx, http.MethodDelete, "/"+name, nil)
	e, ok := errors.AsType[*callError](err)
	if err == nil {
		return errors.New("it was deleted")
	}
	if !ok || e.status != http.StatusBadRequest || !slices.ContainsFunc(blockers, func(b string) bool { return strings.Contains(e.Error(), b) }) {
		return fmt.Errorf("it was not refused because of its blockers, but: %w", err)
	}
	d.refused = len(p.GetBlockers())
	d.run.screen.note("DELETE %s: refused because of %s in the input, among them %s", name, count(len(c.blockers), "resource"), strings.Join(blockers[:min(3, len(blockers))], ", "))
	return nil
}

// grant makes a deletion that nothing forbids, and waits until it is complete in all regions.
func (d *deletions) grant(ctx context.Context, c *consequences) error {
	name := d.name(c.root)
	p, err := d.plan(ctx, name)
	if err != nil {
		return err
	}
	if p.GetRefused() || len(p.GetUnasked()) > 0 {
		return fmt.Errorf("the plan says that it would be refused, or cannot tell: %v", p)
	}
	deletes, unsets := map[string]bool{}, map[string]bool{}
	for _, at := range p.GetDeployments() {
		for _, x := range at.GetChanges() {
			if x.GetUnset() {
				unsets[x.GetName()] = true
			} else {
				deletes[x.GetName()] = true
			}
		}
	}
	if err := same("is deleted", deletes, d.names(c.deletes)); err != nil {
		return err
	}
	if err := same("loses a reference", unsets, d.names(c.unsets)); err != nil {
		return err
	}
	if err := retry(ctx, func() error {
		_, err := d.region.call(ctx, http.MethodDelete, "/"+name, nil)
		return err
	}); err != nil {
		return err
	}
	began := time.Now()
	took := make([]string, len(Regions))
	var waiting errgroup.Group
	for i, region := range Regions {
		waiting.Go(func() error {
			err := d.waitGone(ctx, d.run.world.regions[region], c)
			took[i] = fmt.Sprintf("%s %s", region, time.Since(began).Round(time.Millisecond))
			return err
		})
	}
	if err := waiting.Wait(); err != nil {
		return err
	}
	d.deleted = len(c.deletes)
	d.run.screen.note("DELETE %s: %s gone, %s without their references to them; complete in %s", name, count(d.deleted, "resource"), count(len(c.unsets), "other"), strings.Join(took, ", "))
	return nil
}

// same compares what the plan says with what the input tells.
func same(what string, plan, want map[string]bool) error {
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if !plan[name] {
			return fmt.Errorf("the plan does not say that %s %s", name, what)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(plan)) {
		if !want[name] {
			return fmt.Errorf("the plan says that %s %s, but nothing in the input does so", name, what)
		}
	}
	return nil
}

// waitGone returns when nothing in a region is left of what was deleted: no resource and no reference to one, neither by the API nor in the database.
func (d *deletions) waitGone(ctx context.Context, r *region, c *consequences) error {
	ctx, cancel := context.WithTimeout(ctx, goneTime)
	defer cancel()
	doomed := d.names(c.deletes)
	for {
		left, err := d.left(ctx, r, doomed, slices.Collect(maps.Keys(d.names(c.unsets))))
		if err == nil && left == "" {
			return d.expectMissing(ctx, r, d.name(c.root))
		}
		if sleep(ctx, 5*time.Millisecond) != nil {
			if err != nil {
				return fmt.Errorf("see whether it is gone in %s: %w", r.name, err)
			}
			return fmt.Errorf("it is not gone in %s after %s: %s", r.name, goneTime, left)
		}
	}
}

// left says what a region still has of doomed resources, empty if nothing.
func (d *deletions) left(ctx context.Context, r *region, doomed map[string]bool, referrers []string) (string, error) {
	rows, err := r.pool.Query(ctx, "SELECT name, body FROM "+table+" WHERE state <> 2 AND name = ANY ($1)", append(slices.Collect(maps.Keys(doomed)), referrers...))
	if err != nil {
		return "", err
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		var body []byte
		if err := rows.Scan(&name, &body); err != nil {
			return "", err
		}
		if doomed[name] {
			return name + " is still there", nil
		}
		n, err := d.input.schema.ParseName(name)
		if err != nil {
			return "", err
		}
		refs, err := n.Type.References(body)
		if err != nil {
			return "", err
		}
		for _, ref := range refs {
			if doomed[ref.Name] && ref.OnTargetDeleted != v1alpha1.DeleteAllowDangling {
				return fmt.Sprintf("%s still refers to %s", name, ref.Name), nil
			}
		}
	}
	return "", rows.Err()
}

func (d *deletions) expectMissing(ctx context.Context, r *region, name string) error {
	_, err := r.call(ctx, http.MethodGet, "/"+name, nil)
	if err == nil {
		return fmt.Errorf("the API of %s still has it", r.name)
	}
	if e, ok := errors.AsType[*callError](err); ok && e.status == http.StatusNotFound {
		return nil
	}
	return fmt.Errorf("get it in %s: %w", r.name, err)
}

// count is a number of things.
func count(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return grouped(int64(n)) + " " + thing
}
