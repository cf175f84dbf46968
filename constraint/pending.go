package constraint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/store"
)

// The owned-pending handler (spec 5.2, 1): confirmations, owners, ownees, deletions that were refused, and expired blockades.

// unconfirmed are the references of a resource whose grant has not been confirmed, by location.
func (s *session) unconfirmed(ctx context.Context, name string) (map[store.Location][]store.Reference, error) {
	refs, err := s.cfg.Core.Unconfirmed(ctx, name)
	by := map[store.Location][]store.Reference{}
	for _, r := range refs {
		by[r.At] = append(by[r.At], r)
	}
	return by, err
}

func (s *session) planConfirm(ctx context.Context, j *job) ([]laneKey, error) {
	by, err := s.unconfirmed(ctx, j.key.name)
	return callLanes(by), err
}

func callLanes[T any](by map[store.Location]T) []laneKey {
	lanes := make([]laneKey, 0, len(by))
	for at := range by {
		lanes = append(lanes, callLane(at))
	}
	return lanes
}

// confirm tells the owner of targets that the references are committed (spec 3.2).
func (s *session) confirm(ctx context.Context, j *job, at store.Location) error {
	by, err := s.unconfirmed(ctx, j.key.name)
	if err != nil {
		return err
	}
	refs := by[at]
	if s.hasGone(at) {
		s.log.WarnContext(ctx, "references to a Deployment that has been removed count as confirmed", "name", j.key.name, "peer", at.String())
		return s.cfg.Core.MarkConfirmed(ctx, j.key.name, refs)
	}
	for page := range slices.Chunk(refs, s.cfg.Page) {
		confirmed := make([]store.Confirmed, len(page))
		for i, r := range page {
			confirmed[i] = store.Confirmed{Referrer: j.key.name, Name: r.Target, Blocking: r.Behavior == store.Block, Subscriber: r.Behavior.Handled(false), TxID: r.Grant.TxID}
		}
		missing, err := s.confirmAt(ctx, at, confirmed, 0)
		if err != nil {
			return err
		}
		if len(missing) > 0 {
			// Has the resource changed meanwhile?
			if by, err = s.unconfirmed(ctx, j.key.name); err != nil {
				return err
			}
			for _, r := range by[at] {
				if slices.Contains(missing, r.Target) {
					s.dangling(ctx, at, store.Confirmed{Referrer: j.key.name, Name: r.Target})
				}
			}
		}
		if err := s.cfg.Core.MarkConfirmed(ctx, j.key.name, page); err != nil {
			return err
		}
	}
	return nil
}

// confirmAt sends confirmations and returns the targets that do not exist.
func (s *session) confirmAt(ctx context.Context, at store.Location, refs []store.Confirmed, complete int64) (missing []string, err error) {
	call, err := s.cfg.Peers.Call(at)
	if err != nil {
		return nil, unreachable(at, err)
	}
	req := &v1.ConfirmBlockadesRequest{Call: call, CompleteEpoch: complete}
	for _, r := range refs {
		req.References = append(req.References, &v1.ConfirmedReference{Referrer: r.Referrer, Name: r.Name, Blocking: r.Blocking, Subscriber: r.Subscriber, TxId: r.TxID})
	}
	res, err := ask(ctx, s, at, mixin.Peer.ConfirmBlockades, req)
	return res.GetMissing(), err
}

// dangling reports what must never be: a committed reference to nothing. Nothing here can mend it.
func (s *session) dangling(ctx context.Context, at store.Location, r store.Confirmed) {
	s.metrics.dangling.Inc()
	s.metrics.danglings.Add(1)
	s.log.ErrorContext(ctx, "a committed reference points to a resource that does not exist", "name", r.Referrer, "target", r.Name, "peer", at.String())
}

// finishConfirm takes the task off a shadow that had nothing to confirm; otherwise the last confirmation has.
func (s *session) finishConfirm(ctx context.Context, j *job) error {
	if j.planned {
		return nil
	}
	return s.clear(store.ConfirmBlockades)(ctx, j)
}

// owners are the owner references of the incarnation that the job is about, by the Deployment of the owner.
func (s *session) owners(ctx context.Context, j *job) (map[store.Location][]store.OwnerReference, error) {
	r, err := s.resource(ctx, j)
	if r == nil {
		return nil, err
	}
	by := map[store.Location][]store.OwnerReference{}
	for _, o := range r.Meta.OwnerReferences {
		service, _, _ := strings.Cut(o.Kind, "/")
		at := store.Location{Service: service, Region: o.Region}
		by[at] = append(by[at], o)
	}
	return by, nil
}

