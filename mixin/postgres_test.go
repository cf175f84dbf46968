package mixin_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"google.golang.org/protobuf/proto"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/region"
)

// deployed is a Deployment with a database of its own and the whole stack on it. Deployments reach each other without a network.
type deployed struct {
	at     store.Location
	core   *postgres.Store
	stack  *region.Store
	server *mixin.Server
	peers  *mixin.Peers
	// overtake, unless nil, runs once before the server's next write: somebody else is faster.
	overtake func()
}

type cluster struct {
	registry *registry.Registry
	at       map[store.Location]*deployed
}

// wired is Peers, but what is in the cluster answers without a network.
type wired struct {
	*mixin.Peers
	c *cluster
}

func (w wired) Peer(at store.Location) (mixin.Peer, error) {
	if d := w.c.at[at]; d != nil {
		return d.server, nil
	}
	return w.Peers.Peer(at)
}

// overtaken is a stack whose writes somebody else may overtake.
type overtaken struct {
	*region.Store
	d *deployed
}

func (o overtaken) BatchWrite(ctx context.Context, writes []store.Write) ([]store.Result, error) {
	if f := o.d.overtake; f != nil {
		o.d.overtake = nil
		f()
	}
	return o.Store.BatchWrite(ctx, writes)
}

func (c *cluster) start(at store.Location, version string) *deployed {
	GinkgoHelper()
	log := slog.New(slog.NewTextHandler(GinkgoWriter, nil))
	core, err := postgres.Open(GinkgoT().Context(), postgres.Config{DSN: pgtest.Database(GinkgoTB()), Service: at.Service, Region: at.Region, Version: version, Ring: ring, Logger: log})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(core.Close)
	d := &deployed{at: at, core: core, peers: newPeers(c.registry, at, version)}
	schema := func() *descriptor.Version {
		s, _ := c.registry.View().Service(at.Service)
		return s.Version(version)
	}
	policies := policy.New(schema, core, log)
	layer := constraint.Layer(core, constraint.LayerConfig{
		Self: at, Version: schema, View: c.registry.View, Core: core, Peers: wired{d.peers, c}, Logger: log,
		Owner: func(ctx context.Context, n descriptor.Name, batch []store.Write) (string, error) {
			return d.stack.Owner(ctx, n, batch)
		},
	})
	d.stack = region.Layer(layer, at.Region, schema, policies)
	d.server, err = mixin.NewServer(mixin.Config{
		Service: at.Service, Region: at.Region, Version: version, Topology: c.registry, Core: core, Store: overtaken{d.stack, d},
		Owners: d.stack, Policies: policies, Changes: core.Feed(), Logger: log,
	})
	Expect(err).NotTo(HaveOccurred())
	d.peers.SetLocal(d.server)
	c.at[at] = d
	return d
}

func (d *deployed) save(name, body string, owners ...store.OwnerReference) error {
	_, err := store.Apply(GinkgoT().Context(), d.stack, store.Write{Op: store.Save, Name: name, Body: []byte(body), Meta: store.Meta{OwnerReferences: owners}})
	return err
}

func (d *deployed) delete(name string) error {
	_, err := store.Apply(GinkgoT().Context(), d.stack, store.Write{Op: store.Delete, Name: name})
	return err
}

func (d *deployed) shadow(name string) *store.Shadow {
	GinkgoHelper()
	h, err := d.core.Shadow(GinkgoT().Context(), name)
	Expect(err).NotTo(HaveOccurred())
	return h
}

func (d *deployed) owners(name string) []string {
	GinkgoHelper()
	r, err := d.core.Get(GinkgoT().Context(), name)
	Expect(err).NotTo(HaveOccurred())
	var all []string
	for _, o := range r.Meta.OwnerReferences {
		all = append(all, o.Version+" "+o.Name)
	}
	return all
}

