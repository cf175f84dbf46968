// Package controllers connects the registry with Kubernetes: Deployment and ServiceDescriptor objects go in, status, conditions and
// events come back.
//
//	topology.go                      every replica: the objects in the cache -> the registry
//	deployment_reconciler.go         the leader: status of the Deployments of the own region
//	servicedescriptor_reconciler.go  the leader: status of the ServiceDescriptors
//	verification_reconciler.go       the leader: Verifications of the own region, carried out
//	deletion.go                      the leader: reclaimPolicy Delete of the own region
//	conditions.go                    pure: what was observed -> conditions and events
//	credentials.go                   whether the secrets of a Deployment exist and fit
//
// Deployments of other regions are input for the registry and nothing else: their own region's controller writes their status. The
// status is computed from the world each time, never from an earlier status, and patched once, only when it differs. What cannot be
// undone is decided by what the API server and the database say at that moment, never by a cache, a status or a condition.
package controllers

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

// +kubebuilder:rbac:groups=meta.dbcontroller.io,resources=deployments;servicedescriptors,verbs=get;list;watch
// The finalizer and the annotation of a deletion are part of the object.
// +kubebuilder:rbac:groups=meta.dbcontroller.io,resources=deployments,verbs=patch
// +kubebuilder:rbac:groups=meta.dbcontroller.io,resources=deployments/status;servicedescriptors/status,verbs=patch
// Leader election still writes events of the old API group.
// +kubebuilder:rbac:groups="",namespace=system,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups="",namespace=system,resources=secrets,verbs=get
// The leader's Lease, and those of the nodes and of their plan.
// +kubebuilder:rbac:groups=coordination.k8s.io,namespace=system,resources=leases,verbs=get;list;watch;create;update;delete

// StatusSource says what this process knows of a Deployment that it serves. Its methods are called often, from any goroutine, and must
// not block.
type StatusSource interface {
	// PeerStatuses returns how the Deployment of the service in the region follows its peers. A field that is not known is not set; a
	// peer that nothing is known of may be left out.
	PeerStatuses(service, region string) []v1alpha1.PeerStatus
	// Serving returns what is served of the Deployment itself.
	Serving(service, region string) Serving
}

// Serving says what is served of a Deployment. The zero value: nothing yet.
type Serving struct {
	// Version is the API version that takes writes; empty while none does.
	Version string
	// OwnedShards is how many shards of the ring live nodes of this region serve.
	OwnedShards int
	// ShardMoves counts how often a range of shards has come to a node of this process; FencedWrites the writes of nodes that were refused because they no
	// longer own their shards. Both since the process started.
	ShardMoves, FencedWrites int64
	// QuarantinedRows is how many rows could not be applied and were set aside.
	QuarantinedRows int64
	// PolicyHeld are sentences that say why the policy of the service that is declared is not in force; none if it is.
	PolicyHeld []string
	// References says how references are; nil while nothing here works on them.
	References *References
	// Search says how the search store follows; nil while nothing here fills it.
	Search *Search
	// Verified says what is verified of the copies of each peer; one that is not in it was not verified yet.
	Verified map[string]Verified
	// VerifyStale is the age from which a verification says nothing about now; 0 when copies are not verified by themselves.
	VerifyStale time.Duration
	// Err is why the Deployment is not served, for example that its database refuses connections; nil while it is, or is being opened.
	Err error
}

// References says how the references of a Deployment are.
type References struct {
	// Dangling is how many committed references were found to point to nothing.
	Dangling int64
	// Cascading is how many deleted resources there are of which others must still be told, Refused how many deletions wait because they are refused.
	Cascading, Refused int
	// Oldest is the age of the oldest work that should have been done, OldestKind what it is; a refused deletion does not count.
	Oldest     time.Duration
	OldestKind string
	// Unreachable are the Deployments that work waits for.
	Unreachable []string
}

// Search says how a search store follows its database.
type Search struct {
	// Freshness is the age of the state that is completely in the search store; nil before there is one.
	Freshness *metav1.Duration
	// Mismatched is how many documents the last verification found that were not those of their rows.
	Mismatched int64
}

// Verified is what the last passes over the copies of a peer have shown.
type Verified struct {
	// Through is the peer's time up to which its copies are verified without a gap; zero: never. Finished is when the last pass over the type that was
	// verified longest ago ended, by the clock here.
	Through, Finished time.Time
	// Mismatched is how many copies differed in the last pass of each type.
	Mismatched int64
}

