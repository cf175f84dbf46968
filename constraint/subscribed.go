package constraint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// The subscribed-deleting handler (spec 5.2, 3, and 4.4, 1 to 4): deletions of other Deployments are followed, and the referrers here are handled. Those of
// our own are among the tasks, and their drain handles the referrers.

// watcher follows the deletions of one Deployment.
type watcher struct {
	plan   watchPlan
	cancel context.CancelFunc
}

// watchPlan is what a stream depends on.
type watchPlan struct {
	endpoint, version string
	ring              int
}

// followTopology keeps one watcher for each Deployment to whose resources there may be references here, until ctx is done (F58, F59, I40).
func (s *session) followTopology(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	s.lookForGone(store.Location{})
	for e := range s.cfg.Registry.Subscribe(ctx) {
		if removed, ok := e.(registry.DeploymentRemovedEvent); ok {
			s.lookForGone(store.Location(removed.Previous.Key))
		}
		s.watchAll(ctx, &running)
	}
}

// lookForGone looks through all resources, later, for sources that are gone. The node with the first shard does it for all.
func (s *session) lookForGone(at store.Location) {
	if at != (store.Location{}) {
		s.hasGone(at) // the time counts from now
	}
	if s.shards.From == 0 {
		s.accept(jobKey{kind: jobForget, at: at}, store.Task{}, nil)
	}
}

func (s *session) watchAll(ctx context.Context, running *sync.WaitGroup) {
	view := s.cfg.Registry.View()
	wanted := map[store.Location]watchPlan{}
	for _, at := range s.cfg.Peers.Interesting() {
		d, declared := view.Deployment(registry.Key(at))
		if at == s.own || !declared || d.Disabled {
			continue
		}
		call, err := s.cfg.Peers.Call(at)
		if err != nil {
			continue // it has just been removed
		}
		wanted[at] = watchPlan{d.Endpoint, call.GetVersion(), d.Ring}
	}
	for at, w := range s.watchers {
		if wanted[at] != w.plan {
			w.cancel()
			delete(s.watchers, at)
		}
	}
	for at, plan := range wanted {
		if s.watchers[at] != nil {
			continue
		}
		watching, cancel := context.WithCancel(ctx)
		s.watchers[at] = &watcher{plan, cancel}
		running.Go(func() {
			defer cancel()
			s.watch(watching, at, s.scale(plan.ring))
		})
	}
}

// scale returns our part of another ring: each of its shards belongs to one range of ours.
func (s *session) scale(ring int) feed.Range {
	part := func(shard int32) int32 { return int32(int64(shard) * int64(ring) / int64(s.cfg.Ring)) }
	return feed.Range{From: part(s.shards.From), To: part(s.shards.To)}
}

// errResync ends a stream in order to begin it anew.
var errResync = errors.New("everything is read again")

// watch follows the deletions of one Deployment until ctx is done. How far it has come is in memory only: the first message of a new stream has everything
// that is being deleted, so that nothing is missed while we are away (F22, X10).
func (s *session) watch(ctx context.Context, at store.Location, shards feed.Range) {
	if shards.From == shards.To {
		return // a ring smaller than the number of nodes
	}
	token := ""
	for failures := 1; ; failures++ {
		began := time.Now()
		err := s.stream(ctx, at, shards, &token)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errResync):
			token, failures = "", 0
			continue
		case store.CodeOf(err) != store.Unavailable:
			token = "" // it may be what was refused
		}
		if time.Since(began) > s.cfg.Reconnect.Max {
			failures = 1
		}
		if s.lost(at) {
			s.log.WarnContext(ctx, "deletions cannot be followed, will be retried", "peer", at.String(), "error", err)
		}
		s.metrics.retries.WithLabelValues("watch", reasonOf(unreachable(at, err))).Inc()
		if !sleep(ctx, s.cfg.Reconnect.wait(failures)) {
			return
		}
	}
}

