package syncing_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
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
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/syncing"
)

// searchServer is a search store and what can happen to it.
type searchServer struct {
	store search.Store
	empty func()
	// edit does n random edits by hand; remove deletes documents.
	edit   func(n int)
	remove func(names ...string)
	// save keeps a state to which undo goes back.
	save, undo func()
	stop       func()
	start      func()
}

func onPostgres(region string) *searchServer {
	GinkgoHelper()
	dsn := pgtest.Database(GinkgoTB())
	s, err := searchpostgres.Open(context.Background(), searchpostgres.Config{DSN: dsn, Service: service, Region: region, Version: "v1"})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	sql := func(statements ...string) {
		GinkgoHelper()
		c, err := pgx.Connect(context.Background(), dsn+"&search_path=search_v1")
		Expect(err).NotTo(HaveOccurred())
		defer c.Close(context.Background())
		for _, s := range statements {
			_, err := c.Exec(context.Background(), s)
			// A statement by hand may meet a batch that is being written in a deadlock, and lose.
			for tries := 0; tries < 20 && err != nil && strings.Contains(err.Error(), "SQLSTATE 40P01"); tries++ {
				_, err = c.Exec(context.Background(), s)
			}
			Expect(err).NotTo(HaveOccurred(), s)
		}
	}
	return &searchServer{
		store: s,
		empty: func() { sql("TRUNCATE documents") },
		edit: func(n int) {
			for range n {
				sql([]string{
					"DELETE FROM documents WHERE name IN (SELECT name FROM documents ORDER BY random() LIMIT 2)",
					"UPDATE documents SET a = 'by hand' WHERE name IN (SELECT name FROM documents ORDER BY random() LIMIT 2)",
					"UPDATE documents SET resource_version = resource_version + 7 WHERE name IN (SELECT name FROM documents ORDER BY random() LIMIT 2)",
					"UPDATE documents SET shard = (shard + 1) % 64 WHERE name IN (SELECT name FROM documents ORDER BY random() LIMIT 2)",
					"INSERT INTO documents (name, type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body, sum) SELECT name || 'ghost', type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body, sum FROM documents ORDER BY random() LIMIT 1 ON CONFLICT DO NOTHING",
				}[rand.N(5)])
			}
		},
		remove: func(names ...string) {
			sql("DELETE FROM documents WHERE name IN ('" + strings.Join(names, "', '") + "')")
		},
		save: func() {
			sql("DROP TABLE IF EXISTS public.d, public.l", "CREATE TABLE public.d AS TABLE documents", "CREATE TABLE public.l AS TABLE leases")
		},
		undo: func() {
			sql(`BEGIN; LOCK leases, documents; DELETE FROM documents; DELETE FROM leases; INSERT INTO leases SELECT * FROM public.l;
				INSERT INTO documents (name, type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body, sum)
				SELECT name, type, uuid, epoch, resource_version, shard, fingerprint, a, b, c, d, body, sum FROM public.d; COMMIT`)
		},
	}
}

func onRedis(region string) *searchServer {
	GinkgoHelper()
	server := redisserver.New(GinkgoTB(), nil)
	s, err := searchredis.Open(searchredis.Config{URL: server.URL(), Service: service, Region: region, Version: "v1", Ring: ring})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	o, err := goredis.ParseURL(server.URL())
	Expect(err).NotTo(HaveOccurred())
	c := goredis.NewClient(o)
	DeferCleanup(c.Close)
	ctx := context.Background()
	p := fmt.Sprintf("dbc-search-1:{%s/%s/v1}:", service, region)
	var saved map[string]string
	return &searchServer{
		store: s,
		empty: func() { Expect(c.FlushAll(ctx).Err()).To(Succeed()) },
		edit: func(n int) {
			for range n {
				names, err := c.ZRandMember(ctx, p+"n", 1).Result()
				Expect(err).NotTo(HaveOccurred())
				if len(names) == 0 {
					return
				}
				doc := p + "d:" + names[0]
				Expect([]func() error{
					func() error { return c.Del(ctx, doc).Err() },
					func() error { return c.HSet(ctx, doc, "a", "by hand").Err() },
					func() error { return c.HIncrBy(ctx, doc, "v", 7).Err() },
					func() error { return c.ZRem(ctx, p+"n", names[0]).Err() },
					func() error { return c.ZAdd(ctx, p+"n", goredis.Z{Member: names[0] + "ghost"}).Err() },
					func() error { return c.ZRem(ctx, p+"t:Book", names[0]).Err() },
				}[rand.N(6)]()).To(Succeed())
			}
		},
		remove: func(names ...string) {
			for _, n := range names {
				Expect(c.Del(ctx, p+"d:"+n).Err()).To(Succeed())
				Expect(c.ZRem(ctx, p+"n", n).Err()).To(Succeed())
			}
		},
		save: func() {
			saved = map[string]string{}
			keys, err := c.Keys(ctx, "*").Result()
			Expect(err).NotTo(HaveOccurred())
			for _, k := range keys {
				if saved[k], err = c.Dump(ctx, k).Result(); err != nil {
					Expect(err).To(MatchError(goredis.Nil))
				}
			}
		},
		undo: func() {
			_, err := c.TxPipelined(ctx, func(tx goredis.Pipeliner) error {
				tx.FlushAll(ctx)
				for k, v := range saved {
					if v != "" {
						tx.RestoreReplace(ctx, k, 0, v)
					}
				}
				return nil
			})
			Expect(err).NotTo(HaveOccurred())
		},
		stop:  server.Kill,
		start: func() { Expect(server.Restart(ctx)).To(Succeed()) },
	}
}

