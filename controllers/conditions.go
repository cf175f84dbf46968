package controllers

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
)

// observation is all that the status of a Deployment is computed from.
type observation struct {
	deployment  registry.Deployment
	problem     *registry.Problem   // why the object is not part of the topology; nil when it is
	service     *descriptor.Service // nil when there is none
	credentials error
	serving     Serving
	peers       []v1alpha1.PeerStatus // of every other region of the service that is in use, in order
	grace       time.Duration         // after which a silent peer is unreachable
	overdue     time.Duration         // after which work on references is overdue
	now         time.Time
	closing     bool     // it is deleted, and its data is about to be dropped
	cleanup     *verdict // why a deletion waits; nil when none does
}

// verdict is a condition without its bookkeeping.
type verdict struct {
	status  metav1.ConditionStatus
	reason  string
	message string
}

func yes(reason, format string, args ...any) verdict {
	return verdict{metav1.ConditionTrue, reason, fmt.Sprintf(format, args...)}
}

func no(reason, format string, args ...any) verdict {
	return verdict{metav1.ConditionFalse, reason, fmt.Sprintf(format, args...)}
}

func unknown(reason, format string, args ...any) verdict {
	return verdict{metav1.ConditionUnknown, reason, fmt.Sprintf(format, args...)}
}

// conditions judges the observation: every condition type of a Deployment gets a verdict.
func (o observation) conditions() map[string]verdict {
	switch {
	case o.closing:
		return o.leaving()
	case o.problem != nil:
		return o.refused()
	}
	c := map[string]verdict{
		v1alpha1.ConditionConflict:            no(v1alpha1.ReasonUnique, "no other object declares %s", o.deployment.Key),
		v1alpha1.ConditionCredentialsValid:    o.credentialsValid(),
		v1alpha1.ConditionSuspended:           o.suspended(),
		v1alpha1.ConditionPeersReachable:      o.peersReachable(),
		v1alpha1.ConditionInitialSyncComplete: o.initialSyncComplete(),
		v1alpha1.ConditionCaughtUp:            o.caughtUp(),
		v1alpha1.ConditionReferencesHealthy:   o.referencesHealthy(),
		v1alpha1.ConditionSearchInSync:        o.searchInSync(),
		v1alpha1.ConditionVerified:            o.verified(),
		v1alpha1.ConditionDegraded:            no(v1alpha1.ReasonAvailable, "no row is in quarantine, and nothing that is configured is missing"),
	}
	if v := c[v1alpha1.ConditionCredentialsValid]; v.status == metav1.ConditionFalse && o.optional() {
		c[v1alpha1.ConditionDegraded] = yes(v.reason, "%s", v.message)
	}
	if v, held := policyHeld(o.serving); held {
		c[v1alpha1.ConditionDegraded] = v
	}
	if n := o.serving.QuarantinedRows; n > 0 {
		c[v1alpha1.ConditionDegraded] = yes(v1alpha1.ReasonQuarantine, "%d rows could not be applied and are in quarantine", n)
	}
	c[v1alpha1.ConditionStalled] = o.stalled(c)
	c[v1alpha1.ConditionReady] = o.ready(c)
	c[v1alpha1.ConditionProgressing] = o.progressing(c)
	c[v1alpha1.ConditionReconciling] = c[v1alpha1.ConditionProgressing]
	if o.cleanup != nil {
		c[v1alpha1.ConditionCleanupBlocked] = *o.cleanup
	}
	return c
}

// policyHeld is the verdict on a policy of the service that is refused, or waits.
func policyHeld(s Serving) (v verdict, held bool) {
	return yes(v1alpha1.ReasonPolicyNotInForce, "the multiRegionPolicy of the ServiceDescriptor is not in force, the former one is: %s", strings.Join(s.PolicyHeld, "; ")), len(s.PolicyHeld) > 0
}

