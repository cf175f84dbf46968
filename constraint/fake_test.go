package constraint

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// The service under test is mid.example.com in eu. It imports low and is imported by high; us is another region of its own.
const (
	midService  = "mid.example.com"
	lowService  = "low.example.com"
	highService = "high.example.com"
	fakeRing    = 64
)

var (
	midEU   = store.Location{Service: midService, Region: "eu"}
	midUS   = store.Location{Service: midService, Region: "us"}
	lowEU   = store.Location{Service: lowService, Region: "eu"}
	lowUS   = store.Location{Service: lowService, Region: "us"}
	highEU  = store.Location{Service: highService, Region: "eu"}
	nowhere = store.Location{Service: highService, Region: "mars"}
)

const fakeSchemas = `
- service: low.example.com
  multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
  versions:
  - {name: v1, resources: [{type: Secret, plural: secrets, patterns: ["secrets/{secret}"]}]}
- service: mid.example.com
  multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
  versions:
  - name: v1
    imports: [{service: low.example.com, version: v1}]
    resources:
    - {type: App, plural: apps, patterns: ["apps/{app}"]}
    - {type: Tool, plural: tools, patterns: ["tools/{tool}"]}
  - name: v2
    imports: [{service: low.example.com, version: v1}]
    resources:
    - {type: App, plural: programs, patterns: ["programs/{app}"]}
- service: high.example.com
  multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
  versions:
  - name: v1
    imports: [{service: mid.example.com, version: v1}]
    resources: [{type: Site, plural: sites, patterns: ["sites/{site}"]}]
`

func fakeServices(tb testing.TB) []*v1alpha1.ServiceDescriptor {
	tb.Helper()
	var specs []v1alpha1.ServiceDescriptorSpec
	if err := yaml.UnmarshalStrict([]byte(fakeSchemas), &specs); err != nil {
		tb.Fatal(err)
	}
	var all []*v1alpha1.ServiceDescriptor
	for _, spec := range specs {
		all = append(all, &v1alpha1.ServiceDescriptor{ObjectMeta: metav1.ObjectMeta{Name: spec.Service}, Spec: spec})
	}
	return all
}

// fakeCore is a database in memory, and the Store on top of it. Whatever changes it wakes the readers.
type fakeCore struct {
	hub  *feed.Hub
	feed *feed.Feed

	mu        sync.Mutex
	seq       uint64
	epoch     int64
	shadows   map[string]*store.Shadow
	bodies    map[string]string
	owners    map[string][]store.OwnerReference
	seen      map[string]uint64 // of shadows with tasks
	incoming  map[store.Location]map[string]map[string]store.Incoming
	outgoing  map[store.Location][]store.Confirmed
	blockades []store.Blockade
	suspects  []store.Location
	blocked   map[string]error // deletions that are refused
	notes     map[string]string
	fault     error // of every call
	lastWrite int   // the fault comes after so many batches; 0 never

	calls    map[string]int
	maxPage  int
	pruned   []store.Source
	dropped  []string
	raised   map[string]store.Tasks
	finished []string
}

func newFakeCore() *fakeCore {
	hub := feed.NewHub()
	return &fakeCore{
		hub: hub, feed: feed.New(nil, hub, 0), epoch: 1, shadows: map[string]*store.Shadow{}, bodies: map[string]string{}, owners: map[string][]store.OwnerReference{},
		seen: map[string]uint64{}, incoming: map[store.Location]map[string]map[string]store.Incoming{}, outgoing: map[store.Location][]store.Confirmed{},
		blocked: map[string]error{}, notes: map[string]string{}, calls: map[string]int{}, raised: map[string]store.Tasks{},
	}
}

// in runs f with the database locked, and then wakes the readers if there is work for them.
func (c *fakeCore) in(op string, f func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[op]++
	if c.fault != nil {
		return c.fault
	}
	before := c.seq
	err := f()
	if c.seq != before {
		c.hub.Committed(true)
	}
	return err
}

func typeIn(name string) string {
	switch {
	case strings.HasPrefix(name, "tools/"):
		return "Tool"
	default:
		return "App"
	}
}

