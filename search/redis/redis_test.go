package redis_test

import (
	"errors"
	"fmt"
	"testing"

	goredis "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/search/redis"
	"github.com/dbcontroller/db-controller/search/searchtest"
	"github.com/dbcontroller/db-controller/store/feed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, url string) *redis.Store {
	t.Helper()
	s, err := redis.Open(redis.Config{URL: url, Service: "books.example.com", Region: "eu", Version: "v1", Ring: searchtest.Ring})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func client(t *testing.T, url string) *goredis.Client {
	t.Helper()
	o, err := goredis.ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	c := goredis.NewClient(o)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestStore(t *testing.T) {
	url := redisserver.New(t, nil).URL()
	searchtest.Run(t, searchtest.Config{Open: func(t *testing.T) search.Store {
		if err := client(t, url).FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		return open(t, url)
	}})
}

// P16: what was done to the store by hand is seen in its digests, and an emptied one forgets its cursor.
func TestByHand(t *testing.T) {
	url := redisserver.New(t, nil).URL()
	s, c := open(t, url), client(t, url)
	ctx, all, v := t.Context(), feed.Range{To: searchtest.Ring}, searchtest.Version(t)
	lease, _, err := s.Begin(ctx, all, "schema")
	if err != nil {
		t.Fatal(err)
	}
	doc := searchtest.Document(t, v, "shelves/a/books/a", 3, searchtest.Body{Title: "One", Genre: "crime", Pages: 3})
	write := func() {
		t.Helper()
		err := s.Apply(ctx, lease, search.Batch{Upserts: []search.Document{doc}, Force: true, Cursor: feed.Cursor{Epoch: 1, Snapshot: feed.Snapshot{Xmin: 9, Xmax: 9}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	good := func() bool {
		t.Helper()
		got, err := s.Digests(ctx, all, search.TypesOf(v))
		if err != nil {
			t.Fatal(err)
		}
		return len(got) == 1 && got[0] == searchtest.Digests(doc)[0]
	}
	const p = "dbc-search-1:{books.example.com/eu/v1}:"
	key := p + "d:" + doc.Name
	for what, edit := range map[string]func() error{
		"text":        func() error { return c.HSet(ctx, key, "a", "two").Err() },
		"values":      func() error { return c.HSet(ctx, key, "j", "{}").Err() },
		"version":     func() error { return c.HSet(ctx, key, "v", "4").Err() },
		"no version":  func() error { return c.HDel(ctx, key, "v").Err() },
		"places":      func() error { return c.HSet(ctx, key, "i", "[[").Err() },
		"engine tag":  func() error { return c.HSet(ctx, key, "x:genre", "v61").Err() },
		"engine path": func() error { return c.HDel(ctx, key, "p").Err() },
		"more fields": func() error { return c.HSet(ctx, key, "y:labels", "5").Err() },
		"document":    func() error { return c.Del(ctx, key).Err() },
		"index entry": func() error { return c.Del(ctx, p+"x:Book:genre").Err() },
		"number": func() error {
			return c.ZAdd(ctx, p+"y:Book:pages", goredis.Z{Score: 4, Member: "3\x00" + doc.Name}).Err()
		},
		"list of names": func() error { return c.ZRem(ctx, p+"n", doc.Name).Err() },
		"ghost":         func() error { return c.ZAdd(ctx, p+"n", goredis.Z{Member: "shelves/a/books/ghost"}).Err() },
	} {
		if err := s.Apply(ctx, lease, search.Batch{Deletions: []search.NameVersion{{Name: "shelves/a/books/ghost"}}, Force: true}); err != nil {
			t.Fatal(err)
		}
		write()
		if !good() {
			t.Fatalf("before %s: what was written is not what is read", what)
		}
		if err := edit(); err != nil {
			t.Fatal(err)
		}
		if good() {
			t.Errorf("%s: not seen", what)
		}
	}
	if err := c.FlushAll(ctx).Err(); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(ctx, lease); !errors.Is(err, search.ErrLost) {
		t.Errorf("check of an emptied store: %v", err)
	}
	if err := s.Apply(ctx, lease, search.Batch{Upserts: []search.Document{doc}}); !errors.Is(err, search.ErrLost) {
		t.Errorf("batch for an emptied store: %v", err)
	}
	var cursor feed.Cursor
	if lease, cursor, err = s.Begin(ctx, all, "schema"); err != nil || !cursor.IsZero() {
		t.Fatalf("begin gives %v, %v", cursor, err)
	}
	write()
	if !good() {
		t.Error("not filled again")
	}
	if err := c.ScriptFlush(ctx).Err(); err != nil {
		t.Fatal(err)
	}
	if err := s.Apply(ctx, lease, search.Batch{Upserts: []search.Document{doc}}); !errors.Is(err, search.ErrLost) {
		t.Errorf("a server without the scripts: %v", err)
	}
}

// An index narrows a search: it must not matter whether it is used.
func TestManyDocuments(t *testing.T) {
	s := open(t, redisserver.New(t, nil).URL())
	v := searchtest.Version(t)
	lease, _, err := s.Begin(t.Context(), feed.Range{To: searchtest.Ring}, "schema")
	if err != nil {
		t.Fatal(err)
	}
	var b search.Batch
	for i := range 2500 {
		b.Upserts = append(b.Upserts, searchtest.Document(t, v, fmt.Sprintf("shelves/s%d/books/b%04d", i%3, i), 1, searchtest.Body{
			Genre: fmt.Sprintf("g%d", i%7), Pages: i, Labels: []string{fmt.Sprintf("l%d", i%100), "all"},
		}))
	}
	if err := s.Apply(t.Context(), lease, b); err != nil {
		t.Fatal(err)
	}
	for filter, want := range map[string]int{
		`"labels":all`: 2500, `"labels":l7`: 25, `genre = g1`: 357, `genre = "g*"`: 2500, `pages >= 100 AND pages < 110`: 10, `pages > 10`: 2489,
		`name = "shelves/s1/*" "labels":"l9*" pages < 1000`: 36,
	} {
		got, q := 0, search.Query{Type: v.Type("Book"), Filter: filter, PageSize: 200}
		last := ""
		for {
			r, err := s.Search(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			for _, h := range r.Hits {
				if h.Name <= last {
					t.Fatalf("%s: %s after %s", filter, h.Name, last)
				}
				last = h.Name
			}
			got += len(r.Hits)
			if q.PageToken = r.NextPageToken; q.PageToken == "" {
				break
			}
		}
		if got != want {
			t.Errorf("%s: %d hits, want %d", filter, got, want)
		}
	}
}
