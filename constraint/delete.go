package constraint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// deletion is what the deletes of one batch mean. Without deletes it is empty, and everything about it is free.
type deletion struct {
	// roots are the places in the batch of the constrained deletes.
	roots map[string]int
	// doomed are the roots that are there, and what cascades.
	doomed   []store.Doomed
	unset    []store.Incoming
	blockers []store.Blocker
	// epoch is that of our feed from before the plan; uuids are the incarnations that are planned for.
	epoch int64
	uuids map[string]string
	// asked are the Deployments that have answered, attempt what they were asked under.
	asked   map[string][]store.Location
	attempt map[string]int64
	// tell: a failover may have lost who refers to us.
	tell    bool
	version *descriptor.Version
}

// blockedError is a deletion that was refused, with the reason for the metrics.
type blockedError struct {
	reason string
	err    error
}

func (e *blockedError) Error() string { return e.err.Error() }

// planDeletes finds out what the deletes of the batch take along. What the batch itself saves counts as it will be: a saved resource is not taken along, and what it has dropped
// blocks nothing; check refuses if it still refers to what goes.
func (s *Store) planDeletes(ctx context.Context, t *transaction, whole []store.Write, saves []*saving) (*deletion, error) {
	d := &deletion{roots: map[string]int{}, uuids: map[string]string{}, asked: map[string][]store.Location{}, attempt: map[string]int64{}, version: s.cfg.Version()}
	var roots []string
	for i, w := range whole {
		if w.Op == store.Delete && t.constrained(i) {
			d.roots[w.Name] = i
			roots = append(roots, w.Name)
		}
	}
	if roots == nil {
		return d, nil
	}
	limit := max(len(roots), min(s.cfg.ClosureLimit, store.MaxClosure-(len(whole)-len(roots))))
	c, err := s.cfg.Core.Closure(ctx, roots, limit, s.cfg.ClosureDepth, 0)
	if err != nil {
		return nil, err
	}
	if c.Truncated {
		return nil, s.refused(ctx, &blockedError{blockedTooLarge, store.Errorf(store.FailedPrecondition, roots[0],
			"would take more than %d resources, or %d levels, along in one transaction: %s", limit, s.cfg.ClosureDepth, makeSmaller)})
	}
	saved := map[string]bool{}
	for _, v := range saves {
		saved[v.name.Full] = true
	}
	kept := d.spare(c.Delete, saved)
	if err := s.spareNoMore(ctx, d, c, kept, saved); err != nil {
		return nil, err
	}
	d.epoch = c.Epoch
	d.doomed = slices.DeleteFunc(c.Delete, func(r store.Doomed) bool { return kept[r.Name] })
	for _, r := range d.doomed {
		d.uuids[r.Name] = r.UUID
	}
	d.unset = slices.DeleteFunc(c.Unset, func(in store.Incoming) bool { return saved[in.Referrer] || kept[in.Target] })
	d.blockers = slices.DeleteFunc(c.Blockers, func(b store.Blocker) bool {
		return kept[b.Target] || b.Location == (store.Location{}) && saved[b.Referrer]
	})
	cleared := map[string]bool{}
	for _, in := range d.unset {
		cleared[in.Referrer] = true
	}
	if len(whole)+len(cleared) > store.MaxBatch {
		return nil, s.refused(ctx, &blockedError{blockedTooLarge, store.Errorf(store.FailedPrecondition, roots[0],
			"would have to be cleared from the fields of %d resources in one transaction of at most %d: %s", len(cleared), store.MaxBatch, makeSmaller)})
	}
	return d, nil
}

const makeSmaller = "delete some of them first, or let the references be AsyncCascadeDelete or AsyncUnset"

// spare returns what does not cascade because the batch saves it, and what would have gone only with that.
func (d *deletion) spare(doomed []store.Doomed, saved map[string]bool) map[string]bool {
	kept := map[string]bool{}
	for grown := true; grown; {
		grown = false
		for _, r := range doomed {
			if _, root := d.roots[r.Name]; !root && !kept[r.Name] && (saved[r.Name] || kept[r.Via.Target]) {
				kept[r.Name], grown = true, true
			}
		}
	}
	return kept
}