// put adds a live resource, or changes its shadow.
func (c *fakeCore) put(name string, edit func(*store.Shadow)) {
	_ = c.in("put", func() error {
		sh := c.shadows[name]
		if sh == nil {
			sh = &store.Shadow{Name: name, Type: typeIn(name), UUID: "uuid of " + name, State: store.ShadowActive, Unconfirmed: map[int]bool{}}
			c.shadows[name] = sh
			c.bodies[name] = "{}"
		}
		if edit != nil {
			edit(sh)
		}
		if sh.Tasks != 0 || sh.State == store.ShadowDeleting {
			c.touch(sh)
		}
		return nil
	})
}

func (c *fakeCore) touch(sh *store.Shadow) {
	c.seq++
	c.seen[sh.Name] = c.seq
	if sh.TaskTime.IsZero() {
		sh.TaskTime = time.Now()
	}
}

// refer adds a reference of a resource here.
func (c *fakeCore) refer(referrer, field, target string, at store.Location, b store.Behavior) {
	c.put(referrer, nil)
	_ = c.in("refer", func() error {
		if c.incoming[at] == nil {
			c.incoming[at] = map[string]map[string]store.Incoming{}
		}
		if c.incoming[at][target] == nil {
			c.incoming[at][target] = map[string]store.Incoming{}
		}
		c.incoming[at][target][referrer+" "+field] = store.Incoming{Referrer: referrer, Type: typeIn(referrer), Field: field, Target: target, Behavior: b}
		body := map[string]any{}
		_ = json.Unmarshal([]byte(c.bodies[referrer]), &body)
		body[field] = target
		raw, _ := json.Marshal(body)
		c.bodies[referrer] = string(raw)
		return nil
	})
}

func (c *fakeCore) left(at store.Location, target string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.incoming[at][target])
}

func (c *fakeCore) get(name string) *store.Shadow {
	c.mu.Lock()
	defer c.mu.Unlock()
	if sh := c.shadows[name]; sh != nil {
		sh := *sh
		sh.References, sh.Sources = slices.Clone(sh.References), slices.Clone(sh.Sources)
		return &sh
	}
	return nil
}

func (c *fakeCore) called(op string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[op]
}

func (c *fakeCore) setFault(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = err
}

func (c *fakeCore) block(name string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		delete(c.blocked, name)
	} else {
		c.blocked[name] = err
	}
}

func (c *fakeCore) Feed() *feed.Feed { return c.feed }

func (c *fakeCore) Epoch(context.Context) (epoch int64, err error) {
	return c.epoch, c.in("Epoch", func() error { return nil })
}

func (c *fakeCore) resource(name string) *store.Resource {
	sh := c.shadows[name]
	if sh == nil || sh.State != store.ShadowActive {
		return nil
	}
	return &store.Resource{Name: name, Type: sh.Type, UUID: sh.UUID, Version: store.Version{Epoch: 1, Number: 1}, Body: []byte(c.bodies[name]), Meta: store.Meta{OwnerReferences: slices.Clone(c.owners[name])}}
}

func (c *fakeCore) Get(ctx context.Context, name string) (*store.Resource, error) {
	found, err := c.BatchGet(ctx, []string{name})
	if err == nil && found[0] == nil {
		err = store.Errorf(store.NotFound, name, "does not exist")
	}
	return found[0], err
}

func (c *fakeCore) BatchGet(_ context.Context, names []string) (found []*store.Resource, err error) {
	found = make([]*store.Resource, len(names))
	return found, c.in("BatchGet", func() error {
		for i, name := range names {
			found[i] = c.resource(name)
		}
		return nil
	})
}

func (c *fakeCore) List(context.Context, store.Query) (*store.Page, error) { panic("nobody lists") }

