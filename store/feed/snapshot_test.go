package feed_test

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/store/feed"
)

func TestParseSnapshotRefusesGarbage(t *testing.T) {
	for _, text := range []string{"", "1", "1:2", "1:2:3", "5:4:", "0:4:", "1:9:2,2", "1:9:3,2", "1:9:9", "2:9:1", "a:b:c", "1:2:,", "1:9:1;drop", "-1:4:"} {
		if s, err := feed.ParseSnapshot(text); err == nil {
			t.Errorf("ParseSnapshot(%q) = %v, want an error", text, s)
		}
	}
}

func snapshots() *rapid.Generator[feed.Snapshot] {
	return rapid.Custom(func(t *rapid.T) feed.Snapshot {
		xip := rapid.SliceOfNDistinct(rapid.Uint64Range(1, 40), 0, 8, rapid.ID).Draw(t, "xip")
		slices.Sort(xip)
		s := feed.Snapshot{Xmax: rapid.Uint64Range(41, 45).Draw(t, "xmax"), Xip: xip}
		s.Xmin = s.Xmax
		if len(xip) > 0 {
			s.Xmin = xip[0]
		}
		if rapid.Bool().Draw(t, "cut") {
			s = s.Until(rapid.Uint64Range(1, s.Xmax-1).Draw(t, "last"))
		}
		return s
	})
}

func TestSnapshotTextRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := snapshots().Draw(t, "s")
		back, err := feed.ParseSnapshot(s.String())
		if err != nil || back.String() != s.String() {
			t.Fatalf("%v came back as %v, %v", s, back, err)
		}
	})
}

func TestMergeSeesWhatBothSee(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := snapshots().Draw(t, "a"), snapshots().Draw(t, "b")
		m := feed.Merge(a, b)
		for x := range uint64(50) {
			if got, want := m.Sees(x), a.Sees(x) && b.Sees(x); got != want {
				t.Fatalf("merge of %v and %v is %v: sees %d = %v, want %v", a, b, m, x, got, want)
			}
		}
		if _, err := feed.ParseSnapshot(m.String()); err != nil {
			t.Fatalf("merge of %v and %v is no snapshot: %v", a, b, m)
		}
	})
}

func TestUntilSeesNothingBehindLast(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := snapshots().Draw(t, "s")
		last := rapid.Uint64Range(0, s.Xmax-1).Draw(t, "last")
		cut := s.Until(last)
		for x := range uint64(50) {
			if got, want := cut.Sees(x), s.Sees(x) && x <= last; got != want {
				t.Fatalf("%v until %d is %v: sees %d = %v, want %v", s, last, cut, x, got, want)
			}
		}
	})
}

func TestToken(t *testing.T) {
	c := feed.Cursor{Epoch: 3, Snapshot: feed.Snapshot{Xmin: 4, Xmax: 9, Xip: []uint64{4, 7}}}
	back, err := feed.ParseToken(c.Token())
	if err != nil || back.Token() != c.Token() || back.Epoch != 3 || back.Snapshot.String() != "4:9:4,7" {
		t.Errorf("token of %v came back as %v, %v", c, back, err)
	}
	for _, token := range []string{"x", "!!", c.Token() + "x", c.Token()[2:], "MXwwfDE6MTo", "Mnw0fDE6MTo"} {
		if c, err := feed.ParseToken(token); err == nil {
			t.Errorf("ParseToken(%q) = %v, want an error", token, c)
		}
	}
	if c, err := feed.ParseToken(""); err != nil || !c.IsZero() {
		t.Errorf("the empty token is %v, %v, want no cursor", c, err)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(feed.Cursor{Epoch: 1, Snapshot: feed.Snapshot{Xmin: 1, Xmax: 2}}.Token())
	f.Fuzz(func(t *testing.T, token string) {
		c, err := feed.ParseToken(token)
		if err == nil {
			if back, err := feed.ParseToken(c.Token()); err != nil || back.Token() != c.Token() {
				t.Errorf("%q is read as %v, which does not come back", token, c)
			}
		}
	})
}
