// Package mixin is what Deployments ask each other so that references hold between them (spec 3): the schema mixin, as server and as client.
//
// A Deployment keeps, for each of its resources, where references to it are, never which ones. So it is asked before a reference to it is committed, and it
// asks those places before it lets the resource go. What holds, whoever asks:
//
//   - a Deployment speaks for itself alone, and is heard only if the registry knows it; a reference needs an import, an owner reference does not
//   - only the service that owns a name translates it: importers speak the version that they import, owners are translated before they ask
//   - every action is idempotent: repeated, delayed or overtaken it leads to the same state
//   - who does not understand a version says so, and changes nothing: the caller looks into the registry again
//
// The files:
//
//	server.go      who may ask, and in which version
//	references.go  new references, confirmations, and the questions before and after a deletion
//	owners.go      owner references
//	deletions.go   the stream of deletions that importers follow
//	plan.go        what a deletion would take along; it reads only
//	shadows.go     shadows for people
//	client.go      the same over the network
//	peers.go       which Deployments there are, how to reach them, which names they know
package mixin

import (
	"context"
	"errors"
	"fmt"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// Peer is the schema mixin of one Deployment. It is safe for concurrent use. An error has a *store.Error in its chain: Unavailable when the Deployment could
// not be reached, its answer is lost, or it asks to come back later. ReasonOf and OwningRegion tell what a caller can do about a refusal. Nothing is
// repeated inside.
type Peer interface {
	EstablishReferences(context.Context, *v1.EstablishReferencesRequest) (*v1.EstablishReferencesResponse, error)
	ConfirmBlockades(context.Context, *v1.ConfirmBlockadesRequest) (*v1.ConfirmBlockadesResponse, error)
	CheckIfResourceIsBlocked(context.Context, *v1.CheckIfResourceIsBlockedRequest) (*v1.CheckIfResourceIsBlockedResponse, error)
	CheckIfResourceHasDeletionSubscriber(context.Context, *v1.CheckIfResourceHasDeletionSubscriberRequest) (*v1.CheckIfResourceHasDeletionSubscriberResponse, error)
	CheckIfHasMetaOwnee(context.Context, *v1.CheckIfHasMetaOwneeRequest) (*v1.CheckIfHasMetaOwneeResponse, error)
	ConfirmMetaOwner(context.Context, *v1.ConfirmMetaOwnerRequest) (*v1.ConfirmMetaOwnerResponse, error)
	UpgradeMetaOwnerVersion(context.Context, *v1.UpgradeMetaOwnerVersionRequest) (*v1.UpgradeMetaOwnerVersionResponse, error)
	RemoveMetaOwnerReference(context.Context, *v1.RemoveMetaOwnerReferenceRequest) (*v1.RemoveMetaOwnerReferenceResponse, error)
	ListMetaOwnees(context.Context, *v1.ListMetaOwneesRequest) (*v1.ListMetaOwneesResponse, error)
	PlanDeletion(context.Context, *v1.PlanDeletionRequest) (*v1.PlanDeletionResponse, error)
	// WatchImportedServiceDeletions calls emit with each message until ctx is done or one of both fails; an error of emit is returned as it is. A message
	// is valid during the call.
	WatchImportedServiceDeletions(context.Context, *v1.WatchImportedServiceDeletionsRequest, func(*v1.WatchImportedServiceDeletionsResponse) error) error
}

// Census tells other regions of the same service what a region owns. A Server and a Client have it besides Peer.
type Census interface {
	MeasureHoldings(context.Context, *v1.MeasureHoldingsRequest) (*v1.MeasureHoldingsResponse, error)
}

// Core is what the server asks of the local database: postgres.Store. Names are spelled in its own version, those of other Deployments' resources
// as in the references to them. The zero Location is this Deployment.
type Core interface {
	planReader
	// The owner's side.
	Establish(context.Context, store.Establish) ([]store.Grant, error)
	Confirm(ctx context.Context, requester store.Location, refs []store.Confirmed) (missing []string, err error)
	ConfirmEpoch(ctx context.Context, requester store.Location, epoch int64) error
	AddOwnee(ctx context.Context, owner string, at store.Location) (found bool, state store.ShadowState, err error)
	Suspects(ctx context.Context, candidates []store.Location) ([]store.Location, error)
	// The referrer's side.
	CheckBlocked(ctx context.Context, owner store.Location, targets []store.Question, excluding []string) ([]store.BlockedAnswer, error)
	CheckSubscriber(ctx context.Context, owner store.Location, target store.Question) (count int, sample []string, err error)
	CheckOwnee(ctx context.Context, kind string, at store.Location, names []string) (bool, error)
	Ownees(ctx context.Context, at store.Location, names []string, after string, limit int) ([]string, error)
	RaiseTasks(ctx context.Context, names []string, t store.Tasks) error
	// Shadows.
	Shadow(ctx context.Context, name string) (*store.Shadow, error)
	Shadows(ctx context.Context, f store.ShadowFilter) ([]*store.Shadow, string, error)
	ReadTasks(ctx context.Context, c feed.Cursor, shards feed.Range, emit func(store.Task) error) (feed.Read, error)
}

// Topology is what is asked of the registry.
type Topology interface {
	View() *registry.View
}

// Owners knows the owning region of a name: region.Store.
type Owners interface {
	Owner(ctx context.Context, name descriptor.Name, batch []store.Write) (region string, err error)
}

// Policies knows the policy that governs a name: policy.Cache.
type Policies interface {
	Of(ctx context.Context, n descriptor.Name, pending map[string][]byte) (p *descriptor.Policy, holder string, err error)
}

// Changes wakes those who follow the local database: feed.Feed.
type Changes interface {
	Follow(ctx context.Context, want feed.Interest, step func(context.Context) (more bool, err error)) error
}

// Reasons of a refusal, in the ErrorInfo of the answer.
const (
	// ReasonVersionMismatch: the callee does not understand the stated version, or does not use it. MetadataVersion says what it speaks itself.
	ReasonVersionMismatch = "VERSION_MISMATCH"
	// ReasonWrongRegion: another region owns the resource. MetadataRegion says which.
	ReasonWrongRegion = v1.ReasonWrongRegion
	// ReasonWrongPeer: another Deployment was meant.
	ReasonWrongPeer = v1.ReasonWrongPeer
	// ReasonUnknownPeer: the registry does not know the requester, or it is disabled. The code on the wire is PERMISSION_DENIED.
	ReasonUnknownPeer = "UNKNOWN_PEER"
	// ReasonNotImported: there is no import relation between the two services (F25). The code on the wire is PERMISSION_DENIED.
	ReasonNotImported = "NOT_IMPORTED"
	// ReasonTooManyCalls: the requester has too many calls in flight.
	ReasonTooManyCalls = "TOO_MANY_CALLS"
)

// Keys of the metadata of a refusal.
const (
	MetadataVersion = "currentVersion"
	MetadataRegion  = "owningRegion"
)

// Refusal is an error with a reason that programs act on. Its chain has the *store.Error for everybody else.
type Refusal struct {
	Err *store.Error
	// Reason is one of the constants above.
	Reason string
	// Metadata are the facts that belong to it; nil without any.
	Metadata map[string]string
}

// Error returns one line.
func (r *Refusal) Error() string { return r.Err.Error() }

// Unwrap returns Err.
func (r *Refusal) Unwrap() error { return r.Err }

// ReasonOf returns the reason of the Refusal in err's chain, or "".
func ReasonOf(err error) string {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r.Reason
	}
	return ""
}

