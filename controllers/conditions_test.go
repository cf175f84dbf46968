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
	well := func() observation {
		return observation{
			deployment: registry.Deployment{Key: registry.Key{Service: "a.example.com", Region: "eu"}, Version: "v1", LagObjective: 5 * time.Second},
			service:    &descriptor.Service{Name: "a.example.com", Versions: []*descriptor.Version{{Name: "v1"}}},
			serving:    Serving{Version: "v1"},
			peers:      []v1alpha1.PeerStatus{peer("us", time.Second, time.Second)},
			grace:      30 * time.Second,
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
		"disabled": {func(o *observation) { o.deployment.Disabled = true }, "Ready=False/Disabled Stalled=False/Available Reconciling=False/Disabled"},
	} {
		t.Run(name, func(t *testing.T) {
			o := well()
			c.change(&o)
			got := o.conditions()
			if len(got) != 10 {
				t.Errorf("%d conditions, want all 10", len(got))
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
