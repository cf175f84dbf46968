package store

import "time"

// Closure is what a deletion would take along in this database, and who may object (spec 4.3).
type Closure struct {
	// Epoch of the feed before anything of the plan was read. Who may refer to the resources (Suspects) is asked after it.
	Epoch int64
	// Delete are the roots, then what cascades synchronously, in the order of names.
	Delete []Doomed
	// Unset are the fields that are cleared in the same transaction.
	Unset []Incoming
	// Blockers are local: blocking references from outside of the closure (at most 100), tentative blockades, and block_deletion.
	Blockers []Blocker
	// Async are local referrers that would be handled afterwards, at most the limit asked for. Only a plan needs them.
	Async []Incoming
	// Truncated: there is more than the limit allows.
	Truncated bool
}

// Doomed is a resource that a deletion takes along.
type Doomed struct {
	Name, Type, UUID string
	Version          Version
	// RowVersion is odd while somebody's attempt to delete it is under way.
	RowVersion int64
	// Via is the reference through which it is reached; zero for a root.
	Via Incoming
	// Depth is 0 for a root.
	Depth   int
	Sources []Source
}

// Incoming is a reference seen from its target.
type Incoming struct {
	Referrer, Type, Field, Target string
	Kind                          ReferenceKind
	Behavior                      Behavior
	// Version of the referrer.
	Version Version
}

// Blocker is why a deletion is refused.
type Blocker struct {
	Target string
	// Location is zero for a local referrer.
	Location Location
	// Referrer is empty for block_deletion, and when only the location is known.
	Referrer, Field string
	// TentativeUntil is set for a blockade whose transaction is not known to have ended.
	TentativeUntil time.Time
	// BlockDeletion: the service itself blocks the deletion.
	BlockDeletion bool
}
