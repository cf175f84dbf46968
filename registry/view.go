package registry

import (
	"cmp"
	"iter"
	"maps"
	"slices"

	"github.com/dbcontroller/db-controller/descriptor"
)

// View is the topology at one moment. It never changes, so it may be kept and read by any number of goroutines.
type View struct {
	deployments map[Key]Deployment
	services    map[string]*descriptor.Service
}

var emptyView = &View{}

// Deployment returns the Deployment of a service in a region.
func (v *View) Deployment(k Key) (Deployment, bool) {
	d, ok := v.deployments[k]
	return d, ok
}

// Deployments returns all Deployments, ordered by service and region.
func (v *View) Deployments() []Deployment {
	return slices.SortedFunc(maps.Values(v.deployments), func(a, b Deployment) int { return a.Compare(b.Key) })
}

// DeploymentsOf returns the Deployments of one service, ordered by region.
func (v *View) DeploymentsOf(service string) []Deployment {
	return slices.DeleteFunc(v.Deployments(), func(d Deployment) bool { return d.Service != service })
}

// Service returns the compiled descriptor of a service.
func (v *View) Service(name string) (*descriptor.Service, bool) {
	s, ok := v.services[name]
	return s, ok
}

// Services returns all services, ordered by name.
func (v *View) Services() []*descriptor.Service {
	return slices.SortedFunc(maps.Values(v.services), compareServices)
}

func compareServices(a, b *descriptor.Service) int { return cmp.Compare(a.Name, b.Name) }

// Event is a change of the topology: one of SyncEvent, ServiceSetEvent, DeploymentRemovedEvent, DeploymentSetEvent and
// ServiceRemovedEvent.
type Event interface{ event() }

// SyncEvent is the complete view that a subscriber starts from.
type SyncEvent struct{ View *View }

// ServiceSetEvent says that a service is new or changed. Previous is nil when it is new.
type ServiceSetEvent struct{ Service, Previous *descriptor.Service }

// ServiceRemovedEvent says that a service is gone.
type ServiceRemovedEvent struct{ Previous *descriptor.Service }

// DeploymentSetEvent says that a Deployment is new or changed. Previous is nil when it is new.
type DeploymentSetEvent struct {
	Deployment Deployment
	Previous   *Deployment
}

// DeploymentRemovedEvent says that a Deployment is gone.
type DeploymentRemovedEvent struct{ Previous Deployment }

func (SyncEvent) event()              {}
func (ServiceSetEvent) event()        {}
func (ServiceRemovedEvent) event()    {}
func (DeploymentSetEvent) event()     {}
func (DeploymentRemovedEvent) event() {}

// changes yields the events that lead from one view to a later one. A service is set before and removed after its Deployments, so
// that who handles a Deployment finds its service; within a kind the order is that of the names.
func changes(from, to *View) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		for _, s := range to.Services() {
			if was := from.services[s.Name]; was != s && !yield(ServiceSetEvent{Service: s, Previous: was}) {
				return
			}
		}
		for _, d := range from.Deployments() {
			if _, ok := to.deployments[d.Key]; !ok && !yield(DeploymentRemovedEvent{Previous: d}) {
				return
			}
		}
		for _, d := range to.Deployments() {
			e := DeploymentSetEvent{Deployment: d}
			if was, ok := from.deployments[d.Key]; ok {
				if was.equal(d) {
					continue
				}
				e.Previous = &was
			}
			if !yield(e) {
				return
			}
		}
		for _, s := range from.Services() {
			if _, ok := to.services[s.Name]; !ok && !yield(ServiceRemovedEvent{Previous: s}) {
				return
			}
		}
	}
}

func same(a, b *View) bool {
	for range changes(a, b) {
		return false
	}
	return true
}
