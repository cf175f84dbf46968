package constraint

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/store"
)

// The owned-deleting handler (spec 4.4, 5 to 7, and 4.6, case 3): a deleted name is free once everybody who had to be told has nothing left that refers to it.

// planDrain lists who has to be done: the referrers here, the subscribers, the locations of ownees, and those whose references may have been lost in a
// failover of ours.
func (s *session) planDrain(ctx context.Context, j *job) ([]laneKey, error) {
	sh, err := s.shadow(ctx, j, store.ShadowDeleting)
	if sh == nil {
		return nil, err
	}
	suspects, err := s.cfg.Core.Suspects(ctx, s.cfg.Peers.Importers())
	if err != nil {
		return nil, err
	}
	lanes := []laneKey{handleLane(store.Location{})}
	checked := slices.Clone(suspects)
	for _, at := range suspects {
		lanes = append(lanes, callLane(at))
	}
	for _, source := range sh.Sources {
		if source.Location == (store.Location{}) || slices.Contains(suspects, source.Location) {
			continue
		}
		// Who only ever blocked was asked before the deletion was accepted; should it turn out to be more, it has not been asked yet.
		if source.Subscriber || source.Ownee {
			checked = append(checked, source.Location)
			lanes = append(lanes, callLane(source.Location))
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.checked, j.suspects, j.epoch = checked, suspects, sh.Epoch
	return lanes, nil
}

// drain waits until one Deployment has nothing left that refers to the deleted resource, and relieves the ownees there of their owner.
func (s *session) drain(ctx context.Context, j *job, at store.Location) error {
	if at == (store.Location{}) {
		return s.handleReferrers(ctx, j, at)
	}
	sh, err := s.shadow(ctx, j, store.ShadowDeleting)
	if sh == nil {
		return err
	}
	if s.hasGone(at) {
		s.log.WarnContext(ctx, "a Deployment that has been removed counts as having handled a deletion", "name", j.key.name, "peer", at.String())
		return nil
	}
	j.mu.Lock()
	suspect := slices.Contains(j.suspects, at)
	j.mu.Unlock()
	source := store.Source{Subscriber: suspect, Ownee: suspect}
	if i := slices.IndexFunc(sh.Sources, func(source store.Source) bool { return source.Location == at }); i >= 0 {
		source.Subscriber, source.Ownee = suspect || sh.Sources[i].Subscriber, suspect || sh.Sources[i].Ownee
	}
	if source.Subscriber {
		if err := s.drainSubscriber(ctx, sh, at); err != nil {
			return err
		}
	}
	if source.Ownee {
		return s.drainOwnees(ctx, j, sh, at)
	}
	return nil
}

func (s *session) drainSubscriber(ctx context.Context, sh *store.Shadow, at store.Location) error {
	version, spelled, ok := s.cfg.Peers.SpellFor(at, sh.Name)
	if !ok {
		return nil // nobody there can refer to it
	}
	epoch, err := s.cfg.Core.Epoch(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, s, at, mixin.Peer.CheckIfResourceHasDeletionSubscriber, &v1.CheckIfResourceHasDeletionSubscriberRequest{
		Call: s.call(at, version), Target: final(spelled, sh.UUID, epoch),
	})
	if err != nil {
		return err
	}
	if res.GetHasSubscriber() {
		return notYet(fmt.Sprintf("%d references at %s are not handled yet, for example of %.200s", res.GetCount(), at, fmt.Sprint(res.GetSample())))
	}
	return nil
}

// drainOwnees takes the deleted owner from its ownees at a Deployment, a page at a time, until there are none.
func (s *session) drainOwnees(ctx context.Context, j *job, sh *store.Shadow, at store.Location) error {
	names := s.cfg.Peers.Spellings(sh.Name)
	err := s.eachOwnee(ctx, j, at, sh.Type, names, func(o *v1.MetaOwnee) error {
		return s.removeOwner(ctx, at, sh.Type, names, o, "OWNER_DELETED")
	})
	if err != nil {
		return err
	}
	res, err := ask(ctx, s, at, mixin.Peer.CheckIfHasMetaOwnee, &v1.CheckIfHasMetaOwneeRequest{Call: s.call(at, s.cfg.Version), OwnerKind: s.kindOf(sh.Type), OwnerNames: names})
	if err != nil {
		return err
	}
	if res.GetHasOwnee() {
		return notYet(fmt.Sprintf("resources at %s that it owns are not gone yet", at))
	}
	return nil
}

// finishDrain ends the deletion. Something may have come up since; then all is looked at again.
func (s *session) finishDrain(ctx context.Context, j *job) error {
	j.mu.Lock()
	checked, epoch := j.checked, j.epoch
	j.mu.Unlock()
	done, err := s.cfg.Core.FinishDeletion(ctx, j.key.name, j.task.UUID, epoch, checked)
	if done {
		s.finished(ctx, j)
	}
	if err != nil || done {
		return err
	}
	sh, err := s.shadow(ctx, j, store.ShadowDeleting)
	switch {
	case sh == nil:
		return err
	case sh.BlockDeletion:
		return notYet("the service itself blocks the deletion")
	}
	return notYet("references to it are not handled yet")
}

// slowDeletion is how long a deletion may take before its end is worth a line to everybody: somebody may have waited for the name.
const slowDeletion = time.Minute

func (s *session) finished(ctx context.Context, j *job) {
	took, level := time.Since(j.task.TaskTime), slog.LevelDebug
	if took >= slowDeletion {
		level = slog.LevelInfo
	}
	s.log.Log(ctx, level, "references: a deletion is finished, the name is free", "name", j.key.name, "took", took.Round(time.Millisecond).String())
}

// pace is the pause between two pages of a look through all shadows.
const pace = 50 * time.Millisecond

// forget drops what is known of Deployments that have been removed from all resources, so that nobody asks them any more (X35). It looks at one page and
// then at the next.
func (s *session) forget(ctx context.Context, j *job) error {
	shadows, next, err := s.cfg.Core.Shadows(ctx, store.ShadowFilter{After: j.after, Limit: min(s.cfg.Page, 1000)})
	if err != nil {
		return err
	}
	for _, sh := range shadows {
		for _, at := range s.goneFrom(sh) {
			if err := s.forgetAt(ctx, sh, at); err != nil {
				return err
			}
		}
	}
	if j.after = next; next != "" {
		return more(pace)
	}
	return nil
}

// goneFrom returns the locations in a shadow that will not come back. A deletion under way drops them itself.
func (s *session) goneFrom(sh *store.Shadow) (gone []store.Location) {
	if sh.State != store.ShadowActive {
		return nil
	}
	for _, source := range sh.Sources {
		switch at := source.Location; {
		case at == store.Location{}: // referrers here
		case s.hasGone(at):
			gone = append(gone, at)
		case !s.declared(at): // removed while no process ran: this look was too early for it
			s.accept(jobKey{kind: jobForget, at: at}, store.Task{}, nil)
		}
	}
	return gone
}

func (s *session) forgetAt(ctx context.Context, sh *store.Shadow, at store.Location) error {
	questions, err := s.cfg.Core.BeginAttempt(ctx, []string{sh.Name})
	if err != nil {
		return err
	}
	q, found := questions[sh.Name]
	if !found {
		return nil
	}
	var expired []store.Blockade
	for _, b := range sh.Blockades {
		if b.Location == at {
			expired = append(expired, b)
		}
	}
	if err := s.cfg.Core.DropBlockades(ctx, expired); err != nil {
		return err
	}
	if _, err := s.cfg.Core.PruneSource(ctx, q, at, store.Source{Location: at}); err != nil {
		return err
	}
	s.log.WarnContext(ctx, "dropped a source of references whose Deployment has been removed", "name", sh.Name, "peer", at.String())
	return nil
}