// spareNoMore looks at what is spared although the batch does not save it, for it may refer to others that go: a closure knows one way to each resource. What
// cascades from there goes after all, and is kept no more; what is left to clear, or blocks, joins the closure.
func (s *Store) spareNoMore(ctx context.Context, d *deletion, c *store.Closure, kept, saved map[string]bool) error {
	var names []string
	goes := map[string]bool{}
	for _, r := range c.Delete {
		if goes[r.Name] = !kept[r.Name]; kept[r.Name] && !saved[r.Name] {
			names = append(names, r.Name)
		}
	}
	if names == nil {
		return nil
	}
	stored, err := s.next.BatchGet(ctx, names)
	if err != nil {
		return err
	}
	var all []store.Incoming
	for _, r := range stored {
		if r == nil {
			continue // gone since
		}
		n, err := d.version.ParseName(r.Name)
		if err != nil {
			return fmt.Errorf("spare what cascades: %w", err)
		}
		v, err := newSaving(-1, n, store.Write{Op: store.Update, Name: r.Name, Type: r.Type, Meta: r.Meta, Body: r.Body}, s.cfg.View())
		if err != nil {
			return err
		}
		for _, o := range v.refs {
			if o.Kind != store.OwnerRef && o.target.Type.Version().Service.Name == s.cfg.Self.Service {
				all = append(all, store.Incoming{Referrer: r.Name, Type: r.Type, Field: o.Field, Target: o.Target, Kind: o.Kind, Behavior: o.Behavior, Version: r.Version})
			}
		}
	}
	for grown := true; grown; {
		grown = false
		for _, in := range all {
			if in.Behavior == store.Cascade && goes[in.Target] && !goes[in.Referrer] {
				delete(kept, in.Referrer)
				goes[in.Referrer], grown = true, true
			}
		}
	}
	for _, in := range all {
		switch {
		case goes[in.Referrer] || !goes[in.Target]:
		case in.Behavior == store.Unset:
			c.Unset = append(c.Unset, in)
		case in.Behavior == store.Block:
			c.Blockers = append(c.Blockers, store.Blocker{Target: in.Target, Referrer: in.Referrer, Field: in.Field})
		}
	}
	return nil
}

// check refuses a deletion that something here forbids (F46).
func (d *deletion) check(saves []*saving) error {
	for _, v := range saves {
		for _, o := range v.refs {
			if _, gone := d.uuids[o.Target]; gone && o.At == (store.Location{}) && (o.Behavior == store.Block || o.Behavior == store.Unset || o.Behavior == store.Cascade) {
				return &blockedError{blockedHere, v.fail(store.FailedPrecondition, o.path, "refers to %s, which the same transaction deletes", o.Target)}
			}
		}
	}
	return d.blocked(d.blockers)
}

// Limits of a refusal: maxNamed is how many blockers its sentence names, maxBlockers how many its details.
const (
	maxNamed    = 10
	maxBlockers = 100
)

// blocked makes a refusal that names the first blockers, nil without any.
func (d *deletion) blocked(blockers []store.Blocker) error {
	if len(blockers) == 0 {
		return nil
	}
	for _, b := range blockers {
		if b.BlockDeletion {
			return &blockedError{blockedByService, &store.Error{Code: store.FailedPrecondition, Name: b.Target, Reason: d.along(b.Target) + "its deletion is blocked by the service",
				Preconditions: preconditions(blockers)}}
		}
	}
	slices.SortStableFunc(blockers, func(a, b store.Blocker) int {
		return cmp.Or(cmp.Compare(len(d.along(a.Target)), len(d.along(b.Target))), cmp.Compare(a.Target, b.Target)) // the roots first
	})
	name, reason, advice := blockers[0].Target, blockedTentatively, "repeat later"
	var text strings.Builder
	text.WriteString(d.along(name))
	for i, b := range blockers {
		switch {
		case !b.TentativeUntil.IsZero():
		case b.Location != (store.Location{}):
			reason, advice = blockedElsewhere, "delete them first, or remove the references"
		default:
			reason, advice = blockedHere, "delete them first, or remove the references"
		}
		switch {
		case i == maxNamed:
			fmt.Fprintf(&text, " and %d more", len(blockers)-maxNamed)
		case i > maxNamed:
		case i == 0:
			text.WriteString("is referenced by " + who(b))
		case b.Target != blockers[i-1].Target:
			text.WriteString("; " + b.Target + " is referenced by " + who(b))
		default:
			text.WriteString(", " + who(b))
		}
	}
	return &blockedError{reason, &store.Error{Code: store.FailedPrecondition, Name: name, Reason: text.String() + ": " + advice, Preconditions: preconditions(blockers)}}
}

