package postgres

import "github.com/jackc/pgx/v5/pgxpool"

// PoolStats returns the state of the connections to the database.
func (s *Store) PoolStats() *pgxpool.Stat { return s.pool.Stat() }