// BatchWrite deletes and updates, all or nothing.
func (c *fakeCore) BatchWrite(_ context.Context, writes []store.Write) ([]store.Result, error) {
	return make([]store.Result, len(writes)), c.in("BatchWrite", func() error {
		for _, w := range writes {
			if err := c.blocked[w.Name]; err != nil {
				return err
			}
		}
		if c.lastWrite--; c.lastWrite == 0 {
			c.fault = errDatabase
		}
		for _, w := range writes {
			if w.Op == store.Delete {
				c.remove(w.Name)
				continue
			}
			c.bodies[w.Name] = string(w.Body)
			var body map[string]any
			_ = json.Unmarshal(w.Body, &body)
			for _, targets := range c.incoming {
				for target, refs := range targets {
					for key, in := range refs {
						if in.Referrer == w.Name && body[in.Field] != target {
							delete(refs, key)
						}
					}
				}
			}
		}
		return nil
	})
}

func (c *fakeCore) remove(name string) {
	delete(c.shadows, name)
	delete(c.seen, name)
	for _, targets := range c.incoming {
		for _, refs := range targets {
			maps.DeleteFunc(refs, func(_ string, in store.Incoming) bool { return in.Referrer == name })
		}
	}
}

func (c *fakeCore) Shadow(_ context.Context, name string) (sh *store.Shadow, err error) {
	err = c.in("Shadow", func() error {
		if c.shadows[name] == nil {
			return store.Errorf(store.NotFound, name, "has no shadow")
		}
		copied := *c.shadows[name]
		copied.References, copied.Sources = slices.Clone(copied.References), slices.Clone(copied.Sources)
		copied.Sources = append(copied.Sources, store.Source{Blocking: true, Subscriber: true}) // referrers here are shown, too
		sh = &copied
		return nil
	})
	return sh, err
}

func (c *fakeCore) Shadows(_ context.Context, f store.ShadowFilter) (all []*store.Shadow, next string, err error) {
	return all, next, c.in("Shadows", func() error {
		for _, name := range slices.Sorted(maps.Keys(c.shadows)) {
			if name > f.After && len(all) < f.Limit {
				copied := *c.shadows[name]
				copied.Sources = append(slices.Clone(copied.Sources), store.Source{Blocking: true})
				all = append(all, &copied)
			}
		}
		if len(all) == f.Limit {
			next = all[len(all)-1].Name
		}
		return nil
	})
}

func (c *fakeCore) ReadTasks(_ context.Context, cursor feed.Cursor, shards feed.Range, emit func(store.Task) error) (read feed.Read, err error) {
	var tasks []store.Task
	err = c.in("ReadTasks", func() error { return nil })
	c.mu.Lock()
	for name, seen := range c.seen {
		shard := int32(descriptor.Shard(name, fakeRing))
		if seen > cursor.Snapshot.Xmax && shard >= shards.From && shard < shards.To {
			sh := c.shadows[name]
			tasks = append(tasks, store.Task{Name: name, Type: sh.Type, UUID: sh.UUID, Shard: shard, State: sh.State, Tasks: sh.Tasks, TaskTime: sh.TaskTime, Seen: strconv.FormatUint(seen, 10)})
		}
	}
	read.Cursor = feed.Cursor{Epoch: c.epoch, Snapshot: feed.Snapshot{Xmin: c.seq, Xmax: c.seq}}
	if c.seq == 0 {
		read.Cursor = feed.Cursor{}
	}
	c.mu.Unlock()
	slices.SortFunc(tasks, func(a, b store.Task) int { return cmp.Or(len(a.Seen)-len(b.Seen), strings.Compare(a.Seen, b.Seen)) })
	for _, t := range tasks {
		if err == nil {
			err = emit(t)
		}
	}
	return read, err
}

func (c *fakeCore) RaiseTasks(_ context.Context, names []string, t store.Tasks) error {
	return c.in("RaiseTasks", func() error {
		for _, name := range names {
			if sh := c.shadows[name]; sh != nil && sh.State == store.ShadowActive {
				sh.Tasks |= t
				c.raised[name] |= t
				c.touch(sh)
			}
		}
		return nil
	})
}