// preconditions are the blockers for programs.
func preconditions(blockers []store.Blocker) []store.Precondition {
	var all []store.Precondition
	for _, b := range blockers[:min(len(blockers), maxBlockers)] {
		p := store.Precondition{Type: store.PreconditionReferenced, Subject: b.Target, Description: who(b)}
		if b.BlockDeletion {
			p.Type, p.Description = store.PreconditionBlocked, "its deletion is blocked by the service"
		}
		all = append(all, p)
	}
	return all
}

// along begins a sentence about what the user did not ask to delete.
func (d *deletion) along(name string) string {
	if _, root := d.roots[name]; root {
		return ""
	}
	return "would be deleted too, but "
}

// who names a blocker.
func who(b store.Blocker) string {
	text := cmp.Or(b.Referrer, "a resource")
	if b.Field != "" {
		text += " (field " + b.Field + ")"
	}
	if b.Location != (store.Location{}) {
		text += " in " + b.Location.String()
	}
	if !b.TentativeUntil.IsZero() {
		text = "a write of " + text + " that may not have ended before " + b.TentativeUntil.UTC().Format(time.RFC3339)
	}
	return text
}

// planUnsets makes the writes that clear the fields which refer to what is deleted (F49). What has changed since the closure was read is found by the core.
func (s *Store) planUnsets(ctx context.Context, d *deletion) ([]*saving, error) {
	if len(d.unset) == 0 {
		return nil, nil
	}
	byReferrer := map[string][]store.Incoming{}
	var names []string
	for _, in := range d.unset {
		if byReferrer[in.Referrer] == nil {
			names = append(names, in.Referrer)
		}
		byReferrer[in.Referrer] = append(byReferrer[in.Referrer], in)
	}
	stored, err := s.next.BatchGet(ctx, names)
	if err != nil {
		return nil, err
	}
	view := s.cfg.View()
	var unsets []*saving
	for i, r := range stored {
		if r == nil {
			continue // gone since, and its reference with it
		}
		body, changed := r.Body, false
		for _, in := range byReferrer[names[i]] {
			var hit bool
			if body, hit, err = unsetReference(body, in.Field, in.Target); err != nil {
				return nil, fmt.Errorf("%s: %w", r.Name, err)
			}
			changed = changed || hit
		}
		if !changed {
			continue
		}
		n, err := d.version.ParseName(r.Name)
		if err != nil {
			return nil, fmt.Errorf("clear references: %w", err)
		}
		// Without owning region and regions: the core keeps those that are stored.
		v, err := newSaving(-1, n, store.Write{Op: store.Update, Name: r.Name, Type: r.Type, Meta: r.Meta, Body: body, IfVersion: r.Version}, view)
		if err != nil {
			return nil, err
		}
		unsets = append(unsets, v)
	}
	return unsets, nil
}

// ask asks every other Deployment that may hold blocking references to what is deleted (F13): those that are known to, and after a failover of ours those that have
// not told us yet. It fails with ErrChanged if what is deleted has changed since the closure was read. A Deployment that cannot be asked blocks (X9).
func (s *Store) ask(ctx context.Context, d *deletion) error {
	if len(d.doomed) == 0 {
		return nil
	}
	suspects, err := s.cfg.Core.Suspects(ctx, s.cfg.Peers.Importers())
	if err != nil {
		return err
	}
	d.tell = len(suspects) > 0
	inquiries, err := s.inquiries(d, suspects)
	if err != nil || len(inquiries) == 0 {
		return err
	}
	var names []string
	for _, q := range inquiries {
		names = append(names, q.names...)
	}
	slices.Sort(names)
	names = slices.Compact(names)
	questions, err := s.cfg.Core.BeginAttempt(ctx, names)
	if err != nil {
		return err
	}
	for _, name := range names {
		if questions[name].UUID != d.uuids[name] { // or it is gone
			return &store.Error{Code: store.Aborted, Name: name, Reason: "changed while its deletion was planned: repeat", Cause: store.ErrChanged}
		}
		d.attempt[name] = questions[name].RowVersion
	}
	answers := make([][]store.Blocker, len(inquiries))
	errs := make([]error, len(inquiries))
	var calls errgroup.Group
	calls.SetLimit(maxCalls)
	for i, q := range inquiries {
		calls.Go(func() error {
			answers[i], errs[i] = s.askOne(ctx, q, questions)
			return nil // a refusal with its reason is better than the first failure
		})
	}
	_ = calls.Wait()
	if err := d.blocked(slices.Concat(answers...)); err != nil {
		return err
	}
	for i, err := range errs {
		if ctx.Err() != nil {
			return fmt.Errorf("ask %s: %w", inquiries[i].at, ctx.Err())
		}
		if err != nil {
			return s.unasked(inquiries[i].names[0], inquiries[i].at, err)
		}
	}
	return nil
}

