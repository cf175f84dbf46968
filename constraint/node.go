package constraint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Defaults of NodeConfig (spec 10).
const (
	DefaultGrace        = 10 * time.Minute
	DefaultGoneAfter    = 10 * time.Minute
	DefaultDebounce     = 30 * time.Second
	DefaultScanInterval = 10 * time.Second
	DefaultResync       = 10 * time.Minute
	DefaultSweepAfter   = 5 * time.Second
	DefaultCallTimeout  = 5 * time.Second
	DefaultPage         = 500
	DefaultQueue        = 10_000
)

// Default retries of NodeConfig (spec 10).
var (
	DefaultPoll        = Retry{time.Second, time.Minute}
	DefaultDeleteRetry = Retry{5 * time.Second, 5 * time.Minute}
	DefaultAway        = Retry{time.Second, time.Minute}
	DefaultReconnect   = Retry{time.Second, 15 * time.Second}
)

// nodeCore is what a Node asks of its own database: postgres.Store.
type nodeCore interface {
	Feed() *feed.Feed
	Epoch(ctx context.Context) (int64, error)
	BatchGet(ctx context.Context, names []string) ([]*store.Resource, error)
	Shadow(ctx context.Context, name string) (*store.Shadow, error)
	Shadows(ctx context.Context, f store.ShadowFilter) ([]*store.Shadow, string, error)
	ReadTasks(ctx context.Context, c feed.Cursor, shards feed.Range, emit func(store.Task) error) (feed.Read, error)
	RaiseTasks(ctx context.Context, names []string, t store.Tasks) error
	ClearTasks(ctx context.Context, name, uuid, seen string, t store.Tasks) (bool, error)
	NoteFailure(ctx context.Context, name, reason string, next time.Time) error
	Unconfirmed(ctx context.Context, name string) ([]store.Reference, error)
	MarkConfirmed(ctx context.Context, name string, refs []store.Reference) error
	BeginAttempt(ctx context.Context, names []string) (map[string]store.Question, error)
	ExpiredBlockades(ctx context.Context, shards feed.Range, limit int) ([]store.Blockade, error)
	Blockades(ctx context.Context, shards feed.Range) (held int, err error)
	DropBlockades(ctx context.Context, blockades []store.Blockade) error
	PruneSource(ctx context.Context, q store.Question, at store.Location, keep store.Source) (bool, error)
	Suspects(ctx context.Context, candidates []store.Location) ([]store.Location, error)
	BeginSweep(ctx context.Context, at store.Location, epoch int64) error
	FinishDeletion(ctx context.Context, name, uuid string, epoch int64, checked []store.Location) (bool, error)
	HandledReferrers(ctx context.Context, at store.Location, target, uuid string, limit int) ([]store.Incoming, error)
	ReferencesTo(ctx context.Context, at store.Location, after string, limit int) (refs []store.Confirmed, next string, err error)
}

// nodePeers reaches other Deployments: mixin.Peers. The own Deployment is reached in the same way.
type nodePeers interface {
	Peer(at store.Location) (mixin.Peer, error)
	// Call spells names of at as this Deployment imports them.
	Call(at store.Location) (*v1.Call, error)
	// SpellFor spells one of our names for a Deployment. It reports false if that cannot know the name.
	SpellFor(at store.Location, name string) (version, spelled string, ok bool)
	// Spellings are a name of ours in all versions: owner references may have been written in any of them (spec 8.41).
	Spellings(name string) []*v1.Spelling
	// Importers are the Deployments whose resources may refer to ours; Interesting those to which ours may refer, this one among them.
	Importers() []store.Location
	Interesting() []store.Location
}

