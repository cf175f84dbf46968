package controllers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

// Cleaner drops the data of Deployments of the own region. Its methods may be called from any goroutine.
type Cleaner interface {
	// Referrers lists some of the resources elsewhere that refer to resources of a Deployment which still runs; those of the Deployments in leaving do not
	// count. Without any, mark says of which state of the database that is true.
	Referrers(ctx context.Context, d registry.Deployment, leaving []registry.Key) (names []string, mark string, err error)
	// Drop drops what was made for a Deployment that is no part of the topology any more. It fails with ErrInUse while something is connected to the
	// database, and with ErrReferred if references came after mark; an empty mark is any. What is not there is dropped.
	Drop(ctx context.Context, d registry.Deployment, mark string) error
}

// Why a Cleaner does not drop.
var (
	ErrInUse    = errors.New("the database is in use")
	ErrReferred = errors.New("there are new references")
)

// errNoCleaner is why a process that cannot drop anything does not.
var errNoCleaner = errors.New("this process cannot drop data")

const (
	// forced is the value of the closing annotation when references do not count.
	forced = "forced"
	// forcedWait is for how long a forced deletion is tried: processes need some seconds to stop.
	forcedWait = 10 * time.Second
	// cleanupTimeout bounds one attempt.
	cleanupTimeout = time.Minute
	// cleanupInterval is the time between two attempts.
	cleanupInterval = 2 * time.Second
)

// keepFinalizer makes the object have the finalizer exactly while there would be something to drop.
func (r *deploymentReconciler) keepFinalizer(ctx context.Context, d *v1alpha1.Deployment, o *observation) error {
	want := d.Spec.ReclaimPolicy == v1alpha1.ReclaimDelete && r.options.Cleaner != nil && o.problem == nil
	if want == controllerutil.ContainsFinalizer(d, v1alpha1.CleanupFinalizer) || !want && d.Spec.ReclaimPolicy == v1alpha1.ReclaimDelete {
		return nil // one that is refused keeps what it has: its data may be from a time when it was not
	}
	return r.patchMeta(ctx, d, func(d *v1alpha1.Deployment) {
		if want {
			controllerutil.AddFinalizer(d, v1alpha1.CleanupFinalizer)
		} else {
			controllerutil.RemoveFinalizer(d, v1alpha1.CleanupFinalizer)
		}
	})
}

