// Package controllers connects the registry with Kubernetes: Deployment and ServiceDescriptor objects go in, status, conditions and
// events come back.
//
//	topology.go                      every replica: the objects in the cache -> the registry
//	deployment_reconciler.go         the leader: status of the Deployments of the own region
//	servicedescriptor_reconciler.go  the leader: status of the ServiceDescriptors
//	verification_reconciler.go       the leader: Verifications of the own region, carried out
//	conditions.go                    pure: what was observed -> conditions
//	credentials.go                   whether the secrets of a Deployment exist and fit
//
// Deployments of other regions are input for the registry and nothing else: their own region's controller writes their status. The
// status is computed from the world each time, never from an earlier status, and patched once, only when it differs.
package controllers

import (
	"cmp"
	"errors"
	"fmt"
	"time"

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
// +kubebuilder:rbac:groups=meta.dbcontroller.io,resources=deployments/status;servicedescriptors/status,verbs=patch
// Leader election still writes events of the old API group.
// +kubebuilder:rbac:groups="",namespace=system,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups="",namespace=system,resources=secrets,verbs=get
// +kubebuilder:rbac:groups=coordination.k8s.io,namespace=system,resources=leases,verbs=get;create;update

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
	// QuarantinedRows is how many rows could not be applied and were set aside.
	QuarantinedRows int64
	// Err is why the Deployment is not served, for example that its database refuses connections; nil while it is, or is being opened.
	Err error
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
	// StatusInterval is how often the status of an own Deployment is renewed; default 10 s.
	StatusInterval time.Duration
	// PeerGrace is for how long a peer may be silent before it counts as unreachable; default 30 s.
	PeerGrace time.Duration
}

// Add adds the controllers to a manager whose scheme knows v1alpha1. The registry is synced once the manager's caches are.
func Add(mgr manager.Manager, o Options) error {
	if o.Region == "" || o.Registry == nil || o.Status == nil {
		return errors.New("add controllers: Region, Registry and Status must be set")
	}
	o.StatusInterval = cmp.Or(o.StatusInterval, 10*time.Second)
	o.PeerGrace = cmp.Or(o.PeerGrace, 30*time.Second)

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

func addDeployment(mgr manager.Manager, t *topology, o Options) error {
	r := &deploymentReconciler{
		client:   mgr.GetClient(),
		topology: t,
		secrets:  NewSecrets(mgr.GetAPIReader()),
		recorder: mgr.GetEventRecorder("db-controller"),
		options:  o,
	}
	own := predicate.NewPredicateFuncs(func(object client.Object) bool {
		return object.(*v1alpha1.Deployment).Spec.Region == o.Region
	})
	return builder.ControllerManagedBy(mgr).Named("deployment").
		For(&v1alpha1.Deployment{}, builder.WithPredicates(own, predicate.GenerationChangedPredicate{})).
		// A Deployment's status speaks of its peers, its rivals and its service.
		Watches(&v1alpha1.Deployment{}, handler.EnqueueRequestsFromMapFunc(r.ofSameService), changed).
		Watches(&v1alpha1.ServiceDescriptor{}, handler.EnqueueRequestsFromMapFunc(r.ofSameService), changed).
		Complete(reconcile.AsReconciler(mgr.GetClient(), r))
}

func addServiceDescriptor(mgr manager.Manager, t *topology, _ Options) error {
	r := &serviceDescriptorReconciler{client: mgr.GetClient(), topology: t, recorder: mgr.GetEventRecorder("db-controller")}
	return builder.ControllerManagedBy(mgr).Named("servicedescriptor").
		For(&v1alpha1.ServiceDescriptor{}, changed).
		Watches(&v1alpha1.ServiceDescriptor{}, handler.EnqueueRequestsFromMapFunc(r.rivals), changed).
		Complete(reconcile.AsReconciler(mgr.GetClient(), r))
}

// changed lets our own status patches pass unnoticed: otherwise each would cause the next.
var changed = builder.WithPredicates(predicate.GenerationChangedPredicate{})