// NodeConfig says for which Deployment a Node works, and with what. Zero durations and sizes are their defaults.
type NodeConfig struct {
	// Service and Region are the own Deployment; Version is its API version, Ring its number of shards.
	Service, Region, Version string
	Ring                     int
	Registry                 *registry.Registry
	// Core is the own database; Store the full stack on top of it, for ordinary updates and deletes.
	Core  nodeCore
	Store store.Store
	Peers nodePeers

	// Grace is how long an owner that has never been confirmed may be missing before the reference to it is removed (spec 8.29).
	Grace time.Duration
	// GoneAfter is how long after its removal from the registry a Deployment still counts as one that will come back (X35, spec 8.20).
	GoneAfter time.Duration
	// Debounce is the least time between a dropped reference and the question to ownees that follows (spec 8.30).
	Debounce time.Duration
	// ScanInterval is how often expired blockades are looked for.
	ScanInterval time.Duration
	// Resync is how often everything that is due is read again, and the deletions of the others too. It costs little, and mends what was missed.
	Resync time.Duration
	// SweepAfter is how long after the first sight of a new epoch of another Deployment our references to it are sent again. Until that is done, that
	// Deployment asks us before each deletion; so there is no haste, and a peer that has just come back is spared.
	SweepAfter time.Duration
	// CallTimeout bounds one call.
	CallTimeout time.Duration
	// Poll is how often others are asked whether they are done, DeleteRetry how often a refused deletion is tried again. Away is how often one that
	// cannot be reached is tried, Reconnect how soon a broken stream is opened again.
	Poll, DeleteRetry, Away, Reconnect Retry
	// Page is how many referrers are in memory at once for one deletion, Queue how much work may wait in one lane.
	Page, Queue int

	// Metrics, unless nil, holds the node's metrics while it runs.
	Metrics prometheus.Registerer
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

func (c NodeConfig) withDefaults() (NodeConfig, error) {
	switch {
	case c.Service == "" || c.Region == "" || c.Version == "":
		return c, errors.New("constraint node: service, region and version are required")
	case c.Ring <= 0:
		return c, fmt.Errorf("constraint node: ring %d: want the number of shards of the service", c.Ring)
	case c.Registry == nil || c.Core == nil || c.Store == nil || c.Peers == nil:
		return c, errors.New("constraint node: registry, core, store and peers are required")
	}
	c.Grace = cmp.Or(c.Grace, DefaultGrace)
	c.GoneAfter = cmp.Or(c.GoneAfter, DefaultGoneAfter)
	c.Debounce = cmp.Or(c.Debounce, DefaultDebounce)
	c.ScanInterval = cmp.Or(c.ScanInterval, DefaultScanInterval)
	c.Resync = cmp.Or(c.Resync, DefaultResync)
	c.SweepAfter = cmp.Or(c.SweepAfter, DefaultSweepAfter)
	c.CallTimeout = cmp.Or(c.CallTimeout, DefaultCallTimeout)
	c.Poll = cmp.Or(c.Poll, DefaultPoll)
	c.DeleteRetry = cmp.Or(c.DeleteRetry, DefaultDeleteRetry)
	c.Away = cmp.Or(c.Away, DefaultAway)
	c.Reconnect = cmp.Or(c.Reconnect, DefaultReconnect)
	c.Page = cmp.Or(c.Page, DefaultPage)
	c.Queue = cmp.Or(c.Queue, DefaultQueue)
	c.Logger = cmp.Or(c.Logger, slog.Default())
	c.Logger = c.Logger.With("db_service", c.Service, "region", c.Region)
	return c, nil
}

// Node does what references leave to be done after the writes: it confirms, polls, cascades and tidies up (spec 5.2). It works on a range of shards, and
// all methods may be called from any goroutine. What it knows beyond the database is queues and backoff, so it can be stopped at any moment; two nodes on
// the same shards do the same work twice and no harm.
//
// One reader follows the shadows that have work due. Each becomes a job; a job plans which Deployments it has to visit, visits each in that Deployment's
// own lane of the queue, and finishes when all have been visited. The handlers are in
//
//	pending.go     the owner of the shadow: confirmations, meta owners, expired blockades, deletions that were refused
//	deleting.go    the owner of a deleted resource: who is to be told, and when the name is free
//	subscribed.go  the others: they watch for deletions and handle their referrers
type Node struct {
	cfg     NodeConfig
	own     store.Location
	metrics *metrics

	mu     sync.Mutex
	shards feed.Range
	ctx    context.Context // of Run; nil while it does not run
	work   *session        // on shards; nil without any
	ended  sync.WaitGroup
	gone   map[store.Location]time.Time // since when a Deployment is not declared
}

// NewNode returns a node without a range.
func NewNode(cfg NodeConfig) (*Node, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, own: store.Location{Service: cfg.Service, Region: cfg.Region}, gone: map[store.Location]time.Time{}}
	n.metrics = newMetrics(n.pending, n.blockades)
	return n, nil
}

