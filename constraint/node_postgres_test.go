package constraint_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"
	"sigs.k8s.io/yaml"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Three services, one above the other, with a field of each behavior to the service below. Vaults are regional, and refer to each other.
var towerSchemas = []string{`
service: base.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Secret, plural: secrets, patterns: ["secrets/{secret}"]}
  - {type: Slow, plural: slows, patterns: ["slows/{slow}"], asyncDeletion: true}
  - {type: Vault, plural: vaults, patterns: ["regions/{region}/vaults/{vault}"], references: [{field: twin, target: Vault, onTargetDeleted: AsyncCascadeDelete}]}
- name: v2
  resources:
  - {type: Secret, plural: keys, patterns: ["keys/{secret}"]}
`, `
service: middle.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  imports: [{service: base.example.com, version: v1}]
  resources:
  - type: App
    plural: apps
    patterns: ["apps/{app}"]
    references:
    - {field: block, target: base.example.com/Secret, onTargetDeleted: Block}
    - {field: unset, target: base.example.com/Secret, onTargetDeleted: Unset}
    - {field: "unsets[]", target: base.example.com/Secret, onTargetDeleted: AsyncUnset}
    - {field: cascade, target: base.example.com/Secret, onTargetDeleted: CascadeDelete}
    - {field: vault, target: base.example.com/Vault, onTargetDeleted: AsyncCascadeDelete}
    - {field: slow, target: base.example.com/Slow, onTargetDeleted: AsyncCascadeDelete}
    - {field: app, target: App, onTargetDeleted: AsyncCascadeDelete}
    - {field: friend, target: App, onTargetDeleted: AsyncUnset}
`, `
service: top.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  imports: [{service: base.example.com, version: v1}, {service: middle.example.com, version: v1}]
  resources:
  - type: Site
    plural: sites
    patterns: ["sites/{site}"]
    references:
    - {field: block, target: middle.example.com/App, onTargetDeleted: Block}
    - {field: cascade, target: middle.example.com/App, onTargetDeleted: CascadeDelete}
    - {field: secret, target: base.example.com/Secret, onTargetDeleted: AsyncCascadeDelete}
    - {field: own, target: base.example.com/Secret, onTargetDeleted: AllowDangling}
`}

func towerAt(service, region string) store.Location {
	return store.Location{Service: service + ".example.com", Region: region}
}

var (
	baseEU, baseUS = towerAt("base", "eu"), towerAt("base", "us")
	middleEU       = towerAt("middle", "eu")
	topEU          = towerAt("top", "eu")
)

// tower is these services in one process, each Deployment with a database, a store, a mixin and, once it runs, a node.
type tower struct {
	reg      *registry.Registry
	declared []store.Location
	versions map[string]string // of services that do not run v1
	at       map[store.Location]*deployed
	links    map[[2]store.Location]*link
	edit     func(*constraint.NodeConfig)

	mu    sync.Mutex
	stops map[store.Location]func()
}

// link is the way from one Deployment to another. While it is down, calls fail and streams break.
type link struct {
	mixin.Peer
	down atomic.Bool

	mu      sync.Mutex
	streams map[int]context.CancelFunc
	opened  int
}

var errDown = &store.Error{Code: store.Unavailable, Reason: "the link is down"}

func through[Req, Res any](ctx context.Context, l *link, f func(context.Context, Req) (Res, error), req Req) (res Res, err error) {
	if l.down.Load() {
		return res, errDown
	}
	return f(ctx, req)
}

func (l *link) EstablishReferences(ctx context.Context, req *v1.EstablishReferencesRequest) (*v1.EstablishReferencesResponse, error) {
	return through(ctx, l, l.Peer.EstablishReferences, req)
}

func (l *link) ConfirmBlockades(ctx context.Context, req *v1.ConfirmBlockadesRequest) (*v1.ConfirmBlockadesResponse, error) {
	return through(ctx, l, l.Peer.ConfirmBlockades, req)
}

func (l *link) CheckIfResourceIsBlocked(ctx context.Context, req *v1.CheckIfResourceIsBlockedRequest) (*v1.CheckIfResourceIsBlockedResponse, error) {
	return through(ctx, l, l.Peer.CheckIfResourceIsBlocked, req)
}

func (l *link) CheckIfResourceHasDeletionSubscriber(ctx context.Context, req *v1.CheckIfResourceHasDeletionSubscriberRequest) (*v1.CheckIfResourceHasDeletionSubscriberResponse, error) {
	return through(ctx, l, l.Peer.CheckIfResourceHasDeletionSubscriber, req)
}

