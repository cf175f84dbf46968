package constraint

import (
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// unconfirmed gives a resource a new reference to each location.
func (w *fakeWorld) unconfirmed(name string, b store.Behavior, locations ...store.Location) {
	w.core.put(name, func(sh *store.Shadow) {
		for _, at := range locations {
			sh.Unconfirmed[len(sh.References)] = true
			sh.References = append(sh.References, store.Reference{Field: "secret", Behavior: b, At: at, Target: "secrets/s"})
		}
		sh.Tasks |= store.ConfirmBlockades
	})
}

func TestConfirmsCommittedReferencesOnceAtEachDeployment(t *testing.T) { // F61, X2, F75
	inBubble(t, func(w *fakeWorld) {
		w.unconfirmed("apps/before", store.Block, lowEU, lowUS) // the process that wrote it is gone
		w.start()
		w.pass(time.Second)
		w.unconfirmed("apps/after", store.Cascade, lowEU)
		w.pass(time.Second)
		for _, name := range []string{"apps/before", "apps/after"} {
			if sh := w.core.get(name); sh.Tasks != 0 || len(sh.Unconfirmed) != 0 {
				t.Errorf("%s: tasks %v, unconfirmed %v", name, sh.Tasks.Strings(), sh.Unconfirmed)
			}
		}
		p := w.peers.at(lowEU)
		w.want(len(p.confirmed) == 2 && len(w.peers.at(lowUS).confirmed) == 1, "%d and %d calls, want one for each resource and Deployment", len(p.confirmed), len(w.peers.at(lowUS).confirmed))
		first, second := p.confirmed[0].GetReferences()[0], p.confirmed[1].GetReferences()[0]
		w.want(first.GetReferrer() == "apps/before" && first.GetName() == "secrets/s" && first.GetBlocking() && !first.GetSubscriber() && first.GetTxId() == "tx of apps/before", "confirmed %v", first)
		w.want(!second.GetBlocking() && second.GetSubscriber(), "confirmed %v", second)
		w.want(w.core.called("ClearTasks") == 0, "the last confirmation takes the task off, not another transaction")
	})
}

func TestReportsADanglingReferenceAndGoesOn(t *testing.T) { // F12, spec 3.2
	inBubble(t, func(w *fakeWorld) {
		w.peers.at(lowEU).missing = []string{"secrets/s"}
		w.unconfirmed("apps/a", store.Block, lowEU)
		w.start()
		w.pass(time.Hour)
		w.want(w.metric("dbcontroller_reference_dangling") == 1, "dangling = %v", w.metric("dbcontroller_reference_dangling"))
		w.want(w.core.get("apps/a").Tasks == 0 && w.peers.at(lowEU).count() == 1, "it is confirmed in spite of that: %d calls", w.peers.at(lowEU).count())
	})
}

func TestADeadDeploymentDelaysOnlyWhatInvolvesIt(t *testing.T) { // I44, F64, P19, P20
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Queue = 200
		low, high := w.peers.at(lowUS), w.peers.at(lowEU)
		low.away = true
		for i := range 500 { // more than its lane takes
			w.unconfirmed(app(i), store.Block, lowUS)
		}
		w.unconfirmed("tools/both", store.Block, lowUS, lowEU)
		w.start()
		w.pass(2 * time.Second)
		for i := 500; i < 1000; i++ {
			w.unconfirmed(app(i), store.Block, lowEU)
		}
		w.pass(time.Second)
		done := 0
		for i := range 1000 {
			if w.core.get(app(i)).Tasks == 0 {
				done++
			}
		}
		w.want(done == 500, "%d done while a Deployment is away, want the 500 of the other one", done)
		w.want(slices.ContainsFunc(high.confirmed, func(r *v1.ConfirmBlockadesRequest) bool {
			return r.GetReferences()[0].GetReferrer() == "tools/both"
		}), "half of the resource with both was not confirmed")
		w.pass(time.Hour)
		if n := low.count(); n > 150 {
			t.Errorf("%d calls of the dead Deployment in an hour", n)
		}
		w.want(len(w.core.notes) > 20, "%d resources say why they wait", len(w.core.notes))
		low.set(func() { low.away = false })
		w.pass(2 * time.Minute)
		for i := range 1000 {
			if sh := w.core.get(app(i)); sh.Tasks != 0 {
				t.Fatalf("%s: %v is left two minutes after the Deployment is back (I14)", app(i), sh.Tasks.Strings())
			}
		}
		w.want(w.core.get("tools/both").Tasks == 0, "the resource with both is not done")
	})
}

func TestSurvivesItsDatabaseBeingAway(t *testing.T) { // I11, I14
	inBubble(t, func(w *fakeWorld) {
		w.core.setFault(errDatabase)
		w.start()
		w.pass(time.Minute)
		w.core.setFault(nil)
		w.unconfirmed("apps/a", store.Block, lowEU)
		w.pass(30 * time.Second)
		w.want(w.core.get("apps/a").Tasks == 0, "not confirmed after the database is back")
	})
}