// resource returns the resource of a job, nil if that incarnation is gone.
func (s *session) resource(ctx context.Context, j *job) (*store.Resource, error) {
	found, err := s.cfg.Core.BatchGet(ctx, []string{j.key.name})
	if err != nil || found[0] == nil || found[0].UUID != j.task.UUID {
		return nil, err
	}
	return found[0], nil
}

func (s *session) planOwners(ctx context.Context, j *job) ([]laneKey, error) {
	by, err := s.owners(ctx, j)
	return callLanes(by), err
}

// checkOwners asks the owners at one Deployment whether they are owners (spec 4.6, case 1).
func (s *session) checkOwners(ctx context.Context, j *job, at store.Location) error {
	by, err := s.owners(ctx, j)
	if err != nil {
		return err
	}
	var first error // one owner does not delay the others
	for _, o := range by[at] {
		var away *unreachableError
		err := s.checkOwner(ctx, j, at, o)
		if errors.As(err, &away) {
			return err
		}
		first = cmp.Or(first, err)
	}
	return first
}

func (s *session) checkOwner(ctx context.Context, j *job, at store.Location, o store.OwnerReference) error {
	ownee := &v1.Spelling{Version: s.cfg.Version, Name: j.key.name}
	entry := &v1.Spelling{Version: o.Version, Name: o.Name}
	for range 3 { // an entry in an old version is rewritten, and asked for again
		res, err := ask(ctx, s, at, mixin.Peer.ConfirmMetaOwner, &v1.ConfirmMetaOwnerRequest{
			Call: s.call(at, entry.GetVersion()), OwneeKind: s.kindOf(j.task.Type), Ownee: ownee,
			OwnerKind: o.Kind, Owner: entry, RequiresOwnerReference: o.RequiresOwnerReference,
		})
		if err != nil {
			return err
		}
		switch res.GetOutcome() {
		case v1.ConfirmMetaOwnerResponse_OUTCOME_CONFIRMED:
			j.confirmed(o)
			return nil
		case v1.ConfirmMetaOwnerResponse_OUTCOME_VERSION_MISMATCH:
			j.confirmed(o)
			_, err := ask(ctx, s, s.own, mixin.Peer.UpgradeMetaOwnerVersion, &v1.UpgradeMetaOwnerVersionRequest{
				Call: s.call(s.own, s.cfg.Version), Ownee: ownee, OwnerKind: o.Kind, OwnerRegion: o.Region, From: entry, To: res.GetCurrent(),
			})
			if err != nil {
				return err
			}
			entry = res.GetCurrent()
		case v1.ConfirmMetaOwnerResponse_OUTCOME_NOT_CONFIRMED:
			if since := j.notConfirmed(o); time.Since(since) < s.cfg.Grace {
				return notYet(fmt.Sprintf("owner %s at %s is not confirmed: %s; the reference to it is removed after %s", o.Name, at, res.GetReason(), since.Add(s.cfg.Grace).Format(time.RFC3339)))
			}
			s.log.InfoContext(ctx, "removing an owner that was not confirmed in time", "name", j.key.name, "owner", o.Name, "peer", at.String(), "reason", res.GetReason())
			_, err := ask(ctx, s, s.own, mixin.Peer.RemoveMetaOwnerReference, &v1.RemoveMetaOwnerReferenceRequest{
				Call: s.call(s.own, s.cfg.Version), Ownee: ownee, OwnerKind: o.Kind, OwnerRegion: o.Region, Owner: []*v1.Spelling{entry}, Reason: "NOT_CONFIRMED",
			})
			return err
		default:
			return fmt.Errorf("ask %s for owner %s: outcome %s is not known", at, o.Name, res.GetOutcome())
		}
	}
	return notYet(fmt.Sprintf("owner %s at %s changes its version again and again", o.Name, at))
}

// notConfirmed returns since when an owner has been known not to be confirmed: a definite answer, counted for this owner alone. A time without an answer
// does not count before the first one (I19), nor does what was raised for another owner.
func (j *job) notConfirmed(o store.OwnerReference) time.Time {
	j.mu.Lock()
	defer j.mu.Unlock()
	since, known := j.missing[o]
	if !known {
		if j.missing == nil {
			j.missing = map[store.OwnerReference]time.Time{}
		}
		since = time.Now()
		j.missing[o] = since
	}
	return since
}

func (j *job) confirmed(o store.OwnerReference) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.missing, o)
}

// kindOf returns the full name of a type of ours.
func (s *session) kindOf(typ string) string { return s.cfg.Service + "/" + typ }

// shadow returns the shadow of a job in a state, nil if there is none any more.
func (s *session) shadow(ctx context.Context, j *job, state store.ShadowState) (*store.Shadow, error) {
	sh, err := s.cfg.Core.Shadow(ctx, j.key.name)
	switch {
	case store.CodeOf(err) == store.NotFound:
		return nil, nil
	case err != nil:
		return nil, err
	case sh.UUID != j.task.UUID || sh.State != state:
		return nil, nil
	}
	return sh, nil
}

