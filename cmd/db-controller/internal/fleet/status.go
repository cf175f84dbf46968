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
	s := controllers.Serving{Version: m.spec.Version}
	if f.cfg.Manages {
		s.OwnedShards = m.spec.Ring // membership is one process: it has them all
	}
	for _, p := range d.Peers() {
		s.QuarantinedRows += p.Quarantined
	}
	return s
}

func duration(d *time.Duration) *metav1.Duration {
	if d == nil {
		return nil
	}
	return &metav1.Duration{Duration: *d}
}

// verifier returns the Verifier of a Deployment that runs here.
func (f *Fleet) verifier(service, region string) (deployment.Verifier, error) {
	m := f.member(registry.Key{Service: service, Region: region})
	if m == nil {
		return deployment.Verifier{}, fmt.Errorf("no Deployment of %s runs in region %s", service, region)
	}
	d, err := m.state()
	if d == nil {
		return deployment.Verifier{}, errors.Join(fmt.Errorf("the Deployment of %s in region %s is not served yet", service, region), err)
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