func TestDoesNothingBeforeTheTopologyIsKnown(t *testing.T) { // I39
	inBubble(t, func(w *fakeWorld) {
		w.reg = registry.New()
		w.peers.reg, w.cfg.Registry = w.reg, w.reg
		w.unconfirmed("apps/a", store.Block, lowEU)
		w.start()
		w.pass(time.Hour)
		w.want(w.core.called("ReadTasks") == 0 && w.peers.at(lowEU).count() == 0, "worked without a topology")
		w.declare(midEU, lowEU)
		w.pass(time.Second)
		w.want(w.core.get("apps/a").Tasks == 0, "not confirmed once the topology is known")
	})
}

// owned gives a resource owners.
func (w *fakeWorld) owned(name string, owners ...store.OwnerReference) {
	w.core.mu.Lock()
	w.core.owners[name] = owners
	w.core.mu.Unlock()
	w.core.put(name, func(sh *store.Shadow) { sh.Tasks |= store.CheckOwners })
}

var site = store.OwnerReference{Kind: highService + "/Site", Version: "v1", Name: "sites/s", Region: "eu", RequiresOwnerReference: true}

func outcome(o v1.ConfirmMetaOwnerResponse_Outcome) func(*v1.ConfirmMetaOwnerRequest) *v1.ConfirmMetaOwnerResponse {
	return func(*v1.ConfirmMetaOwnerRequest) *v1.ConfirmMetaOwnerResponse {
		return &v1.ConfirmMetaOwnerResponse{Outcome: o, Reason: "NOT_FOUND"}
	}
}

const (
	yes      = v1.ConfirmMetaOwnerResponse_OUTCOME_CONFIRMED
	mismatch = v1.ConfirmMetaOwnerResponse_OUTCOME_VERSION_MISMATCH
	no       = v1.ConfirmMetaOwnerResponse_OUTCOME_NOT_CONFIRMED
)

func TestKeepsAnOwnerThatIsCreatedWithinTheGrace(t *testing.T) { // F69, X15
	inBubble(t, func(w *fakeWorld) {
		owner := w.peers.at(highEU)
		owner.owner = outcome(no)
		w.owned("apps/a", site)
		w.start()
		w.pass(9 * time.Minute)
		w.want(strings.Contains(w.core.note("apps/a"), "is not confirmed: NOT_FOUND"), "why = %q", w.core.note("apps/a"))
		asked := owner.count()
		w.want(asked > 8 && asked < 40, "asked %d times in 9 minutes", asked)
		owner.set(func() { owner.owner = outcome(yes) })
		w.pass(time.Hour)
		w.want(w.core.get("apps/a").Tasks == 0, "not cleared")
		w.want(len(w.peers.at(midEU).removed) == 0, "removed %v", w.peers.at(midEU).removed)
	})
}

func TestRemovesAnOwnerThatIsNeverCreated(t *testing.T) { // F69, X16, I20
	inBubble(t, func(w *fakeWorld) {
		w.peers.at(highEU).owner = outcome(no)
		w.owned("apps/a", site)
		w.start()
		w.pass(10 * time.Minute)
		w.want(len(w.peers.at(midEU).removed) == 0, "removed before the grace has passed")
		w.pass(2 * time.Minute)
		removed := w.peers.at(midEU).removed
		w.want(len(removed) == 1 && removed[0].GetOwnee().GetName() == "apps/a" && removed[0].GetOwner()[0].GetName() == "sites/s" &&
			removed[0].GetOwnerRegion() == "eu" && removed[0].GetReason() == "NOT_CONFIRMED", "removed %v", removed)
		w.want(w.core.get("apps/a").Tasks == 0, "not cleared")
	})
}

func TestGraceIsThatOfEachOwner(t *testing.T) { // X15
	inBubble(t, func(w *fakeWorld) {
		late := site
		late.Name = "sites/late"
		w.peers.at(highEU).owner = outcome(no)
		w.owned("apps/a", site)
		w.start()
		w.pass(8 * time.Minute)
		w.owned("apps/a", site, late)
		w.pass(4 * time.Minute)
		for _, r := range w.peers.at(midEU).removed {
			w.want(r.GetOwner()[0].GetName() == "sites/s", "removed %v four minutes after it was added", r.GetOwner())
		}
		w.want(len(w.peers.at(midEU).removed) > 0, "the first owner's grace has passed, too")
		w.pass(8 * time.Minute)
		last := w.peers.at(midEU).removed[len(w.peers.at(midEU).removed)-1]
		w.want(last.GetOwner()[0].GetName() == "sites/late", "removed %v last", last)
	})
}

func TestSilenceRemovesNoOwner(t *testing.T) { // I19, X17
	for name, away := range map[string]func(*fakeWorld, *fakePeer){
		"partition": func(_ *fakeWorld, p *fakePeer) { p.away = true },
		"refusal": func(_ *fakeWorld, p *fakePeer) {
			p.refuse = store.Errorf(store.FailedPrecondition, "", "version v9 is not known here")
		},
		"disabled": func(w *fakeWorld, _ *fakePeer) { w.declareWith([]store.Location{highEU}, midEU, lowEU) },
		"removed":  func(w *fakeWorld, _ *fakePeer) { w.declare(midEU, lowEU) },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(w *fakeWorld) {
				owner := w.peers.at(highEU)
				owner.owner = outcome(no)
				away(w, owner)
				w.owned("apps/a", site)
				w.start()
				w.pass(12 * time.Hour)
				w.want(len(w.peers.at(midEU).removed) == 0, "removed after hours of silence")
				owner.set(func() { owner.away, owner.refuse = false, nil })
				w.declare(midEU, lowEU, highEU)
				w.pass(9 * time.Minute)
				w.want(len(w.peers.at(midEU).removed) == 0, "the silence counts as grace")
				owner.set(func() { owner.owner = outcome(yes) })
				w.pass(time.Hour)
				w.want(w.core.get("apps/a").Tasks == 0 && len(w.peers.at(midEU).removed) == 0, "not confirmed in the end")
			})
		})
	}
}