func (s *session) planOwnees(ctx context.Context, j *job) (lanes []laneKey, err error) {
	sh, err := s.shadow(ctx, j, store.ShadowActive)
	if sh == nil {
		return nil, err
	}
	for _, source := range sh.Sources {
		if source.Ownee {
			lanes = append(lanes, callLane(source.Location))
		}
	}
	return lanes, nil
}

// checkOwnees brings the ownees at one Deployment up to date with their owner (spec 4.6, case 2, and 4.7): those that require a reference of the owner's and
// have none any more lose it, those that name it in an old version get the present one. One page at a time.
func (s *session) checkOwnees(ctx context.Context, j *job, at store.Location) error {
	sh, err := s.shadow(ctx, j, store.ShadowActive)
	if sh == nil || s.hasGone(at) {
		return err
	}
	names := s.cfg.Peers.Spellings(j.key.name)
	now := &v1.Spelling{Version: s.cfg.Version, Name: j.key.name}
	return s.eachOwnee(ctx, j, at, sh.Type, names, func(o *v1.MetaOwnee) error {
		ref := o.GetReference()
		if ref.GetRequiresOwnerReference() && !s.refersTo(sh, at, o) {
			return s.removeOwner(ctx, at, sh.Type, names, o, "NO_SCHEMA_REFERENCE")
		}
		if ref.GetVersion() == now.GetVersion() && ref.GetName() == now.GetName() {
			return nil
		}
		_, err := ask(ctx, s, at, mixin.Peer.UpgradeMetaOwnerVersion, &v1.UpgradeMetaOwnerVersionRequest{
			Call: s.call(at, s.cfg.Version), Ownee: o.GetOwnee(), OwnerKind: s.kindOf(sh.Type), OwnerRegion: s.cfg.Region,
			From: &v1.Spelling{Version: ref.GetVersion(), Name: ref.GetName()}, To: now,
		})
		return err
	})
}

