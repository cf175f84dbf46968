// Package postgres is the core of the Store: one PostgreSQL database per Deployment, one schema per API version in it.
//
// The package promises:
//
//   - a write is one network round trip of two statements in one implicit transaction: the shared form of the write fence, and one
//     statement that judges every row and writes all of them or none (a third one locks the rows first when the write is repeated after
//     a conflict; a masked write reads first)
//   - the change feed sees each commit, and the version of a name never goes down within a feed epoch
//   - read copies are merged only from their owner and only forwards; owned rows are never touched by a merge
//   - nothing is written under a claim on shards that has been revoked
//   - values are parameters, always; the one identifier that is not constant, the version's schema, is checked and set as search_path
//
// Driver errors do not leave the package: callers see store.Error.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/dbcontroller/db-controller/internal/dsn"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Config says which database a Store works on and as whom.
type Config struct {
	// DSN is a libpq connection string or URL of a direct connection: the store uses LISTEN, COPY and prepared statements. Never logged.
	DSN string
	// Service and Region are the Deployment that owns the database. A database of another Deployment is refused.
	Service, Region string
	// Version is the API version, for example v1; it is also the name of the schema.
	Version string
	// Ring is the number of shards; it is fixed when the database is first opened. Default 4096.
	Ring int
	// MaxConns bounds the pool. Default 16.
	MaxConns int
	// FeedLimit is the most rows one read of the change feed takes. Default feed.DefaultLimit.
	FeedLimit int
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Store is the core on PostgreSQL. It is safe for concurrent use.
type Store struct {
	cfg  Config
	pool *pgxpool.Pool
	hub  *feed.Hub
	feed *feed.Feed
	log  *slog.Logger

	peerEpochs sync.Map     // region -> the epoch that ctl.peer_epoch is known to hold
	fenced     atomic.Int64 // writes that were refused because their claim had been revoked
}

var versionName = regexp.MustCompile(`^v[1-9][0-9]*((alpha|beta)[1-9][0-9]*)?$`)

// Open connects to the database, brings its schema up to date, and proves that it belongs to the Deployment.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Ring == 0 {
		cfg.Ring = 4096
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 16
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if !versionName.MatchString(cfg.Version) {
		return nil, store.Invalid("version", fmt.Sprintf("%q is not an API version such as v1 or v2beta1", cfg.Version))
	}
	pc, err := dsn.Parse(cfg.DSN)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	if err := migrate(ctx, pc.ConnConfig.Copy(), cfg); err != nil {
		return nil, wrap(err, "migrate the database of %s in %s", cfg.Service, cfg.Region)
	}

	s := &Store{cfg: cfg, hub: feed.NewHub(), log: cfg.Logger}
	pc.MaxConns = int32(cfg.MaxConns)
	pc.MinIdleConns = 1
	pc.ConnConfig.RuntimeParams["search_path"] = cfg.Version
	pc.ConnConfig.RuntimeParams["application_name"] = "db-controller " + cfg.Service + " " + cfg.Region
	pc.ConnConfig.RuntimeParams["jit"] = "off" // its compilation costs a thousand times what our statements do
	// Nearly every statement is an index look-up that is planned once for the life of a connection: making a plan costs more than running it, and one
	// that was made while the table was small must not read it from end to end when it is large. What depends on its parameters, or does want
	// the whole table, says so (scan).
	pc.ConnConfig.RuntimeParams["plan_cache_mode"] = "force_generic_plan"
	pc.ConnConfig.RuntimeParams["enable_seqscan"] = "off"
	pc.ConnConfig.RuntimeParams["enable_memoize"] = "off" // names are looked up once each
	pc.ConnConfig.RuntimeParams["idle_in_transaction_session_timeout"] = "60s"
	pc.ConnConfig.RuntimeParams["lock_timeout"] = "10s"
	pc.ConnConfig.ConnectTimeout = 5 * time.Second
	pc.PingTimeout = 5 * time.Second
	pc.AfterConnect = func(ctx context.Context, c *pgx.Conn) error {
		return c.QueryRow(ctx, "SELECT ctl.prove_epoch()").Scan(nil)
	}
	s.fence(pc)
	if s.pool, err = pgxpool.NewWithConfig(ctx, pc); err != nil {
		return nil, wrap(err, "open database of %s in %s", cfg.Service, cfg.Region)
	}
	if err := s.Ping(ctx); err != nil {
		s.pool.Close()
		return nil, err
	}
	s.feed = feed.New(s.pool, s.hub, cfg.FeedLimit)
	return s, nil
}

// Close ends all connections, after those in use are returned.
func (s *Store) Close() { s.pool.Close() }

// Run carries change hints to and from other processes on the same database until ctx is done.
func (s *Store) Run(ctx context.Context) error {
	return s.hub.Run(ctx, func(ctx context.Context) (*pgx.Conn, error) {
		return pgx.ConnectConfig(ctx, s.pool.Config().ConnConfig)
	}, func(err error) { s.log.WarnContext(ctx, "change hints interrupted; polling goes on", "error", err) })
}

// Feed returns the change feed of the store's version.
func (s *Store) Feed() *feed.Feed { return s.feed }

// Ping says whether the database answers and is the one that was opened.
func (s *Store) Ping(ctx context.Context) error {
	var service, region string
	err := s.pool.QueryRow(ctx, "SELECT service, region FROM ctl.deployment_state").Scan(&service, &region)
	if err != nil {
		return wrap(err, "reach the database of %s in %s", s.cfg.Service, s.cfg.Region)
	}
	return checkIdentity(s.cfg, service, region)
}

func checkIdentity(cfg Config, service, region string) error {
	if service == cfg.Service && region == cfg.Region {
		return nil
	}
	return store.Errorf(store.FailedPrecondition, "", "the database belongs to %s in %s, not to %s in %s: check spec.database of the Deployment", service, region, cfg.Service, cfg.Region)
}

// Epoch returns the feed epoch.
func (s *Store) Epoch(ctx context.Context) (epoch int64, err error) {
	err = s.pool.QueryRow(ctx, "SELECT epoch FROM ctl.feed_epoch").Scan(&epoch)
	return epoch, wrap(err, "read the feed epoch")
}

// RaiseEpoch starts a new feed epoch by hand, after a restore that neither system identifier nor timeline shows (a file-level snapshot).
func (s *Store) RaiseEpoch(ctx context.Context) (epoch int64, err error) {
	err = s.pool.QueryRow(ctx, "SELECT ctl.raise_epoch()").Scan(&epoch)
	return epoch, wrap(err, "raise the feed epoch")
}

// wrap turns a driver's error into a store.Error with what was being done; nil stays nil, store.Errors and the caller's own context errors stay as they are.
func wrap(err error, format string, args ...any) error {
	if err == nil || store.CodeOf(err) != 0 {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf(format+": %w", append(args, err)...)
	}
	reason := fmt.Sprintf(format, args...)
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return &store.Error{Code: store.Unavailable, Reason: reason, Cause: err}
	}
	if pe.Code == stateFenced {
		return store.Fenced(reason + ": other nodes have taken over these shards")
	}
	switch pe.Code[:2] {
	case "08", "40", "53", "55", "57", "58", "25": // connection, rollback, resources, lock not available, shutdown, I/O, standby or timeout
		return &store.Error{Code: store.Unavailable, Reason: reason, Cause: err}
	case "22": // a value that PostgreSQL cannot hold, such as \u0000 in a string
		return &store.Error{Code: store.InvalidArgument, Reason: reason, Violations: []store.Violation{{Field: "resource", Description: pe.Message}}}
	}
	return fmt.Errorf("%s: %w", reason, err)
}
