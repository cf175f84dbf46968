package syncing_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
	layer "github.com/dbcontroller/db-controller/store/region"
	"github.com/dbcontroller/db-controller/syncing"
)

// A folder is a policy holder, and so is a project in it. Types under a folder have all four sync types; a site is regional.
const policySchema = `
service: library.example.com
multiRegionPolicy: {enabledRegions: [ap, eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Setting, plural: settings, patterns: ["settings/{setting}"]}
  - {type: Folder, plural: folders, patterns: ["folders/{folder}"], policyHolder: {field: policy}}
  - {type: Project, plural: projects, patterns: ["folders/{folder}/projects/{project}"], parent: Folder, onParentDeleted: CascadeDelete, policyHolder: {field: spec.policy}}
  - {type: Task, plural: tasks, patterns: ["folders/{folder}/projects/{project}/tasks/{task}"], parent: Project, onParentDeleted: CascadeDelete}
  - {type: Document, plural: documents, patterns: ["folders/{folder}/documents/{document}"], parent: Folder, onParentDeleted: CascadeDelete}
  - {type: Draft, plural: drafts, patterns: ["folders/{folder}/drafts/{draft}"], parent: Folder, onParentDeleted: CascadeDelete, syncType: Never}
  - {type: Notice, plural: notices, patterns: ["folders/{folder}/notices/{notice}"], parent: Folder, onParentDeleted: CascadeDelete, syncType: AlwaysInScope}
  - {type: Catalog, plural: catalogs, patterns: ["folders/{folder}/catalogs/{catalog}"], parent: Folder, onParentDeleted: CascadeDelete, syncType: AlwaysGlobally}
  - {type: Site, plural: sites, patterns: ["folders/{folder}/regions/{region}/sites/{site}"], parent: Folder, onParentDeleted: CascadeDelete}
`

// governed is a world whose regions write through the layer that knows policies.
type governed struct {
	*world
	spec    v1alpha1.ServiceDescriptorSpec
	service atomic.Pointer[descriptor.Version]
	stacks  map[string]*layer.Store
}

func newGoverned(regions ...string) *governed {
	GinkgoHelper()
	g := &governed{world: newWorld(regions...), stacks: map[string]*layer.Store{}}
	Expect(yaml.UnmarshalStrict([]byte(policySchema), &g.spec)).To(Succeed())
	g.declareAll(regions)
	for name, r := range g.regions {
		cache := policy.New(g.version, r.store, quiet())
		run(func(ctx context.Context) error { return cache.Run(ctx, r.store.Feed()) })
		run(r.store.Run)
		g.stacks[name] = layer.Layer(r.store, name, g.version, cache)
	}
	return g
}

func (g *governed) version() *descriptor.Version { return g.service.Load() }

// declareAll declares the service as its spec is now.
func (g *governed) declareAll(regions []string) {
	GinkgoHelper()
	compiled, err := descriptor.Compile(&g.spec)
	Expect(err).NotTo(HaveOccurred())
	g.service.Store(compiled.Version("v1"))
	s := registry.Snapshot{Services: []*v1alpha1.ServiceDescriptor{{ObjectMeta: metav1.ObjectMeta{Name: "library", Namespace: "default"}, Spec: *g.spec.DeepCopy()}}}
	for _, name := range regions {
		s.Deployments = append(s.Deployments, &v1alpha1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
			Spec:       v1alpha1.DeploymentSpec{Service: service, Region: name, Endpoint: g.regions[name].endpoint, Version: "v1", Shards: ring},
		})
	}
	Expect(g.reg.Apply(s)).To(BeEmpty())
}