// eachOwnee calls do for one page of the ownees of a job's resource at a Deployment.
func (s *session) eachOwnee(ctx context.Context, j *job, at store.Location, typ string, names []*v1.Spelling, do func(*v1.MetaOwnee) error) error {
	j.mu.Lock()
	token := j.pages[at]
	j.mu.Unlock()
	res, err := ask(ctx, s, at, mixin.Peer.ListMetaOwnees, &v1.ListMetaOwneesRequest{
		Call: s.call(at, s.cfg.Version), OwnerKind: s.kindOf(typ), OwnerNames: names, PageSize: int32(s.cfg.Page), PageToken: token,
	})
	if err != nil {
		return err
	}
	for _, o := range res.GetOwnees() {
		if err := do(o); err != nil {
			return err
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if res.GetNextPageToken() == "" {
		delete(j.pages, at)
		return nil
	}
	if j.pages == nil {
		j.pages = map[store.Location]string{}
	}
	j.pages[at] = res.GetNextPageToken()
	return more(0)
}

// removeOwner takes us from the owners of a resource, at its Deployment.
func (s *session) removeOwner(ctx context.Context, at store.Location, typ string, names []*v1.Spelling, o *v1.MetaOwnee, reason string) error {
	_, err := ask(ctx, s, at, mixin.Peer.RemoveMetaOwnerReference, &v1.RemoveMetaOwnerReferenceRequest{
		Call: s.call(at, s.cfg.Version), Ownee: o.GetOwnee(), OwnerKind: s.kindOf(typ), OwnerRegion: s.cfg.Region, Owner: names, Reason: reason,
	})
	return err
}

// refersTo reports whether an owner has a schema reference to an ownee at a Deployment, however that one spells its own name.
func (s *session) refersTo(owner *store.Shadow, at store.Location, o *v1.MetaOwnee) bool {
	spelled := map[string]bool{o.GetOwnee().GetName(): true}
	if service, ok := s.cfg.Registry.View().Service(at.Service); ok {
		if v := service.Version(o.GetOwnee().GetVersion()); v != nil {
			if n, err := v.ParseName(o.GetOwnee().GetName()); err == nil {
				for _, to := range service.Versions {
					if t, ok := n.Translate(to, at.Region); ok {
						spelled[t.Full] = true
					}
				}
			}
		}
	}
	local := at
	if at == s.own {
		local = store.Location{}
	}
	return slices.ContainsFunc(owner.References, func(r store.Reference) bool {
		return r.Kind == store.SchemaReference && r.At == local && spelled[r.Target]
	})
}

// planDelete chooses the lane of the first Deployment that the deletion will ask, so that one that is away delays no other deletion.
func (s *session) planDelete(ctx context.Context, j *job) ([]laneKey, error) {
	sh, err := s.shadow(ctx, j, store.ShadowActive)
	if sh == nil {
		return nil, err
	}
	var first store.Location
	for _, source := range sh.Sources {
		if l := source.Location; source.Blocking && l != (store.Location{}) && (first == store.Location{} || l.String() < first.String()) {
			first = l
		}
	}
	return []laneKey{deleteLane(first)}, nil
}

// deletePending tries again to delete a resource whose deletion was refused (F67, I17).
func (s *session) deletePending(ctx context.Context, j *job, first store.Location) error {
	r, err := s.resource(ctx, j)
	if r == nil {
		return err
	}
	// The version ties the deletion to this incarnation.
	_, err = store.Apply(inBackground(ctx), s.cfg.Store, store.Write{Op: store.Delete, Name: r.Name, Type: r.Type, IfVersion: r.Version, AllowMissing: true})
	if first != (store.Location{}) {
		err = unreachable(first, err)
	}
	return err
}

// scanBlockades looks for expired blockades until ctx is done (spec 4.2; I15, X1).
func (s *session) scanBlockades(ctx context.Context) {
	for {
		if err := s.expireBlockades(ctx); err != nil && ctx.Err() == nil {
			s.log.WarnContext(ctx, "expired blockades cannot be read, will be retried", "error", err)
		}
		if !sleep(ctx, s.cfg.ScanInterval) {
			return
		}
	}
}

func (s *session) expireBlockades(ctx context.Context) error {
	held, err := s.cfg.Core.Blockades(ctx, s.shards)
	if err != nil {
		return err
	}
	s.held.Store(int64(held))
	// Those that wait for a Deployment that is away come first, as they are the oldest: they must not hide the others.
	known := 0
	for _, p := range s.pending() {
		known += p.blockades
	}
	expired, err := s.cfg.Core.ExpiredBlockades(ctx, s.shards, min(known, s.cfg.Queue)+s.cfg.Page)
	if err != nil {
		return err
	}
	by := map[jobKey][]store.Blockade{}
	for _, b := range expired {
		key := jobKey{kind: jobExpire, name: b.Name, at: b.Location}
		by[key] = append(by[key], b)
	}
	for key, blockades := range by {
		s.accept(key, store.Task{Name: key.name}, func(j *job) { j.blockades = blockades }) // without room: found by the next scan
	}
	return nil
}

// expire asks the location of expired blockades whether their transactions have left references, and then forgets the blockades, and the location if it has
// none at all (spec 8.6). A location that is away is kept, and asked again.
func (s *session) expire(ctx context.Context, j *job) error {
	at := j.key.at
	questions, err := s.cfg.Core.BeginAttempt(ctx, []string{j.key.name})
	if err != nil {
		return err
	}
	q, found := questions[j.key.name]
	left, gone := false, s.hasGone(at)
	if version, spelled, ok := s.cfg.Peers.SpellFor(at, j.key.name); found && ok && !gone {
		res, err := ask(ctx, s, at, mixin.Peer.CheckIfResourceIsBlocked, &v1.CheckIfResourceIsBlockedRequest{
			Call: s.call(at, version), Targets: []*v1.Question{{Name: spelled, Uuid: q.UUID, Epoch: q.Epoch, RowVersion: q.RowVersion}},
		})
		if err != nil {
			return err
		}
		left = len(res.GetAnswers()) != 1 || res.GetAnswers()[0].GetHasAnyReference()
	}
	if err := s.cfg.Core.DropBlockades(ctx, j.blockades); err != nil {
		return err
	}
	if !found || left {
		return nil
	}
	// What is known of ownees comes from elsewhere, and may just have been added.
	_, err = s.cfg.Core.PruneSource(ctx, q, at, store.Source{Location: at, Ownee: !gone})
	return err
}

// final is a question about a resource that is being deleted: nothing is granted any more.
func final(name, uuid string, epoch int64) *v1.Question {
	return &v1.Question{Name: name, Uuid: uuid, Epoch: epoch, RowVersion: math.MaxInt64}
}

// reasonOf is the label reason of the metrics.
func reasonOf(err error) string {
	if _, ok := err.(notYet); ok { //nolint:errorlint // only as it was returned
		return "waiting"
	}
	if e, ok := err.(*unreachableError); ok && e != nil { //nolint:errorlint // only as it was returned
		return "unreachable"
	}
	if code := store.CodeOf(err); code != 0 {
		return strings.ToLower(code.String())
	}
	return cmp.Or(mixin.ReasonOf(err), "error")
}
