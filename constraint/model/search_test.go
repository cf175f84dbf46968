// The search keeps one goroutine busy for a long time, which the race detector makes ten times as long; under it, the test of hack/model searches.
//go:build !race

package model

import (
	"sync"
	"testing"
)

// TestWorlds shows P7, I1 to I5, I16, X1, X5 and X41 in all worlds, and that each step of the protocol is taken in at least one of them: what is never taken
// is not checked.
func TestWorlds(t *testing.T) {
	var mu sync.Mutex
	var taken [ops]bool
	t.Run("search", func(t *testing.T) {
		for _, w := range Worlds() {
			t.Run(w.Name, func(t *testing.T) {
				t.Parallel()
				r := Search(w, 0)
				if r.Violation != "" {
					t.Fatalf("%s: %s\n%s", w.About, r.Violation, story(r))
				}
				t.Logf("%d states, %d transitions", r.States, r.Transitions)
				mu.Lock()
				defer mu.Unlock()
				for o, yes := range r.taken {
					taken[o] = taken[o] || yes
				}
			})
		}
	})
	onlyWithBugs := map[op]bool{opCheck: true, opAnswer: true, opFence: true, opFinisherReads: true}
	for o, yes := range taken {
		if yes == onlyWithBugs[op(o)] {
			t.Errorf("step taken: %t, want %t: %s", yes, !yes, texts[op(o)])
		}
	}
}

// TestMutants shows that each rule is needed: without it the search finds a violation.
func TestMutants(t *testing.T) {
	worlds := map[string]World{}
	for _, w := range Worlds() {
		worlds[w.Name] = w
	}
	all := Bug(0)
	for _, m := range Mutants() {
		if m.Bug&(m.Bug-1) != 0 || all.has(m.Bug) {
			t.Errorf("%s: one bug a mutant, one mutant a bug", m.Name)
		}
		all |= m.Bug
		t.Run(m.Name, func(t *testing.T) {
			t.Parallel()
			w, ok := worlds[m.World]
			if !ok {
				t.Fatalf("there is no world %s", m.World)
			}
			r := Search(w, m.Bug)
			if r.Violation == "" {
				t.Fatalf("not found in %d states of %s", r.States, m.World)
			}
			t.Logf("%s\n%s", r.Violation, story(r))
		})
	}
	if all != lastBug<<1-1 {
		t.Errorf("bugs without a mutant: %b", ^all&(lastBug<<1-1))
	}
}
