package postgres

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// This file is the fence of shards: whoever has lost its shards cannot write any more, whatever it believes.

// SQLSTATEs of the fence.
const (
	stateFenced    = "DB004"
	stateStalePlan = "DB005"
)

// setClaimSQL tells a session whose claim its writes are under. The triggers of every table read it (migrations/ctl/0005).
const setClaimSQL = `SELECT set_config('dbcontroller.claim', $1, false)`

// claimData is where a connection keeps what it has been told.
const claimData = "dbcontroller_claim"

// fence makes the pool tell a connection the claim of the context that it is taken for, if that is another than before. All use of the database goes through here, so no
// path can forget it.
func (s *Store) fence(pc *pgxpool.Config) {
	pc.PrepareConn = func(ctx context.Context, c *pgx.Conn) (bool, error) {
		claim := ""
		if epoch, ok := store.ClaimOf(ctx); ok {
			claim = strconv.FormatInt(epoch, 10)
		}
		told, _ := c.PgConn().CustomData()[claimData].(string)
		if told == claim {
			return true, nil
		}
		_, err := c.PgConn().ExecParams(ctx, setClaimSQL, [][]byte{[]byte(claim)}, nil, nil, nil).Close()
		if err != nil && c.IsClosed() && ctx.Err() == nil {
			return false, nil // the pool tries another one
		}
		if err != nil {
			return false, fmt.Errorf("tell the database the claim on shards: %w", err)
		}
		c.PgConn().CustomData()[claimData] = claim
		return true, nil
	}
	next := pc.ConnConfig.OnPgError
	pc.ConnConfig.OnPgError = func(c *pgconn.PgConn, e *pgconn.PgError) bool {
		if e.Code == stateFenced {
			s.fenced.Add(1)
		}
		return next(c, e)
	}
}

// A node whose range changes has no claim in force from when its new one is raised until it knows that; what it writes meanwhile is repeated. So long may that take, and so often
// is looked whether it has.
const (
	reclaimTime = 250 * time.Millisecond
	reclaimPoll = 5 * time.Millisecond
)

// reclaim does what do does, again if that was refused and the claim of ctx has become another one.
func reclaim(ctx context.Context, do func() error) error {
	for {
		used, ok := store.ClaimOf(ctx)
		err := do()
		var pe *pgconn.PgError
		if !ok || !errors.As(err, &pe) || pe.Code != stateFenced {
			return err
		}
		poll := time.NewTicker(reclaimPoll)
		for until := time.Now().Add(reclaimTime); ; {
			if now, _ := store.ClaimOf(ctx); now != used {
				break
			}
			select {
			case <-poll.C:
			case <-ctx.Done():
			}
			if ctx.Err() != nil || time.Now().After(until) {
				poll.Stop()
				return err
			}
		}
		poll.Stop()
	}
}

// Fenced returns how many statements the database has refused since Open because their claim had been revoked.
func (s *Store) Fenced() int64 { return s.fenced.Load() }

// Raise makes holder the only one whose nodes of kind may write for shards, with the returned epoch as their claim (store.WithClaim). When it returns, all older claims that overlap
// are revoked: what was in flight under them has been committed or rolled back, and no later write is accepted. Transactions that do not end within two seconds are
// ended. plan is the version of the plan that grants the shards: store.ErrStalePlan if a claim that overlaps was made under a newer one.
func (s *Store) Raise(ctx context.Context, kind string, shards feed.Range, plan int64, holder string) (epoch int64, err error) {
	if shards.From >= shards.To {
		return 0, store.Invalid("shards", fmt.Sprintf("%v is empty: there is nothing to claim", shards))
	}
	err = s.claim(ctx, func() error {
		return s.pool.QueryRow(ctx, "SELECT ctl.raise_claim($1, $2::text::int4range, $3, $4)", kind, shards.String(), plan, holder).Scan(&epoch)
	})
	var pe *pgconn.PgError
	if errors.As(err, &pe) && pe.Code == stateStalePlan {
		return 0, fmt.Errorf("%w: %s", store.ErrStalePlan, pe.Message)
	}
	return epoch, wrap(err, "claim shards %v for %s", shards, kind)
}

// Drop gives a claim back. Like Raise it waits for what is in flight, and ends it after two seconds. A claim that is gone already is no error.
func (s *Store) Drop(ctx context.Context, epoch int64) error {
	err := s.claim(ctx, func() error {
		_, err := s.pool.Exec(ctx, "SELECT ctl.revoke_claim($1)", epoch)
		return err
	})
	return wrap(err, "give back claim %d on shards", epoch)
}

// claim repeats do while it is the victim of a deadlock with the writes that it waits for.
func (s *Store) claim(ctx context.Context, do func() error) error {
	for attempt := 0; ; attempt++ {
		err := do()
		var pe *pgconn.PgError
		if attempt == maxAttempts || !errors.As(err, &pe) || pe.Code != "40001" && pe.Code != "40P01" {
			return err
		}
		if err := pause(ctx, attempt); err != nil {
			return err
		}
	}
}

// Highest returns the highest version of a plan that any claim of kind was made under; 0 if there was none.
func (s *Store) Highest(ctx context.Context, kind string) (plan int64, err error) {
	err = s.pool.QueryRow(ctx, "SELECT coalesce((SELECT highest FROM ctl.shard_plan WHERE kind = $1), 0)", kind).Scan(&plan)
	return plan, wrap(err, "look up the plan of %s", kind)
}

// Holds reports whether the claim is still in force.
func (s *Store) Holds(ctx context.Context, epoch int64) (held bool, err error) {
	err = s.pool.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ctl.shard_epoch WHERE epoch = $1)", epoch).Scan(&held)
	return held, wrap(err, "look up claim %d on shards", epoch)
}
