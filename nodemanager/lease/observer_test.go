package lease

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/dbcontroller/db-controller/nodemanager"
)

func TestNamesAreValidAndTheirOwn(t *testing.T) {
	long := strings.Repeat("x", 60)
	seen := map[string][]string{}
	for _, parts := range [][]string{
		{"demo", "library.example.com", "eu"}, {"demo.library", "example.com", "eu"}, {"demo", "library.example", "com.eu"}, {"demo", "library", "eu"},
		{"Demo", "library", "eu"}, {"demo_", "library", "eu"}, {long, long, long}, {long, long, long + "y"}, {"", "", ""}, {"-", ".", "é"}, {"a.-b", "c", "d"},
	} {
		p := Prefix(parts[0], parts[1], parts[2])
		if was, twice := seen[p]; twice {
			t.Errorf("%q and %q are both %s", was, parts, p)
		}
		seen[p] = parts
		if problems := append(validation.IsDNS1123Subdomain(p), validation.IsValidLabelValue(p)...); len(problems) > 0 {
			t.Errorf("%q: %q: %v", parts, p, problems)
		}
		for _, replica := range []string{"db-controller-0", strings.Repeat("r.", 126), "Some_Host"} {
			if problems := validation.IsDNS1123Subdomain(memberName(p, "constraint", replica)); len(problems) > 0 {
				t.Errorf("%q: %v", memberName(p, "constraint", replica), problems)
			}
		}
	}
	if got := Prefix("demo", "library.example.com", "eu-west-1"); got != "demo.library.example.com.eu-west-1" {
		t.Errorf("plain parts: %s", got)
	}
}

// story is what an observer is told, and when.
type story struct {
	t   *testing.T
	o   *observer
	now time.Time
	rv  int
}

func newStory(t *testing.T) *story {
	return &story{t: t, o: newObserver("me", "lease-me", 15*time.Second), now: time.Unix(1e9, 0)}
}

func (s *story) member(id string, r nodemanager.Report) *coordinationv1.Lease {
	said, err := json.Marshal(r)
	if err != nil {
		s.t.Fatal(err)
	}
	s.rv++
	renewed := metav1.NewMicroTime(time.Unix(int64(s.rv), 0)) // its own clock is nobody's business
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name: "lease-" + id, ResourceVersion: strconv.Itoa(s.rv), Labels: map[string]string{labelRole: roleMember, labelKind: "k"},
			Annotations: map[string]string{annotationReport: string(said)},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &id, RenewTime: &renewed},
	}
}

func (s *story) renews(ids ...string) {
	for _, id := range ids {
		s.o.see(s.member(id, nodemanager.Report{}), false, s.now)
	}
}