var _ = Describe("Two services on PostgreSQL", func() {
	var c *cluster
	var secrets, apps *deployed
	BeforeEach(func() {
		c = &cluster{registry: topology(nil), at: map[store.Location]*deployed{}}
		secrets, apps = c.start(secretsEU, "v2"), c.start(appsEU, "v1")
		Expect(secrets.save("machines/d", `{}`)).To(Succeed())
		Expect(secrets.save("machines/e", `{}`)).To(Succeed())
	})
	fromApps := func() *v1.Call { return call(appsEU, secretsEU, "v1") }
	toApps := func() *v1.Call { return call(secretsEU, appsEU, "v1") }
	ask := func(tx string, attempt int32, names ...string) error {
		req := &v1.EstablishReferencesRequest{Call: fromApps(), Referrer: "apps/open", TxId: tx, TxAttempt: attempt}
		for _, n := range names {
			req.Targets = append(req.Targets, &v1.NewReference{Name: n, Blocking: true})
		}
		_, err := secrets.server.EstablishReferences(GinkgoT().Context(), req)
		return err
	}
	confirm := func(tx string, names ...string) []string {
		GinkgoHelper()
		req := &v1.ConfirmBlockadesRequest{Call: fromApps()}
		for _, n := range names {
			req.References = append(req.References, &v1.ConfirmedReference{Referrer: "apps/open", Name: n, Blocking: true, TxId: tx})
		}
		res, err := secrets.server.ConfirmBlockades(GinkgoT().Context(), req)
		Expect(err).NotTo(HaveOccurred())
		return res.GetMissing()
	}
	blockades := func(name string) (all []string) {
		GinkgoHelper()
		for _, b := range secrets.shadow(name).Blockades {
			Expect(b.Location).To(Equal(appsEU))
			Expect(b.Referrer).To(Equal("apps/open"))
			all = append(all, fmt.Sprint(b.TxID, "#", b.Attempt))
		}
		return all
	}
	fromAppsOnly := []store.Source{{Location: appsEU, Blocking: true}}

	Describe("a new reference", func() {
		It("has a tentative blockade while its transaction is open, which blocks the deletion, until it is confirmed (F9, F12, F14, I3, I4)", func() {
			tx := uuid.NewString()
			Expect(ask(tx, 1, "devices/d", "devices/e")).To(Succeed())
			Expect(blockades("machines/d")).To(ConsistOf(tx + "#1"))
			Expect(secrets.shadow("machines/d").Sources).To(Equal(fromAppsOnly))
			Expect(secrets.delete("machines/d")).To(haveCode(store.FailedPrecondition, ""))
			Expect(confirm(tx, "devices/d")).To(BeEmpty())
			Expect(blockades("machines/d")).To(BeEmpty())
			Expect(blockades("machines/e")).To(ConsistOf(tx+"#1"), "another target's stays")
			Expect(secrets.shadow("machines/d").Sources).To(Equal(fromAppsOnly), "where references are stays known")
			Expect(confirm(tx, "devices/d")).To(BeEmpty(), "again")
			Expect(secrets.delete("machines/d")).To(Succeed(), "apps has been asked, and refers to it no more")
		})

		It("to what does not exist fails the user's request, and nothing is written (F10, I2)", func(ctx SpecContext) {
			err := apps.save("apps/a", `{"device":"devices/none"}`)
			Expect(err).To(haveCode(store.FailedPrecondition, ""))
			Expect(err).To(MatchError(ContainSubstring("devices/none")))
			_, err = apps.core.Get(ctx, "apps/a")
			Expect(err).To(haveCode(store.NotFound, ""))

			Expect(ask(uuid.NewString(), 1, "devices/none", "devices/d")).To(And(haveCode(store.NotFound, ""), MatchError(ContainSubstring("devices/none"))))
			Expect(blockades("machines/d")).To(BeEmpty(), "all or nothing")
		})

		It("replaces the blockade of an attempt before, and a late attempt is ignored (F11, X5)", func() {
			tx := uuid.NewString()
			Expect(ask(tx, 1, "devices/d")).To(Succeed())
			Expect(ask(tx, 2, "devices/d")).To(Succeed())
			Expect(blockades("machines/d")).To(ConsistOf(tx + "#2"))
			Expect(ask(tx, 1, "devices/d")).To(Succeed(), "stale, and no error")
			Expect(blockades("machines/d")).To(ConsistOf(tx + "#2"))
			confirm(tx, "devices/d")
			Expect(ask(tx, 1, "devices/d")).To(Succeed())
			Expect(secrets.shadow("machines/d").Blockades[0].ExpireTime).To(BeTemporally("<", time.Now().Add(mixin.MaxTTL)), "after the commit it is harmless: it expires")
		})

		It("keeps its blockade when an older transaction is confirmed late (X41)", func() {
			old, open := uuid.NewString(), uuid.NewString()
			Expect(ask(old, 1, "devices/d")).To(Succeed())
			Expect(ask(open, 1, "devices/d")).To(Succeed())
			confirm(old, "devices/d")
			Expect(blockades("machines/d")).To(ConsistOf(open + "#1"))
			Expect(secrets.delete("machines/d")).To(haveCode(store.FailedPrecondition, ""))
		})

		It("ends the same however its messages are repeated and reordered (I12)", func() {
			for _, order := range [][]string{{"ask", "confirm"}, {"ask", "ask", "confirm", "confirm"}, {"confirm", "ask", "confirm"}, {"ask", "confirm", "ask", "confirm"}} {
				tx := uuid.NewString()
				for _, step := range order {
					if step == "ask" {
						Expect(ask(tx, 1, "devices/d")).To(Succeed())
					} else {
						Expect(confirm(tx, "devices/d", "devices/gone")).To(Equal([]string{"devices/gone"}))
					}
				}
				Expect(blockades("machines/d")).To(BeEmpty(), "%v", order)
				Expect(secrets.shadow("machines/d").Sources).To(Equal(fromAppsOnly), "%v", order)
			}
		})

		It("to what is being deleted is refused", func() {
			Expect(apps.save("notes/n", `{"device":"devices/d"}`)).To(Succeed())
			settle(secrets, "machines/d")
			Expect(secrets.delete("machines/d")).To(Succeed())
			Expect(secrets.shadow("machines/d").State).To(Equal(store.ShadowDeleting))
			err := ask(uuid.NewString(), 1, "devices/d")
			Expect(err).To(haveCode(store.FailedPrecondition, ""))
			Expect(err).To(MatchError(ContainSubstring("devices/d: is being deleted")))
		})
	})

	Describe("the owner's questions", func() {
		question := func(name string) *v1.Question {
			GinkgoHelper()
			q, err := secrets.core.BeginAttempt(GinkgoT().Context(), []string{name})
			Expect(err).NotTo(HaveOccurred())
			version, spelled, ok := secrets.peers.SpellFor(appsEU, name)
			Expect(ok).To(BeTrue())
			Expect(version).To(Equal("v1"))
			return &v1.Question{Name: spelled, Uuid: q[name].UUID, Epoch: q[name].Epoch, RowVersion: q[name].RowVersion}
		}
		blocked := func(excluding ...string) []*v1.BlockedAnswer {
			GinkgoHelper()
			res, err := apps.server.CheckIfResourceIsBlocked(GinkgoT().Context(), &v1.CheckIfResourceIsBlockedRequest{
				Call: toApps(), Targets: []*v1.Question{question("machines/d"), question("machines/e")}, Excluding: excluding,
			})
			Expect(err).NotTo(HaveOccurred())
			return res.GetAnswers()
		}

		It("are answered from what is committed: does anything block, are there subscribers (F13, F16, F47)", func(ctx SpecContext) {
			Expect(apps.save("apps/a", `{"device":"devices/d"}`)).To(Succeed())
			Expect(apps.save("notes/n", `{"device":"devices/e"}`)).To(Succeed())
			answers := blocked()
			Expect(answers[0]).To(And(HaveField("Blocked", true), HaveField("HasAnyReference", true), HaveField("Sample", []string{"apps/a"})))
			Expect(answers[1]).To(And(HaveField("Blocked", false), HaveField("HasAnyReference", true)))
			Expect(blocked("apps/a")[0].GetBlocked()).To(BeFalse(), "what goes in the same transaction does not count")
			subscribers := func(name string) int32 {
				GinkgoHelper()
				res, err := apps.server.CheckIfResourceHasDeletionSubscriber(ctx, &v1.CheckIfResourceHasDeletionSubscriberRequest{Call: toApps(), Target: question(name)})
				Expect(err).NotTo(HaveOccurred())
				Expect(res.GetHasSubscriber()).To(Equal(res.GetCount() > 0))
				return res.GetCount()
			}
			Expect(subscribers("machines/e")).To(Equal(int32(1)))
			Expect(subscribers("machines/d")).To(BeZero())

			settle(secrets, "machines/d")
			Expect(secrets.delete("machines/d")).To(haveCode(store.FailedPrecondition, ""), "a foreign referrer blocks (F13)")
			Expect(apps.delete("apps/a")).To(Succeed())
			Expect(apps.delete("notes/n")).To(Succeed())
			Expect(blocked()[0].GetHasAnyReference()).To(BeFalse())
			Expect(subscribers("machines/e")).To(BeZero())
			Expect(secrets.delete("machines/d")).To(Succeed())
		})

		It("make a plan of what would follow, and write nothing", func(ctx SpecContext) {
			Expect(apps.save("apps/a", `{"device":"devices/d"}`)).To(Succeed())
			Expect(apps.save("notes/n", `{"device":"devices/d"}`)).To(Succeed())
			Expect(apps.save("pages/p", `{"note":"notes/n"}`)).To(Succeed())
			Expect(apps.save("pages/q", `{"holds":"notes/n"}`)).To(Succeed())
			res, err := apps.server.PlanDeletion(ctx, &v1.PlanDeletionRequest{Call: toApps(), Targets: []string{"devices/d", "devices/e"}})
			Expect(err).NotTo(HaveOccurred())
			Expect(proto.Equal(res, &v1.PlanDeletionResponse{
				Deletes: []*v1.Planned{
					{Name: "notes/n", Type: "Note", Field: "device", Target: "devices/d", Asynchronous: true},
					{Name: "pages/p", Type: "Page", Field: "note", Target: "notes/n", Asynchronous: true},
				},
				Blockers: []*v1.DeletionBlocker{
					{Location: mixin.WireLocation(appsEU), Referrer: "apps/a", Field: "device", Target: "devices/d"},
					{Location: mixin.WireLocation(appsEU), Referrer: "pages/q", Field: "holds", Target: "notes/n"},
				},
			})).To(BeTrue(), "%v", res)
			fence, err := func() (int64, error) {
				_, mark, err := apps.core.Outgoing(ctx, nil)
				return mark.Fence, err
			}()
			Expect(err).NotTo(HaveOccurred())
			Expect(fence).To(BeZero())
		})
	})

	Describe("the stream of deletions", func() {
		type stream struct {
			mu   sync.Mutex
			got  []string
			last *v1.WatchImportedServiceDeletionsResponse
			stop func()
			done chan error // one error, when it has ended
		}
		names := func(s *stream) func() []string {
			return func() []string {
				s.mu.Lock()
				defer s.mu.Unlock()
				return append([]string(nil), s.got...)
			}
		}
		follow := func(from store.Location, version, token string) *stream {
			s := &stream{done: make(chan error, 1)}
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				s.done <- secrets.server.WatchImportedServiceDeletions(ctx, &v1.WatchImportedServiceDeletionsRequest{Call: call(from, secretsEU, version), ShardsTo: ring, ResumeToken: token},
					func(res *v1.WatchImportedServiceDeletionsResponse) error {
						s.mu.Lock()
						defer s.mu.Unlock()
						if res.GetReset_() {
							s.got = append(s.got, "reset")
						}
						for _, d := range res.GetDeleting() {
							s.got = append(s.got, d.GetName())
						}
						if res.GetResumeToken() != "" {
							s.last = proto.CloneOf(res)
						}
						return nil
					})
			}()
			s.stop = func() {
				cancel()
				<-ended
			}
			DeferCleanup(s.stop)
			return s
		}
		token := func(s *stream) string {
			GinkgoHelper()
			Eventually(func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.last != nil }, "10s").Should(BeTrue())
			s.stop()
			Expect(s.done).To(Receive(MatchError(context.Canceled)))
			return s.last.GetResumeToken()
		}

		It("tells each subscriber in its own version what is being deleted, made while it was away or now (F21, F22, I35, X10)", func() {
			tools := c.start(toolsEU, "v1")
			for _, name := range []string{"d", "e"} {
				Expect(apps.save("notes/"+name, fmt.Sprintf(`{"device":"devices/%s"}`, name))).To(Succeed())
				Expect(tools.save("tools/"+name, fmt.Sprintf(`{"device":"machines/%s"}`, name))).To(Succeed())
				settle(secrets, "machines/"+name)
			}
			Expect(secrets.delete("machines/d")).To(Succeed())
			asApps, asTools, other := follow(appsEU, "v1", ""), follow(toolsEU, "v2", ""), follow(appsUS, "v1", "")
			Eventually(names(asApps), "10s").Should(Equal([]string{"devices/d"}))
			Eventually(names(asTools), "10s").Should(Equal([]string{"machines/d"}))

			Expect(secrets.delete("machines/e")).To(Succeed())
			Eventually(names(asApps), "10s").Should(Equal([]string{"devices/d", "devices/e"}))
			Eventually(names(asTools), "10s").Should(Equal([]string{"machines/d", "machines/e"}))

			resume := token(asApps)
			Expect(names(other)()).To(BeEmpty(), "it refers to nothing")
			Expect(secrets.save("machines/f", `{}`)).To(Succeed())
			Expect(apps.save("notes/f", `{"device":"devices/f"}`)).To(Succeed())
			settle(secrets, "machines/f")
			Expect(secrets.delete("machines/f")).To(Succeed())
			Eventually(names(follow(appsEU, "v1", resume)), "10s").Should(Equal([]string{"devices/f"}), "the rest has been told")
			Eventually(names(follow(toolsEU, "v2", resume)), "10s").Should(HaveExactElements("reset", "machines/d", "machines/e"), "the token is another stream's")
		})

		It("begins again after the owner's failover, and tells everybody who has not confirmed since", func(ctx SpecContext) {
			Expect(apps.save("notes/d", `{"device":"devices/d"}`)).To(Succeed())
			settle(secrets, "machines/d")
			Expect(secrets.delete("machines/d")).To(Succeed())
			asApps, asUS := follow(appsEU, "v1", ""), follow(appsUS, "v1", "")
			Eventually(names(asApps), "10s").Should(Equal([]string{"devices/d"}))
			before := token(asUS)
			epoch, err := secrets.core.RaiseEpoch(ctx)
			Expect(err).NotTo(HaveOccurred())
			Eventually(names(asApps), "10s").Should(Equal([]string{"devices/d", "reset", "devices/d"}))
			Eventually(func() int64 { asApps.mu.Lock(); defer asApps.mu.Unlock(); return asApps.last.GetEpoch() }, "10s").Should(Equal(epoch))
			Eventually(names(follow(appsUS, "v1", before)), "10s").Should(Equal([]string{"reset", "devices/d"}), "its references may be lost")

			_, err = secrets.server.ConfirmBlockades(ctx, &v1.ConfirmBlockadesRequest{Call: call(appsUS, secretsEU, "v1"), CompleteEpoch: epoch})
			Expect(err).NotTo(HaveOccurred())
			after := follow(appsUS, "v1", "")
			token(after)
			Expect(names(after)()).To(BeEmpty())
		})

		It("ends when the topology does not allow it any more, and refuses tokens that are none", func(ctx SpecContext) {
			s := follow(appsEU, "v1", "")
			Eventually(func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.last != nil }, "10s").Should(BeTrue())
			declare(c.registry, func(d *v1alpha1.Deployment) { d.Spec.Disabled = d.Spec.Service == appsService })
			Eventually(s.done, "10s").Should(Receive(haveCode(store.FailedPrecondition, mixin.ReasonUnknownPeer)))
			err := secrets.server.WatchImportedServiceDeletions(ctx, &v1.WatchImportedServiceDeletionsRequest{Call: call(toolsEU, secretsEU, "v2"), ResumeToken: "x"}, nil)
			Expect(err).To(haveCode(store.InvalidArgument, ""))
			err = secrets.server.WatchImportedServiceDeletions(ctx, &v1.WatchImportedServiceDeletionsRequest{Call: call(toolsEU, secretsEU, "v2"), ShardsTo: ring + 1}, nil)
			Expect(err).To(haveCode(store.InvalidArgument, ""))
		})
	})

	Describe("owner references", func() {
		const kind = secretsService + "/Device"
		owner := func(version, name string, edit ...func(*store.OwnerReference)) store.OwnerReference {
			o := store.OwnerReference{Kind: kind, Version: version, Name: name, Region: "eu"}
			for _, e := range edit {
				e(&o)
			}
			return o
		}
		unset := func(o *store.OwnerReference) { o.UnsetOnDelete = true }
		requires := func(o *store.OwnerReference) { o.RequiresOwnerReference = true }
		remove := func(ctx context.Context, ownee string, names ...string) error {
			req := &v1.RemoveMetaOwnerReferenceRequest{Call: toApps(), Ownee: &v1.Spelling{Version: "v1", Name: ownee}, OwnerKind: kind, OwnerRegion: "eu", Reason: "OWNER_DELETED"}
			for _, n := range names {
				req.Owner = append(req.Owner, secrets.peers.Spellings(n)...)
			}
			_, err := apps.server.RemoveMetaOwnerReference(ctx, req)
			return err
		}
		upgrade := func(ctx context.Context, by store.Location, ownee string) error {
			_, err := apps.server.UpgradeMetaOwnerVersion(ctx, &v1.UpgradeMetaOwnerVersionRequest{
				Call: call(by, appsEU, "v1"), Ownee: &v1.Spelling{Version: "v1", Name: ownee}, OwnerKind: kind, OwnerRegion: "eu",
				From: &v1.Spelling{Version: "v1", Name: "devices/d"}, To: &v1.Spelling{Version: "v2", Name: "machines/d"},
			})
			return err
		}

		It("are confirmed, upgraded or not confirmed; the owner then knows where ownees are (F17)", func(ctx SpecContext) {
			ask := func(version, name string, edit func(*v1.ConfirmMetaOwnerRequest)) string {
				GinkgoHelper()
				req := &v1.ConfirmMetaOwnerRequest{Call: fromApps(), OwneeKind: appsService + "/App", Ownee: &v1.Spelling{Version: "v1", Name: "apps/a"}, OwnerKind: kind, Owner: &v1.Spelling{Version: version, Name: name}}
				if edit != nil {
					edit(req)
				}
				res, err := secrets.server.ConfirmMetaOwner(ctx, req)
				Expect(err).NotTo(HaveOccurred())
				return res.GetOutcome().String() + res.GetReason()
			}
			Expect(ask("v2", "machines/d", nil)).To(Equal("OUTCOME_CONFIRMED"))
			Expect(secrets.shadow("machines/d").Sources).To(Equal([]store.Source{{Location: appsEU, Ownee: true}}))
			Expect(ask("v1", "devices/d", nil)).To(Equal("OUTCOME_VERSION_MISMATCH"))
			Expect(ask("v2", "machines/none", nil)).To(Equal("OUTCOME_NOT_CONFIRMEDNOT_FOUND"))
			must := func(r *v1.ConfirmMetaOwnerRequest) { r.RequiresOwnerReference = true }
			Expect(ask("v2", "machines/d", must)).To(Equal("OUTCOME_NOT_CONFIRMEDNO_SCHEMA_REFERENCE"))
			Expect(apps.save("apps/a", `{}`)).To(Succeed())
			Expect(secrets.save("machines/d", `{"app":"apps/a"}`)).To(Succeed())
			Expect(ask("v2", "machines/d", must)).To(Equal("OUTCOME_CONFIRMED"))
			Expect(secrets.delete("machines/d")).To(Succeed())
			Expect(ask("v2", "machines/d", nil)).To(Equal("OUTCOME_NOT_CONFIRMEDDELETING"))
		})

		It("are upgraded by the ownee's Deployment or the owner's, and keep what a user writes meanwhile (F18, F24, X38, I12)", func(ctx SpecContext) {
			for _, by := range []store.Location{appsEU, secretsEU} {
				name := "apps/" + by.Service
				Expect(apps.save(name, `{"n":1}`, owner("v1", "devices/d"), owner("v2", "machines/e"))).To(Succeed())
				apps.overtake = func() {
					Expect(apps.save(name, `{"n":2}`, owner("v1", "devices/d"), owner("v2", "machines/e"))).To(Succeed())
				}
				Expect(upgrade(ctx, by, name)).To(Succeed())
				Expect(apps.owners(name)).To(Equal([]string{"v2 machines/d", "v2 machines/e"}))
				r, err := apps.core.Get(ctx, name)
				Expect(err).NotTo(HaveOccurred())
				Expect(r.Body).To(MatchJSON(`{"n":2}`), "the user's edit is kept")
				Expect(upgrade(ctx, by, name)).To(Succeed(), "again")
				again, err := apps.core.Get(ctx, name)
				Expect(err).NotTo(HaveOccurred())
				Expect(again.Version).To(Equal(r.Version))
			}
			Expect(upgrade(ctx, secretsEU, "apps/none")).To(Succeed())
			Expect(upgrade(ctx, secretsUS, "apps/a")).To(haveCode(store.InvalidArgument, ""), "the owner is not of that region")
			Expect(upgrade(ctx, toolsEU, "apps/a")).To(haveCode(store.InvalidArgument, ""), "nor of that service")
		})

		It("are removed in any spelling; with the last one the ownee goes, unless it was only to be unset (F19, F24, F72, I18)", func(ctx SpecContext) {
			Expect(apps.save("apps/two", `{}`, owner("v1", "devices/d"), owner("v2", "machines/e"))).To(Succeed())
			Expect(remove(ctx, "apps/two", "machines/d")).To(Succeed())
			Expect(apps.owners("apps/two")).To(Equal([]string{"v2 machines/e"}))
			Expect(remove(ctx, "apps/two", "machines/d")).To(Succeed(), "again")
			Expect(apps.owners("apps/two")).To(HaveLen(1))
			apps.overtake = func() {
				Expect(apps.save("apps/two", `{"n":1}`, owner("v2", "machines/e"), owner("v2", "machines/late"))).To(Succeed())
			}
			Expect(remove(ctx, "apps/two", "machines/e")).To(Succeed())
			Expect(apps.owners("apps/two")).To(Equal([]string{"v2 machines/late"}), "an owner that came meanwhile keeps it alive")
			Expect(remove(ctx, "apps/two", "machines/late")).To(Succeed())
			_, err := apps.core.Get(ctx, "apps/two")
			Expect(err).To(haveCode(store.NotFound, ""))
			Expect(remove(ctx, "apps/two", "machines/late")).To(Succeed(), "again")

			Expect(apps.save("apps/unset", `{}`, owner("v2", "machines/d", unset))).To(Succeed())
			Expect(remove(ctx, "apps/unset", "machines/d")).To(Succeed())
			Expect(apps.owners("apps/unset")).To(BeEmpty())
		})

		It("that cannot be removed with their ownee become a task (F67)", func(ctx SpecContext) {
			Expect(apps.save("notes/n", `{}`, owner("v2", "machines/d"))).To(Succeed())
			Expect(apps.save("pages/p", `{"holds":"notes/n"}`)).To(Succeed())
			Expect(remove(ctx, "notes/n", "machines/d")).To(Succeed())
			Expect(apps.shadow("notes/n").Tasks & store.PendingDelete).NotTo(BeZero())
			Expect(apps.owners("notes/n")).To(HaveLen(1))
			Expect(apps.delete("pages/p")).To(Succeed())
			Expect(remove(ctx, "notes/n", "machines/d")).To(Succeed())
			_, err := apps.core.Get(ctx, "notes/n")
			Expect(err).To(haveCode(store.NotFound, ""))
		})

		It("are listed in pages for the owner, and it knows when none is left (F15, F20)", func(ctx SpecContext) {
			for i := range 5 {
				Expect(apps.save(fmt.Sprint("apps/a", i), `{}`, owner("v1", "devices/d"), owner("v2", "machines/e"))).To(Succeed())
			}
			Expect(apps.save("apps/b", `{}`, owner("v2", "machines/d", requires))).To(Succeed())
			list := func(only bool) (all []string) {
				GinkgoHelper()
				req := &v1.ListMetaOwneesRequest{Call: toApps(), OwnerKind: kind, OwnerNames: secrets.peers.Spellings("machines/d"), OnlyRequiringOwnerReference: only, PageSize: 2}
				for pages := 1; ; pages++ {
					res, err := apps.server.ListMetaOwnees(ctx, req)
					Expect(err).NotTo(HaveOccurred())
					Expect(len(res.GetOwnees())).To(BeNumerically("<=", 2))
					for _, o := range res.GetOwnees() {
						Expect(o.GetKind()).To(Equal(appsService + "/App"))
						all = append(all, o.GetOwnee().GetName()+" "+o.GetReference().GetVersion())
					}
					if req.PageToken = res.GetNextPageToken(); req.PageToken == "" {
						return all
					}
				}
			}
			Expect(list(false)).To(Equal([]string{"apps/a0 v1", "apps/a1 v1", "apps/a2 v1", "apps/a3 v1", "apps/a4 v1", "apps/b v2"}))
			Expect(list(true)).To(Equal([]string{"apps/b v2"}))
			has := func(name string) bool {
				GinkgoHelper()
				res, err := apps.server.CheckIfHasMetaOwnee(ctx, &v1.CheckIfHasMetaOwneeRequest{Call: toApps(), OwnerKind: kind, OwnerNames: secrets.peers.Spellings(name)})
				Expect(err).NotTo(HaveOccurred())
				return res.GetHasOwnee()
			}
			Expect(has("machines/d")).To(BeTrue())
			Expect(has("machines/none")).To(BeFalse())
			for _, o := range list(false) {
				Expect(remove(ctx, o[:len(o)-3], "machines/d")).To(Succeed())
			}
			Expect(has("machines/d")).To(BeFalse())
			_, err := apps.server.ListMetaOwnees(ctx, &v1.ListMetaOwneesRequest{Call: call(toolsEU, appsEU, ""), OwnerKind: kind, OwnerNames: secrets.peers.Spellings("machines/d")})
			Expect(err).To(haveCode(store.InvalidArgument, ""), "only the owner's Deployment asks")
		})
	})

	It("shows shadows to people: one, pages, and what has work due (F23)", func(ctx SpecContext) {
		Expect(apps.save("apps/a", `{"device":"devices/d"}`)).To(Succeed())
		h, err := secrets.server.GetResourceShadow(ctx, &v1.GetResourceShadowRequest{Name: "resourceShadows/machines/d"})
		Expect(err).NotTo(HaveOccurred())
		Expect(h).To(And(HaveField("State", "ACTIVE"), HaveField("ResourceType", secretsService+"/Device"), HaveField("Version", "v2")))
		Expect(h.GetSources()).To(HaveLen(1))
		Expect(h.GetTentativeBlockades()).To(HaveLen(1))
		h, err = apps.server.GetResourceShadow(ctx, &v1.GetResourceShadowRequest{Name: "resourceShadows/apps/a"})
		Expect(err).NotTo(HaveOccurred())
		Expect(h).To(And(HaveField("State", "PENDING"), HaveField("Tasks", []string{"CONFIRM_BLOCKADES"})))
		Expect(h.GetReferences()).To(HaveLen(1))
		Expect(h.GetReferences()[0]).To(And(HaveField("Target", "devices/d"), HaveField("Unconfirmed", true), HaveField("OnTargetDeleted", "Block")))
		_, err = secrets.server.GetResourceShadow(ctx, &v1.GetResourceShadowRequest{Name: "machines/d"})
		Expect(err).To(haveCode(store.InvalidArgument, ""))
		_, err = secrets.server.GetResourceShadow(ctx, &v1.GetResourceShadowRequest{Name: "resourceShadows/machines/none"})
		Expect(err).To(haveCode(store.NotFound, ""))

		var names []string
		req := &v1.ListResourceShadowsRequest{PageSize: 1, Prefix: "machines/"}
		for {
			res, err := secrets.server.ListResourceShadows(ctx, req)
			Expect(err).NotTo(HaveOccurred())
			for _, h := range res.GetShadows() {
				names = append(names, h.GetName())
			}
			if req.PageToken = res.GetNextPageToken(); req.PageToken == "" {
				break
			}
		}
		Expect(names).To(Equal([]string{"resourceShadows/machines/d", "resourceShadows/machines/e"}))
		_, err = secrets.server.ListResourceShadows(ctx, &v1.ListResourceShadowsRequest{State: "GONE"})
		Expect(err).To(haveCode(store.InvalidArgument, ""))

		watching, cancel := context.WithCancel(ctx)
		defer cancel()
		seen := make(chan string, 100)
		go func() {
			defer close(seen)
			_ = apps.server.WatchResourceShadows(watching, nil, func(res *v1.WatchResourceShadowsResponse) error {
				for _, h := range res.GetShadows() {
					seen <- h.GetName() + " " + h.GetState()
				}
				return nil
			})
		}()
		Eventually(ctx, seen, "10s").Should(Receive(Equal("resourceShadows/apps/a PENDING")))
		Expect(apps.save("apps/b", `{"device":"devices/d"}`)).To(Succeed())
		Eventually(ctx, seen, "10s").Should(Receive(Equal("resourceShadows/apps/b PENDING")))
		cancel()
		Eventually(ctx, seen, "10s").Should(BeClosed())
	})
})

// settle confirms what is open on a resource: what the owned-pending handlers of the referrers do.
func settle(d *deployed, name string) {
	GinkgoHelper()
	for _, b := range d.shadow(name).Blockades {
		_, err := d.core.Confirm(GinkgoT().Context(), b.Location, []store.Confirmed{{Referrer: b.Referrer, Name: name, TxID: b.TxID}})
		Expect(err).NotTo(HaveOccurred())
	}
}
