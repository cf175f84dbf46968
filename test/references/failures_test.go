package references

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// soon is for a slow machine: what is waited for takes a second at most on one that is not.
const soon = 40 * time.Second

// TestFailures goes through the failure catalogue, one row after the other, in one world; every row ends with all invariants.
func TestFailures(t *testing.T) {
	w := newWorld(t, config{})
	for i, row := range []struct {
		name string
		do   func(*testing.T, *scene)
	}{
		{"X1 the referrer fails after it was granted, before its commit", grantedNotCommitted},
		{"X2, X3, R3, P9 nobody confirms, and the blockade expires: the location is asked", neverConfirmed},
		{"X2, F57 another process confirms after a SIGKILL", confirmedAfterKill},
		{"X4 one of two Deployments refuses", oneRefuses},
		{"X5, R5, X41 calls that are late or doubled", lateCalls},
		{"X6, R1 a reference is established while the deletion asks", establishedWhileAsking},
		{"X7 two Deployments delete each other's targets", crosswise},
		{"X8 the owner is away during a save", ownerAway},
		{"X9 a blocking source is away during a deletion", sourceAway},
		{"X10 the subscriber is offline during the deletion", subscriberOffline},
		{"X11 the subscriber fails in the middle", subscriberFails},
		{"X12, I17 a cascade is blocked", cascadeBlocked},
		{"X13 a cycle of cascades through regions", cycle},
		{"X14, R2, P7 a reference is saved while its target is deleted", savedWhileDeleted},
		{"X15 the owner comes after the ownee", ownerComesLater},
		{"X16 the owner never comes", ownerNeverComes},
		{"X17, I19 ownee and owner are cut off from each other", ownerCutOff},
		{"X18, I20 the owner drops the reference that the ownee requires", ownerLetsGo},
		{"X19 a policy shrinks", policyShrinks},
		{"X36 the source of the topology is away", topologyAway},
		{"X37 a stale topology", staleTopology},
		{"X38, I21 the version of an owner is upgraded while the ownee is edited", upgradeRaces},
		{"X39 block_deletion is cleared late", blockDeletion},
		{"I10 two resources that refer to each other, in one transaction", bothOrNone},
		{"I13 a read copy is no evidence", copyIsNoEvidence},
		{"R7, P11 a name is used again only when its deletion is complete", reusedName},
		{"R8 a referrer moves to another region", referrerMoves},
		{"D1, R4 the owner's database forgets who refers to it", ownerForgets},
		{"P10 a policy holder goes, and with it its resources in all regions", holderGoes},
	} {
		t.Run(row.name, func(t *testing.T) {
			w.t = t
			s := &scene{world: w, id: fmt.Sprintf("row%d-", i)}
			defer func() { w.t = t }()
			t.Cleanup(w.heal)
			row.do(t, s)
			w.heal()
			w.mustHold(time.Minute, nil)
		})
	}
	w.t = t
}

// scene is one row's part of the world: names that nobody else uses.
type scene struct {
	*world
	id string
}

func (s *scene) low(region, id string) string  { return lowNode(region, s.id+id) }
func (s *scene) node(region, id string) string { return node(region, s.id+id) }

// put saves a resource with references.
func (s *scene) put(service, name string, r refs) {
	s.t.Helper()
	s.save(service, name, store.Write{Body: r.body(rand.IntN(1e9))})
}

func (s *scene) get(service, name string) (*store.Resource, error) {
	return s.owner(service, name).store().Get(s.t.Context(), name)
}

func (s *scene) exists(service, name string) bool {
	s.t.Helper()
	_, err := s.get(service, name)
	if err != nil && store.CodeOf(err) != store.NotFound {
		s.t.Fatal(err)
	}
	return err == nil
}

func (s *scene) wantGone(service, name string) {
	s.t.Helper()
	eventually(s.t, soon, name+" is gone", func() error {
		if s.exists(service, name) {
			return fmt.Errorf("it exists")
		}
		return nil
	})
}

// shadow is the state of a shadow: 0 none, 1 active, 2 deleting.
func (s *scene) shadow(service, name string) int {
	s.t.Helper()
	return s.owner(service, name).number("SELECT coalesce((SELECT shadow FROM resources WHERE name = $1), 0)", name)
}

func (s *scene) wantFinished(service, name string) {
	s.t.Helper()
	eventually(s.t, soon, "the deletion of "+name+" is complete", func() error {
		if n := s.shadow(service, name); n != 0 {
			return fmt.Errorf("its shadow is %d", n)
		}
		return nil
	})
}

func (s *scene) wantCode(err error, code store.Code, mention ...string) {
	s.t.Helper()
	if store.CodeOf(err) != code {
		s.t.Fatalf("want %s, got %v", code, err)
	}
	for _, m := range mention {
		if !strings.Contains(err.Error(), m) {
			s.t.Errorf("the error should mention %q: %v", m, err)
		}
	}
}

// confirmed waits until a place has nothing left to confirm.
func (s *scene) confirmed(service, name string) {
	s.t.Helper()
	eventually(s.t, soon, "the references of "+name+" are confirmed", func() error {
		if n := s.owner(service, name).number("SELECT count(*) FROM refs WHERE referrer = $1 AND tx_id IS NOT NULL", name); n > 0 {
			return fmt.Errorf("%d are not", n)
		}
		return nil
	})
}

