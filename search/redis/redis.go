// Package redis is a search store on Redis: exact-match, prefix and range indexes of the declared filters, and full text where the server has the Query Engine.
//
// A document is a hash. A filter of strings is a sorted set of value, NUL and name, in which exact values and prefixes are ranges; a filter of numbers is one whose
// scores are the numbers. What an index finds is checked on the documents, so an index only ever narrows a search. A script writes a document with its index
// entries in one step; the cursor follows at the end of a batch, and a batch that was cut off is repeated.
//
// The Query Engine (version 2.4 and later of the module, as in Redis 8) indexes the same hashes by itself, so that one mechanism feeds both. It answers queries with a text: candidates
// that are judged again on the documents. A server that has none, or an old one, refuses full text and says why. This part has been tested against the documented protocol, and
// not run against a server with the Query Engine.
//
//	redis.go, scripts.go     documents, leases, digests
//	query.go                 queries without a text
//	engine_query.go          pure: indexes and queries in the language of the Query Engine
//	engine.go                the Query Engine: is it there, its indexes, its answers
//
// The server should not evict keys (maxmemory-policy noeviction): evicted documents are missing until the next audit.
package redis

import (
	"cmp"
	"context"
	"crypto/md5" //nolint:gosec // the digest is compared with one of PostgreSQL; it protects nothing
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Config says which server a Store works on.
type Config struct {
	// URL is redis://user:password@host:6379/0, rediss:// with TLS. Never logged.
	URL string
	// Service, Region and Version are what the store belongs to. A server may hold the stores of many Deployments.
	Service, Region, Version string
	// Ring is the number of shards of the service.
	Ring int
	// Declared returns the schema in force, for the indexes of the Query Engine. Without it, an index is made by the first search of its type.
	Declared func() *descriptor.Version
	// Logger is told what the server can do. Default: none.
	Logger *slog.Logger
}

// Store is a search.Store on Redis.
type Store struct {
	prefix string // of all keys; its braces keep them in one slot of a cluster
	ring   int
	client *goredis.Client

	declared func() *descriptor.Version
	log      *slog.Logger
	engine   engine
}

var _ search.Store = (*Store)(nil)

// Open returns a store. It connects when it is first used, so a server that is away is no error yet.
func Open(cfg Config) (*Store, error) {
	o, err := goredis.ParseURL(cfg.URL)
	if err != nil {
		return nil, errors.New("open search store: the URL cannot be parsed: use redis://user:password@host:6379/0") // err repeats parts of the URL
	}
	o.DisableIdentity = true
	o.ClientName = "db-controller"
	o.Protocol = 2 // the form in which answers of the Query Engine are documented for all versions
	s := &Store{
		prefix: fmt.Sprintf("dbc-search-1:{%s/%s/%s}:", cfg.Service, cfg.Region, cfg.Version), ring: cfg.Ring,
		declared: cfg.Declared, log: cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler)),
	}
	o.OnConnect = func(context.Context, *goredis.Conn) error {
		s.engine.conns.Add(1)
		return nil
	}
	s.client = goredis.NewClient(o)
	return s, nil
}

// PoolStats returns the state of the connections.
func (s *Store) PoolStats() *goredis.PoolStats { return s.client.PoolStats() }

// Close ends all connections.
func (s *Store) Close() { _ = s.client.Close() }

// Ping returns nil if the server answers.
func (s *Store) Ping(ctx context.Context) error {
	return wrap(s.client.Ping(ctx).Err(), "be reached")
}

// leaseLost is the reply of a script whose lease is not in force.
const leaseLost = "LEASELOST"

func wrap(err error, format string, args ...any) error {
	var reply goredis.Error
	if errors.As(err, &reply) && (strings.Contains(reply.Error(), leaseLost) || strings.HasPrefix(reply.Error(), "NOSCRIPT")) {
		return search.ErrLost // a server that has lost its scripts has been restarted: Begin looks what is left
	}
	return search.Unavailable(err, format, args...)
}

func (s *Store) key(parts ...string) string { return s.prefix + strings.Join(parts, "") }

func shardsOf(r feed.Range) string { return fmt.Sprintf("%d-%d", r.From, r.To) }

