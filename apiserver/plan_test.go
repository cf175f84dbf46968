package apiserver

import (
	"context"
	"errors"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"google.golang.org/protobuf/encoding/protojson"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/store"
)

// planned is a Planner with one answer.
type planned struct {
	plan *constraint.Plan
	err  error
}

func (p planned) PlanDelete(context.Context, string) (*constraint.Plan, error) { return p.plan, p.err }

var _ = Describe("The form of a plan", func() {
	It("counts, and tells what refuses the deletion from what holds up its consequences", func() {
		here, there := store.Location{Service: service, Region: "eu"}, store.Location{Service: "apps.example.com", Region: "us"}
		until := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
		p := &constraint.Plan{
			Deployments: []constraint.PlannedDeployment{
				{Location: here, Deletes: 3, Unsets: 2, Deleted: []constraint.PlannedChange{
					{Name: "sections/a", Type: "Section"}, {Name: "sections/b", Type: "Section", Field: "next", Target: "sections/a", Async: true},
				}, Cleared: []constraint.PlannedChange{{Name: "sections/c", Field: "next", Target: "sections/a"}, {Name: "sections/d", Field: "next", Target: "sections/b", Async: true}}},
				{Location: there, Deletes: 1, Deleted: []constraint.PlannedChange{{Name: "apps/x", Field: "section", Target: "sections/a", Async: true}}},
			},
			Blockers: []store.Blocker{
				{Target: "apps/x", Location: there, Referrer: "apps/y"},
				{Target: "sections/b", Location: there, Referrer: "apps/z"},
			},
			Unasked: []constraint.UnaskedDeployment{{Location: there, Names: 2, Err: &store.Error{Code: store.Unavailable, Reason: "it cannot be reached", Cause: errors.New("secret")}}},
			Ownees:  []store.Location{there},
		}
		s := &Server{cfg: Config{Service: service, Region: "eu"}}
		out := s.planOf(p)
		Expect(out.GetRefused()).To(BeFalse())
		Expect(out.GetTruncated()).To(BeTrue(), "one of the three deletes is not listed")
		Expect(out.GetDeployments()[0]).To(SatisfyAll(HaveField("Deletes", int32(3)), HaveField("Unsets", int32(2)), HaveField("Asynchronous", int32(3))))
		Expect(out.GetDeployments()[1].GetAsynchronous()).To(Equal(int32(1)))
		Expect(out.GetBlockers()).To(HaveEach(HaveField("Asynchronous", true)))
		Expect(out.GetUnasked()[0].GetError()).To(Equal("it cannot be reached"))
		Expect(out.GetOwnees()).To(Equal([]string{"apps.example.com/us"}))

		p.Blockers = append(p.Blockers, store.Blocker{Target: "sections/a", Location: there, Referrer: "apps/new", TentativeUntil: until})
		out = s.planOf(p)
		Expect(out.GetRefused()).To(BeTrue())
		Expect(out.GetBlockers()[1]).To(SatisfyAll(HaveField("Asynchronous", false), HaveField("Location", "apps.example.com/us"), WithTransform((*dbcontrollerv1.PlannedBlocker).GetTentativeUntil, Not(BeNil()))))
		Expect(s.planOf(&constraint.Plan{TooLarge: true}).GetRefused()).To(BeTrue())
	})
})