func (c *fakeCore) clear(name string, t store.Tasks) {
	sh := c.shadows[name]
	if sh.Tasks &^= t; sh.Tasks == 0 {
		sh.TaskTime = time.Time{}
		delete(c.seen, name)
	}
	delete(c.notes, name)
}

func (c *fakeCore) ClearTasks(_ context.Context, name, uuid, seen string, t store.Tasks) (cleared bool, err error) {
	return cleared, c.in("ClearTasks", func() error {
		sh := c.shadows[name]
		if cleared = sh != nil && sh.UUID == uuid && sh.State == store.ShadowActive && strconv.FormatUint(c.seen[name], 10) == seen; cleared {
			c.clear(name, t)
		}
		return nil
	})
}

func (c *fakeCore) NoteFailure(_ context.Context, name, reason string, _ time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls["NoteFailure"]++
	c.notes[name] = reason
	return nil
}

func (c *fakeCore) note(name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.notes[name]
}

func (c *fakeCore) Unconfirmed(_ context.Context, name string) (refs []store.Reference, err error) {
	return refs, c.in("Unconfirmed", func() error {
		if sh := c.shadows[name]; sh != nil {
			for i, r := range sh.References {
				if sh.Unconfirmed[i] {
					r.Grant = &store.Grant{TxID: "tx of " + name}
					refs = append(refs, r)
				}
			}
		}
		return nil
	})
}

func (c *fakeCore) MarkConfirmed(_ context.Context, name string, refs []store.Reference) error {
	return c.in("MarkConfirmed", func() error {
		sh := c.shadows[name]
		if sh == nil {
			return nil
		}
		unconfirmed := maps.Clone(sh.Unconfirmed)
		for i, r := range sh.References {
			for _, done := range refs {
				if done.Field == r.Field && done.At == r.At && done.Target == r.Target {
					delete(unconfirmed, i)
				}
			}
		}
		if sh.Unconfirmed = unconfirmed; len(unconfirmed) == 0 {
			c.clear(name, store.ConfirmBlockades)
		}
		return nil
	})
}

func (c *fakeCore) BeginSweep(context.Context, store.Location, int64) error {
	return c.in("BeginSweep", func() error { return nil })
}

func (c *fakeCore) BeginAttempt(_ context.Context, names []string) (map[string]store.Question, error) {
	qs := map[string]store.Question{}
	return qs, c.in("BeginAttempt", func() error {
		for _, name := range names {
			if sh := c.shadows[name]; sh != nil {
				sh.RowVersion |= 1
				qs[name] = store.Question{Name: name, UUID: sh.UUID, Epoch: c.epoch, RowVersion: sh.RowVersion}
			}
		}
		return nil
	})
}

func (c *fakeCore) ExpiredBlockades(_ context.Context, _ feed.Range, limit int) (expired []store.Blockade, err error) {
	return expired, c.in("ExpiredBlockades", func() error {
		for _, b := range c.blockades {
			if !b.ExpireTime.After(time.Now()) && len(expired) < limit {
				expired = append(expired, b)
			}
		}
		return nil
	})
}

func (c *fakeCore) Blockades(context.Context, feed.Range) (held int, err error) {
	return held, c.in("Blockades", func() error { held = len(c.blockades); return nil })
}

func (c *fakeCore) DropBlockades(_ context.Context, blockades []store.Blockade) error {
	return c.in("DropBlockades", func() error {
		c.blockades = slices.DeleteFunc(c.blockades, func(b store.Blockade) bool {
			drop := slices.Contains(blockades, b)
			if drop {
				c.dropped = append(c.dropped, b.Name)
			}
			return drop
		})
		return nil
	})
}

func (c *fakeCore) PruneSource(_ context.Context, q store.Question, at store.Location, keep store.Source) (bool, error) {
	return true, c.in("PruneSource", func() error {
		c.pruned = append(c.pruned, keep)
		sh := c.shadows[q.Name]
		for i, source := range sh.Sources {
			if source.Location == at {
				sh.Sources[i].Blocking, sh.Sources[i].Subscriber, sh.Sources[i].Ownee = source.Blocking && keep.Blocking, source.Subscriber && keep.Subscriber, source.Ownee && keep.Ownee
			}
		}
		sh.Sources = slices.DeleteFunc(slices.Clone(sh.Sources), func(source store.Source) bool { return source == store.Source{Location: source.Location} })
		return nil
	})
}