func (s *Store) leaseKey(r feed.Range) string { return s.key("l:", shardsOf(r)) }

func leaseOf(l *search.Lease, seq int64) string { return l.Holder + " " + strconv.FormatInt(seq, 10) }

// filled is the value of an entry of the hash of leases.
type filled struct {
	Schema string `json:"schema"`
	Cursor string `json:"cursor"`
}

func (f filled) String() string {
	text, err := json.Marshal(f)
	if err != nil {
		panic(err) // two strings always have a JSON form
	}
	return string(text)
}

// Begin implements search.Store.
func (s *Store) Begin(ctx context.Context, shards feed.Range, schema string) (*search.Lease, feed.Cursor, error) {
	for _, script := range []*goredis.Script{upsert, remove, step, inspect} {
		if err := script.Load(ctx, s.client).Err(); err != nil {
			return nil, feed.Cursor{}, wrap(err, "be opened")
		}
	}
	lease := search.NewLease(shards, schema)
	var cursor feed.Cursor
	leases := s.key("leases")
	take := func(tx *goredis.Tx) error {
		entries, err := tx.HGetAll(ctx, leases).Result()
		if err != nil {
			return err
		}
		var all []search.Filled
		var gone, keys []string
		for field, text := range entries {
			f, ok := parseFilled(field, text)
			if !ok {
				gone = append(gone, field) // written by hand
				continue
			}
			if f.Shards.From < shards.To && shards.From < f.Shards.To {
				gone, keys = append(gone, field), append(keys, s.leaseKey(f.Shards))
			}
			all = append(all, f)
		}
		token, left := search.Carve(all, shards, schema)
		if cursor, err = feed.ParseToken(token); err != nil {
			token, cursor = "", feed.Cursor{}
		}
		_, err = tx.TxPipelined(ctx, func(p goredis.Pipeliner) error {
			if len(gone) > 0 {
				p.HDel(ctx, leases, gone...)
			}
			if len(keys) > 0 {
				p.Del(ctx, keys...)
			}
			for _, f := range left {
				p.HSet(ctx, leases, shardsOf(f.Shards), filled{f.Schema, f.Cursor}.String())
			}
			p.HSet(ctx, leases, shardsOf(shards), filled{schema, token}.String())
			p.Set(ctx, s.leaseKey(shards), leaseOf(lease, 0), 0)
			return nil
		})
		return err
	}
	for {
		err := s.client.Watch(ctx, take, leases)
		if errors.Is(err, goredis.TxFailedErr) {
			continue // another range was taken in between
		}
		if err != nil {
			return nil, feed.Cursor{}, wrap(err, "be opened")
		}
		s.prepare(ctx)
		return lease, cursor, nil
	}
}

// Check implements search.Store.
func (s *Store) Check(ctx context.Context, l *search.Lease) error {
	have, err := s.client.Get(ctx, s.leaseKey(l.Shards)).Result()
	if errors.Is(err, goredis.Nil) || err == nil && have != leaseOf(l, l.Seq) {
		return search.ErrLost
	}
	return wrap(err, "be checked")
}

// pipelineSize is how many documents one round trip writes.
const pipelineSize = 500

// Apply implements search.Store.
func (s *Store) Apply(ctx context.Context, l *search.Lease, b search.Batch) error {
	lease, now, force := s.leaseKey(l.Shards), leaseOf(l, l.Seq), "0"
	if b.Force {
		force = "1"
	}
	var calls []func(goredis.Pipeliner)
	for _, d := range b.Upserts {
		args, err := fields(d)
		if err != nil {
			return err
		}
		calls = append(calls, func(p goredis.Pipeliner) {
			upsert.EvalSha(ctx, p, []string{lease, s.key("d:", d.Name), s.key("n")}, append([]any{now, s.prefix, d.Name, force}, args...)...)
		})
	}
	for _, d := range b.Deletions {
		calls = append(calls, func(p goredis.Pipeliner) {
			remove.EvalSha(ctx, p, []string{lease, s.key("d:", d.Name), s.key("n")}, now, s.prefix, d.Name, force, d.Version.Epoch, d.Version.Number)
		})
	}
	entry := ""
	if !b.Cursor.IsZero() {
		entry = filled{l.Schema, b.Cursor.Token()}.String()
	}
	for part := range slices.Chunk(calls, pipelineSize) {
		if err := s.pipeline(ctx, part...); err != nil {
			return wrap(err, "take %d changes", len(calls))
		}
	}
	// On its own: within a pipeline a command runs although one before it has failed.
	err := s.pipeline(ctx, func(p goredis.Pipeliner) {
		step.EvalSha(ctx, p, []string{lease, s.key("leases")}, now, leaseOf(l, l.Seq+1), shardsOf(l.Shards), entry)
	})
	if err != nil {
		return wrap(err, "take %d changes", len(calls))
	}
	l.Seq++
	return nil
}

