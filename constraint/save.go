package constraint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// maxCalls bounds the calls to other Deployments that one write has in flight.
const maxCalls = 16

// maxMoves bounds how often one reference is sent on to another region because the one that was asked does not own its target.
const maxMoves = 3

// saves computes the references of all constrained saves of a batch.
func (s *Store) saves(t *transaction, whole []store.Write) ([]*saving, error) {
	var saves []*saving
	view := s.cfg.View()
	for i, w := range whole {
		if w.Op == store.Delete || !t.constrained(i) {
			continue
		}
		v, err := newSaving(i, t.names[i], w, view)
		if err != nil {
			return nil, err
		}
		saves = append(saves, v)
	}
	return saves, nil
}

// bucket is what one call establishes: new references of one referrer to one Deployment.
type bucket struct {
	of *saving
	at store.Location
	// targets are distinct, and refs the references to each.
	targets []*v1.NewReference
	refs    [][]*outgoing
	err     error
}

// permissions are what other Deployments have promised for a while.
type permissions struct {
	// sent is before the first of them was asked for; granted is the shortest time for which they hold. Zero without any.
	sent    time.Time
	granted time.Duration
}

// late says whether it is too late to commit. Half of the time is left to the transaction itself (spec 8.4); that it is in time is a matter of liveness, for
// the database judges each grant when it commits.
func (p permissions) late(now time.Time) bool {
	return !p.sent.IsZero() && now.Sub(p.sent) > p.granted/2
}

// establish asks the Deployments of all new references for their permission: one call for each referrer and Deployment (F39), all at the same time, and no
// database transaction is open meanwhile. Any refusal is the whole write's (X4, X8); then what others have granted expires there.
func (s *Store) establish(ctx context.Context, t *transaction, saves []*saving, home store.Mark, try int) (permissions, error) {
	given := permissions{granted: s.cfg.TTL}
	moves := map[*outgoing]int{}
	for pending := buckets(saves); len(pending) > 0; pending = buckets(saves) {
		id, err := t.txID()
		if err != nil {
			return given, err
		}
		if given.sent.IsZero() {
			given.sent = s.cfg.Now()
		}
		granted := make([]time.Duration, len(pending))
		var calls errgroup.Group
		calls.SetLimit(maxCalls)
		for i, b := range pending {
			calls.Go(func() error {
				granted[i], b.err = s.establishOne(ctx, b, id, home, try)
				return nil // the others go on: what they say may be better to know
			})
		}
		_ = calls.Wait()
		if err := s.judge(ctx, pending, moves); err != nil {
			return given, err
		}
		for i, b := range pending {
			if b.err == nil {
				given.granted = min(given.granted, granted[i])
			}
		}
	}
	return given, nil
}

// buckets groups the references that need a permission and have none.
func buckets(saves []*saving) []*bucket {
	var all []*bucket
	for _, v := range saves {
		type key struct {
			at     store.Location
			target string
		}
		open := map[store.Location]*bucket{}
		place := map[key]int{}
		for i := range v.refs {
			o := &v.refs[i]
			if !o.foreign || o.known || o.Grant != nil {
				continue
			}
			b := open[o.At]
			k := key{o.At, o.Target}
			j, again := place[k]
			if !again {
				if b == nil || len(b.targets) == mixin.MaxNames {
					b = &bucket{of: v, at: o.At}
					open[o.At] = b
					all = append(all, b)
				}
				j = len(b.targets)
				place[k] = j
				b.targets = append(b.targets, &v1.NewReference{Name: o.Target})
				b.refs = append(b.refs, nil)
			}
			b.targets[j].Blocking = b.targets[j].Blocking || o.Behavior == store.Block
			b.targets[j].Subscriber = b.targets[j].Subscriber || o.Behavior.Handled(false)
			b.refs[j] = append(b.refs[j], o)
		}
	}
	return all
}

// establishOne asks one Deployment and puts the grants into the references.
func (s *Store) establishOne(ctx context.Context, b *bucket, id string, home store.Mark, try int) (granted time.Duration, err error) {
	peer, err := s.cfg.Peers.Peer(b.at)
	if err != nil {
		return 0, err
	}
	call, err := s.cfg.Peers.Call(b.at)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	within, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	res, err := peer.EstablishReferences(within, &v1.EstablishReferencesRequest{
		Call: call, Referrer: b.of.name.Full, Targets: b.targets, TxId: id, TxAttempt: int32(try), Ttl: durationpb.New(s.cfg.TTL),
	})
	if err == nil && len(res.GetGrants()) != len(b.targets) {
		err = fmt.Errorf("%s sent %d grants for %d references", b.at, len(res.GetGrants()), len(b.targets))
	}
	outcome := "granted"
	if err != nil {
		outcome = "refused"
		if away(err) {
			outcome = "unreachable"
		}
	}
	s.metrics.establish.WithLabelValues(b.at.Service, b.at.Region, outcome).Observe(time.Since(start).Seconds())
	if err != nil {
		return 0, err
	}
	for i, g := range res.GetGrants() {
		for _, o := range b.refs[i] {
			o.Grant = &store.Grant{TxID: id, UUID: g.GetUuid(), Epoch: g.GetEpoch(), RowVersion: g.GetRowVersion(), Home: home}
		}
	}
	return res.GetGranted().AsDuration(), nil
}

