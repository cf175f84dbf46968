package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Defaults of a Config.
const (
	DefaultMaxStaleness = 2 * time.Second
	DefaultTimeout      = 50 * time.Millisecond
	DefaultTTL          = time.Hour
)

// Changes is what the layer follows: feed.Feed.
type Changes interface {
	Now(ctx context.Context) (feed.Cursor, time.Time, error)
	ReadNames(ctx context.Context, c feed.Cursor, emit func(name, typ string) error) (feed.Read, error)
	Follow(ctx context.Context, want feed.Interest, step func(context.Context) (more bool, err error)) error
}

// Config says which Redis to use, and how. Zero durations mean their defaults.
type Config struct {
	// URL of the Redis server: redis://user:password@host:6379/0, rediss:// with TLS, or unix:///path. Never logged.
	URL string
	// Identity names the Deployment, its API version and its database: no two may have the same in one Redis (postgres.Store.Identity).
	Identity string
	// Lists says for which types the pages of List are cached; nil is for none. It may change its mind at any time.
	Lists func(typ string) bool
	// MaxStaleness is how old an answer may be at most. The follower's idle reads are up to a second apart, so less than that turns the cache off
	// between writes. Default 2 s.
	MaxStaleness time.Duration
	// Timeout of each command to Redis. Default 50 ms.
	Timeout time.Duration
	// TTL is how long what is cached stays at most. It bounds memory, not age. Default 1 h.
	TTL time.Duration
	// Registerer takes the metrics; nil is none.
	Registerer prometheus.Registerer
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Store is the layer. It is safe for concurrent use. It answers from the database alone until Run runs.
type Store struct {
	next    store.Store
	cfg     Config
	options *redis.Options
	log     *slog.Logger
	metrics *metrics
	start   time.Time // zero of the Store's clock

	view atomic.Pointer[view] // nil: there is none to use
	// notBefore is a moment on the Store's clock: only a step of the follower that began after it makes the cache usable again.
	notBefore atomic.Int64
}

// The client would write every failed attempt to stderr; the errors come back to us, and the follower logs each outage once.
func init() { logging.Disable() }

// Layer puts a cache on top of next. The error is about cfg; whether Redis answers is found out later, and only costs time.
func Layer(next store.Store, cfg Config) (*Store, error) {
	o, err := redis.ParseURL(cfg.URL)
	if err != nil {
		// err repeats parts of the URL, and with them the password.
		return nil, store.Invalid("cache", "the URL of Redis cannot be parsed: write redis://user:password@host:6379/0, rediss:// with TLS, or unix:///path")
	}
	if cfg.Identity == "" {
		return nil, errors.New("configure cache: Identity is required")
	}
	if cfg.Lists == nil {
		cfg.Lists = func(string) bool { return false }
	}
	cfg.MaxStaleness = cmp.Or(cfg.MaxStaleness, DefaultMaxStaleness)
	cfg.Timeout = cmp.Or(cfg.Timeout, DefaultTimeout)
	cfg.TTL = cmp.Or(cfg.TTL, DefaultTTL)
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default())

	o.MaxRetries = -1 // the database is faster than a second attempt, and a repeated command would meet another run
	o.DialerRetries = 1
	o.ContextTimeoutEnabled = true
	o.Protocol = 2 // nothing is pushed to us
	o.DisableIdentity = true
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	s := &Store{next: next, cfg: cfg, options: o, log: cfg.Logger, start: time.Now()}
	if s.metrics, err = newMetrics(cfg.Registerer, s.Live); err != nil {
		return nil, fmt.Errorf("register metrics of the cache: %w", err)
	}
	return s, nil
}

// client returns a pool whose connections reach run and no other one; an empty run is whichever answers.
func (s *Store) client(timeout time.Duration, run string) *redis.Client {
	o := *s.options
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = timeout, timeout, timeout, timeout
	if run != "" {
		o.OnConnect = func(ctx context.Context, c *redis.Conn) error {
			is, err := runOf(ctx, c)
			if err == nil && is != run {
				err = errOtherRun
			}
			return err
		}
	}
	return redis.NewClient(&o)
}

