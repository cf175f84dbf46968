// Package store holds the resources of one Deployment: what a resource is, how it is read and written, and which errors that can give.
//
// A Store is a stack of layers. The core (store/postgres) keeps one row per name for the name's whole life; the layers above decide, each
// in one place, what else must hold: store/region puts the owning region and the regions with copies into each write. Every layer is
// a Store, so callers cannot tell how many there are.
//
// Three things always hold:
//
//   - a transaction of writes is applied whole or not at all
//   - a write that would change nothing changes nothing, neither the version nor the change feed
//   - the version of a name never goes down while the feed epoch stays, not even when the name is deleted and born again
package store

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// EveryRegion in Resource.Regions stands for all regions, present and future.
const EveryRegion = "*"

// State is the place of a name in its life.
type State int16

// The states of a name. A GONE row is a tombstone: it has no body and is seen by no reader.
const (
	Active   State = 0
	Deleting State = 1
	Gone     State = 2
)

// String returns the name that users see.
func (s State) String() string {
	switch s {
	case Active:
		return "ACTIVE"
	case Deleting:
		return "DELETING"
	case Gone:
		return "GONE"
	}
	return fmt.Sprintf("State(%d)", int16(s))
}

// Version orders the states of one name: first by epoch, then by number. Only the owning region assigns versions.
type Version struct {
	// Epoch is the feed epoch of the owner's database at the write.
	Epoch int64
	// Number is what users see as metadata.resourceVersion; 0 is no version at all.
	Number int64
}

// Compare returns -1, 0 or 1 as v is older than, equal to, or newer than o.
func (v Version) Compare(o Version) int {
	switch {
	case v.Epoch != o.Epoch && v.Epoch < o.Epoch, v.Epoch == o.Epoch && v.Number < o.Number:
		return -1
	case v == o:
		return 0
	}
	return 1
}

// ETag is the opaque form of v for users.
func (v Version) ETag() string {
	return strconv.FormatInt(v.Epoch, 36) + "." + strconv.FormatInt(v.Number, 36)
}

// ParseETag reads what ETag wrote.
func ParseETag(s string) (Version, error) {
	e, n, ok := strings.Cut(s, ".")
	if ok {
		epoch, err1 := strconv.ParseInt(e, 36, 64)
		number, err2 := strconv.ParseInt(n, 36, 64)
		if err1 == nil && err2 == nil && epoch >= 0 && number > 0 {
			return Version{epoch, number}, nil
		}
	}
	return Version{}, Invalid("etag", "is not an etag of this service: send back the one of a Get, List or write")
}

// OwnerReference names a resource whose disappearance removes the one that carries it (spec 2.4).
type OwnerReference struct {
	Kind                   string `json:"kind"`
	Version                string `json:"version"`
	Name                   string `json:"name"`
	Region                 string `json:"region"`
	Controller             bool   `json:"controller,omitempty"`
	RequiresOwnerReference bool   `json:"requiresOwnerReference,omitempty"`
	UnsetOnDelete          bool   `json:"unsetOnDelete,omitempty"`
}