func (c *fakeCore) Suspects(_ context.Context, candidates []store.Location) (suspects []store.Location, err error) {
	return suspects, c.in("Suspects", func() error {
		for _, at := range candidates {
			if slices.Contains(c.suspects, at) {
				suspects = append(suspects, at)
			}
		}
		return nil
	})
}

func (c *fakeCore) FinishDeletion(_ context.Context, name, uuid string, _ int64, checked []store.Location) (done bool, err error) {
	return done, c.in("FinishDeletion", func() error {
		sh := c.shadows[name]
		if sh == nil || sh.UUID != uuid || sh.State != store.ShadowDeleting || sh.BlockDeletion || len(c.incoming[store.Location{}][name]) > 0 {
			return nil
		}
		for _, source := range sh.Sources {
			if (source.Subscriber || source.Ownee) && !slices.Contains(checked, source.Location) {
				return nil
			}
		}
		done = true
		c.finished = append(c.finished, name)
		c.remove(name)
		return nil
	})
}

func (c *fakeCore) HandledReferrers(_ context.Context, at store.Location, target, _ string, limit int) (page []store.Incoming, err error) {
	return page, c.in("HandledReferrers", func() error {
		refs := c.incoming[at][target]
		for _, key := range slices.Sorted(maps.Keys(refs)) {
			in := refs[key]
			if sh := c.shadows[in.Referrer]; sh == nil || sh.Tasks&store.PendingDelete != 0 && !in.Behavior.Unsets() || !in.Behavior.Handled(at == store.Location{}) {
				continue
			}
			if r := c.resource(in.Referrer); r != nil {
				in.Version = r.Version
			}
			if len(page) < limit {
				page = append(page, in)
			}
		}
		c.maxPage = max(c.maxPage, len(page))
		return nil
	})
}

func (c *fakeCore) ReferencesTo(_ context.Context, at store.Location, after string, limit int) (page []store.Confirmed, next string, err error) {
	return page, next, c.in("ReferencesTo", func() error {
		for _, r := range c.outgoing[at] {
			if r.Referrer > after && len(page) < limit {
				page = append(page, r)
			}
		}
		if len(page) == limit {
			next = page[limit-1].Referrer
		}
		return nil
	})
}

// fakePeer is another Deployment; what a test does not set, it refuses.
type fakePeer struct {
	mixin.Peer
	at store.Location

	mu        sync.Mutex
	away      bool // calls hang until their deadline
	refuse    error
	missing   []string
	confirmed []*v1.ConfirmBlockadesRequest
	blocked   func(*v1.CheckIfResourceIsBlockedRequest) *v1.BlockedAnswer
	left      int // references that are not handled
	owner     func(*v1.ConfirmMetaOwnerRequest) *v1.ConfirmMetaOwnerResponse
	ownees    []*v1.MetaOwnee
	removed   []*v1.RemoveMetaOwnerReferenceRequest
	upgraded  []*v1.UpgradeMetaOwnerVersionRequest
	questions []*v1.Question
	calls     int

	deleting []string // what a new stream begins with
	epoch    int64
	streams  map[chan *v1.WatchImportedServiceDeletionsResponse]*v1.WatchImportedServiceDeletionsRequest
	opened   []*v1.WatchImportedServiceDeletionsRequest
}

var errAway = &store.Error{Code: store.Unavailable, Reason: "no answer"}

func (p *fakePeer) answer(ctx context.Context, f func()) error {
	p.mu.Lock()
	p.calls++
	away, refuse := p.away, p.refuse
	p.mu.Unlock()
	if away {
		<-ctx.Done()
		return errAway
	}
	if refuse != nil {
		return refuse
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	return nil
}

func (p *fakePeer) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// count returns how many calls the peer got.
func (p *fakePeer) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls
}

