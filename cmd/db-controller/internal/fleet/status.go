package fleet

import (
	"context"
	"errors"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/controllers"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/syncing"
	"github.com/dbcontroller/db-controller/verify"
)

// Status is what /statusz shows of one Deployment.
type Status struct {
	deployment.Status
	// Error says why the Deployment does not run.
	Error string `json:"error,omitempty"`
}

// Status returns the state of all Deployments, ordered by service.
func (f *Fleet) Status() []Status {
	all := []Status{}
	for _, m := range f.all() {
		d, err := m.state()
		s := Status{Status: deployment.Status{Service: m.spec.Service, Region: m.spec.Region, Version: m.spec.Version, Peers: []syncing.PeerStatus{}}}
		if d != nil {
			s.Status = d.Status()
		}
		if err != nil {
			s.Error = err.Error()
		}
		all = append(all, s)
	}
	return all
}

// PeerStatuses implements controllers.StatusSource.
func (f *Fleet) PeerStatuses(service, region string) []v1alpha1.PeerStatus {
	m := f.member(registry.Key{Service: service, Region: region})
	if m == nil {
		return nil
	}
	d, _ := m.state()
	if d == nil {
		return nil
	}
	var peers []v1alpha1.PeerStatus
	for _, p := range d.Peers() {
		peers = append(peers, v1alpha1.PeerStatus{
			Region: p.Region, PendingRows: p.PendingRows,
			ContactAge: duration(p.ContactAge), Freshness: duration(p.Freshness), ApplyLag: duration(p.ApplyLag),
		})
	}
	return peers
}

// Serving implements controllers.StatusSource.
func (f *Fleet) Serving(service, region string) controllers.Serving {
	m := f.member(registry.Key{Service: service, Region: region})
	if m == nil {
		return controllers.Serving{}
	}
	d, err := m.state()
	if d == nil {
		return controllers.Serving{Err: err}
	}
	s := controllers.Serving{Version: m.spec.Version, PolicyHeld: d.PolicyHeld()}
	for _, p := range d.Peers() {
		s.QuarantinedRows += p.Quarantined
	}
	if f.cfg.Manages {
		detail(&s, d)
	}
	return s
}

// staleAfter is how many intervals of the verification may pass before its result says nothing about now: a pass takes some time itself.
const staleAfter = 3

// detail adds what the nodes know.
func detail(s *controllers.Serving, d *deployment.Deployment) {
	if interval := d.VerifyInterval(); interval > 0 {
		s.VerifyStale = max(staleAfter*interval, 10*time.Minute)
	}
	s.Verified = map[string]controllers.Verified{}
	for _, v := range d.Verified() {
		of, again := s.Verified[v.Peer]
		if !again || v.FinishedAt.Before(of.Finished) {
			of.Finished = v.FinishedAt
		}
		if !again || v.Through.Before(of.Through) {
			of.Through = v.Through
		}
		of.Mismatched += v.Differences
		s.Verified[v.Peer] = of
	}
	if r := d.References(); r != nil {
		s.References = &controllers.References{Dangling: r.Dangling, Cascading: r.Cascading, Refused: r.Refused, Oldest: r.Oldest, OldestKind: r.OldestKind}
		for _, at := range r.Unreachable {
			s.References.Unreachable = append(s.References.Unreachable, at.String())
		}
	}
	s.OwnedShards, s.ShardMoves, s.FencedWrites = d.OwnedShards(), d.ShardMoves(), d.FencedWrites()
	if found := d.Search(); found != nil {
		s.Search = &controllers.Search{Freshness: duration(found.Syncing.Freshness), Mismatched: s.Verified[verify.SearchPeer].Mismatched}
	}
}

func duration(d *time.Duration) *metav1.Duration {
	if d == nil {
		return nil
	}
	return &metav1.Duration{Duration: *d}
}

// open returns the open Deployment of a service in a region.
func (f *Fleet) open(service, region string) (*deployment.Deployment, error) {
	m := f.member(registry.Key{Service: service, Region: region})
	if m == nil {
		return nil, fmt.Errorf("no Deployment of %s runs in region %s", service, region)
	}
	d, err := m.state()
	if d == nil {
		return nil, errors.Join(fmt.Errorf("the Deployment of %s in region %s is not served yet", service, region), err)
	}
	return d, nil
}

// verifier returns the Verifier of a Deployment that runs here.
func (f *Fleet) verifier(service, region string) (deployment.Verifier, error) {
	d, err := f.open(service, region)
	if err != nil {
		return deployment.Verifier{}, err
	}
	return d.Verifier(), nil
}

// VerificationPeers implements controllers.Verifier.
func (f *Fleet) VerificationPeers(service, region string) ([]string, error) {
	v, err := f.verifier(service, region)
	if err != nil {
		return nil, err
	}
	return v.Peers(), nil
}

// Verify implements controllers.Verifier.
func (f *Fleet) Verify(ctx context.Context, service, region, peer string, opt verify.Options, from verify.State, report func(verify.Progress) error) (verify.State, error) {
	v, err := f.verifier(service, region)
	if err != nil {
		return from, err
	}
	return v.Verify(ctx, peer, opt, from, report)
}
