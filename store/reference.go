package store

import (
	"fmt"
	"strings"
	"time"
)

// Location is a Deployment as references and their targets know each other: one service in one region. The zero Location is this Deployment.
type Location struct{ Service, Region string }

// String returns "service/region", and "" for this Deployment.
func (l Location) String() string {
	if l == (Location{}) {
		return ""
	}
	return l.Service + "/" + l.Region
}

// ParseLocation reads what String wrote.
func ParseLocation(s string) (Location, error) {
	if s == "" {
		return Location{}, nil
	}
	service, region, ok := strings.Cut(s, "/")
	if !ok || service == "" || region == "" {
		return Location{}, fmt.Errorf("%q is not a location: want service/region", s)
	}
	return Location{service, region}, nil
}

// ReferenceKind says where a reference is written.
type ReferenceKind int16

// The kinds: a field of the body that the schema names, the parent in the name, an owner in the metadata.
const (
	SchemaReference ReferenceKind = 0
	ParentReference ReferenceKind = 1
	OwnerRef        ReferenceKind = 2
)

// String returns the word for k.
func (k ReferenceKind) String() string { return [...]string{"schema", "parent", "owner"}[k] }

// Behavior says what becomes of a referrer whose target is deleted. It is part of the stored format.
type Behavior int16

// The behaviors (spec 2.6). Owner references have none.
const (
	NoBehavior    Behavior = 0
	Block         Behavior = 1
	Unset         Behavior = 2
	Cascade       Behavior = 3
	AsyncUnset    Behavior = 4
	AsyncCascade  Behavior = 5
	AllowDangling Behavior = 6
)

// String returns the name of b in a ServiceDescriptor.
func (b Behavior) String() string {
	return [...]string{"", "Block", "Unset", "CascadeDelete", "AsyncUnset", "AsyncCascadeDelete", "AllowDangling"}[b]
}

// Handled reports whether a referrer in the same database (local) or in another is changed after the deletion, by the subscribed-deleting handler, rather
// than in its transaction.
func (b Behavior) Handled(local bool) bool {
	return b == AsyncUnset || b == AsyncCascade || !local && (b == Unset || b == Cascade)
}

// Unsets reports whether the reference is cleared; otherwise, if Handled, the referrer is deleted.
func (b Behavior) Unsets() bool { return b == Unset || b == AsyncUnset }

// Reference is one outgoing reference of a resource. (Field, At, Target) is unique in a resource.
type Reference struct {
	// Field is the path in the body with [] for lists: depends[]; "name" for the parent; "metadata.ownerReferences" for an owner.
	Field    string
	Kind     ReferenceKind
	Behavior Behavior
	// At is the Deployment that owns the target; the zero Location is this one. An owner is always at a Deployment by name, be it this one.
	At Location
	// Target is the name as this service spells it: in its own version, or in the version that it imports.
	Target string
	// Grant is the target's permission. Only a new reference to another Deployment has one.
	Grant *Grant
}

// Grant is the permission to commit a reference to a resource of another Deployment (spec 3.1).
type Grant struct {
	// TxID is the UUID of the transaction.
	TxID string
	// UUID, Epoch and RowVersion are the target's. A fence for the same UUID at a later (Epoch, RowVersion) voids the grant.
	UUID              string
	Epoch, RowVersion int64
	// Home is where our database stood before the grant was asked for.
	Home Mark
}

// Mark is a moment in the history of one database that grants and fences share. A grant from another epoch, or from before fences that have been purged,
// is void.
type Mark struct{ Epoch, Fence int64 }

// Constraint is what the constraint layer knows about a write. The core checks it under locks in the write's own transaction.
type Constraint struct {
	// References are all outgoing references of the resource after the write. A Delete has none.
	References []Reference
	// AsyncDeletion: a Delete leaves the resource readable in state Deleting.
	AsyncDeletion bool
	// Closure: this Delete or Save is a consequence of another Delete in the transaction. A referrer that is gone already is no error.
	Closure bool
	// Asked are the other Deployments that have said that nothing of theirs blocks this Delete; Attempt is what BeginAttempt returned for the
	// resource, 0 if nobody was asked.
	Asked   []Location
	Attempt int64
	// UUID is the incarnation for which this Delete was planned, and Epoch the epoch of this database's feed from before the plan was made (Closure.Epoch); empty and 0 are not
	// checked. All deletes of a batch have the same epoch.
	UUID  string
	Epoch int64
	// Tell keeps the shadow of this Delete until every Deployment that may refer to it has been asked, because after a failover it is not known who does.
	Tell bool
}

// ShadowState is the place of a shadow in its life (spec 2.3). Active with tasks is what users see as PENDING.
type ShadowState int16

// The states. No shadow: a read copy, a type that opts out, or a deletion that is complete.
const (
	NoShadow       ShadowState = 0
	ShadowActive   ShadowState = 1
	ShadowDeleting ShadowState = 2
)

// Tasks is a set of what the owned-pending handler has to do for a resource. It is part of the stored format.
type Tasks int16

// The tasks.
const (
	// ConfirmBlockades: new references to other Deployments are committed and not confirmed there.
	ConfirmBlockades Tasks = 1 << iota
	// CheckOwners: owner references are new or changed.
	CheckOwners
	// CheckOwnees: a schema reference was dropped, or the API version changed, and ownees may depend on it.
	CheckOwnees
	// PendingDelete: the resource must be deleted, and something blocked it.
	PendingDelete
)

// Strings returns the names of the tasks in t.
func (t Tasks) Strings() (names []string) {
	for i, n := range [...]string{"CONFIRM_BLOCKADES", "CHECK_META_OWNERS", "CHECK_META_OWNEES", "DELETE"} {
		if t&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return names
}

// Source is a Deployment that holds, or held, references to a resource. Sources are supersets: they are pruned only after a check (spec 2.7).
type Source struct {
	Location Location
	// Blocking, Subscriber and Ownee say which kinds of references: to be asked before a deletion, to be told of it, to be relieved of their owner.
	Blocking, Subscriber, Ownee bool
}

// Blockade is a referrer whose transaction is not known to have ended. Until ExpireTime it blocks the deletion of Name; afterwards its location is asked.
type Blockade struct {
	Name       string
	Location   Location
	Referrer   string
	TxID       string
	Attempt    int
	ExpireTime time.Time
}

// Shadow is what the engine knows about the references of one owned resource: a projection of its row and of the reference tables.
type Shadow struct {
	Name, Type, UUID string
	// Epoch of the feed when the shadow was read.
	Epoch int64
	State ShadowState
	// ResourceState is the state of the resource itself.
	ResourceState State
	Tasks         Tasks
	// TaskTime is when the oldest pending task was raised; zero without one.
	TaskTime      time.Time
	DeleteTime    time.Time
	RowVersion    int64
	BlockDeletion bool
	References    []Reference
	// Unconfirmed are the references, by index, whose grant has not been confirmed.
	Unconfirmed map[int]bool
	Sources     []Source
	Blockades   []Blockade
	// LastError and NextRetry of its pending work, if something failed.
	LastError string
	NextRetry time.Time
}