// away says whether a Deployment could not be asked, or could not answer: it has not refused.
func away(err error) bool {
	return store.CodeOf(err) == store.Unavailable || errors.Is(err, context.DeadlineExceeded)
}

// judge turns the errors of calls into that of the write. References whose targets are owned by another region than that which was asked are moved there,
// which is no error. A refusal is told before a failure: repeating would not help.
func (s *Store) judge(ctx context.Context, called []*bucket, moves map[*outgoing]int) error {
	if ctx.Err() != nil {
		return fmt.Errorf("establish references: %w", ctx.Err())
	}
	var refused *store.Error
	var failed error
	for _, b := range called {
		if b.err == nil || s.move(b, moves) {
			continue
		}
		switch code := store.CodeOf(b.err); {
		case away(b.err):
			failed = cmp.Or[error](failed, &store.Error{Code: store.Unavailable, Name: b.of.name.Full, Cause: b.err, Violations: []store.Violation{{
				Field: b.refs[0][0].path, Description: fmt.Sprintf("%s, which owns %s, cannot be reached: nothing was written, repeat later", b.at, b.targets[0].GetName()),
			}}})
		case code == store.Aborted:
			failed = cmp.Or[error](failed, &store.Error{Code: store.Aborted, Name: b.of.name.Full, Reason: b.err.Error(), Cause: store.ErrChanged})
		case code != 0:
			if refused == nil {
				refused = &store.Error{Code: store.FailedPrecondition, Name: b.of.name.Full}
			}
			if refused.Name == b.of.name.Full { // fields of one resource
				refused.Violations = append(refused.Violations, b.violations()...)
			}
		default:
			failed = cmp.Or(failed, fmt.Errorf("establish references of %s at %s: %w", b.of.name.Full, b.at, b.err))
		}
	}
	if refused != nil {
		return refused
	}
	return failed
}

// violations names the fields whose targets have been refused, as far as the refusal tells.
func (b *bucket) violations() []store.Violation {
	var e *store.Error
	errors.As(b.err, &e)
	var out []store.Violation
	for i, t := range b.targets {
		reason := ""
		for _, v := range e.Violations {
			if v.Field == t.GetName() {
				reason = v.Description
			}
		}
		if reason == "" && e.Name == t.GetName() {
			reason = e.Reason
			if e.Code == store.NotFound {
				reason = "does not exist"
			}
		}
		if reason != "" {
			out = append(out, store.Violation{Field: b.refs[i][0].path, Description: fmt.Sprintf("%s (%s) %s", t.GetName(), b.at, reason)})
		}
	}
	if out == nil { // the refusal is about all of them
		out = []store.Violation{{Field: b.refs[0][0].path, Description: fmt.Sprintf("%s (%s) cannot be referred to: %v", b.targets[0].GetName(), b.at, e)}}
	}
	return out
}

// move sends references on whose target another region owns, and remembers that for the next time. About names of our own service the policies decide.
func (s *Store) move(b *bucket, moves map[*outgoing]int) bool {
	region, ok := mixin.OwningRegion(b.err)
	if !ok || b.at.Service == s.cfg.Self.Service || region == b.at.Region {
		return false
	}
	if _, ok := s.cfg.View().Deployment(registry.Key{Service: b.at.Service, Region: region}); !ok {
		return false
	}
	var e *store.Error
	errors.As(b.err, &e)
	i := slices.IndexFunc(b.targets, func(t *v1.NewReference) bool { return t.GetName() == e.Name })
	if i < 0 {
		if len(b.targets) > 1 {
			return false // which of them?
		}
		i = 0
	}
	named := b.refs[i][0].target
	if _, regional := named.Region(); regional {
		return false
	}
	s.places.learn(named, region)
	for _, refs := range b.refs {
		for _, o := range refs {
			if _, regional := o.target.Region(); regional || keyOfPlace(o.target) != keyOfPlace(named) {
				continue
			}
			if moves[o]++; moves[o] > maxMoves {
				return false
			}
			o.At.Region = region
		}
	}
	return true
}
