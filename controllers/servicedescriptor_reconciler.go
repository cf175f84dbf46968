package controllers

import (
	"context"
	"fmt"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

// serviceDescriptorReconciler says in the status of each ServiceDescriptor whether it is in force.
type serviceDescriptorReconciler struct {
	client   client.Client
	topology *topology
	recorder events.EventRecorder
	options  Options
}

// Reconcile judges one ServiceDescriptor and writes its status.
func (r *serviceDescriptorReconciler) Reconcile(ctx context.Context, s *v1alpha1.ServiceDescriptor) (reconcile.Result, error) {
	before := s.DeepCopy()
	problems, err := r.topology.refresh(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	verdicts := map[string]verdict{
		v1alpha1.ConditionReady:    yes(v1alpha1.ReasonCompiled, "the descriptor compiled and is in use"),
		v1alpha1.ConditionStalled:  no(v1alpha1.ReasonCompiled, "nothing needs a person"),
		v1alpha1.ConditionDegraded: no(v1alpha1.ReasonCompiled, "no part of the descriptor is held back in region %s", r.options.Region),
	}
	if v, held := policyHeld(r.options.Status.Serving(s.Spec.Service, r.options.Region)); held {
		verdicts[v1alpha1.ConditionDegraded] = v
	}
	if p, refused := problems[registry.RefOf(s)]; refused {
		reason := v1alpha1.ReasonInvalid
		if p.Reason == registry.Conflict {
			reason = v1alpha1.ReasonDuplicate
		} else if _, ok := r.topology.registry.View().Service(s.Spec.Service); ok {
			p.Message += " (the last state that compiled stays in use)"
		}
		verdicts[v1alpha1.ConditionReady] = no(reason, "%s", p.Message)
		verdicts[v1alpha1.ConditionStalled] = yes(reason, "%s", p.Message)
	}
	s.Status.ObservedGeneration = s.Generation
	setConditions(&s.Status.Conditions, verdicts, s.Generation)
	var result reconcile.Result
	if s.Spec.MultiRegionPolicy != nil {
		result.RequeueAfter = r.options.StatusInterval // it comes into force later than the descriptor, if at all
	}
	return result, r.patchStatus(ctx, before, s)
}

func (r *serviceDescriptorReconciler) patchStatus(ctx context.Context, before, after *v1alpha1.ServiceDescriptor) error {
	if equality.Semantic.DeepEqual(before.Status, after.Status) {
		return nil
	}
	if err := r.client.Status().Patch(ctx, after, client.MergeFrom(before)); err != nil {
		return client.IgnoreNotFound(fmt.Errorf("patch status of ServiceDescriptor %s/%s: %w", after.Namespace, after.Name, err))
	}
	record(r.recorder, after, eventsOf(before.Status.Conditions, after.Status.Conditions))
	return nil
}

// rivals names the ServiceDescriptors that declare the same service: when one goes, another may come into force.
func (r *serviceDescriptorReconciler) rivals(ctx context.Context, object client.Object) []reconcile.Request {
	service := object.(*v1alpha1.ServiceDescriptor).Spec.Service
	var descriptors v1alpha1.ServiceDescriptorList
	if err := r.client.List(ctx, &descriptors); err != nil {
		log.FromContext(ctx).Error(err, "cannot list ServiceDescriptors; the status of rivals may be late", "service", service)
		return nil
	}
	var requests []reconcile.Request
	for _, s := range descriptors.Items {
		if s.Spec.Service == service {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&s)})
		}
	}
	return requests
}
