package redis_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/search/redis"
	"github.com/dbcontroller/db-controller/search/searchtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

const (
	keys    = "dbc-search-1:{books.example.com/eu/v1}:"
	indexes = keys + "q:"
)

// front stands before a real Redis and answers MODULE LIST and FT.* itself, in the documented form of RESP2; it passes everything else on.
type front struct {
	t       *testing.T
	backend string
	socket  string

	mu      sync.Mutex
	version int // of the module search; 0 without it
	indexes []string
	filling bool // the indexes do not have all documents yet
	answer  func(args []string) any
	calls   [][]string // of FT.*
	conns   map[net.Conn]bool
}

// failure is an error as a reply.
type failure string

func newFront(t *testing.T, version int) *front {
	t.Helper()
	f := &front{
		t: t, version: version, socket: filepath.Join(t.TempDir(), "s"), conns: map[net.Conn]bool{},
		backend: strings.TrimPrefix(redisserver.New(t, nil).URL(), "unix://"),
	}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { f.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		f.cut()
		all.Wait()
	})
	return f
}

// cut ends all connections.
func (f *front) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		_ = c.Close()
	}
}

func (f *front) serve(c net.Conn) {
	defer c.Close()
	b, err := net.Dial("unix", f.backend)
	if err != nil {
		return
	}
	defer b.Close()
	f.mu.Lock()
	f.conns[c] = true
	f.mu.Unlock()
	in, out, back := bufio.NewReader(c), bufio.NewWriter(c), bufio.NewReader(b)
	for {
		if in.Buffered() == 0 && out.Flush() != nil {
			return
		}
		var raw bytes.Buffer
		args, err := readReply(in, &raw)
		if err != nil {
			return
		}
		if reply, mine := f.reply(args); mine {
			writeReply(out, reply)
			continue
		}
		if _, err := raw.WriteTo(b); err != nil {
			return
		}
		if _, err := readReply(back, out); err != nil {
			return
		}
	}
}

// readReply copies one value, and returns the texts in it.
func readReply(r *bufio.Reader, to io.Writer) ([]string, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	_, _ = io.WriteString(to, line)
	text := strings.TrimSpace(line[1:])
	n, _ := strconv.Atoi(text)
	switch line[0] {
	case '$':
		if n < 0 {
			return nil, nil
		}
		body := make([]byte, n+2)
		if _, err := io.ReadFull(r, body); err != nil {
			return nil, err
		}
		_, _ = to.Write(body)
		return []string{string(body[:n])}, nil
	case '*':
		var all []string
		for range n {
			part, err := readReply(r, to)
			if err != nil {
				return nil, err
			}
			all = append(all, part...)
		}
		return all, nil
	}
	return []string{text}, nil
}

func writeReply(w *bufio.Writer, v any) {
	switch v := v.(type) {
	case nil:
		_, _ = w.WriteString("$-1\r\n")
	case int:
		_, _ = fmt.Fprintf(w, ":%d\r\n", v)
	case string:
		_, _ = fmt.Fprintf(w, "$%d\r\n%s\r\n", len(v), v)
	case failure:
		_, _ = fmt.Fprintf(w, "-%s\r\n", string(v))
	case []any:
		_, _ = fmt.Fprintf(w, "*%d\r\n", len(v))
		for _, o := range v {
			writeReply(w, o)
		}
	default:
		panic(fmt.Sprintf("%T is no reply", v))
	}
}

