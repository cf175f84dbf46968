package verify_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/verify"
)

// edit is a change by hand in a copy, and what it must be called.
type edit struct {
	what string
	sql  string // $1 is the name
	kind verify.Kind
}

var edits = []edit{
	{"body, the version kept", `UPDATE v1.resources SET body = body || '{"title":"forged"}' WHERE name = $1`, verify.Content},
	{"body, a field moved into a neighbor", `UPDATE v1.resources SET body = jsonb_set(body, '{pages}', '{"index":{"count":7}}') WHERE name = $1`, verify.Content},
	{"labels", `UPDATE v1.resources SET meta = '{"labels":{"made":"elsewhere"}}' WHERE name = $1`, verify.Content},
	{"type", `UPDATE v1.resources SET type = 'Shelf' WHERE name = $1`, verify.Content},
	{"uuid", `UPDATE v1.resources SET uuid = gen_random_uuid() WHERE name = $1`, verify.Content},
	{"generation", `UPDATE v1.resources SET generation = 99 WHERE name = $1`, verify.Content},
	{"shard", `UPDATE v1.resources SET shard = (shard + 1) % 64 WHERE name = $1`, verify.Content},
	{"regions", `UPDATE v1.resources SET regions = '{us}' WHERE name = $1`, verify.Content},
	{"state", `UPDATE v1.resources SET state = 1 WHERE name = $1`, verify.Content},
	{"block_deletion", `UPDATE v1.resources SET block_deletion = true WHERE name = $1`, verify.Content},
	{"create_time", `UPDATE v1.resources SET create_time = create_time - interval '1 microsecond' WHERE name = $1`, verify.Content},
	{"update_time", `UPDATE v1.resources SET update_time = update_time + interval '1 hour' WHERE name = $1`, verify.Content},
	{"a lower version", `UPDATE v1.resources SET resource_version = 0, body = '{}' WHERE name = $1`, verify.Stale},
	{"a higher version", `UPDATE v1.resources SET resource_version = resource_version + 1000, body = '{}' WHERE name = $1`, verify.Ahead},
	{"a higher epoch", `UPDATE v1.resources SET epoch = epoch + 1 WHERE name = $1`, verify.Ahead},
	{"deleted", `DELETE FROM v1.resources WHERE name = $1`, verify.Missing},
	{"a tombstone of the same version", `UPDATE v1.resources SET state = 2, body = NULL WHERE name = $1`, verify.Missing},
	{"a tombstone of a higher version", `UPDATE v1.resources SET state = 2, body = NULL, resource_version = resource_version + 5 WHERE name = $1`, verify.Missing},
	{"the owner, a region that there is", `UPDATE v1.resources SET owning_region = 'ap' WHERE name = $1`, verify.Owner},
}

const forged = `INSERT INTO v1.resources (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, body)
	VALUES ($1, 'Book', gen_random_uuid(), 1, 12, 1, 3, 'eu', '{*}', now(), now(), '{}')`

