package syncing

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

func v(epoch, number int64) store.Version { return store.Version{Epoch: epoch, Number: number} }

func list(pairs ...NameVersion) iter.Seq2[NameVersion, error] {
	return func(yield func(NameVersion, error) bool) {
		for _, p := range pairs {
			if !yield(p, nil) {
				return
			}
		}
	}
}

func broken(err error, pairs ...NameVersion) iter.Seq2[NameVersion, error] {
	return func(yield func(NameVersion, error) bool) {
		for _, p := range pairs {
			if !yield(p, nil) {
				return
			}
		}
		yield(NameVersion{}, err)
	}
}

func TestDifferences(t *testing.T) {
	boom := errors.New("boom")
	for _, tc := range []struct {
		name           string
		source, synced iter.Seq2[NameVersion, error]
		epoch          int64
		want           []Difference
		err            string
	}{
		{name: "both empty", source: list(), synced: list(), epoch: 1},
		{name: "equal", source: list(NameVersion{"a", v(1, 1)}), synced: list(NameVersion{"a", v(1, 1)}), epoch: 1},
		{name: "destination empty", source: list(NameVersion{"a", v(1, 1)}), synced: list(), epoch: 1, want: []Difference{{"a", v(1, 1), v(0, 0)}}},
		{name: "source empty", source: list(), synced: list(NameVersion{"a", v(1, 1)}), epoch: 1, want: []Difference{{"a", v(0, 0), v(1, 1)}}},
		{
			name: "interleaved", epoch: 1,
			source: list(NameVersion{"a", v(1, 1)}, NameVersion{"c", v(1, 2)}, NameVersion{"d", v(1, 1)}),
			synced: list(NameVersion{"b", v(1, 1)}, NameVersion{"c", v(1, 1)}, NameVersion{"d", v(1, 1)}, NameVersion{"e", v(1, 1)}),
			want:   []Difference{{"a", v(1, 1), v(0, 0)}, {"b", v(0, 0), v(1, 1)}, {"c", v(1, 2), v(1, 1)}, {"e", v(0, 0), v(1, 1)}},
		},
		{name: "live was faster than the list", source: list(NameVersion{"a", v(2, 1)}), synced: list(NameVersion{"a", v(2, 2)}), epoch: 2},
		{
			name: "owner lost a write of an ended epoch", source: list(NameVersion{"a", v(1, 1)}), synced: list(NameVersion{"a", v(1, 2)}), epoch: 2,
			want: []Difference{{"a", v(1, 1), v(1, 2)}},
		},
		{
			name: "a lower number in a later epoch is newer", source: list(NameVersion{"a", v(2, 1)}), synced: list(NameVersion{"a", v(1, 9)}), epoch: 2,
			want: []Difference{{"a", v(2, 1), v(1, 9)}},
		},
		{name: "source breaks", source: broken(boom, NameVersion{"b", v(1, 1)}), synced: list(NameVersion{"b", v(1, 1)}, NameVersion{"c", v(1, 1)}), epoch: 1, err: "boom"},
		{name: "copies break at once", source: list(), synced: broken(boom), epoch: 1, err: "boom"},
		{name: "copies break in the middle", source: list(NameVersion{"b", v(1, 1)}), synced: broken(boom, NameVersion{"a", v(1, 1)}), epoch: 1, want: []Difference{{"a", v(0, 0), v(1, 1)}}, err: "boom"},
		{name: "source out of order", source: list(NameVersion{"b", v(1, 1)}, NameVersion{"a", v(1, 1)}), synced: list(), epoch: 1, want: []Difference{{"b", v(1, 1), v(0, 0)}}, err: "not in order"},
		{name: "copies repeat a name", source: list(), synced: list(NameVersion{"a", v(1, 1)}, NameVersion{"a", v(1, 1)}), epoch: 1, want: []Difference{{"a", v(0, 0), v(1, 1)}}, err: "not in order"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []Difference
			var failed error
			for d, err := range differences(tc.source, tc.synced, tc.epoch, nil) {
				if err != nil {
					failed = err
					continue // the sequence must end by itself
				}
				got = append(got, d)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
			if (tc.err == "") != (failed == nil) || failed != nil && !strings.Contains(failed.Error(), tc.err) {
				t.Errorf("error %v, want %q", failed, tc.err)
			}
		})
	}
}