// lost notes that a Deployment cannot be reached, and reports whether that is new.
func (s *session) lost(at store.Location) bool {
	s.jobsMu.Lock()
	defer s.jobsMu.Unlock()
	was := s.unwell[at]
	s.unwell[at] = true
	return !was
}

// stream reads one stream. A deletion whose lane is full holds up the stream, and with it nobody else.
func (s *session) stream(ctx context.Context, at store.Location, shards feed.Range, token *string) error {
	peer, err := s.cfg.Peers.Peer(at)
	if err != nil {
		return err
	}
	call, err := s.cfg.Peers.Call(at)
	if err != nil {
		return err
	}
	began := time.Now()
	req := &v1.WatchImportedServiceDeletionsRequest{Call: call, ShardsFrom: shards.From, ShardsTo: shards.To, ResumeToken: *token}
	return peer.WatchImportedServiceDeletions(ctx, req, func(res *v1.WatchImportedServiceDeletionsResponse) error {
		s.reached(at)
		if res.GetReset_() {
			*token = ""
		}
		if shards.From == 0 {
			s.sawEpoch(at, res.GetEpoch())
		}
		for _, d := range res.GetDeleting() {
			for !s.accept(jobKey{kind: jobHandle, name: d.GetName(), at: at}, store.Task{Name: d.GetName(), UUID: d.GetUuid()}, nil) {
				if s.queue.waitRoom(ctx, handleLane(at)); ctx.Err() != nil {
					return ctx.Err()
				}
			}
		}
		*token = cmp.Or(res.GetResumeToken(), *token)
		if time.Since(began) >= s.cfg.Resync {
			return errResync
		}
		return nil
	})
}

// handle handles the referrers here of a resource that another Deployment deletes.
func (s *session) handle(ctx context.Context, j *job) error {
	return s.handleReferrers(ctx, j, j.key.at)
}

// referrer is a local resource that has to be changed because a target of its is deleted.
type referrer struct {
	name, typ string
	// version at which it was found: a later one may refer to a later incarnation of the target.
	version store.Version
	// cascade: it is deleted; otherwise these fields lose the target.
	cascade bool
	fields  []string
}

// writeBatch is how many referrers are deleted in one transaction; unsetBatch how many, with their bodies, are in memory to be changed.
const (
	writeBatch = 100
	unsetBatch = 50
)

// handleReferrers handles one page of the referrers to a deleted resource at a Deployment, the zero Location being this one, and comes back for the next. Nothing
// but a page is in memory, however many there are (X40, R10). What is done already is not found again (X11).
func (s *session) handleReferrers(ctx context.Context, j *job, at store.Location) error {
	found, err := s.cfg.Core.HandledReferrers(ctx, at, j.key.name, j.task.UUID, s.cfg.Page+j.stuck)
	if err != nil {
		return err
	}
	var deletes, unsets []referrer
	for _, r := range merged(found) {
		if r.cascade {
			deletes = append(deletes, r)
		} else {
			unsets = append(unsets, r)
		}
	}
	done, first := 0, error(nil)
	note := func(n int, err error) { done, first = done+n, cmp.Or(first, err) }
	for batch := range s.batches(deletes, writeBatch) {
		note(s.deleteReferrers(ctx, batch))
	}
	for batch := range s.batches(unsets, unsetBatch) {
		note(s.unsetReferrers(ctx, batch, j.key.name))
	}
	// Those that cannot be handled must not hide the others.
	j.stuck = min(len(deletes)+len(unsets)-done, 10*s.cfg.Page)
	if done > 0 {
		return more(0)
	}
	return first
}

