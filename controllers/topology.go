package controllers

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

// topology hands the objects in the manager's cache to the registry: in every replica, since each of them serves and syncs.
type topology struct {
	cache    cache.Cache
	registry *registry.Registry

	mu sync.Mutex // list and apply are one step, so that an older list never overwrites a newer one
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (t *topology) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable. It returns when ctx is done.
func (t *topology) Start(ctx context.Context) error {
	dirty := make(chan struct{}, 1)
	mark := func() {
		select {
		case dirty <- struct{}{}:
		default: // already marked; the refresh to come sees this change too
		}
	}
	onChange := toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { mark() },
		UpdateFunc: func(any, any) { mark() },
		DeleteFunc: func(any) { mark() },
	}
	for _, object := range []client.Object{&v1alpha1.Deployment{}, &v1alpha1.ServiceDescriptor{}} {
		informer, err := t.cache.GetInformer(ctx, object) // blocks until all objects have been seen
		if err != nil {
			return fmt.Errorf("watch %T: %w", object, err)
		}
		registration, err := informer.AddEventHandler(onChange)
		if err != nil {
			return fmt.Errorf("watch %T: %w", object, err)
		}
		defer func() { _ = informer.RemoveEventHandler(registration) }()
	}
	mark() // there may be no object at all, and that too is a topology
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-dirty:
			if _, err := t.refresh(ctx); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
}

// refresh brings the registry up to date with the cache and returns what is wrong, by object.
func (t *topology) refresh(ctx context.Context) (map[registry.ObjectRef]registry.Problem, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var deployments v1alpha1.DeploymentList
	if err := t.cache.List(ctx, &deployments); err != nil {
		return nil, fmt.Errorf("list Deployments: %w", err)
	}
	var services v1alpha1.ServiceDescriptorList
	if err := t.cache.List(ctx, &services); err != nil {
		return nil, fmt.Errorf("list ServiceDescriptors: %w", err)
	}
	deployments.Items = slices.DeleteFunc(deployments.Items, func(d v1alpha1.Deployment) bool { return d.Closing() })
	problems := map[registry.ObjectRef]registry.Problem{}
	for _, p := range t.registry.Apply(registry.Snapshot{
		Deployments: bySeniority(pointers(deployments.Items)),
		Services:    bySeniority(pointers(services.Items)),
	}) {
		problems[p.Object] = p
	}
	return problems, nil
}

func pointers[T any](items []T) []*T {
	p := make([]*T, len(items))
	for i := range items {
		p[i] = &items[i]
	}
	return p
}

// bySeniority orders objects by creation; the API server's clock counts seconds, so equals are ordered by name.
func bySeniority[T client.Object](objects []T) []T {
	slices.SortFunc(objects, func(a, b T) int {
		return cmp.Or(
			a.GetCreationTimestamp().Compare(b.GetCreationTimestamp().Time),
			cmp.Compare(a.GetNamespace(), b.GetNamespace()),
			cmp.Compare(a.GetName(), b.GetName()))
	})
	return objects
}

// AddTopology adds to a manager only what feeds the registry, without the controllers that write status: for a process that serves and
// leaves the status to others.
func AddTopology(mgr manager.Manager, r *registry.Registry) error {
	if err := mgr.Add(&topology{cache: mgr.GetCache(), registry: r}); err != nil {
		return fmt.Errorf("add topology: %w", err)
	}
	return nil
}
