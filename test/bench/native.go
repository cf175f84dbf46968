package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// native is PostgreSQL's logical replication: one publication, one subscription.
type native struct {
	w      *world
	dest   *pgx.Conn
	exists bool // the subscription
}

func newNative(ctx context.Context, w *world) (*native, error) {
	dest, err := w.dest.Connect(ctx, w.nativeDB)
	if err != nil {
		return nil, err
	}
	if _, err := w.sourceConn.Exec(ctx, "CREATE PUBLICATION "+w.slot+" FOR TABLE v1.resources"); err != nil {
		return nil, errors.Join(fmt.Errorf("create publication: %w", err), dest.Close(ctx))
	}
	return &native{w: w, dest: dest}, nil
}

func (n *native) name() string     { return "native" }
func (n *native) database() string { return n.w.nativeDB }

func (n *native) reset(ctx context.Context) error {
	if err := n.drop(ctx); err != nil {
		return err
	}
	_, err := n.dest.Exec(ctx, "TRUNCATE v1.resources")
	return err
}

// drop removes the subscription with its slot.
func (n *native) drop(ctx context.Context) error {
	if !n.exists {
		return nil
	}
	if _, err := n.dest.Exec(ctx, "DROP SUBSCRIPTION "+n.w.slot); err != nil {
		return fmt.Errorf("drop subscription: %w", err)
	}
	n.exists = false
	return nil
}

func (n *native) start(ctx context.Context, ready func() error) error {
	if err := ready(); err != nil {
		return err
	}
	if n.exists {
		_, err := n.dest.Exec(ctx, "ALTER SUBSCRIPTION "+n.w.slot+" ENABLE")
		return err
	}
	// The connection string is no value that a statement can take as a parameter; it has no quote in it.
	_, err := n.dest.Exec(ctx, fmt.Sprintf("CREATE SUBSCRIPTION %[1]s CONNECTION '%[2]s' PUBLICATION %[1]s WITH (binary = %[3]t)",
		n.w.slot, n.w.source.DSN(n.w.sourceDB), n.w.opt.binary))
	n.exists = n.exists || err == nil
	return err
}

func (n *native) copied(ctx context.Context, dest *pgx.Conn) error {
	return poll(ctx, longest, "initial copy", func(ctx context.Context) (done bool, err error) {
		// f: the copy is committed.
		err = dest.QueryRow(ctx, "SELECT count(*) > 0 AND bool_and(srsubstate IN ('f', 's', 'r')) FROM pg_subscription_rel").Scan(&done)
		return done, err
	})
}

func (n *native) cpu() (source, dest time.Duration) { return 0, 0 }

// stop waits until the slot is free, so that nothing of the rival runs while ours is measured.
func (n *native) stop(ctx context.Context) error {
	if !n.exists {
		return nil
	}
	// A table that is still synchronising would be copied again.
	err := poll(ctx, longest, "synchronise", func(ctx context.Context) (done bool, err error) {
		err = n.dest.QueryRow(ctx, "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel").Scan(&done)
		return done, err
	})
	if err != nil {
		return err
	}
	if _, err := n.dest.Exec(ctx, "ALTER SUBSCRIPTION "+n.w.slot+" DISABLE"); err != nil {
		return fmt.Errorf("disable subscription: %w", err)
	}
	return poll(ctx, longest, "end of replication", func(ctx context.Context) (done bool, err error) {
		err = n.w.sourceConn.QueryRow(ctx, "SELECT NOT bool_or(active) FROM pg_replication_slots").Scan(&done)
		return done, err
	})
}

func (n *native) close(ctx context.Context) error {
	return errors.Join(n.drop(ctx), n.dest.Close(ctx))
}
