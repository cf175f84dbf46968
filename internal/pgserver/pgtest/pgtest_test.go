package pgtest_test

import (
	"os"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestDatabasesAreNewAndDropped(t *testing.T) {
	var dropped string
	t.Run("one test", func(t *testing.T) {
		a, b := pgtest.Database(t), pgtest.Database(t)
		if a == b {
			t.Fatalf("the same database twice: %s", a)
		}
		conn, err := pgx.Connect(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		// Left open on purpose: a test that forgets must not block the drop.
		if _, err := conn.Exec(t.Context(), "CREATE TABLE t ()"); err != nil {
			t.Fatal(err)
		}
		dropped = a
	})
	if conn, err := pgx.Connect(t.Context(), dropped); err == nil {
		conn.Close(t.Context())
		t.Error("the database is still there after its test")
	}
}
