// Package region is the layer of the Store that knows where resources belong: it puts metadata.syncing into every write, and refuses writes that
// the policies do not allow (spec 2.5, 4.0; F26 to F36).
//
//   - metadata.syncing follows from the name, the type's sync type and the governing policy; what a caller sends is ignored
//   - saving an unchanged resource refreshes a stale metadata.syncing
//   - one transaction writes resources of one policy holder, besides global ones
//   - nothing is created in a region that its policy does not enable
//   - no policy is changed so that a region would own what it may not own any more, if a Census is there to ask
package region

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
)

// policies is what the layer asks: policy.Cache.
type policies interface {
	Of(ctx context.Context, n descriptor.Name, pending map[string][]byte) (p *descriptor.Policy, holder string, err error)
	Forget(holder string)
}

// Store is the layer. It is safe for concurrent use.
type Store struct {
	next     store.Store
	region   string
	version  func() *descriptor.Version
	policies policies
	census   Census // may be nil
}

// Census asks a region what it owns under a policy holder and is governed by its policy. It must answer itself for the own region. An error means that nobody knows;
// a region without a Deployment owns nothing.
type Census func(ctx context.Context, region, holder string) ([]store.Holding, error)

// Guard makes the layer ask before it saves a policy that takes something from a region. Call it before the layer is used.
func (s *Store) Guard(c Census) { s.census = c }

// Layer puts the layer for the Deployment in region on top of next.
func Layer(next store.Store, region string, version func() *descriptor.Version, p policies) *Store {
	return &Store{next: next, region: region, version: version, policies: p}
}

// Get implements store.Reader.
func (s *Store) Get(ctx context.Context, name string) (*store.Resource, error) {
	return s.next.Get(ctx, name)
}

// BatchGet implements store.Reader.
func (s *Store) BatchGet(ctx context.Context, names []string) ([]*store.Resource, error) {
	return s.next.BatchGet(ctx, names)
}

// List implements store.Reader.
func (s *Store) List(ctx context.Context, q store.Query) (*store.Page, error) {
	return s.next.List(ctx, q)
}

// Owner returns the region to which a write of n belongs that is part of batch: a policy holder in the same batch may be about to decide.
func (s *Store) Owner(ctx context.Context, n descriptor.Name, batch []store.Write) (string, error) {
	if region, ok := n.Region(); ok {
		return region, nil
	}
	p, _, err := s.policies.Of(ctx, n, s.pending(batch))
	var missing *policy.MissingHolderError
	if errors.As(err, &missing) {
		// Its holder is gone, but what it left behind can still be read and deleted where it is owned.
		r, gerr := s.next.Get(ctx, n.Full)
		if gerr == nil {
			return r.OwningRegion, nil
		}
		if store.CodeOf(gerr) != store.NotFound {
			return "", gerr
		}
		return "", holderError(missing)
	}
	if err != nil {
		return "", err
	}
	owner, _, err := s.owner(ctx, n, p)
	return owner, err
}

// owner is the region that the policy gives n to. But a policy of the service that has changed moves nothing: what this region owned it owns, and then kept is true.
func (s *Store) owner(ctx context.Context, n descriptor.Name, p *descriptor.Policy) (owner string, kept bool, err error) {
	owner, ok := descriptor.OwningRegion(n, p)
	if !ok {
		return s.region, false, nil // no policy anywhere: the service runs without regions
	}
	if _, regional := n.Region(); regional || owner == s.region {
		return owner, false, nil
	}
	switch r, err := s.next.Get(ctx, n.Full); {
	case store.CodeOf(err) == store.NotFound:
		return owner, false, nil
	case err != nil:
		return "", false, err
	case r.OwningRegion == s.region:
		return s.region, true, nil
	}
	return owner, false, nil
}

// BatchWrite implements store.Writer.
func (s *Store) BatchWrite(ctx context.Context, writes []store.Write) ([]store.Result, error) {
	pending := s.pending(writes)
	placed := make([]store.Write, len(writes))
	holder, first := "", ""
	var holders []string
	for i, w := range writes {
		n, err := s.parse(w.Name)
		if err != nil {
			return nil, err
		}
		if h := n.HolderName(); h != "" {
			if holder != "" && h != holder {
				return nil, store.Errorf(store.FailedPrecondition, w.Name, "belongs to policy holder %s, but %s in the same transaction belongs to %s: write them separately", h, first, holder)
			}
			holder, first = h, w.Name
		}
		if n.Type.IsPolicyHolder() {
			holders = append(holders, n.Full)
		}
		if placed[i], err = s.place(ctx, w, n, pending); err != nil {
			return nil, err
		}
		if err := s.guard(ctx, w, n); err != nil {
			return nil, err
		}
	}
	results, err := s.next.BatchWrite(ctx, placed)
	for _, h := range holders { // also after an error: the write may have been applied
		s.policies.Forget(h)
	}
	return results, err
}