// details are the conditions that say nothing of an object that is not in force.
var details = []string{v1alpha1.ConditionCredentialsValid, v1alpha1.ConditionSuspended, v1alpha1.ConditionPeersReachable, v1alpha1.ConditionInitialSyncComplete,
	v1alpha1.ConditionCaughtUp, v1alpha1.ConditionReferencesHealthy, v1alpha1.ConditionSearchInSync, v1alpha1.ConditionVerified, v1alpha1.ConditionDegraded}

// leaving is the verdict on an object whose data is about to be dropped: nothing serves it any more.
func (o observation) leaving() map[string]verdict {
	c := map[string]verdict{
		v1alpha1.ConditionConflict:    no(v1alpha1.ReasonUnique, "no other object declares %s", o.deployment.Key),
		v1alpha1.ConditionReady:       no(v1alpha1.ReasonDeleting, "this Deployment is deleted and its data is about to be dropped"),
		v1alpha1.ConditionStalled:     no(v1alpha1.ReasonDeleting, "nothing needs a person"),
		v1alpha1.ConditionProgressing: yes(v1alpha1.ReasonDeleting, "the data is about to be dropped"),
	}
	c[v1alpha1.ConditionReconciling] = c[v1alpha1.ConditionProgressing]
	for _, t := range details {
		c[t] = unknown(v1alpha1.ReasonDeleting, "this object is not in force any more")
	}
	if o.cleanup != nil {
		c[v1alpha1.ConditionCleanupBlocked] = *o.cleanup
	}
	return c
}

// refused is the verdict on an object that is not part of the topology: nothing happens for it until someone changes something.
func (o observation) refused() map[string]verdict {
	c := map[string]verdict{}
	for _, t := range details {
		c[t] = unknown(v1alpha1.ReasonPending, "this object is not in force")
	}
	reason := v1alpha1.ReasonInvalid
	c[v1alpha1.ConditionConflict] = no(v1alpha1.ReasonUnique, "no other object declares %s", o.deployment.Key)
	if o.problem.Reason == registry.Conflict {
		reason = v1alpha1.ReasonDuplicate
		c[v1alpha1.ConditionConflict] = yes(reason, "%s", o.problem.Message)
	}
	c[v1alpha1.ConditionReady] = no(reason, "%s", o.problem.Message)
	c[v1alpha1.ConditionStalled] = yes(reason, "%s", o.problem.Message)
	c[v1alpha1.ConditionProgressing] = no(reason, "nothing is done for an object that is not in force")
	c[v1alpha1.ConditionReconciling] = c[v1alpha1.ConditionProgressing]
	return c
}

func (o observation) credentialsValid() verdict {
	switch err := o.credentials; {
	case err == nil:
		return yes(v1alpha1.ReasonAvailable, "the secrets exist and fit")
	case errors.Is(err, registry.ErrSecretNotFound), errors.Is(err, errNotDeclared):
		return no(v1alpha1.ReasonSecretNotFound, "%v", err)
	case errors.Is(err, errBadCertificates):
		return no(v1alpha1.ReasonInvalid, "%v", err)
	default: // the API server did not answer, or may not tell us: that says nothing about the secret
		return unknown(v1alpha1.ReasonPending, "%v", err)
	}
}

// optional reports whether the Deployment works without the credentials that are at fault.
func (o observation) optional() bool { return errors.As(o.credentials, new(optionalError)) }

func (o observation) suspended() verdict {
	switch d := o.deployment; {
	case d.Suspended:
		return yes(v1alpha1.ReasonSuspended, "spec.suspend: all syncing into this Deployment is paused")
	case len(d.SuspendScopes) > 0:
		var scopes []string
		for _, s := range d.SuspendScopes {
			scopes = append(scopes, s.PeerRegion)
		}
		return yes(v1alpha1.ReasonSuspended, "spec.suspendScopes: paused is the syncing from %s", strings.Join(scopes, ", "))
	}
	return no(v1alpha1.ReasonNotSuspended, "nothing is paused")
}

func (o observation) unreachable(p v1alpha1.PeerStatus) bool {
	return p.ContactAge != nil && p.ContactAge.Duration > o.grace
}

