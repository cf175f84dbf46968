package apiserver

import (
	"fmt"
	"net/http"

	"connectrpc.com/connect"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/search"
	searchpostgres "github.com/dbcontroller/db-controller/search/postgres"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

var _ = Describe("search", func() {
	declare := func(w *world) {
		GinkgoHelper()
		d := w.descriptor.DeepCopy()
		d.Spec.Versions[0].Resources[1].Search = &v1alpha1.ResourceSearch{
			Fields:  []v1alpha1.SearchField{{Path: "name", Weight: "A"}, {Path: "note", Weight: "C"}},
			Filters: []v1alpha1.SearchFilter{{Path: "kind", Type: v1alpha1.SearchString}, {Path: "size", Type: v1alpha1.SearchNumber}},
			Facets:  []string{"kind"},
		}
		w.descriptor = d
		w.publish()
	}

	It("says what to configure when there is none", func() {
		w := newWorld(true, nil, "eu")
		r := w.rest("eu").do("GET", "/sections/-/packages:search?q=x", "")
		Expect(r.status).To(Equal(http.StatusBadRequest))
		Expect(r.text).To(And(ContainSubstring("PRECONDITION_FAILED"), ContainSubstring("spec.search")))
	})

	It("shows resources as the database has them, with highlights, facets and pages", func() {
		s, err := searchpostgres.Open(GinkgoT().Context(), searchpostgres.Config{DSN: pgtest.Database(GinkgoTB()), Service: service, Region: "eu", Version: "v1"})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(s.Close)
		w := newWorld(false, func(c *Config) { c.Searcher = s }, "eu")
		api := w.rest("eu")
		Expect(api.do("GET", "/sections/admin/packages:search?q=x", "").text).To(And(ContainSubstring("PRECONDITION_FAILED"), ContainSubstring("search.fields")))
		declare(w)

		Expect(api.do("POST", "/sections?id=admin", "{}").status).To(Equal(http.StatusOK))
		for i, note := range []string{"A walking library", "libraries & gardens", "nothing"} {
			body := fmt.Sprintf(`{"version": "1", "note": %q, "kind": "k%d", "size": %d}`, note, i%2, i)
			Expect(api.do("POST", fmt.Sprintf("/sections/admin/packages?id=p%d", i), body).status).To(Equal(http.StatusOK))
		}
		service, _ := w.registry.View().Service(service)
		version := service.Version("v1")
		lease, _, err := s.Begin(GinkgoT().Context(), feed.Range{To: ring}, "s")
		Expect(err).NotTo(HaveOccurred())
		page, err := w.regions["eu"].store.List(GinkgoT().Context(), store.Query{Type: "Package"})
		Expect(err).NotTo(HaveOccurred())
		var b search.Batch
		for _, r := range page.Resources {
			d, err := search.DocumentOf(version.Type("Package"), r)
			Expect(err).NotTo(HaveOccurred())
			b.Upserts = append(b.Upserts, d)
		}
		ghost := b.Upserts[0]
		ghost.Name = "sections/admin/packages/ghost"
		b.Upserts = append(b.Upserts, ghost)
		Expect(s.Apply(GinkgoT().Context(), lease, b)).To(Succeed())

		r := api.do("GET", "/sections/admin/packages:search?q=library&facets=kind&pageSize=2", "").json()
		hits := r["hits"].([]any)
		Expect(hits).To(HaveLen(1), "a document without a row is left out: %v", r)
		Expect(r["nextPageToken"]).NotTo(BeEmpty())
		Expect(r["facets"]).To(Equal([]any{map[string]any{"field": "kind", "values": []any{
			map[string]any{"value": "k0", "count": "2"}, map[string]any{"value": "k1", "count": "1"}}}}))
		r = api.do("GET", "/sections/-/packages:search?q=garden&filter=size+%3E+0", "").json()
		hit := r["hits"].([]any)[0].(map[string]any)
		Expect(hit["resource"]).To(And(HaveKeyWithValue("name", "sections/admin/packages/p1"), HaveKeyWithValue("note", "libraries & gardens"), HaveKey("metadata")))
		Expect(hit["highlights"]).To(Equal([]any{map[string]any{"field": "note", "snippet": "libraries &amp; <em>gardens</em>"}}))
		Expect(hit["score"]).To(BeNumerically(">", 0))

		Expect(api.do("GET", "/sections/admin/packages:search?q=x&filter=note%3Dx", "").violations()).To(Equal([]string{"filter"}))
		Expect(api.do("GET", "/sections/admin/packages:search?size=1", "").status).To(Equal(http.StatusBadRequest))
		Expect(api.do("POST", "/sections/admin/packages:search", "{}").status).NotTo(Equal(http.StatusOK))

		res, err := w.resources(alice, "eu").Search(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.SearchRequest{Collection: "sections/admin/packages", Filter: "kind = k1"}))
		Expect(err).NotTo(HaveOccurred())
		Expect(res.Msg.GetHits()).To(HaveLen(1))
		Expect(res.Msg.GetHits()[0].GetResource().GetName()).To(Equal("sections/admin/packages/p1"))
	})
})