func TestUpgradesAnOwnerReferenceInAnOldVersion(t *testing.T) { // F69, spec 3.6, I19
	inBubble(t, func(w *fakeWorld) {
		w.peers.at(highEU).owner = func(req *v1.ConfirmMetaOwnerRequest) *v1.ConfirmMetaOwnerResponse {
			if req.GetOwner().GetVersion() == "v2" {
				return &v1.ConfirmMetaOwnerResponse{Outcome: yes}
			}
			return &v1.ConfirmMetaOwnerResponse{Outcome: mismatch, Current: &v1.Spelling{Version: "v2", Name: "places/s"}}
		}
		w.owned("apps/a", site)
		w.start()
		w.pass(time.Second)
		up := w.peers.at(midEU).upgraded
		w.want(len(up) == 1 && up[0].GetFrom().GetName() == "sites/s" && up[0].GetTo().GetName() == "places/s" && up[0].GetTo().GetVersion() == "v2", "upgraded %v", up)
		w.want(w.core.get("apps/a").Tasks == 0 && len(w.peers.at(midEU).removed) == 0, "not cleared")
	})
}

func metaOwnee(name, version, owner string, required bool) *v1.MetaOwnee {
	return &v1.MetaOwnee{Kind: highService + "/Site", Ownee: &v1.Spelling{Version: "v1", Name: name}, Reference: &v1.OwnerReference{
		Kind: midService + "/App", Version: version, Name: owner, Region: "eu", RequiresOwnerReference: required,
	}}
}

func TestChecksOwneesOfAnOwnerThatDropsAReference(t *testing.T) { // F70, F73, X18, I21, spec 8.30
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Page = 2
		p := w.peers.at(lowEU)
		p.ownees = []*v1.MetaOwnee{
			metaOwnee("secrets/a", "v1", "apps/a", true),      // still referred to
			metaOwnee("secrets/b", "v1", "apps/a", true),      // not any more
			metaOwnee("secrets/c", "v1", "apps/a", false),     // needs no reference
			metaOwnee("secrets/d", "v2", "programs/a", false), // written by another version
			metaOwnee("secrets/e", "v2", "programs/a", true),  // that, and not referred to
		}
		drop := func() {
			w.core.put("apps/a", func(sh *store.Shadow) {
				sh.References = []store.Reference{{Field: "secret", At: lowEU, Target: "secrets/a"}}
				sh.Sources = []store.Source{{Location: lowEU, Ownee: true}, {Location: lowUS, Subscriber: true}}
				sh.Tasks |= store.CheckOwnees
			})
		}
		drop()
		w.start()
		for range 25 { // a hot owner
			w.pass(time.Second)
			drop()
		}
		w.want(p.count() == 0, "asked before the debounce has passed")
		w.pass(10 * time.Second)
		var removed []string
		for _, r := range p.removed {
			removed = append(removed, r.GetOwnee().GetName())
			w.want(len(r.GetOwner()) == 2 && r.GetReason() == "NO_SCHEMA_REFERENCE", "removed %v", r)
		}
		w.want(slices.Equal(removed, []string{"secrets/b", "secrets/e"}), "removed %v", removed)
		w.want(len(p.upgraded) == 1 && p.upgraded[0].GetOwnee().GetName() == "secrets/d" && p.upgraded[0].GetTo().GetVersion() == "v1" &&
			p.upgraded[0].GetTo().GetName() == "apps/a", "upgraded %v", p.upgraded)
		w.want(p.count() < 10, "%d calls for 26 saves: want those of one round", p.count())
		w.want(w.core.get("apps/a").Tasks == 0, "not cleared")
		w.want(w.peers.at(lowUS).count() == 0, "asked a location without ownees")
	})
}

func TestRetriesARefusedDeletionUntilItSucceeds(t *testing.T) { // F67, I17, X12
	inBubble(t, func(w *fakeWorld) {
		w.core.block("apps/a", refused("apps/a"))
		w.core.put("apps/a", func(sh *store.Shadow) { sh.Tasks = store.PendingDelete })
		w.start()
		w.pass(time.Hour)
		n := w.core.called("BatchWrite")
		w.want(n >= 15 && n <= 40, "%d tries in an hour, want 5 s doubling to 5 min", n)
		w.want(strings.Contains(w.core.note("apps/a"), "something refers to it"), "why = %q", w.core.note("apps/a"))
		w.core.block("apps/a", nil)
		w.pass(5 * time.Minute)
		w.want(w.core.get("apps/a") == nil, "not deleted once nothing blocks it")
	})
}