func (p *fakePeer) ConfirmBlockades(ctx context.Context, req *v1.ConfirmBlockadesRequest) (res *v1.ConfirmBlockadesResponse, err error) {
	return &v1.ConfirmBlockadesResponse{Missing: p.missing}, p.answer(ctx, func() { p.confirmed = append(p.confirmed, req) })
}

func (p *fakePeer) CheckIfResourceIsBlocked(ctx context.Context, req *v1.CheckIfResourceIsBlockedRequest) (*v1.CheckIfResourceIsBlockedResponse, error) {
	res := &v1.CheckIfResourceIsBlockedResponse{}
	return res, p.answer(ctx, func() {
		p.questions = append(p.questions, req.GetTargets()...)
		res.Answers = []*v1.BlockedAnswer{p.blocked(req)}
	})
}

func (p *fakePeer) CheckIfResourceHasDeletionSubscriber(ctx context.Context, req *v1.CheckIfResourceHasDeletionSubscriberRequest) (*v1.CheckIfResourceHasDeletionSubscriberResponse, error) {
	res := &v1.CheckIfResourceHasDeletionSubscriberResponse{}
	return res, p.answer(ctx, func() {
		p.questions = append(p.questions, req.GetTarget())
		res.HasSubscriber, res.Count = p.left > 0, int32(p.left)
	})
}

func (p *fakePeer) ConfirmMetaOwner(ctx context.Context, req *v1.ConfirmMetaOwnerRequest) (res *v1.ConfirmMetaOwnerResponse, err error) {
	err = p.answer(ctx, func() { res = p.owner(req) })
	return res, err
}

func (p *fakePeer) UpgradeMetaOwnerVersion(ctx context.Context, req *v1.UpgradeMetaOwnerVersionRequest) (*v1.UpgradeMetaOwnerVersionResponse, error) {
	return &v1.UpgradeMetaOwnerVersionResponse{}, p.answer(ctx, func() { p.upgraded = append(p.upgraded, req) })
}

func (p *fakePeer) RemoveMetaOwnerReference(ctx context.Context, req *v1.RemoveMetaOwnerReferenceRequest) (*v1.RemoveMetaOwnerReferenceResponse, error) {
	return &v1.RemoveMetaOwnerReferenceResponse{}, p.answer(ctx, func() {
		p.removed = append(p.removed, req)
		p.ownees = slices.DeleteFunc(p.ownees, func(o *v1.MetaOwnee) bool { return o.GetOwnee().GetName() == req.GetOwnee().GetName() })
	})
}

func (p *fakePeer) ListMetaOwnees(ctx context.Context, req *v1.ListMetaOwneesRequest) (*v1.ListMetaOwneesResponse, error) {
	res := &v1.ListMetaOwneesResponse{}
	return res, p.answer(ctx, func() {
		for _, o := range p.ownees {
			if owned(o, req.GetOwnerNames()) && o.GetOwnee().GetName() > req.GetPageToken() && len(res.Ownees) < int(req.GetPageSize()) {
				res.Ownees = append(res.Ownees, o)
			}
		}
		if len(res.Ownees) == int(req.GetPageSize()) {
			res.NextPageToken = res.Ownees[len(res.Ownees)-1].GetOwnee().GetName()
		}
	})
}

func (p *fakePeer) CheckIfHasMetaOwnee(ctx context.Context, req *v1.CheckIfHasMetaOwneeRequest) (*v1.CheckIfHasMetaOwneeResponse, error) {
	res := &v1.CheckIfHasMetaOwneeResponse{}
	return res, p.answer(ctx, func() {
		res.HasOwnee = slices.ContainsFunc(p.ownees, func(o *v1.MetaOwnee) bool { return owned(o, req.GetOwnerNames()) })
	})
}

// owned reports whether o is owned by what names spell.
func owned(o *v1.MetaOwnee, names []*v1.Spelling) bool {
	return slices.ContainsFunc(names, func(n *v1.Spelling) bool {
		return n.GetVersion() == o.GetReference().GetVersion() && n.GetName() == o.GetReference().GetName()
	})
}

