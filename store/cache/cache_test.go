package cache_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/cache"
	"github.com/dbcontroller/db-controller/store/postgres"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestCache(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "store/cache")
}

const (
	within = 20 * time.Second
	// staleness is longer than the default, so that a busy machine does not turn the cache off.
	staleness = 5 * time.Second
)

// database counts the reads that reach PostgreSQL, and can hold them up after they have read.
type database struct {
	store.Store
	reads atomic.Int64
	hold  atomic.Pointer[chan struct{}] // closed to let go
	held  chan struct{}                 // gets one for each read that is held
}

func (d *database) after() {
	d.reads.Add(1)
	if c := d.hold.Load(); c != nil {
		d.held <- struct{}{}
		<-*c
	}
}

func (d *database) Get(ctx context.Context, name string) (*store.Resource, error) {
	defer d.after()
	return d.Store.Get(ctx, name)
}

func (d *database) BatchGet(ctx context.Context, names []string) ([]*store.Resource, error) {
	defer d.after()
	return d.Store.BatchGet(ctx, names)
}

func (d *database) List(ctx context.Context, q store.Query) (*store.Page, error) {
	defer d.after()
	return d.Store.List(ctx, q)
}

// process is what one process has: connections, cache, follower.
type process struct {
	core    *postgres.Store
	db      *database
	cache   *cache.Store
	metrics *prometheus.Registry
	stop    func()
}