func TestADeletionThatAsksADeadDeploymentDelaysNoOther(t *testing.T) { // I44
	inBubble(t, func(w *fakeWorld) {
		for i := range 100 {
			w.core.block(app(i), errAway)
			w.core.put(app(i), func(sh *store.Shadow) {
				sh.Tasks, sh.Sources = store.PendingDelete, []store.Source{{Location: highEU, Blocking: true}}
			})
		}
		w.core.put("tools/free", func(sh *store.Shadow) { sh.Tasks = store.PendingDelete })
		w.start()
		w.pass(time.Second)
		w.want(w.core.get("tools/free") == nil, "the other one was not deleted")
		w.pass(time.Hour)
		w.want(w.core.called("BatchWrite") < 160, "%d tries in an hour", w.core.called("BatchWrite"))
	})
}

func (w *fakeWorld) blockade(name string, at store.Location, expires time.Duration) {
	w.core.put(name, func(sh *store.Shadow) {
		if !slices.ContainsFunc(sh.Sources, func(source store.Source) bool { return source.Location == at }) {
			sh.Sources = append(sh.Sources, store.Source{Location: at, Blocking: true, Subscriber: true})
		}
	})
	w.core.mu.Lock()
	defer w.core.mu.Unlock()
	w.core.blockades = append(w.core.blockades, store.Blockade{Name: name, Location: at, Referrer: "sites/s", TxID: "tx", ExpireTime: time.Now().Add(expires)})
}

func TestAsksBeforeItForgetsAnExpiredBlockade(t *testing.T) { // F62, X1, I15, spec 8.6
	inBubble(t, func(w *fakeWorld) {
		w.peers.at(highEU).blocked = func(req *v1.CheckIfResourceIsBlockedRequest) *v1.BlockedAnswer {
			return &v1.BlockedAnswer{HasAnyReference: req.GetTargets()[0].GetName() == "spelled/apps/used"}
		}
		w.blockade("apps/crashed", highEU, 5*time.Minute)
		w.blockade("apps/used", highEU, 5*time.Minute)
		w.blockade("apps/unspoken", midUS, 5*time.Minute)
		w.blockade("apps/ownee", highEU, 5*time.Minute)
		w.core.put("apps/ownee", func(sh *store.Shadow) { sh.Sources[0].Ownee = true })
		w.peers.inexpressible[midUS] = true
		w.start()
		w.pass(5*time.Minute - time.Second)
		w.want(w.peers.at(highEU).count() == 0, "asked while it is not expired")
		w.pass(15 * time.Second)
		w.want(len(w.core.blockades) == 0, "left: %v", w.core.blockades)
		for name, want := range map[string][]store.Source{
			"apps/crashed": nil, "apps/unspoken": nil, "apps/used": {{Location: highEU, Blocking: true, Subscriber: true}}, "apps/ownee": {{Location: highEU, Ownee: true}},
		} {
			if got := w.core.get(name).Sources; !slices.Equal(got, want) {
				t.Errorf("sources of %s = %v, want %v", name, got, want)
			}
		}
		q := w.peers.at(highEU).questions[0]
		w.want(q.GetRowVersion() == 1 && q.GetEpoch() == 1, "asked %v: want the attempt's version", q)
	})
}

func TestAnExpiredBlockadeOfADeadDeploymentIsKept(t *testing.T) { // F62, I44
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Page = 5
		dead := w.peers.at(highEU)
		dead.away = true
		for i := range 20 { // more than one page, and older
			w.blockade(app(i), highEU, time.Minute)
		}
		w.blockade("tools/t", midUS, 2*time.Minute)
		w.start()
		w.pass(10 * time.Minute)
		w.want(slices.Equal(w.core.dropped, []string{"tools/t"}), "dropped %v", w.core.dropped)
		w.want(w.metric("dbcontroller_reference_expired_blockades") > 0 && w.metric("dbcontroller_reference_blockades") > 0, "not in the metrics")
		dead.set(func() { dead.away = false })
		w.pass(3 * time.Minute)
		w.want(len(w.core.blockades) == 0, "%d left after the Deployment is back", len(w.core.blockades))
	})
}

func (w *fakeWorld) deleted(name string, sources ...store.Source) {
	w.core.put(name, func(sh *store.Shadow) { sh.State, sh.Sources, sh.TaskTime = store.ShadowDeleting, sources, time.Now() })
}

func TestWaitsForSubscribersBeforeANameIsFree(t *testing.T) { // F63, F16, I6, I16
	inBubble(t, func(w *fakeWorld) {
		high, us := w.peers.at(highEU), w.peers.at(midUS)
		high.left = 7
		w.peers.inexpressible[midUS] = true
		w.deleted("apps/a", store.Source{Location: highEU, Subscriber: true}, store.Source{Location: midUS, Subscriber: true}, store.Source{Location: nowhere, Blocking: true})
		w.start()
		w.pass(10 * time.Minute)
		w.want(w.core.get("apps/a") != nil, "finished while there are references")
		w.want(high.count() > 10 && high.count() < 40, "polled %d times in 10 minutes", high.count())
		w.want(us.count() == 0, "asked who cannot know the name")
		w.want(strings.Contains(w.core.note("apps/a"), "7 references at high.example.com/eu"), "why = %q", w.core.note("apps/a"))
		w.want(w.metric("dbcontroller_cascade_pending_rows") == 1 && w.metric("dbcontroller_cascade_oldest_seconds") >= 600, "metrics")
		q := high.questions[0]
		w.want(q.GetName() == "spelled/apps/a" && q.GetRowVersion() == 1<<63-1 && q.GetUuid() == "uuid of apps/a" && q.GetEpoch() == 1, "asked %v", q)
		high.set(func() { high.left = 0 })
		w.pass(time.Minute)
		w.want(slices.Equal(w.core.finished, []string{"apps/a"}), "finished %v", w.core.finished)
		w.want(w.metric("dbcontroller_cascade_pending_rows") == 0, "metrics after the end")
	})
}