// Options of the controllers.
type Options struct {
	// Region is the own region: the controllers write the status of its Deployments. Required.
	Region string
	// Registry is fed with the topology. Required.
	Registry *registry.Registry
	// Status says how the own Deployments do. Required.
	Status StatusSource
	// Verifier carries out Verifications. Nil: they stay as they are.
	Verifier Verifier
	// StatusInterval is how often the status of an own Deployment is renewed, and up to a fifth longer at random; default 10 s.
	StatusInterval time.Duration
	// PeerGrace is for how long a peer may be silent before it counts as unreachable; default 30 s.
	PeerGrace time.Duration
	// OverdueAfter is how old work on references may be; default 15 min, more than an owner that was never seen is waited for.
	OverdueAfter time.Duration
	// Cleaner drops the data of Deployments that are deleted with reclaimPolicy Delete. Nil: it stays.
	Cleaner Cleaner
	// CleanupWait is for how long that is tried before the object goes and the data stays; default 5 min. References to the data are waited out, however
	// long that takes.
	CleanupWait time.Duration
}

func (o Options) withDefaults() Options {
	o.StatusInterval = cmp.Or(o.StatusInterval, 10*time.Second)
	o.PeerGrace = cmp.Or(o.PeerGrace, 30*time.Second)
	o.OverdueAfter = cmp.Or(o.OverdueAfter, 15*time.Minute)
	o.CleanupWait = cmp.Or(o.CleanupWait, 5*time.Minute)
	return o
}

// Add adds the controllers to a manager whose scheme knows v1alpha1. The registry is synced once the manager's caches are.
func Add(mgr manager.Manager, o Options) error {
	if o.Region == "" || o.Registry == nil || o.Status == nil {
		return errors.New("add controllers: Region, Registry and Status must be set")
	}
	o = o.withDefaults()
	t := &topology{cache: mgr.GetCache(), registry: o.Registry}
	if err := mgr.Add(t); err != nil {
		return fmt.Errorf("add topology: %w", err)
	}
	for name, add := range map[string]func(manager.Manager, *topology, Options) error{
		"Deployment":        addDeployment,
		"ServiceDescriptor": addServiceDescriptor,
		"Verification":      addVerification,
	} {
		if err := add(mgr, t, o); err != nil {
			return fmt.Errorf("add controller of %s: %w", name, err)
		}
	}
	return nil
}

func newDeploymentReconciler(mgr manager.Manager, t *topology, o Options) *deploymentReconciler {
	return &deploymentReconciler{
		client:   mgr.GetClient(),
		reader:   mgr.GetAPIReader(),
		topology: t,
		secrets:  NewSecrets(mgr.GetAPIReader()),
		recorder: mgr.GetEventRecorder("db-controller"),
		options:  o,
		now:      time.Now,
		served:   map[types.UID]Serving{},
		cleanups: map[types.UID]time.Time{},
	}
}

func addDeployment(mgr manager.Manager, t *topology, o Options) error {
	r := newDeploymentReconciler(mgr, t, o)
	own := predicate.NewPredicateFuncs(func(object client.Object) bool {
		return object.(*v1alpha1.Deployment).Spec.Region == o.Region
	})
	return builder.ControllerManagedBy(mgr).Named("deployment").
		// An annotation asks for a look, or for the end of a deletion.
		For(&v1alpha1.Deployment{}, builder.WithPredicates(own, predicate.Or(predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{}))).
		// A Deployment's status speaks of its peers, its rivals and its service.
		Watches(&v1alpha1.Deployment{}, handler.EnqueueRequestsFromMapFunc(r.ofSameService), changed).
		Watches(&v1alpha1.ServiceDescriptor{}, handler.EnqueueRequestsFromMapFunc(r.ofSameService), changed).
		Complete(reconcile.AsReconciler(mgr.GetClient(), r))
}

func addServiceDescriptor(mgr manager.Manager, t *topology, o Options) error {
	r := &serviceDescriptorReconciler{client: mgr.GetClient(), topology: t, recorder: mgr.GetEventRecorder("db-controller"), options: o}
	return builder.ControllerManagedBy(mgr).Named("servicedescriptor").
		For(&v1alpha1.ServiceDescriptor{}, changed).
		Watches(&v1alpha1.ServiceDescriptor{}, handler.EnqueueRequestsFromMapFunc(r.rivals), changed).
		Complete(reconcile.AsReconciler(mgr.GetClient(), r))
}

// changed lets our own status patches pass unnoticed: otherwise each would cause the next.
var changed = builder.WithPredicates(predicate.GenerationChangedPredicate{})
