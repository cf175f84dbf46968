package mixin_test

import (
	"context"
	"fmt"
	"slices"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/store"
)

// planCore has what a plan reads. Every other method panics: a plan writes nothing.
type planCore struct {
	mixin.Core
	handled  map[string][]store.Incoming
	closures map[string]*store.Closure // by the first root
	refs     []store.Confirmed
}

func (p planCore) HandledReferrers(_ context.Context, _ store.Location, target, _ string, limit int) ([]store.Incoming, error) {
	return p.handled[target][:min(limit, len(p.handled[target]))], nil
}

func (p planCore) Closure(_ context.Context, roots []string, _, _, _ int) (*store.Closure, error) {
	if c := p.closures[roots[0]]; c != nil {
		return c, nil
	}
	c := &store.Closure{}
	for _, r := range roots {
		c.Delete = append(c.Delete, store.Doomed{Name: r, Type: "T"})
	}
	return c, nil
}

func (p planCore) ReferencesTo(_ context.Context, _ store.Location, after string, limit int) ([]store.Confirmed, string, error) {
	i := 0
	if after != "" {
		i = slices.IndexFunc(p.refs, func(r store.Confirmed) bool { return r.Referrer == after }) + 1
	}
	page := p.refs[i:min(i+limit, len(p.refs))]
	if len(page) < limit {
		return page, "", nil
	}
	return page, page[limit-1].Referrer, nil
}

var _ = Describe("A plan", func() {
	in := func(referrer, target string, b store.Behavior) store.Incoming {
		return store.Incoming{Referrer: referrer, Type: "T", Field: "f", Target: target, Behavior: b}
	}
	plan := func(core planCore, targets ...string) *v1.PlanDeletionResponse {
		GinkgoHelper()
		res, err := newServer(topology(nil), core, nil).PlanDeletion(GinkgoT().Context(), &v1.PlanDeletionRequest{Call: call(appsEU, secretsEU, "v1"), Targets: targets})
		Expect(err).NotTo(HaveOccurred())
		return res
	}
	names := func(list []*v1.Planned) (all []string) {
		for _, p := range list {
			Expect(p.GetAsynchronous()).To(BeTrue())
			all = append(all, p.GetName()+" via "+p.GetTarget())
		}
		return all
	}

	It("follows what is deleted and cleared, also what follows later, once each, in a circle too", func() {
		res := plan(planCore{
			handled: map[string][]store.Incoming{"apps/a": {in("x", "apps/a", store.Cascade), in("x", "apps/a", store.AsyncCascade), in("u", "apps/a", store.Unset), in("y", "apps/a", store.Unset)}},
			closures: map[string]*store.Closure{
				"x": {
					Delete: []store.Doomed{{Name: "x", Sources: []store.Source{{Location: appsUS, Blocking: true}}}, {Name: "y", Via: in("y", "x", store.Cascade), Depth: 1}},
					Unset:  []store.Incoming{in("v", "x", store.Unset)},
					Async:  []store.Incoming{in("z", "y", store.AsyncCascade)},
					Blockers: []store.Blocker{
						{Target: "x", Referrer: "z"}, {Target: "x", Referrer: "b", Field: "f"}, {Target: "x", Location: toolsEU, Referrer: "z"}, {Target: "y", BlockDeletion: true},
					},
				},
				"z": {Delete: []store.Doomed{{Name: "z"}}, Async: []store.Incoming{in("x", "z", store.AsyncCascade)}},
			},
		}, "apps/a")
		Expect(names(res.GetDeletes())).To(Equal([]string{"x via apps/a", "y via x", "z via y"}))
		Expect(names(res.GetUnsets())).To(Equal([]string{"u via apps/a", "v via x"}), "y goes anyway")
		var blockers []string
		for _, b := range res.GetBlockers() {
			blockers = append(blockers, fmt.Sprint(mixin.LocationOf(b.GetLocation()), " ", b.GetReferrer(), b.GetBlockDeletion()))
		}
		Expect(blockers).To(Equal([]string{secretsEU.String() + " bfalse", toolsEU.String() + " zfalse", secretsEU.String() + " true"}), "z of ours goes too, that of others not")
		Expect(res.GetSources()).To(HaveLen(1))
		Expect(res.GetSources()[0].GetNames()).To(Equal([]string{"x"}))
		Expect(res.GetTruncated()).To(BeFalse())
	})

	It("is cut at its limits, and says so", func() {
		var many []store.Incoming
		var refs []store.Confirmed
		for i := range 10_500 {
			many = append(many, in(fmt.Sprint("r", i), "apps/a", store.Unset))
			refs = append(refs, store.Confirmed{Referrer: fmt.Sprintf("r%05d", i), Name: "apps/a", Field: "f", Blocking: i == 1500})
		}
		res := plan(planCore{handled: map[string][]store.Incoming{"apps/a": many}}, "apps/a")
		Expect(res.GetTruncated()).To(BeTrue())
		Expect(res.GetUnsets()).To(HaveLen(10_000))
		res = plan(planCore{refs: refs}, "apps/a")
		Expect(res.GetTruncated()).To(BeTrue())
		Expect(res.GetBlockers()).To(ConsistOf(HaveField("Field", "f")))
		_, err := newServer(topology(nil), planCore{}, nil).PlanDeletion(GinkgoT().Context(), &v1.PlanDeletionRequest{Call: call(appsEU, secretsEU, "v1"), Targets: make([]string, mixin.MaxNames+1)})
		Expect(err).To(haveCode(store.InvalidArgument, ""))
	})
})
