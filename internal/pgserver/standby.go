package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Standby makes a streaming, readable standby of this cluster, with the same
// programs (cfg.Version is ignored). It is copied with PostgreSQL's low-level
// backup functions, because not every build comes with pg_basebackup.
//
// It streams asynchronously through a replication slot, so it can be cut off
// for any time and still catch up. Slot and application_name of the n-th standby
// are "standby<n>", counted from 1: the name for synchronous_standby_names.
// The slot keeps WAL on the primary even after the standby is stopped. cfg is
// the standby's alone: settings that PostgreSQL wants to be at least the
// primary's, such as max_connections, must be repeated.
//
// To promote a standby that lost commits: CutReplication, write to the
// primary, Kill the primary, Promote.
func (s *Server) Standby(ctx context.Context, cfg Config) (*Server, error) {
	standby, err := prepare(cfg, s.bin)
	if err != nil {
		return nil, fmt.Errorf("start standby: %w", err)
	}
	s.mu.Lock()
	s.standbys++
	standby.primary, standby.name = s, fmt.Sprintf("standby%d", s.standbys)
	s.mu.Unlock()

	if err = standby.copyPrimary(ctx); err == nil {
		err = standby.Restart(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start standby: %w", err), standby.Stop())
	}
	return standby, nil
}

// copyPrimary makes the data directory an online copy of the primary's.
func (s *Server) copyPrimary(ctx context.Context) error {
	conn, err := s.primary.Connect(ctx, "postgres")
	if err != nil {
		return err
	}
	defer conn.Close(ctx) // ends a backup that was not stopped

	// The slot keeps all WAL from before the copy starts.
	if _, err := conn.Exec(ctx, "SELECT pg_create_physical_replication_slot($1, true)", s.name); err != nil {
		return fmt.Errorf("create replication slot %s: %w", s.name, err)
	}
	if _, err := conn.Exec(ctx, "SELECT pg_backup_start($1, true)", s.name); err != nil {
		return fmt.Errorf("start backup: %w", err)
	}
	if err := copyCluster(ctx, s.data, s.primary.data); err != nil {
		return fmt.Errorf("copy %s: %w", s.primary.data, err)
	}
	var label string
	if err := conn.QueryRow(ctx, "SELECT labelfile FROM pg_backup_stop(false)").Scan(&label); err != nil {
		return fmt.Errorf("stop backup: %w", err)
	}
	if err := os.WriteFile(filepath.Join(s.data, "backup_label"), []byte(label), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.data, "standby.signal"), nil, 0o600); err != nil {
		return err
	}
	return filepath.WalkDir(s.data, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, give(path, s.user))
	})
}

// emptyInCopy are folders whose contents belong to the running primary only;
// PostgreSQL's manual lists them under "Making a Base Backup Using the Low
// Level API".
var emptyInCopy = map[string]bool{
	"pg_dynshmem": true, "pg_notify": true, "pg_replslot": true, "pg_serial": true,
	"pg_snapshots": true, "pg_stat_tmp": true, "pg_subtrans": true, "pg_wal": true,
}

// copyCluster copies the data directory of a running cluster in backup mode.
func copyCluster(ctx context.Context, to, from string) error {
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // dropped while we copy: the WAL knows
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case emptyInCopy[filepath.Dir(rel)] && d.IsDir():
			return fs.SkipDir
		case emptyInCopy[filepath.Dir(rel)], strings.HasPrefix(rel, "postmaster."):
			return nil
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case !d.Type().IsRegular():
			return fmt.Errorf("%s: tablespaces are not supported", rel)
		}
		return copyFile(filepath.Join(to, rel), path)
	})
	if err != nil {
		return err
	}
	return os.MkdirAll(filepath.Join(to, "pg_wal", "archive_status"), 0o700)
}

func copyFile(to, from string) error {
	src, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// CatchUp returns when this standby has replayed all that its primary had
// written when CatchUp was called.
func (s *Server) CatchUp(ctx context.Context) error {
	primary, err := s.primary.Connect(ctx, "postgres")
	if err != nil {
		return fmt.Errorf("catch up: primary: %w", err)
	}
	defer primary.Close(ctx)
	var lsn string
	if err := primary.QueryRow(ctx, "SELECT pg_current_wal_lsn()::text").Scan(&lsn); err != nil {
		return fmt.Errorf("catch up: position of the primary: %w", err)
	}
	return s.poll(ctx, "catch up to "+lsn, "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", lsn)
}

// CutReplication makes this standby stop streaming, and returns when it has.
// It stays a standby; what it has received is kept.
func (s *Server) CutReplication(ctx context.Context) error {
	if err := s.exec(ctx, "ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()"); err != nil {
		return fmt.Errorf("cut replication of %s: %w", s.name, err)
	}
	return s.poll(ctx, "cut replication of "+s.name, "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)")
}

// HealReplication undoes CutReplication. See CatchUp for waiting.
func (s *Server) HealReplication(ctx context.Context) error {
	if err := s.exec(ctx, "ALTER SYSTEM RESET primary_conninfo", "SELECT pg_reload_conf()"); err != nil {
		return fmt.Errorf("heal replication of %s: %w", s.name, err)
	}
	return nil
}

// Promote makes this standby a primary on a new timeline, and returns when it
// accepts writes. The old primary is not told.
func (s *Server) Promote(ctx context.Context) error {
	if err := s.exec(ctx, "SELECT pg_promote(false)"); err != nil {
		return fmt.Errorf("promote %s: %w", s.name, err)
	}
	return s.poll(ctx, "promote "+s.name, "SELECT NOT pg_is_in_recovery()")
}

// poll asks this cluster a yes-or-no question until the answer is yes.
func (s *Server) poll(ctx context.Context, what, question string, args ...any) error {
	conn, err := s.Connect(ctx, "postgres")
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer conn.Close(ctx)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		rows, err := conn.Query(ctx, question, args...)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		yes, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[bool])
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if yes {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		}
	}
}