// regions returns the regions of the peers for which is holds.
func (o observation) regions(is func(v1alpha1.PeerStatus) bool) []string {
	var regions []string
	for _, p := range o.peers {
		if is(p) {
			regions = append(regions, p.Region)
		}
	}
	return regions
}

func (o observation) peersReachable() verdict {
	if len(o.peers) == 0 {
		return yes(v1alpha1.ReasonNoPeers, "no other region has this service")
	}
	if silent := o.regions(o.unreachable); len(silent) > 0 {
		return no(v1alpha1.ReasonPeerUnreachable, "no answer for more than %s from %s", o.grace, list(silent))
	}
	if waiting := o.regions(func(p v1alpha1.PeerStatus) bool { return p.ContactAge == nil }); len(waiting) > 0 {
		return unknown(v1alpha1.ReasonPending, "waiting for the first answer of %s", list(waiting))
	}
	return yes(v1alpha1.ReasonAvailable, "%s answer", list(o.regions(all)))
}

func (o observation) initialSyncComplete() verdict {
	if len(o.peers) == 0 {
		return yes(v1alpha1.ReasonNoPeers, "no other region has this service")
	}
	missing := func(p v1alpha1.PeerStatus) bool { return p.Freshness == nil }
	if lost := o.regions(func(p v1alpha1.PeerStatus) bool { return missing(p) && o.unreachable(p) }); len(lost) > 0 {
		return unknown(v1alpha1.ReasonPeerUnreachable, "the first copy of %s is not complete, and they do not answer", list(lost))
	}
	if open := o.regions(missing); len(open) > 0 {
		return no(v1alpha1.ReasonSyncing, "the first copy of %s is not complete", list(open))
	}
	return yes(v1alpha1.ReasonInSync, "the first copy of %s is complete", list(o.regions(all)))
}

// inSync reports whether the copy of a peer is within the objective.
func (o observation) inSync(p v1alpha1.PeerStatus) bool {
	return p.Freshness != nil && (o.deployment.LagObjective == 0 || p.Freshness.Duration <= o.deployment.LagObjective)
}

func (o observation) caughtUp() verdict {
	if len(o.peers) == 0 {
		return yes(v1alpha1.ReasonNoPeers, "no other region has this service")
	}
	behind := o.regions(func(p v1alpha1.PeerStatus) bool { return !o.inSync(p) })
	if len(behind) == 0 {
		return yes(v1alpha1.ReasonInSync, "%s are copied within %s", list(o.regions(all)), o.deployment.LagObjective)
	}
	// What a peer that does not answer has written since is not known, so neither is our distance from it.
	if answering := o.regions(func(p v1alpha1.PeerStatus) bool { return !o.inSync(p) && !o.unreachable(p) }); len(answering) == 0 {
		return unknown(v1alpha1.ReasonPeerUnreachable, "%s do not answer", list(behind))
	}
	switch {
	case len(o.regions(func(p v1alpha1.PeerStatus) bool { return p.Freshness == nil })) > 0:
		return no(v1alpha1.ReasonSyncing, "%s are not copied yet, or not within %s", list(behind), o.deployment.LagObjective)
	case o.suspended().status == metav1.ConditionTrue:
		return no(v1alpha1.ReasonSuspended, "%s are copied later than %s while syncing is paused", list(behind), o.deployment.LagObjective)
	}
	return no(v1alpha1.ReasonLagging, "%s are copied later than %s", list(behind), o.deployment.LagObjective)
}

func (o observation) referencesHealthy() verdict {
	r := o.serving.References
	switch {
	case r == nil:
		return unknown(v1alpha1.ReasonPending, "nothing works on references here yet")
	case r.Dangling > 0:
		return no(v1alpha1.ReasonDangling, "%d committed references were found to point to nothing: the log names them", r.Dangling)
	case r.Oldest <= o.overdue:
		return yes(v1alpha1.ReasonHealthy, "no reference is known to dangle, and no work on references is older than %s", o.overdue)
	case len(r.Unreachable) > 0: // what waits for others is not our failure
		return unknown(v1alpha1.ReasonPeerUnreachable, "work on references waits for %s", list(r.Unreachable))
	}
	return no(v1alpha1.ReasonOverdue, "work on references (%s) is not done for more than %s", r.OldestKind, o.overdue)
}

