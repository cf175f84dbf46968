// Package pgtest gives tests real PostgreSQL databases.
//
// A package that uses it has
//
//	func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
//
// and then asks for a Database in each test. All databases of a test process
// live in one cluster, started by the first test that asks.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dbcontroller/db-controller/internal/pgserver"
)

// The environment of the tests.
const (
	// versionVar is the major version of the shared cluster; empty means any.
	versionVar = "DBC_TEST_POSTGRES_VERSION"
	// requireVar lists the major versions that must be there, separated by
	// blanks. Others are left out of Versions when they are missing.
	requireVar = "DBC_REQUIRE_POSTGRES"
)

const timeout = time.Minute

// shared is the cluster of this test process.
var shared struct {
	mu     sync.Mutex
	server *pgserver.Server
	err    error // why it did not start: every further test fails at once
	number atomic.Int64
}

// Main runs the tests, stops the shared cluster and then fails the run if
// goroutines are left; the one that ginkgo never ends does not count. It
// returns the exit code.
func Main(m *testing.M, opts ...goleak.Option) int {
	code := m.Run()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server != nil {
		if err := shared.server.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	opts = append(opts, goleak.IgnoreTopFunction("github.com/onsi/ginkgo/v2/internal/interrupt_handler.(*InterruptHandler).registerForInterrupts.func2"))
	if err := goleak.Find(opts...); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// Shared returns the cluster of this test process, for what needs more than
// one database of it. Tests must neither stop nor crash it.
func Shared(tb testing.TB) *pgserver.Server {
	tb.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server == nil && shared.err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		shared.server, shared.err = pgserver.Start(ctx, pgserver.Config{Version: os.Getenv(versionVar)})
	}
	if shared.err != nil {
		tb.Fatal(shared.err)
	}
	return shared.server
}

// Database returns the DSN of a new, empty database of the shared cluster. It
// is dropped when the test ends, with all connections to it.
func Database(tb testing.TB) string {
	tb.Helper()
	s := Shared(tb)
	name := fmt.Sprintf("test_%d", shared.number.Add(1))
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if err := s.CreateDatabase(ctx, name); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		if err := s.DropDatabase(ctx, name); err != nil {
			tb.Error(err)
		}
	})
	return s.DSN(name)
}

// Server returns a cluster of the test's own, stopped when the test ends. The
// end of its log is shown if the test fails.
func Server(tb testing.TB, cfg pgserver.Config) *pgserver.Server {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	s, err := pgserver.Start(ctx, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	StopAtEnd(tb, s)
	return s
}

// Standby returns a standby of primary, stopped when the test ends.
func Standby(tb testing.TB, primary *pgserver.Server, cfg pgserver.Config) *pgserver.Server {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	s, err := primary.Standby(ctx, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	StopAtEnd(tb, s)
	return s
}

// StopAtEnd stops a cluster when the test ends.
func StopAtEnd(tb testing.TB, s *pgserver.Server) {
	tb.Helper()
	tb.Cleanup(func() {
		if log, err := os.ReadFile(s.Log()); err == nil && tb.Failed() {
			tb.Logf("end of PostgreSQL's log:\n%s", log[max(0, len(log)-4000):])
		}
		if err := s.Stop(); err != nil {
			tb.Error(err)
		}
	})
}

// Versions returns the major versions to test with: all that are installed,
// the oldest first. It fails the test if one that $DBC_REQUIRE_POSTGRES names
// is missing.
func Versions(tb testing.TB) []string {
	tb.Helper()
	required := strings.Fields(os.Getenv(requireVar))
	var versions []string
	for _, version := range []string{"15", "16", "17", "18"} {
		_, err := pgserver.Find(version)
		switch {
		case err == nil:
			versions = append(versions, version)
		case !errors.Is(err, pgserver.ErrNotInstalled), slices.Contains(required, version):
			tb.Fatal(err)
		}
	}
	if len(versions) == 0 {
		tb.Fatal(pgserver.ErrNotInstalled)
	}
	return versions
}
