package verify_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/search"
	searchpostgres "github.com/dbcontroller/db-controller/search/postgres"
	searchredis "github.com/dbcontroller/db-controller/search/redis"
	"github.com/dbcontroller/db-controller/search/searchtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/syncing"
	"github.com/dbcontroller/db-controller/verify"
)

// documentEdit is a change by hand in a search store, and what it must be called.
type documentEdit struct {
	what string
	do   func(name string)
	kind verify.Kind
}

// index is a search store, its edits by hand, and how a document that never was one is written.
type index struct {
	store search.Store
	edits []documentEdit
	forge func(like, name string)
}

func onPostgres() index {
	GinkgoHelper()
	dsn := pgtest.Database(GinkgoTB())
	s, err := searchpostgres.Open(context.Background(), searchpostgres.Config{DSN: dsn, Service: service, Region: "us", Version: "v1"})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	sql := func(statement string) func(...any) {
		return func(args ...any) {
			GinkgoHelper()
			c, err := pgx.Connect(context.Background(), dsn+"&search_path=search_v1")
			Expect(err).NotTo(HaveOccurred())
			defer c.Close(context.Background())
			tag, err := c.Exec(context.Background(), statement, args...)
			Expect(err).NotTo(HaveOccurred(), statement)
			Expect(tag.RowsAffected()).To(BeNumerically(">", 0), statement)
		}
	}
	set := func(to string) func(string) {
		return func(name string) { sql("UPDATE documents SET " + to + " WHERE name = $1")(name) }
	}
	return index{
		store: s,
		edits: []documentEdit{
			{"a text", set("a = 'forged'"), verify.Content},
			{"a value of a filter", set(`body = '{"genre":"forged"}'`), verify.Content},
			{"type", set("type = 'Shelf'"), verify.Stale},
			{"uuid", set("uuid = gen_random_uuid()"), verify.Content},
			{"shard", set("shard = (shard + 1) % 64"), verify.Content},
			{"sum", set("sum = gen_random_uuid()"), verify.Content},
			{"a lower version", set("resource_version = 0"), verify.Stale},
			{"a higher version", set("resource_version = resource_version + 7"), verify.Ahead},
			{"a higher epoch", set("epoch = epoch + 1"), verify.Ahead},
			{"another declaration", set("fingerprint = 'of last year'"), verify.Stale},
			{"deleted", func(name string) { sql("DELETE FROM documents WHERE name = $1")(name) }, verify.Missing},
		},
		forge: func(like, name string) {
			sql(`INSERT INTO documents (name, type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body, sum)
				SELECT $2, type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body, sum FROM documents WHERE name = $1`)(like, name)
		},
	}
}

func onRedis() index {
	GinkgoHelper()
	server := redisserver.New(GinkgoTB(), nil)
	s, err := searchredis.Open(searchredis.Config{URL: server.URL(), Service: service, Region: "us", Version: "v1", Ring: ring})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	o, err := goredis.ParseURL(server.URL())
	Expect(err).NotTo(HaveOccurred())
	c := goredis.NewClient(o)
	DeferCleanup(c.Close)
	ctx := context.Background()
	p := fmt.Sprintf("dbc-search-1:{%s/us/v1}:", service)
	set := func(field, to string) func(string) {
		return func(name string) { Expect(c.HSet(ctx, p+"d:"+name, field, to).Err()).To(Succeed()) }
	}
	return index{
		store: s,
		edits: []documentEdit{
			{"a text", set("a", "forged"), verify.Content},
			{"a value of a filter", set("j", `{"genre":"forged"}`), verify.Content},
			{"uuid", set("u", "00000000-0000-4000-8000-000000000009"), verify.Content},
			{"a lower version", set("v", "0"), verify.Stale},
			{"a higher version", func(name string) { Expect(c.HIncrBy(ctx, p+"d:"+name, "v", 7).Err()).To(Succeed()) }, verify.Ahead},
			{"another declaration", set("f", "of last year"), verify.Stale},
			{"not in an index", func(name string) { Expect(c.ZRem(ctx, p+"t:Book", name).Err()).To(Succeed()) }, verify.Content},
			{"not among all names", func(name string) { Expect(c.ZRem(ctx, p+"n", name).Err()).To(Succeed()) }, verify.Missing},
			{"the document deleted, its name left", func(name string) { Expect(c.Del(ctx, p+"d:"+name).Err()).To(Succeed()) }, verify.Stale},
		},
		forge: func(_, name string) {
			Expect(c.ZAdd(ctx, p+"n", goredis.Z{Member: name}).Err()).To(Succeed())
		},
	}
}