func (s *scene) blockades(region string, name string) int {
	s.t.Helper()
	return s.at(low, region).number("SELECT count(*) FROM blockades WHERE name = $1", name)
}

// of matches the calls of one service: every request has the Call in its first field.
func of(service string) func(*exchange) bool {
	return func(e *exchange) bool {
		number, kind, n := protowire.ConsumeTag(e.body)
		if n < 0 || number != 1 || kind != protowire.BytesType {
			return false
		}
		text, n := protowire.ConsumeBytes(e.body[n:])
		var call v1.Call
		return n >= 0 && proto.Unmarshal(text, &call) == nil && call.GetRequester().GetService() == service
	}
}

// await receives, or fails the test.
func await[T any](t *testing.T, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(soon):
		t.Fatalf("not within %s: %s", soon, what)
	}
	return v
}

func grantedNotCommitted(t *testing.T, s *scene) {
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	gate := s.at(low, "eu").wire.hold("EstablishReferences", false, of(mid))
	defer gate.open()
	dying, die := context.WithCancel(t.Context())
	saved := make(chan error, 1)
	go func() {
		_, err := s.trySave(dying, mid, referrer, store.Write{Body: refs{"lowBlock[]": {target}}.body(1)})
		saved <- err
	}()
	await(t, gate.arrived, "the reference is granted")
	die()
	if err := await(t, saved, "the save ends"); err == nil {
		t.Fatal("the save of a process that died has succeeded")
	}
	gate.open()
	s.wantCode(s.delete(low, target), store.FailedPrecondition, referrer)
	s.at(low, "eu").stopManager()
	defer s.at(low, "eu").startManager()
	s.at(low, "eu").expireBlockades()
	asked := s.at(mid, "us").wire.count("CheckIfResourceIsBlocked")
	check(t, s.delete(low, target))
	if n := s.at(mid, "us").wire.count("CheckIfResourceIsBlocked"); n != asked+1 {
		t.Errorf("the referrer's Deployment was asked %d times", n-asked)
	}
	if s.exists(mid, referrer) {
		t.Error("the save was committed")
	}
}

func neverConfirmed(t *testing.T, s *scene) {
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	s.at(mid, "us").stopManager()
	s.put(mid, referrer, refs{"lowBlock[]": {target}})
	s.wantCode(s.delete(low, target), store.FailedPrecondition, "may not have ended")
	s.at(low, "eu").expireBlockades()
	s.wantCode(s.delete(low, target), store.FailedPrecondition, referrer)
	s.at(mid, "us").startManager()
	s.confirmed(mid, referrer)
	s.wantCode(s.delete(low, target), store.FailedPrecondition, referrer)
	check(t, s.delete(mid, referrer))
	check(t, s.delete(low, target))
}

