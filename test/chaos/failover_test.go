package chaos

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
)

// TestCopiesFollowTheSurvivor: the owner's database is replaced by one that lacks its last commits, which copies already hold. The feed epoch
// rises, and all copies end equal to the surviving owner, although what they held had higher numbers.
func TestCopiesFollowTheSurvivor(t *testing.T) {
	bin, err := pgserver.Find("15")
	if err != nil {
		t.Fatal(err)
	}
	for name, replace := range map[string]func(t *testing.T, old *pgserver.Server, losing func()) *pgserver.Server{
		"a standby that lost commits is promoted": func(t *testing.T, old *pgserver.Server, losing func()) *pgserver.Server {
			standby := pgtest.Standby(t, old, pgserver.Config{Version: "15"})
			check(t, standby.CatchUp(t.Context()))
			check(t, standby.CutReplication(t.Context()))
			losing()
			check(t, old.Kill())
			check(t, standby.Promote(t.Context()))
			return standby
		},
		"an older dump is restored": func(t *testing.T, old *pgserver.Server, losing func()) *pgserver.Server {
			dump, err := exec.CommandContext(t.Context(), filepath.Join(bin, "pg_dump"), old.DSN("eu")).Output()
			check(t, err)
			losing()
			check(t, old.Kill())
			fresh := pgtest.Server(t, pgserver.Config{Version: "15"})
			check(t, fresh.CreateDatabase(t.Context(), "eu"))
			load := exec.CommandContext(t.Context(), filepath.Join(bin, "psql"), "-v", "ON_ERROR_STOP=1", "-q", fresh.DSN("eu"))
			load.Stdin = bytes.NewReader(dump)
			out, err := load.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			return fresh
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			eu := w.places["eu"]
			apply := func(wr store.Write) {
				t.Helper()
				_, err := store.Apply(t.Context(), eu.store(), wr)
				check(t, err)
			}
			site := func(n int, value string) store.Write {
				return store.Write{Op: store.Save, Name: fmt.Sprintf("folders/all/regions/eu/sites/%d", n), Body: []byte(`{"value":"` + value + `"}`)}
			}
			settle := func() {
				t.Helper()
				var left []string
				err := retry(t.Context(), 60*time.Second, func() (err error) {
					if left, _, err = w.differences(t.Context()); err == nil && len(left) > 0 {
						err = fmt.Errorf("%d differences, for example: %s", len(left), strings.Join(left[:min(5, len(left))], "\n"))
					}
					return err
				})
				check(t, err)
			}
			apply(folder("all", regions...))
			for n := range 50 {
				apply(site(n, "kept"))
			}
			settle()
			survivor := replace(t, eu.pg, func() {
				for n := range 20 { // changed, deleted, created: all of it will be lost
					apply(site(n, "lost"))
					apply(store.Write{Op: store.Delete, Name: site(30+n, "").Name})
					apply(site(100+n, "lost"))
				}
				settle()
			})
			check(t, w.halt(eu))
			eu.pg = survivor
			w.start(eu)
			apply(site(1, "after"))
			apply(site(101, "after"))
			settle()

			held, err := w.places["us"].read(t.Context())
			check(t, err)
			if got := len(held); got != 52 { // the folder, 50 that were kept, and one that is new
				t.Errorf("us holds %d rows, want 52", got)
			}
			for name, r := range held {
				if strings.Contains(r.content, "lost") {
					t.Errorf("us still holds %s: %s", name, r.content)
				}
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