func (f *front) reply(args []string) (any, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := strings.ToUpper(args[0])
	switch {
	case name == "MODULE":
		if f.version == 0 {
			return []any{}, true
		}
		return []any{[]any{"name", "search", "ver", f.version, "path", "/usr/lib/redisearch.so", "args", []any{}}}, true
	case !strings.HasPrefix(name, "FT."):
		return nil, false
	}
	f.calls = append(f.calls, args)
	if f.version == 0 {
		return failure("ERR unknown command '" + args[0] + "', with args beginning with: "), true
	}
	have := slices.ContainsFunc(args, func(a string) bool { return slices.Contains(f.indexes, a) })
	switch {
	case name == "FT._LIST":
		var all []any
		for _, i := range f.indexes {
			all = append(all, i)
		}
		return all, true
	case name == "FT.CREATE" && have:
		return failure("Index already exists"), true
	case name == "FT.CREATE":
		f.indexes = append(f.indexes, args[1])
		return "OK", true
	case !have && name == "FT.SEARCH":
		return failure(args[1] + ": no such index"), true
	case !have:
		return failure("Unknown Index name"), true
	case name == "FT.DROPINDEX":
		f.indexes = slices.DeleteFunc(f.indexes, func(i string) bool { return i == args[1] })
		return "OK", true
	case name == "FT.INFO" && f.filling:
		return []any{"index_name", args[1], "num_docs", "3", "indexing", 1, "percent_indexed", "0.43", "hash_indexing_failures", 0}, true
	case name == "FT.INFO":
		return []any{"index_name", args[1], "num_docs", "7", "indexing", 0, "percent_indexed", "1", "hash_indexing_failures", 0}, true
	}
	return f.answer(args), true
}