func (s *Store) pipeline(ctx context.Context, calls ...func(goredis.Pipeliner)) error {
	_, err := s.client.Pipelined(ctx, func(p goredis.Pipeliner) error {
		for _, call := range calls {
			call(p)
		}
		return nil
	})
	return err
}

// fields are the arguments of upsert for a document.
func fields(d search.Document) ([]any, error) {
	values, err := search.ParseValues(d.Values)
	if err != nil {
		return nil, fmt.Errorf("index %s: %w", d.Name, err)
	}
	places, err := places(d, values)
	if err != nil {
		return nil, err
	}
	var texts [4][]string
	for i, text := range d.Texts {
		w := d.Weights[i] - 'A'
		texts[w] = append(texts[w], text)
	}
	args := []any{d.Type, d.UUID, d.Version.Epoch, d.Version.Number, d.Shard, d.Fingerprint}
	for _, t := range texts {
		args = append(args, textFor(t))
	}
	return append(append(args, string(d.Values), places), engineFields(d.Name, values)...), nil
}

// maxIndexed bytes of a string are indexed.
const maxIndexed = 256

// places returns where a document stands in the indexes, as upsert takes it: all values that it has, and its type.
func places(d search.Document, values map[string]any) (string, error) {
	list := [][3]any{{"t:" + d.Type, 0, d.Name}}
	leaves("", values, func(path string, value any) {
		switch v := value.(type) {
		case json.Number:
			list = append(list, [3]any{numbers(d.Type, path), score(v), string(v) + "\x00" + d.Name})
		case string:
			list = append(list, [3]any{strs(d.Type, path), 0, indexed(v) + "\x00" + d.Name})
		case bool:
			list = append(list, [3]any{strs(d.Type, path), 0, strconv.FormatBool(v) + "\x00" + d.Name})
		}
	})
	text, err := json.Marshal(list)
	return string(text), err
}

// leaves calls visit for each value that is no object and no list, in the order of paths.
func leaves(path string, value any, visit func(path string, value any)) {
	switch v := value.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			leaves(strings.TrimPrefix(path+"."+name, "."), v[name], visit)
		}
	case []any:
		for _, item := range v {
			leaves(path, item, visit)
		}
	default:
		visit(path, v)
	}
}

func numbers(typ, path string) string { return "y:" + typ + ":" + path }
func strs(typ, path string) string    { return "x:" + typ + ":" + path }

// score is the nearest float64, as text: what is beyond all of them is the largest one.
func score(n json.Number) string {
	f, err := n.Float64()
	if err != nil {
		f = max(-1.7e308, min(f, 1.7e308))
	}
	return strconv.FormatFloat(f, 'g', 17, 64)
}

func indexed(s string) string {
	if len(s) <= maxIndexed {
		return s
	}
	n := maxIndexed
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// inspected is what inspect tells of a document.
type inspected struct {
	name, typ, uuid, fingerprint string
	version                      store.Version
	shard                        int32
	whole                        bool
	sum                          int64 // of what it is, whole or not
	named                        bool  // among all names, so that it is found
}

// inspectSize is how many documents one call of inspect looks at: it must not hold up the server.
const inspectSize = 200

// lex reads the members of a sorted set from from to to, in their order; no limit with 0.
func (s *Store) lex(ctx context.Context, key, from, to string, limit int64) ([]string, error) {
	return s.client.ZRangeArgs(ctx, goredis.ZRangeArgs{Key: s.key(key), Start: from, Stop: to, ByLex: true, Count: limit}).Result()
}

// each calls visit for each document with a name in (after, to], ordered by name; an empty to is no end.
func (s *Store) each(ctx context.Context, after, to string, visit func(inspected) error) error {
	end := "+"
	if to != "" {
		end = "[" + to
	}
	for {
		names, err := s.lex(ctx, "n", "("+after, end, inspectSize)
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return nil
		}
		docs, err := s.inspect(ctx, s.client, names)
		if err != nil {
			return err
		}
		for _, d := range docs {
			if err := visit(d); err != nil {
				return err
			}
		}
		after = names[len(names)-1]
	}
}

