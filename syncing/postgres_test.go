package syncing_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/apiserver"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/netsim"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/syncing"
)

const (
	service = "library.example.com"
	ring    = 64
	domain  = "example.org"
)

func TestAgainstPostgreSQL(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "syncing")
}

// world is a number of regions with real databases and API servers. Each region is reached through a link of its own.
type world struct {
	reg     *registry.Registry
	ca      *pki.CA // nil: plain text
	version string
	regions map[string]*region
}

type region struct {
	world    *world
	name     string
	dsn      string
	store    *postgres.Store
	link     *netsim.Link
	endpoint string
}

func newWorld(names ...string) *world {
	w := &world{reg: registry.New(), version: "v1", regions: map[string]*region{}}
	for _, name := range names {
		w.add(name, name, pgtest.Database(GinkgoTB()))
	}
	return w
}

// in returns the same regions with the same databases in another API version.
func (w *world) in(version string) *world {
	other := &world{reg: registry.New(), version: version, regions: map[string]*region{}}
	for name, r := range w.regions {
		other.add(name, name, r.dsn)
	}
	return other
}

// add starts a region whose certificate, if there is a CA, says that it is called identity.
func (w *world) add(name, identity, dsn string) *region {
	GinkgoHelper()
	r := &region{world: w, name: name, dsn: dsn, store: w.open(name, dsn)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	Expect(err).NotTo(HaveOccurred())
	cfg := apiserver.Config{
		Service: service, Region: name, Version: w.version, Store: r.store, Owners: nobody{}, Changes: r.store.Feed(), Replica: r.store,
		Topology: w.reg, Logger: quiet(),
	}
	scheme := "http://"
	if w.ca != nil {
		cfg.TLS, cfg.TrustDomain = w.certificate(identity), domain
		scheme = "https://"
	}
	server, err := apiserver.New(cfg)
	Expect(err).NotTo(HaveOccurred())
	run(func(ctx context.Context) error { return server.Run(ctx, l) })
	r.link, err = netsim.Listen(context.Background(), "127.0.0.1:0", l.Addr().String())
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(r.link.Close)
	r.endpoint = scheme + r.link.Addr()
	w.regions[name] = r
	return r
}

// nobody owns names: these tests write below the API.
type nobody struct{}

func (nobody) Owner(context.Context, descriptor.Name, []store.Write) (string, error) { return "", nil }

func (w *world) certificate(region string) pki.Source {
	GinkgoHelper()
	pair, err := w.ca.Issue(identity(region), time.Now().Add(time.Hour))
	Expect(err).NotTo(HaveOccurred())
	s, err := pki.Static(pair, w.ca.CertPEM())
	Expect(err).NotTo(HaveOccurred())
	return s
}

func identity(region string) pki.Identity {
	return pki.Identity{TrustDomain: domain, Service: service, Region: region}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(GinkgoWriter, nil)) }

func (w *world) open(name, dsn string) *postgres.Store {
	GinkgoHelper()
	s, err := postgres.Open(context.Background(), postgres.Config{DSN: dsn, Service: service, Region: name, Version: w.version, Ring: ring, FeedLimit: 200, Logger: quiet()})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	return s
}

// run keeps f going until the test or the caller ends it.
func run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		var err error
		Eventually(done, "30s").Should(Receive(&err))
		Expect(err).NotTo(HaveOccurred())
	})
	DeferCleanup(stop)
	return stop
}

// declare makes these regions the Deployments of the service.
func (w *world) declare(names ...string) {
	GinkgoHelper()
	var s registry.Snapshot
	for _, name := range names {
		s.Deployments = append(s.Deployments, &v1alpha1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
			Spec:       v1alpha1.DeploymentSpec{Service: service, Region: name, Endpoint: w.regions[name].endpoint, Version: w.version, Shards: ring},
		})
	}
	Expect(w.reg.Apply(s)).To(BeEmpty())
}

