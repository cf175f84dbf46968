package fleet

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/controllers"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/syncing"
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
