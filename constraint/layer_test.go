package constraint_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gstruct"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

var _ = Describe("the constraint layer, told by others what they know", func() {
	var below *fakeStore
	var s *constraint.Store
	var reg *registry.Registry
	var others *peers
	var low, lowInUS, midInUS *fakePeer
	var now time.Time
	var metrics *prometheus.Registry
	var owner func(name string) string

	BeforeEach(func() {
		below = &fakeStore{rows: map[string]*store.Resource{}, outgoing: map[string][]store.Reference{}}
		reg = topology("v1", midEU, midUS, lowEU, lowUS)
		others = newPeers(reg, midEU, "v1")
		low, lowInUS, midInUS = &fakePeer{}, &fakePeer{}, &fakePeer{}
		others.answer = map[store.Location]mixin.Peer{lowEU: low, lowUS: lowInUS, midUS: midInUS}
		now = time.Unix(1_000_000, 0)
		metrics = prometheus.NewRegistry()
		owner = func(string) string { return "eu" }
		s = constraint.Layer(below, constraint.LayerConfig{
			Self: midEU, Version: func() *descriptor.Version { return versionOf(reg, midService, "v1") }, View: func() *registry.View { return reg.View() },
			Owner: func(_ context.Context, n descriptor.Name, _ []store.Write) (string, error) { return owner(n.Full), nil },
			Core:  below, Peers: others, Now: func() time.Time { return now }, Registerer: metrics, Logger: slog.New(slog.DiscardHandler),
		})
	})
	write := func(writes ...store.Write) error {
		_, err := s.BatchWrite(GinkgoTB().Context(), writes)
		return err
	}
	save := func(op store.Op, name, text string, args ...any) store.Write {
		return store.Write{Op: op, Name: name, Body: body(text, args...)}
	}
	del := func(name string) store.Write { return store.Write{Op: store.Delete, Name: name} }
	changed := &store.Error{Code: store.Aborted, Cause: store.ErrChanged}
	refs := func(name string) []store.Reference {
		GinkgoHelper()
		w, ok := below.last()[name]
		Expect(ok).To(BeTrue(), name)
		Expect(w.Constraint).NotTo(BeNil())
		return w.Constraint.References
	}
	grant := func(target string, rowVersion int64) OmegaMatcher {
		return gstruct.PointTo(And(HaveField("TxID", Not(BeEmpty())), HaveField("UUID", "uuid of "+target), HaveField("Epoch", int64(4)),
			HaveField("RowVersion", rowVersion), HaveField("Home", store.Mark{Epoch: 1, Fence: 7})))
	}

	Describe("saving", func() {
		It("hands down every outgoing reference, from body, parent and owners, each once (F38, I8)", func() {
			w := save(store.Create, "nodes/n/children/c", `{}`)
			w.Meta.OwnerReferences = []store.OwnerReference{{Kind: "low.example.com/Item", Version: "v1", Name: "items/i", Region: "us"}}
			Expect(write(
				save(store.Create, "nodes/a", `{"block":"nodes/b","unsets":["nodes/c","nodes/d","nodes/c"],"parts":[{"node":"nodes/e"},{}],"dangle":"nodes/f","site":"regions/eu/sites/s"}`), w)).To(Succeed())
			Expect(refs("nodes/a")).To(ConsistOf(
				store.Reference{Field: "block", Behavior: store.Block, Target: "nodes/b"},
				store.Reference{Field: "unsets[]", Behavior: store.Unset, Target: "nodes/c"},
				store.Reference{Field: "unsets[]", Behavior: store.Unset, Target: "nodes/d"},
				store.Reference{Field: "parts[].node", Behavior: store.Unset, Target: "nodes/e"},
				store.Reference{Field: "dangle", Behavior: store.AllowDangling, Target: "nodes/f"},
				store.Reference{Field: "site", Behavior: store.Block, Target: "regions/eu/sites/s"},
			))
			Expect(refs("nodes/n/children/c")).To(ConsistOf(
				store.Reference{Field: "name", Kind: store.ParentReference, Behavior: store.Cascade, Target: "nodes/n"},
				store.Reference{Field: "metadata.ownerReferences", Kind: store.OwnerRef, At: lowUS, Target: "items/i"},
			))
		})

		It("needs no further round trip for local references (F40)", func() {
			Expect(write(save(store.Create, "nodes/a", `{"block":"nodes/b"}`))).To(Succeed())
			Expect(write(save(store.Update, "nodes/a", `{"block":"nodes/c"}`))).To(Succeed())
			Expect(below.reads).To(BeZero())
			Expect(below.batches).To(HaveLen(2))
		})

		It("leaves out types that opt out, on both sides (F56)", func() {
			Expect(write(save(store.Create, "frees/f", `{"block":"nodes/none"}`), save(store.Create, "nodes/a", `{"free":"frees/f","loose":"loose/l"}`))).To(Succeed())
			Expect(below.last()["frees/f"].Constraint).To(BeNil())
			Expect(refs("nodes/a")).To(BeEmpty())
			Expect(write(del("frees/f"))).To(Succeed())
			Expect(below.last()["frees/f"].Constraint).To(BeNil())
			Expect(below.reads).To(BeZero())
		})

		It("asks each Deployment once for all new references of a resource, at the same time (F9, F10, F39, F43, F44)", func() {
			both := make(chan struct{})
			meet := func(*v1.EstablishReferencesRequest) error { // nobody answers before both are asked
				select {
				case both <- struct{}{}:
				case <-both:
				case <-time.After(10 * time.Second):
					return errors.New("the other one was not asked")
				}
				return nil
			}
			low.establish, midInUS.establish = meet, meet
			Expect(write(save(store.Create, "nodes/a",
				`{"secrets":["projects/p/secrets/1","projects/p/secrets/2"],"soft":"projects/p/secrets/1","item":"items/i","maybe":"items/none","site":"regions/us/sites/s","block":"nodes/b"}`))).To(Succeed())
			Expect(low.established).To(HaveLen(1))
			req := low.established[0]
			Expect(mixin.LocationOf(req.GetCall().GetRequester())).To(Equal(midEU))
			Expect(mixin.LocationOf(req.GetCall().GetCallee())).To(Equal(lowEU))
			Expect(req.GetCall().GetVersion()).To(Equal("v1"))
			Expect(req.GetReferrer()).To(Equal("nodes/a"))
			Expect(req.GetTxAttempt()).To(BeEquivalentTo(1))
			Expect(req.GetTtl().AsDuration()).To(Equal(5 * time.Minute))
			var targets []string
			for _, t := range req.GetTargets() {
				targets = append(targets, fmt.Sprint(t.GetName(), " ", t.GetBlocking(), " ", t.GetSubscriber()))
			}
			Expect(targets).To(Equal([]string{"projects/p/secrets/1 true true", "projects/p/secrets/2 true false", "items/i false true"}))
			Expect(midInUS.established).To(HaveLen(1))
			Expect(lowInUS.established).To(BeEmpty())
			Expect(refs("nodes/a")).To(ConsistOf(
				And(HaveField("Field", "secrets[]"), HaveField("Target", "projects/p/secrets/1"), HaveField("At", lowEU), HaveField("Grant", grant("projects/p/secrets/1", 0))),
				And(HaveField("Field", "secrets[]"), HaveField("Target", "projects/p/secrets/2"), HaveField("Grant", grant("projects/p/secrets/2", 2))),
				And(HaveField("Field", "soft"), HaveField("Grant", grant("projects/p/secrets/1", 0))),
				And(HaveField("Field", "item"), HaveField("Grant", grant("items/i", 4))),
				And(HaveField("Field", "maybe"), HaveField("At", lowEU), HaveField("Grant", BeNil())),
				And(HaveField("Field", "site"), HaveField("At", midUS), HaveField("Grant", grant("regions/us/sites/s", 0))),
				And(HaveField("Field", "block"), HaveField("At", store.Location{}), HaveField("Grant", BeNil())),
			))
			Expect(below.reads).To(Equal(1), "where our database stands")
			Expect(testutil.CollectAndCount(metrics, "dbcontroller_establish_duration_seconds")).To(Equal(2))
		})

		It("asks for nothing that is known already, and for a changed behavior again", func() {
			below.outgoing["nodes/a"] = []store.Reference{
				{Field: "secrets[]", Behavior: store.Block, At: lowUS, Target: "projects/p/secrets/1"},
				{Field: "soft", Behavior: store.Block, At: lowUS, Target: "projects/p/secrets/1"},
			}
			Expect(write(save(store.Update, "nodes/a", `{"secrets":["projects/p/secrets/1"]}`))).To(Succeed())
			Expect(refs("nodes/a")).To(ConsistOf(store.Reference{Field: "secrets[]", Behavior: store.Block, At: lowUS, Target: "projects/p/secrets/1"}))
			Expect(low.established).To(BeEmpty())
			Expect(lowInUS.established).To(BeEmpty())
			Expect(write(save(store.Update, "nodes/a", `{"soft":"projects/p/secrets/1"}`))).To(Succeed())
			Expect(low.established).To(HaveLen(1))
			Expect(write(save(store.Update, "nodes/a", `{"dangle":"nodes/x"}`))).To(Succeed(), "dropping a reference calls nobody")
			Expect(low.established).To(HaveLen(1))
		})

		It("follows a target to the region that owns it, and remembers that", func() {
			low.establish = func(req *v1.EstablishReferencesRequest) error {
				for _, t := range req.GetTargets() {
					if t.GetName() != "items/i" {
						return &mixin.Refusal{Err: store.Errorf(store.FailedPrecondition, t.GetName(), "region us owns it"), Reason: mixin.ReasonWrongRegion, Metadata: map[string]string{mixin.MetadataRegion: "us"}}
					}
				}
				return nil
			}
			Expect(write(save(store.Create, "nodes/a", `{"item":"items/i","secrets":["projects/p/secrets/1","projects/p/secrets/2"]}`))).To(Succeed())
			Expect(refs("nodes/a")).To(ConsistOf(And(HaveField("At", lowEU), HaveField("Target", "items/i")), HaveField("At", lowUS), HaveField("At", lowUS)))
			Expect(low.established).To(HaveLen(2))
			Expect(lowInUS.established).To(HaveLen(1))
			Expect(write(save(store.Create, "nodes/b", `{"secrets":["projects/p/secrets/3"]}`))).To(Succeed())
			Expect(low.established).To(HaveLen(2))
			Expect(lowInUS.established).To(HaveLen(2))
		})

		It("fails when it is sent in circles", func() {
			send := func(to string) func(*v1.EstablishReferencesRequest) error {
				return func(req *v1.EstablishReferencesRequest) error {
					return &mixin.Refusal{Err: store.Errorf(store.FailedPrecondition, req.GetTargets()[0].GetName(), "region %s owns it", to), Reason: mixin.ReasonWrongRegion, Metadata: map[string]string{mixin.MetadataRegion: to}}
				}
			}
			low.establish, lowInUS.establish = send("us"), send("eu")
			Expect(write(save(store.Create, "nodes/a", `{"soft":"projects/p/secrets/1"}`))).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("soft"))))
			Expect(below.batches).To(BeEmpty())
			low.establish, lowInUS.establish = nil, send("ap")
			Expect(write(save(store.Create, "nodes/a", `{"soft":"projects/p/secrets/1"}`))).To(Succeed(), "what was wrong is forgotten")
		})

		It("names the field whose target is refused, and writes nothing (F10, F25, X4)", func() {
			low.establish = func(req *v1.EstablishReferencesRequest) error {
				return &store.Error{Code: store.NotFound, Name: "projects/p/secrets/2", Reason: "does not exist",
					Violations: []store.Violation{{Field: "projects/p/secrets/2", Description: "does not exist"}, {Field: "items/i", Description: "is being deleted"}}}
			}
			err := write(save(store.Create, "nodes/a", `{"secrets":["projects/p/secrets/1","projects/p/secrets/2"],"item":"items/i","site":"regions/us/sites/s"}`))
			Expect(err).To(haveCode(store.FailedPrecondition))
			var e *store.Error
			Expect(errors.As(err, &e)).To(BeTrue())
			Expect(e.Name).To(Equal("nodes/a"))
			Expect(e.Violations).To(ConsistOf(
				store.Violation{Field: "secrets[1]", Description: "projects/p/secrets/2 (low.example.com/eu) does not exist"},
				store.Violation{Field: "item", Description: "items/i (low.example.com/eu) is being deleted"}))
			Expect(midInUS.established).To(HaveLen(1), "what it granted expires there")
			Expect(below.batches).To(BeEmpty())
		})

		It("is Unavailable while a target's Deployment is, and writes nothing (X8)", func() {
			low.establish = func(*v1.EstablishReferencesRequest) error {
				return store.Errorf(store.Unavailable, "", "connection refused")
			}
			err := write(save(store.Create, "nodes/a", `{"soft":"projects/p/secrets/1","site":"regions/us/sites/s"}`))
			Expect(err).To(And(haveCode(store.Unavailable), MatchError(And(ContainSubstring("soft"), ContainSubstring("low.example.com/eu")))))
			Expect(below.batches).To(BeEmpty())
		})

		It("refuses a region in which the target's service is not deployed", func() {
			reg = topology("v1", midEU, lowEU)
			Expect(write(save(store.Create, "nodes/a", `{"site":"regions/ap/sites/s"}`))).To(And(haveCode(store.FailedPrecondition), MatchError(And(ContainSubstring("site"), ContainSubstring("region ap")))))
			reg = topology("v1", midEU)
			Expect(write(save(store.Create, "nodes/a", `{"item":"items/i"}`))).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("no Deployment anywhere"))))
			Expect(write(save(store.Create, "nodes/a", `{"maybe":"items/i"}`))).To(Succeed(), "it may dangle")
			Expect(below.batches).To(HaveLen(1))
		})

		It("refuses names that are none of the target's type", func() {
			Expect(write(save(store.Create, "nodes/a", `{"item":"projects/p"}`))).To(And(haveCode(store.InvalidArgument), MatchError(ContainSubstring("item"))))
			Expect(write(save(store.Create, "nodes/a", `{"block":"what/ever"}`))).To(haveCode(store.InvalidArgument))
		})

		It("repeats with the same transaction and a higher attempt when what it read has changed (F11)", func() {
			below.errs = []error{changed, changed}
			Expect(write(save(store.Create, "nodes/a", `{"soft":"projects/p/secrets/1"}`))).To(Succeed())
			Expect(below.batches).To(HaveLen(3))
			Expect(low.established).To(HaveLen(3))
			for i, req := range low.established {
				Expect(req.GetTxAttempt()).To(BeEquivalentTo(i + 1))
				Expect(req.GetTxId()).To(Equal(low.established[0].GetTxId()))
			}
			Expect(refs("nodes/a")[0].Grant.TxID).To(Equal(low.established[0].GetTxId()))
		})

		It("does not repeat what the caller must know", func() {
			below.errs = []error{store.Errorf(store.Aborted, "nodes/a", "has another etag")}
			Expect(write(save(store.Update, "nodes/a", `{}`))).To(haveCode(store.Aborted))
			Expect(below.batches).To(HaveLen(1))
		})

		It("gives up in the end", func() {
			below.errs = slices.Repeat([]error{changed}, 100)
			ctx, cancel := context.WithCancel(GinkgoTB().Context())
			below.onWrite = func() {
				if len(below.batches) == 5 {
					cancel()
				}
			}
			_, err := s.BatchWrite(ctx, []store.Write{save(store.Save, "nodes/a", `{}`)})
			Expect(err).To(MatchError(context.Canceled))
			Expect(below.batches).To(HaveLen(5))
		})

		It("asks again rather than commit on an old permission (8.4)", func() {
			late := true
			low.establish = func(*v1.EstablishReferencesRequest) error {
				if late {
					now = now.Add(3 * time.Minute)
				}
				late = false
				return nil
			}
			Expect(write(save(store.Create, "nodes/a", `{"soft":"projects/p/secrets/1"}`))).To(Succeed())
			Expect(low.established).To(HaveLen(2))
			Expect(low.established[1].GetTxAttempt()).To(BeEquivalentTo(2))
			Expect(below.batches).To(HaveLen(1))
		})

		It("knows the whole body of a masked write", func() {
			below.rows["nodes/a"] = &store.Resource{Name: "nodes/a", Type: "Node", Version: store.Version{Epoch: 1, Number: 5}, Body: body(`{"block":"nodes/b","unset":"nodes/c"}`)}
			w := save(store.Update, "nodes/a", `{"unset":"nodes/d"}`)
			w.Mask = []string{"unset"}
			below.errs = []error{store.Errorf(store.Aborted, "nodes/a", "has another etag")}
			Expect(write(w)).To(Succeed(), "it was we who asked for that etag")
			Expect(below.batches).To(HaveLen(2))
			Expect(refs("nodes/a")).To(ConsistOf(HaveField("Target", "nodes/b"), HaveField("Target", "nodes/d")))
			Expect(below.last()["nodes/a"].IfVersion).To(Equal(store.Version{Epoch: 1, Number: 5}))
			Expect(below.last()["nodes/a"].Mask).To(BeEmpty())

			w.Op, w.Name = store.Save, "nodes/new"
			below.errs = []error{store.Errorf(store.AlreadyExists, "nodes/new", "exists already")}
			Expect(write(w)).To(Succeed())
			Expect(below.last()["nodes/new"].Op).To(Equal(store.Create))
			w.Op = store.Update
			Expect(write(w)).To(haveCode(store.NotFound))
		})

		It("wants to know where owners are, and keeps one of each name (spec 2.4)", func() {
			owned := func(owners ...store.OwnerReference) store.Write {
				w := save(store.Save, "nodes/a", `{}`)
				w.Meta.OwnerReferences = owners
				return w
			}
			Expect(write(owned(store.OwnerReference{Kind: "Item", Version: "v1", Name: "items/i", Region: "eu"}))).To(And(haveCode(store.InvalidArgument), MatchError(ContainSubstring("metadata.ownerReferences[0].kind"))))
			Expect(write(owned(store.OwnerReference{Kind: "low.example.com/Item", Version: "v1", Name: "items/i"}))).To(And(haveCode(store.InvalidArgument), MatchError(ContainSubstring("metadata.ownerReferences[0].region"))))
			Expect(write(owned(store.OwnerReference{Kind: "mid.example.com/Site", Version: "v1", Name: "regions/us/sites/s"},
				store.OwnerReference{Kind: "mid.example.com/Site", Version: "v1", Name: "regions/us/sites/s", Controller: true, Region: "us"}))).To(Succeed())
			Expect(refs("nodes/a")).To(ConsistOf(HaveField("At", midUS)))
			Expect(below.last()["nodes/a"].Meta.OwnerReferences).To(ConsistOf(store.OwnerReference{Kind: "mid.example.com/Site", Version: "v1", Name: "regions/us/sites/s", Controller: true, Region: "us"}))
		})
	})

	Describe("deleting", func() {
		doomed := func(name string, sources ...store.Source) store.Doomed {
			return store.Doomed{Name: name, Type: "Node", UUID: "uuid of " + name, Version: store.Version{Epoch: 1, Number: 1}, Sources: sources}
		}
		blocking := func(at store.Location) store.Source { return store.Source{Location: at, Blocking: true} }

		It("asks every Deployment that may block it, once and with names that it knows (F13, F47)", func() {
			a, b := doomed("nodes/a", blocking(midUS), store.Source{Location: lowUS, Subscriber: true}), doomed("nodes/b", blocking(midUS))
			b.Via, b.Depth = store.Incoming{Referrer: "nodes/b", Target: "nodes/a"}, 1
			below.closure = store.Closure{Delete: []store.Doomed{a, b}}
			Expect(write(del("nodes/a"))).To(Succeed())
			Expect(midInUS.asked).To(HaveLen(1))
			Expect(lowInUS.asked).To(BeEmpty())
			Expect(midInUS.asked[0].GetTargets()).To(HaveLen(2))
			Expect(midInUS.asked[0].GetTargets()[0].GetRowVersion()).To(BeEquivalentTo(3))
			Expect(midInUS.asked[0].GetCall().GetVersion()).To(Equal("v1"))
			last := below.last()
			Expect(last).To(HaveLen(2))
			Expect(*last["nodes/a"].Constraint).To(Equal(store.Constraint{UUID: "uuid of nodes/a", Epoch: 5, Asked: []store.Location{midUS}, Attempt: 3}))
			Expect(*last["nodes/b"].Constraint).To(Equal(store.Constraint{UUID: "uuid of nodes/b", Epoch: 5, Asked: []store.Location{midUS}, Attempt: 3, Closure: true}))
			Expect(last["nodes/b"].AllowMissing).To(BeTrue())
			Expect(last["nodes/b"].IfVersion).To(Equal(store.Version{Epoch: 1, Number: 1}))
		})

		It("asks nobody where nobody refers to it", func() {
			Expect(write(del("nodes/a"))).To(Succeed())
			Expect(below.begun).To(BeEmpty())
			Expect(*below.last()["nodes/a"].Constraint).To(Equal(store.Constraint{UUID: "uuid of nodes/a", Epoch: 5}))
		})

		It("is refused with the names of those elsewhere who need it (F46)", func() {
			below.closure = store.Closure{Delete: []store.Doomed{doomed("nodes/a", blocking(midUS))}}
			midInUS.blocked = func(*v1.CheckIfResourceIsBlockedRequest) ([]*v1.BlockedAnswer, error) {
				return []*v1.BlockedAnswer{{Blocked: true, Sample: []string{"nodes/x", "nodes/y"}}}, nil
			}
			Expect(write(del("nodes/a"))).To(And(haveCode(store.FailedPrecondition),
				MatchError("nodes/a: is referenced by nodes/x in mid.example.com/us, nodes/y in mid.example.com/us: delete them first, or remove the references")))
			Expect(below.batches).To(BeEmpty())
			Expect(refusals(metrics)).To(Equal(map[string]float64{"referenced": 0, "referenced_elsewhere": 1, "tentative": 0, "block_deletion": 0, "unreachable": 0, "too_large": 0}))
		})

		It("is Unavailable while one of them cannot be asked (X9)", func() {
			below.closure = store.Closure{Delete: []store.Doomed{doomed("nodes/a", blocking(midUS))}}
			midInUS.blocked = func(*v1.CheckIfResourceIsBlockedRequest) ([]*v1.BlockedAnswer, error) {
				return nil, store.Errorf(store.Unavailable, "", "connection refused")
			}
			Expect(write(del("nodes/a"))).To(And(haveCode(store.Unavailable), MatchError(ContainSubstring("mid.example.com/us"))))
			midInUS.blocked = func(*v1.CheckIfResourceIsBlockedRequest) ([]*v1.BlockedAnswer, error) {
				return nil, &mixin.Refusal{Err: store.Errorf(store.FailedPrecondition, "", "not my version"), Reason: mixin.ReasonVersionMismatch}
			}
			Expect(write(del("nodes/a"))).To(haveCode(store.Unavailable), "it has not answered (X37)")
			midInUS.blocked = func(*v1.CheckIfResourceIsBlockedRequest) ([]*v1.BlockedAnswer, error) { return nil, nil }
			Expect(write(del("nodes/a"))).To(haveCode(store.Unavailable), "nor is this an answer")
			below.closure = store.Closure{Delete: []store.Doomed{doomed("nodes/a", blocking(store.Location{Service: midService, Region: "gone"}))}}
			Expect(write(del("nodes/a"))).To(haveCode(store.Unavailable))
			Expect(below.batches).To(BeEmpty())
		})

		It("asks who may have been forgotten, and keeps the shadow for them", func() {
			below.suspects = []store.Location{midUS}
			Expect(write(del("nodes/a"))).To(Succeed())
			Expect(midInUS.asked).To(HaveLen(1))
			Expect(*below.last()["nodes/a"].Constraint).To(Equal(store.Constraint{UUID: "uuid of nodes/a", Epoch: 5, Asked: []store.Location{midUS}, Attempt: 3, Tell: true}))
		})

		It("is planned again when something has changed (X6)", func() {
			below.closure = store.Closure{Delete: []store.Doomed{doomed("nodes/a", blocking(midUS))}}
			below.errs = []error{changed}
			Expect(write(del("nodes/a"))).To(Succeed())
			Expect(midInUS.asked).To(HaveLen(2))
			Expect(below.batches).To(HaveLen(2))
			below.errs = []error{changed}
			below.onWrite = func() {
				below.closure.Blockers = []store.Blocker{{Target: "nodes/a", Location: midUS, Referrer: "nodes/x", TentativeUntil: time.Unix(2_000_000_000, 0)}}
			}
			Expect(write(del("nodes/a"))).To(And(haveCode(store.FailedPrecondition), MatchError(And(ContainSubstring("nodes/x"), ContainSubstring("2033-05-18")))))
		})

		It("names ten blockers and counts the others", func() {
			for i := range 51 {
				below.closure.Blockers = append(below.closure.Blockers, store.Blocker{Target: "nodes/a", Referrer: fmt.Sprintf("nodes/%02d", i), Field: "block"})
			}
			err := write(del("nodes/a"))
			Expect(err).To(haveCode(store.FailedPrecondition))
			Expect(err).To(MatchError(And(HavePrefix("nodes/a: is referenced by nodes/00 (field block), nodes/01"), ContainSubstring("nodes/09 (field block) and 41 more: delete them first"))))
		})

		It("says so when it is too large (8.27)", func() {
			below.closure = store.Closure{Delete: []store.Doomed{doomed("nodes/a")}, Truncated: true}
			Expect(write(del("nodes/a"))).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("AsyncCascadeDelete"))))
		})

		It("counts what the same batch saves as it will be (4.3)", func() {
			b := doomed("nodes/b")
			b.Via, b.Depth = store.Incoming{Referrer: "nodes/b", Target: "nodes/a"}, 1
			c := doomed("nodes/b/children/c")
			c.Via, c.Depth = store.Incoming{Referrer: c.Name, Target: "nodes/b"}, 2
			below.closure = store.Closure{
				Delete:   []store.Doomed{doomed("nodes/a"), b, c},
				Unset:    []store.Incoming{{Referrer: "nodes/u", Field: "unset", Target: "nodes/a"}, {Referrer: "nodes/v", Field: "unset", Target: "nodes/b"}},
				Blockers: []store.Blocker{{Target: "nodes/a", Referrer: "nodes/x", Field: "block"}},
			}
			Expect(write(del("nodes/a"), save(store.Update, "nodes/b", `{}`), save(store.Update, "nodes/u", `{}`), save(store.Update, "nodes/x", `{"block":"nodes/z"}`))).To(Succeed())
			Expect(slices.Sorted(maps.Keys(below.last()))).To(Equal([]string{"nodes/a", "nodes/b", "nodes/u", "nodes/x"}))
			for _, still := range []store.Write{save(store.Update, "nodes/b", `{"cascade":"nodes/a"}`), save(store.Update, "nodes/u", `{"unset":"nodes/a"}`), save(store.Update, "nodes/x", `{"block":"nodes/a"}`)} {
				Expect(write(del("nodes/a"), still)).To(And(haveCode(store.FailedPrecondition), MatchError(ContainSubstring("same transaction deletes"))), still.Name)
			}
		})

		It("clears what refers to it, and leaves the rest of it alone (F49)", func() {
			below.closure = store.Closure{Delete: []store.Doomed{doomed("nodes/a")}, Unset: []store.Incoming{
				{Referrer: "nodes/u", Field: "unset", Target: "nodes/a"}, {Referrer: "nodes/u", Field: "unsets[]", Target: "nodes/a"}, {Referrer: "nodes/u", Field: "parts[].node", Target: "nodes/a"}}}
			below.rows["nodes/u"] = &store.Resource{Name: "nodes/u", Type: "Node", Version: store.Version{Epoch: 1, Number: 9}, OwningRegion: "eu", Regions: []string{"eu"},
				Meta: store.Meta{Tags: []string{"t"}}, Body: body(`{"unset":"nodes/a","unsets":["nodes/a","nodes/b","nodes/a"],"parts":[{"node":"nodes/a","n":12345678901234567890}],"soft":"projects/p/secrets/1"}`)}
			below.outgoing["nodes/u"] = []store.Reference{{Field: "soft", Behavior: store.AsyncUnset, At: lowUS, Target: "projects/p/secrets/1"}}
			Expect(write(del("nodes/a"))).To(Succeed())
			w := below.last()["nodes/u"]
			Expect(w.Body).To(MatchJSON(`{"unsets":["nodes/b"],"parts":[{"n":12345678901234567890}],"soft":"projects/p/secrets/1"}`))
			Expect(w.Op).To(Equal(store.Update))
			Expect(w.Meta.Tags).To(Equal([]string{"t"}))
			Expect(w.IfVersion).To(Equal(store.Version{Epoch: 1, Number: 9}))
			Expect(w.OwningRegion + fmt.Sprint(w.Regions)).To(Equal("[]"))
			Expect(w.Constraint.Closure).To(BeTrue())
			Expect(w.Constraint.References).To(ConsistOf(
				store.Reference{Field: "unsets[]", Behavior: store.Unset, Target: "nodes/b"},
				store.Reference{Field: "soft", Behavior: store.AsyncUnset, At: lowUS, Target: "projects/p/secrets/1"}))
			Expect(low.established).To(BeEmpty())
			Expect(lowInUS.established).To(BeEmpty())
		})
	})

	Describe("planning a deletion", func() {
		It("gathers what each Deployment says, and who could not be asked", func() {
			below.rows["nodes/a"] = &store.Resource{Name: "nodes/a", Type: "Node", OwningRegion: "eu"}
			below.closure = store.Closure{
				Delete:   []store.Doomed{{Name: "nodes/a", Type: "Node", Sources: []store.Source{{Location: midUS, Blocking: true}, {Location: lowUS, Subscriber: true}, {Location: lowEU, Ownee: true}}}},
				Unset:    []store.Incoming{{Referrer: "nodes/u", Type: "Node", Field: "unset", Target: "nodes/a"}},
				Blockers: []store.Blocker{{Target: "nodes/a", Referrer: "nodes/x", Field: "block"}},
			}
			midInUS.plan = func(req *v1.PlanDeletionRequest) (*v1.PlanDeletionResponse, error) {
				Expect(req.GetTargets()).To(Equal([]string{"nodes/a"}))
				return &v1.PlanDeletionResponse{
					Deletes:  []*v1.Planned{{Name: "regions/us/sites/s", Type: "Site", Field: "near", Target: "nodes/a", Asynchronous: true}},
					Blockers: []*v1.DeletionBlocker{{Referrer: "regions/us/sites/b", Target: "nodes/a"}},
				}, nil
			}
			lowInUS.plan = func(*v1.PlanDeletionRequest) (*v1.PlanDeletionResponse, error) {
				return nil, store.Errorf(store.Unavailable, "", "connection refused")
			}
			p, err := s.PlanDelete(GinkgoTB().Context(), "nodes/a")
			Expect(err).NotTo(HaveOccurred())
			Expect(p.Deployments).To(HaveLen(2))
			Expect(p.Deployments[0].Location).To(Equal(midEU))
			Expect(p.Deployments[0].Deleted).To(ConsistOf(constraint.PlannedChange{Name: "nodes/a", Type: "Node"}))
			Expect(p.Deployments[0].Cleared).To(ConsistOf(constraint.PlannedChange{Name: "nodes/u", Type: "Node", Field: "unset", Target: "nodes/a"}))
			Expect(p.Deployments[1].Location).To(Equal(midUS))
			Expect(p.Deployments[1].Deletes).To(Equal(1))
			Expect(p.Blockers).To(ConsistOf(HaveField("Location", midEU), And(HaveField("Location", midUS), HaveField("Referrer", "regions/us/sites/b"))))
			Expect(p.Unasked).To(ConsistOf(And(HaveField("Location", lowUS), HaveField("Names", 1), HaveField("Err", haveCode(store.Unavailable)))))
			Expect(p.Ownees).To(ConsistOf(lowEU))
			Expect(below.batches).To(BeEmpty())
			Expect(below.begun).To(BeEmpty())
		})
	})
})

// refusals are the refused deletions by reason.
func refusals(metrics *prometheus.Registry) map[string]float64 {
	GinkgoHelper()
	families, err := metrics.Gather()
	Expect(err).NotTo(HaveOccurred())
	out := map[string]float64{}
	for _, f := range families {
		if f.GetName() == "dbcontroller_deletes_blocked_total" {
			for _, m := range f.GetMetric() {
				out[m.GetLabel()[1].GetValue()] = m.GetCounter().GetValue() // labels are sorted: db_service, reason, target_region
			}
		}
	}
	return out
}
