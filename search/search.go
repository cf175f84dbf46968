// Package search is what search stores have in common: documents, queries, and the contract of a Store.
//
// A search store follows the local database of one Deployment, owned resources and read copies alike, and answers full text queries, filters and counts
// of values. It is never asked for a resource: a hit is a name, and whoever shows it reads the resource from the database. So a search store may be lost,
// emptied or rolled back at any time; it is filled again from the database.
//
//	search.go    documents, and the Store
//	lease.go     pure: whose shards are whose, and which cursor is good for which
//	query.go     queries: checking, page tokens, results
//	match.go     pure: does a document match a filter
//	postgres/    PostgreSQL full text, in a database of its own
//	redis/       Redis: with the Query Engine full text, without it exact match, prefix and range indexes
package search

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Document is what a search store holds of a resource.
type Document struct {
	Name, Type, UUID string
	Version          store.Version
	Shard            int32
	// Fingerprint is that of the declaration by which the document was made.
	Fingerprint string
	// Texts are parallel to the declared fields; Weights has the weight of each, 'A' to 'D'.
	Texts   []string
	Weights string
	// Values is a JSON object with the values that filters ask for, each in its place in the body.
	Values json.RawMessage
}

// DocumentOf projects a resource whose type is searched. With an error, one that cannot be projected comes as a document that is found by its name alone.
func DocumentOf(t *descriptor.Type, r *store.Resource) (Document, error) {
	texts, values, err := t.Search.Project(r.Name, r.Body)
	if err != nil {
		var bare error
		if texts, values, bare = t.Search.Project(r.Name, []byte("{}")); bare != nil {
			return Document{}, errors.Join(err, bare)
		}
	}
	weights := make([]byte, len(t.Search.Fields))
	for i, f := range t.Search.Fields {
		weights[i] = f.Weight
	}
	return Document{
		Name: r.Name, Type: r.Type, UUID: r.UUID, Version: r.Version, Shard: r.Shard,
		Fingerprint: t.Search.Fingerprint, Texts: texts, Weights: string(weights), Values: values,
	}, err
}

// Types are the searched types with the fingerprints of their declarations.
type Types = postgres.SearchTypes

// TypesOf returns the searched types of a version.
func TypesOf(v *descriptor.Version) Types {
	types := Types{}
	for _, t := range v.Types {
		if t.Search != nil {
			types[t.Name] = t.Search.Fingerprint
		}
	}
	return types
}

// SchemaOf is the fingerprint of all that is searched: the schema under which shards are filled.
func SchemaOf(types Types) string {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(types)) {
		_, _ = fmt.Fprintf(h, "%s=%s;", name, types[name]) // a hash takes everything
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// ShardDigest is the digest of the documents of one shard. It is equal to that of the database's rows if each document is whole and was made of the row
// in its present version by the present declaration.
type ShardDigest = postgres.ShardDigest

// RangeDigest is the digest of the documents with names in a range.
type RangeDigest = postgres.RangeDigest

// RowHash is a document as a look at it found it. Its Hash is that which the database has for the row (postgres.Store.SearchHashes) if the document is whole and of the present declaration, and another one
// otherwise, which says what it is instead; its Version is Damaged if the declaration is another one. Owner and Change are not known.
type RowHash = postgres.RowHash

// NameVersion is a name at a version.
type NameVersion = postgres.NameVersion

// Damaged is listed as the version of a document that must be written again: it is not what was written, or was made by another declaration. It is
// older than any version.
var Damaged = store.Version{Epoch: -1}

// Batch are changes that belong together.
type Batch struct {
	// Upserts are written unless the store holds a newer version.
	Upserts []Document
	// Deletions are made unless the store holds a newer version than the one given. A name is not among the Upserts.
	Deletions []NameVersion
	// Force writes and deletes whatever the store holds. For what has been read from the database while nothing else was applied.
	Force bool
	// Cursor, unless zero, is saved: everything up to it is in the store with this batch.
	Cursor feed.Cursor
}

// ErrLost means that the store is not in the state in which the holder of a lease left it: it has been emptied or rolled back, or somebody else has
// taken the shards. The holder begins again.
var ErrLost = errors.New("the search store has been emptied or rolled back, or its shards are written by somebody else")

// Store is a search store. It is safe for concurrent use. Its errors are ErrLost, errors of package store for users, and for everything that may pass
// Unavailable.
type Store interface {
	// Begin makes the caller the writer of the shards, and returns the cursor up to which they are complete: the zero Cursor if that is unknown, or if they
	// were filled under another schema. Whoever wrote any of the shards before gets ErrLost.
	Begin(ctx context.Context, shards feed.Range, schema string) (*Lease, feed.Cursor, error)
	// Apply writes a batch of documents of the lease's shards. After an error a part of it may be written, but not its cursor; the lease is void.
	Apply(ctx context.Context, l *Lease, b Batch) error
	// Check returns ErrLost if the store is not as the lease left it.
	Check(ctx context.Context, l *Lease) error
	// Digests returns the digests of the documents, ordered by shard. Shards without a document are left out.
	Digests(ctx context.Context, shards feed.Range, types Types) ([]ShardDigest, error)
	// Versions calls emit, ordered by name, for each document of the shards whose name is behind after, of whatever type.
	Versions(ctx context.Context, shards []int32, types Types, after string, emit func(name string, v store.Version) error) error
	// Ranges returns the count and the xor of the hashes of the documents in ranges of names, the first of which begins behind after. only narrows down to some types;
	// without it, the documents of whatever type count.
	Ranges(ctx context.Context, types Types, only []string, after string, to []string) ([]RangeDigest, error)
	// Hashes calls emit, ordered by name, for each document with a name in (after, to].
	Hashes(ctx context.Context, types Types, only []string, after, to string, emit func(RowHash) error) error
	// Look returns the documents of these names, ordered by name, of whatever type. A name that has none is left out.
	Look(ctx context.Context, types Types, names []string) ([]RowHash, error)
	// Mend writes docs and deletes the documents of ghosts without a lease, each only if the store still has what was seen of the name; nothing must be there of a name that is not in seen.
	Mend(ctx context.Context, types Types, docs []Document, ghosts []string, seen []RowHash) error
	// Filled returns how far the ranges that overlap shards are complete.
	Filled(ctx context.Context, shards feed.Range) ([]Filled, error)
	// Search returns one page.
	Search(ctx context.Context, q Query) (*Result, error)
	Ping(ctx context.Context) error
	Close()
}

// Unavailable is the error for a store that cannot do now what it was asked.
func Unavailable(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	var known *store.Error
	if errors.As(err, &known) || errors.Is(err, ErrLost) {
		return err
	}
	return &store.Error{Code: store.Unavailable, Reason: "the search store cannot " + fmt.Sprintf(format, args...) + " now: try again later", Cause: err}
}
