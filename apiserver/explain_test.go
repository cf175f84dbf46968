package apiserver

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/region"
)

// referring is a service whose resources refer to each other in all ways.
const referring = `
service: packages.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - type: Section
    plural: sections
    patterns: ["sections/{section}"]
    references:
    - {field: next, target: Section, onTargetDeleted: AsyncCascadeDelete}
    - {field: after, target: Section, onTargetDeleted: Unset}
    - {field: blocks, target: Section, onTargetDeleted: Block}
  - {type: Package, plural: packages, patterns: ["sections/{section}/packages/{package}"], parent: Section, onParentDeleted: CascadeDelete}
  - {type: Tenant, plural: tenants, patterns: ["tenants/{tenant}"], policyHolder: {field: policy}}
  - {type: Note, plural: notes, patterns: ["tenants/{tenant}/notes/{note}"], parent: Tenant, onParentDeleted: AsyncCascadeDelete}
  - {type: Mirror, plural: mirrors, patterns: ["regions/{region}/mirrors/{mirror}"], references: [{field: section, target: Section, onTargetDeleted: Unset}]}
`

// newReferences is a world of servers with the whole stack: references are checked. Nothing runs that would confirm or finish anything.
func newReferences(names ...string) *world {
	GinkgoHelper()
	log := slog.New(slog.DiscardHandler)
	w := newWorld(false, func(c *Config) {
		core := c.Replica.(*postgres.Store)
		topology := c.Topology
		version := func() *descriptor.Version {
			s, _ := topology.View().Service(service)
			return s.Version("v1")
		}
		policies := policy.New(version, core, log)
		peers := mixin.NewPeers(mixin.PeersConfig{Service: service, Region: c.Region, Version: "v1", Topology: topology, TLS: c.TLS, Timeout: time.Second})
		DeferCleanup(peers.Close)
		var stack *region.Store
		layer := constraint.Layer(core, constraint.LayerConfig{
			Self: store.Location{Service: service, Region: c.Region}, Version: version, View: topology.View, Core: core, Peers: peers, Logger: log,
			Owner: func(ctx context.Context, n descriptor.Name, batch []store.Write) (string, error) {
				return stack.Owner(ctx, n, batch)
			},
		})
		stack = region.Layer(layer, c.Region, version, policies)
		server, err := mixin.NewServer(mixin.Config{
			Service: service, Region: c.Region, Version: "v1", Topology: topology, Core: core, Store: stack, Owners: stack, Policies: policies, Changes: core.Feed(), Logger: log,
			Holdings: func(ctx context.Context, holder string, bytes bool) ([]store.Holding, map[string]float64, error) {
				owned, err := policy.Holdings(ctx, version(), core, holder, bytes)
				return owned, map[string]float64{"policy": 1000, "copy eu": 10}, err
			},
		})
		Expect(err).NotTo(HaveOccurred())
		peers.SetLocal(server)
		c.Store, c.Owners, c.Mixin, c.Planner, c.Census = stack, stack, server, layer, peers
		c.Explainer = &Explainer{Policies: policies, Core: core, Peers: peers}
	}, names...)
	w.descriptor.Spec = v1alpha1.ServiceDescriptorSpec{}
	Expect(yaml.UnmarshalStrict([]byte(referring), &w.descriptor.Spec)).To(Succeed())
	w.publish()
	return w
}