// The merge finds exactly what a comparison of two maps finds.
func TestDifferencesAgainstMaps(t *testing.T) {
	versions := rapid.Custom(func(t *rapid.T) store.Version {
		return v(rapid.Int64Range(1, 3).Draw(t, "epoch"), rapid.Int64Range(1, 4).Draw(t, "number"))
	})
	side := rapid.MapOf(rapid.StringMatching(`[abc/]{1,3}`), versions)
	rapid.Check(t, func(t *rapid.T) {
		source, synced := side.Draw(t, "source"), side.Draw(t, "synced")
		epoch := int64(3)
		want := map[string]Difference{}
		for name, s := range source {
			if d := (Difference{name, s, synced[name]}); s != synced[name] && (s.Compare(synced[name]) > 0 || synced[name].Epoch < epoch) {
				want[name] = d
			}
		}
		for name, s := range synced {
			if _, ok := source[name]; !ok {
				want[name] = Difference{Name: name, Synced: s}
			}
		}
		got := map[string]Difference{}
		listed := 0
		for d, err := range differences(sortedList(source), sortedList(synced), epoch, func() { listed++ }) {
			if err != nil {
				t.Fatal(err)
			}
			got[d.Name] = d
		}
		if !maps.Equal(got, want) || listed != len(source) {
			t.Fatalf("got %v, want %v; %d of %d listed", got, want, listed, len(source))
		}
	})
}

func sortedList(m map[string]store.Version) iter.Seq2[NameVersion, error] {
	return func(yield func(NameVersion, error) bool) {
		for _, name := range slices.Sorted(maps.Keys(m)) {
			if !yield(NameVersion{name, m[name]}, nil) {
				return
			}
		}
	}
}

