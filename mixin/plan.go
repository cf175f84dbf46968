package mixin

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
)

// Limits of a plan.
const (
	// planRows bounds what a plan reads, and what it says.
	planRows = 10_000
	// planDepth bounds the hops of one synchronous closure, and how often asynchronous ones follow it.
	planDepth = 16
)

// planReader is all that a plan may touch: it reads.
type planReader interface {
	Closure(ctx context.Context, roots []string, limit, depth, async int) (*store.Closure, error)
	HandledReferrers(ctx context.Context, at store.Location, target, uuid string, limit int) ([]store.Incoming, error)
	ReferencesTo(ctx context.Context, at store.Location, after string, limit int) ([]store.Confirmed, string, error)
}

// PlanDeletion implements Peer. Names in the answer are the callee's own, but for those of the targets.
func (s *Server) PlanDeletion(ctx context.Context, req *v1.PlanDeletionRequest) (*v1.PlanDeletionResponse, error) {
	// A plan follows a deletion from owner to owner, so it asks about the resources of others too: it only reads.
	requester, end, err := s.begin(req.GetCall(), anybody, false)
	if err != nil {
		return nil, err
	}
	defer end()
	owner := cmp.Or(LocationOf(req.GetOwner()), requester)
	if err := cmp.Or(s.speaks(owner, req.GetCall().GetVersion()), checkCount("targets", len(req.GetTargets()), 1)); err != nil {
		return nil, err
	}
	for i, name := range req.GetTargets() {
		if err := checkName(fmt.Sprintf("targets[%d]", i), name); err != nil {
			return nil, err
		}
	}
	targets := slices.Sorted(slices.Values(req.GetTargets()))
	p := &plan{core: s.cfg.Core, self: s.self, doomed: map[string]bool{}, names: map[store.Location][]string{}, res: &v1.PlanDeletionResponse{}}
	if err := p.make(ctx, s.local(owner), slices.Compact(targets)); err != nil {
		return nil, err
	}
	return p.finish(), nil
}

// plan grows while what would be deleted is followed.
type plan struct {
	core   planReader
	self   store.Location
	doomed map[string]bool
	names  map[store.Location][]string // of sources
	res    *v1.PlanDeletionResponse
}

// left is how many rows the plan may still have.
func (p *plan) left() int {
	return max(planRows-len(p.res.Deletes)-len(p.res.Unsets)-len(p.res.Blockers), 0)
}

func (p *plan) make(ctx context.Context, at store.Location, targets []string) error {
	var handled []store.Incoming
	for _, t := range targets {
		limit := planRows - len(handled)
		if limit <= 0 {
			p.res.Truncated = true
			break
		}
		in, err := p.core.HandledReferrers(ctx, at, t, "", limit)
		if err != nil {
			return err
		}
		p.res.Truncated = p.res.Truncated || len(in) == limit
		handled = append(handled, in...)
	}
	if at != (store.Location{}) { // local ones are among the blockers of the closure
		if err := p.blockers(ctx, at, targets); err != nil {
			return err
		}
	}
	for round := 0; len(handled) > 0; round++ {
		if round == planDepth || p.left() == 0 {
			p.res.Truncated = true
			return nil
		}
		via := p.split(handled)
		if len(via) == 0 {
			return nil
		}
		closure, err := p.core.Closure(ctx, slices.Sorted(maps.Keys(via)), p.left(), planDepth, p.left())
		if err != nil {
			return err
		}
		p.add(closure, via)
		handled = closure.Async
	}
	return nil
}

// split notes what is unset, and returns by its name what is deleted and new.
func (p *plan) split(handled []store.Incoming) map[string]store.Incoming {
	via := map[string]store.Incoming{}
	for _, in := range handled {
		switch _, again := via[in.Referrer]; {
		case in.Behavior.Unsets():
			p.unset(in)
		case !again && !p.doomed[in.Referrer]:
			via[in.Referrer] = in
		}
	}
	return via
}

func (p *plan) unset(in store.Incoming) {
	if p.left() == 0 {
		p.res.Truncated = true
		return
	}
	p.res.Unsets = append(p.res.Unsets, planned(in.Referrer, in.Type, in))
}

// planned is always asynchronous: the targets are another Deployment's.
func planned(name, typ string, via store.Incoming) *v1.Planned {
	return &v1.Planned{Name: name, Type: typ, Field: via.Field, Target: via.Target, Asynchronous: true}
}

func (p *plan) add(c *store.Closure, roots map[string]store.Incoming) {
	p.res.Truncated = p.res.Truncated || c.Truncated
	for _, d := range c.Delete {
		if p.doomed[d.Name] {
			continue
		}
		p.doomed[d.Name] = true
		via := d.Via
		if in, ok := roots[d.Name]; ok {
			via = in
		}
		p.res.Deletes = append(p.res.Deletes, planned(d.Name, d.Type, via))
		for _, s := range d.Sources {
			p.names[s.Location] = append(p.names[s.Location], d.Name)
		}
	}
	for _, in := range c.Unset {
		p.unset(in)
	}
	for _, b := range c.Blockers {
		out := &v1.DeletionBlocker{Location: WireLocation(b.Location), Referrer: b.Referrer, Field: b.Field, Target: b.Target, BlockDeletion: b.BlockDeletion}
		if b.Location == (store.Location{}) {
			out.Location = WireLocation(p.self)
		}
		if !b.TentativeUntil.IsZero() {
			out.TentativeUntil = timestamppb.New(b.TentativeUntil)
		}
		p.res.Blockers = append(p.res.Blockers, out)
	}
}

// blockers finds references that block the deletion of the targets themselves.
func (p *plan) blockers(ctx context.Context, at store.Location, targets []string) error {
	after := ""
	for seen := 0; ; {
		refs, next, err := p.core.ReferencesTo(ctx, at, after, store.MaxPageSize)
		if err != nil {
			return err
		}
		for _, r := range refs {
			if _, found := slices.BinarySearch(targets, r.Name); found && r.Blocking {
				p.res.Blockers = append(p.res.Blockers, &v1.DeletionBlocker{Location: WireLocation(p.self), Referrer: r.Referrer, Field: r.Field, Target: r.Name})
			}
		}
		if seen += len(refs); next == "" {
			return nil
		}
		if seen >= planRows {
			p.res.Truncated = true
			return nil
		}
		after = next
	}
}

// finish leaves out what is in the plan's own way: a referrer that goes too blocks nothing for long.
func (p *plan) finish() *v1.PlanDeletionResponse {
	p.res.Blockers = slices.DeleteFunc(p.res.Blockers, func(b *v1.DeletionBlocker) bool {
		return b.Referrer != "" && p.doomed[b.Referrer] && LocationOf(b.Location) == p.self
	})
	p.res.Unsets = slices.DeleteFunc(p.res.Unsets, func(u *v1.Planned) bool { return p.doomed[u.Name] })
	locations := slices.SortedFunc(maps.Keys(p.names), func(a, b store.Location) int { return strings.Compare(a.String(), b.String()) })
	for _, at := range locations {
		p.res.Sources = append(p.res.Sources, &v1.PlannedSource{Location: WireLocation(at), Names: slices.Sorted(slices.Values(p.names[at]))})
	}
	return p.res
}
