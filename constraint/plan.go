package constraint

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// Limits of a Plan.
const (
	// maxPlanned bounds the rows of one Deployment that a plan follows, maxListed those that it lists, maxHops how far it goes.
	maxPlanned = 10_000
	maxListed  = 1000
	maxHops    = 100
)

// Plan is what a deletion would do, as far as it can be known now. It does not follow owner references.
type Plan struct {
	// Deployments, this one first, then by service and region. Those in which nothing would happen are left out.
	Deployments []PlannedDeployment
	// Blockers would refuse the deletion, or, of what is deleted afterwards, hold it up. Their Location is never zero.
	Blockers []store.Blocker
	// Unasked are the Deployments that may hold references to what would be deleted, and have not answered.
	Unasked []UnaskedDeployment
	// Ownees are Deployments with resources that name something of ours that would be deleted as their owner.
	Ownees []store.Location
	// TooLarge: the part that would be deleted in one transaction is larger than a deletion may be, so that it would be refused.
	TooLarge bool
	// Truncated: there is more than the plan shows.
	Truncated bool
}

// PlannedDeployment is what would happen in one Deployment.
type PlannedDeployment struct {
	Location store.Location
	// Deletes and Unsets count resources that would be deleted, and fields that would be cleared.
	Deletes, Unsets int
	// Deleted and Cleared list the first thousand of them.
	Deleted, Cleared []PlannedChange
}

// PlannedChange is a resource that would be deleted or changed.
type PlannedChange struct {
	Name, Type string
	// Field and Target are the reference through which it is reached; empty for what the user asked to delete.
	Field, Target string
	// Async: it would happen after the deletion, not in its transaction.
	Async bool
}

// UnaskedDeployment is a Deployment that could not be asked, and why.
type UnaskedDeployment struct {
	Location store.Location
	// Names counts the resources that it was to be asked about.
	Names int
	Err   error
}

// PlanDelete says what the deletion of a resource would do here and in other Deployments, whom it asks one after the other as it finds them. It writes nothing,
// anywhere. The error is NotFound, FailedPrecondition if another region owns the resource, or that of the local database; a Deployment that cannot be asked is
// no error.
func (s *Store) PlanDelete(ctx context.Context, name string) (*Plan, error) {
	n, err := s.cfg.Version().ParseName(name)
	if err != nil {
		return nil, store.Invalid("name", err.Error())
	}
	r, err := s.next.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if r.OwningRegion != s.cfg.Self.Region {
		return nil, store.Errorf(store.FailedPrecondition, name, "is a read copy owned by region %s: plan its deletion there", r.OwningRegion)
	}
	p := &planner{s: s, at: map[store.Location]*plannedAt{}, asked: map[askedKey]bool{}}
	if n.Type.OptOutConstraints {
		p.delete(s.cfg.Self, PlannedChange{Name: name, Type: n.Type.Name})
		return p.finish(), nil
	}
	if r.State == store.Active {
		if err := p.local(ctx, name); err != nil {
			return nil, err
		}
	}
	if err := p.others(ctx); err != nil {
		return nil, err
	}
	return p.finish(), nil
}

// planner grows a plan.
type planner struct {
	s     *Store
	plan  Plan
	at    map[store.Location]*plannedAt
	asked map[askedKey]bool
	hops  []hop
}

// plannedAt is what is known of one Deployment; what comes twice counts once.
type plannedAt struct {
	PlannedDeployment
	deleted map[string]bool
	cleared map[[3]string]bool
}

type askedKey struct {
	at, owner store.Location
	name      string
}

// hop is a question that is still to be asked: what becomes of references at a Deployment to resources of owner.
type hop struct {
	at, owner store.Location
	names     []string // as owner spells them
}

func (p *planner) of(at store.Location) *plannedAt {
	if p.at[at] == nil {
		p.at[at] = &plannedAt{PlannedDeployment: PlannedDeployment{Location: at}, deleted: map[string]bool{}, cleared: map[[3]string]bool{}}
	}
	return p.at[at]
}

// left is how many rows of a Deployment may still be followed.
func (p *planner) left(at store.Location) int {
	d := p.of(at)
	return maxPlanned - d.Deletes - d.Unsets
}

func (p *planner) delete(at store.Location, c PlannedChange) (added bool) {
	d := p.of(at)
	if d.deleted[c.Name] {
		return false
	}
	d.deleted[c.Name] = true
	d.Deletes++
	if len(d.Deleted) < maxListed {
		d.Deleted = append(d.Deleted, c)
	}
	return true
}

func (p *planner) unset(at store.Location, c PlannedChange) {
	d := p.of(at)
	k := [3]string{c.Name, c.Field, c.Target}
	if d.cleared[k] {
		return
	}
	d.cleared[k] = true
	d.Unsets++
	if len(d.Cleared) < maxListed {
		d.Cleared = append(d.Cleared, c)
	}
}

