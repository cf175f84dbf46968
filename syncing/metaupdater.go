package syncing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Defaults of MetaUpdaterConfig.
const (
	// DefaultUpdateRate is half of what one ordinary PostgreSQL server was measured to take, so that users keep the other half.
	DefaultUpdateRate = 10_000
	// DefaultSettle is longer than it takes every process of a Deployment to hear of a policy: the change feed is polled each second.
	DefaultSettle = 3 * time.Second
	// DefaultResync is how often everything is looked at without a reason.
	DefaultResync = time.Hour
)

const (
	// walkPage is how many names one step of a walk looks at.
	walkPage = 2000
	// manyWalks at once are replaced by one walk over everything.
	manyWalks = 50
	// measurable is how many changed resources make a rate.
	measurable = 1000
)

// Placer is the local database as the updater sees it: *postgres.Store.
type Placer interface {
	Owned(ctx context.Context, r store.NameRange, limit int) (owned []store.Placement, rest store.NameRange, err error)
	CountOwned(ctx context.Context, r store.NameRange) (int64, error)
	Place(ctx context.Context, placements []store.Placement) (int, error)
	PolicyWalks(ctx context.Context, due bool) ([]store.PolicyWalk, error)
	BeginPolicyWalks(ctx context.Context, walks []store.PolicyWalk) error
	SavePolicyWalk(ctx context.Context, w store.PolicyWalk) (bool, error)
	ForgetPolicyWalks(ctx context.Context, holders []string) error
	SaveRate(ctx context.Context, what string, rowsPerSecond float64) error
}

var _ Placer = (*postgres.Store)(nil)

// MetaUpdaterConfig says what a MetaUpdater works on.
type MetaUpdaterConfig struct {
	// Ring is the number of shards of the service.
	Ring int
	// Set knows the policies. The updater runs it.
	Set *SyncingMetaSet
	// Store is the own database.
	Store Placer
	// Rate is how many resources are changed in a second at most. 0 is DefaultUpdateRate; negative is no limit.
	Rate int
	// Settle is how long after a walk a second one looks for resources that were written meanwhile under the policy before. 0 is DefaultSettle; negative is none.
	Settle time.Duration
	// Resync is how often everything is looked at. 0 is DefaultResync; negative is never.
	Resync time.Duration
	// Metrics, unless nil, holds the updater's metrics while it runs; Labels are put on them.
	Metrics prometheus.Registerer
	Labels  prometheus.Labels
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// MetaUpdater carries policies out: when a policy, or the schema, changes what metadata.syncing must be, it walks the resources that are owned here under the
// holder and gives those that are not so an empty update, one page after the other and not faster than the rate (F82). How far it has come is in
// the database, so another process goes on where this one was killed. It serves the holders in its shards; the policy of the service is in the shard of the empty name.
//
// Two updaters on the same shards do the work of one: an update that finds its resource right already changes nothing.
type MetaUpdater struct {
	cfg     MetaUpdaterConfig
	metrics *policyMetrics
	due     chan struct{} // capacity 1: there may be work

	stepping sync.Mutex // held during a step, so that a new range holds from the next one on

	mu      sync.Mutex
	shards  feed.Range
	known   bool            // what the policies of these shards said before is known to be carried out, or on its way
	changed map[string]bool // holders whose policy may say something else
	walks   map[string]store.PolicyWalk

	late map[string]int // of the worker: resources by holder that its present round, not the first one, has changed
}

// NewMetaUpdater returns an updater that serves no shard yet.
func NewMetaUpdater(cfg MetaUpdaterConfig) (*MetaUpdater, error) {
	if cfg.Ring <= 0 || cfg.Set == nil || cfg.Store == nil {
		return nil, errors.New("syncing: an updater of policies needs a ring, a set and a store")
	}
	cfg.Rate = cmp.Or(cfg.Rate, DefaultUpdateRate)
	cfg.Settle = cmp.Or(cfg.Settle, DefaultSettle)
	cfg.Resync = cmp.Or(cfg.Resync, DefaultResync)
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	u := &MetaUpdater{cfg: cfg, due: make(chan struct{}, 1), changed: map[string]bool{}, walks: map[string]store.PolicyWalk{}, late: map[string]int{}}
	u.metrics = newPolicyMetrics(u.Walks)
	cfg.Set.Connect(u.heard)
	return u, nil
}

// UpdateShardRange implements nodemanager.Node.
func (u *MetaUpdater) UpdateShardRange(_ context.Context, shards descriptor.ShardRange) error {
	u.mu.Lock()
	u.shards, u.known = shards, false
	u.mu.Unlock()
	u.stepping.Lock() // what is under way for a shard that is not ours any more ends
	defer u.stepping.Unlock()
	u.wake()
	return nil
}

// Walks returns what is being carried out, by holder; those that are done are not in it.
func (u *MetaUpdater) Walks() []store.PolicyWalk {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.SortedFunc(maps.Values(u.walks), func(a, b store.PolicyWalk) int { return strings.Compare(a.Holder, b.Holder) })
}

func (u *MetaUpdater) wake() {
	select {
	case u.due <- struct{}{}:
	default:
	}
}

// heard is told by the set.
func (u *MetaUpdater) heard(updates []SyncingMetaUpdate) {
	u.mu.Lock()
	for _, x := range updates {
		u.changed[x.Holder] = true
	}
	u.mu.Unlock()
	u.wake()
}

func (u *MetaUpdater) serves(holder string) bool {
	shard := int32(descriptor.Shard(holder, u.cfg.Ring))
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.shards.From <= shard && shard < u.shards.To
}

// Run works until ctx is done, and returns nil then.
func (u *MetaUpdater) Run(ctx context.Context) error {
	if u.cfg.Metrics != nil {
		reg := prometheus.WrapRegistererWith(u.cfg.Labels, u.cfg.Metrics)
		if err := reg.Register(u.metrics); err != nil {
			return fmt.Errorf("register metrics of policies: %w", err)
		}
		defer reg.Unregister(u.metrics)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return u.cfg.Set.Run(ctx) })
	g.Go(func() error { return u.work(ctx) })
	return g.Wait()
}