// Run works until ctx is done, and returns after everything it started has. Being told to stop is no error. It may be called once. Nothing is done before the
// topology is known (I39).
func (n *Node) Run(ctx context.Context) error {
	if err := n.cfg.Registry.WaitSynced(ctx); err != nil {
		return nil // told to stop
	}
	if n.cfg.Metrics != nil {
		reg := prometheus.WrapRegistererWith(prometheus.Labels{"db_service": n.cfg.Service, "target_region": n.cfg.Region}, n.cfg.Metrics)
		if err := reg.Register(n.metrics); err != nil {
			return fmt.Errorf("register metrics of references of %s: %w", n.own, err)
		}
		defer reg.Unregister(n.metrics)
	}
	n.mu.Lock()
	n.ctx = ctx
	n.start()
	n.mu.Unlock()
	<-ctx.Done()
	n.mu.Lock() // nobody may start anything any more
	n.work = nil
	n.mu.Unlock()
	n.ended.Wait()
	return nil
}

// UpdateShardRange makes shards the range that the node serves, and returns when nothing works on the range from before any more, or with ctx's error.
func (n *Node) UpdateShardRange(ctx context.Context, shards feed.Range) error {
	if shards.From < 0 || shards.From > shards.To || int(shards.To) > n.cfg.Ring {
		return fmt.Errorf("shard range %s does not fit a ring of %d", shards, n.cfg.Ring)
	}
	n.mu.Lock()
	before := n.work
	if before != nil && n.shards == shards {
		n.mu.Unlock()
		return nil
	}
	n.shards = shards
	if before != nil {
		before.cancel()
	}
	n.start()
	n.mu.Unlock()
	if before == nil {
		return nil
	}
	select {
	case <-before.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of work on other shards than %s: %w", shards, ctx.Err())
	}
}

// start begins to work on n.shards. n.mu is held.
func (n *Node) start() {
	n.work = nil
	if n.ctx == nil || n.ctx.Err() != nil || n.shards.From == n.shards.To {
		return
	}
	ctx, cancel := context.WithCancel(n.ctx)
	s := newSession(n, n.shards, cancel)
	n.work = s
	n.ended.Go(func() {
		defer close(s.done)
		defer cancel()
		s.run(ctx)
	})
}

// pending returns the jobs that are under way, for the metrics.
func (n *Node) pending() []pendingJob {
	n.mu.Lock()
	s := n.work
	n.mu.Unlock()
	if s == nil {
		return nil
	}
	return s.pending()
}

// blockades returns how many tentative blockades are held, as the last scan has counted them, for the metrics.
func (n *Node) blockades() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.work == nil {
		return 0
	}
	return int(n.work.held.Load())
}

func (n *Node) declared(at store.Location) bool {
	_, declared := n.cfg.Registry.View().Deployment(registry.Key(at))
	return declared
}

// hasGone reports whether a Deployment has been away from the registry for so long that it will not come back. One that is only disabled is still declared.
func (n *Node) hasGone(at store.Location) bool {
	declared := n.declared(at)
	n.mu.Lock()
	defer n.mu.Unlock()
	if declared {
		delete(n.gone, at)
		return false
	}
	since, known := n.gone[at]
	if !known {
		since = time.Now()
		n.gone[at] = since
	}
	return time.Since(since) >= n.cfg.GoneAfter
}

// session is the work on one range of shards.
type session struct {
	*Node
	shards   feed.Range
	queue    *queue
	log      *slog.Logger
	handlers map[jobKind]handler
	cancel   context.CancelFunc
	done     chan struct{}
	held     atomic.Int64 // tentative blockades, as last counted

	jobsMu   sync.Mutex
	jobs     map[jobKey]*job
	epochs   map[store.Location]int64 // of other Deployments, as last seen
	unwell   map[store.Location]bool  // could not be reached the last time
	watchers map[store.Location]*watcher
}

