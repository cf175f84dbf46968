package controllers

import (
	"context"

	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// Replay reconciles an object as a cache may show it, beside the controllers of the manager.
func Replay(ctx context.Context, mgr manager.Manager, o Options, d *v1alpha1.Deployment) error {
	r := newDeploymentReconciler(mgr, &topology{cache: mgr.GetCache(), registry: o.Registry}, o.withDefaults())
	_, err := r.Reconcile(ctx, d)
	return err
}