// index starts a node that fills a search store.
func (r *region) index(s search.Store, edit func(*syncing.LocalConfig)) (node *syncing.LocalNode, stop func()) {
	GinkgoHelper()
	version := searchtest.Version(GinkgoTB())
	cfg := syncing.LocalConfig{
		Service: service, Region: r.name, Ring: ring, MaxShardsPerNode: 32, Source: r.store, Search: s,
		Schema: func() *descriptor.Version { return version }, AuditInterval: -1, Logger: quiet(),
	}
	if edit != nil {
		edit(&cfg)
	}
	node, err := syncing.NewLocalNode(cfg)
	Expect(err).NotTo(HaveOccurred())
	Expect(node.UpdateShardRange(context.Background(), feed.Range{From: 0, To: ring})).To(Succeed())
	return node, run(node.Run)
}

// indexed says how the search store differs from the region's live rows: P16.
func (r *region) indexed(s search.Store, v *descriptor.Version) func() (string, error) {
	return func() (string, error) {
		ctx, all, types := context.Background(), feed.Range{To: ring}, search.TypesOf(v)
		want, err := r.store.SearchDigests(ctx, all, types)
		if err != nil {
			return "", err
		}
		got, err := s.Digests(ctx, all, types)
		if err != nil {
			return err.Error(), nil //nolint:nilerr // it is not in sync, and asked again
		}
		if !slices.Equal(got, want) {
			return fmt.Sprintf("%d shards, want %d", len(got), len(want)), nil
		}
		return "", nil
	}
}

func auditing(interval time.Duration) func(*syncing.LocalConfig) {
	return func(c *syncing.LocalConfig) { c.AuditInterval = interval }
}

