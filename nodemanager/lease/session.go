package lease

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	coordinationclient "k8s.io/client-go/kubernetes/typed/coordination/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/dbcontroller/db-controller/nodemanager"
)

// session is one time of being a member.
type session struct {
	cfg      *Config
	id       string
	previous string
	renewals coordinationclient.LeaseInterface
	others   coordinationclient.LeaseInterface
	log      *slog.Logger

	observer *observer
	changes  chan struct{}
	dirty    chan struct{} // a report is to be published

	// Of the goroutine that joins, renews and leaves.
	own       map[string]*coordinationv1.Lease // by kind, as last written
	strangers map[string]stranger              // by name: other holders of our Leases

	mu      sync.Mutex
	reports map[string]nodemanager.Report
	status  map[string]func() []byte
	unsaid  map[string]bool // kinds whose report is not published yet
	renewed time.Time       // when the last renewal that succeeded was asked for
	timer   *time.Timer     // fires when it was too long ago
	stop    context.CancelFunc
	isLost  bool
	lost    chan struct{}
	leader  string
	leads   bool
	synced  bool // the watch has told what there is
}

// stranger is another holder of our Lease, which we wait to see dead.
type stranger struct {
	holder  string
	version string
	since   time.Time
	dead    bool
}

// errTaken means that another identity holds our Lease.
var errTaken = errors.New("another process has this replica's Lease")

func newSession(cfg *Config, id, previous string, renewals, others coordinationclient.LeaseInterface) *session {
	return &session{
		cfg: cfg, id: id, previous: previous, renewals: renewals, others: others, log: cfg.Logger.With("member", id),
		observer: newObserver(id, memberName(cfg.Prefix, cfg.Kinds[0], cfg.Replica), cfg.Timing.Lease),
		changes:  make(chan struct{}, 1), dirty: make(chan struct{}, 1),
		own: map[string]*coordinationv1.Lease{}, strangers: map[string]stranger{},
		reports: map[string]nodemanager.Report{}, status: map[string]func() []byte{}, unsaid: map[string]bool{}, lost: make(chan struct{}),
	}
}

// join takes the Leases, and returns whether it has before ctx was done.
func (s *session) join(ctx context.Context) bool {
	for waits := 0; ; waits++ {
		asked, err := time.Now(), error(nil)
		for _, kind := range s.cfg.Kinds { // all of them: who holds several dies once
			err = errors.Join(err, s.acquire(ctx, kind))
		}
		if err == nil {
			s.renewed = asked
			s.depose(ctx)
			return true
		}
		if ctx.Err() == nil && waits%5 == 0 {
			s.log.WarnContext(ctx, "cannot join yet; trying again", "error", err)
		}
		select {
		case <-time.After(s.cfg.Timing.RetryPeriod):
		case <-ctx.Done():
			return false
		}
	}
}

// acquire makes the Lease of a kind ours, or renews it. Another holder must be dead: it must not have changed it for as long as it lasts.
func (s *session) acquire(ctx context.Context, kind string) error {
	name := memberName(s.cfg.Prefix, kind, s.cfg.Replica)
	ctx, cancel := s.request(ctx)
	defer cancel()
	l, err := s.renewals.Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return s.write(ctx, kind, nil)
	case err != nil:
		return fmt.Errorf("look at Lease %s: %w", name, err)
	}
	holder := ""
	if l.Spec.HolderIdentity != nil {
		holder = *l.Spec.HolderIdentity
	}
	if holder != "" && holder != s.id && holder != s.previous {
		lasts := s.cfg.Timing.Lease
		if d := l.Spec.LeaseDurationSeconds; d != nil && *d > 0 {
			lasts = time.Duration(*d) * time.Second
		}
		was, known := s.strangers[name]
		if !known || was.version != l.ResourceVersion {
			was = stranger{holder: holder, version: l.ResourceVersion, since: time.Now()}
		}
		was.dead = time.Since(was.since) > lasts
		s.strangers[name] = was
		if !was.dead {
			return fmt.Errorf("lease %s is held by %s: %w", name, holder, errTaken)
		}
	}
	return s.write(ctx, kind, l)
}