// ask notes that somebody is to be asked about names of owner, if that has not happened.
func (p *planner) ask(at, owner store.Location, names ...string) {
	names = slices.DeleteFunc(names, func(name string) bool {
		k := askedKey{at, owner, name}
		again := p.asked[k]
		p.asked[k] = true
		return again
	})
	if len(names) == 0 {
		return
	}
	if i := slices.IndexFunc(p.hops, func(h hop) bool { return h.at == at && h.owner == owner }); i >= 0 {
		p.hops[i].names = append(p.hops[i].names, names...)
		return
	}
	p.hops = append(p.hops, hop{at, owner, names})
}

// local plans what happens in this database: first in the deletion's transaction, then what the handlers would do, in as many rounds as it takes.
func (p *planner) local(ctx context.Context, root string) error {
	self := p.s.cfg.Self
	suspects, err := p.s.cfg.Core.Suspects(ctx, p.s.cfg.Peers.Importers())
	if err != nil {
		return err
	}
	roots := map[string]store.Incoming{root: {}}
	for round := 0; len(roots) > 0; round++ {
		if round == maxHops || p.left(self) <= 0 {
			p.plan.Truncated = true
			return nil
		}
		names := make([]string, 0, len(roots))
		for name := range roots {
			names = append(names, name)
		}
		slices.Sort(names)
		c, err := p.s.cfg.Core.Closure(ctx, names, p.left(self), maxHops, p.left(self))
		if err != nil {
			return err
		}
		p.plan.Truncated = p.plan.Truncated || c.Truncated
		if round == 0 {
			p.plan.TooLarge = c.Truncated || len(c.Delete)+len(c.Unset) > p.s.cfg.ClosureLimit
		}
		for _, r := range c.Delete {
			via := r.Via
			if r.Depth == 0 {
				via = roots[r.Name]
			}
			p.plan.TooLarge = p.plan.TooLarge || round == 0 && r.Depth > p.s.cfg.ClosureDepth
			if p.delete(self, PlannedChange{Name: r.Name, Type: r.Type, Field: via.Field, Target: via.Target, Async: round > 0}) {
				p.sources(r, suspects)
			}
		}
		for _, in := range c.Unset {
			p.unset(self, PlannedChange{Name: in.Referrer, Type: in.Type, Field: in.Field, Target: in.Target, Async: round > 0})
		}
		for _, b := range c.Blockers {
			if b.Location == (store.Location{}) {
				// What goes in the same transaction is no blocker of it; of what goes later, what has gone before.
				if round > 0 && p.of(self).deleted[b.Referrer] {
					continue
				}
				b.Location = self
			}
			p.plan.Blockers = append(p.plan.Blockers, b)
		}
		roots = p.handled(c.Async)
	}
	return nil
}

// sources notes who is to be asked about a resource of ours.
func (p *planner) sources(r store.Doomed, suspects []store.Location) {
	for _, src := range r.Sources {
		if src.Blocking || src.Subscriber {
			p.ask(src.Location, p.s.cfg.Self, r.Name)
		}
		if src.Ownee && !slices.Contains(p.plan.Ownees, src.Location) {
			p.plan.Ownees = append(p.plan.Ownees, src.Location)
		}
	}
	for _, at := range suspects {
		p.ask(at, p.s.cfg.Self, r.Name)
	}
}

// handled notes what the handlers would clear, and returns what they would delete.
func (p *planner) handled(async []store.Incoming) map[string]store.Incoming {
	self := p.s.cfg.Self
	roots := map[string]store.Incoming{}
	for _, in := range async {
		if in.Behavior.Unsets() {
			p.unset(self, PlannedChange{Name: in.Referrer, Type: in.Type, Field: in.Field, Target: in.Target, Async: true})
			continue
		}
		if _, again := roots[in.Referrer]; !again && !p.of(self).deleted[in.Referrer] {
			roots[in.Referrer] = in
		}
	}
	return roots
}

// others asks the other Deployments, and those that they name, until nothing is new.
func (p *planner) others(ctx context.Context) error {
	for level := 0; len(p.hops) > 0; level++ {
		if level == maxHops {
			p.plan.Truncated = true
			return nil
		}
		hops := p.hops
		p.hops = nil
		answers := make([][]*v1.PlanDeletionResponse, len(hops))
		errs := make([]error, len(hops))
		var calls errgroup.Group
		calls.SetLimit(maxCalls)
		for i, h := range hops {
			calls.Go(func() error {
				answers[i], errs[i] = p.s.askPlan(ctx, h)
				return nil // the plan says who did not answer
			})
		}
		_ = calls.Wait()
		if ctx.Err() != nil {
			return fmt.Errorf("plan a deletion: %w", ctx.Err())
		}
		for i, h := range hops {
			if errs[i] != nil {
				p.plan.Unasked = append(p.plan.Unasked, UnaskedDeployment{Location: h.at, Names: len(h.names), Err: errs[i]})
			}
			for _, a := range answers[i] {
				p.answer(h.at, a)
			}
		}
	}
	return nil
}

