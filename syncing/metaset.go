package syncing

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// SyncingMeta is what metadata.syncing must be of the resources of one type under one policy holder that are owned here.
type SyncingMeta struct {
	// ControlRegion owns those without a region in their name; empty if no policy says so.
	ControlRegion string
	// Regions of those owned here.
	Regions []string
}

// SyncingMetaUpdate says that the SyncingMeta of one holder and type is another now.
type SyncingMetaUpdate struct {
	// Holder is empty for what the policy of the service decides.
	Holder, Type string
	Meta         SyncingMeta
	// Gone: the holder has no policy any more, or is not there any more; what is above it decides.
	Gone bool
}

// MetaSetConfig says what a SyncingMetaSet watches. All of it is required but for the Logger.
type MetaSetConfig struct {
	Service, Region string
	// Version is the schema in force: another pointer when it is another one.
	Version func() *descriptor.Version
	// Holders lists the policy holders, owned ones and copies.
	Holders store.Reader
	// Changes tells of changes of them.
	Changes *feed.Feed
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// SyncingMetaSet knows the policy of every policy holder that is seen here, owned or copied, and that of the service. It collects a full
// snapshot first and maintains it from then on (F80, F81). It never writes resources.
//
// All methods may be called from any goroutine. Listeners are called in the goroutine that found the change, one at a time, and must not call the set's Run or Connect.
type SyncingMetaSet struct {
	cfg   MetaSetConfig
	ready chan struct{} // closed when the first snapshot is complete

	telling   sync.Mutex // held while a change is made and told, so that listeners hear of changes in their order
	listeners []func([]SyncingMetaUpdate)

	mu       sync.RWMutex
	version  *descriptor.Version
	policies map[string]*descriptor.Policy // by holder; nil: it has no policy of its own
}

// NewSyncingMetaSet returns an empty set.
func NewSyncingMetaSet(cfg MetaSetConfig) *SyncingMetaSet {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &SyncingMetaSet{cfg: cfg, ready: make(chan struct{}), version: cfg.Version(), policies: map[string]*descriptor.Policy{}}
}

// Connect makes listener hear of what changes after the first snapshot: all updates of one change at once.
func (m *SyncingMetaSet) Connect(listener func([]SyncingMetaUpdate)) {
	m.telling.Lock()
	defer m.telling.Unlock()
	m.listeners = append(m.listeners, listener)
}

// Ready is closed when the first snapshot is complete. What the set answers before is not to be relied on.
func (m *SyncingMetaSet) Ready() <-chan struct{} { return m.ready }

// Meta returns what the policy of a holder, or that of the service for an empty name, decides for a type. It reports false if the holder has no policy of its own, is
// not known, or there is no such type.
func (m *SyncingMetaSet) Meta(holder, typ string) (SyncingMeta, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	t := m.version.Type(typ)
	if t == nil {
		return SyncingMeta{}, false
	}
	p, ok := m.policy(holder)
	if !ok {
		return SyncingMeta{}, false
	}
	return m.meta(t, p), true
}

// policy is called with mu held.
func (m *SyncingMetaSet) policy(holder string) (*descriptor.Policy, bool) {
	if holder == "" {
		if m.version.Service == nil {
			return nil, false
		}
		return m.version.Service.Policy, true
	}
	p := m.policies[holder]
	return p, p != nil
}

func (m *SyncingMetaSet) meta(t *descriptor.Type, p *descriptor.Policy) SyncingMeta {
	meta := SyncingMeta{Regions: regionsFor(t, p, m.cfg.Region)}
	if p != nil {
		meta.ControlRegion = p.DefaultControlRegion()
	}
	return meta
}

// regionsFor is what the store's layer writes: a resource that no region may hold stays with its owner.
func regionsFor(t *descriptor.Type, p *descriptor.Policy, owner string) []string {
	if regions := descriptor.RegionsFor(t, p, owner); len(regions) > 0 {
		return regions
	}
	return []string{owner}
}

// Expected returns what metadata.syncing of a name must be if it is owned here, and the region to which it belongs. It reports false if a policy holder above it is not
// here, so that nothing can be said.
func (m *SyncingMetaSet) Expected(name, typ string) (owner string, regions []string, ok bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.version.ParseName(name)
	if err != nil || n.Type.Name != typ {
		return "", nil, false // of a schema before this one: nothing governs it
	}
	var policy *descriptor.Policy
	for holder := n.HolderName(); holder != "" && policy == nil; {
		p, known := m.policies[holder]
		h, err := m.version.ParseName(holder)
		if !known || err != nil {
			return "", nil, false
		}
		policy, holder = p, h.HolderName()
	}
	if policy == nil {
		policy = m.version.Service.Policy
	}
	owner, governed := descriptor.OwningRegion(n, policy)
	if !governed {
		owner = m.cfg.Region
	}
	return owner, regionsFor(n.Type, policy, m.cfg.Region), true
}

// Says is a digest of all that the policy of a holder decides about resources owned here; empty if it has none of its own.
func (m *SyncingMetaSet) Says(holder string) string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.says(holder)
}