// depose makes the leader's Lease free if it is that of a process whose place this one has taken: an election begins to count only now, and that one is known to be dead.
func (s *session) depose(ctx context.Context) {
	if len(s.strangers) == 0 {
		return
	}
	ctx, cancel := s.request(ctx)
	defer cancel()
	l, err := s.renewals.Get(ctx, leaderName(s.cfg.Prefix), metav1.GetOptions{})
	if err != nil || l.Spec.HolderIdentity == nil {
		return // then an election takes its time
	}
	for _, was := range s.strangers {
		if was.dead && *l.Spec.HolderIdentity == was.holder {
			l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds = new(""), new(int32(1)) // as one who resigns leaves it
			_, err := s.renewals.Update(ctx, l, metav1.UpdateOptions{})
			s.log.InfoContext(ctx, "the leader was this replica's last process, which is dead", "leader", was.holder, "error", err)
			return
		}
	}
}

func (s *session) request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.cfg.Timing.RenewDeadline/2)
}

// write writes the Lease of a kind over what was there, nil for nothing.
func (s *session) write(ctx context.Context, kind string, was *coordinationv1.Lease) error {
	s.mu.Lock()
	report, status := s.reports[kind], s.status[kind]
	unsaid := s.unsaid[kind]
	s.unsaid[kind] = false
	s.mu.Unlock()
	if status != nil {
		report.Status = status()
	}
	said, err := json.Marshal(report)
	if err != nil {
		return fmt.Errorf("write report of %s: %w", kind, err)
	}
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: memberName(s.cfg.Prefix, kind, s.cfg.Replica)}}
	if was != nil {
		l = was.DeepCopy()
	}
	s.label(&l.ObjectMeta, roleMember, kind)
	metav1.SetMetaDataAnnotation(&l.ObjectMeta, annotationReport, string(said))
	now, seconds := metav1.NowMicro(), int32(s.cfg.Timing.Lease/time.Second)
	if was == nil || l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity != s.id {
		l.Spec.AcquireTime = &now
	}
	l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds, l.Spec.RenewTime = &s.id, &seconds, &now
	var written *coordinationv1.Lease
	if was == nil {
		written, err = s.renewals.Create(ctx, l, metav1.CreateOptions{})
	} else {
		written, err = s.renewals.Update(ctx, l, metav1.UpdateOptions{})
	}
	if err != nil {
		s.mu.Lock()
		s.unsaid[kind] = s.unsaid[kind] || unsaid
		s.mu.Unlock()
		return fmt.Errorf("write Lease %s: %w", l.Name, err)
	}
	s.own[kind] = written
	return nil
}

func (s *session) label(o *metav1.ObjectMeta, role, kind string) {
	metav1.SetMetaDataLabel(o, labelRing, s.cfg.Prefix)
	metav1.SetMetaDataLabel(o, labelRole, role)
	if kind != "" {
		metav1.SetMetaDataLabel(o, labelKind, kind)
	}
}

// renew writes the Lease of a kind that is ours. One that was deleted or edited by hand is written anew.
func (s *session) renew(ctx context.Context, kind string) error {
	asking, cancel := s.request(ctx)
	defer cancel()
	err := s.write(asking, kind, s.own[kind])
	if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		return err
	}
	s.log.InfoContext(ctx, "the Lease is not as it was written last", "kind", kind)
	return s.acquire(ctx, kind)
}

// keepRenewed renews the Leases until ctx is done or the membership is lost.
func (s *session) keepRenewed(ctx context.Context) {
	tick := time.NewTicker(s.cfg.Timing.RetryPeriod)
	defer tick.Stop()
	living := 0
	for {
		all, asked := false, time.Now()
		select {
		case <-tick.C:
			all, asked = true, time.Now()
		case <-s.dirty:
		case <-s.lost:
			return
		case <-ctx.Done():
			return
		}
		var failed error
		for _, kind := range s.cfg.Kinds {
			if !all && !s.toSay(kind) {
				continue
			}
			if err := s.renew(ctx, kind); err != nil {
				failed = errors.Join(failed, err)
			}
		}
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(failed, errTaken):
			s.log.ErrorContext(ctx, "membership is lost: is there another process of this name?", "error", failed)
			s.lose()
			return
		case failed != nil:
			s.log.WarnContext(ctx, "renewal failed; trying again", "error", failed)
		case all:
			s.renewedAt(asked)
		}
		// Who dies does so in silence: somebody has to look.
		if n := s.observer.living(); n != living {
			living = n
			s.tell()
		}
	}
}