// update runs an updater in a region.
func (g *governed) update(region string, edit func(*syncing.MetaUpdaterConfig)) (*syncing.MetaUpdater, *syncing.SyncingMetaSet, func()) {
	GinkgoHelper()
	r := g.regions[region]
	set := syncing.NewSyncingMetaSet(syncing.MetaSetConfig{
		Service: service, Region: region, Version: g.version, Holders: r.store, Changes: r.store.Feed(), Logger: quiet(),
	})
	cfg := syncing.MetaUpdaterConfig{Ring: ring, Set: set, Store: r.store, Rate: -1, Settle: 500 * time.Millisecond, Resync: -1, Logger: quiet()}
	if edit != nil {
		edit(&cfg)
	}
	u, err := syncing.NewMetaUpdater(cfg)
	Expect(err).NotTo(HaveOccurred())
	Expect(u.UpdateShardRange(context.Background(), feed.Range{From: 0, To: ring})).To(Succeed())
	return u, set, run(u.Run)
}

// save writes through the layer, as the API does.
func (g *governed) save(region, body string, names ...string) {
	GinkgoHelper()
	for batch := range slices.Chunk(names, store.MaxBatch) {
		var writes []store.Write
		for _, n := range batch {
			writes = append(writes, store.Write{Op: store.Save, Name: n, Body: []byte(body)})
		}
		_, err := g.stacks[region].BatchWrite(context.Background(), writes)
		Expect(err).NotTo(HaveOccurred())
	}
}

// spread counts what a region holds, owned or copied, by metadata.syncing.regions.
func (g *governed) spread(region, prefix string) map[string]int {
	GinkgoHelper()
	found := map[string]int{}
	for _, t := range g.version().Types {
		for q := (store.Query{Type: t.Name, Prefix: prefix, PageSize: 1000}); ; {
			page, err := g.regions[region].store.List(context.Background(), q)
			Expect(err).NotTo(HaveOccurred())
			for _, r := range page.Resources {
				found[strings.Join(r.Regions, " ")]++
			}
			if q.PageToken = page.NextPageToken; q.PageToken == "" {
				break
			}
		}
	}
	return found
}

func folder(policy string) string { return `{"policy":` + policy + `}` }

func numbered(format string, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf(format, i)
	}
	return names
}