// Meta is the part of the metadata that users write.
type Meta struct {
	Labels          map[string]string `json:"labels,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
	Tags            []string          `json:"tags,omitempty"`
	OwnerReferences []OwnerReference  `json:"ownerReferences,omitempty"`
}

// Resource is one row: an owned resource or a read copy.
type Resource struct {
	Name string
	// Type is the short type name, for example Package.
	Type string
	// UUID identifies this incarnation of the name.
	UUID    string
	Version Version
	// Generation rises when the body changes.
	Generation   int64
	Shard        int32
	OwningRegion string
	// Regions that hold the resource, sorted; EveryRegion alone is all of them.
	Regions       []string
	State         State
	BlockDeletion bool
	CreateTime    time.Time
	UpdateTime    time.Time
	// DeleteTime is zero while the state is Active.
	DeleteTime time.Time
	Meta       Meta
	// Body is a JSON object without name and metadata; nil for a tombstone.
	Body json.RawMessage
}

// Op is what a Write does.
type Op uint8

// Create fails with AlreadyExists, Update with NotFound; Save does either.
const (
	Create Op = iota + 1
	Update
	Save
	Delete
)

// String returns the lower-case word for o.
func (o Op) String() string {
	if o < Create || o > Delete {
		return fmt.Sprintf("Op(%d)", uint8(o))
	}
	return [...]string{"create", "update", "save", "delete"}[o-1]
}

// Write is one intended change of one name. Name, Type, Meta and Body come from the caller; everything else in a Resource is the Store's.
type Write struct {
	Op   Op
	Name string
	Type string
	Meta Meta
	Body json.RawMessage
	// Mask limits an Update or a Save of an existing resource to these fields (paths as in the API: body fields as they are, and
	// metadata.labels, metadata.annotations, metadata.tags, metadata.ownerReferences). Empty or "*" replaces everything.
	Mask []string
	// IfVersion, unless zero, fails the write with Aborted when the stored version is another.
	IfVersion Version
	// AllowMissing lets a Delete of a missing name succeed.
	AllowMissing bool

	// OwningRegion and Regions become metadata.syncing. The region layer fills them; users cannot.
	OwningRegion string
	Regions      []string
	// BlockDeletion, unless nil, sets the flag with which a service holds up the deletion of a resource. Users cannot.
	BlockDeletion *bool
	// Constraint is filled by the constraint layer. Nil: the resource's references are not checked, and it has no shadow.
	Constraint *Constraint
}

// Result is what became of one Write.
type Result struct {
	// Resource as it is now; after a Delete its tombstone (nil if the name was missing and that was allowed).
	Resource *Resource
	// Changed is false when the write would have changed nothing, so that nothing was written.
	Changed bool
}

// Query selects resources of one type.
type Query struct {
	// Type is required.
	Type string
	// Prefix of the names, as a parent with its slash and the collection: sections/admin/packages/. Empty: all of the type.
	Prefix string
	// Filter is an AIP-160 expression over name, labels, metadata and body fields; empty matches all.
	Filter string
	// OrderBy is an AIP-132 list of fields; empty is by name.
	OrderBy string
	// PageSize defaults to 100 and is at most 1000. A page of large resources may be smaller, see MaxPageBytes.
	PageSize int
	// PageToken continues a List of the same query; another query is refused.
	PageToken string
}

// Page is one page of a List.
type Page struct {
	Resources []*Resource
	// NextPageToken is empty on the last page.
	NextPageToken string
}

// Reader reads owned rows and read copies alike, never tombstones.
type Reader interface {
	// Get returns one resource, or NotFound.
	Get(ctx context.Context, name string) (*Resource, error)
	// BatchGet returns the resources in the order of names, nil where there is none. At most 1000 names.
	BatchGet(ctx context.Context, names []string) ([]*Resource, error)
	// List returns one page.
	List(ctx context.Context, q Query) (*Page, error)
}

// Writer changes owned rows.
type Writer interface {
	// BatchWrite applies all writes in one transaction, or none, and returns one result for each. A name may appear once. At most 1000 writes.
	// An error names the first write that failed. After an error that is Unavailable the outcome is unknown: read before repeating.
	BatchWrite(ctx context.Context, writes []Write) ([]Result, error)
}

// Store is the contract that every layer fulfils. It is safe for concurrent use.
type Store interface {
	Reader
	Writer
}

// Limits of the contract.
const (
	MaxBatch    = 1000
	MaxPageSize = 1000
	// MaxPageBytes ends a page early, after the resource whose body reaches it: a page never has much more bytes of bodies.
	MaxPageBytes = 16 << 20
	// MaxClosure bounds a batch together with the deletions that follow from it (Constraint.Closure).
	MaxClosure = 250_000
)

// Apply runs a single write.
func Apply(ctx context.Context, w Writer, write Write) (Result, error) {
	r, err := w.BatchWrite(ctx, []Write{write})
	if err != nil {
		return Result{}, err
	}
	return r[0], nil
}
