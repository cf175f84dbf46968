package verify

import (
	"context"
	"errors"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// SearchPeer stands for the search store of the own region where a peer is named. No region can have this name.
const SearchPeer = "@search"

// Rows is the database as the Truth of a search store: all its live rows of the types that are searched, owned and copied ones alike.
type Rows struct {
	Store RowStore
	// Searched are the types that are searched.
	Searched search.Types
}

// RowStore is the database that a search store follows: postgres.Store.
type RowStore interface {
	SearchRanges(ctx context.Context, types postgres.SearchTypes, only []string, after string, size, parts int) (postgres.Ranges, error)
	SearchHashes(ctx context.Context, types postgres.SearchTypes, only []string, after, to string, emit func(postgres.RowHash) error) error
	LookSearched(ctx context.Context, types postgres.SearchTypes, names []string) ([]postgres.RowHash, int64, error)
}

// Ranges digests rows.
func (r *Rows) Ranges(ctx context.Context, types []string, after string, size, parts int) (postgres.Ranges, error) {
	return r.Store.SearchRanges(ctx, r.Searched, types, after, size, parts)
}

// Hashes lists rows.
func (r *Rows) Hashes(ctx context.Context, types []string, after, to string) iter.Seq2[postgres.RowHash, error] {
	return hashes(func(emit func(postgres.RowHash) error) error {
		return r.Store.SearchHashes(ctx, r.Searched, types, after, to, emit)
	})
}

// Look returns what is known of names.
func (r *Rows) Look(ctx context.Context, names []string) ([]postgres.RowHash, int64, error) {
	all, epoch, err := r.Store.LookSearched(ctx, r.Searched, names)
	for i := range all {
		all[i].Owner = "" // a search store does not say whose rows it holds
	}
	return all, epoch, err
}

// Documents is the Mirror of a search store. A document tells by a sum of itself whether it is what was written, and by its version of which state of the row it was made.
type Documents struct {
	Index Index
	// Searched are the types that are searched; Ring is the number of shards of the service.
	Searched search.Types
	Ring     int
	// Project reads the rows of names that are live and searched, and makes their documents.
	Project func(ctx context.Context, names []string) ([]search.Document, error)
}

// Index is the search store: search.Store.
type Index interface {
	Ranges(ctx context.Context, types search.Types, only []string, after string, to []string) ([]search.RangeDigest, error)
	Hashes(ctx context.Context, types search.Types, only []string, after, to string, emit func(search.RowHash) error) error
	Look(ctx context.Context, types search.Types, names []string) ([]search.RowHash, error)
	Mend(ctx context.Context, types search.Types, docs []search.Document, ghosts []string, seen []search.RowHash) error
	Filled(ctx context.Context, shards feed.Range) ([]search.Filled, error)
}

// Ranges digests documents.
func (d *Documents) Ranges(ctx context.Context, types []string, after string, to []string) ([]postgres.RangeDigest, error) {
	digests, err := d.Index.Ranges(ctx, d.Searched, types, after, to)
	return digests, lost(err)
}

// Hashes lists documents.
func (d *Documents) Hashes(ctx context.Context, types []string, after, to string) iter.Seq2[postgres.RowHash, error] {
	return hashes(func(emit func(postgres.RowHash) error) error {
		return lost(d.Index.Hashes(ctx, d.Searched, types, after, to, emit))
	})
}

// Look returns the documents of names.
func (d *Documents) Look(ctx context.Context, names []string) ([]postgres.RowHash, error) {
	all, err := d.Index.Look(ctx, d.Searched, names)
	return all, lost(err)
}

// Reached answers from the cursors in the store: what all of them see has been applied. A range that is being filled, or that was filled under other declarations, has received nothing.
func (d *Documents) Reached(ctx context.Context, epoch int64) (func(uint64) bool, error) {
	cursors, complete, err := d.cursors(ctx)
	if err != nil {
		return nil, err
	}
	complete = complete && !slices.ContainsFunc(cursors, func(c feed.Cursor) bool { return c.Epoch != epoch })
	return func(change uint64) bool {
		return complete && !slices.ContainsFunc(cursors, func(c feed.Cursor) bool { return !c.Snapshot.Sees(change) })
	}, nil
}

// Complete says whether the whole store is filled, under the present declarations. Before, there is nothing to verify.
func (d *Documents) Complete(ctx context.Context) bool {
	_, complete, err := d.cursors(ctx)
	return err == nil && complete
}

// cursors are those of all ranges.
func (d *Documents) cursors(ctx context.Context) (cursors []feed.Cursor, complete bool, err error) {
	filled, err := d.Index.Filled(ctx, feed.Range{To: int32(d.Ring)})
	if err != nil {
		return nil, false, lost(err)
	}
	shards := int32(0)
	for _, f := range filled {
		c, err := feed.ParseToken(f.Cursor)
		if err == nil && !c.IsZero() && f.Schema == search.SchemaOf(d.Searched) {
			cursors = append(cursors, c)
			shards += f.Shards.To - f.Shards.From
		}
	}
	return cursors, int(shards) == d.Ring, nil
}

// Resident are documents of one type that a search store holds, and how many of them have no row.
type Resident struct {
	Type                  string
	Documents, WithoutRow int64
	// First is the first name of all, Example of those without a row.
	First, Example string
}

// Residents counts what the search store holds, by type. A document whose row has just gone counts as one without a row only if it is still there after grace.
func (d *Documents) Residents(ctx context.Context, rows *Rows, grace time.Duration) ([]Resident, error) {
	byType := map[string]*Resident{}
	var suspects, batch []postgres.RowHash
	look := func() error {
		without, err := withoutRow(ctx, rows, batch)
		suspects = append(suspects, without...)
		batch = batch[:0]
		return err
	}
	for r, err := range d.Hashes(ctx, nil, "", postgres.LastName) {
		if err != nil {
			return nil, err
		}
		of := byType[r.Type]
		if of == nil {
			of = &Resident{Type: r.Type, First: r.Name}
			byType[r.Type] = of
		}
		of.Documents++
		if batch = append(batch, r); len(batch) == lookBatch {
			if err := look(); err != nil {
				return nil, err
			}
		}
	}
	if err := look(); err != nil {
		return nil, err
	}
	if len(suspects) > 0 {
		if err := sleep(ctx, grace); err != nil {
			return nil, err
		}
	}
	for part := range slices.Chunk(suspects, lookBatch) {
		names := make([]string, len(part))
		for i, r := range part {
			names[i] = r.Name
		}
		still, err := d.Look(ctx, names)
		if err != nil {
			return nil, err
		}
		without, err := withoutRow(ctx, rows, still)
		if err != nil {
			return nil, err
		}
		for _, r := range without {
			of := byType[r.Type]
			if of == nil {
				of = &Resident{Type: r.Type}
				byType[r.Type] = of
			}
			if of.WithoutRow++; of.Example == "" {
				of.Example = r.Name
			}
		}
	}
	all := make([]Resident, 0, len(byType))
	for _, t := range slices.Sorted(maps.Keys(byType)) {
		all = append(all, *byType[t])
	}
	return all, nil
}

// withoutRow returns those documents of which the database has no live row.
func withoutRow(ctx context.Context, rows *Rows, docs []postgres.RowHash) (without []postgres.RowHash, err error) {
	names := make([]string, len(docs))
	for i, r := range docs {
		names[i] = r.Name
	}
	held, _, err := rows.Look(ctx, names)
	if err != nil {
		return nil, err
	}
	has := map[string]bool{}
	for _, r := range held {
		has[r.Name] = r.Held
	}
	for _, r := range docs {
		if !has[r.Name] {
			without = append(without, r)
		}
	}
	return without, nil
}

// Action says how a document is repaired.
func (d *Documents) Action(x Difference) (string, bool) {
	if x.Kind == Extra {
		return "delete the document", true
	}
	return "write the document anew from its row", true
}

// Repair makes documents of the rows as they are now, and writes them over what was seen. Documents without a row are deleted.
func (d *Documents) Repair(ctx context.Context, _ int64, differences []Difference) (left []Difference, err error) {
	names := make([]string, len(differences))
	seen := make([]postgres.RowHash, 0, len(differences))
	for i, x := range differences {
		names[i] = x.Name
		if x.seen.Name != "" {
			seen = append(seen, x.seen)
		}
	}
	docs, err := d.Project(ctx, names)
	if err != nil {
		return nil, err
	}
	live := map[string]bool{}
	for _, doc := range docs {
		live[doc.Name] = true
	}
	var ghosts []string
	for _, name := range names {
		if !live[name] {
			ghosts = append(ghosts, name)
		}
	}
	return nil, lost(d.Index.Mend(ctx, d.Searched, docs, ghosts, seen))
}

// lost makes an error for users of a store that is being made anew.
func lost(err error) error {
	if errors.Is(err, search.ErrLost) {
		return &store.Error{Code: store.Unavailable, Reason: "the search store is empty or is being rebuilt: try again when it is filled", Cause: err}
	}
	return err
}

// hashes makes a sequence of a list that is read by a callback.
func hashes(list func(emit func(postgres.RowHash) error) error) iter.Seq2[postgres.RowHash, error] {
	return func(yield func(postgres.RowHash, error) bool) {
		left := errors.New("left") // tells the reader's end from an error of the list
		err := list(func(r postgres.RowHash) error {
			if !yield(r, nil) {
				return left
			}
			return nil
		})
		if err != nil && !errors.Is(err, left) {
			yield(postgres.RowHash{}, err)
		}
	}
}