func TestRelievesOwneesOfADeletedOwner(t *testing.T) { // F71, I18
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Page = 2
		own, low := w.peers.at(midEU), w.peers.at(lowEU)
		for _, name := range []string{"secrets/a", "secrets/b", "secrets/c"} {
			low.ownees = append(low.ownees, metaOwnee(name, "v1", "apps/a", false))
		}
		own.ownees = []*v1.MetaOwnee{metaOwnee("tools/t", "v2", "programs/a", true)}
		w.deleted("apps/a", store.Source{Location: lowEU, Ownee: true}, store.Source{Location: midEU, Ownee: true})
		w.start()
		w.pass(time.Second)
		w.want(len(low.removed) == 3 && len(own.removed) == 1, "removed %d and %d", len(low.removed), len(own.removed))
		w.want(low.removed[0].GetReason() == "OWNER_DELETED" && len(low.removed[0].GetOwner()) == 2, "removed %v", low.removed[0])
		w.want(len(w.core.finished) == 1, "not finished")
	})
}

func TestADeadSubscriberDelaysOnlyItsDeletions(t *testing.T) { // X10, I44, spec 4.5
	inBubble(t, func(w *fakeWorld) {
		high, low := w.peers.at(highEU), w.peers.at(lowEU)
		high.away = true
		low.ownees = []*v1.MetaOwnee{metaOwnee("secrets/a", "v1", "apps/00000", false)}
		for i := range 100 {
			w.deleted(app(i), store.Source{Location: highEU, Subscriber: true}, store.Source{Location: lowEU, Ownee: true})
		}
		w.deleted("tools/free", store.Source{Location: midUS, Subscriber: true})
		w.start()
		w.pass(time.Second)
		w.want(slices.Equal(w.core.finished, []string{"tools/free"}), "finished %v", w.core.finished)
		w.want(len(low.removed) == 1, "the ownees elsewhere were not relieved")
		w.declareWith([]store.Location{highEU}, midEU, midUS, lowEU, lowUS) // disabled is not removed
		w.pass(12 * time.Hour)
		w.want(len(w.core.finished) == 1, "finished %d without the subscriber", len(w.core.finished))
		w.declare(midEU, midUS, lowEU, lowUS, highEU)
		high.set(func() { high.away = false })
		w.pass(2 * time.Minute)
		w.want(len(w.core.finished) == 101, "finished %d after the subscriber is back", len(w.core.finished))
	})
}

func TestARemovedDeploymentIsForgottenAfterAGrace(t *testing.T) { // X35, spec 8.20
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Page = 10
		w.deleted("apps/a", store.Source{Location: highEU, Subscriber: true, Ownee: true})
		for i := range 35 {
			w.core.put(app(i), func(sh *store.Shadow) {
				sh.Sources = []store.Source{{Location: highEU, Blocking: true, Ownee: true}, {Location: lowEU, Ownee: true}}
			})
		}
		w.unconfirmed("tools/t", store.Block, lowUS)
		w.peers.at(highEU).away, w.peers.at(lowUS).away = true, true
		w.start()
		w.pass(time.Hour)
		w.declare(midEU, midUS, lowEU)
		w.pass(9 * time.Minute)
		w.declare(midEU, midUS, lowEU, highEU, lowUS) // it was a mistake
		w.pass(time.Hour)
		w.want(len(w.core.finished) == 0 && len(w.core.get(app(0)).Sources) == 2, "forgotten though it has come back")
		w.declare(midEU, midUS, lowEU)
		w.pass(12 * time.Minute)
		w.want(slices.Equal(w.core.finished, []string{"apps/a"}), "finished %v", w.core.finished)
		for i := range 35 {
			if got := w.core.get(app(i)).Sources; len(got) != 1 || got[0].Location != lowEU {
				t.Fatalf("sources of %s = %v", app(i), got)
			}
		}
		w.want(w.core.get("tools/t").Tasks == 0, "still waits for a Deployment that is gone")
	})
}

func TestARemovalWhileNoProcessRanIsFound(t *testing.T) { // X35
	inBubble(t, func(w *fakeWorld) {
		w.core.put("apps/a", func(sh *store.Shadow) { sh.Sources = []store.Source{{Location: nowhere, Blocking: true}} })
		w.start()
		w.pass(30 * time.Minute)
		w.want(len(w.core.get("apps/a").Sources) == 0, "sources = %v", w.core.get("apps/a").Sources)
	})
}

func TestADeletionEndsWhenTheServiceAllowsIt(t *testing.T) { // X39
	inBubble(t, func(w *fakeWorld) {
		w.deleted("apps/a")
		w.core.put("apps/a", func(sh *store.Shadow) { sh.BlockDeletion = true })
		w.start()
		w.pass(time.Hour)
		w.want(len(w.core.finished) == 0 && strings.Contains(w.core.note("apps/a"), "the service itself"), "finished, or why = %q", w.core.note("apps/a"))
		w.core.put("apps/a", func(sh *store.Shadow) { sh.BlockDeletion = false })
		w.pass(time.Second)
		w.want(len(w.core.finished) == 1, "not finished at once")
	})
}

