package deployment_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/syncing"
	"github.com/dbcontroller/db-controller/verify"
)

// TestVerifierCoversTheSearchStore: the search store of a Deployment is one of what it verifies, repairs and reports the residency of (P16, I25, I27).
func TestVerifierCoversTheSearchStore(t *testing.T) {
	g := NewWithT(t)
	g.SetDefaultEventuallyTimeout(60 * time.Second)
	const service = "notes.example.com"
	d := &v1alpha1.Deployment{Spec: v1alpha1.DeploymentSpec{Service: service, Region: "eu", Version: "v1", Endpoint: "http://127.0.0.1:1",
		Search: &v1alpha1.SearchSpec{Type: v1alpha1.SearchPostgres, SecretRef: v1alpha1.SecretKeyRef{Name: "search"}}}}
	d.Name = "notes-eu"
	s := &v1alpha1.ServiceDescriptor{Spec: v1alpha1.ServiceDescriptorSpec{Service: service, MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu", "us"}, DefaultControlRegion: "eu"},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
			{Type: "Note", Plural: "notes", Patterns: []string{"notes/{note}"}, Search: &v1alpha1.ResourceSearch{Fields: []v1alpha1.SearchField{{Path: "text"}}}},
			{Type: "Pin", Plural: "pins", Patterns: []string{"pins/{pin}"}}}}}}}
	reg := registry.New()
	g.Expect(reg.Apply(registry.Snapshot{Services: []*v1alpha1.ServiceDescriptor{s}, Deployments: []*v1alpha1.Deployment{d}})).To(BeEmpty())
	searchDSN := pgtest.Database(t)
	open, err := deployment.Open(t.Context(), deployment.Config{Key: registry.Key{Service: service, Region: "eu"}, Registry: reg, DSN: pgtest.Database(t), SearchURL: searchDSN, Logger: slog.New(slog.DiscardHandler)})
	g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- open.Run(ctx, open.Manage) }()
	t.Cleanup(func() {
		cancel()
		g.Expect(<-ended).To(Succeed())
		open.Close()
	})
	for n := range 30 {
		for _, name := range []string{fmt.Sprintf("notes/%02d", n), fmt.Sprintf("pins/%02d", n)} {
			_, err := store.Apply(ctx, open.Store(), store.Write{Op: store.Create, Name: name, Body: []byte(`{"text":"one two"}`)})
			g.Expect(err).NotTo(HaveOccurred())
		}
	}
	v := open.Verifier()
	g.Expect(v.Peers()).To(Equal([]string{verify.SearchPeer}))
	pass := func(opt verify.Options) verify.State {
		state, err := v.Verify(ctx, verify.SearchPeer, opt, verify.State{}, func(verify.Progress) error { return nil })
		g.Expect(err).NotTo(HaveOccurred())
		return state
	}
	g.Eventually(func() syncing.State {
		if s := open.Search(); s != nil {
			return s.Syncing.State
		}
		return ""
	}).Should(Equal(syncing.Live))
	state := pass(verify.Options{})
	g.Expect(state.Compared).To(BeNumerically("==", 30), "what is not searched is not compared")
	g.Expect(state.VerifiedThrough()).NotTo(BeZero())

	c, err := pgx.Connect(ctx, searchDSN+"&search_path=search_v1")
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { _ = c.Close(context.Background()) }()
	_, err = c.Exec(ctx, "UPDATE documents SET a = 'by hand' WHERE name = 'notes/03'; UPDATE documents SET name = 'notes/ghost' WHERE name = 'notes/07'")
	g.Expect(err).NotTo(HaveOccurred())
	rows, _, err := v.Residency(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	reasons := map[string]int64{}
	for _, r := range rows {
		reasons[r.Owner+": "+r.Reason] += r.Rows
	}
	g.Expect(reasons).To(Equal(map[string]int64{"eu: ": 60, "@search: ": 29, "@search: a document of the search store has no row in the database": 1}))
	found, _ := pass(verify.Options{}).Counts()
	g.Expect(found).To(BeNumerically("==", 3))
	found, repaired := pass(verify.Options{Mode: verify.Repair}).Counts()
	g.Expect([]int64{found, repaired}).To(Equal([]int64{3, 3}))
	verified, err := v.Verified(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(verified).To(HaveLen(1))
	g.Expect([]any{verified[0].Peer, verified[0].Type, verified[0].Differences}).To(Equal([]any{verify.SearchPeer, "Note", int64(0)}))
	g.Expect(verified[0].Through).NotTo(BeZero())
}
