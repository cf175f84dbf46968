package references

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// TestARemovedDeployment: a Deployment disappears, and with it references that block, references that were to be told of a deletion under way, and
// owners. As long as it may come back everything waits; then it is forgotten, and nothing is stuck (X35, R9).
func TestARemovedDeployment(t *testing.T) {
	w := newWorld(t, config{services: []string{low, mid}, regions: []string{"eu", "us"}})
	s := &scene{world: w}
	blocked, told, open := s.low("eu", "blocked"), s.low("eu", "told"), s.low("eu", "open")
	for _, n := range []string{blocked, told, open} {
		s.put(low, n, nil)
	}
	s.put(mid, s.node("us", "blocks"), refs{"lowBlock[]": {blocked}})
	s.put(mid, s.node("us", "cascades"), refs{"lowAsyncCascade[]": {told}})
	s.confirmed(mid, s.node("us", "blocks"))
	s.confirmed(mid, s.node("us", "cascades"))
	ownee := s.node("eu", "ownee")
	s.put(mid, s.node("us", "owner"), nil)
	s.save(mid, ownee, store.Write{Meta: store.Meta{OwnerReferences: []store.OwnerReference{ownerOf(mid, "v1", s.node("us", "owner"))}}})
	w.mustHold(soon, nil)
	eventually(t, soon, "the copy is there", func() error { _, err := s.at(mid, "eu").store().Get(t.Context(), s.node("us", "blocks")); return err })

	gone := s.at(mid, "us")
	gone.stopManager()
	gone.stopAPI()
	check(t, s.delete(low, told))
	without := w.topo
	without.Deployments = slices.DeleteFunc(slices.Clone(w.topo.Deployments), func(d *v1alpha1.Deployment) bool {
		return registry.DeploymentOf(d).Key == gone.key
	})
	if problems := w.reg.Apply(without); len(problems) > 0 {
		t.Fatal(problems)
	}
	s.wantCode(s.delete(low, blocked), store.Unavailable, gone.String())
	if s.shadow(low, told) != 2 {
		t.Error("the deletion does not wait for a Deployment that may come back")
	}
	eventually(t, soon, "it is forgotten", func() error { return s.delete(low, blocked) })
	s.wantFinished(low, blocked)
	s.wantFinished(low, told)
	eventually(t, soon, "its copies are gone", func() error {
		if n := s.at(mid, "eu").number("SELECT count(*) FROM resources WHERE owning_region = 'us' AND state <> 2"); n > 0 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	s.put(mid, s.node("eu", "r"), refs{"lowBlock[]": {open}}) // the others go on
	s.wantCode(s.delete(low, open), store.FailedPrecondition)
	if _, err := s.get(mid, ownee); err != nil {
		t.Errorf("an ownee whose owner cannot be asked must stay: %v", err)
	}
}

// TestTwoVersions: low is still on v1 while high imports v2 of it: names are translated, and what v1 cannot say is refused (spec 1.3, 8.23, F8, I35).
func TestTwoVersions(t *testing.T) {
	w := newWorld(t, config{regions: []string{"eu", "us"}, versions: map[string]string{low: "v1"}})
	s := &scene{world: w}
	name := project("us") + "/secrets/s"
	blocks, clears, cascades := s.node("eu", "blocks"), s.node("eu", "clears"), s.node("us", "cascades")
	s.put(low, name, nil)
	importers := []string{mid, high}
	for _, importer := range importers {
		spelled := map[string]string{mid: name, high: project("us") + "/regions/us/secrets/s"}[importer]
		s.put(importer, blocks, refs{"secretBlock[]": {spelled}})
		s.put(importer, clears, refs{"secretUnset": {spelled}})
		s.put(importer, cascades, refs{"secretAsyncCascade[]": {spelled}})
		for _, n := range []string{blocks, clears, cascades} {
			s.confirmed(importer, n)
		}
	}
	w.mustHold(soon, nil)
	for _, importer := range importers {
		s.wantCode(s.delete(low, name), store.FailedPrecondition, blocks)
		s.put(importer, blocks, nil)
	}
	check(t, s.delete(low, name))
	s.wantFinished(low, name)
	for _, importer := range importers {
		s.wantGone(importer, cascades)
		r, err := s.get(importer, clears)
		check(t, err)
		if left, err := refsIn(importer, clears, r.Body); err != nil || len(left) > 0 {
			t.Errorf("%s still refers to %v", clears, left)
		}
	}
	far := project("eu") + "/regions/us/secrets/far" // no name of v1
	_, err := s.trySave(t.Context(), high, s.node("eu", "far"), store.Write{Body: refs{"secretBlock[]": {far}}.body(1)})
	s.wantCode(err, store.FailedPrecondition, far)
	w.mustHold(time.Minute, nil)
}