func TestDifferingDigests(t *testing.T) {
	got := differing(
		[]postgres.ShardDigest{{Shard: 1, Count: 2, Hash: 7}, {Shard: 2, Count: 1, Hash: 1}, {Shard: 5, Count: 1, Hash: 1}},
		[]postgres.ShardDigest{{Shard: 0, Count: 3, Hash: 3}, {Shard: 1, Count: 2, Hash: 7}, {Shard: 5, Count: 1, Hash: 2}, {Shard: 9, Count: 4, Hash: 4}})
	want := shardDiffs{{0, 0, 3}, {2, 1, 0}, {5, 1, 1}, {9, 0, 4}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if both := got.in(shardDiffs{{shard: 2}, {shard: 3}, {shard: 9}}); !slices.Equal(both.shards(), []int32{2, 9}) {
		t.Errorf("in both: %v", both)
	}
	if owned, held := got.rows(); owned != 2 || held != 8 {
		t.Errorf("rows %d and %d", owned, held)
	}
}

func TestVersionSet(t *testing.T) { // F83, F84, F86, F88, F89
	var told []bool
	s := NewVersionSet(func(ready bool) { told = append(told, ready) })
	s.SetSource("a", v(1, 2))
	s.SetSynced("a", v(1, 1))
	s.SetSynced("extra", v(1, 1))
	s.SetSource("p/b", v(1, 1))
	s.SetSourceInSync(true)
	if m, e := s.Len(); m != 2 || e != 1 {
		t.Fatalf("%d missing, %d extra", m, e)
	}
	s.SetSource("a", v(1, 1)) // a duplicate that is older
	if d := s.CollectMatching("a", Difference.missing, 10); len(d) != 1 || d[0] != (Difference{"a", v(1, 2), v(1, 1)}) {
		t.Fatalf("collected %v", d)
	}
	if d := s.CollectMatching("", func(Difference) bool { return true }, 2); len(d) != 2 {
		t.Fatalf("collected %v, want two", d)
	}
	if len(told) != 0 {
		t.Fatalf("told %v too early", told)
	}
	s.SetSynced("a", v(1, 2))
	s.DelSource("p/b")
	s.DelSynced("extra")
	s.SetSource("late", v(1, 1))
	s.SetSynced("late", v(1, 1))
	s.SetSourceInSync(false)
	s.SetSourceInSync(false)
	if want := []bool{true, false, true, false}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
}

// The set holds exactly the names whose two sides differ, and is ready exactly when there are none.
func TestVersionSetAgainstMaps(t *testing.T) { // F83, F84, F88, F89
	rapid.Check(t, func(t *rapid.T) {
		ready := false
		s := NewVersionSet(func(r bool) {
			if r == ready {
				t.Fatalf("told %v twice", r)
			}
			ready = r
		})
		source, synced := map[string]store.Version{}, map[string]store.Version{}
		name := rapid.SampledFrom([]string{"a", "b", "c"})
		inSync := false
		t.Repeat(map[string]func(*rapid.T){
			// A name that is not held is equal on both sides, so the first thing said of it is what both have.
			"list": func(t *rapid.T) {
				n, a, b := name.Draw(t, "name"), v(1, rapid.Int64Range(1, 9).Draw(t, "source")), v(1, rapid.Int64Range(1, 9).Draw(t, "synced"))
				if source[n] != synced[n] {
					t.Skip("held")
				}
				s.SetSynced(n, b)
				s.SetSource(n, a)
				source[n], synced[n] = a, b
			},
			"source": func(t *rapid.T) {
				n, a := name.Draw(t, "name"), v(1, rapid.Int64Range(1, 9).Draw(t, "version"))
				if source[n] == synced[n] {
					t.Skip("not held")
				}
				if s.SetSource(n, a); a.Compare(source[n]) > 0 {
					source[n] = a
				}
			},
			"synced": func(t *rapid.T) {
				n, b := name.Draw(t, "name"), v(1, rapid.Int64Range(1, 9).Draw(t, "version"))
				if source[n] == synced[n] {
					t.Skip("not held")
				}
				s.SetSynced(n, b)
				synced[n] = b
			},
			"delete": func(t *rapid.T) {
				n := name.Draw(t, "name")
				s.DelSource(n)
				s.DelSynced(n)
				delete(source, n)
				delete(synced, n)
			},
			"settle": func(t *rapid.T) {
				n := name.Draw(t, "name")
				s.settle(n, v(2, 1))
				delete(source, n)
				delete(synced, n)
			},
			"sync flag": func(t *rapid.T) {
				inSync = rapid.Bool().Draw(t, "in sync")
				s.SetSourceInSync(inSync)
			},
			"": func(t *rapid.T) {
				differ := 0
				for n := range synced { // every name that differs has one, if only the zero version
					if source[n] != synced[n] {
						differ++
					}
				}
				if m, e := s.Len(); m+e != differ {
					t.Fatalf("%d+%d held, %d differ", m, e, differ)
				}
				if ready != (inSync && differ == 0) {
					t.Fatalf("ready %v with %d differences, in sync %v", ready, differ, inSync)
				}
			},
		})
	})
}

func TestSubranges(t *testing.T) { // F79
	for _, tc := range []struct {
		shards feed.Range
		width  int
		want   []feed.Range
	}{
		{feed.Range{From: 0, To: 4096}, 1024, []feed.Range{{From: 0, To: 1024}, {From: 1024, To: 2048}, {From: 2048, To: 3072}, {From: 3072, To: 4096}}},
		{feed.Range{From: 100, To: 1100}, 1024, []feed.Range{{From: 100, To: 1024}, {From: 1024, To: 1100}}},
		{feed.Range{From: 3, To: 9}, -1, []feed.Range{{From: 3, To: 9}}},
		{feed.Range{From: 5, To: 5}, 1024, nil},
		{feed.Range{From: 0, To: 3}, 1, []feed.Range{{From: 0, To: 1}, {From: 1, To: 2}, {From: 2, To: 3}}},
	} {
		if got := subranges(tc.shards, tc.width); !slices.Equal(got, tc.want) {
			t.Errorf("subranges(%v, %d) = %v, want %v", tc.shards, tc.width, got, tc.want)
		}
	}
}

// script drives a rangeClock by hand. Times are seconds after the start; the peer's clock is an hour ahead.
type script struct {
	t     *testing.T
	start time.Time
	pair  pairClock
	clock rangeClock
}

const ahead = time.Hour

func newScript(t *testing.T) *script {
	s := &script{t: t, start: time.Now()}
	s.clock.pair = &s.pair
	return s
}

func (s *script) at(sec float64) time.Time {
	return s.start.Add(time.Duration(sec * float64(time.Second)))
}
func (s *script) peer(sec float64) time.Time { return s.at(sec).Add(ahead) }

// ping is answered at once, and the answer travels for 0.2 s: the worst case, which what is told of a copy is made for.
func (s *script) ping(sec float64) { s.pair.ping(s.at(sec), s.at(sec+0.2), s.peer(sec)) }

func (s *script) expect(now float64, freshness, apply string, pending int64) {
	s.t.Helper()
	l := s.clock.read(s.at(now), false)
	show := func(d *time.Duration) string {
		if d == nil {
			return "unknown"
		}
		return fmt.Sprint(d.Round(time.Millisecond))
	}
	if got := fmt.Sprintf("%s %s %d", show(l.freshness), show(l.apply), l.pending); got != fmt.Sprintf("%s %s %d", freshness, apply, pending) {
		s.t.Errorf("at %v: freshness, apply lag, pending = %s, want %s %s %d", now, got, freshness, apply, pending)
	}
}

func TestClocks(t *testing.T) {
	t.Run("unknown until something is known", func(t *testing.T) {
		s := newScript(t)
		s.expect(0, "unknown", "0s", 0)
		f := &Frame{Cursor: "x", SourceTime: s.peer(1)}
		s.clock.received(f, s.at(1))
		s.clock.applied(f, s.at(1), true)
		s.expect(2, "unknown", "0s", 0) // the offset has not been measured
	})
	t.Run("idle, then cut", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		f := &Frame{Cursor: "x", SourceTime: s.peer(1), SinceTime: s.peer(0.5)}
		s.clock.received(f, s.at(1.25))
		s.clock.applied(f, s.at(1.25), true)
		s.expect(1.25, "250ms", "0s", 0)
		s.clock.dropped()
		s.expect(61, "1m0s", "0s", 0)
	})
	t.Run("a change on its way", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		f := &Frame{RowCount: 3, Cursor: "x", SourceTime: s.peer(2), SinceTime: s.peer(1)}
		s.clock.received(f, s.at(2))
		s.expect(3, "unknown", "2s", 3)
		s.clock.applied(f, s.at(3), true)
		s.expect(3, "1s", "0s", 0)
	})
	t.Run("a read in parts stays behind until its end", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		part, end := &Frame{RowCount: 1, SinceTime: s.peer(1)}, &Frame{RowCount: 2, Cursor: "x", SourceTime: s.peer(2), SinceTime: s.peer(1)}
		s.clock.received(part, s.at(2))
		s.clock.received(end, s.at(2))
		s.clock.applied(part, s.at(3), true)
		s.expect(4, "unknown", "3s", 2)
		s.clock.applied(end, s.at(4), true)
		s.expect(4, "2s", "0s", 0)
	})
	t.Run("more at the source is known too", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		first, last := &Frame{RowCount: 1, Cursor: "x", More: true, SourceTime: s.peer(2), SinceTime: s.peer(1)}, &Frame{RowCount: 1, Cursor: "y", SourceTime: s.peer(3), SinceTime: s.peer(2)}
		s.clock.received(first, s.at(2))
		s.clock.applied(first, s.at(2), true)
		s.expect(5, "unknown", "4s", 0)
		s.clock.dropped() // cut: the rest is not here, but known
		s.expect(6, "unknown", "5s", 0)
		s.clock.received(last, s.at(7))
		s.clock.applied(last, s.at(7), true)
		s.expect(7, "4s", "0s", 0)
	})
	t.Run("the next frame waits behind", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		a, b := &Frame{RowCount: 1, Cursor: "x", SourceTime: s.peer(2), SinceTime: s.peer(1)}, &Frame{RowCount: 1, Cursor: "y", SourceTime: s.peer(3), SinceTime: s.peer(2)}
		s.clock.received(a, s.at(3))
		s.clock.received(b, s.at(3))
		s.clock.applied(a, s.at(4), true)
		s.expect(4, "2s", "2s", 1)
	})
	t.Run("a backlog of unknown age is as old as the copy", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		f := &Frame{Cursor: "x", SourceTime: s.peer(1)}
		s.clock.received(f, s.at(1))
		s.clock.applied(f, s.at(1), true)
		s.clock.received(&Frame{RowCount: 1}, s.at(9))
		s.expect(11, "10s", "10s", 1)
	})
	t.Run("comparing proves nothing until it ends", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		f := &Frame{Cursor: "x", SourceTime: s.peer(1)}
		s.clock.received(f, s.at(1))
		s.clock.applied(f, s.at(1), false)
		s.expect(3, "unknown", "0s", 0)
		s.clock.proved()
		s.expect(3, "2s", "0s", 0)
	})
	t.Run("the peer's clock jumps back", func(t *testing.T) {
		s := newScript(t)
		s.ping(0)
		f := &Frame{Cursor: "x", SourceTime: s.peer(1)}
		s.clock.received(f, s.at(1))
		s.clock.applied(f, s.at(1), true)
		s.pair.ping(s.at(2), s.at(2), s.at(2)) // an hour less than before
		s.expect(5, "4s", "0s", 0)
	})
}