// place fills in where the write belongs.
func (s *Store) place(ctx context.Context, w store.Write, n descriptor.Name, pending map[string][]byte) (store.Write, error) {
	p, _, err := s.policies.Of(ctx, n, pending)
	var missing *policy.MissingHolderError
	if errors.As(err, &missing) {
		if w.Op != store.Delete {
			return w, holderError(missing)
		}
		w.OwningRegion = "" // the core knows whether it is ours
		return w, nil
	}
	if err != nil {
		return w, err
	}
	owner, kept, err := s.owner(ctx, n, p)
	if err != nil {
		return w, err
	}
	if owner != s.region {
		return w, store.Errorf(store.FailedPrecondition, w.Name, "is owned by region %s: write there", owner)
	}
	if kept && w.Op == store.Save {
		w.Op = store.Update // if it is deleted in this moment, it is not ours to create
	}
	w.Type, w.OwningRegion = n.Type.Name, owner
	if w.Op == store.Delete {
		return w, nil
	}
	w.Regions = descriptor.RegionsFor(n.Type, p, owner)
	if len(w.Regions) == 0 {
		w.Regions = []string{owner}
	}
	if p != nil && !p.CanCreateIn(owner) {
		return w, s.refuseCreation(ctx, w, owner)
	}
	return w, nil
}

// guard refuses a change of a policy that would leave resources with a region that may not own them any more (spec 4.9). It looks before the
// transaction: what is created in that moment elsewhere is not seen, and is reported as misplaced when the policy is carried out.
func (s *Store) guard(ctx context.Context, w store.Write, n descriptor.Name) error {
	if s.census == nil || w.Op == store.Delete || w.Op == store.Create || !n.Type.IsPolicyHolder() {
		return nil
	}
	old, err := s.next.Get(ctx, n.Full)
	if store.CodeOf(err) == store.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	if !store.MaskAll(w.Mask) {
		if w, err = store.ApplyMask(old, w); err != nil {
			return err
		}
	}
	was, _ := n.Type.PolicyOf(old.Body)
	now, _ := n.Type.PolicyOf(w.Body) // its faults are reported where the body is validated
	var why []string
	for _, region := range policy.Concerned(was, now, nil) {
		owned, err := s.census(ctx, region, n.Full)
		if err != nil {
			return &store.Error{Code: store.Unavailable, Name: n.Full, Cause: err,
				Reason: fmt.Sprintf("region %s must say whether it owns resources that this policy takes from it, and cannot be asked: repeat later", region)}
		}
		why = append(why, policy.Orphans(region, owned, now)...)
	}
	if len(why) > 0 {
		return store.Errorf(store.FailedPrecondition, n.Full, "this policy would orphan resources: %s", strings.Join(why, "; "))
	}
	return nil
}

// refuseCreation allows a write in a region that the policy does not enable only if the resource exists already.
func (s *Store) refuseCreation(ctx context.Context, w store.Write, owner string) error {
	if w.Op != store.Create {
		_, err := s.next.Get(ctx, w.Name)
		if store.CodeOf(err) != store.NotFound || w.Op == store.Update {
			return err
		}
	}
	return store.Errorf(store.FailedPrecondition, w.Name, "cannot be created in region %s, which its policy does not enable: add it to enabledRegions or choose another region", owner)
}

// pending are the bodies of policy holders in writes. A masked write is judged by the stored policy: its own change follows with the feed.
func (s *Store) pending(writes []store.Write) map[string][]byte {
	var bodies map[string][]byte
	for _, w := range writes {
		if w.Op == store.Delete || !store.MaskAll(w.Mask) {
			continue
		}
		n, err := s.parse(w.Name)
		if err != nil || !n.Type.IsPolicyHolder() {
			continue
		}
		if bodies == nil {
			bodies = map[string][]byte{}
		}
		bodies[w.Name] = w.Body
	}
	return bodies
}

func (s *Store) parse(name string) (descriptor.Name, error) {
	n, err := s.version().ParseName(name)
	if err != nil {
		return n, store.Invalid("name", err.Error())
	}
	return n, nil
}

func holderError(e *policy.MissingHolderError) error {
	return store.Errorf(store.FailedPrecondition, e.Name, "its policy holder %s does not exist: create that first", e.Holder)
}