func start(tb testing.TB, dsn, url string, timeout time.Duration) *process {
	tb.Helper()
	core, err := postgres.Open(context.Background(), postgres.Config{DSN: dsn, Service: "docs.example.com", Region: "eu", Version: "v1", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		tb.Fatal(err)
	}
	identity, err := core.Identity(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	p := &process{core: core, db: &database{Store: core, held: make(chan struct{}, 100)}, metrics: prometheus.NewRegistry()}
	p.cache, err = cache.Layer(p.db, cache.Config{URL: url, Identity: identity, MaxStaleness: staleness, Timeout: timeout,
		Lists: func(typ string) bool { return typ == "Document" }, Registerer: p.metrics, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func() error{func() error { return core.Run(ctx) }, func() error { return p.cache.Run(ctx, core.Feed()) }} {
		running.Go(func() {
			if err := run(); err != nil {
				tb.Error(err)
			}
		})
	}
	p.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		core.Close()
	})
	tb.Cleanup(p.stop)
	return p
}

// counted is the value of a counter with the label values, or else of a gauge without.
func (p *process) counted(name string, labels ...string) float64 {
	families, err := p.metrics.Gather()
	Expect(err).NotTo(HaveOccurred())
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	metrics:
		for _, m := range f.GetMetric() {
			for i, l := range m.GetLabel() { // sorted by name: read, result
				if l.GetValue() != labels[i] {
					continue metrics
				}
			}
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return 0
}

func write(ctx context.Context, s store.Store, op store.Op, name, body string) (*store.Resource, error) {
	w := store.Write{Op: op, Name: name, Type: "Document", OwningRegion: "eu", Regions: []string{"eu"}, AllowMissing: true}
	if op != store.Delete {
		w.Body, w.Meta.Labels = []byte(body), map[string]string{"l": "v"}
	}
	r, err := store.Apply(ctx, s, w)
	return r.Resource, err
}

var _ = Describe("the cache layer (F37)", func() {
	var server *redisserver.Server
	var rdb *redis.Client
	var dsn string
	var a *process
	var settings map[string]string

	BeforeEach(func() { settings = nil })
	JustBeforeEach(func() {
		server = redisserver.New(GinkgoTB(), settings)
		o, err := redis.ParseURL(server.URL())
		Expect(err).NotTo(HaveOccurred())
		rdb = redis.NewClient(o)
		DeferCleanup(rdb.Close)
		dsn = pgtest.Database(GinkgoTB())
		a = start(GinkgoTB(), dsn, server.URL(), time.Second)
		Eventually(a.cache.Live).WithTimeout(within).Should(BeTrue())
	})
	put := func(ctx context.Context, p *process, op store.Op, name, body string) *store.Resource {
		GinkgoHelper()
		r, err := write(ctx, p.cache, op, name, body)
		Expect(err).NotTo(HaveOccurred())
		return r
	}
	get := func(ctx context.Context, p *process, name string) *store.Resource {
		GinkgoHelper()
		r, err := p.cache.Get(ctx, name)
		Expect(err).NotTo(HaveOccurred())
		return r
	}
	// reads returns how many reads of p reach the database during f.
	reads := func(p *process, f func()) int64 {
		before := p.db.reads.Load()
		f()
		return p.db.reads.Load() - before
	}
	live := func(p *process) {
		GinkgoHelper()
		Eventually(p.cache.Live).WithTimeout(within).Should(BeTrue())
	}
	// settled waits until the follower of p has taken notice of everything written so far.
	settled := func(ctx context.Context, p *process, name string) {
		GinkgoHelper()
		noticed := 0
		Eventually(func() bool { // the first step that ends now may have begun before something was written, the second one has not
			before := p.counted("dbcontroller_cache_invalidated_names_total")
			put(ctx, p, store.Save, name, fmt.Sprintf(`{"n":%d}`, time.Now().UnixNano()))
			for end := time.Now().Add(time.Second); time.Now().Before(end); runtime.Gosched() {
				if p.counted("dbcontroller_cache_invalidated_names_total") > before {
					noticed++
					break
				}
			}
			return noticed == 2
		}).WithTimeout(within).Should(BeTrue())
		Eventually(func(g Gomega) {
			_, err := p.cache.Get(ctx, name)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(reads(p, func() { _, _ = p.cache.Get(ctx, name) })).To(BeZero())
		}).WithTimeout(within).Should(Succeed())
	}

	It("answers a second Get from Redis, exactly as the database does, and counts it", func(ctx SpecContext) {
		put(ctx, a, store.Create, "folders/f/documents/d", `{"a":1}`)
		settled(ctx, a, "folders/f/documents/other")
		want, err := a.core.Get(ctx, "folders/f/documents/d")
		Expect(err).NotTo(HaveOccurred())
		Expect(get(ctx, a, "folders/f/documents/d")).To(Equal(want))
		hits := a.counted("dbcontroller_cache_requests_total", "resource", "hit")
		Expect(reads(a, func() { Expect(get(ctx, a, "folders/f/documents/d")).To(Equal(want)) })).To(BeZero())
		Expect(a.counted("dbcontroller_cache_requests_total", "resource", "hit")).To(Equal(hits + 1))
		Expect(a.counted("dbcontroller_cache_live")).To(Equal(1.0))
	})

	It("shows a write at once to its own process, and soon to another one; a deletion too", func(ctx SpecContext) {
		b := start(GinkgoTB(), dsn, server.URL(), time.Second)
		live(b)
		const name = "folders/f/documents/d"
		put(ctx, a, store.Create, name, `{"a":0}`)
		for i := 1; i <= 50; i++ {
			_ = get(ctx, b, name)
			want := put(ctx, a, store.Save, name, fmt.Sprintf(`{"a":%d}`, i)).Version
			Expect(get(ctx, a, name).Version).To(Equal(want))
			Eventually(func() store.Version { return get(ctx, b, name).Version }).WithTimeout(staleness).WithPolling(time.Millisecond).Should(Equal(want))
		}
		put(ctx, a, store.Delete, name, "")
		_, err := a.cache.Get(ctx, name)
		Expect(store.CodeOf(err)).To(Equal(store.NotFound))
		Eventually(func() store.Code {
			_, err := b.cache.Get(ctx, name)
			return store.CodeOf(err)
		}).WithTimeout(staleness).Should(Equal(store.NotFound))
	})

	It("reads of a BatchGet only what is missing, in the order of the names", func(ctx SpecContext) {
		var names []string
		for i := range 300 {
			names = append(names, fmt.Sprintf("folders/f/documents/d%d", i))
			if i%3 != 0 {
				put(ctx, a, store.Create, names[i], `{}`)
			}
		}
		settled(ctx, a, "folders/f/documents/other")
		want, err := a.core.BatchGet(ctx, names)
		Expect(err).NotTo(HaveOccurred())
		_ = get(ctx, a, names[1])
		Expect(a.cache.BatchGet(ctx, names)).To(Equal(want))
		Expect(a.cache.BatchGet(ctx, append(names, names[1]))).To(Equal(append(want, want[1])), "a name twice")
		var present []string
		for i, n := range names {
			if i%3 != 0 {
				present = append(present, n)
			}
		}
		Expect(reads(a, func() { _, err = a.cache.BatchGet(ctx, present) })).To(BeZero())
		Expect(err).NotTo(HaveOccurred())
	})

	It("takes nothing older than the caller has seen, and nothing at all for who decides", func(ctx SpecContext) {
		const name = "folders/f/documents/d"
		v := put(ctx, a, store.Create, name, `{}`).Version
		settled(ctx, a, "folders/f/documents/other")
		_ = get(ctx, a, name)
		Expect(reads(a, func() { _ = get(store.WithMinVersion(ctx, v), a, name) })).To(BeZero())
		Expect(reads(a, func() {
			_ = get(store.WithMinVersion(ctx, store.Version{Epoch: v.Epoch, Number: v.Number + 1}), a, name)
		})).To(Equal(int64(1)))
		Expect(reads(a, func() { _ = get(store.Fresh(ctx), a, name) })).To(Equal(int64(1)))
	})

	It("keeps pages of the types that ask for it until something of their collection changes", func(ctx SpecContext) {
		for _, folder := range []string{"f", "g"} {
			for i := range 5 {
				put(ctx, a, store.Create, fmt.Sprintf("folders/%s/documents/d%d", folder, i), `{}`)
			}
		}
		settled(ctx, a, "folders/h/documents/other")
		list := func(q store.Query) *store.Page {
			GinkgoHelper()
			p, err := a.cache.List(ctx, q)
			Expect(err).NotTo(HaveOccurred())
			return p
		}
		f := store.Query{Type: "Document", Prefix: "folders/f/documents/", PageSize: 3}
		g := store.Query{Type: "Document", Prefix: "folders/g/documents/", PageSize: 3}
		first := list(f)
		Expect(first.Resources).To(HaveLen(3))
		next := f
		next.PageToken = first.NextPageToken
		Expect(list(next).Resources).To(HaveLen(2))
		_ = list(g)
		Expect(reads(a, func() {
			Expect(list(f)).To(Equal(first))
			Expect(list(next).Resources).To(HaveLen(2))
			_ = list(g)
		})).To(BeZero())
		put(ctx, a, store.Save, "folders/f/documents/d1", `{"a":2}`)
		Expect(reads(a, func() { _ = list(g) })).To(BeZero(), "another collection stays")
		Expect(reads(a, func() { Expect(list(f).Resources[1].Body).To(MatchJSON(`{"a":2}`)) })).To(Equal(int64(1)))
		Expect(reads(a, func() { _ = list(store.Query{Type: "Folder"}); _ = list(store.Query{Type: "Folder"}) })).To(Equal(int64(2)))
	})

	DescribeTable("a slow reader does not put back what a writer has thrown out", func(ctx SpecContext, between func()) {
		const name = "folders/f/documents/d"
		put(ctx, a, store.Create, name, `{"a":1}`)
		settled(ctx, a, "folders/g/documents/other")
		release := make(chan struct{})
		a.db.hold.Store(&release)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = a.cache.Get(ctx, name) // has read version 1
		}()
		listed := make(chan struct{})
		q := store.Query{Type: "Document", Prefix: "folders/f/documents/"}
		go func() {
			defer close(listed)
			_, _ = a.cache.List(ctx, q)
		}()
		<-a.db.held
		<-a.db.held
		a.db.hold.Store(nil)
		want := put(ctx, a, store.Save, name, `{"a":2}`).Version
		between()
		close(release)
		<-done
		<-listed
		Expect(get(ctx, a, name).Version).To(Equal(want))
		settled(ctx, a, "folders/g/documents/other")
		for range 2 {
			Expect(get(ctx, a, name).Version).To(Equal(want))
			p, err := a.cache.List(ctx, q)
			Expect(err).NotTo(HaveOccurred())
			Expect(p.Resources[0].Version).To(Equal(want))
		}
	},
		Entry("by itself", func() {}),
		Entry("even when Redis forgets the write", func() { Expect(rdb.FlushAll(context.Background()).Err()).To(Succeed()) }),
		Entry("even when Redis is another one", func() { Expect(server.Restart(context.Background())).To(Succeed()) }),
		Entry("even when its connection was cut", func() {
			Expect(rdb.ClientKillByFilter(context.Background(), "TYPE", "normal", "SKIPME", "yes").Err()).To(Succeed())
		}),
	)

	It("takes over what another process has left, and what has changed since (by cursor)", func(ctx SpecContext) {
		const name = "folders/f/documents/d"
		put(ctx, a, store.Create, name, `{"a":1}`)
		settled(ctx, a, "folders/f/documents/other")
		_ = get(ctx, a, name)
		a.stop()
		b := start(GinkgoTB(), dsn, server.URL(), time.Second)
		live(b)
		Expect(reads(b, func() { _ = get(ctx, b, name) })).To(BeZero(), "still there")
		b.stop()
		writer, err := postgres.Open(ctx, postgres.Config{DSN: dsn, Service: "docs.example.com", Region: "eu", Version: "v1"})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(writer.Close)
		r, err := write(ctx, writer, store.Save, name, `{"a":2}`) // nobody follows
		Expect(err).NotTo(HaveOccurred())
		c := start(GinkgoTB(), dsn, server.URL(), time.Second)
		live(c)
		Expect(get(ctx, c, name).Version).To(Equal(r.Version))
	})

	It("starts anew when the feed can no longer say what has changed", func(ctx SpecContext) {
		b := start(GinkgoTB(), dsn, server.URL(), time.Second)
		live(b)
		const name = "folders/f/documents/d"
		put(ctx, a, store.Create, name, `{"a":1}`)
		settled(ctx, a, "folders/f/documents/other")
		_ = get(ctx, a, name)
		_, err := a.core.RaiseEpoch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Eventually(func() int64 { return reads(a, func() { _ = get(ctx, a, name) }) }).WithTimeout(staleness).WithPolling(time.Millisecond).Should(Equal(int64(1)))
		for _, p := range []*process{a, b} {
			Eventually(func() int64 { return reads(p, func() { _ = get(ctx, p, name) }) }).WithTimeout(within).Should(BeZero())
		}
	})

	It("does not believe a server that was restarted with an old snapshot", func(ctx SpecContext) {
		const name = "folders/f/documents/d"
		put(ctx, a, store.Create, name, `{"a":1}`)
		settled(ctx, a, "folders/f/documents/other")
		_ = get(ctx, a, name)
		Expect(rdb.Save(ctx).Err()).To(Succeed())
		want := put(ctx, a, store.Save, name, `{"a":2}`).Version
		Expect(server.Restart(ctx)).To(Succeed())
		Eventually(func() error { return rdb.Ping(ctx).Err() }).WithTimeout(within).Should(Succeed())
		Expect(rdb.DBSize(ctx).Val()).To(BeNumerically(">", 0), "the snapshot was loaded")
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
			Expect(get(ctx, a, name).Version).To(Equal(want))
		}
		live(a)
		Expect(get(ctx, a, name).Version).To(Equal(want))
	})

	Context("with a Redis that is full", func() {
		BeforeEach(func() { settings = map[string]string{"maxmemory": "3mb", "maxmemory-policy": "noeviction"} })
		It("reads and writes go on, and what is cached is still invalidated", func(ctx SpecContext) {
			const name = "folders/f/documents/d"
			put(ctx, a, store.Create, name, `{"a":1}`)
			settled(ctx, a, "folders/f/documents/other")
			_ = get(ctx, a, name)
			Eventually(func() error { return rdb.RPush(ctx, "ballast", make([]byte, 100_000)).Err() }).WithTimeout(within).WithPolling(time.Millisecond).
				Should(MatchError(ContainSubstring("OOM")))
			Expect(reads(a, func() { _ = get(ctx, a, name) })).To(BeZero(), "what is there is of use")
			want := put(ctx, a, store.Save, name, `{"a":2}`).Version
			for range 20 {
				Expect(get(ctx, a, name).Version).To(Equal(want))
			}
			_, err := a.cache.BatchGet(ctx, []string{name, "folders/f/documents/none"})
			Expect(err).NotTo(HaveOccurred())
			Expect(rdb.Del(ctx, "ballast").Err()).To(Succeed())
			Eventually(func() int64 { return reads(a, func() { _ = get(ctx, a, name) }) }).WithTimeout(within).Should(BeZero())
		})
	})

	It("a Redis that hangs costs each reader one timeout at most, then nothing until it answers again", func(ctx SpecContext) {
		const name = "folders/f/documents/d"
		put(ctx, a, store.Create, name, `{"a":1}`)
		settled(ctx, a, "folders/f/documents/other")
		Expect(server.Pause()).To(Succeed())
		want := put(ctx, a, store.Save, name, `{"a":2}`).Version
		Expect(get(ctx, a, name).Version).To(Equal(want))
		Expect(a.cache.Live()).To(BeFalse())
		begin := time.Now()
		for range 20 {
			Expect(get(ctx, a, name).Version).To(Equal(want))
		}
		Expect(time.Since(begin)).To(BeNumerically("<", 900*time.Millisecond), "less than one timeout")
		Expect(server.Resume()).To(Succeed())
		live(a)
		Expect(get(ctx, a, name).Version).To(Equal(want))
	})

	It("works without Redis from the start, and finds it when it comes", func(ctx SpecContext) {
		server.Kill()
		b := start(GinkgoTB(), dsn, server.URL(), time.Second)
		v := put(ctx, b, store.Create, "folders/f/documents/d", `{}`).Version
		Expect(get(ctx, b, "folders/f/documents/d").Version).To(Equal(v))
		Expect(b.cache.Live()).To(BeFalse())
		Expect(server.Restart(ctx)).To(Succeed())
		live(b)
		live(a)
	})

	It("refuses a URL without repeating it", func() {
		_, err := cache.Layer(a.core, cache.Config{URL: "redis://u:secret@host:port/x", Identity: "x"})
		Expect(store.CodeOf(err)).To(Equal(store.InvalidArgument))
		Expect(err.Error()).NotTo(ContainSubstring("secret"))
	})
})