func (s *session) toSay(kind string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unsaid[kind]
}

// arm begins to count: stop is called when renewals have failed for too long.
func (s *session) arm(stop context.CancelFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop = stop
	s.timer = time.AfterFunc(time.Until(s.renewed.Add(s.cfg.Timing.RenewDeadline)), s.lose)
}

// disarm ends counting, and says whether the membership was lost before.
func (s *session) disarm() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
	return s.isLost
}

// renewedAt notes a renewal that was asked for then. One that was answered after the deadline comes too late: others may know better.
func (s *session) renewedAt(asked time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if left := time.Until(asked.Add(s.cfg.Timing.RenewDeadline)); !s.isLost && left > 0 && s.timer.Stop() {
		s.renewed = asked
		s.timer.Reset(left)
	}
}

func (s *session) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isLost {
		s.isLost, s.leads = true, false
		close(s.lost)
		s.stop()
	}
}

// leave takes the member off, as well as it goes: its Leases run out anyway. It looks at them first: what was being written when the member was told to stop may
// have come through or not.
func (s *session) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Timing.RenewDeadline/2)
	defer cancel()
	for kind := range s.own {
		if err := s.leaveKind(ctx, kind); err != nil {
			s.log.InfoContext(ctx, "the Lease is left to run out", "kind", kind, "error", err)
		}
	}
}

func (s *session) leaveKind(ctx context.Context, kind string) error {
	l, err := s.renewals.Get(ctx, memberName(s.cfg.Prefix, kind, s.cfg.Replica), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return err
	case l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity != s.id:
		return nil // it is another's by now
	}
	if s.toSay(kind) { // that it is leaving, so that nobody waits for it to come back
		if err := s.write(ctx, kind, l); err != nil {
			return err
		}
		l = s.own[kind]
	}
	err = s.renewals.Delete(ctx, l.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &l.UID, ResourceVersion: &l.ResourceVersion}})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// watch sees the Leases of the ring, with one watch, until ctx is done.
func (s *session) watch(ctx context.Context) {
	selector := labels.SelectorFromSet(labels.Set{labelRing: s.cfg.Prefix}).String()
	see := func(o any, deleted bool) {
		if unknown, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = unknown.Obj
		}
		if l, ok := o.(*coordinationv1.Lease); ok && s.observer.see(l, deleted, time.Now()) {
			s.tell()
		}
	}
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.LabelSelector = selector
				return s.others.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
				o.LabelSelector = selector
				return s.others.Watch(ctx, o)
			},
		},
		ObjectType: &coordinationv1.Lease{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { see(o, false) },
			UpdateFunc: func(_, o any) { see(o, false) },
			DeleteFunc: func(o any) { see(o, true) },
		},
	})
	var waiting sync.WaitGroup
	defer waiting.Wait()
	waiting.Go(func() {
		if cache.WaitForCacheSync(ctx.Done(), controller.HasSynced) {
			s.mu.Lock()
			s.synced = true
			s.mu.Unlock()
			s.tell()
		}
	})
	controller.RunWithContext(ctx)
}

// stand stands for election until ctx is done.
func (s *session) stand(ctx context.Context) {
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: s.cfg.Namespace, Name: leaderName(s.cfg.Prefix)},
		Client:     leases{s.renewals},
		LockConfig: resourcelock.ResourceLockConfig{Identity: s.id},
		Labels:     map[string]string{labelRing: s.cfg.Prefix, labelRole: roleLeader},
	}
	is := func(leads bool) {
		s.mu.Lock()
		s.leads = leads && !s.isLost
		s.mu.Unlock()
		s.tell()
	}
	for ctx.Err() == nil {
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: lock, Name: lock.LeaseMeta.Name, ReleaseOnCancel: true,
			LeaseDuration: s.cfg.Timing.Lease, RenewDeadline: s.cfg.Timing.RenewDeadline,
			// Election waits up to 2.2 of these between looks; with half a period it is not behind the other renewals.
			RetryPeriod: s.cfg.Timing.RetryPeriod / 2,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(context.Context) {},
				OnStoppedLeading: func() { is(false) },
				OnNewLeader: func(id string) {
					s.mu.Lock()
					s.leader = id
					s.mu.Unlock()
					is(id == s.id)
				},
			},
		})
		if err != nil {
			s.log.ErrorContext(ctx, "no leader can be elected", "error", err)
			return
		}
		elector.Run(ctx)
	}
}