// merged joins the references of each referrer, in order. One that is deleted has no use for the fields.
func merged(found []store.Incoming) []referrer {
	var all []referrer
	place := map[string]int{}
	for _, in := range found {
		i, known := place[in.Referrer]
		if !known {
			i = len(all)
			place[in.Referrer] = i
			all = append(all, referrer{name: in.Referrer, typ: in.Type, version: in.Version})
		}
		if in.Behavior.Unsets() {
			all[i].fields = append(all[i].fields, in.Field)
		} else {
			all[i].cascade = true
		}
	}
	return all
}

// batches cuts referrers into batches that one transaction may write: of one policy holder (I41), and not too many.
func (s *session) batches(all []referrer, size int) func(yield func([]referrer) bool) {
	var version *descriptor.Version
	if service, ok := s.cfg.Registry.View().Service(s.cfg.Service); ok {
		version = service.Version(s.cfg.Version)
	}
	holder := func(name string) string {
		if version == nil {
			return name
		}
		n, err := version.ParseName(name)
		if err != nil {
			return name // refused by the store, alone
		}
		return n.HolderName()
	}
	return func(yield func([]referrer) bool) {
		open := map[string][]referrer{}
		for _, r := range all {
			h := holder(r.name)
			open[h] = append(open[h], r)
			if len(open[h]) == size {
				if !yield(open[h]) {
					return
				}
				delete(open, h)
			}
		}
		for _, batch := range open {
			if !yield(batch) {
				return
			}
		}
	}
}

// deleteReferrers deletes what can be deleted, and leaves what is blocked to the owned-pending handler (F67, X12). It returns how many it need not see
// again.
func (s *session) deleteReferrers(ctx context.Context, batch []referrer) (int, error) {
	writes, names := make([]store.Write, len(batch)), make([]string, len(batch))
	for i, r := range batch {
		writes[i] = store.Write{Op: store.Delete, Name: r.name, Type: r.typ, AllowMissing: true, IfVersion: r.version}
		names[i] = r.name
	}
	_, err := s.cfg.Store.BatchWrite(inBackground(ctx), writes)
	code := store.CodeOf(err)
	switch {
	case err == nil:
		s.metrics.handled.WithLabelValues(actionDelete).Add(float64(len(batch)))
		return len(batch), nil
	case ctx.Err() != nil:
		return 0, err
	// A Deployment that a deletion has to ask is away: each will be tried again by itself. If it is our own database, that fails too.
	case code == store.Unavailable, code == store.FailedPrecondition && len(batch) == 1:
		if err := s.cfg.Core.RaiseTasks(ctx, names, store.PendingDelete); err != nil {
			return 0, err
		}
		s.metrics.handled.WithLabelValues(actionDefer).Add(float64(len(batch)))
		return len(batch), nil
	case len(batch) == 1:
		return 0, err
	}
	return halves(batch, func(half []referrer) (int, error) { return s.deleteReferrers(ctx, half) })
}

// unsetReferrers clears the target from the fields of referrers. It returns how many it need not see again.
func (s *session) unsetReferrers(ctx context.Context, batch []referrer, target string) (int, error) {
	names := make([]string, len(batch))
	for i, r := range batch {
		names[i] = r.name
	}
	resources, err := s.cfg.Core.BatchGet(ctx, names)
	if err != nil {
		return 0, err
	}
	var writes []store.Write
	var first error
	for i, r := range resources {
		if r == nil {
			continue // gone since
		}
		if r.Version != batch[i].version {
			first = cmp.Or[error](first, notYet(r.Name+" was changed meanwhile"))
			continue
		}
		w := store.Write{Op: store.Update, Name: r.Name, Type: r.Type, Meta: r.Meta, Body: r.Body, IfVersion: r.Version}
		edited := false
		for _, field := range batch[i].fields {
			body, changed, err := unsetReference(w.Body, field, target)
			if err != nil {
				first = cmp.Or(first, err)
				continue
			}
			w.Body, edited = body, edited || changed
		}
		if !edited {
			first = cmp.Or(first, fmt.Errorf("%s: the fields %q do not name %s, though its references do", r.Name, batch[i].fields, target))
			continue
		}
		writes = append(writes, w)
	}
	n, err := s.update(ctx, writes)
	gone := 0
	for _, r := range resources {
		if r == nil {
			gone++
		}
	}
	return n + gone, cmp.Or(first, err)
}