var _ = Describe("Plans", func() {
	var w *world
	var eu rest
	BeforeEach(func() {
		w = newReferences("eu", "us")
		eu = w.rest("eu")
		for _, body := range []string{
			`{"create": {"resource": {"name": "sections/a"}}}, {"create": {"resource": {"name": "sections/a/packages/p"}}}`,
			`{"create": {"resource": {"name": "sections/b", "next": "sections/a"}}}, {"create": {"resource": {"name": "sections/c", "after": "sections/b"}}}`,
			`{"create": {"resource": {"name": "sections/d", "blocks": "sections/a"}}}`,
		} {
			a := eu.do("POST", ":batchWrite", `{"writes": [`+body+`]}`)
			Expect(a.status).To(Equal(http.StatusOK), a.text)
		}
	})

	// plan asks for one over REST.
	plan := func(r rest, name string) *dbcontrollerv1.DeletionPlan {
		GinkgoHelper()
		a := r.do("DELETE", "/"+name+"?validate_only=true&allow_missing=true", "")
		Expect(a.status).To(Equal(http.StatusOK), a.text)
		res := new(dbcontrollerv1.DeleteResponse)
		Expect(protojson.Unmarshal([]byte(a.text), res)).To(Succeed(), a.text)
		Expect(res.GetPlan()).NotTo(BeNil())
		return res.GetPlan()
	}

	It("says what would go and what forbids it, from any region, as the deletion then does (F46)", func() {
		for _, region := range []string{"eu", "us"} {
			p := plan(w.rest(region), "sections/a")
			Expect(p.GetRefused()).To(BeTrue())
			Expect(p.GetBlockers()).To(ConsistOf(SatisfyAll(HaveField("Referrer", "sections/d"), HaveField("Field", "blocks"), HaveField("Target", "sections/a"), HaveField("Location", service+"/eu"))))
			Expect(p.GetUnasked()).To(BeEmpty())
			Expect(p.GetDeployments()).To(HaveLen(1))
			d := p.GetDeployments()[0]
			Expect(d.GetLocation()).To(Equal(service + "/eu"))
			Expect(d.GetDeletes()).To(Equal(int32(3)))
			Expect(d.GetUnsets()).To(Equal(int32(1)))
			Expect(d.GetAsynchronous()).To(Equal(int32(2)))
			Expect(d.GetChanges()).To(ConsistOf(
				SatisfyAll(HaveField("Name", "sections/a"), HaveField("Field", "")),
				SatisfyAll(HaveField("Name", "sections/a/packages/p"), HaveField("Field", "name"), HaveField("Target", "sections/a"), HaveField("Asynchronous", false)),
				SatisfyAll(HaveField("Name", "sections/b"), HaveField("Field", "next"), HaveField("Asynchronous", true)),
				SatisfyAll(HaveField("Name", "sections/c"), HaveField("Field", "after"), HaveField("Target", "sections/b"), HaveField("Unset", true), HaveField("Asynchronous", true)),
			))
		}

		By("a refusal that names the blocker")
		for _, region := range []string{"eu", "us"} {
			a := w.rest(region).do("DELETE", "/sections/a", "")
			Expect(a.status).To(Equal(http.StatusBadRequest))
			Expect(a.json()["error"]).To(SatisfyAll(HaveKeyWithValue("status", "FAILED_PRECONDITION"), HaveKeyWithValue("message", SatisfyAll(
				ContainSubstring("sections/a"), ContainSubstring("sections/d"), ContainSubstring("blocks"), ContainSubstring("delete them first")))))
			Expect(a.json()["error"]).To(HaveKeyWithValue("details", ContainElement(SatisfyAll(
				HaveKeyWithValue("@type", "type.googleapis.com/google.rpc.PreconditionFailure"),
				HaveKeyWithValue("violations", ConsistOf(SatisfyAll(
					HaveKeyWithValue("type", "REFERENCED"), HaveKeyWithValue("subject", "sections/a"), HaveKeyWithValue("description", "sections/d (field blocks)")))),
			))))
		}

		By("and without the blocker the deletion")
		Expect(eu.do("DELETE", "/sections/d", "").text).To(Equal("{}"))
		Expect(plan(eu, "sections/a").GetRefused()).To(BeFalse())
		Expect(eu.do("DELETE", "/sections/a", "").text).To(Equal("{}"))
		Expect(eu.do("GET", "/sections/a/packages/p", "").status).To(Equal(http.StatusNotFound))
	})

	It("finds references in another region, and says when it cannot ask there", func() {
		a := w.rest("us").do("POST", "/regions/us/mirrors?id=m", `{"section": "sections/b"}`)
		Expect(a.status).To(Equal(http.StatusOK), a.text)
		p := plan(eu, "sections/b")
		Expect(p.GetRefused()).To(BeTrue(), "the write in us is not confirmed yet")
		Expect(p.GetBlockers()).To(ContainElement(SatisfyAll(HaveField("Referrer", "regions/us/mirrors/m"), HaveField("Location", service+"/us"))))

		w.regions["us"].stop()
		p = plan(eu, "sections/b")
		Expect(p.GetUnasked()).To(ConsistOf(SatisfyAll(HaveField("Location", service+"/us"), HaveField("Names", int32(1)), HaveField("Error", Not(BeEmpty())))))
	})

	It("writes nothing, in no table of any region", func() {
		a := w.rest("us").do("POST", "/regions/us/mirrors?id=m", `{"section": "sections/b"}`)
		Expect(a.status).To(Equal(http.StatusOK), a.text)
		before := w.tables()
		Expect(before).To(SatisfyAll(HaveKey("eu v1.resources"), HaveKey("us v1.refs"), HaveKey("eu v1.sources"), HaveKey("us v1.fences")))
		for _, name := range []string{"sections/a", "sections/b", "sections/d", "regions/us/mirrors/m"} {
			plan(eu, name)
			plan(w.rest("us"), name)
			for _, region := range []string{"eu", "us"} {
				Expect(w.rest(region).do("GET", "/"+name+":explain", "").status).To(Equal(http.StatusOK))
			}
		}
		Expect(w.tables()).To(Equal(before))
	})

	It("answers for what is missing as the deletion would", func() {
		Expect(eu.do("DELETE", "/sections/none?validate_only=true", "").status).To(Equal(http.StatusNotFound))
		Expect(eu.do("DELETE", "/sections/a?validate_only=true&etag=1.99", "").status).To(Equal(http.StatusConflict))
		Expect(plan(eu, "sections/none").GetDeployments()).To(BeEmpty())
	})
})

var _ = Describe("A server that is told of no references", func() {
	It("is not served without a planner", func() {
		w := newWorld(false, nil, "eu")
		_, err := w.resources(alice, "eu").Delete(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.DeleteRequest{Name: "sections/a", ValidateOnly: true}))
		Expect(connect.CodeOf(err)).To(Equal(connect.CodeUnimplemented))
		_, err = w.resources(alice, "eu").Explain(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.ExplainRequest{Name: "sections/a"}))
		Expect(connect.CodeOf(err)).To(Equal(connect.CodeUnimplemented))
	})
})

// tables are the rows of all tables of all regions, with the ids of the transactions that wrote them.
func (w *world) tables() map[string][]string {
	GinkgoHelper()
	ctx := GinkgoT().Context()
	all := map[string][]string{}
	for region, r := range w.regions {
		conn, err := pgx.Connect(ctx, r.dsn)
		Expect(err).NotTo(HaveOccurred())
		defer conn.Close(ctx)
		rows, err := conn.Query(ctx, "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')")
		Expect(err).NotTo(HaveOccurred())
		names, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct{ Schema, Table string }])
		Expect(err).NotTo(HaveOccurred())
		for _, n := range names {
			rows, err := conn.Query(ctx, "SELECT xmin::text || ' ' || t::text FROM "+pgx.Identifier{n.Schema, n.Table}.Sanitize()+" AS t ORDER BY 1")
			Expect(err).NotTo(HaveOccurred())
			all[region+" "+n.Schema+"."+n.Table], err = pgx.CollectRows(rows, pgx.RowTo[string])
			Expect(err).NotTo(HaveOccurred())
		}
	}
	return all
}