func confirmedAfterKill(t *testing.T, s *scene) {
	p := s.at(mid, "us")
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	p.stopManager()
	gate := s.at(low, "eu").wire.hold("ConfirmBlockades", true, of(mid))
	defer gate.open()
	first := p.startChild()
	s.put(mid, referrer, refs{"lowAsyncCascade[]": {target}})
	await(t, gate.arrived, "the manager's process confirms")
	first.kill() // in the middle of its call
	gate.open()
	second := p.startChild()
	s.confirmed(mid, referrer)
	eventually(t, soon, "the blockade is gone", func() error {
		if n := s.blockades("eu", target); n > 0 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	// And again in the middle of a cascade.
	s.at(low, "eu").stopManager()
	check(t, s.delete(low, target))
	second.kill()
	s.at(low, "eu").startManager()
	if !s.exists(mid, referrer) {
		t.Log("the referrer was deleted before the kill")
	}
	p.startManager()
	s.wantGone(mid, referrer)
	s.wantFinished(low, target)
}

func oneRefuses(t *testing.T, s *scene) {
	there, missing, referrer := s.low("eu", "t"), s.node("us", "missing"), s.node("ap", "r")
	s.put(low, there, nil)
	_, err := s.trySave(t.Context(), high, referrer, store.Write{Body: refs{"lowBlock[]": {there}, "midBlock[]": {missing}}.body(1)})
	s.wantCode(err, store.FailedPrecondition, missing, "midBlock[0]")
	if s.exists(high, referrer) {
		t.Error("the save was committed")
	}
	if s.blockades("eu", there) == 0 {
		t.Error("the other Deployment was not asked: this shows nothing")
	}
	s.at(low, "eu").expireBlockades()
	eventually(t, soon, "the entry is gone, and its location is not asked any more", func() error {
		if b, n := s.blockades("eu", there), s.at(low, "eu").number("SELECT count(*) FROM sources WHERE name = $1 AND (blocking OR subscriber)", there); b+n > 0 {
			return fmt.Errorf("%d blockades and %d sources are left", b, n)
		}
		return nil
	})
}

// caller speaks to a Deployment as another would.
func (s *scene) caller(to *place) dbcontrollerv1connect.SchemaMixinClient {
	t := pki.Transport(nil, pki.Identity{}, nil)
	s.t.Cleanup(t.CloseIdleConnections)
	return dbcontrollerv1connect.NewSchemaMixinClient(&http.Client{Transport: t}, "http://"+to.wire.addr)
}

func callOf(from, to *place, version string) *v1.Call {
	return &v1.Call{Requester: &v1.Location{Service: from.Service, Region: from.Region}, Callee: &v1.Location{Service: to.Service, Region: to.Region}, Version: version}
}

func lateCalls(t *testing.T, s *scene) {
	owner, other := s.at(low, "eu"), s.at(mid, "us")
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	var first *exchange
	var mu sync.Mutex
	owner.wire.intercept(func(e *exchange) *answer {
		if e.method == "EstablishReferences" {
			mu.Lock()
			first = e
			mu.Unlock()
		}
		return e.send(owner.wire.ctx)
	})
	s.put(mid, referrer, refs{"lowBlock[]": {target}})
	owner.wire.intercept(nil)
	s.confirmed(mid, referrer)
	// A late request leaves a blockade that expires; the reference and its source stay.
	first.send(t.Context())
	if n := s.blockades("eu", target); n != 1 {
		t.Errorf("%d blockades after a late request", n)
	}
	owner.expireBlockades()
	eventually(t, soon, "the late blockade is gone", func() error {
		if n := s.blockades("eu", target); n > 0 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	s.wantCode(s.delete(low, target), store.FailedPrecondition, referrer)

	// A higher attempt is not replaced by a lower one that comes later.
	c, tx := s.caller(owner), uuid.NewString()
	establish := func(attempt int32) {
		t.Helper()
		_, err := c.EstablishReferences(t.Context(), connect.NewRequest(&v1.EstablishReferencesRequest{Call: callOf(other, owner, "v1"), Referrer: s.node("us", "x"),
			Targets: []*v1.NewReference{{Name: target, Blocking: true}}, TxId: tx, TxAttempt: attempt}))
		check(t, err)
	}
	establish(2)
	establish(1)
	establish(2)
	if n := owner.number("SELECT attempt FROM blockades WHERE name = $1", target); n != 2 {
		t.Errorf("attempt %d is kept", n)
	}
	// A confirmation of another, older transaction does not touch it, however often it comes.
	for range 2 {
		_, err := c.ConfirmBlockades(t.Context(), connect.NewRequest(&v1.ConfirmBlockadesRequest{Call: callOf(other, owner, "v1"),
			References: []*v1.ConfirmedReference{{Referrer: s.node("us", "x"), Name: target, Blocking: true, TxId: uuid.NewString()}}}))
		check(t, err)
	}
	if n := s.blockades("eu", target); n != 1 {
		t.Errorf("%d blockades after a confirmation of another transaction", n)
	}
	check(t, s.delete(mid, referrer))
	s.wantCode(s.delete(low, target), store.FailedPrecondition, s.node("us", "x"))
	owner.expireBlockades()
	check(t, s.delete(low, target))
}

func establishedWhileAsking(t *testing.T, s *scene) {
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	s.put(mid, referrer, refs{"lowBlock[]": {target}})
	s.confirmed(mid, referrer)
	s.put(mid, referrer, nil) // the source stays, and is asked
	gate := s.at(mid, "us").wire.hold("CheckIfResourceIsBlocked", false, of(low))
	defer gate.open()
	deleted := make(chan error, 1)
	go func() { deleted <- s.delete(low, target) }()
	await(t, gate.arrived, "it has been told that nothing blocks")
	s.put(mid, referrer, refs{"lowBlock[]": {target}})
	gate.open()
	s.wantCode(await(t, deleted, "the deletion ends"), store.FailedPrecondition, referrer)
	if !s.exists(low, target) {
		t.Error("the target is gone")
	}
}

func crosswise(t *testing.T, s *scene) {
	for i := range 15 {
		id := func(name string) string { return fmt.Sprint(name, i) }
		te, tu, re, ru := s.low("eu", id("t")), s.low("us", id("t")), s.low("eu", id("r")), s.low("us", id("r"))
		s.put(low, te, nil)
		s.put(low, tu, nil)
		s.put(low, re, refs{"block[]": {tu}})
		s.put(low, ru, refs{"block[]": {te}})
		s.confirmed(low, re)
		s.confirmed(low, ru)
		del := func(region string, names ...string) error {
			var writes []store.Write
			for _, n := range names {
				writes = append(writes, store.Write{Op: store.Delete, Name: n})
			}
			ctx, cancel := context.WithTimeout(t.Context(), soon)
			defer cancel()
			_, err := s.write(ctx, s.at(low, region), writes...)
			return err
		}
		// Each transaction deletes a referrer and a target. One after the other, both are refused, for each finds the other's referrer.
		var both sync.WaitGroup
		var atEU, atUS error
		both.Go(func() { atEU = del("eu", re, te) })
		both.Go(func() { atUS = del("us", ru, tu) })
		both.Wait()
		s.wantCode(atEU, store.FailedPrecondition)
		s.wantCode(atUS, store.FailedPrecondition)
		both.Go(func() { atEU = del("eu", re) })
		both.Go(func() { atUS = del("us", tu) })
		both.Wait()
		check(t, atEU)
		if atUS != nil {
			s.wantCode(atUS, store.FailedPrecondition)
			check(t, del("us", tu))
		}
		check(t, del("us", ru))
		check(t, del("eu", te))
	}
}

func ownerAway(t *testing.T, s *scene) {
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	s.links["us"][s.at(low, "eu").key].Cut()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	_, err := s.trySave(ctx, mid, referrer, store.Write{Body: refs{"lowBlock[]": {target}}.body(1)})
	s.wantCode(err, store.Unavailable, "nothing was written")
	if s.exists(mid, referrer) {
		t.Error("the save was committed")
	}
	s.put(mid, s.node("us", "alone"), nil) // I44: what does not involve it goes on
	s.heal()
	eventually(t, soon, "the save succeeds", func() error {
		_, err := s.trySave(t.Context(), mid, referrer, store.Write{Body: refs{"lowBlock[]": {target}}.body(1)})
		return err
	})
}

func sourceAway(t *testing.T, s *scene) {
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	s.put(mid, referrer, refs{"lowBlock[]": {target}})
	s.confirmed(mid, referrer)
	s.put(mid, referrer, nil)
	s.links["eu"][s.at(mid, "us").key].Cut()
	s.wantCode(s.delete(low, target), store.Unavailable, "nothing was deleted")
	if !s.exists(low, target) || s.shadow(low, target) != 1 {
		t.Error("the target is gone")
	}
	s.heal()
	eventually(t, soon, "the deletion succeeds", func() error { return s.delete(low, target) })
}

func subscriberOffline(t *testing.T, s *scene) {
	target, cascades, clears := s.low("eu", "t"), s.node("us", "c"), s.node("us", "u")
	s.put(low, target, nil)
	s.put(mid, cascades, refs{"lowAsyncCascade[]": {target}})
	s.put(mid, clears, refs{"lowUnset": {target}, "lowLinks[].asyncUnset": {target}})
	s.confirmed(mid, cascades)
	s.confirmed(mid, clears)
	p := s.at(mid, "us")
	p.stopManager()
	p.stopAPI()
	check(t, s.delete(low, target))
	eventually(t, soon, "the subscriber is asked in vain", func() error {
		if s.at(low, "eu").number("SELECT count(*) FROM resources WHERE name = $1 AND task_error IS NOT NULL", target) == 0 {
			return fmt.Errorf("nobody says that it waits")
		}
		return nil
	})
	if s.shadow(low, target) != 2 {
		t.Error("the deletion has not waited")
	}
	s.wantCode(func() error { _, err := s.trySave(t.Context(), low, target, store.Write{}); return err }(), store.FailedPrecondition)
	p.startAPI()
	p.startManager()
	s.wantGone(mid, cascades)
	s.wantFinished(low, target)
	r, err := s.get(mid, clears)
	check(t, err)
	if left, err := refsIn(mid, clears, r.Body); err != nil || len(left) > 0 {
		t.Errorf("it still refers to %v", left)
	}
}

func subscriberFails(t *testing.T, s *scene) {
	const n = 120
	target, p := s.low("eu", "t"), s.at(mid, "us")
	s.put(low, target, nil)
	names := s.referrers("us", n, refs{"lowAsyncCascade[]": {target}})
	eventually(t, soon, "all are confirmed", func() error {
		if k := p.number("SELECT count(*) FROM refs WHERE target = $1 AND tx_id IS NOT NULL", target); k > 0 {
			return fmt.Errorf("%d are not", k)
		}
		return nil
	})
	// Somebody holds one in the middle: what comes before it is done, the rest waits.
	conn, err := p.connect(t.Context())
	check(t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	_, err = conn.Exec(t.Context(), "BEGIN")
	check(t, err)
	_, err = conn.Exec(t.Context(), "SELECT FROM resources WHERE name = $1 FOR UPDATE", names[n/2])
	check(t, err)
	check(t, s.delete(low, target))
	left := func() int { return p.number("SELECT count(*) FROM refs WHERE target = $1", target) }
	eventually(t, soon, "some are handled", func() error {
		if k := left(); k == n || k == 0 {
			return fmt.Errorf("%d are left", k)
		}
		return nil
	})
	p.killManager()
	_, err = conn.Exec(t.Context(), "ROLLBACK")
	check(t, err)
	p.startManager()
	s.wantFinished(low, target)
	if k := left(); k != 0 {
		t.Errorf("%d are left", k)
	}
}

func cascadeBlocked(t *testing.T, s *scene) {
	target, cascades, blocks := s.low("eu", "t"), s.node("us", "c"), s.node("ap", "b")
	s.put(low, target, nil)
	s.put(mid, cascades, refs{"lowAsyncCascade[]": {target}})
	s.put(high, blocks, refs{"midBlock[]": {cascades}})
	s.confirmed(mid, cascades)
	s.confirmed(high, blocks)
	check(t, s.delete(low, target))
	eventually(t, soon, "the referrer is to be deleted", func() error {
		if p := s.at(mid, "us"); p.number("SELECT count(*) FROM resources WHERE name = $1 AND tasks & 8 <> 0", cascades) == 0 {
			return fmt.Errorf("it has no task")
		}
		return nil
	})
	if !s.exists(mid, cascades) || s.shadow(low, target) != 2 {
		t.Error("it was deleted although something refers to it")
	}
	s.put(high, blocks, nil)
	s.wantGone(mid, cascades)
	s.wantFinished(low, target)
}

func cycle(t *testing.T, s *scene) {
	names := []string{s.low("eu", "a"), s.low("us", "b"), s.low("ap", "c")}
	for _, n := range names {
		s.put(low, n, nil)
	}
	for i, n := range names {
		s.put(low, n, refs{"asyncCascade[]": {names[(i+1)%3], n}})
	}
	leaf := s.node("eu", "leaf")
	s.put(mid, leaf, refs{"lowCascade[]": {names[2]}})
	for _, n := range names {
		s.confirmed(low, n)
	}
	check(t, s.delete(low, names[0]))
	for _, n := range names {
		s.wantFinished(low, n)
	}
	s.wantGone(mid, leaf)
}

func savedWhileDeleted(t *testing.T, s *scene) {
	owner, importer := s.at(low, "eu"), s.at(mid, "us")
	for _, late := range []bool{false, true} {
		id := fmt.Sprint(late)
		target, referrer := s.low("eu", "t"+id), s.node("us", "r"+id)
		s.put(low, target, nil)
		granted := owner.wire.hold("EstablishReferences", false, of(mid))
		// The deletion waits for the answer of the importer; in the second round it gets it before the save goes on.
		asked := importer.wire.hold("CheckIfResourceHasDeletionSubscriber", true, of(low))
		saved := make(chan error, 1)
		go func() {
			_, err := s.trySave(t.Context(), mid, referrer, store.Write{Body: refs{"lowAsyncCascade[]": {target}}.body(1)})
			saved <- err
		}()
		await(t, granted.arrived, "the reference is granted")
		s.wantCode(s.delete(low, target), store.FailedPrecondition, "may not have ended")
		owner.stopManager()
		owner.expireBlockades() // it takes too long
		check(t, s.delete(low, target))
		owner.startManager()
		await(t, asked.arrived, "the subscriber is asked")
		if late {
			asked.open()
			s.wantFinished(low, target)
			granted.open()
			s.wantCode(await(t, saved, "the save ends"), store.FailedPrecondition, target)
			if s.exists(mid, referrer) {
				t.Error("the save was committed")
			}
			continue
		}
		granted.open()
		err := await(t, saved, "the save ends")
		asked.open()
		if err != nil {
			s.wantCode(err, store.FailedPrecondition, target)
		}
		s.wantFinished(low, target)
		s.wantGone(mid, referrer)
	}
}

// owned saves a resource of mid in us with an owner.
func (s *scene) owned(name string, o store.OwnerReference, r refs) {
	s.t.Helper()
	s.save(mid, name, store.Write{Meta: store.Meta{OwnerReferences: []store.OwnerReference{o}}, Body: r.body(1)})
}

func ownerOf(service, version, name string) store.OwnerReference {
	return store.OwnerReference{Kind: service + "/Node", Version: version, Name: name, Region: regionOf(name)}
}

// checkedOwners waits until owners have been checked, and says how many the ownee has left.
func (s *scene) checkedOwners(name string) int {
	s.t.Helper()
	eventually(s.t, soon, "the owners of "+name+" are checked", func() error {
		if n := s.at(mid, "us").number("SELECT coalesce((SELECT tasks FROM resources WHERE name = $1), 0)", name); n != 0 {
			return fmt.Errorf("tasks %v", store.Tasks(n).Strings())
		}
		return nil
	})
	r, err := s.get(mid, name)
	if store.CodeOf(err) == store.NotFound {
		return 0
	}
	check(s.t, err)
	return len(r.Meta.OwnerReferences)
}

func ownerComesLater(t *testing.T, s *scene) {
	ownee, owner := s.node("us", "ownee"), s.node("eu", "owner")
	s.owned(ownee, ownerOf(high, "v1", owner), nil)
	eventually(t, soon, "the owner is asked for", func() error {
		if s.at(high, "eu").wire.count("ConfirmMetaOwner") == 0 {
			return fmt.Errorf("it is not")
		}
		return nil
	})
	s.put(high, owner, nil)
	if n := s.checkedOwners(ownee); n != 1 {
		t.Errorf("the ownee has %d owners", n)
	}
	check(t, s.delete(high, owner))
	s.wantGone(mid, ownee)
	s.wantFinished(high, owner)
}

func ownerNeverComes(t *testing.T, s *scene) {
	goes, stays := s.node("us", "goes"), s.node("us", "stays")
	o := ownerOf(high, "v1", s.node("eu", "never"))
	s.owned(goes, o, nil)
	o.UnsetOnDelete = true
	s.owned(stays, o, nil)
	s.wantGone(mid, goes)
	if n := s.checkedOwners(stays); n != 0 || !s.exists(mid, stays) {
		t.Errorf("the one that stays has %d owners", n)
	}
}

func ownerCutOff(t *testing.T, s *scene) {
	ownee, owner := s.node("us", "ownee"), s.node("eu", "owner")
	away := s.at(high, "eu").wire
	asked := make(chan struct{}, 1000)
	away.intercept(func(e *exchange) *answer {
		if e.method == "ConfirmMetaOwner" {
			asked <- struct{}{}
			return nil
		}
		return e.send(away.ctx)
	})
	s.owned(ownee, ownerOf(high, "v1", owner), nil)
	began := time.Now()
	for time.Since(began) < 2*grace { // many attempts, over longer than an owner may be missing
		await(t, asked, "the owner is asked for again")
	}
	if r, err := s.get(mid, ownee); err != nil || len(r.Meta.OwnerReferences) != 1 {
		t.Fatalf("the ownee is %v, %v", r, err)
	}
	s.put(high, owner, nil)
	s.heal()
	if n := s.checkedOwners(ownee); n != 1 {
		t.Errorf("the ownee has %d owners", n)
	}
}

func ownerLetsGo(t *testing.T, s *scene) {
	ownee, owner := s.node("us", "ownee"), s.node("eu", "owner")
	o := ownerOf(high, "v1", owner)
	o.RequiresOwnerReference, o.UnsetOnDelete = true, true
	s.owned(ownee, o, nil)
	s.put(high, owner, refs{"midLinks[].asyncUnset": {ownee}})
	if n := s.checkedOwners(ownee); n != 1 {
		t.Fatalf("the ownee has %d owners", n)
	}
	s.put(high, owner, nil)
	eventually(t, soon, "the owner is removed", func() error {
		if n := s.checkedOwners(ownee); n != 0 {
			return fmt.Errorf("%d owners", n)
		}
		return nil
	})
	if !s.exists(mid, ownee) {
		t.Error("the ownee should only have lost its owner")
	}
}

func policyShrinks(t *testing.T, s *scene) {
	holder := "projects/" + s.id
	name := holder + "/regions/eu/nodes/n"
	referrer := s.node("us", "r")
	shrink := func(enabled ...string) {
		t.Helper()
		s.save(low, holder, store.Write{Body: policyBody("eu", enabled...)})
	}
	shrink(regions...)
	eventually(t, soon, "the holder is known", func() error { _, err := s.trySave(t.Context(), low, name, store.Write{}); return err })
	s.put(mid, referrer, refs{"lowBlock[]": {name}})
	s.confirmed(mid, referrer)
	held := func(region string) bool {
		t.Helper()
		_, err := s.at(low, region).store().Get(t.Context(), name)
		if err != nil && store.CodeOf(err) != store.NotFound {
			t.Fatal(err)
		}
		return err == nil
	}
	eventually(t, soon, "copies are everywhere", func() error {
		if !held("ap") || !held("us") {
			return fmt.Errorf("they are not")
		}
		return nil
	})
	was, err := s.get(low, name)
	check(t, err)
	shrink("eu", "us")
	eventually(t, soon, "the copy in ap is gone", func() error {
		if _, err := s.trySave(t.Context(), low, name, store.Write{Body: was.Body}); err != nil { // which follows the policy
			return err
		}
		if held("ap") {
			return fmt.Errorf("it is there")
		}
		return nil
	})
	now, err := s.get(low, name)
	check(t, err)
	if !held("us") || now.UUID != was.UUID || string(now.Body) != string(was.Body) {
		t.Errorf("something else has changed: %+v, it was %+v", now, was)
	}
	s.wantCode(s.delete(low, name), store.FailedPrecondition, referrer)
}

func topologyAway(t *testing.T, s *scene) {
	// Nobody has told the registry of this world anything since its start, and all works. A process that starts now, and hears nothing, waits.
	fresh := registry.New()
	p := s.at(low, "eu")
	if _, err := deployment.Open(t.Context(), p.config(fresh, 2)); err == nil {
		t.Error("a Deployment has been opened that nobody knows")
	}
	p.stopManager()
	started := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m, err := nodemanager.New(nodemanager.Config{Topology: fresh, Ring: 256, Version: p.version, Logger: s.log, Kinds: []nodemanager.Kind{{Name: "any", New: func(string) (nodemanager.Node, error) {
		started <- struct{}{}
		return nil, fmt.Errorf("this is enough")
	}}}})
	check(t, err)
	var running sync.WaitGroup
	running.Go(func() { _ = m.Run(ctx) }) // it ends with ctx
	defer func() { cancel(); running.Wait() }()
	target, referrer := s.low("eu", "t"), s.node("us", "r")
	s.put(low, target, nil)
	s.put(mid, referrer, refs{"lowBlock[]": {target}})
	s.wantCode(s.delete(low, target), store.FailedPrecondition)
	select {
	case <-started:
		t.Error("a node has started without a topology")
	default:
	}
	if problems := fresh.Apply(s.topo); len(problems) > 0 {
		t.Fatal(problems)
	}
	await(t, started, "the nodes start")
	p.startManager()
}

func staleTopology(t *testing.T, s *scene) {
	target, referrer, owner := s.low("eu", "t"), s.node("us", "r"), s.at(low, "eu")
	s.put(low, target, nil)
	s.put(high, referrer, refs{"lowBlock[]": {target}})
	s.confirmed(high, referrer)
	s.put(high, referrer, nil)
	old := s.topo
	old.Services = descriptors()
	for _, d := range old.Services {
		if d.Spec.Service == high {
			d.Spec.Versions[0].Imports[0].Version = "v1" // as it was before
		}
	}
	stale := registry.New()
	if problems := stale.Apply(old); len(problems) > 0 {
		t.Fatal(problems)
	}
	owner.stopAPI()
	owner.startAPIWith(stale)
	s.wantCode(s.delete(low, target), store.Unavailable, "version")
	if !s.exists(low, target) {
		t.Error("the target is gone")
	}
	if problems := stale.Apply(s.topo); len(problems) > 0 {
		t.Fatal(problems)
	}
	check(t, s.delete(low, target))
	owner.stopAPI()
	owner.startAPI()
}

func upgradeRaces(t *testing.T, s *scene) {
	ownee, owner := s.node("us", "ownee"), s.low("eu", "owner")
	s.put(low, owner, nil)
	s.owned(ownee, ownerOf(low, "v1", owner), nil) // low runs v2
	for i := 2; ; i++ {
		r, err := s.get(mid, ownee)
		check(t, err)
		_, err = store.Apply(t.Context(), s.at(mid, "us").store(), store.Write{Op: store.Update, Name: ownee, Body: refs{}.body(i), Mask: []string{"serial"}})
		check(t, err)
		if o := r.Meta.OwnerReferences; len(o) == 1 && o[0].Version == "v2" && i > 20 {
			r, err := s.get(mid, ownee)
			check(t, err)
			if !strings.Contains(string(r.Body), fmt.Sprintf(`"serial": %d`, i)) {
				t.Errorf("the last edit, %d, is lost: %s", i, r.Body)
			}
			break
		}
		if i > 5000 {
			t.Fatal("the owner is not upgraded")
		}
	}
	check(t, s.delete(low, owner))
	s.wantGone(mid, ownee)
}

func blockDeletion(t *testing.T, s *scene) {
	target, cascades := s.low("eu", "t"), s.node("us", "c")
	s.put(low, target, nil)
	yes, no := true, false
	s.save(mid, cascades, store.Write{Body: refs{"lowAsyncCascade[]": {target}}.body(1), BlockDeletion: &yes})
	s.confirmed(mid, cascades)
	s.wantCode(s.delete(mid, cascades), store.FailedPrecondition)
	check(t, s.delete(low, target))
	eventually(t, soon, "the cascade waits", func() error {
		if s.at(mid, "us").number("SELECT tasks FROM resources WHERE name = $1", cascades)&8 == 0 {
			return fmt.Errorf("it has no task")
		}
		return nil
	})
	r, err := s.get(mid, cascades)
	check(t, err)
	s.save(mid, cascades, store.Write{Body: r.Body, BlockDeletion: &no})
	s.wantGone(mid, cascades)
	s.wantFinished(low, target)
}

func bothOrNone(t *testing.T, s *scene) {
	for i, order := range [][]int{{0, 1}, {1, 0}} {
		a, b := s.node("eu", fmt.Sprint("a", i)), s.node("eu", fmt.Sprint("b", i))
		writes := []store.Write{
			{Op: store.Create, Name: a, Body: refs{"block[]": {b}}.body(1)},
			{Op: store.Create, Name: b, Body: refs{"block[]": {a}}.body(1)},
		}
		missing := append(slices.Clone(writes), store.Write{Op: store.Create, Name: s.node("eu", "x"), Body: refs{"lowBlock[]": {s.low("us", "missing")}}.body(1)})
		_, err := s.write(t.Context(), s.at(mid, "eu"), missing...)
		s.wantCode(err, store.FailedPrecondition)
		if s.exists(mid, a) || s.exists(mid, b) {
			t.Error("a part of the transaction is visible")
		}
		_, err = s.write(t.Context(), s.at(mid, "eu"), writes[order[0]], writes[order[1]])
		check(t, err)
		s.wantCode(s.delete(mid, a), store.FailedPrecondition)
		_, err = s.write(t.Context(), s.at(mid, "eu"), store.Write{Op: store.Delete, Name: a}, store.Write{Op: store.Delete, Name: b})
		check(t, err)
	}
}

func copyIsNoEvidence(t *testing.T, s *scene) {
	target, referrer := s.low("eu", "t"), s.low("us", "r")
	s.put(low, target, nil)
	here := s.at(low, "us")
	eventually(t, soon, "the copy is here", func() error { _, err := here.store().Get(t.Context(), target); return err })
	here.stopManager() // copies do not follow any more
	check(t, s.delete(low, target))
	if _, err := here.store().Get(t.Context(), target); err != nil {
		t.Fatalf("the copy is gone, so this shows nothing: %v", err)
	}
	_, err := s.trySave(t.Context(), low, referrer, store.Write{Body: refs{"block[]": {target}}.body(1)})
	s.wantCode(err, store.FailedPrecondition, target)
	here.startManager()
}

func reusedName(t *testing.T, s *scene) {
	target, cascades := s.low("eu", "t"), s.node("us", "c")
	s.put(low, target, nil)
	was, err := s.get(low, target)
	check(t, err)
	s.put(mid, cascades, refs{"lowAsyncCascade[]": {target}})
	s.confirmed(mid, cascades)
	s.at(mid, "us").stopManager()
	check(t, s.delete(low, target))
	_, err = s.trySave(t.Context(), low, target, store.Write{})
	s.wantCode(err, store.FailedPrecondition)
	_, err = s.trySave(t.Context(), high, s.node("eu", "r"), store.Write{Body: refs{"lowBlock[]": {target}}.body(1)})
	s.wantCode(err, store.FailedPrecondition, target)
	s.at(mid, "us").startManager()
	s.wantGone(mid, cascades)
	s.wantFinished(low, target)
	s.put(low, target, nil)
	now, err := s.get(low, target)
	check(t, err)
	if now.UUID == was.UUID || now.Version.Compare(was.Version) <= 0 {
		t.Errorf("%v is not a new incarnation of %v", now, was)
	}
	s.put(mid, cascades, refs{"lowAsyncCascade[]": {target}})
	s.confirmed(mid, cascades)
	if !s.exists(mid, cascades) {
		t.Error("the old deletion has reached the new referrer")
	}
}

func referrerMoves(t *testing.T, s *scene) {
	target, us, eu := s.low("eu", "t"), s.node("us", "r"), s.node("eu", "r")
	p := s.at(mid, "eu")
	s.put(low, target, nil)
	s.put(mid, us, refs{"lowAsyncCascade[]": {target}})
	s.confirmed(mid, us)
	s.put(mid, eu, refs{"lowAsyncCascade[]": {target}}) // it moves before the deletion
	check(t, s.delete(mid, us))
	s.confirmed(mid, eu)
	p.stopManager()
	check(t, s.delete(low, target))
	_, err := s.trySave(t.Context(), mid, us, store.Write{Body: refs{"lowAsyncCascade[]": {target}}.body(1)}) // and back while it is under way
	s.wantCode(err, store.FailedPrecondition, target)
	s.put(mid, us, nil)
	if s.shadow(low, target) != 2 {
		t.Error("the deletion has not waited for the referrer that is left")
	}
	p.startManager()
	s.wantGone(mid, eu)
	s.wantFinished(low, target)
	if !s.exists(mid, us) {
		t.Error("what does not refer to the target is gone")
	}
}

func ownerForgets(t *testing.T, s *scene) {
	blocked, free, told, blocks, cascades := s.low("eu", "blocked"), s.low("eu", "free"), s.low("eu", "told"), s.node("us", "b"), s.node("us", "c")
	for _, n := range []string{blocked, free, told} {
		s.put(low, n, nil)
	}
	s.put(mid, blocks, refs{"lowBlock[]": {blocked}})
	s.put(high, cascades, refs{"lowAsyncCascade[]": {told}})
	s.confirmed(mid, blocks)
	s.confirmed(high, cascades)
	// A save holds a grant of the time before.
	owner := s.at(low, "eu")
	gate := owner.wire.hold("EstablishReferences", false, of(high))
	defer gate.open()
	saved := make(chan error, 1)
	go func() {
		_, err := s.trySave(t.Context(), high, s.node("us", "old"), store.Write{Body: refs{"lowBlock[]": {free}}.body(1)})
		saved <- err
	}()
	await(t, gate.arrived, "the reference is granted")
	for _, k := range s.keys { // nobody confirms anything for now
		s.places[k].stopManager()
	}
	owner.stopAPI()
	check(t, owner.forget())
	owner.startAPI()
	s.wantCode(s.delete(low, blocked), store.FailedPrecondition, blocks)
	check(t, s.delete(low, free))
	check(t, s.delete(low, told))
	if s.shadow(low, told) != 2 || !s.exists(high, cascades) {
		t.Error("the deletion does not wait for those who may have to be told")
	}
	gate.open()
	s.wantCode(await(t, saved, "the save ends"), store.FailedPrecondition, free)
	for _, k := range s.keys {
		s.places[k].startManager()
	}
	s.wantGone(high, cascades)
	s.wantFinished(low, told)
	eventually(t, soon, "everybody has confirmed its references again", func() error {
		if n := owner.number("SELECT count(*) FROM ctl.referrer_epoch WHERE epoch = (SELECT epoch FROM ctl.feed_epoch)"); n != len(s.keys)-1 {
			return fmt.Errorf("%d have", n)
		}
		return nil
	})
	s.wantCode(s.delete(low, blocked), store.FailedPrecondition, blocks)
}

func holderGoes(t *testing.T, s *scene) {
	holder := "projects/" + s.id
	s.save(low, holder, store.Write{Body: policyBody("us", regions...)})
	var secrets, midNodes []string
	for _, r := range regions {
		name := holder + "/regions/" + r + "/secrets/s"
		eventually(t, soon, "the holder is known in "+r, func() error {
			_, err := s.trySave(t.Context(), low, name, store.Write{})
			return err
		})
		n := s.node(r, "u")
		s.put(high, n, refs{"secretLinks[].asyncUnset": {name}})
		secrets, midNodes = append(secrets, name), append(midNodes, n)
		s.confirmed(low, name)
		s.confirmed(high, n)
	}
	check(t, s.delete(low, holder))
	for i := range secrets {
		s.wantFinished(low, secrets[i])
		s.wantGone(low, secrets[i])
		r, err := s.get(high, midNodes[i])
		check(t, err)
		if left, err := refsIn(high, midNodes[i], r.Body); err != nil || len(left) > 0 {
			t.Errorf("%s still refers to %v", midNodes[i], left)
		}
	}
	s.wantFinished(low, holder)
}
