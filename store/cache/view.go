package cache

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/store"
)

// format is the first part of all keys: another layout of entries takes another one.
const format = "dbc1:"

const (
	// leaseTTL is how long a name is left alone whose reader never came back.
	leaseTTL = 5 * time.Second
	// maxEntry bounds what is cached of one resource or page: larger values would hold up everybody else's.
	maxEntry = 1 << 20
	// maxKeys bounds one command.
	maxKeys = 256
)

// view is one generation in one run of a Redis server.
type view struct {
	rdb    *redis.Client // its connections all reach that run
	run    string
	gen    string
	prefix string
	ttl    time.Duration
	// liveAt is when the last step of the follower began that left nothing to read, in nanoseconds of the Store's clock; 0: none yet.
	liveAt atomic.Int64
}

func (v *view) entryKey(name string) string { return v.prefix + "r:" + name }

// tagKey is where the tag of the pages of a type below a prefix lies.
func (v *view) tagKey(typ, prefix string) string { return v.prefix + "t:" + typ + ":" + prefix }

// pageKey is where the page of a query lies.
func (v *view) pageKey(q store.Query) string {
	h := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %d %q", q.Type, q.Prefix, q.Filter, q.OrderBy, q.PageSize, q.PageToken))
	return v.prefix + "l:" + base64.RawURLEncoding.EncodeToString(h[:18])
}

// staleKeys are the keys that a change of name makes wrong: its entry, and the tags of every collection path that is the beginning of it. A type that is
// not known is that of no page.
func (v *view) staleKeys(keys map[string]struct{}, name, typ string) {
	keys[v.entryKey(name)] = struct{}{}
	keys[v.tagKey(typ, "")] = struct{}{}
	for i := range len(name) {
		if name[i] == '/' {
			keys[v.tagKey(typ, name[:i+1])] = struct{}{}
		}
	}
}

// deleter is what removes keys: the pool of readers and writers, or the follower's own connection.
type deleter interface {
	Unlink(ctx context.Context, keys ...string) *redis.IntCmd
}

// remove deletes keys; nil means that Redis has done it.
func remove(ctx context.Context, d deleter, keys map[string]struct{}) error {
	chunk := make([]string, 0, min(len(keys), maxKeys))
	flush := func() error {
		if len(chunk) == 0 {
			return nil
		}
		err := d.Unlink(ctx, chunk...).Err()
		chunk = chunk[:0]
		return err
	}
	for k := range keys {
		if chunk = append(chunk, k); len(chunk) == maxKeys {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// newToken returns what nobody has had before.
func newToken() string { return rand.Text() }

// leaseScript leaves a lease in each place that is free, and says which.
var leaseScript = redis.NewScript(`
local got = {}
for i, key in ipairs(KEYS) do
	got[i] = redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0
end
return got`)

// putScript replaces leases by entries, where they are still there.
var putScript = redis.NewScript(`
for i, key in ipairs(KEYS) do
	if redis.call('GET', key) == ARGV[1] then
		redis.call('SET', key, ARGV[2 + i], 'PX', ARGV[2])
	end
end
return 1`)

// lease returns which of keys the caller may put, under which lease.
func (v *view) lease(ctx context.Context, keys []string) (lease string, got []int64, err error) {
	lease = string(leaseMark) + newToken()
	if len(keys) == 1 {
		ok, err := v.rdb.SetNX(ctx, keys[0], lease, leaseTTL).Result()
		if err != nil || !ok {
			return "", []int64{0}, err
		}
		return lease, []int64{1}, nil
	}
	for len(keys) > 0 {
		n := min(len(keys), maxKeys)
		part, err := leaseScript.Run(ctx, v.rdb, keys[:n], lease, leaseTTL.Milliseconds()).Int64Slice()
		if err != nil || len(part) != n {
			return lease, append(got, make([]int64, len(keys))...), err
		}
		got, keys = append(got, part...), keys[n:]
	}
	return lease, got, nil
}

// put stores the entries whose lease is still there.
func (v *view) put(ctx context.Context, lease string, resources []*store.Resource) error {
	var keys []string
	args := []any{lease, v.ttl.Milliseconds()}
	size := 0
	flush := func() error {
		if len(keys) == 0 {
			return nil
		}
		err := putScript.Run(ctx, v.rdb, keys, args...).Err()
		keys, args, size = nil, args[:2], 0
		return err
	}
	now := time.Now()
	for _, r := range resources {
		e, err := appendEntry(make([]byte, 0, len(r.Body)+512), r, now)
		if err != nil || len(e) > maxEntry {
			continue
		}
		keys, args, size = append(keys, v.entryKey(r.Name)), append(args, e), size+len(e)
		if len(keys) == maxKeys || size > maxEntry {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// tag returns the tag of a collection, a new one if there is none.
func (v *view) tag(ctx context.Context, key string) (string, error) {
	fresh := newToken()
	ok, err := v.rdb.SetNX(ctx, key, fresh, v.ttl).Result()
	if err != nil || ok {
		return fresh, err
	}
	return v.rdb.Get(ctx, key).Result() // redis.Nil when it has been deleted again
}

// putPage stores a page that was read after tag was.
func (v *view) putPage(ctx context.Context, q store.Query, tag string, p *store.Page) error {
	b, err := appendPage(nil, tag, p, time.Now())
	if err != nil || len(b) > maxEntry {
		return nil //nolint:nilerr // it cannot be cached, which is no failure of Redis
	}
	return v.rdb.Set(ctx, v.pageKey(q), b, v.ttl).Err()
}

// replied says whether err is an answer of Redis, which works: it is full, for example, or a replica.
func replied(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer)
}

var errOtherRun = errors.New("this connection reaches another run of Redis")

// runOf names the run of the server behind c: it changes when the server is restarted or promoted. Only a primary has one.
func runOf(ctx context.Context, c redis.Cmdable) (string, error) {
	var id string
	for _, question := range []struct{ section, field string }{{"server", "run_id"}, {"replication", "role"}, {"replication", "master_replid"}} {
		info, err := c.Info(ctx, question.section).Result()
		if err != nil {
			return "", fmt.Errorf("ask Redis who it is: %w", err)
		}
		value := ""
		for line := range strings.Lines(info) {
			if v, ok := strings.CutPrefix(line, question.field+":"); ok {
				value = strings.TrimSpace(v)
			}
		}
		switch {
		case value == "":
			return "", fmt.Errorf("ask Redis who it is: INFO %s has no %s", question.section, question.field)
		case question.field == "role" && value != "master":
			return "", fmt.Errorf("the Redis server is a %s: the cache needs the primary", value)
		}
		id += value + " "
	}
	return id, nil
}

// prefixOf returns what all keys of a Deployment in a run of a server start with.
func prefixOf(identity, run string) string {
	h := sha256.Sum256([]byte(identity + "\x00" + run))
	return format + base64.RawURLEncoding.EncodeToString(h[:12]) + ":"
}
