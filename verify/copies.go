package verify

import (
	"context"
	"fmt"
	"iter"

	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
	"github.com/dbcontroller/db-controller/syncing"
)

// Copies is the Mirror of read copies: what one region holds of another's rows. The owner's Truth is a syncing.ContentSource.
type Copies struct {
	// Store is the database with the copies.
	Store CopyStore
	// Service, Region and Ring are those of the copies' own Deployment; Peer is the region whose rows were copied.
	Service, Region, Peer string
	Ring                  int
	// Fetch yields the rows of names from Peer, as syncing.Source does.
	Fetch func(ctx context.Context, names []string) iter.Seq2[syncing.Chunk, error]
	// Claims returns those of names that a third region says it owns, for copies that were attributed to it. Nil: such copies are left as they are.
	Claims func(ctx context.Context, region string, names []string) (map[string]bool, error)
}

// CopyStore is the database with the copies: postgres.Store.
type CopyStore interface {
	CopyRanges(ctx context.Context, owner string, types []string, after string, to []string) ([]postgres.RangeDigest, error)
	CopyHashes(ctx context.Context, owner string, types []string, after, to string, emit func(postgres.RowHash) error) error
	LookCopies(ctx context.Context, owner string, names []string) ([]postgres.RowHash, error)
	LoadCursor(ctx context.Context, service, region string, shards feed.Range) (feed.Cursor, error)
	Overwrite(ctx context.Context, b postgres.Batch, seen []postgres.RowHash) (int, error)
	DeleteExtras(ctx context.Context, p postgres.Peer, extras []postgres.NameVersion) (int, error)
}

// Ranges digests copies.
func (c *Copies) Ranges(ctx context.Context, types []string, after string, to []string) ([]postgres.RangeDigest, error) {
	return c.Store.CopyRanges(ctx, c.Peer, types, after, to)
}

// Hashes lists copies.
func (c *Copies) Hashes(ctx context.Context, types []string, after, to string) iter.Seq2[postgres.RowHash, error] {
	return hashes(func(emit func(postgres.RowHash) error) error {
		return c.Store.CopyHashes(ctx, c.Peer, types, after, to, emit)
	})
}

// Look returns what is held here of names.
func (c *Copies) Look(ctx context.Context, names []string) ([]postgres.RowHash, error) {
	return c.Store.LookCopies(ctx, c.Peer, names)
}

// Reached answers from the stored cursor: what it sees has been applied.
func (c *Copies) Reached(ctx context.Context, epoch int64) (func(uint64) bool, error) {
	cursor, err := c.Store.LoadCursor(ctx, c.Service, c.Peer, c.ring())
	if err != nil {
		return nil, err
	}
	return func(change uint64) bool { return cursor.Epoch == epoch && cursor.Snapshot.Sees(change) }, nil
}

func (c *Copies) ring() feed.Range { return feed.Range{From: 0, To: int32(c.Ring)} }

// Action says how a copy is repaired.
func (c *Copies) Action(d Difference) (string, bool) {
	switch {
	case d.seen.Owner == c.Region:
		return fmt.Sprintf("left: region %s owns the row here; two owners of one name are no matter of copies", c.Region), false
	case d.Kind == Extra:
		return "delete the copy", true
	case d.Kind == Owner:
		return fmt.Sprintf("write the row of %s over that of %s, unless %s says that it owns it", c.Peer, d.seen.Owner, d.seen.Owner), true
	}
	return "write the owner's row over the copy", true
}

// Repair fetches the rows from their owner and writes them over what was seen here. What the owner does not know is deleted at the version that was seen.
func (c *Copies) Repair(ctx context.Context, epoch int64, differences []Difference) (left []Difference, err error) {
	wanted, left, err := c.undisputed(ctx, differences)
	if err != nil || len(wanted) == 0 {
		return left, err
	}
	names := make([]string, len(wanted))
	seen := make([]postgres.RowHash, 0, len(wanted))
	extras := map[string]postgres.NameVersion{}
	for i, d := range wanted {
		names[i] = d.Name
		if d.seen.Name == "" {
			continue // nothing was held, not even a tombstone
		}
		seen = append(seen, d.seen)
		if d.seen.Held {
			extras[d.Name] = postgres.NameVersion{Name: d.Name, Version: d.seen.Version}
		}
	}
	owner := postgres.Peer{Service: c.Service, Region: c.Peer, Epoch: epoch}
	for chunk, err := range c.Fetch(ctx, names) {
		if err != nil {
			return left, fmt.Errorf("fetch rows of %s: %w", c.Peer, err)
		}
		if err := row.Walk(chunk.Rows, func(t *row.Tuple) error { delete(extras, t.Name()); return nil }); err != nil {
			return left, fmt.Errorf("fetch rows of %s: %w", c.Peer, err)
		}
		if _, err := c.Store.Overwrite(ctx, postgres.Batch{Peer: owner, Tuples: chunk.Rows, Rows: chunk.Count, Shards: c.ring()}, seen); err != nil {
			return left, err
		}
	}
	if len(extras) == 0 {
		return left, nil
	}
	unknown := make([]postgres.NameVersion, 0, len(extras))
	for _, e := range extras {
		unknown = append(unknown, e)
	}
	_, err = c.Store.DeleteExtras(ctx, owner, unknown)
	return left, err
}

// undisputed takes out what a third region says it owns, or could not be asked about.
func (c *Copies) undisputed(ctx context.Context, differences []Difference) (wanted, left []Difference, err error) {
	byOwner := map[string][]string{}
	for _, d := range differences {
		if d.seen.Owner != "" && d.seen.Owner != c.Peer {
			byOwner[d.seen.Owner] = append(byOwner[d.seen.Owner], d.Name)
		}
	}
	reason := map[string]string{}
	for region, names := range byOwner {
		if c.Claims == nil {
			for _, n := range names {
				reason[n] = fmt.Sprintf("left: the row here names %s as its owner", region)
			}
			continue
		}
		claimed, err := c.Claims(ctx, region, names)
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		for _, n := range names {
			switch {
			case err != nil:
				reason[n] = fmt.Sprintf("left: %s, which the row here names as its owner, cannot be asked: %v", region, err)
			case claimed[n]:
				reason[n] = fmt.Sprintf("left: both %s and %s say that they own it", c.Peer, region)
			}
		}
	}
	for _, d := range differences {
		if why, disputed := reason[d.Name]; disputed {
			d.Action = why
			left = append(left, d)
		} else {
			wanted = append(wanted, d)
		}
	}
	return wanted, left, nil
}

// ClaimsOf returns a Claims that asks the regions themselves. Each source is closed after its answer.
func ClaimsOf(dial func(region string) (syncing.ContentSource, error)) func(ctx context.Context, region string, names []string) (map[string]bool, error) {
	return func(ctx context.Context, region string, names []string) (map[string]bool, error) {
		source, err := dial(region)
		if err != nil {
			return nil, err
		}
		defer source.Close()
		rows, _, err := source.Look(ctx, names)
		claimed := map[string]bool{}
		for _, r := range rows {
			claimed[r.Name] = r.Owner == region
		}
		return claimed, err
	}
}
