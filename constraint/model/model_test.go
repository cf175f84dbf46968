package model

import (
	"fmt"
	"strings"
	"testing"
)

// A trace is a shortest one, and one story even where the search has exchanged equal Deployments on the way.
func TestTrace(t *testing.T) {
	w := World{Regions: []Region{{Referrers: block, Saves: 1, Tries: 1}, {Referrers: block, Saves: 1, Tries: 1}}, Deletions: 1}
	r := Search(w, AcceptIgnoresSources)
	want := `  1. A1 begins a transaction and asks the owner for a reference
  2. task 1 plans a deletion: it reads sources, suspects and blockades
  3. the owner grants A1 the reference (transaction 1, attempt 1)
  4. A1 receives the grant
  5. A1 commits transaction 1
  6. the blockade of A1 expires (transaction 1)
  7. task 1 accepts the deletion
`
	if got := story(r); got != want {
		t.Errorf("%s\n%s", r.Violation, got)
	}
}

// Every step can be told.
func TestTexts(t *testing.T) {
	for o := range ops {
		if text := (Step{op: o}).String(); text == "" || strings.ContainsAny(text, "{}") {
			t.Errorf("step %d: %q", o, text)
		}
	}
}

func story(r Result) string {
	var b strings.Builder
	for i, step := range r.Trace {
		fmt.Fprintf(&b, "%3d. %s\n", i+1, step)
	}
	return b.String()
}
