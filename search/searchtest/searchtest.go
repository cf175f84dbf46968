// Package searchtest is the contract of a search.Store as a test that every store passes.
package searchtest

import (
	"context"
	"crypto/md5" //nolint:gosec // the digests of the stores are made of it; it protects nothing
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Ring is the number of shards of the tests.
const Ring = 64

const schema = `
service: books.example.com
multiRegionPolicy: {enabledRegions: [eu], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Shelf, plural: shelves, patterns: ["shelves/{shelf}"]}
  - type: Book
    plural: books
    patterns: ["shelves/{shelf}/books/{book}"]
    parent: Shelf
    onParentDeleted: CascadeDelete
    search:
      fields: [{path: name, weight: A}, {path: title, weight: A}, {path: summary, weight: C}, {path: "chapters[].heading"}]
      filters: [{path: genre, type: String}, {path: pages, type: Number}, {path: print.color, type: Boolean}, {path: "labels[]", type: String}]
      facets: [genre, "labels[]"]
`

// Version returns the schema of the tests: it has the searched type Book.
func Version(t testing.TB) *descriptor.Version {
	t.Helper()
	var spec v1alpha1.ServiceDescriptorSpec
	if err := yaml.Unmarshal([]byte(schema), &spec); err != nil {
		t.Fatal(err)
	}
	s, err := descriptor.Compile(&spec)
	if err != nil {
		t.Fatal(err)
	}
	return s.Version("v1")
}

// Body is the body of a Book.
type Body struct {
	Title   string   `json:"title,omitempty"`
	Summary string   `json:"summary,omitempty"`
	Genre   any      `json:"genre,omitempty"`
	Pages   any      `json:"pages,omitempty"`
	Labels  []string `json:"labels,omitempty"`
	Print   *Print   `json:"print,omitempty"`
}

// Print is a part of a Body.
type Print struct {
	Color any `json:"color"`
}

// Document returns the document of a Book.
func Document(t testing.TB, v *descriptor.Version, name string, number int64, body Body) search.Document {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	d, err := search.DocumentOf(v.Type("Book"), &store.Resource{
		Name: name, Type: "Book", UUID: "00000000-0000-4000-8000-000000000001", Version: store.Version{Epoch: 1, Number: number},
		Shard: int32(descriptor.Shard(name, Ring)), Body: raw,
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Digests are what a database with the rows of docs says.
func Digests(docs ...search.Document) []search.ShardDigest {
	byShard := map[int32]*search.ShardDigest{}
	for _, d := range docs {
		g := byShard[d.Shard]
		if g == nil {
			g = &search.ShardDigest{Shard: d.Shard}
			byShard[d.Shard] = g
		}
		g.Count++
		sum := md5.Sum(fmt.Appendf(nil, "%s%s%d.%d%s", d.Name, d.UUID, d.Version.Epoch, d.Version.Number, d.Fingerprint))
		g.Hash ^= int64(binary.BigEndian.Uint64(sum[:]))
	}
	var digests []search.ShardDigest
	for _, g := range byShard {
		digests = append(digests, *g)
	}
	slices.SortFunc(digests, func(a, b search.ShardDigest) int { return int(a.Shard - b.Shard) })
	return digests
}

// Config says what a store can do.
type Config struct {
	// Open returns an empty store.
	Open func(t *testing.T) search.Store
	// FullText says whether it can search texts.
	FullText bool
}

var all = feed.Range{To: Ring}

// Run tests a store.
func Run(t *testing.T, cfg Config) {
	t.Run("versions decide, and digests tell", func(t *testing.T) { testApply(t, cfg.Open(t)) })
	t.Run("a lease notices what happened to the store", func(t *testing.T) { testLease(t, cfg.Open(t)) })
	t.Run("looks, ranges and mending", func(t *testing.T) { testMend(t, cfg.Open(t)) })
	t.Run("filters, facets and pages", func(t *testing.T) { testFilters(t, cfg.Open(t)) })
	if cfg.FullText {
		t.Run("full text", func(t *testing.T) { testText(t, cfg.Open(t)) })
	} else {
		t.Run("full text is refused", func(t *testing.T) { testNoText(t, cfg.Open(t)) })
	}
}

type fixture struct {
	t     *testing.T
	s     search.Store
	v     *descriptor.Version
	types search.Types
	lease *search.Lease
}

func newFixture(t *testing.T, s search.Store) *fixture {
	f := &fixture{t: t, s: s, v: Version(t)}
	f.types = search.TypesOf(f.v)
	f.begin(feed.Cursor{})
	return f
}

func (f *fixture) begin(want feed.Cursor) {
	f.t.Helper()
	l, c, err := f.s.Begin(f.t.Context(), all, "schema")
	if err != nil {
		f.t.Fatal(err)
	}
	if c.Token() != want.Token() {
		f.t.Fatalf("cursor %v, want %v", c, want)
	}
	f.lease = l
}

func (f *fixture) doc(name string, number int64, body Body) search.Document {
	return Document(f.t, f.v, name, number, body)
}

func (f *fixture) apply(b search.Batch) {
	f.t.Helper()
	if err := f.s.Apply(f.t.Context(), f.lease, b); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) expect(what string, docs ...search.Document) {
	f.t.Helper()
	got, err := f.s.Digests(f.t.Context(), all, f.types)
	if err != nil {
		f.t.Fatal(err)
	}
	if want := Digests(docs...); !slices.Equal(got, want) {
		f.t.Errorf("%s: digests %v, want %v", what, got, want)
	}
	shards := make([]int32, Ring)
	for i := range shards {
		shards[i] = int32(i)
	}
	slices.SortFunc(docs, func(a, b search.Document) int { return strings.Compare(a.Name, b.Name) })
	for _, after := range []string{"", "shelves/a/books/b"} {
		var have, want []search.NameVersion
		err = f.s.Versions(f.t.Context(), shards, f.types, after, func(name string, v store.Version) error {
			have = append(have, search.NameVersion{Name: name, Version: v})
			return nil
		})
		if err != nil {
			f.t.Fatal(err)
		}
		for _, d := range docs {
			if d.Name > after {
				want = append(want, search.NameVersion{Name: d.Name, Version: d.Version})
			}
		}
		if !slices.Equal(have, want) {
			f.t.Errorf("%s: versions behind %q are %v, want %v", what, after, have, want)
		}
	}
}

func cursorAt(xid uint64) feed.Cursor {
	return feed.Cursor{Epoch: 1, Snapshot: feed.Snapshot{Xmin: xid, Xmax: xid}}
}

func testApply(t *testing.T, s search.Store) {
	f := newFixture(t, s)
	a, b, c := f.doc("shelves/a/books/a", 2, Body{Title: "first"}), f.doc("shelves/a/books/b", 5, Body{Title: "second"}), f.doc("shelves/b/books/c", 1, Body{Genre: "Ærlig"})
	f.expect("empty")
	f.apply(search.Batch{Upserts: []search.Document{c, a, b}, Cursor: cursorAt(10)})
	f.expect("filled", a, b, c)

	old := f.doc(a.Name, 1, Body{Title: "zero"})
	f.apply(search.Batch{Upserts: []search.Document{old}, Deletions: []search.NameVersion{{Name: b.Name, Version: store.Version{Epoch: 1, Number: 4}}}})
	f.expect("older changes are not made", a, b, c)
	newer := f.doc(a.Name, 3, Body{Title: "third", Labels: []string{"x"}})
	f.apply(search.Batch{Upserts: []search.Document{newer}, Deletions: []search.NameVersion{{Name: b.Name, Version: store.Version{Epoch: 1, Number: 6}}, {Name: "shelves/x/books/none"}}})
	f.expect("newer ones are", newer, c)
	f.apply(search.Batch{Upserts: []search.Document{old}, Force: true})
	f.expect("the database is right when it was read for it", old, c)
	f.begin(cursorAt(10))
	f.apply(search.Batch{Deletions: []search.NameVersion{{Name: a.Name}, {Name: c.Name}}, Force: true, Cursor: cursorAt(11)})
	f.expect("forced deletions")

	f.apply(search.Batch{Upserts: []search.Document{c}})
	f.types = search.Types{"Book": "another declaration"}
	damaged := c
	damaged.Version = search.Damaged
	got, err := f.s.Digests(t.Context(), all, f.types)
	if err != nil || slices.Equal(got, Digests(c)) {
		t.Errorf("digests after the declaration changed: %v, %v", got, err)
	}
	var have []search.NameVersion
	err = f.s.Versions(t.Context(), []int32{c.Shard}, f.types, "", func(name string, v store.Version) error {
		have = append(have, search.NameVersion{Name: name, Version: v})
		return nil
	})
	if err != nil || !slices.Equal(have, []search.NameVersion{{Name: c.Name, Version: search.Damaged}}) {
		t.Errorf("versions after the declaration changed: %v, %v", have, err)
	}
}

func testLease(t *testing.T, s search.Store) {
	f := newFixture(t, s)
	f.apply(search.Batch{Cursor: cursorAt(7)})
	if err := s.Check(t.Context(), f.lease); err != nil {
		t.Error(err)
	}
	first := f.lease
	f.begin(cursorAt(7)) // another writer
	lost := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, search.ErrLost) {
			t.Errorf("%s: %v, want %v", what, err, search.ErrLost)
		}
	}
	lost("check of a lease that was taken", s.Check(t.Context(), first))
	lost("batch of a lease that was taken", s.Apply(t.Context(), first, search.Batch{Upserts: []search.Document{f.doc("shelves/a/books/a", 1, Body{})}, Cursor: cursorAt(9)}))
	f.expect("nothing of it is written")

	undone := *f.lease
	f.apply(search.Batch{Cursor: cursorAt(8)})
	lost("a batch of before", s.Check(t.Context(), &undone))

	half := feed.Range{To: Ring / 2}
	l, c, err := s.Begin(t.Context(), half, "schema")
	if err != nil || c.Token() != cursorAt(8).Token() {
		t.Fatalf("cursor of a part: %v, %v", c, err)
	}
	lost("the whole after a part was taken", s.Apply(t.Context(), f.lease, search.Batch{Cursor: cursorAt(9)}))
	if err := s.Apply(t.Context(), l, search.Batch{Cursor: cursorAt(10)}); err != nil {
		t.Error(err)
	}
	if _, c, err = s.Begin(t.Context(), feed.Range{From: Ring / 2, To: Ring}, "schema"); err != nil || c.Token() != cursorAt(8).Token() {
		t.Errorf("cursor of the rest: %v, %v", c, err)
	}
	if _, c, err = s.Begin(t.Context(), half, "another"); err != nil || !c.IsZero() {
		t.Errorf("cursor under another schema: %v, %v", c, err)
	}
	f.begin(feed.Cursor{}) // the parts are complete up to different cursors
}

func testMend(t *testing.T, s search.Store) {
	f := newFixture(t, s)
	ctx := t.Context()
	a, b, c := f.doc("shelves/a/books/a", 2, Body{Title: "first"}), f.doc("shelves/a/books/b", 5, Body{Genre: "x"}), f.doc("shelves/b/books/c", 1, Body{})
	f.apply(search.Batch{Upserts: []search.Document{a, b, c}, Cursor: cursorAt(10)})
	look := func(types search.Types, names ...string) []search.RowHash {
		t.Helper()
		all, err := s.Look(ctx, types, names)
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	rowHash := func(d search.Document) search.RowHash {
		return search.RowHash{Name: d.Name, Type: d.Type, Version: d.Version, Hash: Digests(d)[0].Hash, Held: true}
	}
	if got, want := look(f.types, c.Name, a.Name, "shelves/x/books/none"), []search.RowHash{rowHash(a), rowHash(c)}; !slices.Equal(got, want) {
		t.Errorf("look: %+v, want %+v", got, want)
	}
	to := []string{"shelves/a/books/a", "shelves/a/books/z", "shelves/a/books/zz", "\U0010FFFF"}
	got, err := s.Ranges(ctx, f.types, nil, "", to)
	want := []search.RangeDigest{{To: to[0], Count: 1, Hash: rowHash(a).Hash}, {To: to[1], Count: 1, Hash: rowHash(b).Hash}, {To: to[2]}, {To: to[3], Count: 1, Hash: rowHash(c).Hash}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("ranges: %v, %v, want %v", got, err, want)
	}
	if got, err := s.Ranges(ctx, f.types, []string{"Shelf"}, "", to[3:]); err != nil || got[0].Count != 0 {
		t.Errorf("ranges of another type: %v, %v", got, err)
	}
	var listed []search.RowHash
	err = s.Hashes(ctx, f.types, []string{"Book"}, a.Name, c.Name, func(r search.RowHash) error { listed = append(listed, r); return nil })
	if want := []search.RowHash{rowHash(b), rowHash(c)}; err != nil || !slices.Equal(listed, want) {
		t.Errorf("hashes: %+v, %v, want %+v", listed, err, want)
	}
	if err := s.Hashes(ctx, f.types, nil, "", to[3], func(search.RowHash) error { return errors.ErrUnsupported }); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("the error of emit: %v", err)
	}
	other := look(search.Types{"Book": "another declaration"}, a.Name)
	if other[0].Version != search.Damaged || other[0].Hash == rowHash(a).Hash {
		t.Errorf("a document of another declaration: %+v", other[0])
	}

	mend := func(docs []search.Document, ghosts []string, seen ...search.RowHash) {
		t.Helper()
		if err := s.Mend(ctx, f.types, docs, ghosts, seen); err != nil {
			t.Fatal(err)
		}
	}
	older, fresh := f.doc(a.Name, 1, Body{Title: "older, and right"}), f.doc("shelves/c/books/d", 1, Body{})
	moved := rowHash(b)
	moved.Hash++
	mend([]search.Document{older, f.doc(b.Name, 9, Body{}), f.doc(c.Name, 9, Body{}), fresh}, []string{"shelves/x/books/none"}, rowHash(a), moved)
	f.expect("only what is as it was seen, or was not there, is written", older, b, c, fresh)
	mend(nil, []string{b.Name, c.Name}, moved, rowHash(c))
	f.expect("only what is as it was seen is deleted", older, b, fresh)
	if err := s.Check(ctx, f.lease); err != nil {
		t.Errorf("the lease after mending: %v", err)
	}
	filled, err := s.Filled(ctx, all)
	if err != nil || len(filled) != 1 || filled[0].Shards != all || filled[0].Schema != "schema" || filled[0].Cursor != cursorAt(10).Token() {
		t.Errorf("filled: %+v, %v", filled, err)
	}
	hits := f.search(search.Query{Type: f.v.Type("Book"), Filter: `genre = "x"`}).Hits
	if len(hits) != 1 || hits[0].Name != b.Name {
		t.Errorf("found %v by a filter after mending", hits)
	}
}

func (f *fixture) search(q search.Query) *search.Result {
	f.t.Helper()
	q.Type = f.v.Type("Book")
	r, err := f.s.Search(f.t.Context(), q)
	if err != nil {
		f.t.Fatalf("%+v: %v", q, err)
	}
	return r
}

func names(r *search.Result) string {
	var ids []string
	for _, h := range r.Hits {
		ids = append(ids, h.Name[strings.LastIndexByte(h.Name, '/')+1:])
	}
	return strings.Join(ids, " ")
}

func testFilters(t *testing.T, s search.Store) {
	f := newFixture(t, s)
	docs := []search.Document{
		f.doc("shelves/a/books/a", 1, Body{Title: "One", Genre: "crime", Pages: 100, Labels: []string{"red", "new"}, Print: &Print{true}}),
		f.doc("shelves/a/books/b", 1, Body{Title: "Two", Genre: "cricket", Pages: 250.5, Labels: []string{"red"}, Print: &Print{false}}),
		f.doc("shelves/b/books/c", 1, Body{Title: "Three", Genre: "poetry", Pages: json.Number("9007199254740993")}),
		f.doc("shelves/b/books/d", 1, Body{Title: "Four", Pages: -3, Genre: 5, Labels: []string{"Über", "new"}}),
		f.doc("shelves/b/books/e", 1, Body{Title: "Five", Genre: "crime", Pages: "7", Print: &Print{"true"}}),
	}
	f.apply(search.Batch{Upserts: docs})
	// What was there before must leave no trace in an index.
	f.apply(search.Batch{Upserts: []search.Document{f.doc("shelves/a/books/gone", 1, Body{Genre: "crime", Pages: 5, Labels: []string{"red"}}), f.doc("shelves/b/books/e", 2, Body{Genre: "satire", Pages: 1, Labels: []string{"blue"}})}})
	f.apply(search.Batch{Upserts: []search.Document{f.doc("shelves/b/books/e", 3, Body{Genre: "crime", Pages: "7", Print: &Print{"true"}})},
		Deletions: []search.NameVersion{{Name: "shelves/a/books/gone", Version: store.Version{Epoch: 1, Number: 2}}}})
	for filter, want := range map[string]string{
		``:                                   "a b c d e",
		`genre = crime`:                      "a e",
		`genre = "cri*"`:                     "a b e",
		`genre = "c*e*"`:                     "a b e",
		`genre = "*ry"`:                      "c",
		`genre != crime`:                     "b c",
		`NOT genre = crime`:                  "b c d",
		`genre > "crime"`:                    "c",
		`genre <= crime`:                     "a b e",
		`genre:*`:                            "a b c e",
		`pages = 100`:                        "a",
		`pages = 1e2`:                        "a",
		`pages > 100`:                        "b c",
		`pages >= 100 AND pages < 251`:       "a b",
		`pages < 0`:                          "d",
		`pages = 9007199254740992`:           "",
		`pages = 9007199254740993`:           "c",
		`pages < 9007199254740993`:           "a b d",
		`pages = "7"`:                        "",
		`print.color = true`:                 "a",
		`print.color != true`:                "b",
		`labels:red`:                         "", // the metadata's labels
		`"labels":red`:                       "a b",
		`"labels":"Ü*"`:                      "d",
		`"labels":new AND genre = crime`:     "a",
		`"labels":red OR pages < 0`:          "a b d",
		`name = "shelves/a/books/b"`:         "b",
		`name = "shelves/b/*" genre = crime`: "e",
		`-(genre = crime OR genre = poetry)`: "b d",
	} {
		if filter == `labels:red` {
			_, err := s.Search(t.Context(), search.Query{Type: f.v.Type("Book"), Filter: filter})
			if store.CodeOf(err) != store.InvalidArgument {
				t.Errorf("%s: %v, want InvalidArgument", filter, err)
			}
			continue
		}
		var got []string
		q := search.Query{Filter: filter, PageSize: 2}
		for {
			r := f.search(q)
			if n := names(r); n != "" {
				got = append(got, n)
			}
			if q.PageToken = r.NextPageToken; q.PageToken == "" {
				break
			}
		}
		if have := strings.Join(got, " "); have != want {
			t.Errorf("%s: %q, want %q", filter, have, want)
		}
	}
	for prefix, want := range map[string]string{"shelves/a/books/": "a b", "shelves/-/books/": "a b c d e", "shelves/none/books/": ""} {
		if got := names(f.search(search.Query{Prefix: prefix})); got != want {
			t.Errorf("%s: %q, want %q", prefix, got, want)
		}
	}
	r := f.search(search.Query{Filter: "pages < 1000", Facets: []string{"genre", "labels"}, PageSize: 1})
	if got, want := fmt.Sprint(r.Facets), "[{genre [{cricket 1} {crime 1}]} {labels [{new 2} {red 2} {Über 1}]}]"; got != want {
		t.Errorf("facets %s, want %s", got, want)
	}
	for field, q := range map[string]search.Query{
		"filter":     {Filter: "title = One"},
		"facets":     {Facets: []string{"pages"}},
		"order_by":   {OrderBy: "pages"},
		"page_size":  {PageSize: -1},
		"page_token": {PageToken: r.NextPageToken, Filter: "pages < 999"},
	} {
		q.Type = f.v.Type("Book")
		_, err := s.Search(t.Context(), q)
		var e *store.Error
		if !errors.As(err, &e) || e.Code != store.InvalidArgument || e.Violations[0].Field != field {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func testText(t *testing.T, s search.Store) {
	f := newFixture(t, s)
	f.apply(search.Batch{Upserts: []search.Document{
		f.doc("shelves/a/books/a", 1, Body{Title: "The walking library", Summary: "A story of books & letters that walk.", Genre: "crime"}),
		f.doc("shelves/a/books/b", 1, Body{Title: "Gardens", Summary: "How walls and walks are made; no library is needed.", Genre: "crime"}),
		f.doc("shelves/b/books/library", 1, Body{Title: "Silence", Genre: "poetry"}),
		f.doc("shelves/b/books/d", 1, Body{Title: "Nothing of the kind"}),
	}})
	for text, want := range map[string]string{
		"library":            "a library b", // by weight, then by name
		"walked":             "a b",
		"library walk":       "a b",
		"library -walk":      "library",
		`"walking library"`:  "a",
		"silence or gardens": "b library",
		"zebra":              "",
		"&|! ' ) (":          "",
	} {
		if text == "library" {
			if r := f.search(search.Query{Text: text}); r.Hits[2].Name != "shelves/a/books/b" || r.Hits[0].Score <= r.Hits[2].Score {
				t.Errorf("%s: %+v", text, r.Hits)
			}
			continue
		}
		got := strings.Fields(names(f.search(search.Query{Text: text, OrderBy: search.ByName})))
		slices.Sort(got)
		if have := strings.Join(got, " "); have != want {
			t.Errorf("%s: %q, want %q", text, have, want)
		}
	}
	var seen []string
	q := search.Query{Text: "library", PageSize: 1, Facets: []string{"genre"}}
	for {
		r := f.search(q)
		seen = append(seen, names(r))
		if got := fmt.Sprint(r.Facets); got != "[{genre [{crime 2} {poetry 1}]}]" {
			t.Errorf("facets %s", got)
		}
		if q.PageToken = r.NextPageToken; q.PageToken == "" {
			break
		}
	}
	if slices.Sort(seen); strings.Join(seen, " ") != "a b library" {
		t.Errorf("pages have %v", seen)
	}
	h := f.search(search.Query{Text: "books walking", Filter: "genre = crime"}).Hits
	if len(h) != 1 || fmt.Sprint(h[0].Highlights) != "[{title The <em>walking</em> library} {summary story of <em>books</em> &amp; letters that <em>walk</em>}]" {
		t.Errorf("highlights %+v", h)
	}
}

func testNoText(t *testing.T, s search.Store) {
	f := newFixture(t, s)
	_, err := s.Search(context.Background(), search.Query{Type: f.v.Type("Book"), Text: "library"})
	if store.CodeOf(err) != store.FailedPrecondition {
		t.Errorf("full text: %v, want FailedPrecondition", err)
	}
}