func (o observation) searchInSync() verdict {
	objective, s := o.deployment.LagObjective, o.serving.Search
	switch {
	case o.deployment.Search.Name == "":
		return yes(v1alpha1.ReasonNotConfigured, "spec.search is not set: there is no search")
	case s == nil:
		return unknown(v1alpha1.ReasonPending, "nothing fills the search store here yet")
	case s.Mismatched > 0:
		return no(v1alpha1.ReasonDiffers, "%d documents were not those of their rows when they were last verified", s.Mismatched)
	case s.Freshness == nil:
		return no(v1alpha1.ReasonSyncing, "the search store is not filled, or does not answer")
	case objective > 0 && s.Freshness.Duration > objective:
		return no(v1alpha1.ReasonLagging, "the search store follows later than %s", objective)
	}
	return yes(v1alpha1.ReasonInSync, "the search store follows within %s", objective)
}

func (o observation) verified() verdict {
	if len(o.peers) == 0 {
		return yes(v1alpha1.ReasonNoPeers, "no other region has this service")
	}
	var differ, missing, stale, silent []string
	for _, p := range o.peers {
		switch v, ok := o.serving.Verified[p.Region]; {
		case ok && v.Mismatched > 0:
			differ = append(differ, fmt.Sprintf("%s (%d)", p.Region, v.Mismatched))
		case ok && o.now.Sub(v.Finished) <= o.serving.VerifyStale:
		case o.unreachable(p):
			silent = append(silent, p.Region)
		case !ok:
			missing = append(missing, p.Region)
		default:
			stale = append(stale, p.Region)
		}
	}
	switch {
	case len(differ) > 0:
		return no(v1alpha1.ReasonDiffers, "copies that are not what their owners have were found in the last pass: %s", list(differ))
	case len(silent) > 0:
		return unknown(v1alpha1.ReasonPeerUnreachable, "%s do not answer, so their copies cannot be verified", list(silent))
	case o.serving.VerifyStale <= 0 && len(missing)+len(stale) > 0:
		return unknown(v1alpha1.ReasonNotConfigured, "copies are not verified by themselves: declare a Verification")
	case len(missing) > 0:
		return unknown(v1alpha1.ReasonPending, "the copies of %s are not verified yet", list(missing))
	case len(stale) > 0:
		return unknown(v1alpha1.ReasonStale, "the copies of %s were verified more than %s ago", list(stale), o.serving.VerifyStale)
	}
	return yes(v1alpha1.ReasonEqual, "the copies of %s are what their owners have", list(o.regions(all)))
}

// verifiedThrough returns up to when the copies of all peers are verified; zero while those of one are not.
func (o observation) verifiedThrough() (through time.Time) {
	for i, p := range o.peers {
		t := o.serving.Verified[p.Region].Through
		if t.IsZero() {
			return t
		}
		if i == 0 || t.Before(through) {
			through = t
		}
	}
	return through
}

// stalled: what only a person can change.
func (o observation) stalled(c map[string]verdict) verdict {
	switch credentials := c[v1alpha1.ConditionCredentialsValid]; {
	case o.service == nil:
		return yes(v1alpha1.ReasonDescriptorNotFound, "no ServiceDescriptor in force declares %s", o.deployment.Service)
	case o.service.Version(o.deployment.Version) == nil:
		return yes(v1alpha1.ReasonDescriptorNotFound, "spec.version: the ServiceDescriptor of %s has no version %s", o.deployment.Service, o.deployment.Version)
	case credentials.status == metav1.ConditionFalse && !o.optional():
		return yes(credentials.reason, "%s", credentials.message)
	}
	return no(v1alpha1.ReasonAvailable, "nothing needs a person")
}