func (m *SyncingMetaSet) says(holder string) string {
	p, ok := m.policy(holder)
	if !ok {
		return ""
	}
	h := fnv.New128a()
	for _, t := range m.version.Types {
		meta := m.meta(t, p)
		_, _ = fmt.Fprintf(h, "%q %q %q %q\n", t.Name, t.Patterns, meta.ControlRegion, meta.Regions)
	}
	if holder == "" {
		for _, t := range m.version.Types { // of these, all rows must be looked at when it changes
			_, _ = io.WriteString(h, t.Name+" "+string(t.SyncType)+" "+t.Holder+"\n")
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// All yields every policy holder with Says, the service's policy first. The set must not be asked meanwhile.
func (m *SyncingMetaSet) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		m.mu.RLock()
		defer m.mu.RUnlock()
		if !yield("", m.says("")) {
			return
		}
		for _, holder := range slices.Sorted(maps.Keys(m.policies)) {
			if !yield(holder, m.says(holder)) {
				return
			}
		}
	}
}

// edit changes the set and tells the listeners what is different now.
func (m *SyncingMetaSet) edit(touched []string, change func()) {
	m.telling.Lock()
	defer m.telling.Unlock()
	m.mu.Lock()
	before, was := map[string]*descriptor.Policy{}, m.version
	for _, h := range touched {
		before[h] = m.policies[h]
	}
	var serviceWas *descriptor.Policy
	if was.Service != nil {
		serviceWas = was.Service.Policy
	}
	if slices.Contains(touched, "") {
		maps.Copy(before, m.policies)
	}
	change()
	var updates []SyncingMetaUpdate
	for _, h := range slices.Sorted(maps.Keys(before)) {
		p, had := before[h], before[h] != nil
		if h == "" {
			p, had = serviceWas, was.Service != nil
		}
		updates = append(updates, m.differences(h, was, p, had)...)
	}
	m.mu.Unlock()
	select {
	case <-m.ready:
	default:
		return // part of the first snapshot
	}
	if len(updates) > 0 {
		for _, l := range m.listeners {
			l(updates)
		}
	}
}

// differences is called with mu held.
func (m *SyncingMetaSet) differences(holder string, was *descriptor.Version, before *descriptor.Policy, had bool) (updates []SyncingMetaUpdate) {
	now, has := m.policy(holder)
	for _, t := range m.version.Types {
		switch {
		case !has && had:
			updates = append(updates, SyncingMetaUpdate{Holder: holder, Type: t.Name, Gone: true})
		case has:
			meta := m.meta(t, now)
			if old := was.Type(t.Name); had && old != nil {
				if o := m.meta(old, before); o.ControlRegion == meta.ControlRegion && slices.Equal(o.Regions, meta.Regions) &&
					old.Holder == t.Holder && slices.Equal(old.Patterns, t.Patterns) {
					continue
				}
			}
			updates = append(updates, SyncingMetaUpdate{Holder: holder, Type: t.Name, Meta: meta})
		}
	}
	return updates
}

// Run keeps the set until ctx is done, and returns nil then.
func (m *SyncingMetaSet) Run(ctx context.Context) error {
	for retry := (backoff{}); ctx.Err() == nil; {
		if err := m.follow(ctx); ctx.Err() == nil && !errors.Is(err, errPoliciesChanged) {
			m.cfg.Logger.WarnContext(ctx, "policies cannot be followed, will be retried", "error", err)
			retry.sleep(ctx)
		} else {
			retry = backoff{}
		}
	}
	return nil
}

var errPoliciesChanged = errors.New("the schema has changed: all policies are read again")

// follow takes a snapshot and follows its changes until an error, or until another version of the schema is in force.
func (m *SyncingMetaSet) follow(ctx context.Context) error {
	version := m.cfg.Version()
	cursor, _, err := m.cfg.Changes.Now(ctx)
	if err != nil {
		return err
	}
	snapshot, err := m.snapshot(ctx, version)
	if err != nil {
		return err
	}
	m.replace(version, snapshot)
	select {
	case <-m.ready:
	default:
		close(m.ready)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		look := time.NewTicker(policyGap)
		defer look.Stop()
		for m.cfg.Version() == version {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-look.C:
			}
		}
		return errPoliciesChanged
	})
	for _, t := range version.Types {
		if t.IsPolicyHolder() {
			g.Go(func() error { return m.followType(ctx, t, cursor) })
		}
	}
	return g.Wait()
}

