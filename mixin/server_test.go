package mixin_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

const (
	tx    = "0b6b5f0e-0000-4000-8000-000000000001"
	aUUID = "0b6b5f0e-0000-4000-8000-0000000000ff"
)

func establish(c *v1.Call, targets ...string) *v1.EstablishReferencesRequest {
	req := &v1.EstablishReferencesRequest{Call: c, Referrer: "apps/a", TxId: tx, TxAttempt: 1}
	for _, t := range targets {
		req.Targets = append(req.Targets, &v1.NewReference{Name: t, Blocking: true})
	}
	return req
}

var _ = Describe("The server", func() {
	var topo *registry.Registry
	var core *fakeCore
	var s *mixin.Server
	BeforeEach(func() {
		topo = topology(nil)
		core = &fakeCore{}
		s = newServer(topo, core, nil)
	})

	// One call of each kind of relation, by a requester.
	asOwner := func(ctx context.Context, requester store.Location, version string) error {
		_, err := s.EstablishReferences(ctx, establish(call(requester, secretsEU, version), "projects/p/secrets/s"))
		return err
	}
	asReferrer := func(ctx context.Context, requester store.Location, version string) error {
		_, err := s.CheckIfResourceIsBlocked(ctx, &v1.CheckIfResourceIsBlockedRequest{
			Call: call(requester, secretsEU, version), Targets: []*v1.Question{{Name: "apps/a", Uuid: aUUID}},
		})
		return err
	}
	asOwnee := func(ctx context.Context, requester store.Location, _ string) error {
		_, err := s.CheckIfHasMetaOwnee(ctx, &v1.CheckIfHasMetaOwneeRequest{
			Call: call(requester, secretsEU, ""), OwnerKind: requester.Service + "/Thing", OwnerNames: []*v1.Spelling{{Version: "v1", Name: "things/t"}},
		})
		return err
	}

	DescribeTable("hears only who has a say (F25, I9)",
		func(ctx SpecContext, requester store.Location, version string, ask string, reason string) {
			err := map[string]func(context.Context, store.Location, string) error{"owner": asOwner, "referrer": asReferrer, "ownee": asOwnee}[ask](ctx, requester, version)
			if reason == "" {
				Expect(err).NotTo(HaveOccurred())
			} else {
				Expect(err).To(haveCode(store.FailedPrecondition, reason))
			}
		},
		Entry("an importer refers to us", appsEU, "v1", "owner", ""),
		Entry("an importer of another region does", appsUS, "v1", "owner", ""),
		Entry("an importer in another version does", toolsEU, "v2", "owner", ""),
		Entry("our own service does", secretsUS, "v2", "owner", ""),
		Entry("who does not import us may not", loneEU, "v1", "owner", mixin.ReasonNotImported),
		Entry("nor who is not declared", at(appsService, "mars"), "v1", "owner", mixin.ReasonUnknownPeer),
		Entry("nor who is disabled", at(appsService, "off"), "v1", "owner", mixin.ReasonUnknownPeer),
		Entry("whom we import asks about its resources", appsEU, "v1", "referrer", ""),
		Entry("our own service asks", secretsUS, "v2", "referrer", ""),
		Entry("whom we do not import has nothing to ask", toolsEU, "v1", "referrer", mixin.ReasonNotImported),
		Entry("owners need no import", loneEU, "", "ownee", ""),
		Entry("but must be declared", at(loneService, "mars"), "", "ownee", mixin.ReasonUnknownPeer),
	)

	DescribeTable("says which version it does not understand, and a caller with a fresh registry is heard (X37)",
		func(ctx SpecContext, ask string, stale, fresh string) {
			f := map[string]func(context.Context, store.Location, string) error{"owner": asOwner, "referrer": asReferrer}[ask]
			err := f(ctx, appsEU, stale)
			Expect(err).To(haveCode(store.FailedPrecondition, mixin.ReasonVersionMismatch))
			refusal, _ := errors.AsType[*mixin.Refusal](err)
			Expect(refusal.Metadata).To(HaveKeyWithValue(mixin.MetadataVersion, "v2"))
			Expect(core.established).To(BeEmpty(), "and changes nothing")
			Expect(f(ctx, appsEU, fresh)).To(Succeed())
		},
		Entry("names of ours in a version that we do not have", "owner", "v9", "v1"),
		Entry("names of others in a version that we do not import", "referrer", "v2", "v1"),
	)

	It("answers only for itself", func(ctx SpecContext) {
		_, err := s.EstablishReferences(ctx, establish(call(appsEU, secretsUS, "v1"), "machines/d"))
		Expect(err).To(haveCode(store.FailedPrecondition, mixin.ReasonWrongPeer))
		_, err = s.EstablishReferences(ctx, &v1.EstablishReferencesRequest{})
		Expect(err).To(haveCode(store.FailedPrecondition, mixin.ReasonWrongPeer))
		_, err = s.EstablishReferences(ctx, establish(call(secretsEU, secretsEU, "v2"), "machines/d"))
		Expect(err).To(haveCode(store.InvalidArgument, ""))
	})

	Describe("translates (F8, I35)", func() {
		It("what importers of two versions call one resource", func(ctx SpecContext) {
			for _, c := range []struct {
				call   *v1.Call
				device string
			}{{call(appsEU, secretsEU, "v1"), "devices/d"}, {call(toolsEU, secretsEU, "v2"), "machines/d"}} {
				res, err := s.EstablishReferences(ctx, establish(c.call, c.device, "projects/p/secrets/s", c.device))
				Expect(err).NotTo(HaveOccurred())
				Expect(res.GetGrants()).To(HaveLen(3), "one for each target, in their order")
				Expect(res.GetGrants()[0].GetUuid()).To(Equal("machines/d"))
				Expect(res.GetGrants()[1].GetUuid()).To(Equal("projects/p/secrets/s"))
				Expect(res.GetGrants()[2].GetUuid()).To(Equal("machines/d"))
			}
			Expect(core.established[0].Targets).To(Equal(core.established[1].Targets))
			Expect(core.established[0].Targets).To(HaveLen(2))
			Expect(core.established[0].Requester).To(Equal(appsEU))
		})

		It("a name without a region to the region that its policy gives, and nowhere else (spec 8.23)", func(ctx SpecContext) {
			s = newServer(topo, core, func(c *mixin.Config) {
				p := policies{"projects/american": "us"}
				c.Owners, c.Policies = p, p
			})
			_, err := s.EstablishReferences(ctx, establish(call(appsEU, secretsEU, "v1"), "projects/p/keys/k"))
			Expect(err).NotTo(HaveOccurred())
			Expect(core.established[0].Targets[0].Name).To(Equal("projects/p/regions/eu/keys/k"))
			_, err = s.EstablishReferences(ctx, establish(call(appsEU, secretsEU, "v1"), "projects/american/keys/k"))
			Expect(err).To(haveCode(store.FailedPrecondition, mixin.ReasonWrongRegion))
			region, ok := mixin.OwningRegion(err)
			Expect(ok).To(BeTrue())
			Expect(region).To(Equal("us"))
		})

		It("by the region that is left, when the policy holder is gone", func(ctx SpecContext) {
			p := policies{"projects/gone": ""}
			s = newServer(topo, core, func(c *mixin.Config) { c.Policies = p })
			_, err := s.EstablishReferences(ctx, establish(call(appsEU, secretsEU, "v1"), "projects/gone/keys/k"))
			Expect(err).NotTo(HaveOccurred())
			Expect(core.established[0].Targets[0].Name).To(Equal("projects/gone/regions/eu/keys/k"))
		})

		It("errors and missing targets back", func(ctx SpecContext) {
			core.refuse = &store.Error{Code: store.FailedPrecondition, Name: "machines/d", Reason: "is being deleted", Violations: []store.Violation{{Field: "machines/d", Description: "is being deleted"}}}
			_, err := s.EstablishReferences(ctx, establish(call(appsEU, secretsEU, "v1"), "devices/d"))
			Expect(err).To(haveCode(store.FailedPrecondition, ""))
			Expect(err).To(MatchError(And(ContainSubstring("devices/d"), Not(ContainSubstring("machines/d")))))

			core.missing = []string{"machines/gone"}
			res, err := s.ConfirmBlockades(ctx, &v1.ConfirmBlockadesRequest{Call: call(appsEU, secretsEU, "v1"), References: []*v1.ConfirmedReference{
				{Referrer: "apps/a", Name: "devices/d", Blocking: true, TxId: tx}, {Referrer: "apps/b", Name: "devices/gone"}, {Referrer: "apps/b", Name: "nonsense"},
			}})
			Expect(err).NotTo(HaveOccurred())
			Expect(res.GetMissing()).To(Equal([]string{"devices/gone", "nonsense"}))
			Expect(core.confirmed).To(Equal([]store.Confirmed{{Referrer: "apps/a", Name: "machines/d", Blocking: true, TxID: tx}, {Referrer: "apps/b", Name: "machines/gone"}}))
		})
	})

	It("names all targets that nothing can be, and all of another region", func(ctx SpecContext) {
		topo := topology(func(d *v1alpha1.Deployment) {
			if d.Spec.Service == secretsService {
				d.Spec.Version = "v1"
			}
		})
		s = newServer(topo, core, func(c *mixin.Config) { c.Version = "v1" })
		_, err := s.EstablishReferences(ctx, establish(call(toolsEU, secretsEU, "v2"), "projects/p/regions/us/keys/a", "machines/d", "projects/p/regions/us/keys/b"))
		Expect(err).To(haveCode(store.NotFound, ""), "v1 cannot express them")
		Expect(err).To(MatchError(And(ContainSubstring("keys/a"), ContainSubstring("keys/b"))))

		s = newServer(topo, core, nil)
		_, err = s.EstablishReferences(ctx, establish(call(toolsEU, secretsEU, "v2"), "projects/p/regions/us/keys/a", "machines/d", "projects/p/regions/us/keys/b"))
		Expect(err).To(haveCode(store.FailedPrecondition, mixin.ReasonWrongRegion))
		Expect(err).To(MatchError(And(ContainSubstring("keys/a"), ContainSubstring("keys/b"))))
		Expect(core.established).To(BeEmpty(), "all or nothing")
	})

	It("knows the resources of others by their Deployment, and its own by none", func(ctx SpecContext) {
		Expect(asReferrer(ctx, appsUS, "v1")).To(Succeed())
		Expect(core.owner).To(Equal(appsUS))
		Expect(core.questions).To(Equal([]store.Question{{Name: "apps/a", UUID: aUUID}}))
		Expect(asReferrer(ctx, secretsEU, "v2")).To(Succeed())
		Expect(core.owner).To(BeZero())
		res, err := s.CheckIfResourceHasDeletionSubscriber(ctx, &v1.CheckIfResourceHasDeletionSubscriberRequest{Call: call(appsEU, secretsEU, "v1"), Target: &v1.Question{Name: "apps/a", Uuid: aUUID, Epoch: 3, RowVersion: 5}})
		Expect(err).NotTo(HaveOccurred())
		Expect(res).To(And(HaveField("HasSubscriber", true), HaveField("Count", int32(7))))
		Expect(core.questions).To(Equal([]store.Question{{Name: "apps/a", UUID: aUUID, Epoch: 3, RowVersion: 5}}))
	})

	It("notes the end of a sweep, even of an empty one", func(ctx SpecContext) {
		_, err := s.ConfirmBlockades(ctx, &v1.ConfirmBlockadesRequest{Call: call(appsEU, secretsEU, "v1"), CompleteEpoch: 4})
		Expect(err).NotTo(HaveOccurred())
		Expect(core.epochs).To(Equal([]int64{4}))
	})

	DescribeTable("grants for a time that it decides", func(ctx SpecContext, asked, granted time.Duration) {
		req := establish(call(appsEU, secretsEU, "v1"), "devices/d")
		if asked != 0 {
			req.Ttl = durationpb.New(asked)
		}
		res, err := s.EstablishReferences(ctx, req)
		Expect(err).NotTo(HaveOccurred())
		Expect(res.GetGranted().AsDuration()).To(Equal(granted))
		Expect(core.established[0].TTL).To(Equal(granted))
	},
		Entry("the default", time.Duration(0), 5*time.Minute), Entry("as asked", time.Minute, time.Minute),
		Entry("not too short", time.Millisecond, 10*time.Second), Entry("not backwards", -time.Hour, 10*time.Second), Entry("not too long", time.Hour, 15*time.Minute),
	)

	DescribeTable("refuses what it cannot store", func(ctx SpecContext, spoil func(*v1.EstablishReferencesRequest), field string) {
		req := establish(call(appsEU, secretsEU, "v1"), "devices/d")
		spoil(req)
		_, err := s.EstablishReferences(ctx, req)
		Expect(err).To(haveCode(store.InvalidArgument, ""))
		Expect(err).To(MatchError(HavePrefix(field)))
	},
		Entry("no referrer", func(r *v1.EstablishReferencesRequest) { r.Referrer = "" }, "referrer"),
		Entry("a NUL", func(r *v1.EstablishReferencesRequest) { r.Referrer = "a\x00b" }, "referrer"),
		Entry("no transaction", func(r *v1.EstablishReferencesRequest) { r.TxId = "x" }, "tx_id"),
		Entry("no attempt", func(r *v1.EstablishReferencesRequest) { r.TxAttempt = 0 }, "tx_attempt"),
		Entry("no targets", func(r *v1.EstablishReferencesRequest) { r.Targets = nil }, "targets"),
		Entry("too many", func(r *v1.EstablishReferencesRequest) { r.Targets = make([]*v1.NewReference, mixin.MaxNames+1) }, "targets"),
		Entry("no name", func(r *v1.EstablishReferencesRequest) { r.Targets[0].Name = "x" }, "targets[0].name"),
		Entry("a long name", func(r *v1.EstablishReferencesRequest) { r.Targets[0].Name = "devices/" + strings.Repeat("x", 2000) }, "targets[0].name"),
	)

	It("bounds what one requester has in flight, and no other", func(ctx SpecContext) {
		s = newServer(topo, core, func(c *mixin.Config) { c.MaxCalls = 2 })
		core.block, core.entered = make(chan struct{}), make(chan struct{})
		ask := func(requester store.Location, version string) error {
			_, err := s.CheckIfResourceHasDeletionSubscriber(ctx, &v1.CheckIfResourceHasDeletionSubscriberRequest{Call: call(requester, secretsEU, version), Target: &v1.Question{Name: "apps/a", Uuid: aUUID}})
			return err
		}
		done := make(chan error, 3)
		for range 2 {
			go func() { done <- ask(appsEU, "v1") }()
			Eventually(ctx, core.entered).Should(Receive())
		}
		Expect(ask(appsEU, "v1")).To(haveCode(store.Unavailable, mixin.ReasonTooManyCalls))
		go func() { done <- ask(secretsUS, "v2") }()
		Eventually(ctx, core.entered).Should(Receive())
		close(core.block)
		for range 3 {
			Eventually(ctx, done).Should(Receive(BeNil()))
		}
		core.block = nil
		Expect(ask(appsEU, "v1")).To(Succeed())
	})
})

