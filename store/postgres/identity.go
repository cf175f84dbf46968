package postgres

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// Identity tells the database from every other one: a standby that is promoted keeps it, a database that is created anew, even under the same name, has another.
func (s *Store) Identity(ctx context.Context) (string, error) {
	id, err := identity(ctx, s.pool)
	return id, wrap(err, "identify the database")
}

// IdentityOf is Identity of a database that is not opened, and in which there may be nothing.
func IdentityOf(ctx context.Context, dsn string) (id string, err error) {
	cc, err := pgx.ParseConfig(dsn)
	if err != nil {
		return "", errors.New("identify the database: the DSN cannot be parsed") // err repeats parts of the DSN
	}
	cc.ConnectTimeout = 5 * time.Second
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return "", wrap(err, "identify the database")
	}
	defer func() { err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) }()
	id, err = identity(ctx, conn)
	return id, wrap(err, "identify the database")
}

func identity(ctx context.Context, q querier) (string, error) {
	var system int64
	var database uint32
	err := q.QueryRow(ctx, "SELECT s.system_identifier, d.oid FROM pg_control_system() s, pg_database d WHERE d.datname = current_database()").Scan(&system, &database)
	return strconv.FormatInt(system, 36) + "." + strconv.FormatUint(uint64(database), 36), err
}