// Any goroutine may call the set, and the listener hears of changes in their order (F85, F90): a set per destination is used by the tail, the comparison and the status at once.
func TestVersionSetIsSafeForConcurrentUse(t *testing.T) {
	last := false
	s := NewVersionSet(func(ready bool) {
		if ready == last {
			t.Errorf("told twice that ready is %t", ready)
		}
		last = ready
	})
	s.SetSourceInSync(true)
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			for i := range 500 {
				name := fmt.Sprintf("w%d/%d", worker, i%50)
				s.SetSource(name, v(1, int64(i)+1))
				s.CollectMatching(fmt.Sprintf("w%d/", worker), Difference.missing, 10)
				s.Len()
				s.SetSynced(name, v(1, int64(i)+1))
				if i%10 == 0 {
					s.DelSource(name)
					s.DelSynced(name)
				}
			}
		})
	}
	all.Wait()
	if m, e := s.Len(); m+e != 0 || !last {
		t.Errorf("%d missing, %d extra, ready %t", m, e, last)
	}
}

func TestThrottle(t *testing.T) {
	for _, c := range []struct {
		health health
		rest   time.Duration
		why    Throttle
	}{
		{health{}, 0, ""},
		{health{target: slowTarget, source: slowSource}, 0, ""},
		{health{liveWaits: true}, liveTurn, LiveWaits},
		{health{liveWaits: true, target: time.Second}, time.Second, TargetSlow},
		{health{target: time.Minute}, maxThrottle, TargetSlow},
		{health{source: 700 * time.Millisecond}, 700 * time.Millisecond, SourceSlow},
		{health{source: time.Minute, liveWaits: true}, maxThrottle, SourceSlow},
	} {
		if rest, why := throttle(c.health); rest != c.rest || why != c.why {
			t.Errorf("%+v: rest %s because of %q, want %s because of %q", c.health, rest, why, c.rest, c.why)
		}
	}
}