// sync starts a node that copies into the region.
func (r *region) sync(edit func(*syncing.Config)) (node *syncing.ControllerNode, stop func()) {
	GinkgoHelper()
	cfg := syncing.Config{
		Service: service, Region: r.name, Version: r.world.version, Ring: ring, MaxShardsPerNode: 16, Registry: r.world.reg, Target: r.store,
		AuditInterval: -1, Logger: quiet(),
		Dial: func(d registry.Deployment) (syncing.Source, error) {
			var source pki.Source
			if r.world.ca != nil {
				source = r.world.certificate(r.name)
			}
			return syncing.NewSource(syncing.NewTransport(source, identity(d.Region), nil), d.Endpoint, syncing.Peer{Service: service, ForRegion: r.name, OfRegion: d.Region, Version: r.world.version, Ring: ring}), nil
		},
	}
	if edit != nil {
		edit(&cfg)
	}
	node, err := syncing.NewControllerNode(cfg)
	Expect(err).NotTo(HaveOccurred())
	Expect(node.UpdateShardRange(context.Background(), feed.Range{From: 0, To: ring})).To(Succeed())
	return node, run(node.Run)
}

func title(t string) []byte {
	b, err := json.Marshal(map[string]string{"title": t, "text": t + " and what follows"})
	Expect(err).NotTo(HaveOccurred())
	return b
}

// save writes books that are to be copied to the regions.
func (r *region) save(text string, to []string, names ...string) {
	GinkgoHelper()
	for len(names) > 0 {
		n := min(len(names), store.MaxBatch)
		var writes []store.Write
		for _, name := range names[:n] {
			writes = append(writes, store.Write{Op: store.Save, Name: name, Type: "Book", Body: title(text + " " + name), OwningRegion: r.name, Regions: to})
		}
		_, err := r.store.BatchWrite(context.Background(), writes)
		Expect(err).NotTo(HaveOccurred())
		names = names[n:]
	}
}

func (r *region) remove(names ...string) {
	GinkgoHelper()
	for _, name := range names {
		_, err := store.Apply(context.Background(), r.store, store.Write{Op: store.Delete, Name: name, Type: "Book", AllowMissing: true})
		Expect(err).NotTo(HaveOccurred())
	}
}

func names(prefix string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("shelves/%s/books/%05d", prefix, i)
	}
	return all
}

var everywhere = []string{store.EveryRegion}

// sql runs statements on the region's database, past the product.
func (r *region) sql(statements ...string) {
	GinkgoHelper()
	c, err := pgx.Connect(context.Background(), r.dsn)
	Expect(err).NotTo(HaveOccurred())
	defer c.Close(context.Background())
	for _, s := range statements {
		_, err := c.Exec(context.Background(), s)
		Expect(err).NotTo(HaveOccurred(), s)
	}
}

// rows reads a region's database with the test's own query: name -> everything that must be equal.
func (r *region) rows(where string, args ...any) (map[string]string, error) {
	c, err := pgx.Connect(context.Background(), r.dsn)
	if err != nil {
		return nil, err
	}
	defer c.Close(context.Background())
	rows, err := c.Query(context.Background(), `SELECT name, concat_ws('|', type, uuid, epoch, resource_version, generation, owning_region, state, create_time, update_time, regions, meta, body)
		FROM `+r.world.version+`.resources WHERE state <> 2 AND `+where, args...)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	var name, content string
	_, err = pgx.ForEachRow(rows, []any{&name, &content}, func() error { found[name] = content; return nil })
	return found, err
}

func (r *region) count(where string) int {
	GinkgoHelper()
	rows, err := r.rows(where)
	Expect(err).NotTo(HaveOccurred())
	return len(rows)
}

// difference says how the copies of owner differ from its rows.
func difference(copies, owner *region) func() (string, error) {
	return func() (string, error) {
		want, err := owner.rows("owning_region = $1 AND regions && ARRAY[$2, '*']", owner.name, copies.name)
		if err != nil {
			return "", err
		}
		got, err := copies.rows("owning_region = $1", owner.name)
		if err != nil {
			return "", err
		}
		missing, different := 0, 0
		for name, content := range want {
			switch have, ok := got[name]; {
			case !ok:
				missing++
			case have != content:
				different++
			}
			delete(got, name)
		}
		if extra := len(got); missing+different+extra > 0 {
			return fmt.Sprintf("%d of %d missing, %d different, %d extra", missing, len(want), different, extra), nil
		}
		return "", nil
	}
}

func converge(copies, owner *region) {
	GinkgoHelper()
	Eventually(difference(copies, owner), "60s", "50ms").Should(BeEmpty())
}