// leases is what a LeaseLock asks for: it says the namespace again.
type leases struct {
	coordinationclient.LeaseInterface
}

func (l leases) Leases(string) coordinationclient.LeaseInterface { return l.LeaseInterface }

// sweep removes, as leader, the Leases of those who did not.
func (s *session) sweep(ctx context.Context) {
	tick := time.NewTicker(s.cfg.Timing.Lease)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if !s.leading() {
			continue
		}
		for _, l := range s.observer.longDead() {
			asking, cancel := s.request(ctx)
			err := s.others.Delete(asking, l.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &l.UID, ResourceVersion: &l.ResourceVersion}})
			cancel()
			if err == nil {
				s.log.InfoContext(ctx, "removed the Lease of a dead member", "lease", l.Name)
			}
		}
	}
}

// tell says that views may have changed.
func (s *session) tell() {
	select {
	case s.changes <- struct{}{}:
	default:
	}
}

func (s *session) leading() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leads && s.synced && !s.isLost
}

// Member implements nodemanager.Session.
func (s *session) Member() string { return s.id }

// Report implements nodemanager.Session.
func (s *session) Report(kind string, r nodemanager.Report) {
	r.Nodes = slices.Clone(r.Nodes)
	s.mu.Lock()
	s.reports[kind], s.unsaid[kind] = r, true
	s.mu.Unlock()
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// Tell implements nodemanager.Session.
func (s *session) Tell(kind string, status func() []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status[kind] = status
}

// View implements nodemanager.Session.
func (s *session) View(kind string) nodemanager.View {
	v := s.observer.view(kind)
	v.Leading = s.leading()
	s.mu.Lock()
	v.Leader = s.leader
	s.mu.Unlock()
	return v
}

// Changes implements nodemanager.Session.
func (s *session) Changes() <-chan struct{} { return s.changes }

// Publish implements nodemanager.Session.
func (s *session) Publish(ctx context.Context, kind string, plan nodemanager.Plan, after int64) error {
	was, version := s.observer.planLease(kind)
	if version != after {
		return nodemanager.ErrConflict
	}
	said, err := json.Marshal(plan)
	if err != nil {
		return fmt.Errorf("write plan of %s: %w", kind, err)
	}
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: planName(s.cfg.Prefix, kind)}}
	if was != nil {
		l = was.DeepCopy()
	}
	s.label(&l.ObjectMeta, rolePlan, kind)
	metav1.SetMetaDataAnnotation(&l.ObjectMeta, annotationPlan, string(said))
	now := metav1.NowMicro()
	l.Spec.HolderIdentity, l.Spec.RenewTime = &s.id, &now // for people to read
	ctx, cancel := s.request(ctx)
	defer cancel()
	if was == nil {
		l, err = s.create(ctx, l)
	} else {
		l, err = s.others.Update(ctx, l, metav1.UpdateOptions{})
	}
	switch {
	case apierrors.IsNotFound(err):
		s.observer.planGone(kind)
		s.tell()
		return nodemanager.ErrConflict
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		return nodemanager.ErrConflict
	case err != nil:
		return fmt.Errorf("publish plan %d of %s: %w", plan.Version, kind, err)
	}
	if s.observer.see(l, false, time.Now()) {
		s.tell()
	}
	return nil
}

// create creates the Lease of a plan. One that is there without its labels, which the watch does not show, is put right.
func (s *session) create(ctx context.Context, l *coordinationv1.Lease) (*coordinationv1.Lease, error) {
	created, err := s.others.Create(ctx, l, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return created, err
	}
	there, getErr := s.others.Get(ctx, l.Name, metav1.GetOptions{})
	if getErr != nil || there.Labels[labelRing] == s.cfg.Prefix && there.Labels[labelRole] == rolePlan {
		return nil, err
	}
	l.ResourceVersion = there.ResourceVersion
	return s.others.Update(ctx, l, metav1.UpdateOptions{})
}

// Lost implements nodemanager.Session.
func (s *session) Lost() <-chan struct{} { return s.lost }

// Grace implements nodemanager.Session.
func (s *session) Grace() time.Duration { return s.cfg.Timing.Lease - s.cfg.Timing.RenewDeadline }
