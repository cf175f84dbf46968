package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/search"
)

// Drop drops all that was made in a search database for a Deployment, in all API versions. A schema that belongs to another Deployment stays.
func Drop(ctx context.Context, cfg Config) (err error) {
	cc, err := pgx.ParseConfig(cfg.DSN)
	if err != nil {
		return errors.New("drop the search store: the DSN cannot be parsed: use postgres://user:password@host:port/database or key=value pairs") // err repeats parts of the DSN
	}
	cc.RuntimeParams["application_name"] = "db-controller cleanup"
	cc.RuntimeParams["lock_timeout"] = "10s"
	cc.ConnectTimeout = 5 * time.Second
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return search.Unavailable(err, "be reached")
	}
	defer func() { err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) }()
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, "SELECT pg_advisory_xact_lock(7283645)").Scan(nil); err != nil {
			return err
		}
		// Ours look like this and have an owner.
		rows, err := tx.Query(ctx, `SELECT nspname::text FROM pg_namespace WHERE nspname ~ '^search_v[1-9][0-9]*((alpha|beta)[1-9][0-9]*)?$'
			AND to_regclass(quote_ident(nspname) || '.owner') IS NOT NULL AND to_regclass(quote_ident(nspname) || '.leases') IS NOT NULL`)
		if err != nil {
			return err
		}
		schemas, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		for _, schema := range schemas {
			name := pgx.Identifier{schema}.Sanitize()
			var ours bool
			if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM "+name+".owner WHERE service = $1 AND region = $2)", cfg.Service, cfg.Region).Scan(&ours); err != nil {
				return err
			}
			if !ours {
				continue
			}
			if _, err := tx.Exec(ctx, "DROP SCHEMA "+name+" CASCADE"); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return search.Unavailable(err, "be dropped")
	}
	return nil
}