func (s *Store) unasked(name string, at store.Location, err error) error {
	return &blockedError{blockedUnasked, &store.Error{Code: store.Unavailable, Name: name, Cause: err,
		Reason: fmt.Sprintf("%s may refer to it and cannot be asked: nothing was deleted, repeat later", at)}}
}

// inquiry is what one Deployment is asked in one call: names of ours as it spells them.
type inquiry struct {
	at             store.Location
	version        string
	names, spelled []string
}

// inquiries notes for each doomed resource who has to answer, and returns the calls. Who cannot express a name in the version that it uses cannot refer to it, and need not be called.
func (s *Store) inquiries(d *deletion, suspects []store.Location) ([]*inquiry, error) {
	view := s.cfg.View()
	var all []*inquiry
	type key struct {
		at      store.Location
		version string
	}
	open := map[key]*inquiry{}
	for _, r := range d.doomed {
		at := slices.Clone(suspects)
		for _, src := range r.Sources {
			if src.Blocking && !slices.Contains(at, src.Location) {
				at = append(at, src.Location)
			}
		}
		d.asked[r.Name] = at
		for _, at := range at {
			if _, ok := view.Deployment(registry.Key{Service: at.Service, Region: at.Region}); !ok {
				return nil, s.unasked(r.Name, at, errors.New("the registry does not know it"))
			}
			version, spelled, ok := s.cfg.Peers.SpellFor(at, r.Name)
			if !ok {
				continue
			}
			k := key{at, version}
			q := open[k]
			if q == nil || len(q.names) == mixin.MaxNames {
				q = &inquiry{at: at, version: version}
				open[k] = q
				all = append(all, q)
			}
			q.names, q.spelled = append(q.names, r.Name), append(q.spelled, spelled)
		}
	}
	return all, nil
}

// askOne makes one call and returns who blocks.
func (s *Store) askOne(ctx context.Context, q *inquiry, questions map[string]store.Question) ([]store.Blocker, error) {
	peer, err := s.cfg.Peers.Peer(q.at)
	if err != nil {
		return nil, err
	}
	req := &v1.CheckIfResourceIsBlockedRequest{Call: &v1.Call{Requester: mixin.WireLocation(s.cfg.Self), Callee: mixin.WireLocation(q.at), Version: q.version}}
	for i, name := range q.names {
		question := questions[name]
		req.Targets = append(req.Targets, &v1.Question{Name: q.spelled[i], Uuid: question.UUID, Epoch: question.Epoch, RowVersion: question.RowVersion})
	}
	within, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	res, err := peer.CheckIfResourceIsBlocked(within, req)
	if err != nil {
		return nil, err
	}
	if len(res.GetAnswers()) != len(q.names) {
		return nil, fmt.Errorf("%s sent %d answers to %d questions", q.at, len(res.GetAnswers()), len(q.names))
	}
	var blockers []store.Blocker
	for i, a := range res.GetAnswers() {
		if !a.GetBlocked() {
			continue
		}
		if len(a.GetSample()) == 0 {
			blockers = append(blockers, store.Blocker{Target: q.names[i], Location: q.at})
		}
		for _, referrer := range a.GetSample() {
			blockers = append(blockers, store.Blocker{Target: q.names[i], Location: q.at, Referrer: referrer})
		}
	}
	return blockers, nil
}

// apply puts what is known about the deletions into the batch, and adds what cascades (F48).
func (d *deletion) apply(batch []store.Write) []store.Write {
	for name, i := range d.roots {
		batch[i].Constraint = d.constraint(name)
	}
	for _, r := range d.doomed {
		if _, root := d.roots[r.Name]; root {
			continue
		}
		w := store.Write{Op: store.Delete, Name: r.Name, Type: r.Type, IfVersion: r.Version, AllowMissing: true, Constraint: d.constraint(r.Name)}
		w.Constraint.Closure = true
		batch = append(batch, w)
	}
	return batch
}

func (d *deletion) constraint(name string) *store.Constraint {
	n, err := d.version.ParseName(name)
	return &store.Constraint{UUID: d.uuids[name], Epoch: d.epoch, Asked: d.asked[name], Attempt: d.attempt[name], Tell: d.tell, AsyncDeletion: err == nil && n.Type.AsyncDeletion}
}
