package postgres

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

// dying is a context that ends when its Done has been called so many times: in the middle of whatever that is.
type dying struct {
	context.Context
	calls int
	end   context.CancelFunc
}

func (d *dying) Done() <-chan struct{} {
	if d.calls--; d.calls < 0 {
		d.end()
	}
	return d.Context.Done()
}

// A caller may lose patience at any point of the first merge of a connection. If the connection lives on, its next merge must work.
func TestPreparingTheMergeMayBeInterruptedAnywhere(t *testing.T) {
	ctx := t.Context()
	dsn := pgtest.Database(t)
	s, err := Open(ctx, Config{DSN: dsn, Service: "library.example.com", Region: "eu", Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	survived := 0
	for calls := range 12 {
		config, err := pgx.ParseConfig(dsn)
		if err != nil {
			t.Fatal(err)
		}
		config.RuntimeParams["search_path"] = "v1"
		conn, err := pgx.ConnectConfig(ctx, config)
		if err != nil {
			t.Fatal(err)
		}
		inner, end := context.WithCancel(ctx)
		first := prepareMerge(&dying{inner, calls, end}, conn.PgConn())
		end()
		if !conn.IsClosed() {
			if first != nil {
				survived++
			}
			if err := prepareMerge(ctx, conn.PgConn()); err != nil {
				t.Errorf("interrupted after %d looks at the context (%v); then: %v", calls, first, err)
			}
		}
		conn.Close(ctx)
	}
	if survived == 0 {
		t.Error("no connection survived an interruption: the test tests nothing")
	}
}