func (o observation) ready(c map[string]verdict) verdict {
	if stalled := c[v1alpha1.ConditionStalled]; stalled.status == metav1.ConditionTrue {
		return no(stalled.reason, "%s", stalled.message)
	}
	switch {
	case o.deployment.Disabled:
		return no(v1alpha1.ReasonDisabled, "spec.disabled: nothing is routed here")
	case o.serving.Err != nil:
		return no(v1alpha1.ReasonDatabaseUnavailable, "%v", o.serving.Err)
	case o.serving.Version == "":
		return unknown(v1alpha1.ReasonPending, "the Deployment is being opened")
	}
	// Fit for reading when the copies are; the first that is not is the reason.
	for _, t := range []string{v1alpha1.ConditionInitialSyncComplete, v1alpha1.ConditionCaughtUp} {
		if v := c[t]; v.status != metav1.ConditionTrue {
			return v
		}
	}
	return yes(v1alpha1.ReasonAvailable, "serving %s; %s", o.serving.Version, c[v1alpha1.ConditionCaughtUp].message)
}

// progressing: a change of the spec is being carried out, and will be without anybody's help.
func (o observation) progressing(c map[string]verdict) verdict {
	switch {
	case c[v1alpha1.ConditionStalled].status == metav1.ConditionTrue || o.deployment.Disabled:
		return no(c[v1alpha1.ConditionReady].reason, "nothing is being done")
	case o.serving.Version != o.deployment.Version:
		return yes(v1alpha1.ReasonPending, "version %s is not served yet", o.deployment.Version)
	case c[v1alpha1.ConditionInitialSyncComplete].status == metav1.ConditionFalse:
		return yes(v1alpha1.ReasonSyncing, "%s", c[v1alpha1.ConditionInitialSyncComplete].message)
	}
	return no(v1alpha1.ReasonAvailable, "the spec is carried out")
}

func all(v1alpha1.PeerStatus) bool { return true }

func list(regions []string) string { return strings.Join(regions, ", ") }

// maxMessage is the API's limit of a condition's message.
const maxMessage = 32768

// setConditions makes verdicts the whole list of conditions, which keeps the times of those that did not change.
func setConditions(conditions *[]metav1.Condition, verdicts map[string]verdict, generation int64) {
	*conditions = slices.DeleteFunc(*conditions, func(c metav1.Condition) bool {
		_, judged := verdicts[c.Type]
		return !judged
	})
	for t, v := range verdicts {
		if len(v.message) > maxMessage {
			v.message = strings.ToValidUTF8(v.message[:maxMessage-4], "") + " ..."
		}
		meta.SetStatusCondition(conditions, metav1.Condition{Type: t, Status: v.status, Reason: v.reason, Message: v.message, ObservedGeneration: generation})
	}
	slices.SortFunc(*conditions, func(a, b metav1.Condition) int { return strings.Compare(a.Type, b.Type) })
}

// event is something that happened to an object, for people who read its events.
type event struct {
	kind, reason, note string
}

