package controllers

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

// deploymentReconciler keeps the status of the Deployments of the own region true.
type deploymentReconciler struct {
	client   client.Client
	reader   client.Reader // does not cache
	topology *topology
	secrets  registry.Secrets
	recorder events.EventRecorder
	options  Options
	now      func() time.Time

	// What this process remembers of objects, for as long as it leads. One object at a time is reconciled.
	served   map[types.UID]Serving   // at the last look
	cleanups map[types.UID]time.Time // since when their data cannot be dropped
}

// Reconcile observes one Deployment and writes its status. It comes back by itself: clocks go on.
func (r *deploymentReconciler) Reconcile(ctx context.Context, d *v1alpha1.Deployment) (reconcile.Result, error) {
	o := observation{deployment: registry.DeploymentOf(d), grace: r.options.PeerGrace, overdue: r.options.OverdueAfter, now: r.now()}
	next := r.options.StatusInterval
	if !d.DeletionTimestamp.IsZero() {
		if !controllerutil.ContainsFinalizer(d, v1alpha1.CleanupFinalizer) {
			r.forget(d.UID)
			return reconcile.Result{}, nil // nothing of ours keeps it
		}
		if gone, err := r.clean(ctx, d, &o); gone || err != nil {
			return again(err)
		}
		next = min(next, cleanupInterval)
	}
	for _, observe := range []func(context.Context, *observation) error{
		r.observeTopology,    // is it in force, what is its service, who are its peers
		r.observeCredentials, // do its secrets exist and fit
		r.observeServing,     // what do the store and the syncers say
	} {
		if err := observe(ctx, &o); err != nil {
			return reconcile.Result{}, err
		}
	}
	if d.DeletionTimestamp.IsZero() {
		if err := r.keepFinalizer(ctx, d, &o); err != nil {
			return again(err)
		}
	}
	before := d.DeepCopy()
	writeStatus(d, o)
	if err := r.patchStatus(ctx, before, d); err != nil {
		return reconcile.Result{}, err
	}
	if was, ok := r.served[d.UID]; ok {
		record(r.recorder, d, happenings(was, o.serving))
	}
	r.served[d.UID] = o.serving
	return reconcile.Result{RequeueAfter: wait.Jitter(next, 0.2)}, nil // in step with the renewals of replicas it would see their reports always at the same age
}

// again looks again soon when an object has changed since it was read, which is no error.
func again(err error) (reconcile.Result, error) {
	if apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: time.Second}, nil
	}
	return reconcile.Result{}, err
}

func (r *deploymentReconciler) observeTopology(ctx context.Context, o *observation) error {
	problems, err := r.topology.refresh(ctx)
	if err != nil || o.closing {
		return err
	}
	if p, ok := problems[registry.ObjectRef{Kind: "Deployment", Namespace: o.deployment.Namespace, Name: o.deployment.Name}]; ok {
		o.problem = &p
		return nil
	}
	view := r.topology.registry.View()
	o.service, _ = view.Service(o.deployment.Service)
	if o.deployment.Disabled {
		return nil // nobody copies to it
	}
	for _, peer := range view.DeploymentsOf(o.deployment.Service) {
		if peer.Region != o.deployment.Region && !peer.Disabled {
			o.peers = append(o.peers, v1alpha1.PeerStatus{Region: peer.Region})
		}
	}
	return nil
}

func (r *deploymentReconciler) observeCredentials(ctx context.Context, o *observation) error {
	if o.problem == nil && !o.closing {
		o.credentials = checkCredentials(ctx, r.secrets, o.deployment, o.now)
	}
	return nil // whatever the fault is, it is part of the status
}

func (r *deploymentReconciler) observeServing(_ context.Context, o *observation) error {
	if o.problem != nil || o.closing {
		return nil
	}
	o.serving = r.options.Status.Serving(o.deployment.Service, o.deployment.Region)
	known := map[string]v1alpha1.PeerStatus{}
	for _, p := range r.options.Status.PeerStatuses(o.deployment.Service, o.deployment.Region) {
		known[p.Region] = p
	}
	for i, p := range o.peers {
		if k, ok := known[p.Region]; ok {
			o.peers[i] = k
		}
		if v := o.serving.Verified[p.Region]; !v.Through.IsZero() {
			o.peers[i].Verified = &metav1.Time{Time: v.Through.Truncate(time.Second)}
		}
	}
	return nil
}

