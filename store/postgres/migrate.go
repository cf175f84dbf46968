package postgres

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
)

// Migrations are numbered, forward only, recorded with their checksum, and applied in one transaction under a lock: two processes that
// start at once apply each of them once.
//
//go:embed migrations
var migrations embed.FS

// Advisory locks of this product, in one class so that they do not meet an application's.
const (
	lockClass = 0x0dbc
	// lockFence is held in its shared form by every write and in its exclusive form by a version switch.
	lockFence = 1
	// lockMigrate is held while migrations run.
	lockMigrate = 2
)

type migration struct {
	scope    string // ctl, or the API version
	number   int
	name     string
	sql      string
	checksum string
}

func migrationsOf(dir, scope string) ([]migration, error) {
	entries, err := fs.ReadDir(migrations, path.Join("migrations", dir))
	if err != nil {
		return nil, err
	}
	var all []migration
	for _, e := range entries {
		number, _, _ := strings.Cut(e.Name(), "_")
		n, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("migration %s: its name does not start with a number", e.Name())
		}
		text, err := fs.ReadFile(migrations, path.Join("migrations", dir, e.Name()))
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(text)
		all = append(all, migration{scope, n, e.Name(), string(text), hex.EncodeToString(sum[:])})
	}
	return all, nil
}

// migrate brings schema ctl and the version's schema up to date and writes down whose database this is.
func migrate(ctx context.Context, conf *pgx.ConnConfig, cfg Config) (err error) {
	ctl, err := migrationsOf("ctl", "ctl")
	if err != nil {
		return err
	}
	version, err := migrationsOf("version", cfg.Version)
	if err != nil {
		return err
	}
	conf.RuntimeParams["application_name"] = "db-controller migrations"
	conn, err := pgx.ConnectConfig(ctx, conf)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) }()

	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", lockClass, lockMigrate); err != nil {
			return err
		}
		const head = `
			CREATE SCHEMA IF NOT EXISTS ctl;
			CREATE TABLE IF NOT EXISTS ctl.migrations (
				scope text, number int, name text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now(),
				PRIMARY KEY (scope, number))`
		if _, err := tx.Exec(ctx, head); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS "+pgx.Identifier{cfg.Version}.Sanitize()); err != nil {
			return err
		}
		for _, m := range append(ctl, version...) {
			if err := m.apply(ctx, tx); err != nil {
				return fmt.Errorf("migration %s of %s: %w", m.name, m.scope, err)
			}
		}
		return register(ctx, tx, cfg, ctl[len(ctl)-1].number, version[len(version)-1].number)
	})
}

func (m migration) apply(ctx context.Context, tx pgx.Tx) error {
	var checksum string
	err := tx.QueryRow(ctx, "SELECT checksum FROM ctl.migrations WHERE scope = $1 AND number = $2", m.scope, m.number).Scan(&checksum)
	switch {
	case err == nil && checksum == m.checksum:
		return nil
	case err == nil:
		return errors.New("was applied with another text: a released migration must not be edited")
	case !errors.Is(err, pgx.ErrNoRows):
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT set_config('search_path', $1, true)", m.scope); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, m.sql); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, "INSERT INTO ctl.migrations (scope, number, name, checksum) VALUES ($1, $2, $3, $4)", m.scope, m.number, m.name, m.checksum)
	return err
}

// register writes the owner into a new database and compares it in an old one. A database that a newer binary has migrated is refused.
func register(ctx context.Context, tx pgx.Tx, cfg Config, ctl, version int) error {
	var newer bool
	err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ctl.migrations WHERE scope = 'ctl' AND number > $1 OR scope = $2 AND number > $3)", ctl, cfg.Version, version).Scan(&newer)
	if err != nil {
		return err
	}
	if newer {
		return store.Errorf(store.FailedPrecondition, "", "the database has been migrated by a newer db-controller: run that version or a later one")
	}
	_, err = tx.Exec(ctx, `INSERT INTO ctl.deployment_state (service, region, ring, writable_version) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`,
		cfg.Service, cfg.Region, cfg.Ring, cfg.Version)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `INSERT INTO ctl.feed_epoch (epoch, system_identifier, timeline)
		SELECT 1, system_identifier, ctl.current_timeline() FROM pg_control_system() ON CONFLICT DO NOTHING`)
	if err != nil {
		return err
	}
	var service, region string
	var ring int
	if err := tx.QueryRow(ctx, "SELECT service, region, ring FROM ctl.deployment_state").Scan(&service, &region, &ring); err != nil {
		return err
	}
	if ring != cfg.Ring {
		return store.Errorf(store.FailedPrecondition, "", "the database was made with %d shards, not %d: spec.shards of a Deployment cannot change", ring, cfg.Ring)
	}
	return checkIdentity(cfg, service, region)
}
