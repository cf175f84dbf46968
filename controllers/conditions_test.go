package controllers

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
)

func peer(region string, contact, freshness time.Duration) v1alpha1.PeerStatus {
	p := v1alpha1.PeerStatus{Region: region, ContactAge: &metav1.Duration{Duration: contact}}
	if freshness >= 0 {
		p.Freshness = &metav1.Duration{Duration: freshness}
	}
	return p
}

func TestConditions(t *testing.T) {
	const never = -1
	now := time.Unix(1_000_000, 0)
	well := func() observation {
		return observation{
			deployment: registry.Deployment{Key: registry.Key{Service: "a.example.com", Region: "eu"}, Version: "v1", LagObjective: 5 * time.Second},
			service:    &descriptor.Service{Name: "a.example.com", Versions: []*descriptor.Version{{Name: "v1"}}},
			serving:    Serving{Version: "v1"},
			peers:      []v1alpha1.PeerStatus{peer("us", time.Second, time.Second)},
			grace:      30 * time.Second, overdue: 15 * time.Minute, now: now,
		}
	}
	search := func(freshness time.Duration) func(*observation) {
		return func(o *observation) {
			o.deployment.Search.Name, o.serving.Search = "s", &Search{}
			if freshness != never {
				o.serving.Search.Freshness = &metav1.Duration{Duration: freshness}
			}
		}
	}
	references := func(r References) func(*observation) { return func(o *observation) { o.serving.References = &r } }
	// Finished, in hours ago, and mismatched of us; ap beside it is well.
	verified := func(ago time.Duration, mismatched int64) func(*observation) {
		return func(o *observation) {
			o.peers = append(o.peers, peer("ap", 0, 0))
			o.serving.VerifyStale = 3 * time.Hour
			o.serving.Verified = map[string]Verified{"ap": {now.Add(-time.Hour), now, 0}, "us": {now.Add(-ago), now.Add(-ago), mismatched}}
		}
	}
	for name, c := range map[string]struct {
		change func(*observation)
		want   string
	}{
		"all is well": {func(*observation) {}, "Ready=True/Available CaughtUp=True/InSync Stalled=False/Available Reconciling=False/Available Degraded=False/Available"},
		"alone":       {func(o *observation) { o.peers = nil }, "Ready=True/Available PeersReachable=True/NoPeers InitialSyncComplete=True/NoPeers CaughtUp=True/NoPeers"},
		"no objective": {func(o *observation) { o.deployment.LagObjective = 0; o.peers[0] = peer("us", 0, time.Hour) },
			"CaughtUp=True/InSync"},
		"a peer is silent, the copy old": {func(o *observation) { o.peers[0] = peer("us", time.Minute, time.Minute) },
			"Ready=Unknown/PeerUnreachable PeersReachable=False/PeerUnreachable InitialSyncComplete=True/InSync CaughtUp=Unknown/PeerUnreachable"},
		"a peer is silent, another lags": {func(o *observation) {
			o.peers = append(o.peers, peer("ap", time.Minute, time.Minute), peer("sa", 0, time.Minute))
		},
			"Ready=False/Lagging PeersReachable=False/PeerUnreachable CaughtUp=False/Lagging"},
		"a peer went silent before it was copied": {func(o *observation) { o.peers[0] = peer("us", time.Minute, never) },
			"Ready=Unknown/PeerUnreachable InitialSyncComplete=Unknown/PeerUnreachable Reconciling=False/Available"},
		"lagging while suspended": {func(o *observation) { o.deployment.Suspended = true; o.peers[0] = peer("us", 0, time.Hour) },
			"Ready=False/Suspended Suspended=True/Suspended CaughtUp=False/Suspended Stalled=False/Available"},
		"first copy": {func(o *observation) { o.peers[0] = peer("us", 0, never) },
			"Ready=False/Syncing InitialSyncComplete=False/Syncing Reconciling=True/Syncing Stalled=False/Available"},
		"version missing": {func(o *observation) { o.deployment.Version = "v2" }, "Ready=False/DescriptorNotFound Stalled=True/DescriptorNotFound Reconciling=False/DescriptorNotFound"},
		"secrets not readable now": {func(o *observation) { o.credentials = errors.New("timeout") },
			"Ready=True/Available CredentialsValid=Unknown/Pending Stalled=False/Available"},
		"no secret named": {func(o *observation) { o.credentials = errNotDeclared }, "Ready=False/SecretNotFound Stalled=True/SecretNotFound"},
		"refused": {func(o *observation) {
			o.problem = &registry.Problem{Reason: registry.InvalidDeployment, Message: "spec.shards"}
		},
			"Ready=False/Invalid Conflict=False/Unique Stalled=True/Invalid Reconciling=False/Invalid CaughtUp=Unknown/Pending"},
		"it progresses": {func(o *observation) { o.serving.Version = "" }, "Progressing=True/Pending Reconciling=True/Pending"},
		"nothing known of the details": {func(*observation) {},
			"ReferencesHealthy=Unknown/Pending SearchInSync=True/NotConfigured Verified=Unknown/NotConfigured"},

		"references are well":         {references(References{Cascading: 3, Refused: 2, Oldest: time.Minute}), "ReferencesHealthy=True/Healthy"},
		"a reference dangles":         {references(References{Dangling: 1}), "ReferencesHealthy=False/Dangling Ready=True/Available"},
		"work is overdue":             {references(References{Oldest: time.Hour, OldestKind: "drain"}), "ReferencesHealthy=False/Overdue"},
		"work waits for others":       {references(References{Oldest: time.Hour, Unreachable: []string{"b.example.com/us"}}), "ReferencesHealthy=Unknown/PeerUnreachable"},
		"it dangles, whoever is away": {references(References{Dangling: 1, Oldest: time.Hour, Unreachable: []string{"b.example.com/us"}}), "ReferencesHealthy=False/Dangling"},

		"search follows":        {search(time.Second), "SearchInSync=True/InSync"},
		"search lags":           {search(time.Minute), "SearchInSync=False/Lagging Ready=True/Available"},
		"search is not filled":  {search(never), "SearchInSync=False/Syncing"},
		"search is not started": {func(o *observation) { o.deployment.Search.Name = "s" }, "SearchInSync=Unknown/Pending"},

		"verified":            {verified(time.Hour, 0), "Verified=True/Equal"},
		"copies differ":       {verified(time.Hour, 7), "Verified=False/Differs"},
		"the pass is old":     {verified(4*time.Hour, 0), "Verified=Unknown/Stale"},
		"an old difference":   {verified(4*time.Hour, 1), "Verified=False/Differs"},
		"the first pass runs": {func(o *observation) { o.serving.VerifyStale = time.Hour }, "Verified=Unknown/Pending"},
		"verified, and the peer is silent for longer": {func(o *observation) {
			verified(4*time.Hour, 0)(o)
			o.peers[0] = peer("us", time.Hour, time.Hour)
		}, "Verified=Unknown/PeerUnreachable"},
		"verified, and the peer is silent since": {func(o *observation) {
			verified(time.Hour, 0)(o)
			o.peers[0] = peer("us", time.Minute, time.Minute)
		}, "Verified=True/Equal CaughtUp=Unknown/PeerUnreachable"},

		"the cache's secret is missing": {func(o *observation) { o.credentials = optionalError{registry.ErrSecretNotFound} },
			"CredentialsValid=False/SecretNotFound Degraded=True/SecretNotFound Stalled=False/Available Ready=True/Available"},
		"the policy of the service would orphan resources": {func(o *observation) { o.serving.PolicyHeld = []string{"region eu still owns 2 resources"} },
			"Degraded=True/PolicyNotInForce Stalled=False/Available Ready=True/Available"},
		"deleted, and referred to": {func(o *observation) { o.cleanup = new(yes(v1alpha1.ReasonReferenced, "x")) },
			"CleanupBlocked=True/Referenced Ready=True/Available"},
		"about to be dropped": {func(o *observation) { o.closing, o.cleanup = true, new(yes(v1alpha1.ReasonInUse, "x")) },
			"CleanupBlocked=True/InUse Ready=False/Deleting Progressing=True/Deleting Stalled=False/Deleting Verified=Unknown/Deleting"},
		"disabled": {func(o *observation) { o.deployment.Disabled = true }, "Ready=False/Disabled Stalled=False/Available Reconciling=False/Disabled"},
	} {
		t.Run(name, func(t *testing.T) {
			o := well()
			c.change(&o)
			got := o.conditions()
			if n := 14 + strings.Count(c.want, "CleanupBlocked="); len(got) != n {
				t.Errorf("%d conditions, want all %d", len(got), n)
			}
			for condition := range strings.FieldsSeq(c.want) {
				kind, _, _ := strings.Cut(condition, "=")
				if is := fmt.Sprintf("%s=%s/%s", kind, got[kind].status, got[kind].reason); is != condition {
					t.Errorf("%s (%s), want %s", is, got[kind].message, condition)
				}
			}
		})
	}
}