func (p *fakePeer) WatchImportedServiceDeletions(ctx context.Context, req *v1.WatchImportedServiceDeletionsRequest, emit func(*v1.WatchImportedServiceDeletionsResponse) error) error {
	messages := make(chan *v1.WatchImportedServiceDeletionsResponse, 100)
	p.mu.Lock()
	p.opened = append(p.opened, req)
	away := p.away
	p.streams[messages] = req
	first := &v1.WatchImportedServiceDeletionsResponse{Epoch: p.epoch, ResumeToken: "token"}
	if req.GetResumeToken() == "" {
		for _, name := range p.deleting {
			first.Deleting = append(first.Deleting, &v1.DeletingShadow{Name: name})
		}
	}
	p.mu.Unlock()
	defer p.set(func() { delete(p.streams, messages) })
	if away {
		return errAway
	}
	for m := first; ; {
		if err := emit(m); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m = <-messages:
			if m == nil {
				return errAway
			}
		case <-time.After(5 * time.Second):
			p.mu.Lock()
			m = &v1.WatchImportedServiceDeletionsResponse{Epoch: p.epoch, ResumeToken: "token"}
			p.mu.Unlock()
		}
	}
}

// delete tells the open streams of a deletion, and keeps it for new ones. The empty name cuts the streams.
func (p *fakePeer) delete(name string) {
	p.set(func() {
		var m *v1.WatchImportedServiceDeletionsResponse
		if name != "" {
			p.deleting = append(p.deleting, name)
			m = &v1.WatchImportedServiceDeletionsResponse{Deleting: []*v1.DeletingShadow{{Name: name}}, Epoch: p.epoch, ResumeToken: "token"}
		}
		for s := range p.streams {
			s <- m
		}
	})
}

func (p *fakePeer) watches() []*v1.WatchImportedServiceDeletionsRequest {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.streams))
}

// fakePeers knows the Deployments of the registry, as mixin.Peers does.
type fakePeers struct {
	reg   *registry.Registry
	mu    sync.Mutex
	peers map[store.Location]*fakePeer
	// inexpressible are Deployments that know no name of ours.
	inexpressible map[store.Location]bool
}

func (f *fakePeers) at(at store.Location) *fakePeer {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.peers[at]
	if p == nil {
		p = &fakePeer{at: at, epoch: 1, streams: map[chan *v1.WatchImportedServiceDeletionsResponse]*v1.WatchImportedServiceDeletionsRequest{}}
		p.blocked = func(*v1.CheckIfResourceIsBlockedRequest) *v1.BlockedAnswer { return &v1.BlockedAnswer{} }
		p.owner = func(*v1.ConfirmMetaOwnerRequest) *v1.ConfirmMetaOwnerResponse {
			return &v1.ConfirmMetaOwnerResponse{Outcome: v1.ConfirmMetaOwnerResponse_OUTCOME_CONFIRMED}
		}
		f.peers[at] = p
	}
	return p
}

func (f *fakePeers) Peer(at store.Location) (mixin.Peer, error) {
	d, ok := f.reg.View().Deployment(registry.Key(at))
	if !ok || d.Disabled {
		return nil, store.Errorf(store.FailedPrecondition, "", "%s is not declared, or disabled", at)
	}
	return f.at(at), nil
}

func (f *fakePeers) Call(at store.Location) (*v1.Call, error) {
	return &v1.Call{Requester: mixin.WireLocation(midEU), Callee: mixin.WireLocation(at), Version: "v1"}, nil
}

func (f *fakePeers) SpellFor(at store.Location, name string) (string, string, bool) {
	return "v1", "spelled/" + name, !f.inexpressible[at]
}

func (f *fakePeers) Spellings(name string) []*v1.Spelling {
	return []*v1.Spelling{{Version: "v1", Name: name}, {Version: "v2", Name: "programs" + strings.TrimPrefix(name, "apps")}}
}

func (f *fakePeers) locations(services ...string) (all []store.Location) {
	for _, d := range f.reg.View().Deployments() {
		if slices.Contains(services, d.Service) {
			all = append(all, store.Location(d.Key))
		}
	}
	return all
}

