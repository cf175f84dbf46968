package feed_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

var (
	schedules = flag.Int("schedules", 3000, "random schedules of TestNothingIsSkipped")
	seed      = flag.Uint64("seed", 0, "first seed; 0 picks one")
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(pgtest.Main(m))
}

func open(t testing.TB, limit int) (*postgres.Store, string) {
	t.Helper()
	dsn := pgtest.Database(t)
	s, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn, Service: "library.example.com", Region: "eu", Version: "v1", FeedLimit: limit})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, dsn
}

func connect(t testing.TB, dsn string) *pgx.Conn {
	t.Helper()
	c, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

// rowState is what a reader knows of one name.
type rowState struct {
	version int64
	gone    bool
}

// follower is a reader of the feed that keeps what it has been told, as any consumer would.
type follower struct {
	feed   *feed.Feed
	cursor feed.Cursor
	rows   map[string]rowState
	lost   int
}

// read does one read. A lost cursor makes it start over from the table, after having taken the new position.
func (f *follower) read(ctx context.Context, table func() (map[string]rowState, error)) (more bool, err error) {
	r, err := f.feed.ReadResources(ctx, f.cursor, feed.Selection{}, func(r *store.Resource) error {
		if had := f.rows[r.Name]; had.version > r.Version.Number {
			return fmt.Errorf("%s went back from version %d to %d", r.Name, had.version, r.Version.Number)
		}
		f.rows[r.Name] = rowState{r.Version.Number, r.State == store.Gone}
		return nil
	})
	if errors.Is(err, feed.ErrCursorLost) {
		f.lost++
		if f.cursor, _, err = f.feed.Now(ctx); err != nil {
			return false, err
		}
		f.rows, err = table()
		return true, err
	}
	if err != nil {
		return false, err
	}
	f.cursor = r.Cursor
	return r.More, nil
}

const upsert = `INSERT INTO v1.resources AS t (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, body)
	VALUES ($1, 'Book', gen_random_uuid(), 1, $2, 1, 0, 'eu', '{eu}', now(), now(), '{}')
	ON CONFLICT (name) DO UPDATE SET resource_version = excluded.resource_version, change = pg_current_xact_id(), state = 0, body = '{}', delete_time = NULL`

const tombstone = `INSERT INTO v1.resources AS t (name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, create_time, update_time, delete_time, state)
	VALUES ($1, 'Book', gen_random_uuid(), 1, $2, 1, 0, 'eu', '{eu}', now(), now(), now(), 2)
	ON CONFLICT (name) DO UPDATE SET resource_version = excluded.resource_version, change = pg_current_xact_id(), state = 2, body = NULL, delete_time = now()`

// writer is one session with at most one transaction open. The schedule is driven by one goroutine, so that it is a function of its seed; two open
// transactions never touch the same name, because the second one would wait for ever.
type writer struct {
	conn      *pgx.Conn
	open      bool
	names     []string // locked by the open transaction
	savepoint int      // 0: none
}

type schedule struct {
	rng      *rand.Rand
	table    func() (map[string]rowState, error)
	store    *postgres.Store
	writers  []*writer
	prepared map[string][]string // global id -> locked names
	locked   map[string]bool
	version  int64
	gid      int
	tag      string
	done     map[string]int
}

func (s *schedule) name() (string, bool) {
	n := fmt.Sprintf("shelves/%s/books/%d", s.tag, s.rng.IntN(12))
	return n, !s.locked[n]
}

// step does one random thing. Statements of writers that have a transaction open stay uncommitted.
func (s *schedule) step(ctx context.Context) error {
	w := s.writers[s.rng.IntN(len(s.writers))]
	act := []string{"write", "write", "write", "delete", "begin", "begin", "commit", "commit", "rollback", "savepoint", "rollback to", "prepare", "finish prepared", "purge"}[s.rng.IntN(14)]
	exec := func(sql string, args ...any) error {
		_, err := w.conn.Exec(ctx, sql, args...)
		if err != nil {
			return fmt.Errorf("%s: %w", act, err)
		}
		s.done[act]++
		return nil
	}
	release := func() {
		for _, n := range w.names {
			delete(s.locked, n)
		}
		w.open, w.names, w.savepoint = false, nil, 0
	}
	switch act {
	case "write", "delete":
		n, free := s.name()
		if !free && !slices.Contains(w.names, n) {
			return nil
		}
		if w.open && free {
			s.locked[n] = true
			w.names = append(w.names, n)
		}
		s.version++
		sql := upsert
		if act == "delete" {
			sql = tombstone
		}
		return exec(sql, n, s.version)
	case "begin":
		if w.open {
			return nil
		}
		w.open = true
		return exec("BEGIN")
	case "commit", "rollback":
		if !w.open {
			return nil
		}
		release()
		return exec(act)
	case "savepoint":
		if !w.open {
			return nil
		}
		w.savepoint++
		return exec(fmt.Sprintf("SAVEPOINT s%d", w.savepoint))
	case "rollback to":
		if w.savepoint == 0 {
			return nil
		}
		w.savepoint = 1 + s.rng.IntN(w.savepoint) // those after it are gone
		return exec(fmt.Sprintf("ROLLBACK TO SAVEPOINT s%d", w.savepoint))
	case "prepare":
		if !w.open || len(s.prepared) > 8 {
			return nil
		}
		s.gid++
		id := fmt.Sprintf("%s-%d", s.tag, s.gid)
		s.prepared[id] = w.names
		w.open, w.names, w.savepoint = false, nil, 0
		return exec("PREPARE TRANSACTION '" + id + "'")
	case "finish prepared":
		if len(s.prepared) > 0 {
			id := slices.Min(slices.Collect(maps.Keys(s.prepared)))
			for _, n := range s.prepared[id] {
				delete(s.locked, n)
			}
			delete(s.prepared, id)
			if w.open {
				w = s.writers[0] // COMMIT PREPARED needs a session without a transaction
				if w.open {
					release()
					if err := exec("COMMIT"); err != nil {
						return err
					}
				}
			}
			return exec([]string{"COMMIT", "ROLLBACK"}[s.rng.IntN(2)] + " PREPARED '" + id + "'")
		}
	case "purge":
		if s.rng.IntN(4) == 0 {
			_, err := s.store.Purge(ctx, 0, 3)
			s.done[act]++
			return err
		}
	}
	return nil
}

// finish ends everything that is open.
func (s *schedule) finish(ctx context.Context) error {
	for _, w := range s.writers {
		if w.open {
			if _, err := w.conn.Exec(ctx, "COMMIT"); err != nil {
				return err
			}
			w.open, w.names, w.savepoint = false, nil, 0
		}
	}
	for id := range s.prepared {
		if _, err := s.writers[0].conn.Exec(ctx, "COMMIT PREPARED '"+id+"'"); err != nil {
			return err
		}
		delete(s.prepared, id)
	}
	clear(s.locked)
	return nil
}

// TestNothingIsSkipped runs thousands of random schedules of overlapping transactions, with savepoints, prepared transactions, rollbacks and purges,
// and a follower that reads in between in steps of a few rows. Whenever it has read to the end, it must know exactly what is committed.
func TestNothingIsSkipped(t *testing.T) {
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	n := *schedules
	if testing.Short() {
		n /= 10
	}
	const lanes = 4
	totals := make(chan map[string]int, lanes)
	for lane := range lanes {
		t.Run(fmt.Sprintf("lane%d", lane), func(t *testing.T) {
			t.Parallel()
			s, dsn := open(t, 1+lane)
			check := connect(t, dsn)
			table := func() (map[string]rowState, error) {
				rows, err := check.Query(t.Context(), "SELECT name, resource_version, state = 2 FROM v1.resources")
				if err != nil {
					return nil, err
				}
				all := map[string]rowState{}
				var name string
				var r rowState
				_, err = pgx.ForEachRow(rows, []any{&name, &r.version, &r.gone}, func() error { all[name] = r; return nil })
				return all, err
			}
			sch := &schedule{store: s, table: table, prepared: map[string][]string{}, locked: map[string]bool{}, done: map[string]int{}, tag: fmt.Sprintf("lane%d", lane)}
			for range 4 {
				sch.writers = append(sch.writers, &writer{conn: connect(t, dsn)})
			}
			f := &follower{feed: s.Feed(), rows: map[string]rowState{}}
			var err error
			if f.cursor, _, err = s.Feed().Now(t.Context()); err != nil {
				t.Fatal(err)
			}
			drain := func() error {
				for {
					more, err := f.read(t.Context(), table)
					if err != nil || !more {
						return err
					}
				}
			}
			for i := lane; i < n; i += lanes {
				s0 := first + uint64(i)
				sch.rng = rand.New(rand.NewPCG(s0, 0))
				fail := func(err error) { t.Fatalf("seed %d: %v (repeat with -seed %d -schedules 1)", s0, err, s0) }
				for range 8 + sch.rng.IntN(20) {
					switch sch.rng.IntN(6) {
					case 0:
						if _, err := f.read(t.Context(), table); err != nil {
							fail(err)
						}
					case 1:
						if err := drain(); err != nil {
							fail(err)
						}
						if err := equal(f.rows, table); err != nil {
							fail(err)
						}
					default:
						if err := sch.step(t.Context()); err != nil {
							fail(err)
						}
					}
				}
				if sch.rng.IntN(3) == 0 { // else the next schedule begins with transactions open for long
					if err := sch.finish(t.Context()); err != nil {
						fail(err)
					}
				}
				if err := errors.Join(drain(), equal(f.rows, table)); err != nil {
					fail(err)
				}
			}
			if err := errors.Join(sch.finish(t.Context()), drain(), equal(f.rows, table)); err != nil {
				t.Fatalf("seeds %d to %d: %v", first, first+uint64(n), err)
			}
			sch.done["cursor lost"] = f.lost
			totals <- sch.done
		})
	}
	t.Cleanup(func() {
		sum := map[string]int{}
		for range len(totals) {
			for k, v := range <-totals {
				sum[k] += v
			}
		}
		t.Logf("%d schedules from seed %d: %v", n, first, sum)
		for _, act := range []string{"commit", "rollback", "savepoint", "rollback to", "prepare", "finish prepared", "purge", "cursor lost"} {
			if sum[act] == 0 && !t.Failed() {
				t.Errorf("no schedule did %q: the run proves nothing about it", act)
			}
		}
	})
}

// equal compares what a follower knows with what is committed. A tombstone that has been purged may still be known as one.
func equal(known map[string]rowState, table func() (map[string]rowState, error)) error {
	stored, err := table()
	if err != nil {
		return err
	}
	live := func(m map[string]rowState) map[string]rowState {
		out := maps.Clone(m)
		maps.DeleteFunc(out, func(_ string, r rowState) bool { return r.gone })
		return out
	}
	if k, s := live(known), live(stored); !maps.Equal(k, s) {
		return fmt.Errorf("the follower knows %v, committed is %v", k, s)
	}
	return nil
}

// TestConcurrentWriters lets real concurrency choose the schedule: writers in many transactions, a follower at full speed.
func TestConcurrentWriters(t *testing.T) {
	s, dsn := open(t, 3)
	check := connect(t, dsn)
	f := &follower{feed: s.Feed(), rows: map[string]rowState{}}
	var err error
	if f.cursor, _, err = s.Feed().Now(t.Context()); err != nil {
		t.Fatal(err)
	}
	writing, stop := context.WithCancel(t.Context())
	followed := make(chan error, 1)
	go func() {
		for {
			ended := writing.Err() != nil // before the read: the last one sees everything
			more, err := f.read(t.Context(), nil)
			if err != nil || ended && !more {
				followed <- err
				return
			}
		}
	}()
	var wg sync.WaitGroup
	for w := range 6 {
		conn := connect(t, dsn)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for i := range 150 {
				tx, err := conn.Begin(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				for range 1 + rng.IntN(4) { // own names only, or writers would deadlock
					if _, err := tx.Exec(t.Context(), upsert, fmt.Sprintf("shelves/%d/books/%d", w, rng.IntN(20)), int64(i+1)); err != nil {
						t.Error(err)
					}
				}
				if rng.IntN(5) == 0 {
					err = tx.Rollback(t.Context())
				} else {
					err = tx.Commit(t.Context())
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	stop()
	if err := <-followed; err != nil {
		t.Fatal(err)
	}
	if err := equal(f.rows, func() (map[string]rowState, error) {
		rows, err := check.Query(t.Context(), "SELECT name, resource_version FROM v1.resources")
		if err != nil {
			return nil, err
		}
		all := map[string]rowState{}
		var name string
		var r rowState
		_, err = pgx.ForEachRow(rows, []any{&name, &r.version}, func() error { all[name] = r; return nil })
		return all, err
	}); err != nil {
		t.Fatal(err)
	}
}

// TestFollowHearsHints: a commit wakes a follower of the same process, and through NOTIFY one of another process, long before the poll.
func TestFollowHearsHints(t *testing.T) {
	s, dsn := open(t, 0)
	other, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn, Service: "library.example.com", Region: "eu", Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, st := range []*postgres.Store{s, other} {
		wg.Go(func() { _ = st.Run(ctx) })
	}
	for _, reader := range []*postgres.Store{s, other} {
		cursor, _, err := reader.Feed().Now(ctx)
		if err != nil {
			t.Fatal(err)
		}
		seen := make(chan string, 1000)
		following, end := context.WithCancel(ctx)
		wg.Go(func() {
			_ = reader.Feed().Follow(following, feed.Interest{Owned: true, Shards: feed.Range{To: 4096}}, func(ctx context.Context) (bool, error) {
				r, err := reader.Feed().ReadResources(ctx, cursor, feed.Selection{Type: "Book", Prefix: "shelves/"}, func(r *store.Resource) error {
					seen <- r.Name
					return nil
				})
				cursor = r.Cursor
				return r.More, err
			})
		})
		for i := range 20 {
			name := fmt.Sprintf("shelves/a/books/%p-%d", reader, i)
			if _, err := store.Apply(ctx, s, store.Write{Op: store.Save, Name: name, Type: "Book"}); err != nil {
				t.Fatal(err)
			}
			select {
			case got := <-seen:
				if got != name {
					t.Fatalf("saw %s, want %s", got, name)
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("%s was never seen", name)
			}
		}
		end()
	}
}

func TestCursorOfAnotherEpochOrTheFutureIsLost(t *testing.T) {
	s, _ := open(t, 0)
	now, _, err := s.Feed().Now(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]feed.Cursor{
		"epoch":  {Epoch: now.Epoch + 1, Snapshot: now.Snapshot},
		"future": {Epoch: now.Epoch, Snapshot: feed.Snapshot{Xmin: now.Snapshot.Xmax + 1000, Xmax: now.Snapshot.Xmax + 1000}},
	} {
		if _, err := s.Feed().ReadResources(t.Context(), c, feed.Selection{}, nil); !errors.Is(err, feed.ErrCursorLost) {
			t.Errorf("%s: reading gave %v, want ErrCursorLost", name, err)
		}
	}
}

// TestOrderIsNumeric reads a backlog of more transactions than the limit, across the point where their ids get one digit more: as text, 10000 would
// come before 9999.
func TestOrderIsNumeric(t *testing.T) {
	s, dsn := open(t, 3)
	conn := connect(t, dsn)
	var next int64
	if err := conn.QueryRow(t.Context(), "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").Scan(&next); err != nil {
		t.Fatal(err)
	}
	edge := int64(10_000)
	for edge < next+50 {
		edge *= 10
	}
	if _, err := conn.Exec(t.Context(), fmt.Sprintf("DO $$ BEGIN FOR i IN 1..%d LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$", edge-next-20)); err != nil {
		t.Fatal(err)
	}
	f := &follower{feed: s.Feed(), rows: map[string]rowState{}}
	var err error
	if f.cursor, _, err = s.Feed().Now(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		if _, err := conn.Exec(t.Context(), upsert, fmt.Sprintf("shelves/a/books/%d", i), 1); err != nil {
			t.Fatal(err)
		}
	}
	for more := true; more; {
		if more, err = f.read(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.rows) != 40 {
		t.Errorf("%d rows delivered, want 40", len(f.rows))
	}
	if err := conn.QueryRow(t.Context(), "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").Scan(&next); err != nil || next < edge {
		t.Errorf("the ids have reached %d, not %d: the test proves nothing (%v)", next, edge, err)
	}
}
