package deployment_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/gomega"
	dto "github.com/prometheus/client_model/go"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/syncing"
)

// TestReplicas runs a region in three processes' worth of replicas with two nodes of each kind (F57, P12): they divide the shards, each shows the state of all, and one that
// goes leaves its shards to the others. Writes under a claim that somebody else has taken are refused, and the copies are right all the same.
func TestReplicas(t *testing.T) {
	g := NewWithT(t)
	g.SetDefaultEventuallyTimeout(60 * time.Second)
	const service = "notes.example.com"
	l, err := net.Listen("tcp", "127.0.0.1:0")
	g.Expect(err).NotTo(HaveOccurred())
	snapshot := registry.Snapshot{}
	for region, endpoint := range map[string]string{"eu": l.Addr().String(), "us": "127.0.0.1:1"} {
		d := &v1alpha1.Deployment{}
		d.Name = "notes-" + region
		d.Spec = v1alpha1.DeploymentSpec{Service: service, Region: region, Version: "v1", Endpoint: "http://" + endpoint}
		snapshot.Deployments = append(snapshot.Deployments, d)
	}
	s := &v1alpha1.ServiceDescriptor{}
	s.Spec = v1alpha1.ServiceDescriptorSpec{Service: service, MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu", "us"}, DefaultControlRegion: "eu"},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{{Type: "Note", Plural: "notes", Patterns: []string{"notes/{note}"}}}}}}
	snapshot.Services = append(snapshot.Services, s)
	reg := registry.New()
	g.Expect(reg.Apply(snapshot)).To(BeEmpty())

	local, err := nodemanager.NewLocal(nodemanager.Timing{Lease: 6 * time.Second, RenewDeadline: 4 * time.Second, RetryPeriod: 500 * time.Millisecond})
	g.Expect(err).NotTo(HaveOccurred())
	// run opens a process of a Deployment and returns what ends it.
	run := func(region, dsn string, cfg deployment.Config, parts func(*deployment.Deployment) []func(context.Context) error) (*deployment.Deployment, func()) {
		cfg.Key, cfg.Registry, cfg.DSN, cfg.Logger = registry.Key{Service: service, Region: region}, reg, dsn, slog.New(slog.DiscardHandler)
		d, err := deployment.Open(t.Context(), cfg)
		g.Expect(err).NotTo(HaveOccurred())
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- d.Run(ctx, parts(d)...) }()
		end := func() {
			if ctx.Err() != nil {
				return
			}
			cancel()
			g.Expect(<-ended).To(Succeed())
			d.Close()
		}
		t.Cleanup(end)
		return d, end
	}
	eu, _ := run("eu", pgtest.Database(t), deployment.Config{}, func(d *deployment.Deployment) []func(context.Context) error {
		serve, err := d.Server(l)
		g.Expect(err).NotTo(HaveOccurred())
		return []func(context.Context) error{serve}
	})
	written := 0
	write := func(n int) {
		for range n {
			_, err := store.Apply(t.Context(), eu.Store(), store.Write{Op: store.Create, Name: fmt.Sprintf("notes/%d", written), Type: "Note", Body: []byte(`{}`)})
			g.Expect(err).NotTo(HaveOccurred())
			written++
		}
	}
	dsn := pgtest.Database(t)
	replica := func(name string) (*deployment.Deployment, func()) {
		return run("us", dsn, deployment.Config{Nodes: 2, Membership: func(_ registry.Key, kinds []string) (nodemanager.Membership, error) {
			g.Expect(kinds).To(ConsistOf("constraint", "syncing", "policy"))
			return local.Member(name), nil
		}}, func(d *deployment.Deployment) []func(context.Context) error {
			return []func(context.Context) error{d.Manage}
		})
	}
	var conn *pgx.Conn
	copies := func() (n int, err error) {
		err = conn.QueryRow(t.Context(), "SELECT count(*) FROM v1.resources WHERE owning_region = 'eu' AND state <> 2").Scan(&n)
		return n, err
	}
	// holders are the living replicas by how many shards their nodes hold, as d sees it.
	holders := func(d *deployment.Deployment) func() map[string]int {
		return func() map[string]int {
			held := map[string]int{}
			for _, k := range d.Shards() {
				for _, m := range k.Members {
					if k.Kind != "syncing" || !m.Alive {
						continue
					}
					name, _, _ := strings.Cut(m.ID, "_")
					for _, n := range m.Nodes {
						held[name] += int(n.Held.To - n.Held.From)
					}
				}
			}
			return held
		}
	}
	known := func(d *deployment.Deployment) func() bool {
		return func() bool {
			peers := d.Peers()
			return d.OwnedShards() == 4096 && len(peers) == 1 && peers[0].Region == "eu" && peers[0].State == syncing.Live && peers[0].Freshness != nil && *peers[0].Freshness < 5*time.Second
		}
	}

	write(50)
	a, _ := replica("a")
	conn, err = pgx.Connect(t.Context(), dsn)
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { _ = conn.Close(context.Background()) }()
	g.Eventually(copies).Should(Equal(written))
	g.Eventually(known(a)).Should(BeTrue())
	g.Expect(holders(a)()).To(Equal(map[string]int{"a": 4096}))

	b, endB := replica("b")
	c, _ := replica("c")
	for _, d := range []*deployment.Deployment{a, b, c} {
		g.Eventually(holders(d)).Should(And(HaveLen(3), HaveEach(BeNumerically("~", 4096/3, 4096/12))))
		g.Eventually(known(d)).Should(BeTrue())
	}
	write(50)
	g.Eventually(copies).Should(Equal(written))
	g.Expect(a.ShardMoves()).To(BeNumerically(">", 0))
	status, err := json.Marshal(a.Status())
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(status)).To(And(ContainSubstring(`"shards":[{"kind":"constraint"`), ContainSubstring(`"held":{"From":`), Not(ContainSubstring(`"status"`))))
	g.Expect(nodeLabels(g, a)).To(ConsistOf("0", "1"), "the series of two nodes of a kind differ")

	endB()
	for _, d := range []*deployment.Deployment{a, c} {
		g.Eventually(holders(d)).Should(And(HaveLen(2), HaveEach(BeNumerically("~", 4096/2, 4096/8))))
		g.Eventually(known(d)).Should(BeTrue())
	}
	g.Expect(b.Peers()).To(BeEmpty(), "a replica that has ended knows nothing")
	g.Expect(b.Shards()).To(BeEmpty())

	before := a.FencedWrites() + c.FencedWrites()
	_, err = eu.Core().Raise(t.Context(), "syncing", descriptor.ShardRange{From: 0, To: 1}, 1, "nobody")
	g.Expect(err).NotTo(HaveOccurred(), "another database has claims of its own")
	for _, k := range a.Shards() {
		if k.Kind == "syncing" {
			_, err = a.Core().Raise(t.Context(), "syncing", descriptor.ShardRange{From: 0, To: 4096}, k.PlanVersion, "intruder")
			g.Expect(err).NotTo(HaveOccurred())
		}
	}
	write(50)
	g.Eventually(func() int64 { return a.FencedWrites() + c.FencedWrites() }).Should(BeNumerically(">", before))
	g.Eventually(copies).Should(Equal(written))
	g.Eventually(known(a)).Should(BeTrue())
}

// nodeLabels returns the values of the label node_number in the metrics of the nodes that copy.
func nodeLabels(g Gomega, d *deployment.Deployment) (values []string) {
	families, err := d.Metrics().Gather()
	g.Expect(err).NotTo(HaveOccurred())
	for _, f := range families {
		if f.GetName() != "dbcontroller_sync_freshness_seconds" {
			continue
		}
		for _, m := range f.GetMetric() {
			values = append(values, label(m, "node_number"))
		}
	}
	return values
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}
