package apiserver

import (
	"context"
	"fmt"
	"net/http"

	"connectrpc.com/connect"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
)

var _ = Describe("PreviewPolicy", func() {
	It("asks every region what would move, how long it takes and what refuses it, and writes nothing", func(ctx SpecContext) {
		w := newReferences("eu", "us")
		eu := w.rest("eu")
		write := func(resource string) {
			GinkgoHelper()
			a := eu.do("POST", ":batchWrite", `{"writes": [{"create": {"resource": `+resource+`}}]}`)
			Expect(a.status).To(Equal(http.StatusOK), a.text)
		}
		write(`{"name": "tenants/t", "policy": {"enabledRegions": ["eu", "us"], "defaultControlRegion": "eu"}}`)
		for i := range 20 {
			write(fmt.Sprintf(`{"name": "tenants/t/notes/n%d", "text": "0123456789"}`, i))
		}
		ask := func(ctx context.Context, req *dbcontrollerv1.PreviewPolicyRequest) (*dbcontrollerv1.PolicyPreview, error) {
			res, err := w.resources(alice, "eu").PreviewPolicy(ctx, connect.NewRequest(req))
			if err != nil {
				return nil, err
			}
			return res.Msg, nil
		}
		p, err := ask(ctx, &dbcontrollerv1.PreviewPolicyRequest{Name: "tenants/t", RemoveRegions: []string{"us"}})
		Expect(err).NotTo(HaveOccurred())
		Expect(p.GetRefusals()).To(BeEmpty())
		Expect(p.GetUpdates()).To(Equal(map[string]int64{"eu": 20}))
		Expect(p.GetMoves()).To(HaveLen(1))
		Expect(p.GetMoves()[0]).To(SatisfyAll(HaveField("Region", "us"), HaveField("Owner", "eu"), HaveField("Type", "Note"), HaveField("Dropped", true),
			HaveField("Rows", int64(20)), HaveField("Bytes", BeNumerically(">", 400))))
		Expect(p.GetSeconds()).To(Equal(2.0), "20 copies at 10 a second take longer than 20 changes at 1000")
		Expect(p.GetUnknownRates()).To(BeEmpty())
		Expect(p.GetAfter()).To(MatchJSON(`{"enabledRegions": ["eu"], "defaultControlRegion": "eu"}`))

		p, err = ask(ctx, &dbcontrollerv1.PreviewPolicyRequest{Name: "tenants/t", Policy: `{"enabledRegions": ["eu", "us"], "defaultControlRegion": "us"}`})
		Expect(err).NotTo(HaveOccurred())
		Expect(p.GetRefusals()).To(ConsistOf(ContainSubstring("eu still owns 20 resources")))

		p, err = ask(ctx, &dbcontrollerv1.PreviewPolicyRequest{RemoveRegions: []string{"us"}})
		Expect(err).NotTo(HaveOccurred())
		Expect(p.GetUpdates()).To(Equal(map[string]int64{"eu": 1}), "of the service, the holder alone is governed by the service's policy")

		for _, wrong := range []*dbcontrollerv1.PreviewPolicyRequest{
			{Name: "tenants/t", AddRegions: []string{"us"}}, {Name: "tenants/t", RemoveRegions: []string{"mars"}},
			{Name: "tenants/t", Policy: "{"}, {Name: "tenants/t", RemoveRegions: []string{"eu", "us"}}, {Name: "tenants/t/notes/n1", AddRegions: []string{"ap"}},
		} {
			_, err := ask(ctx, wrong)
			Expect(connect.CodeOf(err)).To(Equal(connect.CodeInvalidArgument), "%v", wrong)
		}

		w.regions["us"].stop()
		p, err = ask(ctx, &dbcontrollerv1.PreviewPolicyRequest{Name: "tenants/t", RemoveRegions: []string{"us"}})
		Expect(err).NotTo(HaveOccurred())
		Expect(p.GetUnasked()).To(HaveLen(1), "one who is away is said to be")
		Expect(p.GetUnasked()[0].GetLocation()).To(Equal(service + "/us"))
	})
})