// patchMeta changes the metadata of exactly the object that was read.
func (r *deploymentReconciler) patchMeta(ctx context.Context, d *v1alpha1.Deployment, change func(*v1alpha1.Deployment)) error {
	before, status := d.DeepCopy(), d.Status.DeepCopy()
	change(d)
	err := r.client.Patch(ctx, d, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	d.Status = *status // the answer has the one that is stored
	if err != nil {
		return client.IgnoreNotFound(fmt.Errorf("patch Deployment %s/%s: %w", d.Namespace, d.Name, err))
	}
	return nil
}

// release lets the object go, and says what has become of its data.
func (r *deploymentReconciler) release(ctx context.Context, d *v1alpha1.Deployment, kind, reason, format string, args ...any) error {
	if err := r.patchMeta(ctx, d, func(d *v1alpha1.Deployment) { controllerutil.RemoveFinalizer(d, v1alpha1.CleanupFinalizer) }); err != nil {
		return err
	}
	r.forget(d.UID)
	r.recorder.Eventf(d, nil, kind, reason, "Cleanup", format, args...)
	return nil
}

// clean takes the deletion of an object with our finalizer one step further. It says whether the object is gone; if it is not, o has why.
//
//	referred to   everything goes on as before, until nothing refers to the data
//	closing       the annotation is set: the object is no part of the topology, so all processes stop serving it
//	dropped       once nothing is connected to the database any more and no reference has come meanwhile
//
// What stands in the way for longer than the wait, other than references, lets the object go and the data stay.
func (r *deploymentReconciler) clean(ctx context.Context, d *v1alpha1.Deployment, o *observation) (gone bool, err error) {
	// The cache may be behind, or show an object of that name that was there before: only what is stored counts.
	var stored v1alpha1.Deployment
	if err := r.reader.Get(ctx, client.ObjectKeyFromObject(d), &stored); err != nil {
		return client.IgnoreNotFound(err) == nil, client.IgnoreNotFound(fmt.Errorf("get Deployment %s/%s: %w", d.Namespace, d.Name, err))
	}
	if stored.UID != d.UID || stored.DeletionTimestamp.IsZero() || !controllerutil.ContainsFinalizer(&stored, v1alpha1.CleanupFinalizer) {
		return true, nil // its own event is on the way
	}
	*d = stored
	o.deployment, o.closing = registry.DeploymentOf(d), d.Closing()
	if d.Spec.ReclaimPolicy != v1alpha1.ReclaimDelete {
		return true, r.release(ctx, d, corev1.EventTypeNormal, "DataRetained", "spec.reclaimPolicy is %s: nothing was dropped", d.Spec.ReclaimPolicy)
	}
	rival, leaving, err := r.others(ctx, d)
	if err != nil {
		return false, err
	}
	if rival != "" {
		return true, r.release(ctx, d, corev1.EventTypeWarning, "DataRetained", "Deployment %s declares the same service and region: nothing was dropped", rival)
	}

	within, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	force := d.Annotations[v1alpha1.ForceDeleteAnnotation] == "true"
	switch {
	case r.options.Cleaner == nil:
		return r.notDropped(ctx, d, o, force, errNoCleaner)
	case !o.closing:
		mark := forced
		if !force {
			var names []string
			if names, mark, err = r.options.Cleaner.Referrers(within, o.deployment, leaving); err != nil {
				return r.notDropped(ctx, d, o, force, err)
			}
			if len(names) > 0 {
				delete(r.cleanups, d.UID)
				o.cleanup = new(yes(v1alpha1.ReasonReferenced, "resources elsewhere refer to resources of this Deployment: %s; delete those references, or set the annotation %s: \"true\"",
					strings.Join(names, ", "), v1alpha1.ForceDeleteAnnotation))
				return false, nil
			}
		}
		if err := r.patchMeta(ctx, d, func(d *v1alpha1.Deployment) {
			if d.Annotations == nil {
				d.Annotations = map[string]string{}
			}
			d.Annotations[v1alpha1.ClosingAnnotation] = mark
		}); err != nil {
			return false, err
		}
		o.closing = true
		return false, nil
	}

	mark := d.Annotations[v1alpha1.ClosingAnnotation]
	if force || mark == forced {
		mark = ""
	}
	switch err := r.options.Cleaner.Drop(within, o.deployment, mark); {
	case err == nil:
		return true, r.release(ctx, d, corev1.EventTypeNormal, "DataDropped", "the data of %s was dropped", o.deployment.Key)
	case errors.Is(err, ErrReferred):
		o.closing = false // back into service, and look again
		return false, r.patchMeta(ctx, d, func(d *v1alpha1.Deployment) { delete(d.Annotations, v1alpha1.ClosingAnnotation) })
	default:
		return r.notDropped(ctx, d, o, force, err)
	}
}

// notDropped keeps the object for as long as it is worth trying.
func (r *deploymentReconciler) notDropped(ctx context.Context, d *v1alpha1.Deployment, o *observation, force bool, cause error) (gone bool, err error) {
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	since, ok := r.cleanups[d.UID]
	if !ok {
		since = r.now()
		r.cleanups[d.UID] = since
	}
	wait := r.options.CleanupWait
	if force {
		wait = min(wait, forcedWait)
	}
	if r.now().Sub(since) >= wait {
		return true, r.release(ctx, d, corev1.EventTypeWarning, "CleanupAbandoned", "the data was not dropped, it stays where it is: %v", cause)
	}
	reason := v1alpha1.ReasonCleanupFailed
	if errors.Is(cause, ErrInUse) {
		reason = v1alpha1.ReasonInUse
	}
	o.cleanup = new(yes(reason, "the data cannot be dropped now, and stays if that does not change within %s: %v", wait, cause))
	return false, nil
}

// others looks at the other objects: one that declares the same, and the Deployments that are being dropped like this one, whose references do not count.
func (r *deploymentReconciler) others(ctx context.Context, d *v1alpha1.Deployment) (rival string, leaving []registry.Key, err error) {
	var all v1alpha1.DeploymentList
	if err := r.client.List(ctx, &all); err != nil {
		return "", nil, fmt.Errorf("list Deployments: %w", err)
	}
	for _, other := range all.Items {
		deleted := !other.DeletionTimestamp.IsZero()
		switch {
		case other.UID == d.UID:
		case other.Spec.Service == d.Spec.Service && other.Spec.Region == d.Spec.Region:
			if !deleted {
				rival = other.Namespace + "/" + other.Name
			}
		case deleted && other.Spec.ReclaimPolicy == v1alpha1.ReclaimDelete:
			leaving = append(leaving, registry.Key{Service: other.Spec.Service, Region: other.Spec.Region})
		}
	}
	return rival, leaving, nil
}

// forget drops what is remembered of an object that is gone.
func (r *deploymentReconciler) forget(uid types.UID) {
	delete(r.cleanups, uid)
	delete(r.served, uid)
}