func (u *MetaUpdater) work(ctx context.Context) error {
	select {
	case <-u.cfg.Set.Ready():
	case <-ctx.Done():
		return nil
	}
	pace := pacer{perSecond: u.cfg.Rate}
	for retry := (backoff{}); ctx.Err() == nil; {
		err := u.once(ctx, &pace)
		if err == nil || ctx.Err() != nil {
			retry = backoff{}
			continue
		}
		u.metrics.errors.Inc()
		u.cfg.Logger.WarnContext(ctx, "policies are not carried out yet, will be retried", "error", err)
		retry.sleep(ctx)
	}
	return nil
}

// once finds out what is due and works until an error or until ctx is done.
func (u *MetaUpdater) once(ctx context.Context, pace *pacer) error {
	resync := time.NewTimer(u.untilResync())
	defer resync.Stop()
	for {
		if err := u.compare(ctx); err != nil {
			return err
		}
		if err := u.note(ctx); err != nil {
			return err
		}
		walks, err := u.mine(ctx)
		if err != nil {
			return err
		}
		var wait time.Duration
		for _, w := range walks { // a page of each: a large one does not hold up the small ones
			settled, err := u.step(ctx, w, pace)
			if err != nil {
				return err
			}
			if settled > 0 && (wait == 0 || settled < wait) {
				wait = settled
			} else if settled == 0 {
				wait = time.Nanosecond
			}
		}
		timer := time.NewTimer(cmp.Or(wait, time.Minute)) // a walk that another process began is found within that
		select {
		case <-u.due:
		case <-timer.C:
		case <-resync.C:
			err = u.again(ctx)
			resync.Reset(u.untilResync())
		case <-ctx.Done():
			err = ctx.Err()
		}
		timer.Stop()
		if err != nil {
			return err
		}
	}
}

func (u *MetaUpdater) untilResync() time.Duration {
	if u.cfg.Resync < 0 {
		return 1<<63 - 1
	}
	return u.cfg.Resync/2 + rand.N(u.cfg.Resync)
}

// again begins a walk over everything, unless one is under way.
func (u *MetaUpdater) again(ctx context.Context) error {
	if !u.serves("") {
		return nil
	}
	u.mu.Lock()
	_, walking := u.walks[""]
	u.mu.Unlock()
	if walking {
		return nil
	}
	return u.begin(ctx, []store.PolicyWalk{{Says: u.cfg.Set.Says("")}})
}

