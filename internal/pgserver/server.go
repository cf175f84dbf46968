package pgserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// Config says what kind of cluster Start makes. The zero value is a cluster
// for tests, of the newest PostgreSQL that Debian has installed.
type Config struct {
	// Version is the wanted major version, "15" to "18"; empty means any.
	Version string
	// Durable makes commits survive a power cut (fsync, full_page_writes).
	// Needed where durability or its price is measured.
	Durable bool
	// Settings are further lines of postgresql.conf. They win over our own.
	Settings map[string]string
	// Dir is the data directory. It is created if it does not exist, reused
	// if it already holds a cluster, and kept by Stop. It must lie where the
	// server's user can reach it. Empty means a temporary one, removed by Stop.
	Dir string
	// TCP makes the cluster listen on a free port of 127.0.0.1 too, with a
	// password (see TCPDSN).
	TCP bool
}

// Server is a private PostgreSQL cluster. Its methods may be called from
// several goroutines; those that change whether it runs wait for each other.
type Server struct {
	cfg  Config
	bin  string
	user *syscall.Credential // whom it runs as; nil for ourselves
	temp tempDir             // sockets and log, and the data unless Config.Dir
	data string
	port int

	primary *Server // what a standby was copied from; nil for the others
	name    string  // a standby's slot and application_name

	mu       sync.Mutex // guards the fields below
	process  *process   // nil before the first start
	stopped  bool
	standbys int // how many were made from this one
}

const (
	defaultPort = 5432 // each cluster has a socket folder of its own
	stopTimeout = 30 * time.Second
	pollEvery   = 10 * time.Millisecond
)

// Start makes a cluster and returns when it accepts connections. ctx bounds
// the start only: the cluster then runs until Stop or the end of this process.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	bin, err := Find(cfg.Version)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	s, err := prepare(cfg, bin)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	if err = s.create(ctx); err == nil {
		err = s.Restart(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start PostgreSQL: %w", err), s.Stop())
	}
	return s, nil
}

// prepare makes the folders of a cluster that runs the programs in bin.
func prepare(cfg Config, bin string) (_ *Server, err error) {
	s := &Server{cfg: cfg, bin: bin, port: defaultPort}
	if s.user, err = serverUser(); err != nil {
		return nil, err
	}
	if cfg.TCP {
		if s.port, err = freePort(); err != nil {
			return nil, err
		}
	}
	removeAbandoned(tempParent())
	if s.temp, err = newTempDir(); err != nil {
		return nil, err
	}
	if s.data = cfg.Dir; s.data == "" {
		s.data = filepath.Join(s.temp.path, "data")
	}
	if s.data, err = filepath.Abs(s.data); err == nil {
		err = os.MkdirAll(s.data, 0o700)
	}
	for _, path := range []string{s.data, s.temp.path} {
		if err == nil {
			err = give(path, s.user)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make data directory: %w", err), s.temp.remove())
	}
	return s, nil
}

// create initialises the data directory unless it holds a cluster.
func (s *Server) create(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(s.data, "PG_VERSION")); err == nil {
		return nil
	}
	password := filepath.Join(s.temp.path, passwordName)
	if err := s.writeFile(password, rand.Text()+"\n"); err != nil {
		return err
	}
	initdb := exec.CommandContext(ctx, filepath.Join(s.bin, "initdb"), "-D", s.data, "-U", "postgres",
		"--auth-local=trust", "--auth-host=scram-sha-256", "--pwfile="+password,
		"--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions")
	initdb.Dir = s.temp.path // root's folder may be closed to the server's user
	initdb.Env = environ()
	initdb.SysProcAttr = &syscall.SysProcAttr{Credential: s.user}
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb in %s: %w: %s", s.data, err, bytes.TrimSpace(out))
	}
	// Next to the data, so that a standby or a later Start knows it.
	if err := os.Rename(password, filepath.Join(s.data, passwordName)); err != nil {
		// Config.Dir can be on another file system.
		text, readErr := os.ReadFile(password)
		if readErr != nil {
			return fmt.Errorf("keep the password: %w", readErr)
		}
		return s.writeFile(filepath.Join(s.data, passwordName), string(text))
	}
	return nil
}

const passwordName = "dbc-password"

var settingName = regexp.MustCompile(`^[a-z_]+(\.[a-z_]+)?$`)

