package controllers

import (
	"context"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/verify"
)

// +kubebuilder:rbac:groups=meta.dbcontroller.io,resources=verifications,verbs=get;list;watch
// +kubebuilder:rbac:groups=meta.dbcontroller.io,resources=verifications/status,verbs=patch

// Verifier compares the read copies of the Deployments that this process serves. Its methods may be called from any goroutine.
type Verifier interface {
	// VerificationPeers are the other regions of a service; an error says why the service's Deployment in region cannot be asked now.
	VerificationPeers(service, region string) ([]string, error)
	// Verify goes on with a pass, as verify.Run.
	Verify(ctx context.Context, service, region, peer string, opt verify.Options, from verify.State, report func(verify.Progress) error) (verify.State, error)
}

const (
	// verifySlice is how long a Verification goes on before its status is written: a process that takes over goes on from there.
	verifySlice = 5 * time.Second
	// verifyRetry is the pause after an error, which the status shows.
	verifyRetry = 10 * time.Second
	// maxVerifications run at once.
	maxVerifications = 4
	// maxFound differences are listed in the status.
	maxFound = 100
)

// verificationReconciler carries out the Verifications of the own region, a slice of time after the other.
type verificationReconciler struct {
	client client.Client
	// reader does not cache: a status that was read too early would have a slice done twice.
	reader   client.Reader
	verifier Verifier
}

func addVerification(mgr manager.Manager, _ *topology, o Options) error {
	if o.Verifier == nil {
		return nil
	}
	own := predicate.NewPredicateFuncs(func(object client.Object) bool {
		return object.(*v1alpha1.Verification).Spec.Region == o.Region
	})
	r := &verificationReconciler{client: mgr.GetClient(), reader: mgr.GetAPIReader(), verifier: o.Verifier}
	return builder.ControllerManagedBy(mgr).Named("verification").
		For(&v1alpha1.Verification{}, builder.WithPredicates(own, predicate.GenerationChangedPredicate{})).
		WithOptions(controller.Options{MaxConcurrentReconciles: maxVerifications}).
		Complete(reconcile.AsReconciler(mgr.GetClient(), r))
}

// Reconcile goes on for a slice of time and writes down where it stands.
func (r *verificationReconciler) Reconcile(ctx context.Context, v *v1alpha1.Verification) (reconcile.Result, error) {
	if err := r.reader.Get(ctx, client.ObjectKeyFromObject(v), v); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(fmt.Errorf("get Verification %s/%s: %w", v.Namespace, v.Name, err))
	}
	if v.Status.Phase == v1alpha1.VerificationSucceeded || v.Status.Phase == v1alpha1.VerificationFailed || !v.DeletionTimestamp.IsZero() {
		return reconcile.Result{}, nil
	}
	before := v.DeepCopy()
	err := r.slice(ctx, v)
	if ctx.Err() != nil {
		return reconcile.Result{}, nil //nolint:nilerr // told to stop; what is not written down is done again
	}
	concludeVerification(v, err)
	if !equality.Semantic.DeepEqual(before.Status, v.Status) {
		// Only over the status that was read: another one would count the same differences again.
		patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
		if err := r.client.Status().Patch(ctx, v, patch); err != nil {
			return reconcile.Result{}, client.IgnoreNotFound(fmt.Errorf("patch status of Verification %s/%s: %w", v.Namespace, v.Name, err))
		}
	}
	switch {
	case v.Status.Phase != v1alpha1.VerificationRunning:
		return reconcile.Result{}, nil
	case err != nil:
		return reconcile.Result{RequeueAfter: verifyRetry}, nil //nolint:nilerr // it is in the status
	}
	return reconcile.Result{RequeueAfter: time.Millisecond}, nil
}

