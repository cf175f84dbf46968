package apiserver

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/store"
)

// Planner says what a deletion would take along, here and in other Deployments: constraint.Store. It writes nothing.
type Planner interface {
	PlanDelete(ctx context.Context, name string) (*constraint.Plan, error)
}

// planDelete is a deletion with validate_only.
func (s *Server) planDelete(ctx context.Context, w write) (*dbcontrollerv1.DeleteResponse, error) {
	if s.cfg.Planner == nil {
		return nil, fail(connect.CodeUnimplemented, "NOT_SERVED", nil, nil, "this server plans no deletions")
	}
	if _, err := s.preview(ctx, w); err != nil {
		return nil, err
	}
	p, err := s.cfg.Planner.PlanDelete(ctx, w.Name)
	if w.AllowMissing && store.CodeOf(err) == store.NotFound {
		p, err = new(constraint.Plan), nil
	}
	if err != nil {
		return nil, err
	}
	return &dbcontrollerv1.DeleteResponse{Plan: s.planOf(p)}, nil
}

// planOf is the form of a plan that users see.
func (s *Server) planOf(p *constraint.Plan) *dbcontrollerv1.DeletionPlan {
	out := &dbcontrollerv1.DeletionPlan{TooLarge: p.TooLarge, Refused: p.TooLarge, Truncated: p.Truncated}
	// later are the resources, by Deployment, that would be deleted after the deletion itself.
	later := map[store.Location]map[string]bool{}
	for _, d := range p.Deployments {
		later[d.Location] = map[string]bool{}
		planned := &dbcontrollerv1.PlannedDeployment{
			Location: d.Location.String(), Deletes: int32(d.Deletes), Unsets: int32(d.Unsets), Asynchronous: int32(d.Deletes + d.Unsets),
		}
		add := func(c constraint.PlannedChange, unset bool) {
			planned.Changes = append(planned.Changes, &dbcontrollerv1.PlannedChange{
				Name: c.Name, Type: c.Type, Field: c.Field, Target: c.Target, Unset: unset, Asynchronous: c.Async,
			})
			if !c.Async { // a transaction has fewer changes than are listed, and they come first
				planned.Asynchronous--
			}
		}
		for _, c := range d.Deleted {
			add(c, false)
			later[d.Location][c.Name] = c.Async
		}
		for _, c := range d.Cleared {
			add(c, true)
		}
		out.Deployments = append(out.Deployments, planned)
		out.Truncated = out.Truncated || d.Deletes > len(d.Deleted) || d.Unsets > len(d.Cleared)
	}
	for _, b := range p.Blockers {
		// Its target goes at the blocker's own Deployment, or here.
		async := later[b.Location][b.Target] || later[s.self()][b.Target]
		blocker := &dbcontrollerv1.PlannedBlocker{
			Target: b.Target, Location: b.Location.String(), Referrer: b.Referrer, Field: b.Field, BlockDeletion: b.BlockDeletion, Asynchronous: async,
		}
		if !b.TentativeUntil.IsZero() {
			blocker.TentativeUntil = timestamppb.New(b.TentativeUntil)
		}
		out.Blockers = append(out.Blockers, blocker)
		out.Refused = out.Refused || !async
	}
	slices.SortStableFunc(out.Blockers, func(a, b *dbcontrollerv1.PlannedBlocker) int {
		return cmp.Or(strings.Compare(a.GetTarget(), b.GetTarget()), strings.Compare(a.GetLocation(), b.GetLocation()), strings.Compare(a.GetReferrer(), b.GetReferrer()))
	})
	for _, u := range p.Unasked {
		out.Unasked = append(out.Unasked, &dbcontrollerv1.UnaskedDeployment{Location: u.Location.String(), Names: int32(u.Names), Error: plainly(u.Err)})
	}
	for _, at := range p.Ownees {
		out.Ownees = append(out.Ownees, at.String())
	}
	return out
}

func (s *Server) self() store.Location {
	return store.Location{Service: s.cfg.Service, Region: s.cfg.Region}
}

// plainly is the text of an error without what is only for the log.
func plainly(err error) string {
	if e, ok := errors.AsType[*store.Error](err); ok {
		shown := *e
		shown.Cause = nil
		return shown.Error()
	}
	return err.Error()
}