// compare begins walks for what has changed while nobody listened.
func (u *MetaUpdater) compare(ctx context.Context) error {
	u.mu.Lock()
	shards, done := u.shards, u.known
	u.mu.Unlock()
	if done {
		return nil
	}
	known, err := u.cfg.Store.PolicyWalks(ctx, false)
	if err != nil {
		return err
	}
	says := make(map[string]string, len(known))
	var gone []string
	for _, w := range known {
		says[w.Holder] = w.Says
	}
	var begin []store.PolicyWalk
	for holder, now := range u.cfg.Set.All() {
		was, found := says[holder]
		delete(says, holder)
		if (was != now || !found && holder == "") && u.serves(holder) {
			begin = append(begin, store.PolicyWalk{Holder: holder, Says: now})
		}
	}
	for holder := range says {
		if u.serves(holder) {
			gone = append(gone, holder)
		}
	}
	if len(gone) > 0 {
		if err := u.cfg.Store.ForgetPolicyWalks(ctx, gone); err != nil {
			return err
		}
	}
	if err := u.begin(ctx, begin); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.known = u.shards == shards
	return nil
}

// begin begins walks. Instead of many small ones there is one over everything, which looks at the same resources.
func (u *MetaUpdater) begin(ctx context.Context, walks []store.PolicyWalk) error {
	if len(walks) == 0 {
		return nil
	}
	if len(walks) > manyWalks && u.serves("") {
		walks = slices.DeleteFunc(walks, func(w store.PolicyWalk) bool { return w.Holder == "" })
		for i := range walks {
			walks[i].Done = true
		}
		walks = append(walks, store.PolicyWalk{Says: u.cfg.Set.Says("")})
	}
	for _, w := range walks {
		delete(u.late, w.Holder)
	}
	return u.cfg.Store.BeginPolicyWalks(ctx, walks)
}

// note begins walks for what the set has told of.
func (u *MetaUpdater) note(ctx context.Context) error {
	u.mu.Lock()
	changed := maps.Clone(u.changed)
	u.mu.Unlock()
	var begin []store.PolicyWalk
	for holder := range changed {
		if u.serves(holder) {
			begin = append(begin, store.PolicyWalk{Holder: holder, Says: u.cfg.Set.Says(holder)})
		}
	}
	says := make(map[string]string, len(begin))
	for _, w := range begin {
		says[w.Holder] = w.Says
	}
	if err := u.begin(ctx, begin); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for holder, said := range says {
		if u.cfg.Set.Says(holder) == said {
			delete(u.changed, holder)
		} else {
			u.wake() // it has changed again meanwhile
		}
	}
	for holder := range changed {
		if shard := int32(descriptor.Shard(holder, u.cfg.Ring)); shard < u.shards.From || shard >= u.shards.To {
			delete(u.changed, holder)
		}
	}
	return nil
}

// mine returns the walks that are due in the updater's shards.
func (u *MetaUpdater) mine(ctx context.Context) ([]store.PolicyWalk, error) {
	walks, err := u.cfg.Store.PolicyWalks(ctx, true)
	if err != nil {
		return nil, err
	}
	walks = slices.DeleteFunc(walks, func(w store.PolicyWalk) bool { return !u.serves(w.Holder) })
	u.mu.Lock()
	defer u.mu.Unlock()
	clear(u.walks)
	for _, w := range walks {
		u.walks[w.Holder] = w
	}
	return walks, nil
}

// step looks at one page of a walk. It returns how long the walk must rest before the next one; 0 is not at all.
func (u *MetaUpdater) step(ctx context.Context, w store.PolicyWalk, pace *pacer) (time.Duration, error) {
	u.stepping.Lock()
	defer u.stepping.Unlock()
	if !u.serves(w.Holder) {
		return 0, nil
	}
	if w.Round > 1 && w.After == "" {
		if rest := u.cfg.Settle - time.Since(w.Updated); rest > 0 {
			return rest, nil
		}
	}
	left := store.Below(w.Holder)
	if w.Round == 1 && w.After == "" {
		total, err := u.cfg.Store.CountOwned(ctx, left)
		if err != nil {
			return 0, err
		}
		w.Total = total
	}
	left.From = cmp.Or(w.After, left.From)
	began := time.Now()
	owned, rest, err := u.cfg.Store.Owned(ctx, left, walkPage)
	if err != nil {
		return 0, err
	}
	stale, misplaced := u.stale(owned)
	changed := 0
	for batch := range slices.Chunk(stale, store.MaxBatch) {
		if err := pace.wait(ctx, len(batch)); err != nil {
			return 0, err
		}
		n, err := u.cfg.Store.Place(ctx, batch)
		if err != nil {
			return 0, fmt.Errorf("carry out the policy of %q: %w", w.Holder, err)
		}
		changed += n
	}
	w.After, w.Checked, w.Changed = rest.From, w.Checked+int64(len(owned)), w.Changed+int64(changed)
	if w.Round == 1 {
		w.Misplaced += misplaced
	}
	u.metrics.checked.Add(float64(len(owned)))
	u.metrics.changed.Add(float64(changed))
	if changed >= measurable {
		if err := u.cfg.Store.SaveRate(ctx, RatePolicy, float64(changed)/time.Since(began).Seconds()); err != nil {
			return 0, err
		}
	}
	if w.Round > 1 {
		u.late[w.Holder] += changed
	}
	if rest == (store.NameRange{}) {
		if u.cfg.Settle < 0 || w.Round > 1 && u.late[w.Holder] == 0 {
			w.Done = true // a late round with nothing to do: nobody writes under the policy before any more
		} else {
			w.Round++
		}
		delete(u.late, w.Holder)
	}
	current, err := u.cfg.Store.SavePolicyWalk(ctx, w)
	if err != nil || !current {
		return 0, err
	}
	u.mu.Lock()
	u.walks[w.Holder] = w
	if w.Done {
		delete(u.walks, w.Holder)
	}
	u.mu.Unlock()
	if w.Done && w.Changed+w.Misplaced > 0 {
		u.cfg.Logger.InfoContext(ctx, "policy carried out", "holder", w.Holder, "checked", w.Checked, "changed", w.Changed, "misplaced", w.Misplaced)
	}
	return 0, nil
}