func TestLongMessagesAreCut(t *testing.T) {
	var conditions []metav1.Condition
	setConditions(&conditions, map[string]verdict{"Ready": no("Invalid", "%s", strings.Repeat("ä", maxMessage))}, 1)
	if m := conditions[0].Message; len(m) > maxMessage || !strings.HasSuffix(m, "ä ...") {
		t.Errorf("message of %d bytes ends with %q", len(m), m[len(m)-8:])
	}
}

// Conditions that nobody judges any more go, those that are cured change, and times move with the status alone.
func TestConditionsAreReplaced(t *testing.T) {
	var conditions []metav1.Condition
	setConditions(&conditions, map[string]verdict{"Ready": no("Lagging", "a"), "CleanupBlocked": yes("InUse", "b")}, 1)
	long := metav1.NewTime(time.Now().Add(-time.Hour))
	for i := range conditions {
		conditions[i].LastTransitionTime = long
	}
	setConditions(&conditions, map[string]verdict{"Ready": no("Syncing", "c")}, 2)
	if len(conditions) != 1 || conditions[0].Reason != "Syncing" || conditions[0].ObservedGeneration != 2 || conditions[0].LastTransitionTime != long {
		t.Errorf("%+v", conditions)
	}
	setConditions(&conditions, map[string]verdict{"Ready": yes("Available", "d")}, 2)
	if conditions[0].LastTransitionTime == long {
		t.Error("the status changed and its time did not")
	}
}

