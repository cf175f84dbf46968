package cache

import (
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/store"
)

func drawResource(t *rapid.T) *store.Resource {
	text := rapid.String()
	moment := rapid.Custom(func(t *rapid.T) time.Time { return time.UnixMicro(rapid.Int64Range(0, 1<<52).Draw(t, "µs")) })
	r := &store.Resource{
		Name: text.Draw(t, "name"), Type: text.Draw(t, "type"), UUID: text.Draw(t, "uuid"), OwningRegion: text.Draw(t, "owner"),
		Version: store.Version{Epoch: rapid.Int64().Draw(t, "epoch"), Number: rapid.Int64().Draw(t, "number")}, Generation: rapid.Int64().Draw(t, "generation"),
		Shard: rapid.Int32().Draw(t, "shard"), State: store.State(rapid.Int16().Draw(t, "state")), BlockDeletion: rapid.Bool().Draw(t, "block"),
		Regions: rapid.SliceOfN(text, 0, 3).Draw(t, "regions"), CreateTime: moment.Draw(t, "created"), UpdateTime: moment.Draw(t, "updated"),
		Body: []byte(text.Draw(t, "body")),
	}
	if rapid.Bool().Draw(t, "deleted") {
		r.DeleteTime = moment.Draw(t, "delete time")
	}
	if rapid.Bool().Draw(t, "meta") {
		r.Meta = store.Meta{Labels: map[string]string{"a": "b"}, Tags: []string{"x"}, OwnerReferences: []store.OwnerReference{{Kind: "K", Name: "n", Controller: true}}}
	}
	return r
}

func TestEntryRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want, at := drawResource(t), time.UnixMicro(1_700_000_000_123_456)
		b, err := appendEntry(nil, want, at)
		if err != nil {
			t.Fatal(err)
		}
		got, gotAt, err := readEntry(b)
		if err != nil || !gotAt.Equal(at) || !reflect.DeepEqual(got, want) {
			t.Fatalf("readEntry = %+v, %v, %v, want %+v, %v", got, gotAt, err, want, at)
		}
		cut := rapid.IntRange(0, len(b)-1).Draw(t, "cut")
		if _, _, err := readEntry(b[:cut]); err == nil {
			t.Fatalf("an entry that ends after %d of %d bytes is accepted", cut, len(b))
		}
	})
}

func TestPageRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := &store.Page{NextPageToken: rapid.String().Draw(t, "token"), Resources: rapid.SliceOfN(rapid.Custom(drawResource), 1, 3).Draw(t, "resources")}
		b, err := appendPage(nil, "tag", want, time.UnixMicro(1))
		if err != nil {
			t.Fatal(err)
		}
		if got, _, err := readPage(b, "tag"); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("readPage = %+v, %v, want %+v", got, err, want)
		}
		if got, _, err := readPage(b, "another"); err != nil || got != nil {
			t.Fatalf("readPage with another tag = %+v, %v, want nothing", got, err)
		}
	})
}

// Whatever lies in Redis must not crash a reader.
func FuzzReadEntry(f *testing.F) {
	b, err := appendEntry(nil, &store.Resource{Name: "n", Regions: []string{"eu"}, Body: []byte("{}")}, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _, _ = readEntry(b)
		_, _, _ = readPage(b, "")
	})
}