// fill keeps a search store until the test or the caller ends it.
func (r *region) fill(s search.Store, v *descriptor.Version) (stop func()) {
	GinkgoHelper()
	node, err := syncing.NewLocalNode(syncing.LocalConfig{
		Service: service, Region: r.name, Ring: ring, MaxShardsPerNode: 32, Source: r.store, Search: s, Schema: func() *descriptor.Version { return v }, AuditInterval: -1, Logger: quiet(),
	})
	Expect(err).NotTo(HaveOccurred())
	Expect(node.UpdateShardRange(context.Background(), feed.Range{From: 0, To: ring})).To(Succeed())
	return run(node.Run)
}

// searched is a whole pass over a search store and everything that it told.
func (r *region) searched(ctx context.Context, d *verify.Documents, opt verify.Options) (verify.State, map[string]verify.Difference) {
	GinkgoHelper()
	found := map[string]verify.Difference{}
	state, err := verify.Run(ctx, &verify.Rows{Store: r.store, Searched: d.Searched}, d, opt, verify.State{}, func(p verify.Progress) error {
		for _, x := range p.Found {
			Expect(found).NotTo(HaveKey(x.Name), "told twice")
			found[x.Name] = x
		}
		return nil
	})
	Expect(err).NotTo(HaveOccurred())
	return state, found
}