// now is the Store's clock in nanoseconds, never 0.
func (s *Store) now() int64 { return int64(time.Since(s.start)) + 1 }

// current returns the view that reads may use now, or nil.
func (s *Store) current() *view {
	v := s.view.Load()
	if v == nil {
		return nil
	}
	live := v.liveAt.Load()
	if live <= s.notBefore.Load() || s.now()-live >= int64(s.cfg.MaxStaleness) {
		return nil
	}
	return v
}

// Live says whether reads are answered from Redis at present.
func (s *Store) Live() bool { return s.current() != nil }

// pause has this process read the database until a step of the follower has begun after now.
func (s *Store) pause() {
	now := s.now()
	for {
		old := s.notBefore.Load()
		if old >= now || s.notBefore.CompareAndSwap(old, now) {
			return
		}
	}
}

// failed is told of an error of Redis. What the server itself answers, a full pool and a caller who has gone say nothing about whether it works.
func (s *Store) failed(ctx context.Context, v *view, err error) {
	if replied(err) || errors.Is(err, redis.ErrPoolTimeout) || ctx.Err() != nil || s.view.Load() != v {
		return
	}
	s.pause()
}

// Get implements store.Reader.
func (s *Store) Get(ctx context.Context, name string) (*store.Resource, error) {
	v := s.current()
	if v == nil || store.IsFresh(ctx) {
		s.metrics.bypass.Inc()
		return s.next.Get(ctx, name)
	}
	key := v.entryKey(name)
	b, err := v.rdb.Get(ctx, key).Bytes()
	switch {
	case errors.Is(err, redis.Nil):
		s.metrics.miss.Inc()
	case err != nil:
		s.metrics.error.Inc()
		s.failed(ctx, v, err)
		return s.next.Get(ctx, name)
	default:
		if r := s.hit(ctx, v, name, b); r != nil {
			return r, nil
		}
		return s.next.Get(ctx, name)
	}

	lease, got, err := v.lease(ctx, []string{key})
	if err != nil {
		s.failed(ctx, v, err)
	}
	r, rerr := s.next.Get(ctx, name)
	if rerr == nil && got[0] == 1 {
		if err := v.put(ctx, lease, []*store.Resource{r}); err != nil {
			s.failed(ctx, v, err)
		}
	}
	return r, rerr
}

// hit returns the resource in what was found under its key, if it may be used, and counts.
func (s *Store) hit(ctx context.Context, v *view, name string, b []byte) *store.Resource {
	if len(b) > 0 && b[0] == leaseMark { // somebody is reading it
		s.metrics.miss.Inc()
		return nil
	}
	r, at, err := readEntry(b)
	if err != nil || r.Name != name {
		s.metrics.error.Inc()
		if err := v.rdb.Unlink(ctx, v.entryKey(name)).Err(); err != nil {
			s.failed(ctx, v, err)
		}
		return nil
	}
	if r.Version.Compare(store.MinVersion(ctx)) < 0 {
		s.metrics.miss.Inc()
		return nil
	}
	s.metrics.hit.Inc()
	s.metrics.age.Observe(max(0, time.Since(at).Seconds()))
	return r
}

