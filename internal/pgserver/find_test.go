package pgserver_test

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

func TestFind(t *testing.T) {
	version := pgtest.Versions(t)[0]
	bin, err := pgserver.Find(version)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := pgserver.Find(""); err != nil || got == "" {
		t.Errorf("Find of any version = %q, %v", got, err)
	}

	t.Setenv("DBC_POSTGRES_BIN", bin)
	if got, err := pgserver.Find(version); err != nil || got != bin {
		t.Errorf("Find(%s) = %q, %v, want the folder that was named, %s", version, got, err, bin)
	}
	t.Setenv("DBC_POSTGRES_BIN", filepath.Join(t.TempDir(), "nothing"))
	if got, err := pgserver.Find(version); err == nil {
		t.Errorf("Find passed over a wrong DBC_POSTGRES_BIN and found %s", got)
	}
	t.Setenv("DBC_POSTGRES_BIN", "")
	t.Setenv("DBC_CACHE", t.TempDir())
	t.Setenv("PATH", "")
	if _, err := pgserver.Find("18"); err != nil && !errors.Is(err, pgserver.ErrNotInstalled) {
		t.Errorf("Find(18) of a bare machine = %v, want ErrNotInstalled", err)
	}
	for _, bad := range []string{"14", "19", "latest", "15.1"} {
		if _, err := pgserver.Find(bad); err == nil || errors.Is(err, pgserver.ErrNotInstalled) {
			t.Errorf("Find(%s) = %v, want an error about the version", bad, err)
		}
	}
}