var _ = Describe("Explain", func() {
	var w *world
	var eu, us rest
	BeforeEach(func() {
		w = newReferences("eu", "us")
		eu, us = w.rest("eu"), w.rest("us")
	})

	write := func(r rest, body string) {
		GinkgoHelper()
		a := r.do("POST", ":batchWrite", `{"writes": [`+body+`]}`)
		Expect(a.status).To(Equal(http.StatusOK), a.text)
	}
	create := func(r rest, resource string) { write(r, `{"create": {"resource": `+resource+`}}`) }
	explain := func(r rest, name, query string) *dbcontrollerv1.Explanation {
		GinkgoHelper()
		a := r.do("GET", "/"+name+":explain"+query, "")
		Expect(a.status).To(Equal(http.StatusOK), a.text)
		e := new(dbcontrollerv1.Explanation)
		Expect(protojson.Unmarshal([]byte(a.text), e)).To(Succeed(), a.text)
		return e
	}
	fieldOf := func(name string, value any) OmegaMatcher { return HaveField(name, value) }

	It("tells from any region who owns a resource, who holds it and what it has to do with others", func() {
		create(eu, `{"name": "sections/a"}`)
		create(eu, `{"name": "sections/a/packages/p"}`)
		create(eu, `{"name": "sections/b", "next": "sections/a"}`)
		create(us, `{"name": "regions/us/mirrors/m", "section": "sections/a"}`)

		for _, r := range []rest{eu, us} {
			e := explain(r, "sections/a", "")
			Expect(e.GetAnsweredBy()).To(Equal("eu"))
			Expect(e.GetOwner()).To(SatisfyAll(fieldOf("Region", "eu"), fieldOf("By", dbcontrollerv1.OwnerDecision_BY_SERVICE_POLICY), fieldOf("Reason", ContainSubstring(service))))
			Expect(e.GetState()).To(Equal("ACTIVE"))
			Expect(e.GetUuid()).NotTo(BeEmpty())
			Expect(e.GetRegions()).To(HaveExactElements(
				SatisfyAll(fieldOf("Region", "eu"), fieldOf("Expected", true), fieldOf("State", "ACTIVE"), fieldOf("ResourceVersion", "1"), fieldOf("OwningRegion", "eu")),
				SatisfyAll(fieldOf("Region", "us"), fieldOf("Expected", true), fieldOf("State", ""), fieldOf("Error", "")),
			))
			Expect(e.GetReferrers()).To(HaveExactElements(
				SatisfyAll(fieldOf("Name", "sections/a/packages/p"), fieldOf("Field", "name"), fieldOf("OnTargetDeleted", "CascadeDelete")),
				SatisfyAll(fieldOf("Name", "sections/b"), fieldOf("Field", "next"), fieldOf("OnTargetDeleted", "AsyncCascadeDelete")),
			))
			Expect(e.GetReferredFrom()).To(HaveExactElements(
				SatisfyAll(fieldOf("Location", service+"/eu"), fieldOf("Subscriber", true), fieldOf("Awaited", false)),
				SatisfyAll(fieldOf("Location", service+"/us"), fieldOf("Subscriber", true), fieldOf("Blocking", false)),
			))
			Expect(e.GetBlockades()).To(HaveExactElements(SatisfyAll(fieldOf("Referrer", "regions/us/mirrors/m"), fieldOf("Location", service+"/us"))))
			Expect(e.GetPending()).To(BeNil())
		}

		By("references to others and work that is pending")
		p := explain(us, "sections/a/packages/p", "")
		Expect(p.GetReferences()).To(HaveExactElements(SatisfyAll(fieldOf("Kind", "parent"), fieldOf("Target", "sections/a"), fieldOf("Location", service+"/eu"))))
		m := explain(eu, "regions/us/mirrors/m", "")
		Expect(m.GetOwner()).To(SatisfyAll(fieldOf("Region", "us"), fieldOf("By", dbcontrollerv1.OwnerDecision_BY_NAME)))
		Expect(m.GetReferences()).To(HaveExactElements(SatisfyAll(fieldOf("Field", "section"), fieldOf("Unconfirmed", true), fieldOf("OnTargetDeleted", "Unset"), fieldOf("Location", service+"/eu"))))
		Expect(m.GetPending()).To(SatisfyAll(fieldOf("State", "PENDING"), fieldOf("Tasks", []string{"CONFIRM_BLOCKADES"})))

		By("the last error and the next retry of its work")
		retry := time.Now().Add(time.Minute).Truncate(time.Second)
		Expect(w.regions["us"].store.NoteFailure(GinkgoT().Context(), "regions/us/mirrors/m", "eu is away", retry)).To(Succeed())
		m = explain(eu, "regions/us/mirrors/m", "")
		Expect(m.GetPending().GetLastError()).To(Equal("eu is away"))
		Expect(m.GetPending().GetNextRetry().AsTime()).To(BeTemporally("==", retry))
	})

	It("tells whose policy decides", func() {
		create(eu, `{"name": "tenants/t", "policy": {"enabledRegions": ["eu"], "defaultControlRegion": "eu"}}`)
		create(eu, `{"name": "tenants/t/notes/n"}`)
		Expect(explain(eu, "tenants/t/notes/n", "").GetOwner()).To(SatisfyAll(fieldOf("Region", "eu"), fieldOf("By", dbcontrollerv1.OwnerDecision_BY_POLICY_HOLDER),
			fieldOf("PolicyHolder", "tenants/t"), fieldOf("Reason", ContainSubstring("tenants/t"))))

		By("a policy that is being carried out (F82)")
		core := w.regions["eu"].store
		Expect(core.BeginPolicyWalks(GinkgoT().Context(), []store.PolicyWalk{{Holder: "tenants/t", Says: "new"}})).To(Succeed())
		walk, err := core.PolicyWalk(GinkgoT().Context(), "tenants/t")
		Expect(err).NotTo(HaveOccurred())
		progress := func(ahead bool) OmegaMatcher {
			return HaveExactElements(SatisfyAll(fieldOf("Holder", "tenants/t"), fieldOf("Round", int32(walk.Round)), fieldOf("Ahead", ahead)))
		}
		Expect(explain(eu, "tenants/t/notes/n", "").GetPolicyProgress()).To(progress(true))
		Expect(explain(eu, "tenants/t", "").GetPolicyProgress()).To(progress(false))
		walk.Done = true
		saved, err := core.SavePolicyWalk(GinkgoT().Context(), *walk)
		Expect(err).NotTo(HaveOccurred())
		Expect(saved).To(BeTrue())
		Expect(explain(eu, "tenants/t/notes/n", "").GetPolicyProgress()).To(BeEmpty())

		By("a region that the holder has not reached")
		a := us.do("GET", "/tenants/t/notes/n:explain", "")
		Expect(a.status).To(Equal(http.StatusBadRequest), a.text)
		Expect(a.text).To(SatisfyAll(ContainSubstring("region us cannot tell"), ContainSubstring("its policy holder tenants/t does not exist"), ContainSubstring("local_only")))
		Expect(explain(us, "tenants/t/notes/n", "?local_only=true").GetOwner()).To(SatisfyAll(fieldOf("Region", ""), fieldOf("Reason", ContainSubstring("tenants/t does not exist"))))

		By("a resource that has outlived its holder")
		Expect(eu.do("DELETE", "/tenants/t", "").text).To(Equal("{}"))
		Expect(explain(eu, "tenants/t/notes/n", "").GetOwner()).To(SatisfyAll(fieldOf("Region", "eu"), fieldOf("By", dbcontrollerv1.OwnerDecision_BY_RESOURCE), fieldOf("PolicyHolder", "tenants/t")))
	})

	It("names at most 20 referrers", func() {
		create(eu, `{"name": "sections/a"}`)
		for i := range 21 {
			create(eu, `{"name": "sections/b`+string(rune('a'+i))+`", "after": "sections/a"}`)
		}
		e := explain(eu, "sections/a", "")
		Expect(e.GetReferrers()).To(HaveLen(20))
		Expect(e.GetMoreReferrers()).To(BeTrue())
	})

	It("explains a deleted name that waits for others (spec 4.4)", func() {
		create(eu, `{"name": "sections/a"}`)
		create(eu, `{"name": "sections/b", "next": "sections/a"}`)
		create(us, `{"name": "regions/us/mirrors/m", "section": "sections/a"}`)
		confirmed := store.Confirmed{Referrer: "regions/us/mirrors/m", Name: "sections/a", Subscriber: true, TxID: w.transactionOf("us", "regions/us/mirrors/m")}
		_, err := w.regions["eu"].store.Confirm(GinkgoT().Context(), store.Location{Service: service, Region: "us"}, []store.Confirmed{confirmed})
		Expect(err).NotTo(HaveOccurred())
		Expect(eu.do("DELETE", "/sections/a", "").text).To(Equal("{}"))
		Expect(eu.do("GET", "/sections/a", "").status).To(Equal(http.StatusNotFound))

		e := explain(us, "sections/a", "")
		Expect(e.GetState()).To(Equal("GONE"))
		Expect(e.GetDeleteTime()).NotTo(BeNil())
		Expect(e.GetPending()).To(SatisfyAll(fieldOf("State", "DELETING"), WithTransform((*dbcontrollerv1.PendingWork).GetSince, Not(BeNil()))))
		Expect(e.GetReferredFrom()).To(HaveExactElements(
			SatisfyAll(fieldOf("Location", service+"/eu"), fieldOf("Awaited", true)), SatisfyAll(fieldOf("Location", service+"/us"), fieldOf("Awaited", true)),
		))
		Expect(e.GetReferrers()).To(HaveExactElements(fieldOf("Name", "sections/b")))

		By("and those who must be asked because a failover may have lost what they refer to")
		_, err = w.regions["eu"].store.RaiseEpoch(GinkgoT().Context())
		Expect(err).NotTo(HaveOccurred())
		w.deployments = append(w.deployments, w.deployments[1].DeepCopy())
		w.deployments[2].Name, w.deployments[2].Spec.Region, w.deployments[2].Spec.Disabled = "off", "off", true
		w.publish()
		e = explain(eu, "sections/a", "")
		Expect(e.GetReferredFrom()).To(ContainElement(SatisfyAll(fieldOf("Location", service+"/off"), fieldOf("Awaited", true))))
		Expect(e.GetRegions()).To(ContainElement(SatisfyAll(fieldOf("Region", "off"), fieldOf("Error", ContainSubstring("disabled")))))
	})

	It("refuses an unknown name, and says where it would belong", func() {
		for _, r := range []rest{eu, us} {
			a := r.do("GET", "/sections/none:explain", "")
			Expect(a.status).To(Equal(http.StatusNotFound), a.text)
			Expect(a.text).To(SatisfyAll(ContainSubstring("no region holds it"), ContainSubstring("belong to region eu"), ContainSubstring("policy of service "+service)))
		}
		Expect(eu.do("GET", "/nonsense/x:explain", "").violations()).To(Equal([]string{"name"}))
		Expect(eu.do("GET", "/sections/none:explain?depth=1", "").violations()).To(Equal([]string{"depth"}))
		Expect(eu.do("DELETE", "/sections/none:explain", "").status).To(Equal(http.StatusNotFound), "an id may have a colon")

		By("an id that ends as the question does")
		create(eu, `{"name": "sections/x:explain"}`)
		Expect(eu.do("GET", "/sections/x%3Aexplain", "").json()).To(HaveKeyWithValue("name", "sections/x:explain"))
		Expect(explain(eu, "sections/x:explain", "").GetName()).To(Equal("sections/x:explain"))
	})

	It("tells what could not be applied, and what nobody could be asked about", func() {
		create(eu, `{"name": "sections/a"}`)
		w.exec("us", `INSERT INTO ctl.quarantine (version, name, source_region, epoch, resource_version, cause) VALUES ('v1', 'sections/a', 'eu', 1, 7, 'too long'), ('v1', 'sections/z', 'eu', 1, 7, 'too long')`)
		q := SatisfyAll(fieldOf("ResourceVersion", "7"), fieldOf("Epoch", int64(1)), fieldOf("Cause", "too long"), fieldOf("Tries", int32(1)))
		Expect(explain(eu, "sections/a", "").GetRegions()[1].GetQuarantine()).To(q)
		Expect(explain(us, "sections/z", "").GetState()).To(BeEmpty(), "a name that only a quarantine knows")

		By("one region alone")
		e := explain(us, "sections/a", "?local_only=true")
		Expect(e.GetAnsweredBy()).To(Equal("us"))
		Expect(e.GetRegions()).To(HaveExactElements(WithTransform((*dbcontrollerv1.RegionState).GetQuarantine, q)))

		By("a region that is away")
		w.regions["us"].stop()
		e = explain(eu, "sections/a", "")
		Expect(e.GetRegions()[1]).To(SatisfyAll(fieldOf("Region", "us"), fieldOf("Error", ContainSubstring("cannot be reached")), fieldOf("State", "")))
		Expect(eu.do("GET", "/sections/none:explain", "").text).To(ContainSubstring("region us could not be asked"))
	})

	It("says what to do while the owner is away", func() {
		w.regions["eu"].stop()
		a := us.do("GET", "/sections/a:explain", "")
		Expect(a.status).To(Equal(http.StatusServiceUnavailable), a.text)
		Expect(a.text).To(SatisfyAll(ContainSubstring("OWNER_UNREACHABLE"), ContainSubstring("local_only")))
		Expect(explain(us, "sections/a", "?local_only=true").GetOwner().GetRegion()).To(Equal("eu"))
	})

	It("does not wait for a region that does not answer", func() {
		w.regions["us"].stop()
		create(eu, `{"name": "sections/a"}`)
		// It accepts connections, and says nothing.
		l := silence()
		w.deployments[1].Spec.Endpoint = "https://" + l
		w.publish()
		began := time.Now()
		e := explain(eu, "sections/a", "")
		Expect(time.Since(began)).To(BeNumerically("<", 10*time.Second))
		Expect(e.GetRegions()[1].GetError()).To(ContainSubstring("did not answer"))
	})
})

// exec runs a statement in the database of a region.
func (w *world) exec(region, sql string, args ...any) {
	GinkgoHelper()
	conn, err := pgx.Connect(GinkgoT().Context(), w.regions[region].dsn)
	Expect(err).NotTo(HaveOccurred())
	defer conn.Close(context.Background())
	_, err = conn.Exec(GinkgoT().Context(), sql, args...)
	Expect(err).NotTo(HaveOccurred())
}

// transactionOf returns the transaction of the only unconfirmed reference of a resource.
func (w *world) transactionOf(region, name string) string {
	GinkgoHelper()
	refs, err := w.regions[region].store.Unconfirmed(GinkgoT().Context(), name)
	Expect(err).NotTo(HaveOccurred())
	Expect(refs).To(HaveLen(1))
	return refs[0].Grant.TxID
}

// silence returns the address of a listener that takes connections and never answers.
func silence() string {
	GinkgoHelper()
	l, err := new(net.ListenConfig).Listen(GinkgoT().Context(), "tcp", "127.0.0.1:0")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(l.Close)
	return l.Addr().String()
}