// inspect looks at the documents of names, at most inspectSize.
func (s *Store) inspect(ctx context.Context, c goredis.Scripter, names []string) ([]inspected, error) {
	args := []any{s.prefix}
	for _, n := range names {
		args = append(args, n)
	}
	rows, err := inspect.Run(ctx, c, []string{s.key("n")}, args...).Slice()
	if err != nil {
		return nil, err
	}
	docs := make([]inspected, len(rows))
	for i, r := range rows {
		row, ok := r.([]any)
		if !ok || len(row) != 9 {
			return nil, fmt.Errorf("inspect %s: an answer of another form", names[i])
		}
		text := func(n int) string { t, _ := row[n].(string); return t }
		d := inspected{name: names[i], typ: text(0), uuid: text(1), fingerprint: text(5), whole: row[6] == int64(1), named: row[8] == int64(1)}
		var errs [2]error
		d.version.Epoch, errs[0] = strconv.ParseInt(text(2), 10, 64)
		d.version.Number, errs[1] = strconv.ParseInt(text(3), 10, 64)
		d.shard = int32(descriptor.Shard(d.name, s.ring)) // what it says itself may have been changed by hand
		d.whole = d.whole && errors.Join(errs[:]...) == nil
		sum, err := strconv.ParseUint(text(7)[:min(16, len(text(7)))], 16, 64)
		if err != nil {
			return nil, fmt.Errorf("inspect %s: %w", names[i], err)
		}
		d.sum = int64(sum)
		docs[i] = d
	}
	return docs, nil
}

// current says whether the document is whole and of the present declarations.
func (d inspected) current(types search.Types) bool {
	return d.whole && types[d.typ] == d.fingerprint
}

// hash is that of a document which is current, as PostgreSQL makes it.
func (d inspected) hash() int64 {
	sum := md5.Sum(fmt.Appendf(nil, "%s%s%d.%d%s", d.name, d.uuid, d.version.Epoch, d.version.Number, d.fingerprint))
	return int64(binary.BigEndian.Uint64(sum[:8]))
}

// Digests implements search.Store. It reads the documents within the server and their versions from it; a document that is not whole makes the digest differ from
// any that the database can have.
func (s *Store) Digests(ctx context.Context, shards feed.Range, types search.Types) ([]search.ShardDigest, error) {
	byShard := map[int32]*search.ShardDigest{}
	err := s.each(ctx, "", "", func(d inspected) error {
		if d.shard < shards.From || d.shard >= shards.To {
			return nil
		}
		g := byShard[d.shard]
		if g == nil {
			g = &search.ShardDigest{Shard: d.shard}
			byShard[d.shard] = g
		}
		if g.Count++; !d.current(types) {
			g.Count += 1_000_000_000_000
			return nil
		}
		g.Hash ^= d.hash()
		return nil
	})
	if err != nil {
		return nil, wrap(err, "digest shards %v", shards)
	}
	digests := make([]search.ShardDigest, 0, len(byShard))
	for _, shard := range slices.Sorted(maps.Keys(byShard)) {
		digests = append(digests, *byShard[shard])
	}
	return digests, nil
}

// Versions implements search.Store.
func (s *Store) Versions(ctx context.Context, shards []int32, types search.Types, after string, emit func(name string, v store.Version) error) error {
	asked := map[int32]bool{}
	for _, shard := range shards {
		asked[shard] = true
	}
	var failed error
	err := s.each(ctx, after, "", func(d inspected) error {
		if !asked[d.shard] {
			return nil
		}
		if !d.current(types) {
			d.version = search.Damaged
		}
		failed = emit(d.name, d.version)
		return failed
	})
	if failed != nil {
		return failed
	}
	return wrap(err, "list versions")
}
