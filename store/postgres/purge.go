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
					SELECT name FROM resources WHERE state = 2 AND shadow <> 2 AND delete_time < now() - $1::interval ORDER BY delete_time LIMIT $2 FOR UPDATE SKIP LOCKED))
				AND state = 2 AND shadow <> 2
				RETURNING change, resource_version
			), kept AS (
				UPDATE horizon SET purged = greatest(purged, (SELECT change FROM purged ORDER BY change DESC LIMIT 1)),
					floor = greatest(floor, (SELECT max(resource_version) FROM purged))
			)
			SELECT count(*) FROM purged`, retention, limit).Scan(&n)
	})
	return int(n), wrap(err, "purge tombstones")
}

// PurgeFences removes up to limit fences older than retention and returns how many. The same transaction counts the purge: a save that was granted its references
// before it asks for them again, so nothing rests on how old a grant can be.
func (s *Store) PurgeFences(ctx context.Context, retention time.Duration, limit int) (n int, err error) {
	err = s.pool.QueryRow(ctx, `
		WITH purged AS (
			DELETE FROM fences WHERE ctid = ANY (ARRAY(SELECT ctid FROM fences WHERE made_at < now() - $1::interval ORDER BY made_at LIMIT $2 FOR UPDATE SKIP LOCKED)) RETURNING 1
		), counted AS (
			UPDATE horizon SET fences = fences + 1 WHERE EXISTS (SELECT FROM purged)
		)
		SELECT count(*) FROM purged`, retention, limit).Scan(&n)
	return n, wrap(err, "purge fences")
}
