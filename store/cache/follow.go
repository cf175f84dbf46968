package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/store/feed"
)

const (
	// followGap spares the database: a step of the follower is a read of the feed.
	followGap = 5 * time.Millisecond
	// followTimeout bounds a command of the follower, for which nobody waits.
	followTimeout = time.Second
	// retryAfter is the pause after a failure of Redis or of the feed.
	retryAfter = 250 * time.Millisecond
)

// errOtherGeneration means that another process has started a new generation.
var errOtherGeneration = errors.New("another process has started a new generation of the cache")

// Run follows f and keeps the cache right, until ctx is done. It returns nil. Without it the cache answers nothing.
func (s *Store) Run(ctx context.Context, f Changes) error {
	client := s.client(followTimeout, "")
	defer client.Close()
	defer s.setView(nil)
	failing := false
	for {
		err := s.session(ctx, client, f, func() {
			if failing {
				failing = false
				s.log.InfoContext(ctx, "reads are answered from the cache again")
			}
		})
		switch {
		case ctx.Err() != nil:
			return nil // asked to stop
		case errors.Is(err, errOtherGeneration):
			continue
		case !failing: // once for each outage
			failing = true
			s.log.WarnContext(ctx, "reads are answered by the database alone: the cache cannot be kept right", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryAfter):
		}
	}
}

// setView makes v what readers use, and ends the connections of the view before.
func (s *Store) setView(v *view) {
	if old := s.view.Swap(v); old != nil && old != v && (v == nil || old.rdb != v.rdb) {
		_ = old.rdb.Close() // those who use it just now read the database
	}
}

// session keeps one generation right over one connection, so in one run of the server. It calls live after each step that left nothing to read, and ends with
// an error, or when ctx is done.
func (s *Store) session(ctx context.Context, client *redis.Client, f Changes, live func()) error {
	conn := client.Conn()
	defer conn.Close()
	run, err := runOf(ctx, conn)
	if err != nil {
		return err
	}
	prefix := prefixOf(s.cfg.Identity, run)
	gen, cursor, err := s.join(ctx, conn, f, prefix, "")
	if err != nil {
		return err
	}
	v := s.viewOf(run, prefix, gen)

	err = f.Follow(ctx, feed.Interest{Gap: followGap}, func(ctx context.Context) (bool, error) {
		began := s.now()
		stale := map[string]struct{}{}
		names := 0
		read, err := f.ReadNames(ctx, cursor, func(name, typ string) error {
			v.staleKeys(stale, name, typ)
			names++
			return nil
		})
		if errors.Is(err, feed.ErrCursorLost) {
			// What has changed cannot be known any more: nobody may use this generation again.
			if gen, cursor, err = s.join(ctx, conn, f, prefix, gen); err != nil {
				return false, err
			}
			v = s.viewOf(run, prefix, gen)
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if err := remove(ctx, conn, stale); err != nil {
			return false, fmt.Errorf("delete changed names from Redis: %w", err)
		}
		s.metrics.invalidated.Add(float64(names))
		cursor = read.Cursor
		if read.More {
			return true, nil
		}
		if err := s.advance(ctx, conn, prefix, gen, cursor); err != nil {
			return false, err
		}
		v.liveAt.Store(began)
		live()
		return false, nil
	})
	if errors.Is(err, errOtherGeneration) {
		s.setView(nil)
	}
	return err
}

// viewOf makes the view of a generation the one in use; it is that already, if only the connection was lost. It becomes live with the follower's next step.
func (s *Store) viewOf(run, prefix, gen string) *view {
	if v := s.view.Load(); v != nil && v.run == run && v.gen == gen {
		return v
	}
	v := &view{run: run, gen: gen, prefix: prefix + gen + ":", ttl: s.cfg.TTL, rdb: s.client(s.cfg.Timeout, run)}
	s.setView(v)
	return v
}

// joinScript returns the generation and its cursor. Where there is none, or the caller knows that it cannot be kept right any more (ARGV[4]), the caller's becomes it.
var joinScript = redis.NewScript(`
local state = redis.call('HMGET', KEYS[1], 'gen', 'cursor')
if state[1] and state[2] and state[1] ~= ARGV[4] then
	return state
end
redis.call('HSET', KEYS[1], 'gen', ARGV[1], 'cursor', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {ARGV[1], ARGV[2]}`)

// join returns the generation to use and the cursor up to which it is right. lost is one that must not be used any more.
func (s *Store) join(ctx context.Context, conn *redis.Conn, f Changes, prefix, lost string) (string, feed.Cursor, error) {
	for {
		now, _, err := f.Now(ctx) // before the generation exists: what is put into it was read later
		if err != nil {
			return "", feed.Cursor{}, err
		}
		state, err := joinScript.Run(ctx, conn, []string{prefix + "state"}, newToken(), now.Token(), s.cfg.TTL.Milliseconds(), lost).StringSlice()
		if err != nil {
			return "", feed.Cursor{}, fmt.Errorf("join the cache in Redis: %w", err)
		}
		if len(state) != 2 {
			return "", feed.Cursor{}, fmt.Errorf("join the cache in Redis: it answers %d values, want 2", len(state))
		}
		cursor, err := feed.ParseToken(state[1])
		if err == nil && !cursor.IsZero() {
			return state[0], cursor, nil
		}
		lost = state[0] // written by something else
	}
}

// advanceScript stores the cursor unless there is another generation, and returns the one there is. A full server refuses to store it: then an older one stays,
// which is right too.
var advanceScript = redis.NewScript(`
local gen = redis.call('HGET', KEYS[1], 'gen')
if gen and gen ~= ARGV[1] then
	return gen
end
redis.pcall('HSET', KEYS[1], 'gen', ARGV[1], 'cursor', ARGV[2])
redis.pcall('PEXPIRE', KEYS[1], ARGV[3])
return ARGV[1]`)

func (s *Store) advance(ctx context.Context, conn *redis.Conn, prefix, gen string, cursor feed.Cursor) error {
	is, err := advanceScript.Run(ctx, conn, []string{prefix + "state"}, gen, cursor.Token(), s.cfg.TTL.Milliseconds()).Text()
	if err != nil {
		return fmt.Errorf("store the cursor in Redis: %w", err)
	}
	if is != gen {
		return errOtherGeneration
	}
	return nil
}