var _ = Describe("the search syncer", func() {
	for kind, open := range map[string]func(region string) *searchServer{"PostgreSQL": onPostgres, "Redis": onRedis} {
		Describe("on "+kind, func() {
			var (
				w      *world
				eu, us *region
				s      *searchServer
				v      *descriptor.Version
			)
			equal := func() {
				GinkgoHelper()
				Eventually(us.indexed(s.store, v), "60s", "50ms").Should(BeEmpty())
			}
			hits := func(filter string) []string {
				GinkgoHelper()
				r, err := s.store.Search(context.Background(), search.Query{Type: v.Type("Book"), Filter: filter, PageSize: 200})
				Expect(err).NotTo(HaveOccurred())
				var names []string
				for _, h := range r.Hits {
					names = append(names, h.Name)
				}
				return names
			}
			BeforeEach(func() {
				w = newWorld("eu", "us")
				eu, us = w.regions["eu"], w.regions["us"]
				w.declare("eu", "us")
				s, v = open("us"), searchtest.Version(GinkgoTB())
			})

			It("F97, F98: follows owned rows and copies alike, and goes on from its cursor", func() {
				us.save("here", []string{"us"}, names("own", 300)...)
				node, stop := us.index(s.store, nil)
				us.sync(nil)
				eu.save("there", everywhere, names("foreign", 300)...)
				converge(us, eu)
				equal()
				Eventually(func() syncing.State { return node.Status().State }, "30s", "20ms").Should(Equal(syncing.Live))
				Expect(hits(`name = "shelves/own/books/00007" OR name = "shelves/foreign/books/00009"`)).To(HaveLen(2))

				us.remove(names("own", 10)...)
				eu.save("hidden", []string{"eu"}, names("foreign", 10)...)
				converge(us, eu)
				equal()
				Expect(hits(`name = "shelves/own/books/00007" OR name = "shelves/foreign/books/00009"`)).To(BeEmpty())
				Eventually(func() time.Duration { return *node.Status().Freshness }, "10s").Should(BeNumerically("<", 3*time.Second))

				stop()
				us.save("away", []string{"us"}, names("own", 20)...)
				us.remove("shelves/own/books/00299")
				again, _ := us.index(s.store, nil)
				equal()
				Expect(again.Status().RowsApplied).To(BeNumerically("<=", 42), "only what has changed")
			})

			It("P16: is rebuilt live after the store was emptied, undone and edited by hand", func() {
				us.save("first", []string{"us"}, names("a", 500)...)
				node, _ := us.index(s.store, auditing(200*time.Millisecond))
				equal()
				s.save()
				for round := range 6 {
					us.save(fmt.Sprint("round", round), []string{"us"}, names("a", 40+rand.N(400))...)
					us.remove(names("a", rand.N(60))...)
					switch round % 3 {
					case 0:
						s.empty()
					case 1:
						s.undo()
					case 2:
						Eventually(func() syncing.State { return node.Status().State }, "30s", "20ms").Should(Equal(syncing.Live))
						equal()
						s.edit(20)
					}
					us.save(fmt.Sprint("after", round), []string{"us"}, names("b", 30)...)
					equal()
				}
				Expect(node.Drift()).NotTo(BeEmpty())
			})

			It("I27: finds documents that were deleted by hand at the next audit, and not without one", func() {
				us.save("first", []string{"us"}, names("a", 300)...)
				node, stop := us.index(s.store, auditing(-1))
				equal()
				Eventually(func() syncing.State { return node.Status().State }, "30s", "20ms").Should(Equal(syncing.Live))
				s.remove("shelves/a/books/00007", "shelves/a/books/00011")
				us.save("what is written meanwhile tells nothing of them", []string{"us"}, names("a", 7)...)
				Consistently(us.indexed(s.store, v), "1500ms", "100ms").ShouldNot(BeEmpty())
				Expect(node.Drift()).To(BeEmpty())
				stop()

				node, _ = us.index(s.store, auditing(time.Second)) // the first one comes after 0.5 to 1.5 s, and takes its time
				began := time.Now()
				equal()
				Expect(time.Since(began)).To(And(BeNumerically(">", 400*time.Millisecond), BeNumerically("<", 8*time.Second)))
				Expect(node.Drift()).To(HaveLen(2))
				for _, d := range node.Drift() {
					Expect(d.Kind).To(Equal(syncing.Hole))
				}
			})

			It("takes up a new declaration of what is searched", func() {
				us.save("first", []string{"us"}, names("a", 50)...)
				var schema atomic.Pointer[descriptor.Version]
				schema.Store(v)
				us.index(s.store, func(c *syncing.LocalConfig) { c.Schema = schema.Load })
				equal()
				other := searchtest.Version(GinkgoTB())
				other.Type("Book").Search.Fingerprint = "0123456789abcdef"
				schema.Store(other)
				v = other
				equal()
			})
		})
	}

	It("a search store that is down delays no copy, and is filled when it is back", func() {
		w := newWorld("eu", "us")
		eu, us := w.regions["eu"], w.regions["us"]
		w.declare("eu", "us")
		s := onRedis("us")
		node, _ := us.index(s.store, nil)
		copies, _ := us.sync(nil)
		eu.save("before", everywhere, names("a", 100)...)
		converge(us, eu)
		v := searchtest.Version(GinkgoTB())
		Eventually(us.indexed(s.store, v), "30s", "50ms").Should(BeEmpty())
		s.stop()
		eu.save("meanwhile", everywhere, names("a", 200)...)
		Eventually(difference(us, eu), "5s", "20ms").Should(BeEmpty())
		live(copies, "eu")
		Eventually(func() syncing.State { return node.Status().State }, "30s", "20ms").ShouldNot(Equal(syncing.Live))
		s.start()
		Eventually(us.indexed(s.store, v), "30s", "50ms").Should(BeEmpty())
		Eventually(func() syncing.State { return node.Status().State }, "30s", "20ms").Should(Equal(syncing.Live))
	})
})