// configure writes postgresql.conf. Nothing of initdb's is kept, so a cluster
// behaves the same on every machine.
func (s *Server) configure() error {
	settings := map[string]string{
		"listen_addresses":           "",
		"port":                       strconv.Itoa(s.port),
		"unix_socket_directories":    s.temp.path,
		"wal_level":                  "logical",
		"max_connections":            "200",
		"max_prepared_transactions":  "50",
		"max_replication_slots":      "50",
		"max_wal_senders":            "50",
		"shared_buffers":             "32MB",
		"timezone":                   "UTC",
		"log_timezone":               "UTC",
		"lc_messages":                "C",
		"log_line_prefix":            "%m [%p] %d %a ",
		"default_text_search_config": "pg_catalog.simple",
	}
	if s.cfg.TCP {
		settings["listen_addresses"] = "127.0.0.1"
	}
	if !s.cfg.Durable {
		settings["fsync"] = "off"
		settings["full_page_writes"] = "off"
		// Within the data directory, which Stop removes even after a crash.
		settings["dynamic_shared_memory_type"] = "mmap"
	}
	if s.primary != nil {
		settings["primary_conninfo"] = fmt.Sprintf("host=%s port=%d user=postgres application_name=%s",
			s.primary.temp.path, s.primary.port, s.name)
		settings["primary_slot_name"] = s.name
		settings["wal_retrieve_retry_interval"] = "100ms"
	}
	maps.Copy(settings, s.cfg.Settings)

	var conf strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if !settingName.MatchString(name) {
			return fmt.Errorf("setting %q: not a name of a PostgreSQL setting", name)
		}
		value := strings.NewReplacer(`'`, `''`, `\`, `\\`, "\n", `\n`).Replace(settings[name])
		fmt.Fprintf(&conf, "%s = '%s'\n", name, value)
	}
	return s.writeFile(filepath.Join(s.data, "postgresql.conf"), conf.String())
}

func (s *Server) writeFile(path, text string) error {
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return err
	}
	return give(path, s.user)
}

// Restart starts the cluster again on the same data directory: after Kill or
// Crash with PostgreSQL's crash recovery, and a running one after a clean
// stop. It returns when the cluster accepts connections.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return errors.New("restart PostgreSQL: it was stopped for good")
	}
	if err := s.end(syscall.SIGINT); err != nil {
		return err
	}
	if err := s.configure(); err != nil {
		return fmt.Errorf("configure PostgreSQL: %w", err)
	}
	log, err := os.OpenFile(s.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open PostgreSQL's log: %w", err)
	}
	if s.process, err = run(s.bin, s.data, s.user, log); err != nil {
		return err
	}
	return s.waitReady(ctx)
}

// waitReady returns when a real connection succeeds.
func (s *Server) waitReady(ctx context.Context) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		conn, err := s.Connect(ctx, "postgres")
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-tick.C:
		case <-s.process.done:
			return fmt.Errorf("PostgreSQL ended while starting (%w): %s", s.process.err, s.logTail())
		case <-ctx.Done():
			return fmt.Errorf("wait for PostgreSQL to start: %w: %w", ctx.Err(), err)
		}
	}
}

func (s *Server) logTail() string {
	text, err := os.ReadFile(s.Log())
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(text[max(0, len(text)-2000):]))
}

// Stop ends the cluster (a fast shutdown: connections are closed, data is
// checkpointed) and removes all its files, except those in Config.Dir. It
// may be called again, and after Kill.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil
	}
	s.stopped = true
	err := s.end(syscall.SIGINT)
	releaseMemory(s.data)
	if err := errors.Join(err, s.temp.remove()); err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	return nil
}

// Kill is PostgreSQL's immediate shutdown: no transaction is finished, nothing
// is checkpointed. It returns when all processes are gone; the data stays for
// Restart.
func (s *Server) Kill() error { return s.Crash(syscall.SIGQUIT) }

// Crash ends the cluster with a signal to its postmaster and returns when all
// processes are gone; the data stays for Restart. SIGKILL kills every process
// of the cluster at once, as a power cut would (but what was handed to the
// operating system is not lost).
func (s *Server) Crash(sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end(sig)
}

// end sends sig and waits until all processes of the cluster are gone.
// s.mu is held.
func (s *Server) end(sig syscall.Signal) error {
	if s.process == nil || !s.process.running() {
		return nil
	}
	if err := s.process.signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	timeout := time.NewTimer(stopTimeout)
	defer timeout.Stop()
	select {
	case <-s.process.done:
		return nil
	case <-timeout.C:
	}
	err := s.process.signal(syscall.SIGKILL)
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-s.process.done
	return fmt.Errorf("PostgreSQL did not end within %s of %s and was killed", stopTimeout, sig)
}

// DSN returns the connection URL of a database, as the superuser postgres
// through the unix socket.
func (s *Server) DSN(database string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.User("postgres"),
		Path:     "/" + database,
		RawQuery: url.Values{"host": {s.temp.path}, "port": {strconv.Itoa(s.port)}}.Encode(),
	}
	return u.String()
}

// TCPDSN returns the connection URL of a database over TCP at addr, which is
// Addr or a proxy in front of it. The cluster must have Config.TCP.
func (s *Server) TCPDSN(addr, database string) (string, error) {
	password, err := os.ReadFile(filepath.Join(s.data, passwordName))
	if err != nil {
		return "", fmt.Errorf("password of PostgreSQL: %w", err)
	}
	u := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword("postgres", strings.TrimSpace(string(password))),
		Host:     addr,
		Path:     "/" + database,
		RawQuery: "sslmode=disable",
	}
	return u.String(), nil
}

// Addr returns the TCP address (host:port) of a cluster with Config.TCP.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// Socket returns the path of the unix socket.
func (s *Server) Socket() string {
	return filepath.Join(s.temp.path, ".s.PGSQL."+strconv.Itoa(s.port))
}

// Dir returns the data directory.
func (s *Server) Dir() string { return s.data }

// Log returns the path of the server's log, which Stop removes.
func (s *Server) Log() string { return filepath.Join(s.temp.path, "log") }

// Connect opens a connection to a database as the superuser. The caller
// closes it.
func (s *Server) Connect(ctx context.Context, database string) (*pgx.Conn, error) {
	conn, err := pgx.Connect(ctx, s.DSN(database))
	if err != nil {
		return nil, fmt.Errorf("connect to database %s: %w", database, err)
	}
	return conn, nil
}

// CreateDatabase creates an empty database.
func (s *Server) CreateDatabase(ctx context.Context, name string) error {
	if err := s.exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()); err != nil {
		return fmt.Errorf("create database %s: %w", name, err)
	}
	return nil
}

// DropDatabase drops a database and closes all connections to it. That it
// does not exist is not an error.
func (s *Server) DropDatabase(ctx context.Context, name string) error {
	if err := s.exec(ctx, "DROP DATABASE IF EXISTS "+pgx.Identifier{name}.Sanitize()+" WITH (FORCE)"); err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	return nil
}

// exec runs statements one by one in the database postgres.
func (s *Server) exec(ctx context.Context, statements ...string) error {
	conn, err := s.Connect(ctx, "postgres")
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// freePort returns a port that was free a moment ago.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