func status(node *syncing.ControllerNode, region string) syncing.PeerStatus {
	for _, s := range node.Status() {
		if s.Region == region {
			return s
		}
	}
	return syncing.PeerStatus{}
}

// freshness is endless while it is not known.
func freshness(node *syncing.ControllerNode, region string) time.Duration {
	if f := status(node, region).Freshness; f != nil {
		return *f
	}
	return math.MaxInt64
}

func live(node *syncing.ControllerNode, region string) {
	GinkgoHelper()
	Eventually(func() syncing.State { return status(node, region).State }, "30s", "20ms").Should(Equal(syncing.Live), func() string { return status(node, region).LastError })
}

var _ = Describe("read copies", func() {
	var (
		w      *world
		eu, us *region
	)
	BeforeEach(func() {
		w = newWorld("eu", "us")
		eu, us = w.regions["eu"], w.regions["us"]
		w.declare("eu", "us")
	})

	It("are made in bulk, follow live, and leave with the policy (F91, F93, F94, F100, I22, I25)", func() {
		all := names("a", 3000)
		eu.save("first", everywhere, all...)
		eu.save("hidden", []string{"eu"}, names("hidden", 50)...)
		node, _ := us.sync(nil)
		converge(us, eu)
		live(node, "eu")
		Expect(status(node, "eu").RowsApplied).To(BeNumerically("==", 3000))

		eu.save("second", everywhere, all[:700]...)
		eu.save("gone elsewhere", []string{"eu", "ap"}, all[700:900]...)
		eu.remove(all[900:1000]...)
		eu.save("back", []string{"eu", "us"}, names("hidden", 10)...)
		converge(us, eu)
		Expect(us.count("name LIKE 'shelves/hidden/%'")).To(Equal(10))
		eu.save("reborn", everywhere, all[900:950]...)
		converge(us, eu)
		s := status(node, "eu")
		Expect(freshness(node, "eu")).To(BeNumerically("<", 5*time.Second))
		Expect(s.Quarantined).To(BeZero())
	})

	It("go on after a cut in mid-stream, and meanwhile say how old they are (I28)", func() {
		ap := w.add("ap", "ap", pgtest.Database(GinkgoTB()))
		w.declare("eu", "us", "ap")
		eu.save("first", everywhere, names("a", 500)...)
		node, _ := us.sync(nil)
		converge(us, eu)
		live(node, "eu")
		writing := run(func(ctx context.Context) error {
			for i := 0; ctx.Err() == nil; i++ {
				eu.save(fmt.Sprint(i), everywhere, names("a", 500)[rand.N(400):][:20]...)
			}
			return nil
		})
		for range 3 {
			eu.link.Cut()
			cut := time.Now()
			ap.save(fmt.Sprint(cut), everywhere, names("b", 100)...)
			Eventually(difference(us, ap), "5s", "20ms").Should(BeEmpty()) // eu delays nobody
			Eventually(func() time.Duration { return freshness(node, "eu") }, "10s", "20ms").Should(BeNumerically(">", 1500*time.Millisecond))
			Expect(freshness(node, "eu")).To(BeNumerically(">=", time.Since(cut)-50*time.Millisecond))
			eu.link.Heal()
			eu.link.Reset()
			Eventually(func() time.Duration { return freshness(node, "eu") }, "20s", "20ms").Should(BeNumerically("<", time.Second))
		}
		writing()
		converge(us, eu)
	})

	It("survive restarts in the middle of comparing, and deletions meanwhile (X20, X21, I29)", func() {
		all := names("a", 6000)
		eu.save("first", everywhere, all...)
		eu.link.SetBandwidth(2 << 20)
		for i := range 5 {
			_, stop := us.sync(nil)
			before := us.count("true")
			Eventually(func() int { return us.count("true") }, "20s", "5ms").Should(Or(BeNumerically(">", before), Equal(len(all)-100*i)))
			stop()
			eu.remove(all[100*i : 100*i+100]...)
			eu.save(fmt.Sprint(i), everywhere, all[3000+100*i:3100+100*i]...)
		}
		eu.link.SetBandwidth(0)
		node, _ := us.sync(nil)
		converge(us, eu)
		live(node, "eu")
	})

	It("are compared when the cursor is too old (X22, F92, F93)", func() {
		all := names("a", 1000)
		eu.save("first", everywhere, all...)
		node, stop := us.sync(nil)
		live(node, "eu")
		converge(us, eu)
		stop()
		eu.remove(all[:200]...)
		eu.save("second", everywhere, all[500:600]...)
		Eventually(func() (int, error) { return eu.store.Purge(context.Background(), 0, 1000) }).Should(BeNumerically(">=", 200))
		node, _ = us.sync(nil)
		converge(us, eu)
		live(node, "eu")
		Expect(status(node, "eu").RowsApplied).To(BeNumerically("==", 300), "only what differs is written")
	})

	It("follow an owner that has lost commits", func() {
		all := names("a", 600)
		eu.save("kept", everywhere, all[:400]...)
		node, _ := us.sync(nil)
		converge(us, eu)
		eu.sql("CREATE TABLE backup AS SELECT * FROM v1.resources")
		eu.save("lost", everywhere, all[100:200]...)
		eu.save("lost too", everywhere, all[400:]...)
		eu.remove(all[:100]...)
		converge(us, eu)
		live(node, "eu")

		// What a failover to a standby that was behind leaves, as far as rows go.
		eu.sql("BEGIN; TRUNCATE v1.resources; INSERT INTO v1.resources SELECT * FROM backup; SELECT ctl.raise_epoch(); COMMIT")
		eu.save("after", everywhere, all[150:250]...)
		converge(us, eu)
		live(node, "eu")
		Expect(us.count("true")).To(Equal(400))
	})

	It("follow an owner that has commits again which it had lost", func() {
		all := names("a", 200)
		eu.save("kept", everywhere, all[:100]...)
		eu.sql("CREATE TABLE before AS SELECT * FROM v1.resources")
		eu.save("lost", everywhere, all[50:]...)
		eu.remove(all[:50]...)
		eu.sql("CREATE TABLE after AS SELECT * FROM v1.resources")
		node, _ := us.sync(nil)
		converge(us, eu)
		for _, state := range []string{"before", "after", "before"} {
			eu.sql("BEGIN; TRUNCATE v1.resources; INSERT INTO v1.resources SELECT * FROM " + state + "; SELECT ctl.raise_epoch(); COMMIT")
			converge(us, eu)
			live(node, "eu")
		}
	})

	It("go on around a row that cannot be written (X26)", func() {
		us.sql("ALTER TABLE v1.resources ADD CONSTRAINT poison CHECK (body->>'title' NOT LIKE 'bad%')")
		all := names("a", 800)
		eu.save("good", everywhere, all...)
		eu.save("bad", everywhere, all[5], all[50], all[500])
		node, _ := us.sync(nil)
		Eventually(func() int { return us.count("true") }, "20s").Should(Equal(797))
		live(node, "eu")
		Eventually(func() int64 { return status(node, "eu").Quarantined }, "20s").Should(BeNumerically("==", 3))
		eu.save("bad", everywhere, all[6]) // live; the older copy stays
		eu.save("good again", everywhere, all[5], all[7])
		Eventually(difference(us, eu), "20s").Should(Equal("2 of 800 missing, 1 different, 0 extra"))
		us.sql("ALTER TABLE v1.resources DROP CONSTRAINT poison")
		eu.save("cured", everywhere, all[6], all[50], all[500])
		converge(us, eu)
		Eventually(func() int64 { return status(node, "eu").Quarantined }, "20s").Should(BeZero())
	})

	It("never overwrite what another region owns (F101, I24)", func() {
		all := names("a", 20)
		us.save("ours", everywhere, all[3])
		ours, err := us.rows("owning_region = 'us'")
		Expect(err).NotTo(HaveOccurred())
		eu.save("theirs", everywhere, all...)
		node, _ := us.sync(nil)
		Eventually(func() int { return us.count("owning_region = 'eu'") }, "20s").Should(Equal(19))
		eu.save("theirs, newer", everywhere, all...)
		eu.remove(all[3])
		Eventually(difference(us, eu), "20s").Should(BeEmpty())
		Expect(us.rows("owning_region = 'us'")).To(Equal(ours))
		live(node, "eu")
	})

	It("come out the same from two nodes on the same shards (X23, I31)", func() {
		all := names("a", 2000)
		eu.save("first", everywhere, all...)
		one, _ := us.sync(nil)
		two, _ := us.sync(func(c *syncing.Config) { c.MaxShardsPerNode = -1 })
		for i := range 10 {
			eu.save(fmt.Sprint(i), everywhere, all[rand.N(1500):][:200]...)
			eu.remove(all[rand.N(1900):][:20]...)
		}
		converge(us, eu)
		live(one, "eu")
		live(two, "eu")
	})

	It("begin and end with the Deployment, without a restart (F102, X34, X35)", func() {
		eu.save("first", everywhere, names("a", 100)...)
		node, _ := us.sync(func(c *syncing.Config) { c.PurgeAfter = time.Second })
		converge(us, eu)
		ap := w.add("ap", "ap", pgtest.Database(GinkgoTB()))
		ap.save("new", everywhere, names("b", 2500)...)
		w.declare("eu", "us", "ap")
		converge(us, ap)
		w.declare("eu", "us")
		Eventually(func() int { return us.count("owning_region = 'ap'") }, "20s").Should(BeZero())
		Expect(node.Status()).To(HaveLen(1))
		converge(us, eu)
	})

	It("are repaired by the audit when somebody edits them (F87, X25, I22)", func() {
		all := names("a", 300)
		eu.save("first", everywhere, all...)
		node, _ := us.sync(func(c *syncing.Config) { c.AuditInterval = time.Second })
		live(node, "eu")
		converge(us, eu)
		us.sql("DELETE FROM v1.resources WHERE name < 'shelves/a/books/00010'",
			"UPDATE v1.resources SET resource_version = 0, body = '{}' WHERE name >= 'shelves/a/books/00290'",
			"INSERT INTO v1.resources SELECT 'shelves/a/books/ghost', type, gen_random_uuid(), epoch, 7, 1, shard, change, owning_region, regions, '{}', 0, false, now(), now(), NULL, '{}', '{}' FROM v1.resources WHERE name = 'shelves/a/books/00020'")
		Expect(difference(us, eu)()).NotTo(BeEmpty())
		converge(us, eu)
	})

	It("survive the death of their database", func() {
		server := pgtest.Server(GinkgoTB(), pgserver.Config{})
		Expect(server.CreateDatabase(context.Background(), "ap")).To(Succeed())
		ap := w.add("ap", "ap", server.DSN("ap"))
		w.declare("eu", "us", "ap")
		all := names("a", 4000)
		eu.save("first", everywhere, all...)
		node, _ := ap.sync(nil)
		for i := range 3 {
			Eventually(func() int64 { return status(node, "eu").RowsApplied }, "30s", "5ms").Should(BeNumerically(">", i*200))
			Expect(server.Kill()).To(Succeed())
			eu.save(fmt.Sprint(i), everywhere, all[rand.N(3000):][:500]...)
			Expect(server.Restart(context.Background())).To(Succeed())
		}
		converge(ap, eu)
		live(node, "eu")
	})
})

