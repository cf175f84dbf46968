package postgres_test

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

var ring = feed.Range{From: 0, To: 4096}

// held is what a database really holds of an owner's live rows, by the test's own query.
func held(dsn, owner string) map[string]string {
	GinkgoHelper()
	conn, err := pgx.Connect(context.Background(), dsn)
	Expect(err).NotTo(HaveOccurred())
	defer func() { _ = conn.Close(context.Background()) }()
	rows, err := conn.Query(context.Background(), `SELECT name, concat_ws('|', uuid, epoch, resource_version, generation, body::text, meta::text)
		FROM v1.resources WHERE owning_region = $1 AND state <> 2`, owner)
	Expect(err).NotTo(HaveOccurred())
	all := map[string]string{}
	var name, content string
	_, err = pgx.ForEachRow(rows, []any{&name, &content}, func() error { all[name] = content; return nil })
	Expect(err).NotTo(HaveOccurred())
	return all
}

var _ = Describe("read copies", func() {
	var eu, us *postgres.Store
	var euDSN, usDSN string
	BeforeEach(func() {
		euDSN, usDSN = pgtest.Database(GinkgoTB()), pgtest.Database(GinkgoTB())
		eu, us = openDSN(euDSN, "eu"), openDSN(usDSN, "us")
	})
	everywhere := func(name, body string) store.Write {
		w := save(name, body)
		w.Regions = []string{"*"}
		return w
	}
	peer := postgres.Peer{Service: "library.example.com", Region: "eu", Epoch: 1}

	// collect gathers the tuples of one feed read.
	collect := func(ctx context.Context, c feed.Cursor) postgres.Batch {
		GinkgoHelper()
		b := postgres.Batch{Peer: peer, Shards: ring}
		r, err := eu.Feed().ReadTuples(ctx, c, ring, "us", func(t []byte) error {
			b.Tuples = append(b.Tuples, t...)
			b.Rows++
			return nil
		})
		Expect(err).NotTo(HaveOccurred())
		b.Cursor = r.Cursor
		return b
	}
	merge := func(ctx context.Context, b postgres.Batch) postgres.Merged {
		GinkgoHelper()
		m, err := us.Merge(ctx, b)
		Expect(err).NotTo(HaveOccurred())
		return m
	}
	now := func(ctx context.Context) feed.Cursor {
		GinkgoHelper()
		c, _, err := eu.Feed().Now(ctx)
		Expect(err).NotTo(HaveOccurred())
		return c
	}

	It("equal their owner's rows byte by byte, are merged once and never go back", func(ctx SpecContext) {
		start := now(ctx)
		w := everywhere("shelves/s/books/a", `{"title":"ä","n":1.50,"deep":{"x":[1,null,true]}}`)
		w.Meta = store.Meta{Labels: map[string]string{"k": "v"}, Tags: []string{"t"}}
		apply(eu, w)
		older := collect(ctx, start)
		apply(eu, everywhere("shelves/s/books/a", `{"title":"second"}`))
		newer := collect(ctx, start)
		Expect(merge(ctx, newer)).To(Equal(postgres.Merged{Applied: 1}))
		Expect(merge(ctx, older)).To(Equal(postgres.Merged{}), "an older state comes late")
		Expect(merge(ctx, newer)).To(Equal(postgres.Merged{}), "the same comes twice")
		Expect(held(usDSN, "eu")).To(Equal(held(euDSN, "eu")))

		c, err := us.LoadCursor(ctx, peer.Service, peer.Region, ring)
		Expect(err).NotTo(HaveOccurred())
		Expect(c).To(Equal(newer.Cursor))
		got, err := us.Get(ctx, "shelves/s/books/a")
		Expect(err).NotTo(HaveOccurred())
		Expect(got.OwningRegion).To(Equal("eu"))
		_, err = store.Apply(ctx, us, save("shelves/s/books/a", `{}`))
		Expect(err).To(haveCode(store.FailedPrecondition), "a copy is not written")
	})

	It("follow deletes and policies, and an old state does not resurrect them", func(ctx SpecContext) {
		start := now(ctx)
		apply(eu, everywhere("shelves/s/books/deleted", `{}`))
		apply(eu, everywhere("shelves/s/books/moved", `{"secret":1}`))
		before := collect(ctx, start)
		merge(ctx, before)
		apply(eu, store.Write{Op: store.Delete, Name: "shelves/s/books/deleted"})
		moved := save("shelves/s/books/moved", `{"secret":1}`)
		moved.Regions = []string{"eu"}
		apply(eu, moved)
		after := collect(ctx, before.Cursor)
		Expect(string(after.Tuples)).NotTo(ContainSubstring("secret"), "a removal carries no content")
		Expect(merge(ctx, after)).To(Equal(postgres.Merged{Applied: 2}))
		Expect(held(usDSN, "eu")).To(BeEmpty())
		Expect(merge(ctx, before)).To(Equal(postgres.Merged{}))
		Expect(held(usDSN, "eu")).To(BeEmpty())
		Expect(held(euDSN, "eu")).To(HaveLen(1))

		apply(eu, everywhere("shelves/s/books/moved", `{"secret":1}`))
		merge(ctx, collect(ctx, after.Cursor))
		Expect(held(usDSN, "eu")).To(Equal(held(euDSN, "eu")), "the region is enabled again")
	})

	It("never take a row that this region owns", func(ctx SpecContext) {
		apply(us, save("shelves/s/books/mine", `{"mine":true}`))
		mine := held(usDSN, "us")
		start := now(ctx)
		apply(eu, everywhere("shelves/s/books/mine", `{"mine":false}`))
		apply(eu, everywhere("shelves/s/books/mine", `{"mine":"never"}`))
		apply(eu, everywhere("shelves/s/books/other", `{}`))
		Expect(merge(ctx, collect(ctx, start))).To(Equal(postgres.Merged{Applied: 1, Quarantined: 1}))
		Expect(held(usDSN, "us")).To(Equal(mine))
		q, total, err := us.Quarantine(ctx, "eu", 10)
		Expect(err).NotTo(HaveOccurred())
		Expect(total).To(Equal(1))
		Expect(q[0].Cause).To(ContainSubstring("OwnerDispute"))
		n, err := us.DeleteExtras(ctx, peer, []postgres.NameVersion{{Name: "shelves/s/books/mine", Version: store.Version{Epoch: 1, Number: 1}}})
		Expect(err).NotTo(HaveOccurred())
		Expect(n).To(BeZero())
	})

	It("are refused when the peer sends what is not its own, or garbage", func(ctx SpecContext) {
		start := now(ctx)
		apply(eu, everywhere("shelves/s/books/a", `{}`))
		good := collect(ctx, start)
		asAnother := good
		asAnother.Peer.Region = "ap"
		short := good
		short.Shards = feed.Range{From: 0, To: 1}
		cut := good
		cut.Tuples = cut.Tuples[:len(cut.Tuples)-1]
		miscounted := good
		miscounted.Rows = 2
		for _, bad := range []postgres.Batch{asAnother, short, cut, miscounted} {
			_, err := us.Merge(ctx, bad)
			Expect(err).To(MatchError(row.ErrMalformed))
		}
		Expect(held(usDSN, "eu")).To(BeEmpty())
	})

	for _, empty := range []bool{false, true} {
		It(fmt.Sprintf("put rows that cannot be applied aside, and the others in (straight copy: %v)", empty), func(ctx SpecContext) {
			conn, err := pgx.Connect(ctx, usDSN)
			Expect(err).NotTo(HaveOccurred())
			defer conn.Close(ctx)
			_, err = conn.Exec(ctx, `ALTER TABLE v1.resources ADD CONSTRAINT nasty CHECK (body->>'poison' IS NULL)`)
			Expect(err).NotTo(HaveOccurred())
			start := now(ctx)
			for i := range 100 {
				body := `{}`
				if i%33 == 7 {
					body = `{"poison":"the content"}`
				}
				apply(eu, everywhere(fmt.Sprintf("shelves/s/books/%d", i), body))
			}
			b := collect(ctx, start)
			b.Empty = empty
			Expect(merge(ctx, b)).To(Equal(postgres.Merged{Applied: 97, Quarantined: 3}))
			c, err := us.LoadCursor(ctx, peer.Service, peer.Region, ring)
			Expect(err).NotTo(HaveOccurred())
			Expect(c).To(Equal(b.Cursor), "the stream goes on")
			q, total, err := us.Quarantine(ctx, "", 10)
			Expect(err).NotTo(HaveOccurred())
			Expect(total).To(Equal(3))
			Expect(q[0].Name).To(Equal("shelves/s/books/40"))
			Expect(q[0].Cause).To(And(ContainSubstring("nasty"), Not(ContainSubstring("the content"))))

			apply(eu, everywhere("shelves/s/books/40", `{"cured":true}`))
			merge(ctx, collect(ctx, b.Cursor))
			_, total, err = us.Quarantine(ctx, "", 10)
			Expect(err).NotTo(HaveOccurred())
			Expect(total).To(Equal(2), "a later version that can be applied clears the entry")
		})
	}

	It("copied straight into an empty range fall back to a merge when a row is there already", func(ctx SpecContext) {
		start := now(ctx)
		for i := range 20 {
			apply(eu, everywhere(fmt.Sprintf("shelves/s/books/%d", i), `{"v":1}`))
		}
		old := collect(ctx, start)
		apply(eu, everywhere("shelves/s/books/3", `{"v":2}`))
		merge(ctx, collect(ctx, old.Cursor)) // live first
		old.Empty = true
		Expect(merge(ctx, old)).To(Equal(postgres.Merged{Applied: 19}))
		Expect(held(usDSN, "eu")).To(Equal(held(euDSN, "eu")))
	})

	It("have the digest of their owner exactly when they are equal", func(ctx SpecContext) {
		start := now(ctx)
		for i := range 50 {
			apply(eu, everywhere(fmt.Sprintf("shelves/s/books/%d", i), `{}`))
		}
		onlyEU := save("shelves/s/books/home", `{}`)
		onlyEU.Regions = []string{"eu"}
		apply(eu, onlyEU)
		b := collect(ctx, start)
		merge(ctx, b)
		differing := func() (shards []int32) {
			GinkgoHelper()
			src, epoch, err := eu.Digests(ctx, ring, "us")
			Expect(err).NotTo(HaveOccurred())
			Expect(epoch).To(BeEquivalentTo(1))
			dst, err := us.CopyDigests(ctx, ring, "eu")
			Expect(err).NotTo(HaveOccurred())
			for _, d := range src {
				if !slices.Contains(dst, d) {
					shards = append(shards, d.Shard)
				}
			}
			return shards
		}
		Expect(differing()).To(BeEmpty())
		apply(eu, everywhere("shelves/s/books/7", `{"new":1}`))
		Expect(differing()).To(HaveLen(1))
		names := func(read func(emit func(string, store.Version) error) error) (all []string) {
			GinkgoHelper()
			Expect(read(func(n string, v store.Version) error { all = append(all, fmt.Sprint(n, v)); return nil })).To(Succeed())
			Expect(slices.IsSorted(all)).To(BeTrue())
			return all
		}
		shards := differing()
		src := names(func(emit func(string, store.Version) error) error { return eu.Versions(ctx, shards, "us", emit) })
		dst := names(func(emit func(string, store.Version) error) error { return us.CopyVersions(ctx, shards, "eu", emit) })
		Expect(src).To(ContainElement("shelves/s/books/7{1 2}"))
		Expect(dst).To(ContainElement("shelves/s/books/7{1 1}"))

		fetched := postgres.Batch{Peer: peer, Shards: ring}
		Expect(eu.FetchNames(ctx, []string{"shelves/s/books/7", "shelves/s/books/home", "shelves/s/books/none"}, "us", func(t []byte) error {
			fetched.Tuples = append(fetched.Tuples, t...)
			fetched.Rows++
			return nil
		})).To(Succeed())
		Expect(fetched.Rows).To(Equal(1), "what us must not hold or what does not exist is not sent")
		merge(ctx, fetched)
		Expect(differing()).To(BeEmpty())
	})

	It("keep the cursor of what a changed range does not cover, and load what ranges have in common", func(ctx SpecContext) {
		c := func(xmax uint64, xip ...uint64) feed.Cursor {
			s := feed.Snapshot{Xmin: xmax, Xmax: xmax, Xip: xip}
			if len(xip) > 0 {
				s.Xmin = xip[0]
			}
			return feed.Cursor{Epoch: 1, Snapshot: s}
		}
		load := func(from, to int32) string {
			GinkgoHelper()
			got, err := us.LoadCursor(ctx, "s", "eu", feed.Range{From: from, To: to})
			Expect(err).NotTo(HaveOccurred())
			if got.IsZero() {
				return ""
			}
			return got.Snapshot.String()
		}
		put := func(from, to int32, c feed.Cursor) {
			GinkgoHelper()
			Expect(us.SaveCursor(ctx, "s", "eu", feed.Range{From: from, To: to}, c)).To(Succeed())
		}
		Expect(load(0, 100)).To(BeEmpty())
		put(0, 100, c(50))
		Expect(load(0, 100)).To(Equal("50:50:"))
		Expect(load(20, 30)).To(Equal("50:50:"))
		Expect(load(0, 101)).To(BeEmpty(), "not covered")
		put(40, 60, c(90, 70, 80))
		Expect(load(45, 50)).To(Equal("70:90:70,80"))
		Expect(load(0, 100)).To(Equal("50:50:"), "what both have")
		Expect(load(60, 100)).To(Equal("50:50:"))
		put(0, 100, c(95))
		Expect(load(0, 100)).To(Equal("95:95:"))
		other := c(99)
		other.Epoch = 2
		put(10, 20, other)
		Expect(load(10, 20)).To(Equal("99:99:"))
		Expect(load(0, 100)).To(BeEmpty(), "two epochs have nothing in common")
	})

	It("are dropped in steps when their owner is no more", func(ctx SpecContext) {
		start := now(ctx)
		for i := range 25 {
			apply(eu, everywhere(fmt.Sprintf("shelves/s/books/%d", i), `{}`))
		}
		merge(ctx, collect(ctx, start))
		apply(us, save("shelves/s/books/mine", `{}`))
		var counts []int
		for {
			n, err := us.DropCopies(ctx, peer.Service, "eu", 10)
			Expect(err).NotTo(HaveOccurred())
			if n == 0 {
				break
			}
			counts = append(counts, n)
		}
		Expect(counts).To(Equal([]int{10, 10, 5}))
		n, err := us.DropCopies(ctx, peer.Service, "us", 10)
		Expect(err).NotTo(HaveOccurred())
		Expect(n).To(BeZero(), "own rows are no copies")
		Expect(held(usDSN, "us")).To(HaveLen(1))
	})

	It("make a purged tombstone's cursor lost instead of skipping it", func(ctx SpecContext) {
		apply(eu, everywhere("shelves/s/books/a", `{}`))
		c := now(ctx)
		apply(eu, store.Write{Op: store.Delete, Name: "shelves/s/books/a"})
		n, err := eu.Purge(ctx, time.Hour, 10)
		Expect(err).NotTo(HaveOccurred())
		Expect(n).To(BeZero(), "younger than the retention")
		fresh := now(ctx)
		_, err = eu.Purge(ctx, 0, 10)
		Expect(err).NotTo(HaveOccurred())
		none := func([]byte) error { return nil }
		_, err = eu.Feed().ReadTuples(ctx, c, ring, "us", none)
		Expect(err).To(MatchError(feed.ErrCursorLost))
		_, err = eu.Feed().ReadTuples(ctx, fresh, ring, "us", none)
		Expect(err).NotTo(HaveOccurred(), "it has seen the tombstone")
	})
})
