package region_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/region"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestRegion(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "store/region")
}

// A folder is a policy holder below the global root; documents follow it, each type with another sync type; sites may be regional.
const schema = `
service: docs.example.com
multiRegionPolicy: {enabledRegions: [ap, eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Setting, plural: settings, patterns: ["settings/{setting}"]}
  - {type: Folder, plural: folders, patterns: ["folders/{folder}"], policyHolder: {field: policy}}
  - {type: Document, plural: documents, patterns: ["folders/{folder}/documents/{document}"], parent: Folder, onParentDeleted: CascadeDelete}
  - {type: Draft, plural: drafts, patterns: ["folders/{folder}/drafts/{draft}"], parent: Folder, onParentDeleted: CascadeDelete, syncType: Never}
  - {type: Notice, plural: notices, patterns: ["folders/{folder}/notices/{notice}"], parent: Folder, onParentDeleted: CascadeDelete, syncType: AlwaysInScope}
  - {type: Catalog, plural: catalogs, patterns: ["folders/{folder}/catalogs/{catalog}"], parent: Folder, onParentDeleted: CascadeDelete, syncType: AlwaysGlobally}
  - {type: Site, plural: sites, patterns: ["folders/{folder}/regions/{region}/sites/{site}"], parent: Folder, onParentDeleted: CascadeDelete}
`

// counting counts the reads that reach the database.
type counting struct {
	store.Store
	mu   sync.Mutex
	gets int
}

func (c *counting) Get(ctx context.Context, name string) (*store.Resource, error) {
	c.mu.Lock()
	c.gets++
	c.mu.Unlock()
	return c.Store.Get(ctx, name)
}

