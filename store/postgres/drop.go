package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/dbcontroller/db-controller/store"
)

// Why Drop drops nothing.
var (
	// ErrInUse: other processes of this product are connected to the database.
	ErrInUse = errors.New("other processes of db-controller are connected to the database")
	// ErrReferred: references have come or gone since the mark was made.
	ErrReferred = errors.New("the references to resources of the database are not those that were looked at")
)

// ReferredElsewhere lists resources that other Deployments refer to, or did refer to, after the given one in the order of name and location; only those
// whose deletion such a reference would have a part in. Ask those Deployments which of them it is still so for.
func (s *Store) ReferredElsewhere(ctx context.Context, after store.Blocker, limit int) ([]store.Blocker, error) {
	rows, err := s.pool.Query(ctx, `SELECT name, location FROM sources WHERE (name, location) > ($1, $2) AND (blocking OR subscriber) ORDER BY name, location LIMIT $3`,
		after.Target, after.Location.String(), limit)
	if err != nil {
		return nil, wrap(err, "list what others refer to")
	}
	all, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (b store.Blocker, err error) {
		var location string
		if err = r.Scan(&b.Target, &location); err == nil {
			b.Location, err = store.ParseLocation(location)
		}
		return b, err
	})
	return all, wrap(err, "list what others refer to")
}

// Tentative lists writes elsewhere that may refer to resources here and are not known to have ended.
func (s *Store) Tentative(ctx context.Context, limit int) ([]store.Blocker, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+blockadeColumns+" FROM blockades ORDER BY name LIMIT $1", limit)
	if err != nil {
		return nil, wrap(err, "list writes elsewhere that are under way")
	}
	all, err := pgx.CollectRows(rows, scanBlockade)
	blockers := make([]store.Blocker, len(all))
	for i, b := range all {
		blockers[i] = store.Blocker{Target: b.Name, Location: b.Location, Referrer: b.Referrer, TentativeUntil: b.ExpireTime}
	}
	return blockers, wrap(err, "list writes elsewhere that are under way")
}

// ReferenceMark tells the references of others to the resources of the database, in all versions, from any others that there may be later.
func (s *Store) ReferenceMark(ctx context.Context) (string, error) {
	mark, err := referenceMark(ctx, s.pool)
	return mark, wrap(err, "look at the references")
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func referenceMark(ctx context.Context, q querier) (string, error) {
	versions, err := versionsOf(ctx, q)
	if err != nil {
		return "", err
	}
	var mark strings.Builder
	for _, v := range versions {
		var of string
		schema := pgx.Identifier{v}.Sanitize()
		err := q.QueryRow(ctx, `SELECT concat_ws('.',
			(SELECT concat_ws('.', count(*), sum(hashtextextended(name || ' ' || location || ' ' || blocking || ' ' || subscriber, 0))) FROM `+schema+`.sources),
			(SELECT concat_ws('.', count(*), sum(hashtextextended(name || ' ' || location || ' ' || referrer || ' ' || tx_id, 0))) FROM `+schema+`.blockades))`).Scan(&of)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&mark, "%s:%s ", v, of)
	}
	return strings.TrimSpace(mark.String()), nil
}

// versionsOf returns the API versions that have a schema.
func versionsOf(ctx context.Context, q querier) ([]string, error) {
	rows, err := q.Query(ctx, "SELECT DISTINCT scope FROM ctl.migrations WHERE scope <> 'ctl' AND to_regnamespace(quote_ident(scope)) IS NOT NULL ORDER BY scope")
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// Drop drops all that was made in a database for a Deployment: the schemas of its API versions and ctl, with whatever somebody has put into them or made to depend on
// them. A database in which nothing was made is right as it is; that of another Deployment is refused. Nothing is dropped while other processes of this
// product are connected (ErrInUse), or if the references of others are not those of mark (ErrReferred); an empty mark stands for any.
func Drop(ctx context.Context, cfg Config, mark string) (err error) {
	cc, err := pgx.ParseConfig(cfg.DSN)
	if err != nil {
		return errors.New("drop data: the DSN cannot be parsed: use postgres://user:password@host:port/database or key=value pairs") // err repeats parts of the DSN
	}
	cc.RuntimeParams["application_name"] = "db-controller cleanup"
	cc.RuntimeParams["lock_timeout"] = "10s"
	cc.ConnectTimeout = 5 * time.Second
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return wrap(err, "drop the data of %s in %s", cfg.Service, cfg.Region)
	}
	defer func() { err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) }()
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error { return drop(ctx, tx, cfg, mark) })
	if errors.Is(err, ErrInUse) || errors.Is(err, ErrReferred) {
		return fmt.Errorf("drop the data of %s in %s: %w", cfg.Service, cfg.Region, err)
	}
	return wrap(err, "drop the data of %s in %s", cfg.Service, cfg.Region)
}

func drop(ctx context.Context, tx pgx.Tx, cfg Config, mark string) error {
	// Nobody makes a schema meanwhile.
	var made bool
	if err := tx.QueryRow(ctx, "SELECT pg_advisory_xact_lock($1, $2)", lockClass, lockMigrate).Scan(nil); err != nil {
		return err
	}
	if err := tx.QueryRow(ctx, "SELECT to_regclass('ctl.deployment_state') IS NOT NULL").Scan(&made); err != nil || !made {
		return err
	}
	var service, region string
	err := tx.QueryRow(ctx, "SELECT service, region FROM ctl.deployment_state").Scan(&service, &region)
	if err != nil {
		return err
	}
	if err := checkIdentity(cfg, service, region); err != nil {
		return err
	}
	var sessions int
	if err := tx.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE 'db-controller %'`).Scan(&sessions); err != nil {
		return err
	}
	if sessions > 0 {
		return fmt.Errorf("%d connections: %w", sessions, ErrInUse)
	}
	if mark != "" {
		now, err := referenceMark(ctx, tx)
		if err != nil {
			return err
		}
		if now != mark {
			return ErrReferred
		}
	}
	versions, err := versionsOf(ctx, tx)
	if err != nil {
		return err
	}
	for _, schema := range append(versions, "ctl") {
		if _, err := tx.Exec(ctx, "DROP SCHEMA "+pgx.Identifier{schema}.Sanitize()+" CASCADE"); err != nil {
			if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
				return fmt.Errorf("drop schema %s: %w", schema, pe)
			}
			return err
		}
	}
	return nil
}