// BatchGet implements store.Reader.
func (s *Store) BatchGet(ctx context.Context, names []string) ([]*store.Resource, error) {
	v := s.current()
	if v == nil || store.IsFresh(ctx) || len(names) == 0 || len(names) > store.MaxBatch {
		s.metrics.bypass.Add(float64(len(names)))
		return s.next.BatchGet(ctx, names)
	}
	keys := make([]string, len(names))
	for i, n := range names {
		keys[i] = v.entryKey(n)
	}
	values, err := v.rdb.MGet(ctx, keys...).Result()
	if err != nil || len(values) != len(names) {
		s.metrics.error.Add(float64(len(names)))
		s.failed(ctx, v, err)
		return s.next.BatchGet(ctx, names)
	}
	found := make([]*store.Resource, len(names))
	var missing, free []string // names to read, and keys of those with nothing in their place
	var at []int
	for i, value := range values {
		if text, ok := value.(string); ok {
			if found[i] = s.hit(ctx, v, names[i], []byte(text)); found[i] != nil {
				continue
			}
		} else {
			s.metrics.miss.Inc()
			free = append(free, keys[i])
		}
		missing, at = append(missing, names[i]), append(at, i)
	}
	if len(missing) == 0 {
		return found, nil
	}

	var lease string
	leased := map[string]bool{}
	if len(free) > 0 {
		var got []int64
		if lease, got, err = v.lease(ctx, free); err != nil {
			s.failed(ctx, v, err)
		}
		for i, key := range free {
			leased[key] = leased[key] || got[i] == 1
		}
	}
	read, err := s.next.BatchGet(ctx, missing)
	if err != nil {
		return nil, err
	}
	var put []*store.Resource
	for i, r := range read {
		found[at[i]] = r
		if r != nil && leased[keys[at[i]]] {
			leased[keys[at[i]]] = false // a name may be asked for twice
			put = append(put, r)
		}
	}
	if err := v.put(ctx, lease, put); err != nil {
		s.failed(ctx, v, err)
	}
	return found, nil
}

// List implements store.Reader.
func (s *Store) List(ctx context.Context, q store.Query) (*store.Page, error) {
	if !s.cfg.Lists(q.Type) || q.Prefix != "" && !strings.HasSuffix(q.Prefix, "/") {
		return s.next.List(ctx, q)
	}
	v := s.current()
	if v == nil || store.IsFresh(ctx) || store.MinVersion(ctx) != (store.Version{}) {
		s.metrics.listBypass.Inc()
		return s.next.List(ctx, q)
	}
	tagKey, pageKey := v.tagKey(q.Type, q.Prefix), v.pageKey(q)
	values, err := v.rdb.MGet(ctx, tagKey, pageKey).Result()
	if err != nil || len(values) != 2 {
		s.metrics.listError.Inc()
		s.failed(ctx, v, err)
		return s.next.List(ctx, q)
	}
	tag, tagged := values[0].(string)
	if text, ok := values[1].(string); ok && tagged {
		if p, at, err := readPage([]byte(text), tag); err == nil && p != nil {
			s.metrics.listHit.Inc()
			s.metrics.age.Observe(max(0, time.Since(at).Seconds()))
			return p, nil
		}
	}
	s.metrics.listMiss.Inc()
	if !tagged {
		if tag, err = v.tag(ctx, tagKey); err != nil {
			s.failed(ctx, v, err)
			return s.next.List(ctx, q)
		}
	}
	p, err := s.next.List(ctx, q)
	if err != nil {
		return nil, err
	}
	if err := v.putPage(ctx, q, tag, p); err != nil {
		s.failed(ctx, v, err)
	}
	return p, nil
}

// BatchWrite implements store.Writer.
func (s *Store) BatchWrite(ctx context.Context, writes []store.Write) ([]store.Result, error) {
	results, err := s.next.BatchWrite(ctx, writes)
	if code := store.CodeOf(err); code != 0 && code != store.Unavailable {
		return results, err // refused: nothing has been written
	}
	s.written(ctx, writes, results)
	return results, err
}

// written deletes what writes have changed. Without results it is not known whether they have.
func (s *Store) written(ctx context.Context, writes []store.Write, results []store.Result) {
	v := s.current() // after the write: a view that comes later has a follower that begins later
	keys := map[string]struct{}{}
	if v == nil || len(results) != len(writes) {
		s.pause()
		return
	}
	for i, w := range writes {
		r := results[i]
		if !r.Changed {
			continue
		}
		if w.Op == store.Delete || r.Resource == nil {
			s.pause() // what goes with it has names that are not known here
			return
		}
		v.staleKeys(keys, w.Name, r.Resource.Type)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Timeout)
	defer cancel()
	if err := remove(ctx, v.rdb, keys); err != nil || s.view.Load() != v {
		s.pause()
	}
}
