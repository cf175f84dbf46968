package verify_test

import (
	"context"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/verify"
)

var _ = Describe("verification in the background", func() {
	var eu, us *region
	BeforeEach(func() {
		w := newWorld("eu", "us")
		eu, us = w.regions["eu"], w.regions["us"]
		eu.save("first", names("a", 200)...)
		stop := us.sync()
		converge(us, eu)
		stop()
	})
	background := func(passes *atomic.Int64, metrics prometheus.Registerer) verify.Background {
		source, copies := us.source("eu"), us.copies("eu")
		return verify.Background{
			Ledger: us.store, Peers: func() []string { return []string{"eu"} }, Interval: 20 * time.Millisecond, Pause: 0.01, Metrics: metrics, Logger: quiet(),
			Verify: func(ctx context.Context, peer string, opt verify.Options, from verify.State, report func(verify.Progress) error) (verify.State, error) {
				opt.Size, opt.Parts, opt.Grace = 20, 2, time.Millisecond
				opt.For = time.Nanosecond // a step at a time, each of which is claimed and stored
				state, err := verify.Run(ctx, source, copies, opt, from, report)
				if err == nil && state.Finished {
					passes.Add(1)
					err = verify.Note(ctx, us.store, peer, state, []string{"Book", "Shelf"})
				}
				return state, err
			},
		}
	}
	verified := func() map[string]postgres.Verified {
		GinkgoHelper()
		all, err := us.store.Verified(context.Background())
		Expect(err).NotTo(HaveOccurred())
		types := map[string]postgres.Verified{}
		for _, v := range all {
			Expect(v.Peer).To(Equal("eu"))
			types[v.Type] = v
		}
		return types
	}

	It("P24: moves verified_through of a type only over passes without a difference in it", func() {
		var passes atomic.Int64
		reg := prometheus.NewRegistry()
		run(background(&passes, reg).Run)
		Eventually(func() time.Time { return verified()["Book"].Through }, "20s").ShouldNot(BeZero())
		first := verified()["Book"].Through
		Eventually(func() time.Time { return verified()["Book"].Through }, "20s").Should(BeTemporally(">", first))

		us.sql(`UPDATE v1.resources SET body = '{}' WHERE name = 'shelves/a/books/00042'`)
		Eventually(func() int64 { return verified()["Book"].Differences }, "20s").Should(Equal(int64(1)))
		gap := verified()
		n := passes.Load()
		Eventually(passes.Load, "20s").Should(BeNumerically(">", n+1))
		Expect(verified()["Book"].Through).To(Equal(gap["Book"].Through))
		Expect(verified()["Shelf"].Through).To(BeTemporally(">", gap["Shelf"].Through), "nothing is wrong with it")
		Eventually(func() (float64, error) {
			families, err := reg.Gather()
			for _, f := range families {
				if f.GetName() == "dbcontroller_verify_mismatched_rows" {
					return f.GetMetric()[0].GetGauge().GetValue(), err
				}
			}
			return -1, err
		}, "20s").Should(Equal(1.0))
		Expect(testutil.GatherAndCount(reg, "dbcontroller_verify_verified_through_timestamp_seconds")).To(Equal(2))

		us.pass(context.Background(), "eu", verify.Options{Mode: verify.Repair, Grace: time.Millisecond})
		Eventually(func() time.Time { return verified()["Book"].Through }, "20s").Should(BeTemporally(">", gap["Book"].Through))
	})

	It("is done by one process at a time, and goes on with what another one has left", func(ctx SpecContext) {
		state, ok, err := us.store.ClaimVerification(ctx, "eu", "one", time.Minute)
		Expect(err).NotTo(HaveOccurred())
		Expect(ok).To(BeTrue())
		Expect(state).To(BeEmpty())
		_, ok, err = us.store.ClaimVerification(ctx, "eu", "two", time.Minute)
		Expect(err).NotTo(HaveOccurred())
		Expect(ok).To(BeFalse())
		Expect(us.store.SaveVerification(ctx, "eu", "one", `{"after":"x"}`, 0)).To(BeTrue())
		_, ok, err = us.store.ClaimVerification(ctx, "eu", "one", -time.Second) // it dies: its claim runs out
		Expect(err).NotTo(HaveOccurred())
		Expect(ok).To(BeTrue())
		state, ok, err = us.store.ClaimVerification(ctx, "eu", "two", time.Minute)
		Expect(err).NotTo(HaveOccurred())
		Expect(ok).To(BeTrue())
		Expect(state).To(Equal(`{"after":"x"}`))
		Expect(us.store.SaveVerification(ctx, "eu", "one", "", 0)).To(BeFalse(), "it has lost the claim")
		Expect(us.store.SaveVerification(ctx, "eu", "two", "", time.Hour)).To(BeTrue())
		_, ok, err = us.store.ClaimVerification(ctx, "eu", "two", time.Minute)
		Expect(err).NotTo(HaveOccurred())
		Expect(ok).To(BeFalse(), "the next pass is not due")
	})

	It("I25: a residency report finds what a region must not hold", func(ctx SpecContext) {
		report := func() map[string]int64 {
			GinkgoHelper()
			rows, err := us.store.ResidencyReport(ctx, []string{"eu", "us"})
			Expect(err).NotTo(HaveOccurred())
			found := map[string]int64{}
			for _, r := range rows {
				found[r.Owner+" "+r.Type+": "+r.Reason] += r.Rows
			}
			return found
		}
		us.save("own", names("own", 5)...)
		Expect(report()).To(Equal(map[string]int64{"eu Book: ": 200, "us Book: ": 5}))
		us.sql(`UPDATE v1.resources SET regions = '{eu}' WHERE name = 'shelves/a/books/00001'`)
		us.sql(`UPDATE v1.resources SET regions = '{eu}', left_regions = '{us}' WHERE name = 'shelves/a/books/00002'`)
		us.sql(`UPDATE v1.resources SET owning_region = 'ap' WHERE name = 'shelves/a/books/00003'`)
		us.sql(`UPDATE v1.resources SET state = 2, body = NULL WHERE name = 'shelves/a/books/00004'`)
		Expect(report()).To(Equal(map[string]int64{
			"eu Book: ": 196, "us Book: ": 5, "eu Book: its regions do not name this one": 1, "eu Book: it has left this region": 1,
			"ap Book: its owner is no Deployment of the service": 1, "eu Book: a removed copy still has content": 1,
		}))
	})
})
