package syncing

import (
	"context"
	"fmt"
	"iter"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/row"
)

// chunk is a number of fetched rows.
type chunk interface {
	// rows says how many there are, each calls visit for each of them.
	rows() int
	each(visit func(name string, v store.Version)) error
}

func (c Chunk) rows() int { return c.Count }

func (c Chunk) each(visit func(name string, v store.Version)) error {
	return row.Walk(c.Rows, func(t *row.Tuple) error {
		visit(t.Name(), t.Version())
		return nil
	})
}

// destination is where a baseSyncer puts what it fetches.
type destination[C chunk] interface {
	// put writes the rows of c, unless the destination already holds newer ones. Rows that can never be written are put aside, and are no error.
	put(ctx context.Context, c C) error
	// drop removes rows, each only if it is still at the version given.
	drop(ctx context.Context, extras []NameVersion) error
}

// baseSyncer makes a destination equal to its source for the names that a VersionSet says differ. The set learns of a row only after the
// destination has acknowledged it, so after an error a repetition does what is left.
type baseSyncer[C chunk] struct {
	set   *VersionSet
	fetch func(ctx context.Context, names []string) iter.Seq2[C, error]
	dest  destination[C]
}

// putMissing fetches and puts what the destination lacks or has too old.
func (b *baseSyncer[C]) putMissing(ctx context.Context) error {
	for {
		batch := b.set.CollectMatching("", Difference.missing, fetchBatch)
		if len(batch) == 0 {
			return nil
		}
		if err := b.bring(ctx, batch); err != nil {
			return err
		}
		for _, d := range batch {
			// What was not sent is not there any more. If the destination has it, it is now an extra; if not, all is well.
			b.set.DelSource(d.Name)
		}
	}
}

// dropExtras removes what the destination has too much. The source is asked again for each name first: a list that lacks a name may be older
// than the row.
func (b *baseSyncer[C]) dropExtras(ctx context.Context) error {
	for {
		batch := b.set.CollectMatching("", func(d Difference) bool { return !d.missing() }, fetchBatch)
		if len(batch) == 0 {
			return nil
		}
		if err := b.bring(ctx, batch); err != nil {
			return err
		}
		// What was sent is equal now and has left the set.
		extras := b.still(batch)
		if err := b.dest.drop(ctx, extras); err != nil {
			return fmt.Errorf("delete %d rows that their owner does not have: %w", len(extras), err)
		}
		for _, e := range extras {
			b.set.DelSynced(e.Name)
		}
	}
}

// bring fetches the names and puts what is sent.
func (b *baseSyncer[C]) bring(ctx context.Context, batch []Difference) error {
	names := make([]string, len(batch))
	for i, d := range batch {
		names[i] = d.Name
	}
	for c, err := range b.fetch(ctx, names) {
		if err != nil {
			return err
		}
		if err := b.dest.put(ctx, c); err != nil {
			return fmt.Errorf("put %d fetched rows: %w", c.rows(), err)
		}
		if err := c.each(b.set.settle); err != nil {
			return err
		}
	}
	return nil
}

// still returns those of batch that are extras after the source was asked.
func (b *baseSyncer[C]) still(batch []Difference) []NameVersion {
	var extras []NameVersion
	for _, d := range batch {
		if now, ok := b.set.get(d.Name); ok && !now.missing() {
			extras = append(extras, NameVersion{d.Name, now.Synced})
		}
	}
	return extras
}