func newSession(n *Node, shards feed.Range, cancel context.CancelFunc) *session {
	s := &session{
		Node: n, shards: shards, log: n.cfg.Logger.With("shards", shards.String()), cancel: cancel, done: make(chan struct{}),
		jobs: map[jobKey]*job{}, epochs: map[store.Location]int64{}, unwell: map[store.Location]bool{}, watchers: map[store.Location]*watcher{},
	}
	s.queue = newQueue(n.cfg.Queue, n.cfg.Away, s.failed)
	s.handlers = map[jobKind]handler{
		jobConfirm: {plan: s.planConfirm, visit: s.confirm, finish: s.finishConfirm, retry: n.cfg.Poll, shadow: true},
		jobOwners:  {plan: s.planOwners, visit: s.checkOwners, finish: s.clear(store.CheckOwners), retry: n.cfg.Poll, shadow: true},
		jobOwnees:  {plan: s.planOwnees, visit: s.checkOwnees, finish: s.clear(store.CheckOwnees), retry: n.cfg.Poll, shadow: true, delay: n.cfg.Debounce},
		jobDelete:  {plan: s.planDelete, visit: s.deletePending, finish: s.clear(store.PendingDelete), retry: n.cfg.DeleteRetry, shadow: true},
		jobDrain:   {plan: s.planDrain, visit: s.drain, finish: s.finishDrain, retry: n.cfg.Poll, shadow: true},
		jobExpire:  {lane: callLane, finish: s.expire, retry: n.cfg.Poll},
		jobHandle:  {lane: handleLane, finish: s.handle, retry: n.cfg.Poll},
		jobSweep:   {lane: callLane, finish: s.sweep, retry: n.cfg.Poll, delay: n.cfg.SweepAfter},
		jobForget:  {finish: s.forget, retry: n.cfg.Poll, delay: n.cfg.GoneAfter},
	}
	return s
}

func (s *session) run(ctx context.Context) {
	var parts sync.WaitGroup
	for _, part := range []func(context.Context){s.queue.run, s.followTasks, s.scanBlockades, s.followTopology} {
		parts.Go(func() { part(ctx) })
	}
	parts.Wait()
}

// jobKind is what a job does; it is the label kind of the metrics.
type jobKind string

const (
	jobConfirm jobKind = "confirm"
	jobOwners  jobKind = "check_owners"
	jobOwnees  jobKind = "check_ownees"
	jobDelete  jobKind = "delete"
	jobExpire  jobKind = "expire"
	jobDrain   jobKind = "drain"
	jobHandle  jobKind = "handle"
	jobSweep   jobKind = "sweep"
	jobForget  jobKind = "forget"
)

// Lanes: one for each kind of job, for what needs the own database alone; and for each Deployment one of calls, one of its deletions that are handled here, and
// one of deletions that ask it first.
func ownLane(kind jobKind) laneKey            { return laneKey{kind: "own " + string(kind)} }
func callLane(at store.Location) laneKey      { return laneKey{"call", at} }
func handleLane(at store.Location) laneKey    { return laneKey{"handle", at} }
func deleteLane(first store.Location) laneKey { return laneKey{"delete", first} }

// handler says how jobs of one kind are done. Each part is repeated until it succeeds, so it may be done twice; a missing part does nothing.
type handler struct {
	// plan returns the lanes in which to visit; with finish it asks the own database alone.
	plan func(context.Context, *job) ([]laneKey, error)
	// visit does what is to be done in a lane.
	visit func(ctx context.Context, j *job, at store.Location) error
	// finish ends the job after all visits. After its failure the job is planned again.
	finish func(context.Context, *job) error
	// lane, unless nil, is that of plan and finish: those of a job that involves the Deployment at.
	lane  func(at store.Location) laneKey
	retry Retry
	// delay before the first step.
	delay time.Duration
	// shadow: the job belongs to a shadow of ours, which says why it is not done.
	shadow bool
}

// laneOf is the lane in which a job is planned and finished.
func (h handler) laneOf(key jobKey) laneKey {
	if h.lane != nil {
		return h.lane(key.at)
	}
	return ownLane(key.kind)
}

// jobKey identifies a job: at most one with each runs.
type jobKey struct {
	kind jobKind
	name string
	at   store.Location
}

// job is something to do for one resource.
type job struct {
	key  jobKey
	task store.Task // what was raised; replaced until the job begins, and its own afterwards

	// guarded by session.jobsMu
	own     *work   // plan and finish
	visits  []*work // not all done
	open    int     // visits that are not done
	begun   bool
	planned bool
	partial bool // a lane had no room for a visit
	added   time.Time

	// What the handlers remember between attempts; guarded by mu where visits share it.
	mu        sync.Mutex
	missing   map[store.OwnerReference]time.Time // owners that were not confirmed, since when
	pages     map[store.Location]string          // how far the ownees of a Deployment are done
	blockades []store.Blockade                   // that have expired
	checked   []store.Location                   // the sources that are done when all visits are
	epoch     int64                              // of our feed when the sources were read
	suspects  []store.Location                   // who may have references that a failover has lost
	after     string                             // how far a sweep has come
	stuck     int                                // referrers that cannot be handled now
}