func TestSuspectsCountAsSubscribers(t *testing.T) { // contract: owner failover; R4
	inBubble(t, func(w *fakeWorld) {
		w.core.suspects = []store.Location{highEU}
		high := w.peers.at(highEU)
		high.left = 1
		w.deleted("apps/a") // its sources were lost
		w.start()
		w.pass(time.Minute)
		w.want(len(w.core.finished) == 0, "finished without asking who may have references")
		high.set(func() { high.left = 0 })
		w.pass(2 * time.Minute)
		w.want(len(w.core.finished) == 1, "not finished")
	})
}

func TestFollowsTheDeletionsOfInterestingDeployments(t *testing.T) { // F58, F59, F74, I40
	inBubble(t, func(w *fakeWorld) {
		w.declare(midEU, lowEU, highEU)
		w.start()
		w.pass(time.Second)
		open := func() (all []string) {
			for _, at := range []store.Location{midEU, midUS, lowEU, lowUS, highEU} {
				for _, req := range w.peers.at(at).watches() {
					w.want(req.GetShardsFrom() == 0 && req.GetShardsTo() == fakeRing, "shards of %v", req)
					all = append(all, at.String())
				}
			}
			return all
		}
		want := func(when string, want ...store.Location) {
			t.Helper()
			var names []string
			for _, at := range want {
				names = append(names, at.String())
			}
			if got := open(); !slices.Equal(got, names) {
				t.Errorf("%s: follows %v, want %v", when, got, names)
			}
		}
		want("at the start: the imports and nobody for meta references, itself from its own database", lowEU)
		w.declare(midEU, midUS, lowEU, lowUS, highEU)
		w.pass(time.Second)
		want("with another region", midUS, lowEU, lowUS)
		w.declareWith([]store.Location{lowUS}, midEU, midUS, lowEU, highEU)
		w.pass(time.Second)
		want("with a disabled one", midUS, lowEU)
		w.declare(midEU, lowEU)
		w.pass(time.Second)
		want("after a removal", lowEU)
		w.want(len(w.peers.at(lowEU).opened) == 1, "%d streams were opened to the one that stayed", len(w.peers.at(lowEU).opened))
		w.core.refer("apps/a", "secret", "secrets/s", lowEU, store.AsyncCascade)
		w.peers.at(lowEU).delete("secrets/s")
		w.pass(time.Second)
		w.want(w.core.get("apps/a") == nil, "the deletion was not handled (I40)")
	})
}

func TestHandlesReferrersOfForeignDeletions(t *testing.T) { // F64, F65, F66, F22, X10
	inBubble(t, func(w *fakeWorld) {
		low := w.peers.at(lowEU)
		w.core.refer("apps/cascade", "secret", "secrets/s", lowEU, store.Cascade)
		w.core.refer("apps/unset", "secret", "secrets/s", lowEU, store.AsyncUnset)
		w.core.refer("apps/unset", "spare", "secrets/s", lowEU, store.Unset)
		w.core.refer("apps/other", "secret", "secrets/other", lowEU, store.Cascade)
		low.delete("secrets/s") // while we are away
		w.start()
		w.pass(time.Second)
		w.want(w.core.get("apps/cascade") == nil && w.core.get("apps/other") != nil, "cascade")
		w.want(w.core.bodies["apps/unset"] == "{}", "unset = %s", w.core.bodies["apps/unset"])
		w.want(w.metric("dbcontroller_reference_handled_total", "action=unset") == 1 && w.metric("dbcontroller_reference_handled_total", "action=delete") == 1, "metrics")

		low.delete("") // the stream breaks, and resumes
		w.pass(20 * time.Second)
		w.core.refer("apps/cascade", "secret", "secrets/t", lowEU, store.Cascade)
		low.delete("secrets/t")
		w.pass(time.Second)
		w.want(w.core.get("apps/cascade") == nil, "cascade after the stream broke")
		w.want(low.opened[len(low.opened)-1].GetResumeToken() == "token", "the stream did not resume")
	})
}

func TestHandlesLocalReferrersOfOwnDeletions(t *testing.T) { // F64: self, F65, F66
	inBubble(t, func(w *fakeWorld) {
		self := store.Location{}
		w.start()
		w.core.refer("apps/cascade", "tool", "tools/t", self, store.AsyncCascade)
		w.core.refer("apps/unset", "tool", "tools/t", self, store.AsyncUnset)
		w.deleted("tools/t")
		w.pass(time.Second)
		w.want(slices.Equal(w.core.finished, []string{"tools/t"}), "finished %v at once, without a poll in between", w.core.finished)
		w.want(w.core.get("apps/cascade") == nil && w.core.bodies["apps/unset"] == "{}", "not handled")
		w.want(len(w.peers.at(midEU).opened) == 0, "follows itself over the network")
	})
}