// update makes ordinary updates, as many at once as go together, and returns how many were made.
func (s *session) update(ctx context.Context, writes []store.Write) (int, error) {
	if len(writes) == 0 {
		return 0, nil
	}
	_, err := s.cfg.Store.BatchWrite(ctx, writes)
	switch {
	case err == nil:
		s.metrics.handled.WithLabelValues(actionUnset).Add(float64(len(writes)))
		return len(writes), nil
	case ctx.Err() != nil, len(writes) == 1, store.CodeOf(err) == store.Unavailable:
		return 0, err
	}
	return halves(writes, func(half []store.Write) (int, error) { return s.update(ctx, half) })
}

// halves tries both halves of what does not go together.
func halves[T any](batch []T, do func([]T) (int, error)) (int, error) {
	m := len(batch) / 2
	n1, err1 := do(batch[:m])
	n2, err2 := do(batch[m:])
	return n1 + n2, cmp.Or(err1, err2)
}

// sawEpoch begins a sweep when the epoch of another Deployment is not the first one, in which nothing can have been lost, and is new to us. The node that
// follows its first shard does it for all.
func (s *session) sawEpoch(at store.Location, epoch int64) {
	if epoch <= 1 {
		return
	}
	s.jobsMu.Lock()
	known := s.epochs[at] == epoch
	s.jobsMu.Unlock()
	if known || !s.accept(jobKey{kind: jobSweep, at: at}, store.Task{Seen: strconv.FormatInt(epoch, 10)}, nil) {
		return // without room: seen again with the next message
	}
	s.jobsMu.Lock()
	s.epochs[at] = epoch
	s.jobsMu.Unlock()
}

// sweep sends one page of all references to a Deployment that may have lost what it knew of them, and comes back for the next. The last one says that this
// was all, as of the epoch that the sweep began with.
func (s *session) sweep(ctx context.Context, j *job) error {
	at := j.key.at
	epoch, err := strconv.ParseInt(j.task.Seen, 10, 64)
	if err != nil {
		return err
	}
	if j.after == "" { // before the first page: a grant of an older epoch could put a reference where the sweep has been
		if err := s.cfg.Core.BeginSweep(ctx, at, epoch); err != nil {
			return err
		}
	}
	refs, next, err := s.cfg.Core.ReferencesTo(ctx, at, j.after, s.cfg.Page)
	if err != nil {
		return err
	}
	for from := 0; from == 0 || from < len(refs); from += mixin.MaxNames {
		page, complete := refs[from:min(from+mixin.MaxNames, len(refs))], int64(0)
		if next == "" && from+len(page) == len(refs) {
			complete = epoch
		}
		missing, err := s.confirmAt(ctx, at, page, complete)
		if err != nil {
			return err
		}
		if err := s.reportMissing(ctx, j, missing); err != nil {
			return err
		}
	}
	if j.after = next; next != "" {
		return more(0)
	}
	s.log.InfoContext(ctx, "all references to a Deployment have been confirmed again", "peer", at.String(), "epoch", epoch)
	return nil
}

// reportMissing reports targets that a failover has lost, unless the referrers have gone meanwhile.
func (s *session) reportMissing(ctx context.Context, j *job, missing []string) error {
	if len(missing) == 0 {
		return nil
	}
	lost := map[string]bool{}
	for _, name := range missing {
		lost[name] = true
	}
	refs, _, err := s.cfg.Core.ReferencesTo(ctx, j.key.at, j.after, s.cfg.Page)
	if err != nil {
		return err
	}
	for _, r := range refs {
		if lost[r.Name] {
			s.dangling(ctx, j.key.at, r)
		}
	}
	return nil
}