func TestHappenings(t *testing.T) {
	refs := func(cascading, refused int) Serving {
		return Serving{References: &References{Cascading: cascading, Refused: refused}}
	}
	for name, c := range map[string]struct {
		before, after Serving
		want          string
	}{
		"nothing":                     {refs(1, 1), refs(2, 3), ""},
		"a cascade":                   {refs(0, 0), refs(2, 0), "CascadeStarted"},
		"it ends":                     {refs(2, 1), refs(0, 0), "CascadeCompleted"},
		"it is blocked":               {refs(2, 0), refs(2, 1), "CascadeBlocked"},
		"nodes begin":                 {Serving{}, refs(2, 1), ""},
		"nodes end":                   {refs(2, 1), Serving{}, ""},
		"shards move":                 {Serving{ShardMoves: 1}, Serving{ShardMoves: 2}, "ShardMoved"},
		"a stale owner is fenced":     {Serving{FencedWrites: 1}, Serving{FencedWrites: 4}, "StaleOwnerFenced"},
		"another process counts less": {Serving{FencedWrites: 3, ShardMoves: 5}, Serving{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, e := range happenings(c.before, c.after) {
				got = append(got, e.reason)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("%v, want %s", got, c.want)
			}
		})
	}
}

// One event for each transition, none while a state lasts.
func TestEventsAreOfTransitions(t *testing.T) {
	status := func(kind string, s metav1.ConditionStatus, reason string) []metav1.Condition {
		return []metav1.Condition{{Type: kind, Status: s, Reason: reason}}
	}
	for name, c := range map[string]struct {
		before, after []metav1.Condition
		want          string
	}{
		"a mismatch is found":     {status("Verified", "True", "Equal"), status("Verified", "False", "Differs"), "VerificationMismatch"},
		"it is still there":       {status("Verified", "False", "Differs"), status("Verified", "False", "Differs"), ""},
		"it is cured":             {status("Verified", "False", "Differs"), status("Verified", "True", "Equal"), ""},
		"the first look is well":  {nil, status("PeersReachable", "True", "Available"), ""},
		"a peer comes back":       {status("PeersReachable", "False", "PeerUnreachable"), status("PeersReachable", "True", "Available"), "PeerRecovered"},
		"search is filled first":  {nil, status("SearchInSync", "False", "Syncing"), ""},
		"search lags":             {status("SearchInSync", "True", "InSync"), status("SearchInSync", "False", "Lagging"), "SearchLagging"},
		"a deletion is held up":   {nil, status("CleanupBlocked", "True", "Referenced"), "CleanupBlocked"},
		"a reference dangles":     {nil, status("ReferencesHealthy", "False", "Dangling"), "ReferencesUnhealthy"},
		"a peer is away for long": {status("CaughtUp", "True", "InSync"), status("CaughtUp", "Unknown", "PeerUnreachable"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, e := range eventsOf(c.before, c.after) {
				got = append(got, e.reason)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("%v, want %s", got, c.want)
			}
		})
	}
}