func (s *story) alive(want ...string) {
	s.t.Helper()
	var got []string
	for _, m := range s.o.view("k").Members {
		if m.Alive {
			got = append(got, m.ID)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		s.t.Fatalf("alive: %v, want %v", got, want)
	}
}

func TestSilenceIsMeasuredByOurOwnRenewals(t *testing.T) { // P21
	s := newStory(t)
	s.renews("me", "a", "b")
	for range 10 {
		s.now = s.now.Add(2 * time.Second)
		s.renews("me", "a")
	}
	s.alive("a", "me")
	// The watch is cut for an hour: nobody is dead for that.
	s.now = s.now.Add(time.Hour)
	s.alive("a", "me")
	// It is made anew, and tells what there is: us first.
	s.renews("me")
	s.alive("a", "me")
	s.renews("a")
	s.alive("a", "me")
	s.now = s.now.Add(2 * time.Second)
	s.renews("me")
	s.alive("a", "me")
	// Who has died meanwhile is found dead with our next renewal.
	s.now = s.now.Add(20 * time.Second)
	s.renews("me")
	s.alive("a", "me")
	s.now = s.now.Add(2 * time.Second)
	s.renews("me")
	s.alive("me")
	if dead := s.o.longDead(); len(dead) != 1 || *dead[0].Spec.HolderIdentity != "b" {
		t.Errorf("long dead: %v", dead)
	}
}

func TestReportsThatMayBeOldAreNotHeard(t *testing.T) { // P2
	s := newStory(t)
	heard := func(id string) time.Time {
		for _, m := range s.o.view("k").Members {
			if m.ID == id {
				return m.Heard
			}
		}
		t.Fatalf("%s is not there", id)
		return time.Time{}
	}
	expect := func(id string, want time.Time) {
		t.Helper()
		if got := heard(id); !got.Equal(want) {
			t.Fatalf("%s was heard at %s, want %s", id, got, want)
		}
	}
	s.renews("me", "a") // the first list
	expect("a", time.Time{})
	for range 2 {
		s.now = s.now.Add(2 * time.Second)
		s.renews("me", "a")
	}
	expect("a", s.now)
	s.renews("b") // is new
	expect("b", s.now)
	was := s.now
	s.now = s.now.Add(time.Second)
	s.o.see(s.o.members["lease-b"].lease, false, s.now) // nothing but a relist
	expect("b", was)
	// The watch is cut, b dies, and the next list tells what b had said last, we do not know when.
	s.now = s.now.Add(10 * time.Minute)
	s.renews("me", "a", "b")
	expect("a", time.Time{})
	expect("b", time.Time{})
	s.now = s.now.Add(2 * time.Second)
	s.renews("me", "a")
	expect("a", s.now)
	expect("b", time.Time{})
}

func TestDeletedByHandIsNoEnd(t *testing.T) { // O4
	s := newStory(t)
	s.renews("me", "a")
	s.o.see(s.member("a", nodemanager.Report{}), true, s.now)
	s.alive("a", "me")
	s.now = s.now.Add(2 * time.Second)
	s.renews("me", "a") // it is written again
	s.alive("a", "me")
	s.o.see(s.member("a", nodemanager.Report{}), true, s.now)
	for range 9 {
		s.now = s.now.Add(2 * time.Second)
		s.renews("me")
	}
	s.alive("me")
	// Who has said that it leaves is gone with its Lease.
	s.o.see(s.member("b", nodemanager.Report{Leaving: true}), false, s.now)
	s.alive("b", "me")
	s.o.see(s.member("b", nodemanager.Report{Leaving: true}), true, s.now)
	s.alive("me")
	// An edited report is none.
	edited := s.member("c", nodemanager.Report{})
	edited.Annotations[annotationReport] = "{oops"
	if !s.o.see(edited, false, s.now) {
		t.Error("not told")
	}
	s.alive("c", "me")
}

func TestPlansGoForward(t *testing.T) {
	s := newStory(t)
	plan := func(rv string, said string) *coordinationv1.Lease {
		return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{
			Name: "plan", ResourceVersion: rv, Labels: map[string]string{labelRole: rolePlan, labelKind: "k"}, Annotations: map[string]string{annotationPlan: said},
		}}
	}
	for _, c := range []struct {
		what     string
		rv, said string
		deleted  bool
		want     int64
		told     bool
	}{
		{"the first", "10", `{"version":3,"ring":8}`, false, 3, true},
		{"older news", "9", `{"version":2,"ring":8}`, false, 3, false},
		{"the next", "100", `{"version":4,"ring":8}`, false, 4, true},
		{"the same again", "100", `{"version":4,"ring":8}`, false, 4, false},
		{"put back by hand", "101", `{"version":3,"ring":8}`, false, 0, true},
		{"nonsense", "102", `{"version":`, false, 0, false},
		{"repaired", "103", `{"version":5,"ring":8}`, false, 5, true},
		{"deleted", "104", `{"version":5,"ring":8}`, true, 0, true},
		{"there again", "105", `{"version":6,"ring":8}`, false, 6, true},
	} {
		if told := s.o.see(plan(c.rv, c.said), c.deleted, s.now); told != c.told {
			t.Errorf("%s: told is %v", c.what, told)
		}
		if got := s.o.view("k").Plan.Version; got != c.want {
			t.Errorf("%s: plan %d, want %d", c.what, got, c.want)
		}
		if l, v := s.o.planLease("k"); v != c.want || (l == nil) != c.deleted {
			t.Errorf("%s: Lease %v, plan %d", c.what, l, v)
		}
	}
}