func (f *fakePeers) Importers() []store.Location {
	return slices.DeleteFunc(f.locations(midService, highService), func(at store.Location) bool { return at == midEU })
}

func (f *fakePeers) Interesting() []store.Location { return f.locations(lowService, midService) }

// fakeWorld is a node in a world in memory.
type fakeWorld struct {
	t     *testing.T
	reg   *registry.Registry
	core  *fakeCore
	peers *fakePeers
	cfg   NodeConfig
	node  *Node
	stop  func()
}

// inBubble runs test with a node that is not started yet, with time that passes by itself.
func inBubble(t *testing.T, test func(*fakeWorld)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		reg := registry.New()
		w := &fakeWorld{t: t, reg: reg, core: newFakeCore(), stop: func() {}}
		w.peers = &fakePeers{reg: reg, peers: map[store.Location]*fakePeer{}, inexpressible: map[store.Location]bool{}}
		w.cfg = NodeConfig{Service: midService, Region: "eu", Version: "v1", Ring: fakeRing, Registry: reg, Core: w.core, Store: w.core, Peers: w.peers,
			Logger: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()}
		w.declare(midEU, midUS, lowEU, lowUS, highEU)
		test(w)
		w.stop()
	})
}

// declare makes these the Deployments; those of disabled are declared, too.
func (w *fakeWorld) declare(all ...store.Location) { w.declareWith(nil, all...) }

func (w *fakeWorld) declareWith(disabled []store.Location, all ...store.Location) {
	w.t.Helper()
	s := registry.Snapshot{Services: fakeServices(w.t)}
	for _, at := range slices.Concat(all, disabled) {
		s.Deployments = append(s.Deployments, &v1alpha1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: strings.ReplaceAll(at.String(), "/", "-")},
			Spec: v1alpha1.DeploymentSpec{Service: at.Service, Region: at.Region, Endpoint: "http://" + at.Region, Version: "v1", Shards: fakeRing,
				Disabled: slices.Contains(disabled, at)},
		})
	}
	if problems := w.reg.Apply(s); len(problems) > 0 {
		w.t.Fatal(problems)
	}
}

func (w *fakeWorld) start() {
	w.t.Helper()
	w.startOn(feed.Range{From: 0, To: fakeRing})
}

func (w *fakeWorld) startOn(shards feed.Range) {
	w.t.Helper()
	n, err := NewNode(w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.node = n
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	if err := n.UpdateShardRange(ctx, shards); err != nil {
		w.t.Fatal(err)
	}
	go func() { ended <- n.Run(ctx) }()
	w.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("Run after a stop = %v", err)
		}
		w.stop = func() {}
	}
}

// pass lets time pass, and then everything that can happen. Between two calls nothing happens but what the test does.
func (w *fakeWorld) pass(d time.Duration) {
	w.core.setFault(w.core.fault) // what the test has read comes before what is written now: the locks say so
	w.peers.mu.Lock()
	for _, p := range w.peers.peers {
		p.set(func() {})
	}
	w.peers.mu.Unlock()
	time.Sleep(d)
	synctest.Wait()
}

func (w *fakeWorld) metric(name string, labels ...string) float64 {
	w.t.Helper()
	families, err := w.cfg.Metrics.(*prometheus.Registry).Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	series:
		for _, m := range f.GetMetric() {
			for _, want := range labels {
				if !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName()+"="+l.GetValue() == want }) {
					continue series
				}
			}
			sum += m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return sum
}

func (w *fakeWorld) want(ok bool, format string, args ...any) {
	w.t.Helper()
	if !ok {
		w.t.Errorf(format, args...)
	}
}

func refused(name string) error {
	return &store.Error{Code: store.FailedPrecondition, Name: name, Reason: "something refers to it"}
}

var errDatabase = &store.Error{Code: store.Unavailable, Reason: "the database is away", Cause: errors.New("injected")}

func app(i int) string { return fmt.Sprintf("apps/%05d", i) }
