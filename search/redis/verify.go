package redis

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store/feed"
)

// rowHash makes a look of what inspect tells.
func (d inspected) rowHash(types search.Types) search.RowHash {
	r := search.RowHash{Name: d.name, Type: d.typ, Version: d.version, Hash: d.sum, Held: true}
	switch {
	case d.current(types):
		r.Hash = d.hash()
	case types[d.typ] != d.fingerprint:
		r.Version = search.Damaged
	}
	return r
}

// Ranges implements search.Store. The documents are read within the server, and what they are from it.
func (s *Store) Ranges(ctx context.Context, types search.Types, only []string, after string, to []string) ([]search.RangeDigest, error) {
	digests := make([]search.RangeDigest, len(to))
	for i, end := range to {
		digests[i].To = end
		err := s.Hashes(ctx, types, only, after, end, func(r search.RowHash) error {
			digests[i].Count++
			digests[i].Hash ^= r.Hash
			return nil
		})
		if err != nil {
			return nil, err
		}
		after = end
	}
	return digests, nil
}

// Hashes implements search.Store.
func (s *Store) Hashes(ctx context.Context, types search.Types, only []string, after, to string, emit func(search.RowHash) error) error {
	var failed error
	err := s.each(ctx, after, to, func(d inspected) error {
		if len(only) == 0 || slices.Contains(only, d.typ) {
			failed = emit(d.rowHash(types))
		}
		return failed
	})
	if failed != nil {
		return failed
	}
	return wrap(err, "list documents")
}

// Look implements search.Store.
func (s *Store) Look(ctx context.Context, types search.Types, names []string) (all []search.RowHash, err error) {
	for part := range slices.Chunk(names, inspectSize) {
		docs, err := s.inspect(ctx, s.client, part)
		if err != nil {
			return nil, wrap(err, "look at %d documents", len(names))
		}
		for _, d := range docs {
			if d.named { // else no search finds it
				all = append(all, d.rowHash(types))
			}
		}
	}
	slices.SortFunc(all, func(a, b search.RowHash) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Mend implements search.Store, one document after the other: what is written to one between the look at it and its script undoes the script.
func (s *Store) Mend(ctx context.Context, types search.Types, docs []search.Document, ghosts []string, seen []search.RowHash) error {
	for _, script := range []*goredis.Script{upsert, remove} {
		if err := script.Load(ctx, s.client).Err(); err != nil {
			return wrap(err, "mend documents")
		}
	}
	stood := map[string]search.RowHash{}
	for _, r := range seen {
		stood[r.Name] = r
	}
	for _, d := range docs {
		args, err := fields(d)
		if err != nil {
			return err
		}
		err = s.mend(ctx, types, d.Name, stood[d.Name], func(p goredis.Pipeliner, keys []string) {
			upsert.EvalSha(ctx, p, keys, append([]any{"", s.prefix, d.Name, "1"}, args...)...)
		})
		if err != nil {
			return wrap(err, "mend %s", d.Name)
		}
	}
	for _, name := range ghosts {
		err := s.mend(ctx, types, name, stood[name], func(p goredis.Pipeliner, keys []string) {
			remove.EvalSha(ctx, p, keys, "", s.prefix, name, "1", 0, 0)
		})
		if err != nil {
			return wrap(err, "mend %s", name)
		}
	}
	return nil
}

func (s *Store) mend(ctx context.Context, types search.Types, name string, seen search.RowHash, script func(p goredis.Pipeliner, keys []string)) error {
	keys := []string{s.key("mended"), s.key("d:", name), s.key("n")}
	err := s.client.Watch(ctx, func(tx *goredis.Tx) error {
		docs, err := s.inspect(ctx, tx, []string{name})
		if err != nil {
			return err
		}
		if now := docs[0]; now.named != seen.Held || now.named && now.rowHash(types).Hash != seen.Hash {
			return nil // it has moved
		}
		_, err = tx.TxPipelined(ctx, func(p goredis.Pipeliner) error {
			script(p, keys)
			return nil
		})
		return err
	}, keys[1])
	if errors.Is(err, goredis.TxFailedErr) {
		return nil // likewise
	}
	return err
}

// Filled implements search.Store.
func (s *Store) Filled(ctx context.Context, shards feed.Range) ([]search.Filled, error) {
	entries, err := s.client.HGetAll(ctx, s.key("leases")).Result()
	if err != nil {
		return nil, wrap(err, "say how far it is")
	}
	var all []search.Filled
	for field, text := range entries {
		f, ok := parseFilled(field, text)
		if ok && f.Shards.From < shards.To && shards.From < f.Shards.To {
			all = append(all, f)
		}
	}
	return all, nil
}

// parseFilled reads an entry of the hash of leases; it is not ok if it was written by hand.
func parseFilled(field, text string) (f search.Filled, ok bool) {
	var value filled
	if _, err := fmt.Sscanf(field, "%d-%d", &f.Shards.From, &f.Shards.To); err != nil || json.Unmarshal([]byte(text), &value) != nil {
		return f, false
	}
	f.Schema, f.Cursor = value.Schema, value.Cursor
	return f, true
}
