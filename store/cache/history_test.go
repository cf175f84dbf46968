package cache_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/store"
)

// write is one that has returned.
type returned struct {
	at      time.Time
	by      int
	version store.Version
}

// history is what has been written of one name, in the order of the versions.
type history struct {
	mu     sync.Mutex
	writes []returned
}

func (h *history) add(r returned) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.writes = append(h.writes, r)
}

// promised are the least versions that a read which begins now may give: to a reader in a process, and to one that passes on what it has seen.
func (h *history) promised(by int) (least, seen store.Version) {
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range h.writes {
		if (w.by == by || now.Sub(w.at) >= staleness) && w.version.Compare(least) > 0 {
			least = w.version
		}
		if w.version.Compare(seen) > 0 {
			seen = w.version
		}
	}
	return least, seen
}

var _ = Describe("concurrent readers and writers in two processes", func() {
	const (
		names   = 12
		readers = 6
	)
	// Names below folders/k are never deleted.
	name := func(i int) string {
		if i%3 == 0 {
			return fmt.Sprintf("folders/x/documents/d%d", i)
		}
		return fmt.Sprintf("folders/k/documents/d%d", i)
	}

	DescribeTable("no read is older than promised", func(ctx SpecContext, settings map[string]string, timeout time.Duration, disturb func(ctx context.Context, server *redisserver.Server, rdb *redis.Client) error) {
		server := redisserver.New(GinkgoTB(), settings)
		o, err := redis.ParseURL(server.URL())
		Expect(err).NotTo(HaveOccurred())
		rdb := redis.NewClient(o)
		DeferCleanup(rdb.Close)
		dsn := pgtest.Database(GinkgoTB())
		processes := []*process{start(GinkgoTB(), dsn, server.URL(), timeout), start(GinkgoTB(), dsn, server.URL(), timeout)}
		var histories [names]history
		for i := range names {
			r, err := write(ctx, processes[0].cache, store.Create, name(i), `{"n":0}`)
			Expect(err).NotTo(HaveOccurred())
			histories[i].add(returned{time.Now(), 0, r.Version})
		}
		for _, p := range processes {
			Eventually(p.cache.Live).WithTimeout(within).Should(BeTrue())
		}

		run, cancel := context.WithTimeout(ctx, 4*time.Second)
		defer cancel()
		var running sync.WaitGroup
		var failure atomic.Pointer[string]
		fail := func(format string, args ...any) {
			text := fmt.Sprintf(format, args...)
			failure.CompareAndSwap(nil, &text)
			cancel()
		}
		for i := range names { // one writer for each name: its versions are in order
			running.Go(func() {
				for n := 1; run.Err() == nil; n++ {
					by, op := rand.IntN(2), store.Save
					if i%3 == 0 && rand.IntN(4) == 0 {
						op = store.Delete
					}
					r, err := write(context.WithoutCancel(run), processes[by].cache, op, name(i), fmt.Sprintf(`{"n":%d}`, n))
					if err != nil {
						fail("write %s: %v", name(i), err)
					} else if r != nil {
						histories[i].add(returned{time.Now(), by, r.Version})
					}
					select {
					case <-run.Done():
					case <-time.After(time.Duration(rand.IntN(100)) * time.Millisecond):
					}
				}
			})
		}
		var done atomic.Int64
		check := func(what string, i int, r *store.Resource, least store.Version) {
			done.Add(1)
			switch {
			case r == nil && i%3 != 0:
				fail("%s: %s is missing", what, name(i))
			case r != nil && r.Version.Compare(least) < 0:
				fail("%s: %s has version %v, promised is %v", what, name(i), r.Version, least)
			}
		}
		for range readers {
			running.Go(func() {
				for run.Err() == nil {
					by, i := rand.IntN(2), rand.IntN(names)
					p := processes[by]
					least, seen := histories[i].promised(by)
					ctx := context.WithoutCancel(run)
					switch rand.IntN(4) {
					case 0:
						r, err := p.cache.Get(ctx, name(i))
						if err != nil && store.CodeOf(err) != store.NotFound {
							fail("get: %v", err)
						}
						check("get", i, r, least)
					case 1:
						r, err := p.cache.Get(store.WithMinVersion(ctx, seen), name(i))
						if err != nil && store.CodeOf(err) != store.NotFound {
							fail("get what was seen: %v", err)
						}
						check("get what was seen", i, r, seen)
					case 2:
						var all []string
						var promised []store.Version
						for j := range names {
							all = append(all, name(j))
							l, _ := histories[j].promised(by)
							promised = append(promised, l)
						}
						found, err := p.cache.BatchGet(ctx, all)
						if err != nil {
							fail("batch get: %v", err)
							continue
						}
						for j, r := range found {
							check("batch get", j, r, promised[j])
						}
					default:
						var promised []store.Version
						for j := range names {
							l, _ := histories[j].promised(by)
							promised = append(promised, l)
						}
						page, err := p.cache.List(ctx, store.Query{Type: "Document", Prefix: "folders/k/documents/"})
						if err != nil {
							fail("list: %v", err)
							continue
						}
						byName := map[string]*store.Resource{}
						for _, r := range page.Resources {
							byName[r.Name] = r
						}
						for j := range names {
							if j%3 != 0 {
								check("list", j, byName[name(j)], promised[j])
							}
						}
					}
				}
			})
		}
		running.Go(func() {
			for run.Err() == nil {
				if err := disturb(run, server, rdb); err != nil && run.Err() == nil {
					fail("disturb: %v", err)
				}
			}
		})
		running.Wait()
		if text := failure.Load(); text != nil {
			Fail(*text)
		}
		Expect(done.Load()).To(BeNumerically(">", 100))
		hits := 0.0
		for _, p := range processes {
			hits += p.counted("dbcontroller_cache_requests_total", "resource", "hit") + p.counted("dbcontroller_cache_requests_total", "page", "hit")
		}
		GinkgoWriter.Printf("%d reads checked, %v hits\n", done.Load(), hits)
		Expect(hits).To(BeNumerically(">", 0))
	},
		Entry("while nothing happens", nil, time.Second, func(ctx context.Context, _ *redisserver.Server, _ *redis.Client) error {
			return pause(ctx, time.Second)
		}),
		Entry("while Redis is flushed", nil, time.Second, func(ctx context.Context, _ *redisserver.Server, rdb *redis.Client) error {
			return errors.Join(rdb.FlushAll(context.WithoutCancel(ctx)).Err(), pause(ctx, 20*time.Millisecond))
		}),
		Entry("while Redis is killed and starts again, with what it has saved", map[string]string{"save": "3600 1"}, time.Second,
			func(ctx context.Context, server *redisserver.Server, rdb *redis.Client) error {
				quiet := context.WithoutCancel(ctx)
				err := errors.Join(pause(ctx, 500*time.Millisecond), rdb.Save(quiet).Err(), pause(ctx, 100*time.Millisecond))
				return errors.Join(err, server.Restart(quiet))
			}),
		Entry("while Redis hangs, so that commands time out with and without effect", nil, 30*time.Millisecond,
			func(ctx context.Context, server *redisserver.Server, _ *redis.Client) error {
				err := errors.Join(server.Pause(), pause(ctx, time.Duration(rand.IntN(120))*time.Millisecond), server.Resume())
				return errors.Join(err, pause(ctx, time.Duration(rand.IntN(300))*time.Millisecond))
			}),
		Entry("while connections are cut", nil, time.Second, func(ctx context.Context, _ *redisserver.Server, rdb *redis.Client) error {
			err := rdb.ClientKillByFilter(context.WithoutCancel(ctx), "TYPE", "normal", "SKIPME", "yes").Err()
			return errors.Join(err, pause(ctx, 200*time.Millisecond))
		}),
		Entry("while Redis evicts what it likes", map[string]string{"maxmemory": "2500kb", "maxmemory-policy": "allkeys-random"}, time.Second,
			func(ctx context.Context, _ *redisserver.Server, rdb *redis.Client) error {
				_ = rdb.Set(context.WithoutCancel(ctx), fmt.Sprintf("ballast%d", rand.IntN(1000)), make([]byte, 20_000), 0).Err() // refused when nothing is left to evict
				return pause(ctx, time.Millisecond)
			}),
		Entry("while Redis is full now and then", map[string]string{"maxmemory": "3mb", "maxmemory-policy": "noeviction"}, time.Second,
			func(ctx context.Context, _ *redisserver.Server, rdb *redis.Client) error {
				quiet := context.WithoutCancel(ctx)
				for rdb.RPush(quiet, "ballast", make([]byte, 100_000)).Err() == nil {
				}
				return errors.Join(pause(ctx, 200*time.Millisecond), rdb.Del(quiet, "ballast").Err(), pause(ctx, 200*time.Millisecond))
			}),
	)
})

// pause lets the others work.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	return nil
}
