package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// Purge removes up to limit tombstones older than retention and returns how many. In the same transaction it writes down what it removed, so
// that cursors which had not seen them are refused and names that are born again start above them.
func (s *Store) Purge(ctx context.Context, retention time.Duration, limit int) (int, error) {
	var n int64
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		// The horizon first: two purges at once take turns, and neither lowers it.
		if _, err := tx.Exec(ctx, "SELECT FROM horizon FOR UPDATE"); err != nil {
			return err
		}
		return tx.QueryRow(ctx, `
			WITH purged AS (
				DELETE FROM resources WHERE name = ANY (ARRAY(
					SELECT name FROM resources WHERE state = 2 AND delete_time < now() - $1::interval ORDER BY delete_time LIMIT $2 FOR UPDATE SKIP LOCKED))
				AND state = 2
				RETURNING change, resource_version
			), kept AS (
				UPDATE horizon SET purged = greatest(purged, (SELECT change FROM purged ORDER BY change DESC LIMIT 1)),
					floor = greatest(floor, (SELECT max(resource_version) FROM purged))
			)
			SELECT count(*) FROM purged`, retention, limit).Scan(&n)
	})
	return int(n), wrap(err, "purge tombstones")
}