// transitions are the changes of conditions that people want to hear of. An empty reason stands for any.
var transitions = []struct {
	condition string
	from, to  metav1.ConditionStatus // from "": any other than to
	reason    string                 // of the condition; "": any
	event     string
	kind      string
}{
	{v1alpha1.ConditionStalled, "", metav1.ConditionTrue, v1alpha1.ReasonDuplicate, "Duplicate", corev1.EventTypeWarning},
	{v1alpha1.ConditionStalled, "", metav1.ConditionTrue, v1alpha1.ReasonInvalid, "Refused", corev1.EventTypeWarning},
	{v1alpha1.ConditionStalled, "", metav1.ConditionTrue, v1alpha1.ReasonDescriptorNotFound, "DescriptorNotFound", corev1.EventTypeWarning},
	{v1alpha1.ConditionCredentialsValid, "", metav1.ConditionFalse, "", "CredentialsInvalid", corev1.EventTypeWarning},
	{v1alpha1.ConditionPeersReachable, "", metav1.ConditionFalse, "", "PeerUnreachable", corev1.EventTypeWarning},
	{v1alpha1.ConditionPeersReachable, metav1.ConditionFalse, metav1.ConditionTrue, "", "PeerRecovered", corev1.EventTypeNormal},
	{v1alpha1.ConditionInitialSyncComplete, "", metav1.ConditionFalse, "", "InitialSyncStarted", corev1.EventTypeNormal},
	{v1alpha1.ConditionInitialSyncComplete, "", metav1.ConditionTrue, v1alpha1.ReasonInSync, "InitialSyncCompleted", corev1.EventTypeNormal},
	{v1alpha1.ConditionCaughtUp, "", metav1.ConditionFalse, v1alpha1.ReasonLagging, "LagObjectiveMissed", corev1.EventTypeWarning},
	{v1alpha1.ConditionDegraded, "", metav1.ConditionTrue, v1alpha1.ReasonQuarantine, "RowQuarantined", corev1.EventTypeWarning},
	{v1alpha1.ConditionDegraded, "", metav1.ConditionTrue, v1alpha1.ReasonPolicyNotInForce, "PolicyNotInForce", corev1.EventTypeWarning},
	{v1alpha1.ConditionReferencesHealthy, "", metav1.ConditionFalse, "", "ReferencesUnhealthy", corev1.EventTypeWarning},
	{v1alpha1.ConditionSearchInSync, "", metav1.ConditionFalse, v1alpha1.ReasonLagging, "SearchLagging", corev1.EventTypeWarning},
	{v1alpha1.ConditionVerified, "", metav1.ConditionFalse, "", "VerificationMismatch", corev1.EventTypeWarning},
	{v1alpha1.ConditionCleanupBlocked, "", metav1.ConditionTrue, "", "CleanupBlocked", corev1.EventTypeWarning},
	{v1alpha1.ConditionSuspended, "", metav1.ConditionTrue, "", "Suspended", corev1.EventTypeNormal},
	{v1alpha1.ConditionSuspended, metav1.ConditionTrue, metav1.ConditionFalse, "", "Resumed", corev1.EventTypeNormal},
}

// eventsOf returns what happened between two states of an object's conditions.
func eventsOf(before, after []metav1.Condition) []event {
	var events []event
	for _, t := range transitions {
		now := meta.FindStatusCondition(after, t.condition)
		if now == nil || now.Status != t.to || t.reason != "" && now.Reason != t.reason {
			continue
		}
		was := metav1.ConditionUnknown // a condition that was never set
		if c := meta.FindStatusCondition(before, t.condition); c != nil {
			was = c.Status
		}
		if was != t.to && (t.from == "" || t.from == was) {
			events = append(events, event{t.kind, t.event, now.Message})
		}
	}
	return events
}

// happenings returns what has happened between two looks at what is served. Counts that go down are those of another process.
func happenings(before, after Serving) []event {
	var events []event
	happened := func(is bool, kind, reason, format string, args ...any) {
		if is {
			events = append(events, event{kind, reason, fmt.Sprintf(format, args...)})
		}
	}
	if was, is := before.References, after.References; was != nil && is != nil {
		happened(was.Cascading == 0 && is.Cascading > 0, corev1.EventTypeNormal, "CascadeStarted", "%d deleted resources have others that must be told", is.Cascading)
		happened(was.Cascading > 0 && is.Cascading == 0, corev1.EventTypeNormal, "CascadeCompleted", "all who had to be told of deleted resources have been")
		happened(was.Refused == 0 && is.Refused > 0, corev1.EventTypeWarning, "CascadeBlocked",
			"%d deletions wait because something refers to the resources; they are tried again", is.Refused)
	}
	happened(after.ShardMoves > before.ShardMoves, corev1.EventTypeNormal, "ShardMoved", "shards have moved between nodes; %d are served", after.OwnedShards)
	happened(after.FencedWrites > before.FencedWrites, corev1.EventTypeWarning, "StaleOwnerFenced",
		"%d writes of a node that no longer owns its shards were refused", after.FencedWrites-before.FencedWrites)
	return events
}