func (l *link) ConfirmMetaOwner(ctx context.Context, req *v1.ConfirmMetaOwnerRequest) (*v1.ConfirmMetaOwnerResponse, error) {
	return through(ctx, l, l.Peer.ConfirmMetaOwner, req)
}

func (l *link) WatchImportedServiceDeletions(ctx context.Context, req *v1.WatchImportedServiceDeletionsRequest, emit func(*v1.WatchImportedServiceDeletionsResponse) error) error {
	if l.down.Load() {
		return errDown
	}
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	l.mu.Lock()
	l.opened++
	id := l.opened
	l.streams[id] = cancel
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.streams, id)
	}()
	err := l.Peer.WatchImportedServiceDeletions(watching, req, emit)
	if watching.Err() != nil && ctx.Err() == nil {
		return errDown
	}
	return err
}

// build opens Deployments; nothing asynchronous happens before their nodes run.
func build(versions map[string]string, all ...store.Location) *tower {
	GinkgoHelper()
	w := &tower{reg: registry.New(), declared: all, versions: versions, at: map[store.Location]*deployed{}, links: map[[2]store.Location]*link{}, stops: map[store.Location]func(){}}
	w.declare(all...)
	servers := map[store.Location]mixin.Peer{}
	for _, at := range all {
		w.at[at] = deploy(w.reg, at, servers, func(cfg *constraint.LayerConfig) { cfg.CallTimeout = 2 * time.Second })
	}
	for _, from := range all {
		answer := map[store.Location]mixin.Peer{from: servers[from]}
		for _, to := range all {
			if from != to {
				l := &link{Peer: servers[to], streams: map[int]context.CancelFunc{}}
				w.links[[2]store.Location{from, to}] = l
				answer[to] = l
			}
		}
		w.at[from].peers.answer = answer
		hub, stop := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = w.at[from].core.Run(hub)
		}()
		DeferCleanup(func() { stop(); <-done })
	}
	DeferCleanup(func() { w.stop(all...) })
	return w
}

func (w *tower) declare(all ...store.Location) {
	GinkgoHelper()
	var s registry.Snapshot
	for _, text := range towerSchemas {
		d := new(v1alpha1.ServiceDescriptor)
		Expect(yaml.UnmarshalStrict([]byte(text), &d.Spec)).To(Succeed())
		d.Name = d.Spec.Service
		s.Services = append(s.Services, d)
	}
	for _, at := range all {
		d := new(v1alpha1.Deployment)
		d.Name = at.Service + "." + at.Region
		d.Spec = v1alpha1.DeploymentSpec{Service: at.Service, Region: at.Region, Version: "v1", Endpoint: "http://127.0.0.1:1", Shards: 256}
		if v := w.versions[at.Service]; v != "" {
			d.Spec.Version = v
		}
		s.Deployments = append(s.Deployments, d)
	}
	Expect(w.reg.Apply(s)).To(BeEmpty())
}

// cut takes the ways from one Deployment to another down, and up again.
func (w *tower) cut(from, to store.Location, down bool) {
	l := w.links[[2]store.Location{from, to}]
	l.down.Store(down)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, cancel := range l.streams {
		cancel()
	}
}

// between does that in both directions.
func (w *tower) between(a, b store.Location, down bool) {
	w.cut(a, b, down)
	w.cut(b, a, down)
}

// start runs the nodes of Deployments, with times that suit a test.
func (w *tower) start(all ...store.Location) {
	GinkgoHelper()
	for _, at := range all {
		d := w.at[at]
		version := cmpOr(w.versions[at.Service], "v1")
		quick := constraint.Retry{Min: 10 * time.Millisecond, Max: 100 * time.Millisecond}
		cfg := constraint.NodeConfig{Service: at.Service, Region: at.Region, Version: version, Ring: 256, Registry: w.reg, Core: d.core, Store: d.store, Peers: d.peers,
			Grace: time.Second, GoneAfter: 300 * time.Millisecond, Debounce: 20 * time.Millisecond, ScanInterval: 30 * time.Millisecond, SweepAfter: 50 * time.Millisecond,
			Poll: quick, DeleteRetry: quick, Away: quick, Reconnect: quick, Logger: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()}
		if w.edit != nil {
			w.edit(&cfg)
		}
		n, err := constraint.NewNode(cfg)
		Expect(err).NotTo(HaveOccurred())
		ctx, cancel := context.WithCancel(context.Background())
		Expect(n.UpdateShardRange(ctx, feed.Range{From: 0, To: 256})).To(Succeed())
		ended := make(chan error, 1)
		go func() { ended <- n.Run(ctx) }()
		w.mu.Lock()
		w.stops[at] = func() { cancel(); Expect(<-ended).To(Succeed()) }
		w.mu.Unlock()
	}
}