func TestABlockedCascadeIsDeferredAndTheRestGoesOn(t *testing.T) { // F67, X12, X11
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Page = 40
		for i := range 300 {
			w.core.refer(app(i), "secret", "secrets/s", lowEU, store.Cascade)
		}
		for _, i := range []int{3, 77, 299} {
			w.core.block(app(i), refused(app(i)))
		}
		w.start()
		w.peers.at(lowEU).delete("secrets/s")
		w.pass(2 * time.Second)
		w.want(w.core.left(lowEU, "secrets/s") == 3, "%d left, want the three that are blocked", w.core.left(lowEU, "secrets/s"))
		for _, i := range []int{3, 77, 299} {
			w.want(w.core.get(app(i)).Tasks == store.PendingDelete, "%s is not pending", app(i))
		}
		w.want(w.metric("dbcontroller_reference_handled_total", "action=defer") == 3, "metrics")
		w.core.mu.Lock()
		clear(w.core.blocked)
		w.core.mu.Unlock()
		w.pass(5 * time.Minute)
		w.want(w.core.left(lowEU, "secrets/s") == 0, "not deleted once nothing blocks them")
	})
}

func TestAReferrerThatCannotBeChangedHidesNoOther(t *testing.T) { // R10
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Page = 10
		for i := range 100 {
			w.core.refer(app(i), "secret", "secrets/s", lowEU, store.Unset)
			if i < 25 { // the first pages
				w.core.block(app(i), refused(app(i)))
			}
		}
		w.start()
		w.peers.at(lowEU).delete("secrets/s")
		w.pass(10 * time.Minute)
		w.want(w.core.left(lowEU, "secrets/s") == 25, "%d left, want 25", w.core.left(lowEU, "secrets/s"))
		w.core.mu.Lock()
		clear(w.core.blocked)
		w.core.mu.Unlock()
		w.pass(2 * time.Minute)
		w.want(w.core.left(lowEU, "secrets/s") == 0, "%d left", w.core.left(lowEU, "secrets/s"))
	})
}

func TestACrashInTheMiddleOfACascadeIsResumed(t *testing.T) { // X11, X40, F75, R10
	inBubble(t, func(w *fakeWorld) {
		const n = 2000
		w.cfg.Page = 100
		for i := range n {
			w.core.refer(app(i), "secret", "secrets/s", lowEU, store.AsyncCascade)
		}
		w.core.lastWrite = 7
		w.start()
		w.peers.at(lowEU).delete("secrets/s")
		w.pass(time.Second)
		w.stop()
		left := w.core.left(lowEU, "secrets/s")
		w.want(left == n-700, "%d left at the crash", left)
		w.core.setFault(nil)
		w.start()
		w.pass(5 * time.Second)
		w.want(w.core.left(lowEU, "secrets/s") == 0, "%d of %d left", w.core.left(lowEU, "secrets/s"), n)
		w.want(w.core.maxPage <= 100, "%d referrers in memory, want a page", w.core.maxPage)
	})
}

func TestManyDeletionsOfOneDeploymentHoldUpOnlyItsStream(t *testing.T) { // F64, I44, P19
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Queue = 10
		w.core.setFault(nil)
		for i := range 60 {
			w.core.refer(app(i), "secret", app(i)+"s", lowEU, store.Unset)
			w.core.block(app(i), refused(app(i)))
		}
		w.start()
		for i := range 60 {
			w.peers.at(lowEU).delete(app(i) + "s")
		}
		w.pass(time.Minute)
		w.core.refer("tools/t", "secret", "secrets/s", lowUS, store.Cascade)
		w.peers.at(lowUS).delete("secrets/s")
		w.pass(time.Second)
		w.want(w.core.get("tools/t") == nil, "the other Deployment's deletion waits")
		w.want(w.metric("dbcontroller_reference_pending_tasks", "kind=handle") <= 10, "%v jobs in memory", w.metric("dbcontroller_reference_pending_tasks", "kind=handle"))
		w.core.mu.Lock()
		clear(w.core.blocked)
		w.core.mu.Unlock()
		w.pass(5 * time.Minute)
		for i := range 60 {
			w.want(w.core.left(lowEU, app(i)+"s") == 0, "%s is left", app(i))
		}
	})
}

func TestWhatWasMissedIsFoundByReadingEverythingAgain(t *testing.T) { // spec 8.19
	inBubble(t, func(w *fakeWorld) {
		w.start()
		w.peers.at(lowEU).delete("secrets/s")
		w.pass(time.Second) // handled: there is nothing
		w.core.refer("apps/late", "secret", "secrets/s", lowEU, store.Cascade)
		w.pass(11 * time.Minute)
		w.want(w.core.get("apps/late") == nil, "a referrer that came up late is never handled")
	})
}

func TestSweepsAfterTheEpochOfAnotherDeploymentRises(t *testing.T) { // contract: owner failover; R3, R4
	inBubble(t, func(w *fakeWorld) {
		w.cfg.Page = 100
		low := w.peers.at(lowEU)
		for i := range 250 {
			w.core.outgoing[lowEU] = append(w.core.outgoing[lowEU], store.Confirmed{Referrer: app(i), Name: "secrets/s", Blocking: true})
		}
		w.start()
		w.pass(time.Hour)
		w.want(len(low.confirmed) == 0, "swept in the first epoch")
		low.set(func() { low.epoch = 7 })
		w.pass(15 * time.Second)
		total := 0
		for i, req := range low.confirmed {
			total += len(req.GetReferences())
			want := int64(0)
			if i == len(low.confirmed)-1 {
				want = 7
			}
			w.want(req.GetCompleteEpoch() == want, "call %d of %d: complete epoch %d", i+1, len(low.confirmed), req.GetCompleteEpoch())
			w.want(req.GetReferences()[0].GetTxId() == "", "a sweep removes no blockade")
		}
		w.want(total == 250 && len(low.confirmed) == 3, "%d references in %d calls", total, len(low.confirmed))
		w.want(w.core.called("BeginSweep") == 1, "grants of the old epoch were voided %d times, want once, before the first page", w.core.called("BeginSweep"))
		w.pass(time.Hour)
		w.want(len(low.confirmed) == 3, "swept again without need")

		low.set(func() { low.epoch, low.away = 8, true })
		w.core.outgoing[lowEU] = nil
		w.pass(time.Hour)
		low.set(func() { low.epoch, low.away = 9, false })
		w.pass(15 * time.Minute)
		last := low.confirmed[len(low.confirmed)-1]
		w.want(last.GetCompleteEpoch() == 9 && len(last.GetReferences()) == 0, "last %v: want an empty sweep of the newest epoch", last)
	})
}

