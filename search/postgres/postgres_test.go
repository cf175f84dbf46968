package postgres_test

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/search/postgres"
	"github.com/dbcontroller/db-controller/search/searchtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func open(t *testing.T, dsn, region string) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn, Service: "books.example.com", Region: region, Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestStore(t *testing.T) {
	searchtest.Run(t, searchtest.Config{FullText: true, Open: func(t *testing.T) search.Store { return open(t, pgtest.Database(t), "eu") }})
}

// P16: what was done to the store by hand is seen in its digests, and an emptied one forgets its cursor.
func TestByHand(t *testing.T) {
	dsn := pgtest.Database(t)
	s := open(t, dsn, "eu")
	all := feed.Range{To: searchtest.Ring}
	lease, _, err := s.Begin(t.Context(), all, "schema")
	if err != nil {
		t.Fatal(err)
	}
	v := searchtest.Version(t)
	doc := searchtest.Document(t, v, "shelves/a/books/a", 3, searchtest.Body{Title: "One", Genre: "crime", Pages: 3})
	write := func() {
		t.Helper()
		if err := s.Apply(t.Context(), lease, search.Batch{Upserts: []search.Document{doc}, Force: true,
			Cursor: feed.Cursor{Epoch: 1, Snapshot: feed.Snapshot{Xmin: 9, Xmax: 9}}}); err != nil {
			t.Fatal(err)
		}
	}
	good := func() bool {
		t.Helper()
		got, err := s.Digests(t.Context(), all, search.TypesOf(v))
		if err != nil {
			t.Fatal(err)
		}
		return len(got) == 1 && got[0] == searchtest.Digests(doc)[0]
	}
	conn, err := pgx.Connect(t.Context(), dsn+"&search_path=search_v1")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	for _, edit := range []string{
		"UPDATE documents SET a = 'two'", "UPDATE documents SET c = 'x'", `UPDATE documents SET body = '{"genre": "none"}'`, "UPDATE documents SET resource_version = 4",
		"UPDATE documents SET uuid = gen_random_uuid()", "UPDATE documents SET type = 'Shelf'", "DELETE FROM documents", "UPDATE documents SET name = name || 'x'",
	} {
		if _, err := conn.Exec(t.Context(), "DELETE FROM documents"); err != nil {
			t.Fatal(err)
		}
		write()
		if !good() {
			t.Fatal("what was written is not what is read")
		}
		if _, err := conn.Exec(t.Context(), edit); err != nil {
			t.Fatal(err)
		}
		if good() {
			t.Errorf("%s: not seen", edit)
		}
	}
	for _, edit := range []string{"TRUNCATE documents", "DROP TABLE documents", "DROP SCHEMA search_v1 CASCADE"} {
		if _, err := conn.Exec(t.Context(), edit); err != nil {
			t.Fatal(err)
		}
		if err := s.Check(t.Context(), lease); err == nil || !errors.Is(err, search.ErrLost) && edit != "DROP TABLE documents" {
			if edit != "DROP TABLE documents" {
				t.Errorf("%s: %v, want %v", edit, err, search.ErrLost)
			}
		}
		var c feed.Cursor
		if lease, c, err = s.Begin(t.Context(), all, "schema"); err != nil || !c.IsZero() {
			t.Fatalf("%s: begin gives %v, %v", edit, c, err)
		}
		write()
		if !good() {
			t.Errorf("%s: not filled again", edit)
		}
	}

	_, _, err = open(t, dsn, "us").Begin(t.Context(), all, "schema")
	if store.CodeOf(err) != store.FailedPrecondition {
		t.Errorf("the store of another region: %v", err)
	}
}