// stop ends nodes as a crash does: what they had in memory is gone.
func (w *tower) stop(all ...store.Location) {
	for _, at := range all {
		w.mu.Lock()
		stop := w.stops[at]
		delete(w.stops, at)
		w.mu.Unlock()
		if stop != nil {
			stop()
		}
	}
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// state is what there is of a name: its shadow's state and tasks, empty without one.
func (d *deployed) state(name string) string {
	h, err := d.core.Shadow(context.Background(), name)
	if err != nil {
		return ""
	}
	text := map[store.ShadowState]string{store.ShadowActive: "ACTIVE", store.ShadowDeleting: "DELETING"}[h.State]
	for _, task := range h.Tasks.Strings() {
		text += " " + task
	}
	return text
}

func (d *deployed) exists(name string) func() bool {
	return func() bool {
		_, err := d.store.Get(context.Background(), name)
		return err == nil
	}
}

func (d *deployed) owned(name string, owners ...store.OwnerReference) error {
	return d.write(store.Write{Op: store.Save, Name: name, Body: []byte("{}"), Meta: store.Meta{OwnerReferences: owners}})
}

func (d *deployed) owners(name string) (names []string) {
	r, err := d.store.Get(context.Background(), name)
	if err != nil {
		return nil
	}
	for _, o := range r.Meta.OwnerReferences {
		names = append(names, o.Version+":"+o.Name)
	}
	return names
}

const patience = 20 * time.Second

var _ = Describe("the nodes on PostgreSQL", func() {
	var base, middle, top *deployed
	var w *tower
	tall := func() {
		w = build(nil, baseEU, middleEU, topEU)
		base, middle, top = w.at[baseEU], w.at[middleEU], w.at[topEU]
	}
	// settled says that nothing is left to do, and that every reference points to something. It looks twice: one Deployment may have given work to another that had been
	// looked at already.
	settled := func() {
		GinkgoHelper()
		Eventually(func() (left []string) {
			for range 2 {
				for at, d := range w.at {
					version := cmpOr(w.versions[at.Service], "v1")
					for _, sql := range []string{
						"SELECT coalesce(string_agg(name || ' ' || shadow || ' ' || tasks || ' ' || coalesce(task_error, ''), ', '), '') FROM %s.resources WHERE shadow_change IS NOT NULL",
						"SELECT coalesce(string_agg('blockade of ' || name, ', '), '') FROM %s.blockades",
					} {
						if found := d.query(fmt.Sprintf(sql, version)); found != "" {
							left = append(left, at.String()+": "+found)
						}
					}
				}
			}
			return left
		}, patience, "50ms").Should(BeEmpty())
		Expect(w.dangling()).To(BeEmpty())
	}
	everywhere := func() { w.start(slicesOf(w.at)...) }

	It("confirms what a crashed writer has left, and meanwhile its target cannot be deleted (F61, F62, X1, X2, X3, I4, I14)", func(ctx SpecContext) {
		tall()
		Expect(base.save("secrets/s", "{}")).To(Succeed())
		Expect(middle.save("apps/a", `{"block":"secrets/s"}`)).To(Succeed())
		Expect(middle.state("apps/a")).To(Equal("ACTIVE CONFIRM_BLOCKADES"))
		Expect(base.delete("secrets/s")).To(haveCode(store.FailedPrecondition), "a tentative blockade")

		By("expiring it while no node runs")
		base.query("WITH x AS (UPDATE v1.blockades SET expires_at = now() - interval '1 s' RETURNING 1) SELECT count(*)::text FROM x")
		Expect(base.delete("secrets/s")).To(haveCode(store.FailedPrecondition), "the location is asked")
		Expect(base.exists("secrets/s")()).To(BeTrue())

		By("a writer that crashes before it commits")
		Expect(base.save("secrets/t", "{}")).To(Succeed())
		call, err := middle.peers.Call(baseEU)
		Expect(err).NotTo(HaveOccurred())
		_, err = w.links[[2]store.Location{middleEU, baseEU}].EstablishReferences(ctx, &v1.EstablishReferencesRequest{Call: call, Referrer: "apps/never", TxId: "0b6b5f0e-0000-4000-8000-000000000001",
			TxAttempt: 1, Ttl: durationpb.New(time.Minute), Targets: []*v1.NewReference{{Name: "secrets/t", Blocking: true}}})
		Expect(err).NotTo(HaveOccurred())
		Expect(base.delete("secrets/t")).To(haveCode(store.FailedPrecondition))
		base.query("WITH x AS (UPDATE v1.blockades SET expires_at = now() - interval '1 s' RETURNING 1) SELECT count(*)::text FROM x")

		everywhere()
		settled()
		Expect(base.shadow("secrets/s").Sources).To(Equal([]store.Source{{Location: middleEU, Blocking: true}}))
		Expect(base.shadow("secrets/t").Sources).To(HaveEach(store.Source{Location: middleEU}), "nothing is known of references any more")
		Expect(base.delete("secrets/t")).To(Succeed())
		Expect(base.delete("secrets/s")).To(haveCode(store.FailedPrecondition))
		Expect(middle.delete("apps/a")).To(Succeed())
		Expect(base.delete("secrets/s")).To(Succeed())
		settled()
	})

	It("cascades and unsets across services, and then the name is free (F63, F65, F66, I6, I16)", func(ctx SpecContext) {
		tall()
		everywhere()
		Expect(base.save("secrets/s", "{}")).To(Succeed())
		Expect(base.save("secrets/t", "{}")).To(Succeed())
		Expect(middle.save("apps/cascade", `{"cascade":"secrets/s"}`)).To(Succeed())
		Expect(middle.save("apps/unset", `{"unset":"secrets/s","unsets":["secrets/s","secrets/t"],"note":1.50}`)).To(Succeed())
		Expect(top.save("sites/s", `{"secret":"secrets/s"}`)).To(Succeed())
		settled()
		w.stop(middleEU)
		Expect(base.delete("secrets/s")).To(Succeed())
		Expect(base.exists("secrets/s")()).To(BeFalse())
		Eventually(top.exists("sites/s"), patience).Should(BeFalse(), "one that is away delays no other")
		Expect(base.state("secrets/s")).To(Equal("DELETING"))
		Expect(base.save("secrets/s", "{}")).NotTo(Succeed(), "a name is not used again before that")
		w.start(middleEU)
		settled()
		Expect(middle.exists("apps/cascade")()).To(BeFalse())
		Expect(middle.body("apps/unset")).To(MatchJSON(`{"unsets":["secrets/t"],"note":1.50}`))
		Expect(base.save("secrets/s", "{}")).To(Succeed())
	})

	It("carries a deletion over three services, past what blocks it (F67, F68, X12, I17)", func(ctx SpecContext) {
		tall()
		everywhere()
		Expect(base.save("secrets/s", "{}")).To(Succeed())
		Expect(middle.save("apps/free", `{"cascade":"secrets/s"}`)).To(Succeed())
		Expect(middle.save("apps/held", `{"cascade":"secrets/s"}`)).To(Succeed())
		Expect(top.save("sites/free", `{"cascade":"apps/free"}`)).To(Succeed())
		Expect(top.save("sites/holds", `{"block":"apps/held"}`)).To(Succeed())
		settled()
		Expect(base.delete("secrets/s")).To(Succeed())
		Eventually(top.exists("sites/free"), patience).Should(BeFalse())
		Eventually(func() string { return middle.state("apps/held") }, patience).Should(ContainSubstring("DELETE"))
		Consistently(func() string { return base.state("secrets/s") }, "300ms").Should(Equal("DELETING"))
		Expect(middle.shadow("apps/held").LastError).To(ContainSubstring("sites/holds"))
		Expect(top.delete("sites/holds")).To(Succeed())
		settled()
		Expect(middle.exists("apps/held")()).To(BeFalse())
		Expect(base.state("secrets/s")).To(BeEmpty())
	})

	It("handles asynchronous references within one Deployment (F64)", func(ctx SpecContext) {
		tall()
		everywhere()
		for _, s := range [][2]string{{"apps/root", "{}"}, {"apps/1", `{"app":"apps/root"}`}, {"apps/2", `{"app":"apps/1"}`}, {"apps/3", `{"app":"apps/2","friend":"apps/root"}`}, {"apps/friend", `{"friend":"apps/root"}`}} {
			Expect(middle.save(s[0], "%s", s[1])).To(Succeed())
		}
		Expect(middle.delete("apps/root")).To(Succeed())
		settled()
		for _, name := range []string{"apps/root", "apps/1", "apps/2", "apps/3"} {
			Expect(middle.exists(name)()).To(BeFalse(), name)
		}
		Expect(middle.body("apps/friend")).To(MatchJSON("{}"))
	})

	It("ends a cycle over two regions, and a reference of a resource to itself (X13, R6)", func(ctx SpecContext) {
		w = build(nil, baseEU, baseUS)
		everywhere()
		eu, us := w.at[baseEU], w.at[baseUS]
		Expect(eu.save("regions/eu/vaults/a", "{}")).To(Succeed())
		Expect(us.save("regions/us/vaults/b", `{"twin":"regions/eu/vaults/a"}`)).To(Succeed())
		Expect(eu.save("regions/eu/vaults/a", `{"twin":"regions/us/vaults/b"}`)).To(Succeed())
		Expect(eu.save("regions/eu/vaults/self", `{"twin":"regions/eu/vaults/self"}`)).To(Succeed())
		settled()
		Expect(eu.delete("regions/eu/vaults/a")).To(Succeed())
		Expect(eu.delete("regions/eu/vaults/self")).To(Succeed())
		settled()
		Expect(us.exists("regions/us/vaults/b")()).To(BeFalse())
	})

	It("waits for a subscriber that is away, and for nobody else (X10, F64, I44)", func(ctx SpecContext) {
		tall()
		everywhere()
		Expect(base.save("secrets/both", "{}")).To(Succeed())
		Expect(base.save("secrets/top", "{}")).To(Succeed())
		Expect(middle.save("apps/a", `{"cascade":"secrets/both"}`)).To(Succeed())
		Expect(top.save("sites/a", `{"secret":"secrets/both"}`)).To(Succeed())
		Expect(top.save("sites/b", `{"secret":"secrets/top"}`)).To(Succeed())
		settled()
		w.between(baseEU, middleEU, true)
		Expect(base.delete("secrets/both")).To(Succeed())
		Expect(base.delete("secrets/top")).To(Succeed())
		Eventually(func() string { return base.state("secrets/top") }, patience).Should(BeEmpty())
		Eventually(top.exists("sites/a"), patience).Should(BeFalse())
		Consistently(func() string { return base.state("secrets/both") }, "300ms").Should(Equal("DELETING"))
		Expect(middle.exists("apps/a")()).To(BeTrue())
		Eventually(func() string { return base.shadow("secrets/both").LastError }, patience).Should(ContainSubstring("middle.example.com/eu cannot be reached"))
		w.between(baseEU, middleEU, false)
		settled()
		Expect(middle.exists("apps/a")()).To(BeFalse())
	})

	It("deletes a resource that stays readable when its dependents are gone and the service allows it (X39)", func(ctx SpecContext) {
		tall()
		everywhere()
		held, free := true, false
		Expect(base.save("slows/s", "{}")).To(Succeed())
		Expect(middle.save("apps/a", `{"slow":"slows/s"}`)).To(Succeed())
		settled()
		w.stop(middleEU)
		Expect(base.delete("slows/s")).To(Succeed())
		r, err := base.store.Get(ctx, "slows/s")
		Expect(err).NotTo(HaveOccurred())
		Expect(r.State).To(Equal(store.Deleting))
		base.query("WITH x AS (UPDATE v1.resources SET block_deletion = $1 WHERE name = 'slows/s' RETURNING 1) SELECT count(*)::text FROM x", held)
		w.start(middleEU)
		Eventually(middle.exists("apps/a"), patience).Should(BeFalse())
		Consistently(base.exists("slows/s"), "300ms").Should(BeTrue())
		Expect(base.shadow("slows/s").LastError).To(ContainSubstring("the service itself"))
		base.query("WITH x AS (UPDATE v1.resources SET block_deletion = $1 WHERE name = 'slows/s' RETURNING 1) SELECT count(*)::text FROM x", free)
		settled()
		Expect(base.exists("slows/s")()).To(BeFalse())
	})

	Describe("with owners", func() {
		owner := func(at store.Location, typ, name string) store.OwnerReference {
			return store.OwnerReference{Kind: at.Service + "/" + typ, Version: "v1", Name: name, Region: at.Region}
		}

		It("keeps one that comes in time, and removes one that never comes, with the ownee unless it is only unset (F69, F72, X15, X16, I18)", func(ctx SpecContext) {
			tall()
			everywhere()
			late, never, unset := owner(topEU, "Site", "sites/late"), owner(topEU, "Site", "sites/never"), owner(topEU, "Site", "sites/never")
			unset.UnsetOnDelete = true
			Expect(base.owned("secrets/late", late)).To(Succeed())
			Expect(base.owned("secrets/never", never)).To(Succeed())
			Expect(base.owned("secrets/unset", unset)).To(Succeed())
			Expect(base.owned("secrets/both", late, never)).To(Succeed())
			Expect(base.owned("secrets/self", owner(baseEU, "Secret", "secrets/late"))).To(Succeed())
			Consistently(base.exists("secrets/never"), "200ms").Should(BeTrue())
			Expect(top.save("sites/late", "{}")).To(Succeed())
			settled()
			Expect(base.owners("secrets/late")).To(Equal([]string{"v1:sites/late"}))
			Expect(base.owners("secrets/both")).To(Equal([]string{"v1:sites/late"}))
			Expect(base.exists("secrets/never")()).To(BeFalse())
			Expect(base.exists("secrets/unset")()).To(BeTrue())
			Expect(base.owners("secrets/unset")).To(BeEmpty())
			Expect(top.shadow("sites/late").Sources).To(Equal([]store.Source{{Location: baseEU, Ownee: true}}))

			By("deleting the owner: whoever has no other goes, however deep (F71)")
			Expect(top.delete("sites/late")).To(Succeed())
			settled()
			for _, name := range []string{"secrets/late", "secrets/both", "secrets/self"} {
				Expect(base.exists(name)()).To(BeFalse(), name)
			}
			Expect(top.state("sites/late")).To(BeEmpty())
		})

		It("removes none while the owner's Deployment cannot be asked (X17, I19)", func(ctx SpecContext) {
			tall()
			w.edit = func(cfg *constraint.NodeConfig) { cfg.Grace = 100 * time.Millisecond }
			w.cut(baseEU, topEU, true)
			everywhere()
			Expect(base.owned("secrets/a", owner(topEU, "Site", "sites/s"))).To(Succeed())
			Consistently(base.exists("secrets/a"), "700ms").Should(BeTrue())
			Expect(top.save("sites/s", "{}")).To(Succeed())
			w.cut(baseEU, topEU, false)
			settled()
			Expect(base.owners("secrets/a")).To(Equal([]string{"v1:sites/s"}))
		})

		It("removes one that requires a reference back and has dropped it (F70, X18, I20)", func(ctx SpecContext) {
			tall()
			everywhere()
			o := owner(topEU, "Site", "sites/s")
			o.RequiresOwnerReference = true
			Expect(base.owned("secrets/a", o)).To(Succeed())
			Expect(base.owned("secrets/b", o)).To(Succeed())
			Expect(top.save("sites/s", `{"secret":"secrets/a"}`)).To(Succeed())
			settled()
			Expect(base.exists("secrets/a")()).To(BeTrue())
			Expect(base.exists("secrets/b")()).To(BeFalse(), "it was never referred to, and the grace has passed")
			Expect(top.save("sites/s", "{}")).To(Succeed())
			settled()
			Expect(base.exists("secrets/a")()).To(BeFalse())
		})

		It("leaves an ownee that something blocks until nothing does (F71, I17)", func(ctx SpecContext) {
			tall()
			everywhere()
			Expect(top.save("sites/s", "{}")).To(Succeed())
			Expect(base.owned("secrets/a", owner(topEU, "Site", "sites/s"))).To(Succeed())
			Expect(middle.save("apps/a", `{"block":"secrets/a"}`)).To(Succeed())
			settled()
			Expect(top.delete("sites/s")).To(Succeed())
			Eventually(func() string { return base.state("secrets/a") }, patience).Should(ContainSubstring("DELETE"))
			Consistently(func() string { return top.state("sites/s") }, "200ms").Should(Equal("DELETING"))
			Expect(middle.delete("apps/a")).To(Succeed())
			settled()
			Expect(base.exists("secrets/a")()).To(BeFalse())
		})

		It("writes the present version into ownees after a switch, from both sides (F73, I21, X38)", func(ctx SpecContext) {
			w = build(map[string]string{baseEU.Service: "v2"}, baseEU, topEU)
			base, top := w.at[baseEU], w.at[topEU]
			Expect(base.save("keys/a", "{}")).To(Succeed())
			Expect(base.save("keys/b", "{}")).To(Succeed())
			Expect(top.owned("sites/mine", owner(baseEU, "Secret", "secrets/a"))).To(Succeed())
			w.start(topEU)
			settled()
			Expect(top.owners("sites/mine")).To(Equal([]string{"v2:keys/a"}), "the ownee's side asks")
			w.stop(topEU)

			Expect(top.owned("sites/theirs", owner(baseEU, "Secret", "secrets/b"))).To(Succeed())
			_, _, err := base.core.AddOwnee(ctx, "keys/b", topEU)
			Expect(err).NotTo(HaveOccurred())
			Expect(base.core.RaiseTasks(ctx, []string{"keys/b"}, store.CheckOwnees)).To(Succeed())
			w.start(baseEU)
			Eventually(func() []string { return top.owners("sites/theirs") }, patience).Should(Equal([]string{"v2:keys/b"}), "the owner's side tells")
			w.start(topEU)
			settled()

			By("deleting an owner that is still known by its old name")
			w.stop(topEU)
			Expect(top.owned("sites/theirs", owner(baseEU, "Secret", "secrets/b"))).To(Succeed())
			Expect(base.delete("keys/b")).To(Succeed())
			Eventually(top.exists("sites/theirs"), patience).Should(BeFalse())
			w.start(topEU)
			settled()
		})
	})

	It("knows again what a failover has lost (R3, R4, I4)", func(ctx SpecContext) {
		tall()
		everywhere()
		for i := range 20 {
			Expect(base.save(fmt.Sprintf("secrets/%d", i), "{}")).To(Succeed())
			Expect(middle.save(fmt.Sprintf("apps/%d", i), `{"block":"secrets/%d","unset":"secrets/%d"}`, i, i)).To(Succeed())
		}
		settled()
		base.query("WITH x AS (DELETE FROM v1.sources RETURNING 1) SELECT count(*)::text FROM x")
		w.stop(middleEU, topEU)
		_, err := base.core.RaiseEpoch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(base.delete("secrets/0")).To(haveCode(store.FailedPrecondition), "who has not confirmed yet is asked")
		w.start(middleEU, topEU)
		Eventually(func() string {
			return base.query("SELECT count(*)::text FROM ctl.referrer_epoch r, ctl.feed_epoch e WHERE r.epoch = e.epoch")
		}, patience).Should(Equal("2"))
		for i := range 20 {
			Expect(base.shadow(fmt.Sprintf("secrets/%d", i)).Sources).To(Equal([]store.Source{{Location: middleEU, Blocking: true, Subscriber: true}}))
		}
		settled()
	})

	It("drops a Deployment that has been removed for good (X35, I40)", func(ctx SpecContext) {
		tall()
		everywhere()
		Expect(base.save("secrets/deleted", "{}")).To(Succeed())
		Expect(base.save("secrets/held", "{}")).To(Succeed())
		Expect(middle.save("apps/a", `{"cascade":"secrets/deleted","block":"secrets/held"}`)).To(Succeed())
		settled()
		w.stop(middleEU)
		w.declare(baseEU, topEU)
		Expect(base.delete("secrets/deleted")).To(Succeed())
		Eventually(func() string { return base.state("secrets/deleted") }, patience).Should(BeEmpty())
		Eventually(func() error { return base.delete("secrets/held") }, patience).Should(Succeed())
	})

	It("resumes from the database however often it crashes, and two nodes do no harm (F75, X11, X23, I11, I12)", func(ctx SpecContext) {
		tall()
		w.edit = func(cfg *constraint.NodeConfig) { cfg.Page = 20 }
		const n = 300
		Expect(base.save("secrets/s", "{}")).To(Succeed())
		Expect(base.save("secrets/t", "{}")).To(Succeed())
		var writes []store.Write
		for i := range n {
			field := []string{"cascade", "unset", "block"}[i%3]
			target := map[string]string{"cascade": "secrets/s", "unset": "secrets/s", "block": "secrets/t"}[field]
			writes = append(writes, saveOf(fmt.Sprintf("apps/%d", i), `{"%s":"%s"}`, field, target))
		}
		Expect(middle.write(writes...)).To(Succeed())
		deleted, after := false, 0
		for began, crashes := time.Now(), 0; after < 25; crashes++ {
			w.start(middleEU, baseEU)
			time.Sleep(time.Duration(rand.N(60+crashes)) * time.Millisecond) // a slow machine gets further, too
			w.stop(middleEU, baseEU)
			if deleted {
				after++
			}
			deleted = deleted || base.delete("secrets/s") == nil
			Expect(time.Since(began)).To(BeNumerically("<", time.Minute), "what was written is never confirmed")
		}
		everywhere()
		second := &tower{reg: w.reg, versions: w.versions, at: w.at, edit: w.edit, stops: map[store.Location]func(){}}
		second.start(middleEU)
		defer second.stop(middleEU)
		settled()
		for i := range n {
			name := fmt.Sprintf("apps/%d", i)
			Expect(middle.exists(name)()).To(Equal(i%3 != 0), name)
			if i%3 == 1 {
				Expect(middle.body(name)).To(MatchJSON("{}"), name)
			}
		}
		Expect(base.state("secrets/s")).To(BeEmpty())
		Expect(base.delete("secrets/t")).To(haveCode(store.FailedPrecondition))
	})

	It("handles 10,000 referrers a page at a time (X40, R10)", func(ctx SpecContext) {
		tall()
		const n = 10_000
		Expect(base.save("secrets/s", "{}")).To(Succeed())
		for from := 0; from < n; from += store.MaxBatch {
			var writes []store.Write
			for i := from; i < from+store.MaxBatch; i++ {
				field := "cascade"
				if i%2 == 1 {
					field = "unset"
				}
				writes = append(writes, saveOf(fmt.Sprintf("apps/%d", i), `{"%s":"secrets/s","pad":"%0200d"}`, field, i))
			}
			Expect(middle.write(writes...)).To(Succeed())
		}
		// The confirmations are another test's.
		middle.query("WITH x AS (UPDATE v1.refs SET tx_id = NULL RETURNING 1) SELECT count(*)::text FROM x")
		middle.query("WITH x AS (UPDATE v1.resources SET tasks = 0, task_time = NULL, shadow_change = NULL RETURNING 1) SELECT count(*)::text FROM x")
		base.query("WITH x AS (DELETE FROM v1.blockades RETURNING 1) SELECT count(*)::text FROM x")
		Expect(base.shadow("secrets/s").Sources).To(HaveLen(1), "the target knows a place, not 10,000 referrers")

		var most atomic.Uint64
		measure, stop := context.WithCancel(ctx)
		measured := make(chan struct{})
		before := heap()
		go func() {
			defer close(measured)
			for measure.Err() == nil {
				most.Store(max(most.Load(), heap()))
				time.Sleep(20 * time.Millisecond)
			}
		}()
		began := time.Now()
		everywhere()
		Expect(base.delete("secrets/s")).To(Succeed())
		Eventually(func() string { return base.state("secrets/s") }, time.Minute, "20ms").Should(BeEmpty())
		stop()
		<-measured
		grown := max(most.Load(), before) - before
		AddReportEntry("10,000 referrers", fmt.Sprintf("%v, the heap grew by %d MiB", time.Since(began), grown>>20))
		Expect(grown).To(BeNumerically("<", 128<<20))
		settled()
		Expect(middle.query("SELECT count(*)::text FROM v1.resources WHERE state = 0")).To(Equal(fmt.Sprint(n / 2)))
		Expect(middle.query("SELECT count(*)::text FROM v1.refs")).To(Equal("0"))
	})
})

// heap returns the bytes in use, garbage included.
func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func slicesOf(at map[store.Location]*deployed) (all []store.Location) {
	for l := range maps.Keys(at) {
		all = append(all, l)
	}
	return all
}

// dangling returns the references, over all Deployments, to what does not live.
func (w *tower) dangling() (all []string) {
	GinkgoHelper()
	for at, d := range w.at {
		version := cmpOr(w.versions[at.Service], "v1")
		var refs []struct{ Referrer, Target, Location string }
		text := d.query(fmt.Sprintf("SELECT coalesce(json_agg(json_build_object('referrer', referrer, 'target', target, 'location', location)), '[]')::text FROM %s.refs WHERE kind = 0 AND behavior <> 6", version))
		Expect(json.Unmarshal([]byte(text), &refs)).To(Succeed())
		for _, r := range refs {
			to, err := store.ParseLocation(r.Location)
			Expect(err).NotTo(HaveOccurred())
			target := d
			if r.Location != "" {
				target = w.at[to]
			}
			if !target.exists(r.Target)() {
				all = append(all, fmt.Sprintf("%s at %s -> %s at %s", r.Referrer, at, r.Target, to))
			}
		}
	}
	return all
}
