package pgserver_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

// helperVar makes the test binary start a cluster, say where, and wait to be killed.
const helperVar = "PGSERVER_TEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperVar) != "" {
		s, err := pgserver.Start(context.Background(), pgserver.Config{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(s.Dir())
		select {}
	}
	os.Exit(pgtest.Main(m))
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func exec1(t *testing.T, s *pgserver.Server, sql string, args ...any) {
	t.Helper()
	ctx := testContext(t)
	conn, err := s.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func query[T any](t *testing.T, dsn, sql string) T {
	t.Helper()
	ctx := testContext(t)
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var v T
	if err := conn.QueryRow(ctx, sql).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// eachVersion runs a test on every installed major version.
func eachVersion(t *testing.T, test func(t *testing.T, cfg pgserver.Config)) {
	for _, version := range pgtest.Versions(t) {
		t.Run(version, func(t *testing.T) { test(t, pgserver.Config{Version: version}) })
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestServerHasTheRightVersionAndSettings(t *testing.T) {
	eachVersion(t, func(t *testing.T, cfg pgserver.Config) {
		cfg.Settings = map[string]string{"work_mem": "7MB", "application_name": `it's a \ test`}
		s := pgtest.Server(t, cfg)
		dsn := s.DSN("postgres")
		if got := query[int](t, dsn, "SELECT current_setting('server_version_num')::int / 10000"); strconv.Itoa(got) != cfg.Version {
			t.Errorf("major version = %d, want %s", got, cfg.Version)
		}
		for name, want := range map[string]string{
			"wal_level": "logical", "max_prepared_transactions": "50", "fsync": "off", "synchronous_commit": "on",
			"work_mem": "7MB", "application_name": `it's a \ test`, "server_encoding": "UTF8", "listen_addresses": "",
		} {
			if got := query[string](t, dsn, "SELECT current_setting('"+name+"')"); got != want {
				t.Errorf("%s = %q, want %q", name, got, want)
			}
		}
		if got := query[string](t, dsn, "SELECT pg_create_logical_replication_slot('s', 'pgoutput')::text"); got == "" {
			t.Error("no logical replication slot")
		}
	})
}

func TestStopLeavesNothing(t *testing.T) {
	for name, before := range map[string]func(*pgserver.Server) error{
		"running": func(*pgserver.Server) error { return nil },
		"crashed": func(s *pgserver.Server) error { return s.Crash(syscall.SIGKILL) },
		"killed":  (*pgserver.Server).Kill,
	} {
		t.Run(name, func(t *testing.T) {
			s, err := pgserver.Start(testContext(t), pgserver.Config{})
			if err != nil {
				t.Fatal(err)
			}
			pid, segment := postmaster(t, s.Dir())
			if err := before(s); err != nil {
				t.Fatal(err)
			}
			if err := s.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := s.Stop(); err != nil {
				t.Errorf("second Stop: %v", err)
			}
			if _, err := os.Stat(filepath.Dir(s.Dir())); !os.IsNotExist(err) {
				t.Errorf("stat of the folder = %v, want not exist", err)
			}
			if alive(pid) {
				t.Error("the postmaster is still there")
			}
			if text, err := os.ReadFile("/proc/sysvipc/shm"); err == nil && segment != "" {
				for line := range strings.Lines(string(text)) {
					if f := strings.Fields(line); len(f) > 1 && f[1] == segment {
						t.Errorf("shared memory is still there: %s", line)
					}
				}
			}
			if err := s.Restart(testContext(t)); err == nil {
				t.Error("Restart after Stop succeeded")
			}
		})
	}
}

// postmaster returns the process and the System V shared memory of a cluster.
func postmaster(t *testing.T, data string) (pid int, segment string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	pid, err = strconv.Atoi(lines[0])
	if err != nil {
		t.Fatal(err)
	}
	if f := strings.Fields(lines[6]); len(f) == 2 {
		segment = f[1]
	}
	return pid, segment
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

func TestCommitsSurviveEveryCrash(t *testing.T) {
	eachVersion(t, func(t *testing.T, cfg pgserver.Config) {
		s := pgtest.Server(t, cfg)
		exec1(t, s, "CREATE TABLE n (i int)")
		crashes := []func() error{
			s.Kill,
			func() error { return s.Crash(syscall.SIGKILL) },
			func() error { return nil }, // Restart of a running one
		}
		for i, crash := range crashes {
			exec1(t, s, "INSERT INTO n VALUES ($1)", i)
			if err := crash(); err != nil {
				t.Fatal(err)
			}
			if err := s.Restart(testContext(t)); err != nil {
				t.Fatal(err)
			}
			if got := query[int](t, s.DSN("postgres"), "SELECT count(*) FROM n"); got != i+1 {
				t.Fatalf("%d rows after crash %d, want %d", got, i, i+1)
			}
		}
	})
}

func TestNothingSurvivesOurDeath(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	helper := exec.Command(self)
	helper.Env = append(os.Environ(), helperVar+"=1")
	out, err := helper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := helper.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	data := strings.TrimSpace(line)
	if err != nil || !filepath.IsAbs(data) {
		t.Fatalf("helper said %q, %v", line, err)
	}
	pid, _ := postmaster(t, data)

	if err := helper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = helper.Wait() // "signal: killed"
	eventually(t, "the postmaster is gone", func() bool { return !alive(pid) })

	pgtest.Server(t, pgserver.Config{}) // the next start cleans up
	if _, err := os.Stat(data); !os.IsNotExist(err) {
		t.Errorf("stat of the dead process's data = %v, want not exist", err)
	}
}

func TestGivenDirIsKeptAndReused(t *testing.T) {
	dir := openTempDir(t)
	cfg := pgserver.Config{Dir: filepath.Join(dir, "data"), Durable: true, TCP: true}

	first := pgtest.Server(t, cfg)
	exec1(t, first, "CREATE TABLE kept ()")
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	second := pgtest.Server(t, cfg)
	exec1(t, second, "SELECT FROM kept")
	dsn, err := second.TCPDSN(second.Addr(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	if got := query[string](t, dsn, "SHOW fsync"); got != "on" {
		t.Errorf("fsync of a durable cluster = %s", got)
	}
	if conn, err := pgx.Connect(testContext(t), "postgres://postgres@"+second.Addr()+"/postgres?sslmode=disable"); err == nil {
		conn.Close(testContext(t))
		t.Error("TCP without a password was let in")
	}
}

func TestStandby(t *testing.T) {
	eachVersion(t, func(t *testing.T, cfg pgserver.Config) {
		ctx := testContext(t)
		primary := pgtest.Server(t, cfg)
		exec1(t, primary, "CREATE TABLE n AS SELECT 1 AS i")
		standby := pgtest.Standby(t, primary, pgserver.Config{})
		rows := func(s *pgserver.Server) int { return query[int](t, s.DSN("postgres"), "SELECT count(*) FROM n") }
		step := func(what string, err error) {
			t.Helper()
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}

		exec1(t, primary, "INSERT INTO n VALUES (2)")
		step("catch up", standby.CatchUp(ctx))
		if got := rows(standby); got != 2 {
			t.Fatalf("standby has %d rows, want 2", got)
		}
		step("cut", standby.CutReplication(ctx))
		exec1(t, primary, "INSERT INTO n VALUES (3)")
		step("heal", standby.HealReplication(ctx))
		step("catch up", standby.CatchUp(ctx))
		if got := rows(standby); got != 3 {
			t.Fatalf("healed standby has %d rows, want 3", got)
		}

		step("cut", standby.CutReplication(ctx))
		exec1(t, primary, "INSERT INTO n VALUES (4)")
		step("kill primary", primary.Kill())
		step("promote", standby.Promote(ctx))
		if got := rows(standby); got != 3 {
			t.Errorf("promoted standby has %d rows, want 3: the fourth was lost", got)
		}
		exec1(t, standby, "INSERT INTO n VALUES (5)")
		if got := query[int](t, standby.DSN("postgres"), "SELECT timeline_id FROM pg_control_checkpoint()"); got < 1 {
			t.Errorf("timeline = %d", got)
		}
		step("restart", standby.Restart(ctx))
		if got := query[bool](t, standby.DSN("postgres"), "SELECT pg_is_in_recovery()"); got {
			t.Error("a promoted standby is a standby again after its restart")
		}
	})
}

func TestStartRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		cfg  pgserver.Config
		want string
	}{
		"an unknown version":       {pgserver.Config{Version: "9.6"}, `version "9.6"`},
		"a setting that is a line": {pgserver.Config{Settings: map[string]string{"a = 1\nb": "2"}}, "not a name"},
		"an unknown setting":       {pgserver.Config{Settings: map[string]string{"no_such_setting": "1"}}, "no_such_setting"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := openTempDir(t)
			t.Setenv("TMPDIR", dir)
			s, err := pgserver.Start(testContext(t), tc.cfg)
			if err == nil {
				_ = s.Stop()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error = %v, want one with %s", err, tc.want)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestStartObeysItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := pgserver.Start(ctx, pgserver.Config{}); err == nil {
		_ = s.Stop()
		t.Fatal("started with a cancelled context")
	}
}

// openTempDir is t.TempDir for the user that the server runs as, to whom the
// parents of t.TempDir can be closed.
func openTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "pgserver-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