// policyGap spares the database: policies change rarely, everything else often.
const policyGap = 100 * time.Millisecond

func (m *SyncingMetaSet) followType(ctx context.Context, t *descriptor.Type, cursor feed.Cursor) error {
	return m.cfg.Changes.Follow(ctx, feed.Interest{Gap: policyGap}, func(ctx context.Context) (bool, error) {
		r, err := m.cfg.Changes.ReadResources(ctx, cursor, feed.Selection{Type: t.Name}, func(r *store.Resource) error {
			m.edit([]string{r.Name}, func() {
				delete(m.policies, r.Name)
				if r.State != store.Gone {
					m.note(m.policies, t, r)
				}
			})
			return nil
		})
		if err != nil {
			return false, err
		}
		cursor = r.Cursor
		return r.More, nil
	})
}

// note adds a holder to policies. One whose policy is invalid, which the API does not accept, says nothing of what is under it.
func (m *SyncingMetaSet) note(policies map[string]*descriptor.Policy, t *descriptor.Type, r *store.Resource) {
	p, violations := t.PolicyOf(r.Body)
	if len(violations) > 0 {
		m.cfg.Logger.Warn("a policy is invalid: what it governs stays as it is", "holder", r.Name, "violations", fmt.Sprint(violations))
		return
	}
	policies[r.Name] = p
}

func (m *SyncingMetaSet) snapshot(ctx context.Context, v *descriptor.Version) (map[string]*descriptor.Policy, error) {
	all := map[string]*descriptor.Policy{}
	for _, t := range v.Types {
		if !t.IsPolicyHolder() {
			continue
		}
		for q := (store.Query{Type: t.Name, PageSize: store.MaxPageSize}); ; {
			page, err := m.cfg.Holders.List(ctx, q)
			if err != nil {
				return nil, fmt.Errorf("list policy holders of type %s: %w", t.Name, err)
			}
			for _, r := range page.Resources {
				m.note(all, t, r)
			}
			if q.PageToken = page.NextPageToken; q.PageToken == "" {
				break
			}
		}
	}
	return all, nil
}

// replace makes a snapshot the state of the set.
func (m *SyncingMetaSet) replace(v *descriptor.Version, snapshot map[string]*descriptor.Policy) {
	touched := append(slices.Collect(maps.Keys(snapshot)), "") // with it go those that are known already
	m.edit(touched, func() { m.version, m.policies = v, snapshot })
}