var _ = Describe("An owner", func() {
	var core *fakeCore
	var s *mixin.Server
	BeforeEach(func() {
		core = &fakeCore{shadows: map[string]*store.Shadow{
			"machines/live": {State: store.ShadowActive, References: []store.Reference{
				{Kind: store.SchemaReference, At: appsEU, Target: "apps/mine", Field: "app"}, {Kind: store.SchemaReference, At: appsUS, Target: "apps/far"},
			}},
			"machines/dying": {State: store.ShadowDeleting},
		}}
		s = newServer(topology(nil), core, nil)
	})
	confirm := func(ctx context.Context, version, owner string, edit func(*v1.ConfirmMetaOwnerRequest)) (*v1.ConfirmMetaOwnerResponse, error) {
		req := &v1.ConfirmMetaOwnerRequest{
			Call: call(appsEU, secretsEU, version), OwneeKind: appsService + "/App", Ownee: &v1.Spelling{Version: "v1", Name: "apps/mine"},
			OwnerKind: secretsService + "/Device", Owner: &v1.Spelling{Version: version, Name: owner},
		}
		if edit != nil {
			edit(req)
		}
		return s.ConfirmMetaOwner(ctx, req)
	}

	DescribeTable("is confirmed, upgraded or not confirmed (F17)",
		func(ctx SpecContext, version, owner string, edit func(*v1.ConfirmMetaOwnerRequest), want string) {
			res, err := confirm(ctx, version, owner, edit)
			Expect(err).NotTo(HaveOccurred())
			got := strings.TrimPrefix(res.GetOutcome().String(), "OUTCOME_")
			for _, more := range []string{res.GetReason(), res.GetCurrent().GetVersion(), res.GetCurrent().GetName()} {
				if more != "" {
					got += " " + more
				}
			}
			Expect(got).To(Equal(want))
			if res.GetOutcome() != v1.ConfirmMetaOwnerResponse_OUTCOME_NOT_CONFIRMED {
				Expect(core.added).To(ConsistOf("machines/live"), "the location is known, also to an older spelling")
			}
		},
		Entry("it lives", "v2", "machines/live", nil, "CONFIRMED"),
		Entry("it is spelled in an older version", "v1", "devices/live", nil, "VERSION_MISMATCH v2 machines/live"),
		Entry("it does not exist", "v2", "machines/none", nil, "NOT_CONFIRMED NOT_FOUND"),
		Entry("it is no name", "v2", "nonsense", nil, "NOT_CONFIRMED NOT_FOUND"),
		Entry("it is of another kind", "v2", "machines/live", func(r *v1.ConfirmMetaOwnerRequest) { r.OwnerKind = secretsService + "/Key" }, "NOT_CONFIRMED NOT_FOUND"),
		Entry("it is being deleted", "v2", "machines/dying", nil, "NOT_CONFIRMED DELETING"),
		Entry("it must refer to the ownee, and does (I20)", "v2", "machines/live", func(r *v1.ConfirmMetaOwnerRequest) { r.RequiresOwnerReference = true }, "CONFIRMED"),
		Entry("it must refer to the ownee, and does not", "v2", "machines/live", func(r *v1.ConfirmMetaOwnerRequest) {
			r.RequiresOwnerReference, r.Ownee.Name = true, "apps/other"
		}, "NOT_CONFIRMED NO_SCHEMA_REFERENCE"),
		Entry("it must refer to the ownee, and refers to one elsewhere", "v2", "machines/live", func(r *v1.ConfirmMetaOwnerRequest) {
			r.RequiresOwnerReference, r.Ownee.Name = true, "apps/far"
		}, "NOT_CONFIRMED NO_SCHEMA_REFERENCE"),
	)

	It("is not judged in a version that is not known (I19)", func(ctx SpecContext) {
		_, err := confirm(ctx, "v9", "machines/live", nil)
		Expect(err).To(haveCode(store.FailedPrecondition, mixin.ReasonVersionMismatch))
	})
})