var _ = Describe("the region layer", func() {
	var core *postgres.Store
	var reads *counting
	var cache *policy.Cache
	var s *region.Store
	var version *descriptor.Version
	const euUs = `{"policy":{"enabledRegions":["eu","us"],"defaultControlRegion":"eu"}}`

	compile := func(schema string) (service string) {
		GinkgoHelper()
		var spec v1alpha1.ServiceDescriptorSpec
		Expect(yaml.UnmarshalStrict([]byte(schema), &spec)).To(Succeed())
		s, err := descriptor.Compile(&spec)
		Expect(err).NotTo(HaveOccurred())
		version = s.Version("v1")
		return s.Name
	}
	BeforeEach(func() {
		service := compile(schema)
		var err error
		core, err = postgres.Open(GinkgoTB().Context(), postgres.Config{DSN: pgtest.Database(GinkgoTB()), Service: service, Region: "eu", Version: "v1"})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(core.Close)
		current := func() *descriptor.Version { return version }
		reads = &counting{Store: core}
		cache = policy.New(current, reads, slog.New(slog.DiscardHandler))
		s = region.Layer(reads, "eu", current, cache)
	})
	write := func(ctx context.Context, op store.Op, name, body string) (*store.Resource, error) {
		r, err := store.Apply(ctx, s, store.Write{Op: op, Name: name, Body: []byte(body)})
		return r.Resource, err
	}
	create := func(ctx context.Context, name, body string) *store.Resource {
		GinkgoHelper()
		r, err := write(ctx, store.Create, name, body)
		Expect(err).NotTo(HaveOccurred())
		return r
	}
	code := func(err error) store.Code { return store.CodeOf(err) }

	It("fills metadata.syncing on every save, whatever the caller sends (F26, F27, F31, F33)", func(ctx SpecContext) {
		create(ctx, "folders/f", `{"policy":{"enabledRegions":["eu","us"],"defaultControlRegion":"eu","criteriaForDisabledSync":[{"destRegion":"us"}]}}`)
		for name, want := range map[string][]string{
			"settings/s":                   {"ap", "eu", "us"}, // global: the service's policy
			"folders/f/documents/d":        {"eu"},             // the rule disables us
			"folders/f/drafts/d":           {"eu"},
			"folders/f/notices/n":          {"eu", "us"}, // criteria do not count
			"folders/f/catalogs/c":         {"*"},
			"folders/f/regions/eu/sites/s": {"eu"},
		} {
			r, err := store.Apply(ctx, s, store.Write{Op: store.Save, Name: name, OwningRegion: "us", Regions: []string{"mars"}})
			Expect(err).NotTo(HaveOccurred())
			Expect(r.Resource.OwningRegion).To(Equal("eu"), name)
			Expect(r.Resource.Regions).To(Equal(want), name)
		}
	})

	It("refreshes a stale metadata.syncing when an unchanged resource is saved (F28)", func(ctx SpecContext) {
		create(ctx, "folders/f", euUs)
		before := create(ctx, "folders/f/documents/d", `{"a":1}`)
		_, err := write(ctx, store.Save, "folders/f", `{"policy":{"enabledRegions":["ap","eu"],"defaultControlRegion":"eu"}}`)
		Expect(err).NotTo(HaveOccurred())
		after, err := write(ctx, store.Save, "folders/f/documents/d", `{"a":1}`)
		Expect(err).NotTo(HaveOccurred())
		Expect(after.Regions).To(Equal([]string{"ap", "eu"}))
		Expect(after.Version.Compare(before.Version)).To(Equal(1))
		Expect(after.Generation).To(Equal(before.Generation))
		again, err := write(ctx, store.Save, "folders/f/documents/d", `{"a":1}`)
		Expect(err).NotTo(HaveOccurred())
		Expect(again.Version).To(Equal(after.Version))
	})

	It("is a layer that can be left out where there is one region (F29)", func(ctx SpecContext) {
		r, err := store.Apply(ctx, core, store.Write{Op: store.Create, Name: "folders/none/documents/d", Type: "Document"})
		Expect(err).NotTo(HaveOccurred())
		Expect(r.Resource.Regions).To(Equal([]string{"eu"}))
	})

	It("asks the database for a policy once, and again after it has changed, here or elsewhere (F32)", func(ctx SpecContext) {
		running, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- cache.Run(running, core.Feed()) }()
		defer func() { stop(); Expect(<-done).To(Succeed()) }()

		create(ctx, "folders/f", euUs)
		create(ctx, "folders/f/documents/first", `{}`)
		Eventually(func(g Gomega) { // the change of the folder itself has passed through the feed
			before := reads.gets
			for i := range 20 {
				_, err := write(ctx, store.Save, fmt.Sprintf("folders/f/documents/%d", i), `{}`)
				g.Expect(err).NotTo(HaveOccurred())
			}
			g.Expect(reads.gets).To(Equal(before))
		}, "10s").Should(Succeed())

		_, err := store.Apply(ctx, core, store.Write{Op: store.Update, Name: "folders/f", Type: "Folder", Regions: []string{"ap", "eu", "us"},
			Body: []byte(`{"policy":{"enabledRegions":["eu"],"defaultControlRegion":"eu"}}`)}) // as another process would
		Expect(err).NotTo(HaveOccurred())
		Eventually(func() []string {
			r, err := write(ctx, store.Save, "folders/f/documents/later", `{}`)
			Expect(err).NotTo(HaveOccurred())
			return r.Regions
		}, "10s").Should(Equal([]string{"eu"}))
	})

	It("tells where a write belongs, and refuses it elsewhere (F34)", func(ctx SpecContext) {
		create(ctx, "folders/f", `{"policy":{"enabledRegions":["eu","us"],"defaultControlRegion":"us"}}`)
		for name, want := range map[string]string{"settings/s": "eu", "folders/f": "eu", "folders/f/documents/d": "us", "folders/f/regions/eu/sites/s": "eu", "folders/f/regions/us/sites/s": "us"} {
			n, err := version.ParseName(name)
			Expect(err).NotTo(HaveOccurred())
			Expect(s.Owner(ctx, n, nil)).To(Equal(want), name)
			if want != "eu" {
				_, err := write(ctx, store.Save, name, `{}`)
				Expect(code(err)).To(Equal(store.FailedPrecondition))
				Expect(err).To(MatchError(ContainSubstring("owned by region us")))
			}
		}
	})

	It("refuses a policy that would orphan resources, and says why and how many there are (F36, spec 4.9)", func(ctx SpecContext) {
		all := `{"policy":{"enabledRegions":["ap","eu","us"],"defaultControlRegion":"eu"}}`
		create(ctx, "folders/f", all)
		create(ctx, "folders/other", all)
		for i := range 3 {
			create(ctx, fmt.Sprintf("folders/f/documents/d%d", i), `{}`)
			create(ctx, fmt.Sprintf("folders/other/documents/d%d", i), `{}`)
		}
		create(ctx, "folders/f/regions/eu/sites/s", `{}`)
		var asked []string
		var silent error
		s.Guard(func(ctx context.Context, region, holder string) ([]store.Holding, error) {
			asked = append(asked, region)
			if region != "eu" {
				return []store.Holding{{Type: "Site", Regional: true, Regions: []string{"eu", "us"}, Rows: 7, Example: "folders/f/regions/us/sites/s"}}, silent
			}
			return policy.Holdings(ctx, version, core, holder, false)
		})
		save := func(p string) error {
			asked = nil
			_, err := write(ctx, store.Save, "folders/f", `{"policy":`+p+`}`)
			return err
		}
		err := save(`{"enabledRegions":["ap","eu"],"defaultControlRegion":"eu"}`)
		Expect(code(err)).To(Equal(store.FailedPrecondition))
		Expect(err).To(MatchError(ContainSubstring("region us, which it does not enable any more, still owns 7 resources (7 Site)")))
		Expect(asked).To(Equal([]string{"us"}), "nobody else is asked")

		err = save(`{"enabledRegions":["ap","eu","us"],"defaultControlRegion":"ap"}`)
		Expect(code(err)).To(Equal(store.FailedPrecondition))
		Expect(err).To(MatchError(ContainSubstring("region eu still owns 3 resources without a region in their names (3 Document), which would belong to ap")))

		_, err = store.Apply(ctx, s, store.Write{Op: store.Update, Name: "folders/f", Mask: []string{"policy.enabledRegions"}, Body: []byte(`{"policy":{"enabledRegions":["eu"]}}`)})
		Expect(code(err)).To(Equal(store.FailedPrecondition), "a mask does not hide it")

		silent = store.Errorf(store.Unavailable, "", "away")
		err = save(`{"enabledRegions":["ap","eu"],"defaultControlRegion":"eu"}`)
		Expect(code(err)).To(Equal(store.Unavailable), "no answer is no permission")

		Expect(save(`{"enabledRegions":["ap","eu","us"],"defaultControlRegion":"eu","criteriaForDisabledSync":[{"destRegion":"us"}]}`)).To(Succeed())
		Expect(asked).To(BeEmpty(), "it takes nothing from anybody")
		r, err := s.Get(ctx, "folders/f")
		Expect(err).NotTo(HaveOccurred())
		Expect(r.Version.Number).To(Equal(int64(2)), "what was refused was not written")
	})

	It("measures what is owned under a policy, by type and regions, without what a nearer holder governs", func(ctx SpecContext) {
		all := `{"policy":{"enabledRegions":["ap","eu","us"],"defaultControlRegion":"eu"}}`
		for _, f := range []string{"folders/f", "folders/f0", "folders/f-1", "folders/e"} {
			create(ctx, f, all)
			create(ctx, f+"/documents/d", `{"a":1}`)
			create(ctx, f+"/regions/eu/sites/s", `{}`)
		}
		create(ctx, "settings/s", `{}`)
		owned, err := policy.Holdings(ctx, version, core, "folders/f", true)
		Expect(err).NotTo(HaveOccurred())
		Expect(owned).To(Equal([]store.Holding{
			{Type: "Document", Regions: []string{"ap", "eu", "us"}, Rows: 1, Bytes: 10, Example: "folders/f/documents/d"},
			{Type: "Site", Regional: true, Regions: []string{"ap", "eu", "us"}, Rows: 1, Bytes: 4, Example: "folders/f/regions/eu/sites/s"},
		}))
		global, err := policy.Holdings(ctx, version, core, "", false)
		Expect(err).NotTo(HaveOccurred())
		Expect(global).To(Equal([]store.Holding{
			{Type: "Folder", Regions: []string{"ap", "eu", "us"}, Rows: 4, Example: "folders/e"},
			{Type: "Setting", Regions: []string{"ap", "eu", "us"}, Rows: 1, Example: "settings/s"},
		}))

		now, violations := descriptor.PolicyFromJSON([]byte(`{"enabledRegions":["ap","eu"],"defaultControlRegion":"eu"}`))
		Expect(violations).To(BeEmpty())
		moves, updates := policy.Moves(version, "eu", owned, now, []string{"ap", "eu", "us"})
		Expect(updates).To(Equal(int64(2)))
		Expect(moves).To(Equal([]policy.Move{
			{Region: "us", Owner: "eu", Type: "Document", Dropped: true, Rows: 1, Bytes: 10},
			{Region: "us", Owner: "eu", Type: "Site", Dropped: true, Rows: 1, Bytes: 4},
		}))
	})

	It("writes resources of one policy holder in a transaction, besides global ones (F35, I41)", func(ctx SpecContext) {
		create(ctx, "folders/f", euUs)
		create(ctx, "folders/g", euUs)
		_, err := s.BatchWrite(ctx, []store.Write{
			{Op: store.Create, Name: "folders/f/documents/d"}, {Op: store.Create, Name: "settings/s"}, {Op: store.Create, Name: "folders/g/documents/d"}})
		Expect(code(err)).To(Equal(store.FailedPrecondition))
		_, err = s.Get(ctx, "settings/s")
		Expect(code(err)).To(Equal(store.NotFound))
		_, err = s.BatchWrite(ctx, []store.Write{
			{Op: store.Create, Name: "folders/f/documents/d"}, {Op: store.Create, Name: "settings/s"}, {Op: store.Create, Name: "folders/h", Body: []byte(euUs)}})
		Expect(err).NotTo(HaveOccurred())
	})

	It("creates a holder and what is below it in one transaction", func(ctx SpecContext) {
		batch := []store.Write{{Op: store.Create, Name: "folders/new/documents/d"}, {Op: store.Create, Name: "folders/new", Body: []byte(euUs)}}
		n, err := version.ParseName(batch[0].Name)
		Expect(err).NotTo(HaveOccurred())
		Expect(s.Owner(ctx, n, batch)).To(Equal("eu"))
		_, err = s.Owner(ctx, n, nil)
		Expect(code(err)).To(Equal(store.FailedPrecondition))
		results, err := s.BatchWrite(ctx, batch)
		Expect(err).NotTo(HaveOccurred())
		Expect(results[0].Resource.Regions).To(Equal([]string{"eu", "us"}))
	})

	It("creates nothing outside the enabled regions, and still changes what is there (F36, I42)", func(ctx SpecContext) {
		create(ctx, "folders/f", euUs)
		create(ctx, "folders/f/regions/eu/sites/old", `{}`)
		_, err := write(ctx, store.Save, "folders/f", `{"policy":{"enabledRegions":["us"],"defaultControlRegion":"us"}}`)
		Expect(err).NotTo(HaveOccurred())
		for _, op := range []store.Op{store.Create, store.Save} {
			_, err = write(ctx, op, "folders/f/regions/eu/sites/new", `{}`)
			Expect(code(err)).To(Equal(store.FailedPrecondition))
			Expect(err).To(MatchError(ContainSubstring("enabledRegions")))
		}
		_, err = write(ctx, store.Update, "folders/f/regions/eu/sites/new", `{}`)
		Expect(code(err)).To(Equal(store.NotFound))
		_, err = write(ctx, store.Save, "folders/f/regions/eu/sites/old", `{"v":2}`)
		Expect(err).NotTo(HaveOccurred())
	})

	It("moves nothing when the policy of the service changes: what it orphans is changed and deleted where it is, and what is new is not (spec 4.9)", func(ctx SpecContext) {
		create(ctx, "settings/old", `{}`)
		compile(strings.Replace(schema, "enabledRegions: [ap, eu, us], defaultControlRegion: eu", "enabledRegions: [ap, us], defaultControlRegion: us", 1))
		for name, want := range map[string]string{"settings/old": "eu", "settings/new": "us"} {
			n, err := version.ParseName(name)
			Expect(err).NotTo(HaveOccurred())
			Expect(s.Owner(ctx, n, nil)).To(Equal(want), name)
		}
		r, err := write(ctx, store.Save, "settings/old", `{"v":2}`)
		Expect(err).NotTo(HaveOccurred())
		Expect(r.OwningRegion).To(Equal("eu"))
		for _, op := range []store.Op{store.Create, store.Save, store.Update, store.Delete} {
			_, err := write(ctx, op, "settings/new", `{}`)
			Expect(err).To(MatchError(ContainSubstring("owned by region us")))
		}
		_, err = write(ctx, store.Create, "settings/old", `{}`)
		Expect(code(err)).To(Equal(store.FailedPrecondition))
		_, err = write(ctx, store.Delete, "settings/old", "")
		Expect(err).NotTo(HaveOccurred())
		_, err = write(ctx, store.Save, "settings/old", `{}`)
		Expect(err).To(MatchError(ContainSubstring("owned by region us")), "once it is gone it is not ours any more")
	})

	It("refuses to write below a holder that does not exist, and lets what it left behind be deleted", func(ctx SpecContext) {
		_, err := write(ctx, store.Create, "folders/none/documents/d", `{}`)
		Expect(code(err)).To(Equal(store.FailedPrecondition))
		Expect(err).To(MatchError(ContainSubstring("folders/none does not exist: create that first")))
		create(ctx, "folders/f", euUs)
		create(ctx, "folders/f/documents/d", `{}`)
		_, err = write(ctx, store.Delete, "folders/f", "")
		Expect(err).NotTo(HaveOccurred())
		n, err := version.ParseName("folders/f/documents/d")
		Expect(err).NotTo(HaveOccurred())
		Expect(s.Owner(ctx, n, nil)).To(Equal("eu"))
		_, err = write(ctx, store.Delete, n.Full, "")
		Expect(err).NotTo(HaveOccurred())
	})
})
