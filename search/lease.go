package search

import (
	"crypto/rand"

	"github.com/dbcontroller/db-controller/store/feed"
)

// Lease is the right to write some shards. The store keeps Holder and Seq; every Apply counts Seq up on both sides, so a store that has lost or undone
// a batch cannot be taken for a good one. It is for one goroutine at a time.
type Lease struct {
	Shards feed.Range
	// Schema under which the shards are filled.
	Schema string
	Holder string
	Seq    int64
}

// NewLease returns the first lease of a new holder.
func NewLease(shards feed.Range, schema string) *Lease {
	return &Lease{Shards: shards, Schema: schema, Holder: rand.Text()}
}

// Filled says up to where a range is complete.
type Filled struct {
	Shards feed.Range
	// Schema under which it was filled.
	Schema string
	// Cursor is a token; empty when the range is not complete.
	Cursor string
}

// Carve takes shards out of what is filled: it returns the cursor that is good for all of them, empty without one, and what is left of the entries that
// overlap them. Those entries are to be replaced.
func Carve(filled []Filled, shards feed.Range, schema string) (cursor string, left []Filled) {
	for _, f := range filled {
		if f.Shards.To <= shards.From || shards.To <= f.Shards.From {
			continue
		}
		if f.Schema == schema && f.Shards.From <= shards.From && shards.To <= f.Shards.To {
			cursor = f.Cursor
		}
		for _, rest := range []feed.Range{{From: f.Shards.From, To: shards.From}, {From: shards.To, To: f.Shards.To}} {
			if rest.From < rest.To {
				left = append(left, Filled{rest, f.Schema, f.Cursor})
			}
		}
	}
	return cursor, left
}
