package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
)

const (
	// moveTime is how long a change of a policy may take until its copies are there, or gone.
	moveTime = 2 * time.Minute
	// manyMoved is what a section may hold to be moved: enough to see it happen, and few enough to see it end.
	manyMoved = 500
)

// moves gives a region to the policy of one section, and takes it away again. What-if is asked before, and judged by the rows that then moved.
type moves struct {
	run    *run
	region *region // whose API server is asked
	// added and removed are the copies that appeared and that vanished again.
	added, removed int64
}

// movable is a section to move: its packages are copied to some regions, and not to target.
type movable struct {
	section, target string
	packages        map[string]bool
}

// chooseMove returns the largest section of moderate size that is not in every region, nil without one. What has been deleted does not count.
func (in *input) chooseMove(deleted map[string]bool) *movable {
	packages := map[string]map[string]bool{}
	for i := range in.nodes {
		n := &in.nodes[i]
		if n.holder != "" && n.holder != n.name && !deleted[n.name] {
			if packages[n.holder] == nil {
				packages[n.holder] = map[string]bool{}
			}
			packages[n.holder][n.name] = true
		}
	}
	var best *movable
	for _, section := range slices.Sorted(maps.Keys(packages)) {
		n, ok := in.index[section]
		if !ok || len(packages[section]) > manyMoved || best != nil && len(packages[section]) <= len(best.packages) {
			continue
		}
		p, err := parseLine(in.schema, in.lines[n])
		if err != nil || p.policy == nil || len(p.policy.Spec().CriteriaForDisabledSync) > 0 {
			continue
		}
		for _, target := range Regions {
			if !slices.Contains(p.policy.EnabledRegions(), target) {
				best = &movable{section, target, packages[section]}
				break
			}
		}
	}
	return best
}

func (m *moves) all(ctx context.Context) error {
	x := m.run.input.chooseMove(m.run.deletes.doomed())
	if x == nil {
		m.run.screen.note("no section of the input can get another region: none of up to %d packages leaves one out", manyMoved)
		return nil
	}
	var err error
	if m.added, err = m.change(ctx, x, true); err != nil {
		return fmt.Errorf("give region %s to %s: %w", x.target, x.section, err)
	}
	if m.removed, err = m.change(ctx, x, false); err != nil {
		return fmt.Errorf("take region %s from %s: %w", x.target, x.section, err)
	}
	return nil
}

// change adds the target to the policy, or removes it, and returns how many copies have moved.
func (m *moves) change(ctx context.Context, x *movable, add bool) (int64, error) {
	req, option := &dbcontrollerv1.PreviewPolicyRequest{Name: x.section, AddRegions: []string{x.target}}, "--add-region"
	if !add {
		req, option = &dbcontrollerv1.PreviewPolicyRequest{Name: x.section, RemoveRegions: []string{x.target}}, "--remove-region"
	}
	preview, err := m.ask(ctx, req)
	if err != nil {
		return 0, fmt.Errorf("what-if: %w", err)
	}
	rows, bytes, err := expected(preview, x, add)
	if err != nil {
		return 0, err
	}
	verb := "gains"
	if !add {
		verb = "drops"
	}
	m.run.screen.note("what-if %s %s %s in %s: %s %s %s, about %s bytes, in about %.1fs", x.section, option, x.target, m.region.name,
		x.target, verb, count(int(rows), "row"), grouped(bytes), preview.GetSeconds())

	before, err := m.held(ctx, m.run.world.regions[x.target], x)
	if err != nil {
		return 0, err
	}
	body, err := json.Marshal(map[string]json.RawMessage{"multiRegionPolicy": json.RawMessage(preview.GetAfter())})
	if err != nil {
		return 0, err
	}
	began := time.Now()
	err = retry(ctx, func() error {
		_, err := m.region.call(ctx, http.MethodPatch, "/"+x.section+"?"+url.Values{"update_mask": {"multiRegionPolicy"}}.Encode(), body)
		return err
	})
	if err != nil {
		return 0, err
	}
	accepted := time.Since(began)
	if err := m.waitMoved(ctx, x, add); err != nil {
		return 0, err
	}
	took := time.Since(began)
	after, err := m.held(ctx, m.run.world.regions[x.target], x)
	if err != nil {
		return 0, err
	}
	moved := int64(len(after) - len(before))
	if !add {
		moved = -moved
	}
	if moved != rows {
		return 0, fmt.Errorf("what-if has said that %s rows would move, and %s have", grouped(rows), grouped(moved))
	}
	did := "has got " + count(int(moved), "row") + ", as their owner has them,"
	if !add {
		did = "has lost " + count(int(moved), "row") + ", all of them,"
	}
	m.run.screen.note("PATCH %s: policy accepted after %s; %s %s after %s", x.section, accepted.Round(time.Millisecond), x.target, did, took.Round(time.Millisecond))
	return moved, nil
}