// answer adds what one Deployment has said about itself.
func (p *planner) answer(at store.Location, a *v1.PlanDeletionResponse) {
	p.plan.Truncated = p.plan.Truncated || a.GetTruncated()
	change := func(c *v1.Planned) (PlannedChange, bool) {
		if p.left(at) <= 0 {
			p.plan.Truncated = true
			return PlannedChange{}, false
		}
		return PlannedChange{Name: c.GetName(), Type: c.GetType(), Field: c.GetField(), Target: c.GetTarget(), Async: c.GetAsynchronous()}, true
	}
	for _, c := range a.GetDeletes() {
		if c, ok := change(c); ok {
			p.delete(at, c)
		}
	}
	for _, c := range a.GetUnsets() {
		if c, ok := change(c); ok {
			p.unset(at, c)
		}
	}
	for _, b := range a.GetBlockers() {
		out := store.Blocker{Target: b.GetTarget(), Location: mixin.LocationOf(b.GetLocation()), Referrer: b.GetReferrer(), Field: b.GetField(), BlockDeletion: b.GetBlockDeletion()}
		if b.GetTentativeUntil() != nil {
			out.TentativeUntil = b.GetTentativeUntil().AsTime()
		}
		out.Location = cmp.Or(out.Location, at)
		p.plan.Blockers = append(p.plan.Blockers, out)
	}
	for _, src := range a.GetSources() {
		p.ask(mixin.LocationOf(src.GetLocation()), at, src.GetNames()...)
	}
}

// askPlan asks one Deployment. Names that it cannot express are left out: nothing there refers to them.
func (s *Store) askPlan(ctx context.Context, h hop) ([]*v1.PlanDeletionResponse, error) {
	peer, err := s.cfg.Peers.Peer(h.at)
	if err != nil {
		return nil, err
	}
	spell := s.cfg.Peers.SpellFor
	if h.owner != s.cfg.Self {
		spell = func(at store.Location, name string) (string, string, bool) {
			return spellOf(s.cfg.View(), h.owner, at, name)
		}
	}
	byVersion := map[string][]string{}
	for _, name := range h.names {
		if version, spelled, ok := spell(h.at, name); ok {
			byVersion[version] = append(byVersion[version], spelled)
		}
	}
	var answers []*v1.PlanDeletionResponse
	for version, names := range byVersion {
		for chunk := range slices.Chunk(names, mixin.MaxNames) {
			within, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
			a, err := peer.PlanDeletion(within, &v1.PlanDeletionRequest{
				Call:    &v1.Call{Requester: mixin.WireLocation(s.cfg.Self), Callee: mixin.WireLocation(h.at), Version: version},
				Targets: chunk, Owner: mixin.WireLocation(h.owner),
			})
			cancel()
			if err != nil {
				return answers, err
			}
			answers = append(answers, a)
		}
	}
	return answers, nil
}

// spellOf is SpellFor for the names of another owner, as far as the registry knows its version and that of at.
func spellOf(view *registry.View, owner, at store.Location, name string) (version, spelled string, ok bool) {
	versionAt := func(l store.Location) *descriptor.Version {
		d, ok := view.Deployment(registry.Key{Service: l.Service, Region: l.Region})
		if service, known := view.Service(l.Service); ok && known {
			return service.Version(d.Version)
		}
		return nil
	}
	from, asker := versionAt(owner), versionAt(at)
	if from == nil || asker == nil {
		return "", "", false
	}
	to := asker
	if at.Service != owner.Service {
		if to = from.Service.Version(asker.Imports[owner.Service]); to == nil {
			return "", "", false
		}
	}
	n, err := from.ParseName(name)
	if err != nil {
		return "", "", false
	}
	n, ok = n.Translate(to, owner.Region)
	return to.Name, n.Full, ok
}

// finish leaves out what is in the plan's own way, and orders it.
func (p *planner) finish() *Plan {
	for _, d := range p.at {
		d.Cleared = slices.DeleteFunc(d.Cleared, func(c PlannedChange) bool { return d.deleted[c.Name] })
		for k := range d.cleared {
			if d.deleted[k[0]] {
				d.Unsets--
			}
		}
		if d.Deletes+d.Unsets > 0 {
			p.plan.Deployments = append(p.plan.Deployments, d.PlannedDeployment)
		}
	}
	self := p.s.cfg.Self
	slices.SortFunc(p.plan.Deployments, func(a, b PlannedDeployment) int {
		if (a.Location == self) != (b.Location == self) {
			if a.Location == self {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Location.String(), b.Location.String())
	})
	slices.SortStableFunc(p.plan.Unasked, func(a, b UnaskedDeployment) int { return cmp.Compare(a.Location.String(), b.Location.String()) })
	slices.SortFunc(p.plan.Ownees, func(a, b store.Location) int { return cmp.Compare(a.String(), b.String()) })
	return &p.plan
}