// slice goes on with the first peer that is not finished.
func (r *verificationReconciler) slice(ctx context.Context, v *v1alpha1.Verification) error {
	s := &v.Status
	if len(s.Peers) == 0 {
		peers, err := r.verifier.VerificationPeers(v.Spec.Service, v.Spec.Region)
		if err != nil {
			return err
		}
		if v.Spec.PeerRegion != "" {
			peers = []string{v.Spec.PeerRegion}
		}
		for _, p := range peers {
			s.Peers = append(s.Peers, v1alpha1.VerificationPeer{Region: p})
		}
	}
	i := slices.IndexFunc(s.Peers, func(p v1alpha1.VerificationPeer) bool { return !p.Finished })
	if i < 0 {
		return nil
	}
	p := &s.Peers[i]
	from, err := verify.ParseState(p.State)
	if err != nil {
		return err
	}
	opt := verify.Options{Types: v.Spec.Types, Rate: int(v.Spec.RowsPerSecond), Pause: 1, For: verifySlice, Mode: modes[v.Spec.Repair]}
	state, err := r.verifier.Verify(ctx, v.Spec.Service, v.Spec.Region, p.Region, opt, from, func(pr verify.Progress) error {
		for _, d := range pr.Found {
			if len(s.Found) < maxFound {
				s.Found = append(s.Found, v1alpha1.RowDifference{
					PeerRegion: p.Region, Name: d.Name, Type: d.Type, Kind: string(d.Kind), Behind: d.Behind, Action: d.Action, Repaired: d.Repaired,
				})
			}
		}
		s.RemainingTime = nil
		if pr.ETA > 0 {
			s.RemainingTime = &metav1.Duration{Duration: pr.ETA.Round(time.Second)}
		}
		return nil
	})
	// With an error, too: the state counts what was found before.
	if p.State, p.Finished = state.Token(), state.Finished && err == nil; p.Finished {
		s.RemainingTime = nil
	}
	return err
}

var modes = map[v1alpha1.RepairMode]verify.Mode{v1alpha1.RepairNone: verify.Report, v1alpha1.RepairDryRun: verify.DryRun, v1alpha1.RepairRepair: verify.Repair}

// concludeVerification sums the peers up. err is that of the last slice.
func concludeVerification(v *v1alpha1.Verification, err error) {
	s := &v.Status
	s.ObservedGeneration = v.Generation
	s.Compared, s.Differences, s.Repaired = 0, 0, 0
	var done, total int64
	finished := len(s.Peers) > 0 || err == nil
	var through time.Time
	s.Scope = v.Spec.Region + "<-"
	for i, p := range s.Peers {
		state, perr := verify.ParseState(p.State)
		if perr != nil {
			err = perr
		}
		differences, repaired := state.Counts()
		s.Compared += state.Compared
		s.Differences += differences
		s.Repaired += repaired
		done += min(state.Done, state.Total)
		total += state.Total
		if p.Finished {
			done += state.Total - min(state.Done, state.Total)
		} else {
			finished = false
		}
		if through.IsZero() || state.Began.Before(through) {
			through = state.Began
		}
		if i > 0 {
			s.Scope += ","
		}
		s.Scope += p.Region
	}
	switch {
	case finished:
		s.Progress = "100%"
	case total > 0:
		s.Progress = fmt.Sprintf("%d%%", min(99, 100*done/total))
	default:
		s.Progress = "0%"
	}
	left := s.Differences - s.Repaired
	c := metav1.Condition{Type: v1alpha1.ConditionSucceeded, Status: metav1.ConditionUnknown, ObservedGeneration: v.Generation}
	s.Phase = v1alpha1.VerificationRunning
	switch {
	case err != nil && store.CodeOf(err) == store.InvalidArgument:
		s.Phase, c.Status, c.Reason, c.Message = v1alpha1.VerificationFailed, metav1.ConditionFalse, v1alpha1.ReasonInvalid, err.Error()
	case err != nil:
		c.Reason, c.Message = v1alpha1.ReasonRetrying, err.Error()
	case !finished:
		c.Reason, c.Message = v1alpha1.ReasonRunning, "rows are compared"
	case left > 0:
		s.Phase, c.Status, c.Reason = v1alpha1.VerificationFailed, metav1.ConditionFalse, v1alpha1.ReasonDiffers
		c.Message = fmt.Sprintf("%d of %d copies are not what their owners have: see status.found", left, s.Compared)
	default:
		s.Phase, c.Status, c.Reason = v1alpha1.VerificationSucceeded, metav1.ConditionTrue, v1alpha1.ReasonEqual
		c.Message = fmt.Sprintf("%d copies are what their owners have", s.Compared)
		if s.Repaired > 0 {
			c.Reason, c.Message = v1alpha1.ReasonRepaired, fmt.Sprintf("%d copies are what their owners have, %d of them since they were repaired", s.Compared, s.Repaired)
		}
		if !through.IsZero() {
			s.VerifiedThrough = &metav1.Time{Time: through}
		}
	}
	if len(c.Message) > 1024 {
		c.Message = c.Message[:1024]
	}
	meta.SetStatusCondition(&s.Conditions, c)
}