// stale returns what must be placed anew among owned, and counts what belongs elsewhere by now.
func (u *MetaUpdater) stale(owned []store.Placement) (stale []store.Placement, misplaced int64) {
	for _, p := range owned {
		owner, regions, ok := u.cfg.Set.Expected(p.Name, p.Type)
		switch {
		case !ok:
		case owner != p.OwningRegion:
			misplaced++ // only its owner may let go of it, and nobody hands it over
		case !slices.Equal(regions, p.Regions):
			p.Regions = regions
			stale = append(stale, p)
		}
	}
	return stale, misplaced
}

// pacer spreads work: n units cost n/perSecond.
type pacer struct {
	perSecond int // no limit unless positive
	next      time.Time
}

// wait returns when n more units may begin.
func (p *pacer) wait(ctx context.Context, n int) error {
	if p.perSecond <= 0 {
		return ctx.Err()
	}
	now := time.Now()
	at := p.next
	if at.Before(now) {
		at = now
	}
	p.next = at.Add(time.Duration(float64(n) / float64(p.perSecond) * float64(time.Second)))
	timer := time.NewTimer(at.Sub(now))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// RatePolicy names the measured rate of resources whose regions are changed.
const RatePolicy = "policy"

// policyMetrics are those of a MetaUpdater.
type policyMetrics struct {
	walks            func() []store.PolicyWalk
	checked, changed prometheus.Counter
	errors           prometheus.Counter
	pending, left    *prometheus.Desc
	misplaced        *prometheus.Desc
}

func newPolicyMetrics(walks func() []store.PolicyWalk) *policyMetrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "dbcontroller_policy_" + name, Help: help})
	}
	return &policyMetrics{
		walks:   walks,
		checked: counter("checked_resources_total", "Resources that were compared with the policy that governs them."),
		changed: counter("changed_resources_total", "Resources whose metadata.syncing was changed because of a policy."),
		errors:  counter("errors_total", "Failures while policies were carried out; each is repeated."),
		pending: prometheus.NewDesc("dbcontroller_policy_walks", "Policies that are being carried out.", nil, nil),
		left:    prometheus.NewDesc("dbcontroller_policy_unchecked_resources", "Resources that are still to be compared with a changed policy.", nil, nil),
		misplaced: prometheus.NewDesc("dbcontroller_policy_misplaced_resources",
			"Resources, among those just compared, that belong to another region by a policy that is being carried out.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (m *policyMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range []prometheus.Counter{m.checked, m.changed, m.errors} {
		c.Describe(ch)
	}
	ch <- m.pending
	ch <- m.left
	ch <- m.misplaced
}

// Collect implements prometheus.Collector.
func (m *policyMetrics) Collect(ch chan<- prometheus.Metric) {
	walks := m.walks()
	var left, misplaced int64
	for _, w := range walks {
		if w.Round == 1 {
			left += max(0, w.Total-w.Checked)
		}
		misplaced += w.Misplaced
	}
	for _, c := range []prometheus.Counter{m.checked, m.changed, m.errors} {
		c.Collect(ch)
	}
	ch <- prometheus.MustNewConstMetric(m.pending, prometheus.GaugeValue, float64(len(walks)))
	ch <- prometheus.MustNewConstMetric(m.left, prometheus.GaugeValue, float64(left))
	ch <- prometheus.MustNewConstMetric(m.misplaced, prometheus.GaugeValue, float64(misplaced))
}