// accept makes a job of a task, unless the same is under way. It returns false when there is no room for it.
func (s *session) accept(key jobKey, task store.Task, fill func(*job)) bool {
	s.jobsMu.Lock()
	defer s.jobsMu.Unlock()
	h := s.handlers[key.kind]
	old := s.jobs[key]
	switch {
	case old == nil:
	case old.task.Seen == task.Seen && old.task.UUID == task.UUID:
		return true
	case !old.begun:
		old.task = task
		return true
	default:
		s.queue.drop(append(old.visits, old.own)) // it has been overtaken: more was raised while it ran
		delete(s.jobs, key)
	}
	j := &job{key: key, task: task, added: time.Now()}
	if old != nil {
		old.mu.Lock()
		j.missing = maps.Clone(old.missing)
		old.mu.Unlock()
	}
	if fill != nil {
		fill(j)
	}
	j.own = &work{job: key, lane: h.laneOf(key), retry: h.retry, run: func(ctx context.Context) error { return s.step(ctx, j, h) }}
	if !s.queue.add(j.own, h.delay) {
		return false
	}
	s.jobs[key] = j
	return true
}

// step plans a job, or finishes it after its visits.
func (s *session) step(ctx context.Context, j *job, h handler) error {
	s.jobsMu.Lock()
	j.begun = true
	planned := j.planned
	s.jobsMu.Unlock()
	if !planned && h.plan != nil {
		lanes, err := h.plan(ctx, j)
		if err != nil {
			return err
		}
		if len(lanes) > 0 {
			return s.visit(j, h, lanes)
		}
	}
	if h.finish != nil {
		if err := h.finish(ctx, j); err != nil {
			s.jobsMu.Lock()
			j.planned = false
			s.jobsMu.Unlock()
			return err
		}
	}
	s.remove(j)
	return nil
}

// visit begins the visits of a job. The last of them ends it.
func (s *session) visit(j *job, h handler, lanes []laneKey) error {
	s.jobsMu.Lock()
	defer s.jobsMu.Unlock()
	if s.jobs[j.key] != j {
		return nil
	}
	j.planned, j.open, j.visits = true, len(lanes), nil
	for _, lane := range lanes {
		w := &work{job: j.key, lane: lane, retry: h.retry}
		w.run = func(ctx context.Context) error {
			err := h.visit(ctx, j, lane.at)
			if err == nil {
				s.visited(j)
			}
			return err
		}
		if s.queue.add(w, 0) {
			j.visits = append(j.visits, w)
		} else {
			s.queue.miss(lane)
			j.partial = true
			j.open--
		}
	}
	s.visitsDone(j)
	return errParked
}

func (s *session) visited(j *job) {
	s.jobsMu.Lock()
	defer s.jobsMu.Unlock()
	j.open--
	s.visitsDone(j)
}

// visitsDone goes on with a job after its last visit. s.jobsMu is held.
func (s *session) visitsDone(j *job) {
	switch {
	case j.open > 0 || s.jobs[j.key] != j:
	case j.partial || !s.queue.add(j.own, 0):
		delete(s.jobs, j.key) // it is read again when there is room
	}
}

func (s *session) remove(j *job) {
	s.jobsMu.Lock()
	defer s.jobsMu.Unlock()
	if s.jobs[j.key] == j {
		delete(s.jobs, j.key)
	}
}

// clear returns a finish that takes t off the shadow. If more was raised meanwhile, that comes as another task.
func (s *session) clear(t store.Tasks) func(context.Context, *job) error {
	return func(ctx context.Context, j *job) error {
		_, err := s.cfg.Core.ClearTasks(ctx, j.key.name, j.task.UUID, j.task.Seen, t)
		return err
	}
}

// errFull stops a read of tasks.
var errFull = errors.New("the queue is full")