// set changes the server.
func (f *front) set(change func(f *front)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// called returns the calls since it was asked last that begin with name, without what follows it up to the index.
func (f *front) called(name string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for _, c := range f.calls {
		if c[0] == name {
			all = append(all, strings.Join(c[1:], " "))
		}
	}
	f.calls = nil
	return all
}

func (f *front) open(t *testing.T, log io.Writer, declared func() *descriptor.Version) *redis.Store {
	t.Helper()
	s, err := redis.Open(redis.Config{
		URL: "unix://" + f.socket, Service: "books.example.com", Region: "eu", Version: "v1", Ring: searchtest.Ring,
		Declared: declared, Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func begin(t *testing.T, s *redis.Store) *search.Lease {
	t.Helper()
	l, _, err := s.Begin(t.Context(), feed.Range{To: searchtest.Ring}, "schema")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// row is what FT.SEARCH answers for one document.
func row(name string, score string, more ...any) []any {
	return []any{keys + "d:" + name, score, append([]any{"t", "Book", "e", "1", "v", "4"}, more...)}
}

// F34: the index is made when the shards are taken, those of other declarations go, and those of others stay.
func TestEngineIndexes(t *testing.T) {
	v := searchtest.Version(t)
	f := newFront(t, 21005)
	old, other := indexes+"Book:0123456789abcdef-1", "dbc-search-1:{books.example.com/us/v1}:q:Book:0123456789abcdef-1"
	f.indexes = []string{old, other}
	var log bytes.Buffer
	s := f.open(t, &log, func() *descriptor.Version { return v })
	begin(t, s)
	name := indexes + "Book:" + v.Type("Book").Search.Fingerprint + "-1"
	if got, want := f.indexes, []string{other, name}; !slices.Equal(got, want) {
		t.Errorf("indexes %q, want %q", got, want)
	}
	want := name + " ON HASH PREFIX 1 " + keys + `d: FILTER @t=="Book" LANGUAGE english STOPWORDS 33 a an and are as at be but by for if in into is it no not of on or such that the their then ` +
		"there these they this to was will with SCHEMA a TEXT WEIGHT 10 c TEXT WEIGHT 2 d TEXT WEIGHT 1 n TAG SORTABLE UNF NOINDEX p TAG x:genre AS f0 TAG x:pages AS f1 TAG " +
		"y:pages AS g1 NUMERIC x:print.color AS f2 TAG x:labels AS f3 TAG"
	if got := f.called("FT.CREATE"); !slices.Equal(got, []string{want}) {
		t.Errorf("FT.CREATE %q, want %q", got, want)
	}
	if !strings.Contains(log.String(), "version=2.10.5") {
		t.Errorf("log: %s", log.String())
	}
	begin(t, s)
	if got := f.called("FT.CREATE"); got != nil {
		t.Errorf("made again: %q", got)
	}
	if err := redis.Drop(t.Context(), redis.Config{URL: "unix://" + f.socket, Service: "books.example.com", Region: "eu", Version: "v1", Ring: searchtest.Ring}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(f.indexes, []string{other}) {
		t.Errorf("after Drop there are %q", f.indexes)
	}
}

// F33, F34: hits with highlights, in pages.
func TestEngineSearch(t *testing.T) {
	v := searchtest.Version(t)
	f := newFront(t, 80001)
	s := f.open(t, io.Discard, nil)
	begin(t, s)
	rows := [][]any{
		row("shelves/a/books/a", "12.5", "j", `{"genre":"crime"}`, "a", "a\t\x1f\tThe \x02walking\x03 \x02library\x03", "c", "R&D", "d", "\t\ue000"),
		row("shelves/a/books/gone", "12"),
		row("shelves/b/books/b", "7", "j", `{}`, "a", "b\t\x1f\tno mark"),
		row("shelves/b/books/c", "1.5", "j", `{"pages":3}`),
	}
	rows[1][2] = nil // deleted while the engine looked
	f.answer = func(args []string) any {
		from, _ := strconv.Atoi(args[slices.Index(args, "LIMIT")+1])
		n, _ := strconv.Atoi(args[slices.Index(args, "LIMIT")+2])
		reply := []any{len(rows)}
		for _, r := range rows[from:min(from+n, len(rows))] {
			reply = append(reply, r...)
		}
		return reply
	}
	q := search.Query{Type: v.Type("Book"), Text: "walking librar*", PageSize: 2, Prefix: "shelves/-/books/"}
	r, err := s.Search(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	want := `[{shelves/a/books/a {1 4} 12.5 [{title The <em>walking</em> <em>library</em>}]} {shelves/b/books/b {1 4} 7 []}]`
	if got := fmt.Sprint(r.Hits); got != want || r.NextPageToken == "" {
		t.Errorf("hits %s, token %q, want %s", got, r.NextPageToken, want)
	}
	head := indexes + "Book:" + v.Type("Book").Search.Fingerprint + "-1 ((walking librar*) (@p:{1v7368656c766573} @p:{3v626f6f6b73} @p:{n4})) WITHSCORES RETURN 7 t e v j a c d " +
		"HIGHLIGHT FIELDS 3 a c d TAGS \x02 \x03 TIMEOUT 10000 "
	if got := f.called("FT.SEARCH"); !slices.Equal(got, []string{head + "LIMIT 0 3 DIALECT 2", head + "LIMIT 3 3 DIALECT 2"}) {
		t.Errorf("FT.SEARCH %q", got)
	}
	q.PageToken = r.NextPageToken
	if r, err = s.Search(t.Context(), q); err != nil || len(r.Hits) != 1 || r.Hits[0].Name != "shelves/b/books/c" || r.NextPageToken != "" {
		t.Errorf("second page %+v, %v", r, err)
	}

	// What the engine cannot say is judged on the documents.
	r, err = s.Search(t.Context(), search.Query{Type: q.Type, Text: "library", Filter: `pages = 3 AND name = "*"`, OrderBy: search.ByName})
	if err != nil || len(r.Hits) != 1 || r.Hits[0].Name != "shelves/b/books/c" {
		t.Errorf("with a filter: %+v, %v", r, err)
	}
	if got := f.called("FT.SEARCH"); len(got) != 2 || !strings.Contains(got[1], "((library) @g1:[3 3]) WITHSCORES") || !strings.Contains(got[1], "SORTBY n ASC LIMIT 0 100") {
		t.Errorf("FT.SEARCH %q", got)
	}

	// A text without a word finds nothing, and the engine is not asked.
	if r, err = s.Search(t.Context(), search.Query{Type: q.Type, Text: "the ) @", Facets: []string{"genre"}}); err != nil || len(r.Hits) != 0 || fmt.Sprint(r.Facets) != "[{genre []}]" {
		t.Errorf("without a word: %+v, %v", r, err)
	}
	if got := f.called("FT.SEARCH"); got != nil {
		t.Errorf("asked %q", got)
	}
	for what, reply := range map[string]any{
		"error": failure("Syntax error at offset 3 near x"), "count": []any{"many"}, "length": []any{1, "key"}, "key": []any{1, "another", "1", []any{}}, "score": []any{1, keys + "d:x", "high", []any{}},
	} {
		f.set(func(f *front) { f.answer = func([]string) any { return reply } })
		if _, err = s.Search(t.Context(), search.Query{Type: q.Type, Text: "library"}); store.CodeOf(err) != store.Unavailable {
			t.Errorf("answer with another %s: %v", what, err)
		}
	}
}

// F35: values are counted by the engine where its query is exact, and of the documents otherwise.
func TestEngineFacets(t *testing.T) {
	v := searchtest.Version(t)
	f := newFront(t, 21005)
	s := f.open(t, io.Discard, nil)
	begin(t, s)
	long := strings.Repeat("61", 256)
	values := []any{2, []any{"value", "v6372696d65", "count", "41"}, []any{"value", "vc39c626572", "count", "2"}}
	f.answer = func(args []string) any {
		switch {
		case args[0] == "FT.SEARCH":
			return []any{0}
		case args[0] == "FT.CURSOR":
			return []any{[]any{1, []any{"__key", keys + "d:shelves/a/books/c", "j", `{"genre":"crime","pages":30}`}}, 0}
		case slices.Contains(args, "WITHCURSOR"):
			return []any{[]any{1, []any{"__key", keys + "d:shelves/a/books/a", "j", `{"genre":"crime","pages":3,"labels":["x","y"]}`},
				[]any{"__key", keys + "d:shelves/a/books/b", "j", `{"genre":"poetry","pages":0.5}`}, []any{"__key", keys + "d:shelves/a/books/gone"}}, 77}
		}
		return values
	}
	ask := func(filter, want string) []string {
		t.Helper()
		f.called("")
		r, err := s.Search(t.Context(), search.Query{Type: v.Type("Book"), Text: "library", Filter: filter, Facets: []string{"genre", "labels"}})
		if err != nil || fmt.Sprint(r.Facets) != want {
			t.Errorf("%s: %+v, %v, want %s", filter, r, err, want)
		}
		return f.called("FT.AGGREGATE")
	}
	got := ask("genre = crime", "[{genre [{crime 41} {Über 2}]} {labels [{crime 41} {Über 2}]}]")
	tail := "LOAD 1 @f%d APPLY split(@f%d) AS value GROUPBY 1 @value REDUCE COUNT 0 AS count SORTBY 4 @count DESC @value ASC MAX 20 LIMIT 0 20 DIALECT 2"
	if len(got) != 2 || !strings.Contains(got[0], " (((library) @f0:{v6372696d65}) @p:{h67656e7265}) TIMEOUT 10000 "+fmt.Sprintf(tail, 0, 0)) || !strings.Contains(got[1], fmt.Sprintf(tail, 3, 3)) {
		t.Errorf("FT.AGGREGATE %q", got)
	}
	got = ask("pages > 1", "[{genre [{crime 2}]} {labels [{x 1} {y 1}]}]")
	if len(got) != 1 || !strings.HasSuffix(got[0], " ((library) @g1:[1 +inf]) TIMEOUT 10000 LOAD 2 @__key @j WITHCURSOR COUNT 1000 DIALECT 2") {
		t.Errorf("FT.AGGREGATE %q", got)
	}
	f.set(func(*front) { values = []any{1, []any{"value", "v" + long, "count", "41"}} })
	ask("", "[{genre [{crime 2} {poetry 1}]} {labels [{x 1} {y 1}]}]") // a value that the index has only a part of
	f.set(func(*front) { values = []any{1, []any{"value", "v6", "count", "41"}} })
	_, err := s.Search(t.Context(), search.Query{Type: v.Type("Book"), Text: "library", Facets: []string{"genre"}})
	if store.CodeOf(err) != store.Unavailable {
		t.Errorf("a value of another form: %v", err)
	}
}

// X35: full text follows what the server can do now; filters are answered all the time.
func TestEngineComesAndGoes(t *testing.T) {
	v := searchtest.Version(t)
	f := newFront(t, 0)
	f.answer = func([]string) any { return append([]any{1}, row("shelves/a/books/a", "1", "j", "{}")...) }
	var log lockedBuffer
	s := f.open(t, &log, nil)
	lease := begin(t, s)
	if err := s.Apply(t.Context(), lease, search.Batch{Upserts: []search.Document{searchtest.Document(t, v, "shelves/a/books/a", 4, searchtest.Body{Genre: "crime"})}}); err != nil {
		t.Fatal(err)
	}
	ask := func(what string, want store.Code, reason string) {
		t.Helper()
		r, err := s.Search(t.Context(), search.Query{Type: v.Type("Book"), Text: "library"})
		var e *store.Error
		switch {
		case want == 0 && (err != nil || len(r.Hits) != 1):
			t.Errorf("%s: %+v, %v", what, r, err)
		case want != 0 && (!errors.As(err, &e) || e.Code != want || !strings.Contains(e.Reason, reason)):
			t.Errorf("%s: %v, want %v with %q", what, err, want, reason)
		}
		if r, err = s.Search(t.Context(), search.Query{Type: v.Type("Book"), Filter: "genre = crime", Facets: []string{"genre"}}); err != nil || len(r.Hits) != 1 {
			t.Errorf("%s: by a filter %+v, %v", what, r, err)
		}
	}
	ask("a plain Redis", store.FailedPrecondition, "without the Query Engine")
	f.set(func(f *front) { f.version, f.filling = 21005, true })
	ask("the module is loaded", store.Unavailable, "43 % is done")
	f.set(func(f *front) { f.filling = false })
	ask("the index is filled", 0, "")
	f.called("")
	ask("it stays so", 0, "")
	if got := f.called("FT.INFO"); got != nil {
		t.Errorf("asked again for %q", got)
	}
	f.set(func(f *front) { f.indexes = nil })
	ask("the index is gone", 0, "")
	f.set(func(f *front) { f.indexes, f.filling = nil, true })
	ask("the index is gone from a full server", store.Unavailable, "43 %")
	f.set(func(f *front) { f.version, f.filling = 0, false })
	ask("the module is gone", store.FailedPrecondition, "without the Query Engine")
	f.set(func(f *front) { f.version = 21005 })
	ask("it is back", 0, "")
	f.set(func(f *front) { f.version = 10202 })
	f.cut()
	f.called("")
	ask("another server", store.FailedPrecondition, "version 1.2.2 (2.4 at least is needed)")
	if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "version 1.2.2") {
		t.Errorf("log: %s", log.String())
	}
	ask("it stays so", store.FailedPrecondition, "version 1.2.2")
	if got := f.called("FT.CREATE"); got != nil {
		t.Errorf("version 1 was asked for %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Search(ctx, search.Query{Type: v.Type("Book"), Text: "library"}); !errors.Is(err, context.Canceled) {
		t.Errorf("after a cancel: %v", err)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// X35: version 1 of the module takes FT.CREATE ... ON HASH and indexes nothing: a server with it counts as plain. Debian has it as redis-redisearch.
func TestEngineOfVersionOne(t *testing.T) {
	module := cmp.Or(os.Getenv("REDISEARCH1"), "/usr/lib/redis/modules/redisearch.so")
	if _, err := os.Stat(module); err != nil {
		t.Skip("redis-redisearch 1.2 of Debian is not installed; REDISEARCH1 names its redisearch.so")
	}
	url := redisserver.New(t, map[string]string{"loadmodule": module}).URL()
	modules, err := client(t, url).Do(t.Context(), "MODULE", "LIST").Result()
	if err != nil || !strings.Contains(fmt.Sprint(modules), "name:ft") && !strings.Contains(fmt.Sprint(modules), "ft ver 10") {
		t.Fatalf("modules %v, %v", modules, err)
	}
	var log lockedBuffer
	v := searchtest.Version(t)
	s, err := redis.Open(redis.Config{
		URL: url, Service: "books.example.com", Region: "eu", Version: "v1", Ring: searchtest.Ring,
		Declared: func() *descriptor.Version { return v }, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	begin(t, s)
	_, err = s.Search(t.Context(), search.Query{Type: v.Type("Book"), Text: "library"})
	if store.CodeOf(err) != store.FailedPrecondition || !strings.Contains(err.Error(), "version 1.2.") || !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("%v; log: %s", err, log.String())
	}
	searchtest.Run(t, searchtest.Config{Open: func(t *testing.T) search.Store {
		if err := client(t, url).FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		return open(t, url)
	}})
}