var _ = Describe("policies in motion", func() {
	const (
		euUs   = `{"enabledRegions":["eu","us"],"defaultControlRegion":"eu"}`
		euOnly = `{"enabledRegions":["eu"],"defaultControlRegion":"eu"}`
		all    = `{"enabledRegions":["ap","eu","us"],"defaultControlRegion":"eu"}`
	)

	It("carries a changed policy to 10,000 resources and their copies, and to nothing else (F82, F100, X19, I25, I26)", func(ctx SpecContext) {
		g := newGoverned("eu", "us", "ap")
		g.save("eu", folder(euUs), "folders/f", "folders/other")
		g.save("eu", `{"a":1}`, numbered("folders/f/documents/d%05d", 10_000)...)
		g.save("eu", `{"a":1}`, numbered("folders/other/documents/d%02d", 50)...)
		before, err := g.regions["eu"].store.Get(ctx, "folders/other/documents/d07")
		Expect(err).NotTo(HaveOccurred())
		within, err := g.regions["eu"].store.Get(ctx, "folders/f/documents/d00007")
		Expect(err).NotTo(HaveOccurred())
		g.regions["us"].sync(nil)
		g.regions["ap"].sync(nil)
		u, _, _ := g.update("eu", nil)
		Eventually(func() map[string]int { return g.spread("us", "folders/f/") }, "30s").Should(Equal(map[string]int{"eu us": 10_000}))
		Expect(g.spread("ap", "folders/f/")).To(BeEmpty())

		By("adding a region")
		g.save("eu", folder(all), "folders/f")
		Eventually(func() map[string]int { return g.spread("eu", "folders/f/") }, "30s").Should(Equal(map[string]int{"ap eu us": 10_000}))
		Eventually(func() map[string]int { return g.spread("ap", "folders/f/") }, "30s").Should(Equal(map[string]int{"ap eu us": 10_000}))

		By("removing two regions")
		g.save("eu", folder(euOnly), "folders/f")
		Eventually(func() map[string]int { return g.spread("us", "folders/f/") }, "30s").Should(BeEmpty())
		Eventually(func() map[string]int { return g.spread("ap", "folders/f/") }, "30s").Should(BeEmpty())
		Expect(g.spread("eu", "folders/f/")).To(Equal(map[string]int{"eu": 10_000}))
		Expect(g.spread("us", "folders/other/")).To(Equal(map[string]int{"eu us": 50}))

		after, err := g.regions["eu"].store.Get(ctx, "folders/other/documents/d07")
		Expect(err).NotTo(HaveOccurred())
		Expect(after).To(Equal(before), "nothing else changes")
		moved, err := g.regions["eu"].store.Get(ctx, "folders/f/documents/d00007")
		Expect(err).NotTo(HaveOccurred())
		Expect(moved.Generation).To(Equal(within.Generation), "an empty update changes no body")
		Expect(moved.Version.Number).To(Equal(within.Version.Number+2), "one version for each change")
		Expect(moved.UUID).To(Equal(within.UUID))
		Eventually(u.Walks, "10s").Should(BeEmpty())
	})

	It("decides by sync type, criteria, holder and service (F30, F31, F33, F81)", func(ctx SpecContext) {
		g := newGoverned("eu")
		g.save("eu", folder(euUs), "folders/f")
		g.save("eu", `{}`, "settings/s")
		g.save("eu", `{"spec":{"policy":`+euOnly+`}}`, "folders/f/projects/own")
		names := []string{"folders/f/documents/d", "folders/f/drafts/d", "folders/f/notices/n", "folders/f/catalogs/c", "folders/f/regions/eu/sites/s"}
		g.save("eu", `{}`, names...)
		g.save("eu", `{}`, "folders/f/projects/own/tasks/t")
		_, set, _ := g.update("eu", nil)
		regions := func(name string) string {
			r, err := g.regions["eu"].store.Get(ctx, name)
			Expect(err).NotTo(HaveOccurred())
			return strings.Join(r.Regions, " ")
		}
		g.save("eu", `{"policy":{"enabledRegions":["ap","eu","us"],"defaultControlRegion":"eu","criteriaForDisabledSync":[
			{"destRegion":"ap","resourceTypeName":"library.example.com/Document"},{"destRegion":"us","resourceTypeName":"library.example.com/Notice"}]}}`, "folders/f")
		want := map[string]string{
			"folders/f/documents/d":          "eu us",    // a criterion keeps ap out
			"folders/f/drafts/d":             "eu",       // Never
			"folders/f/notices/n":            "ap eu us", // AlwaysInScope: whatever the criteria
			"folders/f/catalogs/c":           "*",        // AlwaysGlobally
			"folders/f/regions/eu/sites/s":   "ap eu us",
			"folders/f/projects/own/tasks/t": "eu", // the nearest holder decides
			"folders/f":                      "ap eu us",
			"settings/s":                     "ap eu us", // the service's policy
		}
		now := func() map[string]string {
			found := map[string]string{}
			for name := range want {
				found[name] = regions(name)
			}
			return found
		}
		Eventually(now, "20s").Should(Equal(want))
		meta, ok := set.Meta("folders/f", "Document")
		Expect(ok).To(BeTrue())
		Expect(meta).To(Equal(syncing.SyncingMeta{ControlRegion: "eu", Regions: []string{"eu", "us"}}))

		By("changing the policy of the service")
		g.spec.MultiRegionPolicy.EnabledRegions = []string{"eu", "us"}
		g.declareAll([]string{"eu"})
		want["settings/s"], want["folders/f"] = "eu us", "eu us"
		Eventually(now, "20s").Should(Equal(want))

		By("changing the sync type of a type")
		for i := range g.spec.Versions[0].Resources {
			if t := &g.spec.Versions[0].Resources[i]; t.Type == "Draft" {
				t.SyncType = v1alpha1.SyncAlwaysInScope
			}
		}
		g.declareAll([]string{"eu"})
		want["folders/f/drafts/d"] = "ap eu us"
		Eventually(now, "20s").Should(Equal(want))
	})

	It("drops nothing that a policy of the service would orphan, and says what it is (F33, X19, I42, spec 4.9)", func(ctx SpecContext) {
		g := newGoverned("eu", "us")
		g.spec.Versions[0].Resources = append(g.spec.Versions[0].Resources, v1alpha1.ResourceType{Type: "Office", Plural: "offices", Patterns: []string{"regions/{region}/offices/{office}"}})
		g.declareAll([]string{"eu", "us"})
		g.save("us", `{"size":1}`, "regions/us/offices/a", "regions/us/offices/b")
		g.save("eu", `{"size":1}`, "regions/eu/offices/c", "settings/s")
		g.update("eu", nil)
		_, set, _ := g.update("us", nil)
		copies, _ := g.regions["eu"].sync(nil)
		g.regions["us"].sync(nil)
		live(copies, "us")
		converge(g.regions["eu"], g.regions["us"])
		converge(g.regions["us"], g.regions["eu"])

		// Nobody asked the regions before the ServiceDescriptor was changed: it is no resource of theirs.
		g.spec.MultiRegionPolicy.EnabledRegions, g.spec.MultiRegionPolicy.DefaultControlRegion = []string{"us"}, "us"
		g.declareAll([]string{"eu", "us"})
		Eventually(func() []string { m, _ := set.Meta("", "Office"); return m.Regions }, "20s").Should(Equal([]string{"us"}))
		owned := func(region string) (map[string]string, error) {
			return g.regions[region].rows("owning_region = $1", region)
		}
		Eventually(func() (int, error) {
			copied, err := g.regions["eu"].rows("owning_region = 'us'")
			return len(copied), err
		}, "20s").Should(BeZero(), "copies leave")
		Consistently(func() (int, error) { rows, err := owned("eu"); return len(rows), err }, "1s", "100ms").Should(Equal(2))
		Expect(owned("us")).To(HaveLen(2))
		Eventually(func() (int, error) { return len(g.spread("us", "settings/")), nil }, "20s").Should(Equal(1), "and appear where they should")

		// What the policy leaves behind is said, so that people can put it right, and it can still be changed and deleted where it is.
		holdings, err := policy.Holdings(ctx, g.version(), g.regions["eu"].store, "", false)
		Expect(err).NotTo(HaveOccurred())
		Expect(policy.Orphans("eu", holdings, g.version().Service.Policy)).To(ConsistOf(
			ContainSubstring("region eu, which it does not enable any more, still owns 1 resources (1 Office)"),
			ContainSubstring("region eu still owns 1 resources without a region in their names (1 Setting), which would belong to us")))
		g.save("eu", `{"size":2}`, "regions/eu/offices/c")
		_, err = store.Apply(ctx, g.stacks["eu"], store.Write{Op: store.Delete, Name: "regions/eu/offices/c"})
		Expect(err).NotTo(HaveOccurred())
	})

	It("goes on where it was killed, and a second change overtakes the first (F82, X19)", func(ctx SpecContext) {
		g := newGoverned("eu")
		g.save("eu", folder(euUs), "folders/f")
		g.save("eu", `{}`, numbered("folders/f/documents/d%05d", 9000)...)
		_, set, stop := g.update("eu", nil)
		Eventually(set.Ready(), "10s").Should(BeClosed())
		Eventually(func() bool {
			w, err := g.regions["eu"].store.PolicyWalk(ctx, "")
			Expect(err).NotTo(HaveOccurred())
			return w != nil && w.Done
		}, "20s").Should(BeTrue())
		stop()

		g.save("eu", folder(all), "folders/f")
		failing := &failingPlacer{Store: g.regions["eu"].store}
		failing.left.Store(2) // as much as a page, then the process is gone
		_, _, stop = g.update("eu", func(cfg *syncing.MetaUpdaterConfig) { cfg.Store = failing })
		Eventually(failing.refused.Load, "20s").Should(BeTrue())
		stop()
		w, err := g.regions["eu"].store.PolicyWalk(ctx, "folders/f")
		Expect(err).NotTo(HaveOccurred())
		Expect(w.Done).To(BeFalse())
		Expect(w.After).NotTo(BeEmpty())
		Expect(w.Changed).To(BeNumerically(">=", 2000))
		Expect(w.Total).To(Equal(int64(9000)))

		placed := &countingPlacer{Store: g.regions["eu"].store}
		_, _, stop = g.update("eu", func(cfg *syncing.MetaUpdaterConfig) { cfg.Store = placed })
		Eventually(func() map[string]int { return g.spread("eu", "folders/f/") }, "30s").Should(Equal(map[string]int{"ap eu us": 9000}))
		Expect(placed.rows.Load()).To(Equal(int64(9000)-w.Changed), "what was done is not done again")
		stop()

		By("changing the policy twice while a slow updater works on the first change")
		_, _, _ = g.update("eu", func(cfg *syncing.MetaUpdaterConfig) { cfg.Rate = 4000 })
		g.save("eu", folder(euUs), "folders/f")
		Eventually(func() int { return g.spread("eu", "folders/f/")["eu us"] }, "20s").Should(BeNumerically(">", 0))
		g.save("eu", folder(euOnly), "folders/f")
		Eventually(func() map[string]int { return g.spread("eu", "folders/f/") }, "30s").Should(Equal(map[string]int{"eu": 9000}))
		Eventually(func() bool {
			w, err := g.regions["eu"].store.PolicyWalk(ctx, "folders/f")
			Expect(err).NotTo(HaveOccurred())
			return w.Done
		}, "20s").Should(BeTrue())
	})

	It("finds what was written under the policy before by a process that did not know the new one (I26)", func(ctx SpecContext) {
		g := newGoverned("eu")
		g.save("eu", folder(euUs), "folders/f")
		u, set, _ := g.update("eu", func(cfg *syncing.MetaUpdaterConfig) { cfg.Settle = 2 * time.Second })
		Eventually(set.Ready(), "10s").Should(BeClosed())
		g.save("eu", folder(all), "folders/f")
		Eventually(func() bool { // all is walked, and the walk rests
			return slices.ContainsFunc(u.Walks(), func(w store.PolicyWalk) bool { return w.Holder == "folders/f" && w.Round == 2 })
		}, "10s").Should(BeTrue())
		_, err := store.Apply(ctx, g.regions["eu"].store, store.Write{Op: store.Create, Name: "folders/f/documents/late", Type: "Document", Body: []byte(`{}`),
			OwningRegion: "eu", Regions: []string{"eu", "us"}})
		Expect(err).NotTo(HaveOccurred())
		Eventually(func() map[string]int { return g.spread("eu", "folders/f/documents/") }, "20s").Should(Equal(map[string]int{"ap eu us": 1}))
	})

	It("obeys the copy of a holder in a region that owns resources under it, and two updaters do the work of one (I24, I31)", func(ctx SpecContext) {
		g := newGoverned("eu", "us")
		g.save("eu", folder(euUs), "folders/f")
		g.regions["us"].sync(nil)
		Eventually(func() error { _, err := g.regions["us"].store.Get(ctx, "folders/f"); return err }, "20s").Should(Succeed())
		Eventually(func() error {
			_, err := g.stacks["us"].BatchWrite(ctx, []store.Write{{Op: store.Save, Name: "folders/f/regions/us/sites/first"}})
			return err
		}, "10s").Should(Succeed())
		g.save("us", `{}`, numbered("folders/f/regions/us/sites/s%04d", 3000)...)
		g.update("us", nil)
		g.update("us", nil)
		g.save("eu", folder(all), "folders/f")
		Eventually(func() map[string]int { return g.spread("us", "folders/f/") }, "30s").Should(Equal(map[string]int{"ap eu us": 3001}))
		r, err := g.regions["us"].store.Get(ctx, "folders/f/regions/us/sites/s0042")
		Expect(err).NotTo(HaveOccurred())
		Expect(r.Version.Number).To(Equal(int64(2)), "changed once")
		Expect(r.OwningRegion).To(Equal("us"))
	})

	It("keeps a set of policies: snapshot, then live, with listeners (F80, F81)", func(ctx SpecContext) {
		g := newGoverned("eu")
		g.save("eu", folder(euUs), "folders/f")
		set := syncing.NewSyncingMetaSet(syncing.MetaSetConfig{
			Service: service, Region: "eu", Version: g.version, Holders: g.regions["eu"].store, Changes: g.regions["eu"].store.Feed(), Logger: quiet(),
		})
		var mu sync.Mutex
		heard := map[string]syncing.SyncingMetaUpdate{}
		set.Connect(func(updates []syncing.SyncingMetaUpdate) {
			mu.Lock()
			defer mu.Unlock()
			for _, u := range updates {
				heard[u.Holder+" "+u.Type] = u
			}
		})
		told := func() map[string]syncing.SyncingMetaUpdate {
			mu.Lock()
			defer mu.Unlock()
			return maps.Clone(heard)
		}
		run(set.Run)
		Eventually(set.Ready(), "10s").Should(BeClosed())
		Expect(told()).To(BeEmpty(), "the snapshot is no change")
		meta, ok := set.Meta("folders/f", "Document")
		Expect(ok).To(BeTrue())
		Expect(meta.Regions).To(Equal([]string{"eu", "us"}))

		g.save("eu", folder(`{"enabledRegions":["eu","us"],"defaultControlRegion":"eu","criteriaForDisabledSync":[{"destRegion":"us","resourceTypeName":"library.example.com/Document"}]}`), "folders/f")
		Eventually(told, "10s").Should(Equal(map[string]syncing.SyncingMetaUpdate{"folders/f Document": {
			Holder: "folders/f", Type: "Document", Meta: syncing.SyncingMeta{ControlRegion: "eu", Regions: []string{"eu"}},
		}}), "only what is different is told")
		Expect(set.Says("folders/f")).NotTo(BeEmpty())
		_, err := g.stacks["eu"].BatchWrite(ctx, []store.Write{{Op: store.Delete, Name: "folders/f"}})
		Expect(err).NotTo(HaveOccurred())
		Eventually(func() bool { return told()["folders/f Document"].Gone }, "10s").Should(BeTrue())
		_, ok = set.Meta("folders/f", "Document")
		Expect(ok).To(BeFalse())
		_, _, ok = set.Expected("folders/f/documents/d", "Document")
		Expect(ok).To(BeFalse(), "its holder is not here, so nothing can be said")
	})
})

// failingPlacer is a database that is gone after some batches.
type failingPlacer struct {
	*postgres.Store
	left    atomic.Int64
	refused atomic.Bool
}

func (f *failingPlacer) Place(ctx context.Context, p []store.Placement) (int, error) {
	if f.left.Add(-1) < 0 {
		f.refused.Store(true)
		return 0, store.Errorf(store.Unavailable, "", "gone")
	}
	return f.Store.Place(ctx, p)
}

// countingPlacer counts what is changed.
type countingPlacer struct {
	*postgres.Store
	rows atomic.Int64
}

func (c *countingPlacer) Place(ctx context.Context, p []store.Placement) (int, error) {
	n, err := c.Store.Place(ctx, p)
	c.rows.Add(int64(n))
	return n, err
}
