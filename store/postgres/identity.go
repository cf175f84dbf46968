package postgres

import (
	"context"
	"strconv"
)

// Identity tells the database from every other one: a standby that is promoted keeps it, a database that is created anew, even under the same name, has another.
func (s *Store) Identity(ctx context.Context) (string, error) {
	var system int64
	var database uint32
	err := s.pool.QueryRow(ctx, "SELECT s.system_identifier, d.oid FROM pg_control_system() s, pg_database d WHERE d.datname = current_database()").Scan(&system, &database)
	return strconv.FormatInt(system, 36) + "." + strconv.FormatUint(uint64(database), 36), wrap(err, "identify the database")
}