var _ = Describe("a pass over a search store", func() {
	for kind, open := range map[string]func() index{"PostgreSQL": onPostgres, "Redis": onRedis} {
		Describe("on "+kind, func() {
			var (
				eu, us *region
				x      index
				v      *descriptor.Version
				d      *verify.Documents
			)
			BeforeEach(func() {
				w := newWorld("eu", "us")
				eu, us = w.regions["eu"], w.regions["us"]
				x, v = open(), searchtest.Version(GinkgoTB())
				types := search.TypesOf(v)
				d = &verify.Documents{Index: x.store, Searched: types, Ring: ring, Project: func(ctx context.Context, names []string) (docs []search.Document, err error) {
					err = us.store.SearchNames(ctx, names, types, func(r *store.Resource) error {
						doc, err := search.DocumentOf(v.Type(r.Type), r)
						docs = append(docs, doc)
						return err
					})
					return docs, err
				}}
			})

			It("P16, I25, I27: finds every edit by hand, in documents of owned rows and of copies, lists it and repairs it", func(ctx SpecContext) {
				own, foreign := names("own", 150), names("foreign", 150)
				us.save("here", own...)
				eu.save("there", foreign...)
				stop := us.sync()
				converge(us, eu)
				stop()
				Expect(d.Complete(ctx)).To(BeFalse(), "nothing is filled yet")
				filling := us.fill(x.store, v)
				Eventually(d.Complete).WithArguments(ctx).WithTimeout(30 * time.Second).Should(BeTrue())
				state, found := us.searched(ctx, d, verify.Options{Size: 20})
				Expect(found).To(BeEmpty())
				Expect(state.Compared).To(BeNumerically("==", 300))
				Expect(state.VerifiedThrough()).NotTo(BeZero())

				want := map[string]verify.Kind{}
				for i, e := range x.edits {
					for _, name := range []string{own[7*i+1], foreign[7*i+2]} {
						e.do(name)
						want[name] = e.kind
					}
				}
				for _, ghost := range []string{"shelves/a/books/first", "shelves/own/books/00012x", "shelves/z/books/last"} {
					x.forge(own[149], ghost)
					want[ghost] = verify.Extra
				}
				By("I25: counting what the search store holds, and which of it has no row here")
				residents, err := d.Residents(ctx, &verify.Rows{Store: us.store, Searched: d.Searched}, 10*time.Millisecond)
				Expect(err).NotTo(HaveOccurred())
				var without, all int64
				for _, r := range residents {
					without, all = without+r.WithoutRow, all+r.Documents
				}
				Expect(without).To(BeNumerically("==", 3))
				Expect(all).To(BeNumerically("<=", 303))
				Expect(fmt.Sprint(residents)).To(ContainSubstring("shelves/"))

				check := func(opt verify.Options) (verify.State, map[string]verify.Difference) {
					GinkgoHelper()
					state, found := us.searched(ctx, d, opt)
					kinds := map[string]verify.Kind{}
					for name, f := range found {
						kinds[name] = f.Kind
					}
					Expect(kinds).To(Equal(want))
					return state, found
				}
				state, _ = check(verify.Options{Size: 20})
				Expect(state.VerifiedThrough()).To(BeZero(), "what is wrong is not verified")
				_, found = check(verify.Options{Mode: verify.DryRun})
				Expect(found["shelves/z/books/last"].Action).To(Equal("delete the document"))
				Expect(found[own[1]].Action).To(Equal("write the document anew from its row"))
				state, found = check(verify.Options{Mode: verify.Repair, Size: 20})
				for name, f := range found {
					Expect(f.Repaired).To(BeTrue(), name)
				}
				Expect(state.VerifiedThrough()).NotTo(BeZero())
				_, found = us.searched(ctx, d, verify.Options{})
				Expect(found).To(BeEmpty())
				have, err := x.store.Digests(ctx, feed.Range{To: ring}, d.Searched)
				Expect(err).NotTo(HaveOccurred())
				Expect(us.store.SearchDigests(ctx, feed.Range{To: ring}, d.Searched)).To(Equal(have))

				// The node that keeps the store was not disturbed: its lease stands, and it goes on.
				us.save("again", own[:5]...)
				Eventually(func() (int, error) {
					all, err := x.store.Look(ctx, d.Searched, own[:5])
					n := 0
					for _, r := range all {
						if r.Version.Number > 1 {
							n++
						}
					}
					return n, err
				}).WithTimeout(20 * time.Second).Should(Equal(5))
				filling()
			})

			It("P16: sees no difference in what is written meanwhile, and finds what nobody fills to be behind", func(ctx SpecContext) {
				all := names("a", 400)
				us.save("first", all...)
				filling := us.fill(x.store, v)
				Eventually(d.Complete).WithArguments(ctx).WithTimeout(30 * time.Second).Should(BeTrue())
				writing := run(func(ctx context.Context) error {
					for i := 0; ctx.Err() == nil; i++ {
						us.save(fmt.Sprint(i), all[i%350:][:20]...)
						us.remove(fmt.Sprintf("shelves/a/books/%05d", 350+i%50))
					}
					return nil
				})
				x.edits[0].do(all[399]) // found while the others move, unless it was removed by then
				for range 3 {
					_, found := us.searched(ctx, d, verify.Options{Size: 10, Parts: 3})
					delete(found, all[399])
					Expect(found).To(BeEmpty())
				}
				writing()
				us.remove(all[399])
				Eventually(func() ([]search.ShardDigest, error) { return x.store.Digests(ctx, feed.Range{To: ring}, d.Searched) }).WithTimeout(20 * time.Second).
					Should(Equal(us.digests(d.Searched)))
				filling()
				us.save("nobody follows", all[:3]...)
				us.remove(all[3])
				state, found := us.searched(ctx, d, verify.Options{Settle: 300 * time.Millisecond, Grace: 50 * time.Millisecond})
				Expect(slices.Sorted(maps.Keys(found))).To(Equal(all[:4]))
				for name, f := range found {
					Expect(f.Behind).To(BeTrue(), name)
				}
				Expect(state.VerifiedThrough()).To(BeZero())
			})
		})
	}
})

func (r *region) digests(types search.Types) []search.ShardDigest {
	GinkgoHelper()
	digests, err := r.store.SearchDigests(context.Background(), feed.Range{To: ring}, types)
	Expect(err).NotTo(HaveOccurred())
	return digests
}

func (r *region) remove(names ...string) {
	GinkgoHelper()
	for _, name := range names {
		_, err := store.Apply(context.Background(), r.store, store.Write{Op: store.Delete, Name: name, Type: "Book", AllowMissing: true})
		Expect(err).NotTo(HaveOccurred())
	}
}