// ask asks what a change of a policy would do.
func (m *moves) ask(ctx context.Context, req *dbcontrollerv1.PreviewPolicyRequest) (*dbcontrollerv1.PolicyPreview, error) {
	c := dbcontrollerv1connect.NewResourcesClient(m.region.client, m.region.url)
	res, err := c.PreviewPolicy(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	p := res.Msg
	switch {
	case len(p.GetRefusals()) > 0:
		return nil, fmt.Errorf("the change would be refused: %s", strings.Join(p.GetRefusals(), "; "))
	case len(p.GetUnasked()) > 0:
		return nil, fmt.Errorf("%s could not be asked: %s", p.GetUnasked()[0].GetLocation(), p.GetUnasked()[0].GetError())
	}
	return p, nil
}

// expected compares a preview with what the input tells: all packages of the section move, and nothing else.
func expected(p *dbcontrollerv1.PolicyPreview, x *movable, add bool) (rows, bytes int64, err error) {
	for _, m := range p.GetMoves() {
		if m.GetRegion() != x.target || m.GetDropped() == add {
			return 0, 0, fmt.Errorf("what-if says that region %s would be affected, too: %v", m.GetRegion(), m)
		}
		rows, bytes = rows+m.GetRows(), bytes+m.GetBytes()
	}
	if want := int64(len(x.packages)); rows != want {
		return 0, 0, fmt.Errorf("what-if says that %s rows would move, the input tells of %s", grouped(rows), grouped(want))
	}
	return rows, bytes, nil
}

// held are the epoch and version of each row that a region holds of the section, by its database.
func (m *moves) held(ctx context.Context, r *region, x *movable) (map[string][2]int64, error) {
	rows, err := r.pool.Query(ctx, "SELECT name, epoch, resource_version FROM "+table+" WHERE state <> 2 AND name >= $1 AND name < $2", x.section+"/", x.section+"0")
	if err != nil {
		return nil, fmt.Errorf("read the rows of %s in %s: %w", x.section, r.name, err)
	}
	defer rows.Close()
	all := map[string][2]int64{}
	for rows.Next() {
		var name string
		var v [2]int64
		if err := rows.Scan(&name, &v[0], &v[1]); err != nil {
			return nil, err
		}
		all[name] = v
	}
	return all, rows.Err()
}

// waitMoved returns when the target holds all of the section as its owner does, or nothing.
func (m *moves) waitMoved(ctx context.Context, x *movable, add bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, moveTime, fmt.Errorf("it is not so after %s", moveTime))
	defer cancel()
	for {
		left, err := m.unmoved(ctx, x, add)
		if err == nil && left == "" {
			return nil
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			if err == nil {
				err = errors.New(left)
			}
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// unmoved says what the target still lacks, or still has; empty if nothing.
func (m *moves) unmoved(ctx context.Context, x *movable, add bool) (string, error) {
	has, err := m.held(ctx, m.run.world.regions[x.target], x)
	if err != nil {
		return "", err
	}
	if !add {
		for name := range has {
			return fmt.Sprintf("%s still has %s", x.target, name), nil
		}
		return "", nil
	}
	owner := m.run.input.nodes[m.run.input.index[slices.Min(slices.Collect(maps.Keys(x.packages)))]].owner
	due, err := m.held(ctx, m.run.world.regions[owner], x)
	if err != nil {
		return "", err
	}
	for name := range x.packages {
		if has[name] == ([2]int64{}) || has[name] != due[name] {
			return fmt.Sprintf("%s has version %v of %s, and %s has %v", x.target, has[name], name, owner, due[name]), nil
		}
	}
	if len(has) != len(x.packages) {
		return fmt.Sprintf("%s has %d rows of %s, and should have %d", x.target, len(has), x.section, len(x.packages)), nil
	}
	return "", nil
}