// followTasks reads what work is due, now and as it is raised, until ctx is done.
func (s *session) followTasks(ctx context.Context) {
	var cursor feed.Cursor // zero: everything that is due
	var everything time.Time
	step := func(ctx context.Context) (bool, error) {
		if s.queue.takeMissed() || time.Since(everything) >= s.cfg.Resync {
			cursor, everything = feed.Cursor{}, time.Now()
		}
		var full jobKind
		read, err := s.cfg.Core.ReadTasks(ctx, cursor, s.shards, func(t store.Task) error {
			full = s.task(t)
			if full != "" {
				return errFull
			}
			return nil
		})
		switch {
		case errors.Is(err, errFull):
			s.queue.waitRoom(ctx, ownLane(full))
			return true, nil
		case errors.Is(err, feed.ErrCursorLost):
			cursor = feed.Cursor{}
			return true, nil
		case err != nil:
			return false, err
		}
		cursor = read.Cursor
		return read.More, nil
	}
	for failures := 1; ; failures++ {
		began := time.Now()
		err := s.cfg.Core.Feed().Follow(ctx, feed.Interest{Owned: true, Shards: s.shards}, step)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > s.cfg.Reconnect.Max {
			failures = 1
		}
		s.log.WarnContext(ctx, "pending work cannot be read, will be retried", "error", err)
		if !sleep(ctx, s.cfg.Reconnect.wait(failures)) {
			return
		}
	}
}

// task makes jobs of what is due for a shadow. It returns the kind of a job for which there will be room soon; a job that finds none for longer is
// left out, to be read again.
func (s *session) task(t store.Task) jobKind {
	var kinds []jobKind
	if t.State == store.ShadowDeleting {
		kinds = append(kinds, jobDrain)
	} else {
		for task, kind := range map[store.Tasks]jobKind{store.ConfirmBlockades: jobConfirm, store.CheckOwners: jobOwners, store.CheckOwnees: jobOwnees, store.PendingDelete: jobDelete} {
			if t.Tasks&task != 0 {
				kinds = append(kinds, kind)
			}
		}
	}
	for _, kind := range kinds {
		if s.accept(jobKey{kind: kind, name: t.Name}, t, nil) {
			continue
		}
		if s.queue.busy(ownLane(kind)) {
			return kind
		}
		s.queue.miss(ownLane(kind))
	}
	return ""
}

// failed reports work that is not done.
func (s *session) failed(ctx context.Context, w *work, failures int, err error, next time.Time) {
	reason := reasonOf(err)
	kind, name := w.job.kind, w.job.name
	s.metrics.retries.WithLabelValues(string(kind), reason).Inc()
	level := slog.LevelDebug
	var away *unreachableError
	if errors.As(err, &away) {
		s.jobsMu.Lock()
		if !s.unwell[away.at] {
			s.unwell[away.at] = true
			level = slog.LevelWarn
		}
		s.jobsMu.Unlock()
	} else if _, waits := err.(notYet); !waits && failures == 1 { //nolint:errorlint // only as it was returned
		level = slog.LevelWarn
	}
	s.log.Log(ctx, level, "references: not done, will be retried", "kind", kind, "name", name, "reason", reason, "error", err, "next", next)
	// People ask why; the first wait for others is too short to be worth a write.
	if s.handlers[kind].shadow && (failures != 1 || kind == jobDelete) {
		if err := s.cfg.Core.NoteFailure(ctx, name, err.Error(), next); err != nil {
			s.log.DebugContext(ctx, "a failure could not be written down", "name", name, "error", err)
		}
	}
}

// call is a call about names of ours, as version spells them.
func (s *session) call(at store.Location, version string) *v1.Call {
	return &v1.Call{Requester: mixin.WireLocation(s.own), Callee: mixin.WireLocation(at), Version: version}
}

// reached notes that a Deployment answers.
func (s *session) reached(at store.Location) {
	s.jobsMu.Lock()
	was := s.unwell[at]
	delete(s.unwell, at)
	s.jobsMu.Unlock()
	if was {
		s.log.Info("can be reached again", "peer", at.String())
	}
}

// ask makes one call of a Deployment. One that is not declared cannot be reached.
func ask[Req, Res any](ctx context.Context, s *session, at store.Location, method func(mixin.Peer, context.Context, Req) (Res, error), req Req) (res Res, err error) {
	p, err := s.cfg.Peers.Peer(at)
	if err != nil {
		return res, &unreachableError{at, err}
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	if res, err = method(p, ctx, req); err != nil {
		return res, unreachable(at, err)
	}
	s.reached(at)
	return res, nil
}

// sleep returns false when ctx is done.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