func TestASweepThatFindsATargetLostReportsIt(t *testing.T) {
	inBubble(t, func(w *fakeWorld) {
		low := w.peers.at(lowEU)
		low.epoch, low.missing = 2, []string{"secrets/lost", "secrets/gone"} // the second referrer has gone meanwhile
		w.core.outgoing[lowEU] = []store.Confirmed{{Referrer: "apps/a", Name: "secrets/lost", Blocking: true}}
		w.start()
		w.pass(10 * time.Minute)
		w.want(w.metric("dbcontroller_reference_dangling") == 1, "dangling = %v", w.metric("dbcontroller_reference_dangling"))
	})
}

func TestWorksOnItsShardsOnly(t *testing.T) { // spec 8.11, X23, I43
	inBubble(t, func(w *fakeWorld) {
		for i := range 100 {
			w.unconfirmed(app(i), store.Block, lowEU)
		}
		done := func() (n int) {
			for i := range 100 {
				if w.core.get(app(i)).Tasks == 0 {
					n++
				}
			}
			return n
		}
		w.startOn(feed.Range{From: 0, To: 0})
		w.pass(time.Hour)
		w.want(done() == 0 && len(w.peers.at(lowEU).opened) == 0, "worked without shards")
		if err := w.node.UpdateShardRange(w.t.Context(), feed.Range{From: 16, To: 32}); err != nil {
			w.t.Fatal(err)
		}
		w.pass(time.Second)
		part := done()
		w.want(part > 5 && part < 60, "%d of 100 done by a node with a quarter of the ring", part)
		watches := w.peers.at(lowEU).watches()
		w.want(len(watches) == 1 && watches[0].GetShardsFrom() == 16 && watches[0].GetShardsTo() == 32, "follows %v", watches)
		if err := w.node.UpdateShardRange(w.t.Context(), feed.Range{From: 0, To: fakeRing}); err != nil {
			w.t.Fatal(err)
		}
		w.pass(time.Second)
		w.want(done() == 100, "%d of 100 done by a node with the whole ring", done())
		if err := w.node.UpdateShardRange(w.t.Context(), feed.Range{From: 0, To: fakeRing + 1}); err == nil {
			w.t.Error("a range beyond the ring was taken")
		}
	})
}

func TestRangesOfAnotherRingTileIt(t *testing.T) { // spec 8.11
	for _, theirs := range []int{1, 3, 10, 64, 4096} {
		next := int32(0)
		for from := int32(0); from < fakeRing; from += 16 {
			s := &session{Node: &Node{cfg: NodeConfig{Ring: fakeRing}}, shards: feed.Range{From: from, To: from + 16}}
			r := s.scale(theirs)
			if r.From != next || r.To < r.From {
				t.Errorf("ring %d: %s after %d", theirs, r, next)
			}
			next = r.To
		}
		if int(next) != theirs {
			t.Errorf("ring %d: ends at %d", theirs, next)
		}
	}
}

func TestTwoNodesOnTheSameShardsDoNoHarm(t *testing.T) { // X23, I12
	inBubble(t, func(w *fakeWorld) {
		w.core.block(app(7), refused(app(7)))
		for i := range 300 {
			w.core.refer(app(i), "secret", "secrets/s", lowEU, store.Cascade)
			w.unconfirmed(app(i+1000), store.Block, lowEU)
			w.deleted(app(i+2000), store.Source{Location: highEU, Subscriber: true})
		}
		other := *w
		other.cfg.Metrics = nil
		w.start()
		other.start()
		w.peers.at(lowEU).delete("secrets/s")
		w.pass(30 * time.Second)
		other.stop()
		w.want(w.core.left(lowEU, "secrets/s") == 1 && w.core.get(app(7)).Tasks == store.PendingDelete, "%d referrers left", w.core.left(lowEU, "secrets/s"))
		for i := range 300 {
			w.want(w.core.get(app(i+1000)).Tasks == 0, "%s is not confirmed", app(i+1000))
			w.want(w.core.get(app(i+2000)) == nil, "%s is not finished", app(i+2000))
		}
	})
}

func TestRefusesAConfigurationThatCannotWork(t *testing.T) {
	for _, cfg := range []NodeConfig{{}, {Service: "s", Region: "r", Version: "v"}, {Service: "s", Region: "r", Version: "v", Ring: 1}} {
		if _, err := NewNode(cfg); err == nil {
			t.Errorf("NewNode(%+v) succeeded", cfg)
		}
	}
}