func TestRateIsOfBusyTime(t *testing.T) {
	var r rate
	now := time.Unix(1000, 0)
	if _, due := r.add(measurable-1, time.Second, now); due {
		t.Error("too few rows make a rate")
	}
	if got, due := r.add(measurable+1, time.Second, now.Add(time.Hour)); !due || got != measurable {
		t.Errorf("rate %v, due %t; an idle hour must not count", got, due)
	}
	if _, due := r.add(10*measurable, time.Second, now.Add(time.Hour+rateInterval/2)); due {
		t.Error("stored twice within the interval")
	}
}

// P24: wherever in its round trip a ping was answered, a copy is not told to be newer than it is.
func TestClocksAreNeverOptimistic(t *testing.T) {
	begin := time.Unix(1_000_000, 0)
	for _, ahead := range []time.Duration{-time.Hour, 0, time.Hour} { // the peer's clock
		for way := 0 * time.Millisecond; way <= 200*time.Millisecond; way += 50 * time.Millisecond {
			var c pairClock
			c.ping(begin, begin.Add(200*time.Millisecond), begin.Add(way+ahead))
			now := begin.Add(5 * time.Second)
			read := now.Add(-3 * time.Second) // when the peer read what has been applied
			if got := c.local(read.Add(ahead), now); got.After(read) || read.Sub(got) > 200*time.Millisecond {
				t.Errorf("clock %v ahead, answered after %v: as of %v, want %v or up to a round trip before", ahead, way, got, read)
			}
		}
	}
}