var _ = Describe("a peer that is not who it should be", func() {
	It("is refused by its certificate, and named so", func() {
		ca, err := pki.NewCA("test")
		Expect(err).NotTo(HaveOccurred())
		w := &world{reg: registry.New(), ca: ca, version: "v1", regions: map[string]*region{}}
		w.add("us", "us", pgtest.Database(GinkgoTB()))
		w.add("ap", "ap", pgtest.Database(GinkgoTB()))
		w.add("eu", "ap", pgtest.Database(GinkgoTB())) // shows another's certificate
		w.regions["ap"].save("real", everywhere, names("b", 10)...)
		w.regions["eu"].save("forged", everywhere, names("a", 10)...)
		w.declare("us", "eu", "ap")
		us := w.regions["us"]
		node, _ := us.sync(nil)
		converge(us, w.regions["ap"])
		Eventually(func() string { return status(node, "eu").LastError }, "10s").Should(ContainSubstring("wrong_identity"))
		Expect(us.count("owning_region = 'eu'")).To(BeZero())
	})

	It("is refused when it answers for another region", func() {
		w := newWorld("eu", "us", "ap")
		w.regions["eu"].endpoint = w.regions["ap"].endpoint
		w.declare("us", "eu", "ap")
		node, _ := w.regions["us"].sync(nil)
		Eventually(func() string { return status(node, "eu").LastError }, "10s").Should(And(ContainSubstring("wrong_peer"), ContainSubstring("the region is ap")))
	})
})