// writeStatus replaces the whole status by what was observed.
func writeStatus(d *v1alpha1.Deployment, o observation) {
	conditions := d.Status.Conditions // their transition times stay
	d.Status = v1alpha1.DeploymentStatus{
		ObservedGeneration: d.Generation, LastHandledRequestAt: d.Annotations[v1alpha1.RequestedAtAnnotation], Conditions: conditions, CurrentVersion: o.serving.Version,
	}
	setConditions(&d.Status.Conditions, o.conditions(), d.Generation)
	if o.problem != nil || o.closing {
		return
	}
	if through := o.verifiedThrough(); !through.IsZero() {
		d.Status.Verified = &metav1.Time{Time: through.Truncate(time.Second)}
	}
	inSync, lagKnown := 0, true
	var lag time.Duration
	for _, p := range o.peers {
		p.ContactAge, p.Freshness, p.ApplyLag = rounded(p.ContactAge), rounded(p.Freshness), rounded(p.ApplyLag)
		d.Status.Peers = append(d.Status.Peers, p)
		d.Status.PendingRows += p.PendingRows
		if p.Freshness == nil {
			lagKnown = false
		} else {
			lag = max(lag, p.Freshness.Duration)
		}
		if o.inSync(p) {
			inSync++
		}
	}
	if len(o.peers) > 0 && lagKnown {
		d.Status.Lag = &metav1.Duration{Duration: lag}
	}
	d.Status.PeersInSync = fmt.Sprintf("%d/%d", inSync, len(o.peers))
	d.Status.Shards = &v1alpha1.ShardsStatus{
		Total:   int32(o.deployment.Ring),
		Owned:   int32(o.serving.OwnedShards),
		Summary: fmt.Sprintf("%d/%d", o.serving.OwnedShards, o.deployment.Ring),
	}
}

// rounded keeps what people can use of a clock: milliseconds below a minute, seconds above.
func rounded(d *metav1.Duration) *metav1.Duration {
	if d == nil {
		return nil
	}
	unit := time.Millisecond
	if d.Duration >= time.Minute {
		unit = time.Second
	}
	return &metav1.Duration{Duration: d.Round(unit)}
}

func (r *deploymentReconciler) patchStatus(ctx context.Context, before, after *v1alpha1.Deployment) error {
	if equality.Semantic.DeepEqual(before.Status, after.Status) {
		return nil
	}
	if err := r.client.Status().Patch(ctx, after, client.MergeFrom(before)); err != nil {
		return client.IgnoreNotFound(fmt.Errorf("patch status of Deployment %s/%s: %w", after.Namespace, after.Name, err))
	}
	record(r.recorder, after, eventsOf(before.Status.Conditions, after.Status.Conditions))
	return nil
}

// record publishes events; only after the status that they tell of is written, so that a repeated attempt does not repeat them.
func record(recorder events.EventRecorder, object runtime.Object, happened []event) {
	for _, e := range happened {
		recorder.Eventf(object, nil, e.kind, e.reason, "Reconcile", "%s", e.note)
	}
}

// ofSameService names the own region's Deployments of the service that a Deployment or ServiceDescriptor belongs to.
func (r *deploymentReconciler) ofSameService(ctx context.Context, object client.Object) []reconcile.Request {
	var service string
	switch o := object.(type) {
	case *v1alpha1.Deployment:
		service = o.Spec.Service
	case *v1alpha1.ServiceDescriptor:
		service = o.Spec.Service
	}
	var deployments v1alpha1.DeploymentList
	if err := r.client.List(ctx, &deployments); err != nil {
		log.FromContext(ctx).Error(err, "cannot list Deployments; their status follows with the next interval", "service", service)
		return nil
	}
	var requests []reconcile.Request
	for _, d := range deployments.Items {
		if d.Spec.Service == service && d.Spec.Region == r.options.Region {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&d)})
		}
	}
	return requests
}
