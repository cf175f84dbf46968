package postgres_test

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
)

var _ = Describe("writing", func() {
	const name = "shelves/s1/books/b1"
	var s *postgres.Store
	var dsn string
	BeforeEach(func() {
		dsn = pgtest.Database(GinkgoTB())
		s = openDSN(dsn, "eu")
	})

	It("creates, reads and refuses to create again", func(ctx SpecContext) {
		w := save(name, `{"title":"one","pages":12345678901234567890}`)
		w.Op = store.Create
		w.Meta.Labels = map[string]string{"team": "infra"}
		r := apply(s, w)
		Expect(r.Changed).To(BeTrue())
		Expect(r.Resource.Version).To(Equal(store.Version{Epoch: 1, Number: 1}))
		Expect(r.Resource.Generation).To(BeEquivalentTo(1))
		Expect(r.Resource.OwningRegion).To(Equal("eu"))
		Expect(r.Resource.Regions).To(Equal([]string{"eu"}))
		Expect(r.Resource.CreateTime).NotTo(BeZero())

		got, err := s.Get(ctx, name)
		Expect(err).NotTo(HaveOccurred())
		Expect(got.Body).To(MatchJSON(w.Body))
		Expect(string(got.Body)).To(ContainSubstring("12345678901234567890"), "numbers keep their digits")
		Expect(got.Meta).To(Equal(w.Meta))
		Expect(got.UUID).To(Equal(r.Resource.UUID))

		_, err = store.Apply(ctx, s, w)
		Expect(err).To(haveCode(store.AlreadyExists))
	})

	It("changes nothing when nothing differs", func() {
		first := apply(s, save(name, `{"a":1,"b":2}`))
		again := apply(s, save(name, `{"b":2,"a":1}`))
		Expect(again.Changed).To(BeFalse())
		Expect(again.Resource.Version).To(Equal(first.Resource.Version))
		Expect(again.Resource.UpdateTime).To(Equal(first.Resource.UpdateTime))
	})

	It("raises the version with every change and the generation with the body", func() {
		apply(s, save(name, `{"a":1}`))
		w := save(name, `{"a":1}`)
		w.Meta.Tags = []string{"new"}
		r := apply(s, w)
		Expect(r.Resource.Version.Number).To(BeEquivalentTo(2))
		Expect(r.Resource.Generation).To(BeEquivalentTo(1))
		w.Body = []byte(`{"a":2}`)
		r = apply(s, w)
		Expect(r.Resource.Version.Number).To(BeEquivalentTo(3))
		Expect(r.Resource.Generation).To(BeEquivalentTo(2))
	})

	It("updates only what exists", func(ctx SpecContext) {
		w := save(name, `{}`)
		w.Op = store.Update
		_, err := store.Apply(ctx, s, w)
		Expect(err).To(haveCode(store.NotFound))
	})

	It("compares and swaps by version", func(ctx SpecContext) {
		v1 := apply(s, save(name, `{"a":1}`)).Resource.Version
		w := save(name, `{"a":2}`)
		w.IfVersion = v1
		apply(s, w)
		w.Body = []byte(`{"a":3}`)
		_, err := store.Apply(ctx, s, w)
		Expect(err).To(haveCode(store.Aborted))
		Expect(err).To(MatchError(ContainSubstring(name)))

		w.Name = "shelves/s1/books/none"
		_, err = store.Apply(ctx, s, w)
		Expect(err).To(haveCode(store.Aborted), "a version of something that does not exist")
	})

	It("changes only masked fields, also under concurrent writes", func(ctx SpecContext) {
		const writers, each = 8, 10
		apply(s, save(name, `{"keep":1,"n":{}}`))
		var wg sync.WaitGroup
		for n := range writers {
			field := fmt.Sprintf("f%d", n)
			wg.Go(func() {
				defer GinkgoRecover()
				for i := range each {
					w := save(name, fmt.Sprintf(`{"n":{%q:%d}}`, field, i+1))
					w.Op, w.Mask = store.Update, []string{"n." + field}
					_, err := store.Apply(ctx, s, w)
					Expect(err).NotTo(HaveOccurred())
				}
			})
		}
		wg.Wait()
		got, err := s.Get(ctx, name)
		Expect(err).NotTo(HaveOccurred())
		Expect(got.Body).To(MatchJSON(`{"keep":1,"n":{"f0":10,"f1":10,"f2":10,"f3":10,"f4":10,"f5":10,"f6":10,"f7":10}}`))
		Expect(got.Version.Number).To(BeEquivalentTo(1 + writers*each))
	})

	It("gives concurrent writers of one row each a version of their own", func(ctx SpecContext) {
		const writers, each = 8, 20
		var wg sync.WaitGroup
		for n := range writers {
			wg.Go(func() {
				defer GinkgoRecover()
				for i := range each {
					_, err := store.Apply(ctx, s, save(name, fmt.Sprintf(`{"writer":%d,"i":%d}`, n, i)))
					Expect(err).NotTo(HaveOccurred())
				}
			})
		}
		wg.Wait()
		got, err := s.Get(ctx, name)
		Expect(err).NotTo(HaveOccurred())
		Expect(got.Version.Number).To(BeEquivalentTo(writers * each))
	})

	It("lets exactly one of many concurrent creates win", func(ctx SpecContext) {
		created := make(chan bool, 16)
		var wg sync.WaitGroup
		for i := range cap(created) {
			wg.Go(func() {
				defer GinkgoRecover()
				w := save(name, fmt.Sprintf(`{"i":%d}`, i))
				w.Op = store.Create
				_, err := store.Apply(ctx, s, w)
				if err != nil {
					Expect(err).To(haveCode(store.AlreadyExists))
				}
				created <- err == nil
			})
		}
		wg.Wait()
		close(created)
		won := 0
		for c := range created {
			if c {
				won++
			}
		}
		Expect(won).To(Equal(1))
	})

	It("deletes into a tombstone, above which a new incarnation starts", func(ctx SpecContext) {
		old := apply(s, save(name, `{"a":1}`)).Resource
		gone := apply(s, store.Write{Op: store.Delete, Name: name}).Resource
		Expect(gone.State).To(Equal(store.Gone))
		Expect(gone.Version.Number).To(BeEquivalentTo(2))
		_, err := s.Get(ctx, name)
		Expect(err).To(haveCode(store.NotFound))
		_, err = store.Apply(ctx, s, store.Write{Op: store.Delete, Name: name})
		Expect(err).To(haveCode(store.NotFound))
		r, err := store.Apply(ctx, s, store.Write{Op: store.Delete, Name: name, AllowMissing: true})
		Expect(err).NotTo(HaveOccurred())
		Expect(r).To(Equal(store.Result{}))

		reborn := apply(s, save(name, `{"a":1}`)).Resource
		Expect(reborn.Version.Number).To(BeEquivalentTo(3))
		Expect(reborn.UUID).NotTo(Equal(old.UUID))
		Expect(reborn.Generation).To(BeEquivalentTo(1))
		Expect(reborn.CreateTime).To(BeTemporally(">", old.CreateTime))
	})

	It("starts a name that is born again above its purged tombstone", func(ctx SpecContext) {
		apply(s, save(name, `{"a":1}`))
		apply(s, save(name, `{"a":2}`))
		apply(s, store.Write{Op: store.Delete, Name: name})
		n, err := s.Purge(ctx, 0, 100)
		Expect(err).NotTo(HaveOccurred())
		Expect(n).To(Equal(1))
		Expect(apply(s, save(name, `{"a":1}`)).Resource.Version.Number).To(BeEquivalentTo(4))
	})

	It("applies a batch whole or not at all, and names the culprit", func(ctx SpecContext) {
		apply(s, save("shelves/s1/books/x", `{}`))
		writes := []store.Write{save("shelves/s1/books/a", `{}`), {Op: store.Create, Name: "shelves/s1/books/x", Type: "Book"}, save("shelves/s1/books/c", `{}`)}
		_, err := s.BatchWrite(ctx, writes)
		Expect(err).To(haveCode(store.AlreadyExists))
		Expect(err).To(MatchError(ContainSubstring("shelves/s1/books/x")))
		_, err = s.Get(ctx, "shelves/s1/books/a")
		Expect(err).To(haveCode(store.NotFound))

		writes[1].Op = store.Save
		results, err := s.BatchWrite(ctx, writes)
		Expect(err).NotTo(HaveOccurred())
		Expect(results).To(HaveLen(3))
		Expect(results[1].Changed).To(BeFalse())
		Expect(results[2].Resource.Name).To(Equal("shelves/s1/books/c"))
	})

	It("refuses a batch that is empty, too large or names a resource twice", func(ctx SpecContext) {
		for _, writes := range [][]store.Write{nil, make([]store.Write, 1001), {save(name, `{}`), save(name, `{}`)}} {
			_, err := s.BatchWrite(ctx, writes)
			Expect(err).To(haveCode(store.InvalidArgument))
		}
	})

	It("refuses values that PostgreSQL cannot hold, as the caller's error", func(ctx SpecContext) {
		_, err := store.Apply(ctx, s, save(name, `{"a":"\u0000"}`))
		Expect(err).To(haveCode(store.InvalidArgument))
	})

	It("writes nothing owned elsewhere", func(ctx SpecContext) {
		w := save(name, `{}`)
		w.OwningRegion = "us"
		_, err := store.Apply(ctx, s, w)
		Expect(err).To(haveCode(store.FailedPrecondition))
	})

	It("keeps the regions that must drop their copy", func(ctx SpecContext) {
		conn, err := pgx.Connect(ctx, dsn)
		Expect(err).NotTo(HaveOccurred())
		defer conn.Close(ctx)
		left := func(regions ...string) (out []string) {
			GinkgoHelper()
			w := save(name, `{}`)
			w.Regions = regions
			apply(s, w)
			Expect(conn.QueryRow(ctx, "SELECT left_regions FROM v1.resources WHERE name = $1", name).Scan(&out)).To(Succeed())
			return out
		}
		Expect(left("ap", "eu", "us")).To(BeEmpty())
		Expect(left("eu", "us")).To(Equal([]string{"ap"}))
		Expect(left("eu")).To(Equal([]string{"ap", "us"}))
		Expect(left("ap", "eu")).To(Equal([]string{"us"}))
		Expect(left("*")).To(BeEmpty())
		Expect(left("eu")).To(Equal([]string{"*"}))
	})

	It("takes no write while another version is the writable one", func(ctx SpecContext) {
		conn, err := pgx.Connect(ctx, dsn)
		Expect(err).NotTo(HaveOccurred())
		defer conn.Close(ctx)
		_, err = conn.Exec(ctx, "UPDATE ctl.deployment_state SET writable_version = 'v2'")
		Expect(err).NotTo(HaveOccurred())
		_, err = store.Apply(ctx, s, save(name, `{}`))
		Expect(err).To(haveCode(store.Unavailable))
	})

	It("is one round trip of two statements", func() {
		wire := tap(dsn)
		s := openDSN(wire.dsn, "eu")
		for i := range 40 { // every connection of the pool has prepared its statements
			apply(s, save(name, fmt.Sprintf(`{"warm":%d}`, i)))
		}
		before := wire.counts()
		apply(s, save(name, `{"measured":true}`))
		after := wire.counts()
		Expect(after.ready-before.ready).To(BeEquivalentTo(1), "ReadyForQuery ends each round trip")
		Expect(after.complete-before.complete).To(BeEquivalentTo(2), "CommandComplete ends each statement")
	})

	It("answers Unavailable, not a driver's error, when the database is gone", func() {
		server := pgtest.Server(GinkgoTB(), serverConfig())
		ctx := context.Background()
		Expect(server.CreateDatabase(ctx, "lost")).To(Succeed())
		s := openDSN(server.DSN("lost"), "eu")
		apply(s, save(name, `{"a":1}`))
		Expect(server.Kill()).To(Succeed())
		_, err := store.Apply(ctx, s, save(name, `{"a":2}`))
		Expect(err).To(haveCode(store.Unavailable))
		Expect(server.Restart(ctx)).To(Succeed())
		Eventually(func() error {
			_, err := store.Apply(ctx, s, save(name, `{"a":2}`))
			return err
		}, "20s").Should(Succeed())
		got, err := s.Get(ctx, name)
		Expect(err).NotTo(HaveOccurred())
		Expect(json.Valid(got.Body)).To(BeTrue())
		Expect(got.Version.Number).To(BeEquivalentTo(2))
	})
})