var _ = Describe("Config", func() {
	It("must be complete", func() {
		_, err := mixin.NewServer(mixin.Config{})
		Expect(err).To(MatchError(ContainSubstring("is required")))
	})
})

var _ = Describe("Peers", func() {
	var topo *registry.Registry
	BeforeEach(func() { topo = topology(nil) })

	spell := func(p *mixin.Peers, to store.Location, name string) string {
		version, spelled, ok := p.SpellFor(to, name)
		return fmt.Sprint(version, " ", spelled, " ", ok)
	}

	It("spells our names as each Deployment imports them (F47, F8)", func() {
		p := newPeers(topo, secretsEU, "v2")
		Expect(spell(p, appsEU, "machines/d")).To(Equal("v1 devices/d true"))
		Expect(spell(p, toolsEU, "machines/d")).To(Equal("v2 machines/d true"))
		Expect(spell(p, secretsUS, "machines/d")).To(Equal("v2 machines/d true"))
		Expect(spell(p, appsEU, "projects/p/regions/eu/keys/k")).To(Equal("v1 projects/p/keys/k true"))
		Expect(spell(p, appsEU, "projects/p/regions/eu/secrets/s")).To(HaveSuffix(" false"), "v1 knows the one without a region")
		Expect(spell(p, loneEU, "machines/d")).To(Equal("v2 machines/d true"), "nothing is known about who imports nothing")
		Expect(spell(p, at("no.example.com", "eu"), "machines/d")).To(Equal("v2 machines/d true"))
	})

	It("spells in the current version of another region of our service (X30)", func() {
		topo = topology(func(d *v1alpha1.Deployment) {
			if d.Spec.Service == secretsService && d.Spec.Region == "us" {
				d.Spec.Version = "v1"
			}
		})
		p := newPeers(topo, secretsEU, "v2")
		Expect(spell(p, secretsUS, "machines/d")).To(Equal("v1 devices/d true"))
		c, err := p.Call(secretsUS)
		Expect(err).NotTo(HaveOccurred())
		Expect(c.GetVersion()).To(Equal("v2"), "but its names in ours: it translates")
	})

	It("has all spellings of a name (8.41)", func() {
		var all []string
		for _, s := range newPeers(topo, secretsEU, "v2").Spellings("machines/d") {
			all = append(all, s.GetVersion()+" "+s.GetName())
		}
		Expect(all).To(Equal([]string{"v1 devices/d", "v2 machines/d"}))
	})

	It("fills in who asks whom, in which version", func() {
		p := newPeers(topo, appsEU, "v1")
		for to, version := range map[store.Location]string{secretsUS: "v1", appsUS: "v1", {}: "v1", loneEU: "v1"} {
			c, err := p.Call(to)
			Expect(err).NotTo(HaveOccurred())
			Expect(c.GetVersion()).To(Equal(version))
			Expect(mixin.LocationOf(c.GetRequester())).To(Equal(appsEU))
			if to != (store.Location{}) {
				Expect(mixin.LocationOf(c.GetCallee())).To(Equal(to))
			}
		}
		c, err := newPeers(topo, toolsEU, "v1").Call(secretsEU)
		Expect(err).NotTo(HaveOccurred())
		Expect(c.GetVersion()).To(Equal("v2"))
		_, err = p.Call(at("no.example.com", "eu"))
		Expect(err).To(haveCode(store.FailedPrecondition, ""))
	})

	It("knows who may refer to us, and to whom we may (F58)", func() {
		p := newPeers(topo, secretsEU, "v2")
		Expect(p.Importers()).To(Equal([]store.Location{appsEU, at(appsService, "off"), appsUS, secretsUS, toolsEU}))
		Expect(newPeers(topo, toolsEU, "v1").Interesting()).To(Equal([]store.Location{secretsEU, secretsUS, toolsEU}))
		Expect(newPeers(topo, loneEU, "v1").Interesting()).To(Equal([]store.Location{loneEU}))
		Expect(newPeers(topo, loneEU, "v1").Importers()).To(BeEmpty())
	})

	It("follows the registry at each call, and keeps a client while nothing changes", func() {
		p := newPeers(topo, secretsEU, "v2")
		first, err := p.Peer(appsEU)
		Expect(err).NotTo(HaveOccurred())
		Expect(p.Peer(appsEU)).To(BeIdenticalTo(first))
		declare(topo, func(d *v1alpha1.Deployment) { d.Spec.Endpoint = "http://127.0.0.1:2" })
		Expect(p.Peer(appsEU)).NotTo(BeIdenticalTo(first))
		declare(topo, func(d *v1alpha1.Deployment) { d.Spec.Disabled = d.Spec.Service == appsService })
		_, err = p.Peer(appsEU)
		Expect(err).To(haveCode(store.FailedPrecondition, ""))
		Expect(err).To(MatchError(ContainSubstring("disabled")))
		_, err = p.Peer(at("no.example.com", "eu"))
		Expect(err).To(haveCode(store.FailedPrecondition, ""))
		Expect(err).To(MatchError(ContainSubstring("declared")))
	})

	It("asks the local server without a network", func() {
		p := newPeers(topo, secretsEU, "v2")
		_, err := p.Peer(store.Location{})
		Expect(err).To(haveCode(store.Unavailable, ""), "it is not there yet")
		s := newServer(topo, &fakeCore{}, nil)
		p.SetLocal(s)
		Expect(p.Peer(store.Location{})).To(BeIdenticalTo(s))
		Expect(p.Peer(secretsEU)).To(BeIdenticalTo(s))
	})
})