// OwningRegion returns the region that owns the resource, if err says that another region than the one asked does.
func OwningRegion(err error) (string, bool) {
	if r, ok := errors.AsType[*Refusal](err); ok && r.Reason == ReasonWrongRegion && r.Metadata[MetadataRegion] != "" {
		return r.Metadata[MetadataRegion], true
	}
	return "", false
}

func refuse(reason string, metadata map[string]string, name, format string, args ...any) error {
	return &Refusal{store.Errorf(store.FailedPrecondition, name, format, args...), reason, metadata}
}

// Limits.
const (
	// MaxNames bounds the names of one call.
	MaxNames = 1000
	// DefaultTTL, MinTTL and MaxTTL bound how long targets are protected before the referrer is committed.
	DefaultTTL = 5 * time.Minute
	MinTTL     = 10 * time.Second
	MaxTTL     = 15 * time.Minute
	// DefaultTimeout is the deadline of a call, besides the caller's own.
	DefaultTimeout = 5 * time.Second
)

func invalid(field, format string, args ...any) error {
	return store.Invalid(field, fmt.Sprintf(format, args...))
}

// LocationOf reads a Location of the wire.
func LocationOf(l *v1.Location) store.Location {
	return store.Location{Service: l.GetService(), Region: l.GetRegion()}
}

// WireLocation returns l as it travels.
func WireLocation(l store.Location) *v1.Location {
	return &v1.Location{Service: l.Service, Region: l.Region}
}

func keyOf(l store.Location) registry.Key {
	return registry.Key{Service: l.Service, Region: l.Region}
}

// spelledBy returns the version of service that version of importer uses: that which it imports, or itself for its own service. It is empty if the importer is
// not declared, or uses none.
func spelledBy(view *registry.View, importer, version, service string) string {
	s, ok := view.Service(importer)
	if !ok {
		return ""
	}
	v := s.Version(version)
	switch {
	case v == nil:
		return ""
	case importer == service:
		return version
	}
	return v.Imports[service]
}