var _ = Describe("a pass over copies", func() {
	var eu, us, ap *region
	BeforeEach(func() {
		w := newWorld("eu", "us", "ap")
		eu, us, ap = w.regions["eu"], w.regions["us"], w.regions["ap"]
	})

	It("P1, P3: finds nothing where nothing is wrong, and every edit by hand, which repair undoes", func(ctx SpecContext) {
		all := names("a", 500)
		eu.save("first", all...)
		us.save("own", names("own", 20)...)
		ap.save("of ap", names("ap", 20)...)
		stop := us.sync()
		converge(us, eu)
		converge(us, ap)
		small := verify.Options{Size: 40, Parts: 4, Grace: 20 * time.Millisecond}

		state, found := us.pass(ctx, "eu", small)
		Expect(found).To(BeEmpty())
		Expect(state.Finished).To(BeTrue())
		Expect(state.Compared).To(Equal(int64(500)))
		Expect(state.VerifiedThrough()).To(BeTemporally("~", time.Now(), 5*time.Second))
		stop() // what is edited now, no live copy puts right

		expected := map[string]verify.Kind{}
		for i, e := range edits {
			us.sql(e.sql, all[10*i+3])
			expected[all[10*i+3]] = e.kind
		}
		for _, name := range []string{"shelves/", "shelves/a/books/00003x", "zzz"} { // before, between and behind all others
			us.sql(forged, name)
			expected[name] = verify.Extra
		}
		us.sql(`UPDATE v1.resources SET owning_region = 'us' WHERE name = $1`, all[444])
		expected[all[444]] = verify.Owner

		kinds := func(found map[string]verify.Difference) map[string]verify.Kind {
			k := map[string]verify.Kind{}
			for name, d := range found {
				k[name] = d.Kind
				Expect(d.Behind).To(BeFalse(), name)
			}
			return k
		}
		state, found = us.pass(ctx, "eu", small)
		Expect(kinds(found)).To(Equal(expected))
		Expect(state.VerifiedThrough()).To(BeZero())

		small.Mode = verify.DryRun
		_, found = us.pass(ctx, "eu", small)
		Expect(kinds(found)).To(Equal(expected), "a dry run writes nothing")
		Expect(found["zzz"].Action).To(Equal("delete the copy"))
		Expect(found[all[3]].Action).To(Equal("write the owner's row over the copy"))

		small.Mode = verify.Repair
		before := us.rows("us")
		state, found = us.pass(ctx, "eu", small)
		Expect(kinds(found)).To(Equal(expected))
		for name, d := range found {
			Expect(d.Repaired).To(Equal(name != all[444]), "%s: %v", name, d)
		}
		Expect(found[all[444]].Action).To(ContainSubstring("region us owns the row here"))
		Expect(state.VerifiedThrough()).To(BeZero(), "one difference is left")
		Expect(us.rows("us")).To(Equal(before), "what the region owns is not touched")
		us.sql(`DELETE FROM v1.resources WHERE name = $1`, all[444])
		state, found = us.pass(ctx, "eu", small)
		Expect(found).To(HaveLen(1))
		Expect(state.VerifiedThrough()).NotTo(BeZero())
		Expect(us.rows("eu")).To(Equal(eu.rows("eu")))
		_, found = us.pass(ctx, "ap", small)
		Expect(found).To(BeEmpty())
	}, SpecTimeout(2*time.Minute))

	It("leaves a row alone that a third region says it owns, or that cannot be asked", func(ctx SpecContext) {
		eu.save("first", "shelves/s/books/both", "shelves/s/books/lost")
		ap.save("first", "shelves/s/books/both")
		us.sync()
		Eventually(func() int { return len(us.rows("ap")) + len(us.rows("eu")) }, "30s").Should(Equal(2))
		us.sql(`UPDATE v1.resources SET owning_region = 'ap' WHERE name = 'shelves/s/books/both'`)
		us.sql(`UPDATE v1.resources SET owning_region = 'nowhere' WHERE name = 'shelves/s/books/lost'`)
		_, found := us.pass(ctx, "eu", verify.Options{Mode: verify.Repair, Grace: 20 * time.Millisecond, Settle: time.Second})
		Expect(found).To(HaveLen(2))
		Expect(found["shelves/s/books/both"].Action).To(Equal("left: both eu and ap say that they own it"))
		Expect(found["shelves/s/books/lost"].Action).To(ContainSubstring("nowhere, which the row here names as its owner, cannot be asked"))
		Expect(found["shelves/s/books/lost"].Repaired).To(BeFalse())
	}, SpecTimeout(time.Minute))

	It("P1, P24: sees no difference in what is written meanwhile, and still finds what is wrong", func(ctx SpecContext) {
		all := names("a", 2000)
		eu.save("first", all...)
		us.sync()
		converge(us, eu)
		stop := run(func(ctx context.Context) error {
			for i := 0; ctx.Err() == nil; i++ {
				var some []string
				for _, n := range rand.Perm(len(all) - 100)[:20] {
					some = append(some, all[n])
				}
				some = append(some, fmt.Sprintf("shelves/a/books/%05d-%d", i%1000, i)) // new ones, too
				eu.save(fmt.Sprint("round ", i), some...)
			}
			return nil
		})
		opt := verify.Options{Size: 50, Parts: 4, Grace: 20 * time.Millisecond}
		for range 5 {
			state, found := us.pass(ctx, "eu", opt)
			Expect(found).To(BeEmpty())
			Expect(state.VerifiedThrough()).NotTo(BeZero())
		}
		us.sql(`UPDATE v1.resources SET body = '{}' WHERE name = $1`, all[1950])
		us.sql(`DELETE FROM v1.resources WHERE name = $1`, all[1951])
		us.sql(forged, "shelves/a/books/01952x")
		opt.Mode = verify.Repair
		_, found := us.pass(ctx, "eu", opt)
		Expect(found).To(HaveLen(3))
		for _, d := range found {
			Expect(d.Repaired).To(BeTrue(), "%v", d)
		}
		stop()
		converge(us, eu)
	}, SpecTimeout(3*time.Minute))

	It("P24: says of copies that nobody keeps that they are behind, and does not call them verified", func(ctx SpecContext) {
		all := names("a", 300)
		eu.save("first", all...)
		stop := us.sync()
		converge(us, eu)
		stop()
		eu.save("second", all[:7]...)
		state, found := us.pass(ctx, "eu", verify.Options{Grace: 20 * time.Millisecond, Settle: 300 * time.Millisecond})
		Expect(found).To(HaveLen(7))
		for _, d := range found {
			Expect(d.Kind).To(Equal(verify.Stale))
			Expect(d.Behind).To(BeTrue())
		}
		Expect(state.VerifiedThrough()).To(BeZero())
	}, SpecTimeout(time.Minute))

	It("is resumed after a cut at any report, counts everything once and refuses another question", func(ctx SpecContext) {
		all := names("a", 400)
		eu.save("first", all...)
		stop := us.sync()
		converge(us, eu)
		stop()
		for i := 0; i < 400; i += 40 {
			us.sql(`UPDATE v1.resources SET body = '{}' WHERE name = $1`, all[i])
		}
		cut := errors.New("cut")
		opt := verify.Options{Size: 20, Parts: 2, Grace: time.Millisecond}
		var state verify.State
		var steps, told int
		for !state.Finished {
			Expect(steps).To(BeNumerically("<", 200))
			last := 0
			var err error
			state, err = verify.Run(ctx, us.source("eu"), us.copies("eu"), opt, state, func(p verify.Progress) error {
				if last++; last > 1 && !p.State.Finished {
					return cut
				}
				told += len(p.Found)
				return nil
			})
			if err != nil {
				Expect(err).To(MatchError(cut))
			}
			steps++
			if steps == 2 {
				other := opt
				other.Types = []string{"Shelf"}
				_, err := verify.Run(ctx, us.source("eu"), us.copies("eu"), other, state, nil)
				Expect(err).To(MatchError(ContainSubstring("begin anew")))
			}
		}
		Expect(steps).To(BeNumerically(">", 5))
		Expect(told).To(Equal(10))
		Expect(state.Differences).To(Equal(map[string]int64{"Book": 10}))
		Expect(state.Compared).To(Equal(int64(400)))
		Expect(state.Done).To(Equal(state.Total))
	}, SpecTimeout(time.Minute))

	It("takes the size of a large table as PostgreSQL estimates it, and ends with what it has read", func(ctx SpecContext) {
		eu.save("first", names("a", 100)...)
		stop := us.sync()
		converge(us, eu)
		stop()
		for _, estimate := range []int64{100_000, 3_000_000, 40} { // the last one is counted
			eu.sql(`UPDATE pg_class SET reltuples = $1 WHERE oid = 'v1.resources'::regclass`, estimate)
			var totals []int64
			state, err := verify.Run(ctx, us.source("eu"), us.copies("eu"), verify.Options{Size: 20, Parts: 2, Grace: time.Millisecond}, verify.State{}, func(p verify.Progress) error {
				totals = append(totals, p.State.Total)
				return nil
			})
			Expect(err).NotTo(HaveOccurred())
			if estimate < 100_000 {
				estimate = state.Done
			}
			Expect(totals[0]).To(Equal(estimate))
			Expect(state.Done).To(BeNumerically(">=", 100))
			Expect(state.Total).To(Equal(state.Done))
		}
	}, SpecTimeout(time.Minute))

	It("keeps to a rate and leaves the databases alone between steps", func(ctx SpecContext) {
		eu.save("first", names("a", 400)...)
		stop := us.sync()
		converge(us, eu)
		stop()
		clock := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		var slept time.Duration
		opt := verify.Options{
			Size: 20, Parts: 2, Rate: 100, Now: func() time.Time { return clock },
			Sleep: func(_ context.Context, d time.Duration) error {
				clock = clock.Add(d)
				slept += d
				return nil
			},
		}
		var last verify.Progress
		_, err := verify.Run(ctx, us.source("eu"), us.copies("eu"), opt, verify.State{}, func(p verify.Progress) error {
			if !p.State.Finished && p.Rate > 0 {
				last = p
			}
			return nil
		})
		Expect(err).NotTo(HaveOccurred())
		Expect(slept).To(BeNumerically("~", 4*time.Second, time.Second))
		Expect(last.Rate).To(BeNumerically("~", 100, 20))
		Expect(last.ETA).To(BeNumerically("<", time.Second))
	}, SpecTimeout(time.Minute))

	It("judges what it has found before it ends for a time, however short that is", func(ctx SpecContext) {
		eu.save("first", names("a", 100)...)
		stop := us.sync()
		converge(us, eu)
		stop()
		eu.save("second", "shelves/a/books/00001") // nobody copies it
		var state verify.State
		for calls := 0; !state.Finished; calls++ {
			Expect(calls).To(BeNumerically("<", 20))
			var err error
			state, err = verify.Run(ctx, us.source("eu"), us.copies("eu"), verify.Options{Size: 10, Parts: 1, Grace: time.Millisecond, Settle: 100 * time.Millisecond, For: time.Nanosecond}, state,
				func(verify.Progress) error { return nil })
			Expect(err).NotTo(HaveOccurred())
			Expect(state.Pending).To(BeEmpty())
		}
		Expect(state.Differences).To(Equal(map[string]int64{"Book": 1}))
	}, SpecTimeout(time.Minute))

	It("compares only the types that were asked for, and goes on for a given time", func(ctx SpecContext) {
		eu.save("first", names("a", 100)...)
		stop := us.sync()
		converge(us, eu)
		stop()
		us.sql(`UPDATE v1.resources SET body = '{}' WHERE name = 'shelves/a/books/00007'`)
		state, found := us.pass(ctx, "eu", verify.Options{Types: []string{"Shelf"}})
		Expect(found).To(BeEmpty())
		Expect(state.Compared).To(BeZero())
		state, found = us.pass(ctx, "eu", verify.Options{Types: []string{"Book"}, Size: 10, Parts: 1, For: time.Nanosecond})
		Expect(found).To(HaveKey("shelves/a/books/00007"))
		Expect(state.Finished).To(BeFalse())
		Expect(state.Compared).To(Equal(int64(10)))
	}, SpecTimeout(time.Minute))
})
