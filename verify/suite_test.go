package verify_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
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
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/syncing"
	"github.com/dbcontroller/db-controller/verify"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestVerify(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "verify")
}

const (
	service = "library.example.com"
	ring    = 64
)

// world is a number of regions with real databases and API servers.
type world struct {
	reg     *registry.Registry
	regions map[string]*region
}

type region struct {
	world    *world
	name     string
	dsn      string
	store    *postgres.Store
	endpoint string
}

func newWorld(names ...string) *world {
	GinkgoHelper()
	w := &world{reg: registry.New(), regions: map[string]*region{}}
	var s registry.Snapshot
	for _, name := range names {
		r := &region{world: w, name: name, dsn: pgtest.Database(GinkgoTB())}
		var err error
		r.store, err = postgres.Open(context.Background(), postgres.Config{DSN: r.dsn, Service: service, Region: name, Version: "v1", Ring: ring, Logger: quiet()})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(r.store.Close)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		server, err := apiserver.New(apiserver.Config{
			Service: service, Region: name, Version: "v1", Store: r.store, Owners: nobody{}, Changes: r.store.Feed(), Replica: r.store, Topology: w.reg, Logger: quiet(),
		})
		Expect(err).NotTo(HaveOccurred())
		run(func(ctx context.Context) error { return server.Run(ctx, l) })
		r.endpoint = "http://" + l.Addr().String()
		w.regions[name] = r
		s.Deployments = append(s.Deployments, &v1alpha1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
			Spec:       v1alpha1.DeploymentSpec{Service: service, Region: name, Endpoint: r.endpoint, Version: "v1", Shards: ring},
		})
	}
	Expect(w.reg.Apply(s)).To(BeEmpty())
	return w
}

// nobody owns names: these tests write below the API.
type nobody struct{}

func (nobody) Owner(context.Context, descriptor.Name, []store.Write) (string, error) { return "", nil }

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(GinkgoWriter, nil)) }

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

// source asks another region as this one.
func (r *region) source(of string) syncing.ContentSource {
	s := syncing.NewContentSource(syncing.NewTransport(nil, pki.Identity{}, nil), r.world.regions[of].endpoint,
		syncing.Peer{Service: service, ForRegion: r.name, OfRegion: of, Version: "v1", Ring: ring})
	DeferCleanup(s.Close)
	return s
}

// sync copies into the region until the test or the caller ends it.
func (r *region) sync() (stop func()) {
	GinkgoHelper()
	node, err := syncing.NewControllerNode(syncing.Config{
		Service: service, Region: r.name, Version: "v1", Ring: ring, Registry: r.world.reg, Target: r.store, AuditInterval: -1, Logger: quiet(),
		Dial: func(d registry.Deployment) (syncing.Source, error) {
			return syncing.NewSource(syncing.NewTransport(nil, pki.Identity{}, nil), d.Endpoint,
				syncing.Peer{Service: service, ForRegion: r.name, OfRegion: d.Region, Version: "v1", Ring: ring}), nil
		},
	})
	Expect(err).NotTo(HaveOccurred())
	Expect(node.UpdateShardRange(context.Background(), feed.Range{From: 0, To: ring})).To(Succeed())
	return run(node.Run)
}

// copies are those of another region, held here.
func (r *region) copies(of string) *verify.Copies {
	return &verify.Copies{Store: r.store, Service: service, Region: r.name, Peer: of, Ring: ring, Fetch: r.source(of).Fetch,
		Claims: verify.ClaimsOf(func(region string) (syncing.ContentSource, error) {
			if r.world.regions[region] == nil {
				return nil, fmt.Errorf("there is no region %s", region)
			}
			return r.source(region), nil
		})}
}

// pass is a whole pass and everything that it told.
func (r *region) pass(ctx context.Context, of string, opt verify.Options) (verify.State, map[string]verify.Difference) {
	GinkgoHelper()
	found := map[string]verify.Difference{}
	state, err := verify.Run(ctx, r.source(of), r.copies(of), opt, verify.State{}, func(p verify.Progress) error {
		for _, d := range p.Found {
			Expect(found).NotTo(HaveKey(d.Name), "told twice")
			found[d.Name] = d
		}
		return nil
	})
	Expect(err).NotTo(HaveOccurred())
	return state, found
}

func (r *region) save(text string, names ...string) {
	GinkgoHelper()
	for len(names) > 0 {
		n := min(len(names), store.MaxBatch)
		var writes []store.Write
		for _, name := range names[:n] {
			body, err := json.Marshal(map[string]any{"title": text + " " + name, "pages": map[string]any{"count": 7, "index": map[string]any{}}})
			Expect(err).NotTo(HaveOccurred())
			writes = append(writes, store.Write{Op: store.Save, Name: name, Type: "Book", Body: body, OwningRegion: r.name, Regions: []string{store.EveryRegion},
				Meta: store.Meta{Labels: map[string]string{"made": "here"}}})
		}
		_, err := r.store.BatchWrite(context.Background(), writes)
		Expect(err).NotTo(HaveOccurred())
		names = names[n:]
	}
}

func names(prefix string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("shelves/%s/books/%05d", prefix, i)
	}
	return all
}

// sql runs a statement on the region's database, past the product.
func (r *region) sql(statement string, args ...any) {
	GinkgoHelper()
	c, err := pgx.Connect(context.Background(), r.dsn)
	Expect(err).NotTo(HaveOccurred())
	defer c.Close(context.Background())
	tag, err := c.Exec(context.Background(), statement, args...)
	Expect(err).NotTo(HaveOccurred(), statement)
	Expect(tag.RowsAffected()).To(BeNumerically(">", 0), statement)
}

// rows reads a region's database with the test's own query: name -> everything that must be equal.
func (r *region) rows(owner string) map[string]string {
	GinkgoHelper()
	c, err := pgx.Connect(context.Background(), r.dsn)
	Expect(err).NotTo(HaveOccurred())
	defer c.Close(context.Background())
	rows, err := c.Query(context.Background(), `SELECT name, concat_ws('|', type, uuid, epoch, resource_version, generation, shard, owning_region, state, block_deletion, create_time, update_time,
		delete_time, regions, meta, body) FROM v1.resources WHERE state <> 2 AND owning_region = $1`, owner)
	Expect(err).NotTo(HaveOccurred())
	found := map[string]string{}
	var name, content string
	_, err = pgx.ForEachRow(rows, []any{&name, &content}, func() error { found[name] = content; return nil })
	Expect(err).NotTo(HaveOccurred())
	return found
}

func converge(copies, owner *region) {
	GinkgoHelper()
	Eventually(func() map[string]string { return copies.rows(owner.name) }, 60*time.Second, 50*time.Millisecond).Should(Equal(owner.rows(owner.name)))
}
