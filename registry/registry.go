package registry

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
)

// Registry holds the topology. All methods may be called from any goroutine; View and Subscribe take no lock.
type Registry struct {
	state    atomic.Pointer[state]
	problems atomic.Pointer[[]Problem]

	apply sync.Mutex                                 // one Apply at a time
	specs map[string]*v1alpha1.ServiceDescriptorSpec // what each service of the view was compiled from; guarded by apply
}

// state is replaced as a whole; changed is closed when it has been.
type state struct {
	view    *View // nil before the first Apply
	changed chan struct{}
}

// New returns a registry that knows nothing yet.
func New() *Registry {
	r := &Registry{specs: map[string]*v1alpha1.ServiceDescriptorSpec{}}
	r.state.Store(&state{changed: make(chan struct{})})
	r.problems.Store(new([]Problem))
	return r
}

// Snapshot is the full desired state as a source sees it. The objects carry their defaults and satisfy their CRD's validation.
type Snapshot struct {
	// Deployments and Services are in order of seniority: of two objects that claim the same thing, the first one has it.
	Deployments []*v1alpha1.Deployment
	Services    []*v1alpha1.ServiceDescriptor
	// Problems are those that the source found itself; the registry reports them with its own.
	Problems []Problem
}

// ObjectRef names an object of a source.
type ObjectRef struct {
	Kind      string // "Deployment" or "ServiceDescriptor"
	Namespace string
	Name      string
}

// String returns "Kind namespace/name".
func (o ObjectRef) String() string { return o.Kind + " " + o.Namespace + "/" + o.Name }

// RefOf returns the reference to an object.
func RefOf(object any) ObjectRef {
	switch o := object.(type) {
	case *v1alpha1.Deployment:
		return ObjectRef{Kind: "Deployment", Namespace: o.Namespace, Name: o.Name}
	case *v1alpha1.ServiceDescriptor:
		return ObjectRef{Kind: "ServiceDescriptor", Namespace: o.Namespace, Name: o.Name}
	}
	panic(fmt.Sprintf("registry: no object of the topology: %T", object))
}

// Reason says what kind of problem an object has.
type Reason string

// The reasons of a Problem.
const (
	// Conflict: another object, an older one, claims the same service and region, or the same service.
	Conflict Reason = "Conflict"
	// InvalidDescriptor: the descriptor does not compile; the last version that did stays in force.
	InvalidDescriptor Reason = "InvalidDescriptor"
	// InvalidDeployment: the Deployment contradicts others of its service, so it is not part of the topology.
	InvalidDeployment Reason = "InvalidDeployment"
	// InvalidManifest: a manifest cannot be read; the last good state of its objects stays in force.
	InvalidManifest Reason = "InvalidManifest"
)

// Problem says why an object, or a part of a manifest, is not in force.
type Problem struct {
	// Object is what the problem is about; its parts are empty as far as they are unknown.
	Object ObjectRef
	Reason Reason
	// Origin is the place in the source, for example "eu.yaml, document 2"; empty in Kubernetes.
	Origin string
	// Message says for people what is wrong, with the paths of the fields, and what to do.
	Message string
}

// String returns the whole problem in one line.
func (p Problem) String() string {
	where := cmp.Or(p.Origin, p.Object.String())
	if p.Origin != "" && p.Object.Name != "" {
		where += " (" + p.Object.String() + ")"
	}
	return fmt.Sprintf("%s: %s: %s", where, p.Reason, p.Message)
}

// Apply makes the snapshot the known topology, as far as it is valid, and returns what was wrong with it. The first call makes the
// registry synced, so a source calls it only once it has seen everything there is.
func (r *Registry) Apply(s Snapshot) []Problem {
	r.apply.Lock()
	defer r.apply.Unlock()

	was := r.state.Load()
	known := cmp.Or(was.view, emptyView)
	next := &View{deployments: map[Key]Deployment{}, services: map[string]*descriptor.Service{}}
	problems := slices.Clone(s.Problems)

	claimedServices := map[string]ObjectRef{}
	for _, o := range s.Services {
		name, ref := o.Spec.Service, RefOf(o)
		if holder, taken := claimedServices[name]; taken {
			problems = append(problems, conflict(ref, holder, "service "+name))
			continue
		}
		claimedServices[name] = ref
		service, err := r.compile(&o.Spec, known.services[name])
		if err != nil {
			problems = append(problems, Problem{Object: ref, Reason: InvalidDescriptor, Message: err.Error()})
		}
		if service != nil {
			next.services[name] = service
		}
	}
	maps.DeleteFunc(r.specs, func(name string, _ *v1alpha1.ServiceDescriptorSpec) bool { return next.services[name] == nil })

	rings := ringsInUse(known, s.Deployments)
	for _, o := range s.Deployments {
		d := DeploymentOf(o)
		if holder, taken := next.deployments[d.Key]; taken {
			problems = append(problems, conflict(RefOf(o), ObjectRef{"Deployment", holder.Namespace, holder.Name},
				fmt.Sprintf("service %s in region %s", d.Service, d.Region)))
			continue
		}
		if ring, ok := rings[d.Service]; ok && ring != d.Ring {
			problems = append(problems, Problem{Object: RefOf(o), Reason: InvalidDeployment, Message: fmt.Sprintf(
				"spec.shards: %d, but the other Deployments of %s have %d; declare this one with the same number", d.Ring, d.Service, ring)})
			continue
		}
		rings[d.Service] = d.Ring
		next.deployments[d.Key] = d
	}

	r.problems.Store(&problems)
	if was.view == nil || !same(known, next) {
		r.state.Store(&state{view: next, changed: make(chan struct{})})
		close(was.changed)
	}
	return slices.Clone(problems)
}

// compile returns the service that is in force: the compiled spec, or the last good one when spec is the same or does not compile.
func (r *Registry) compile(spec *v1alpha1.ServiceDescriptorSpec, lastGood *descriptor.Service) (*descriptor.Service, error) {
	if lastGood != nil && reflect.DeepEqual(r.specs[spec.Service], spec) {
		return lastGood, nil
	}
	service, err := descriptor.Compile(spec)
	if err != nil {
		return lastGood, err
	}
	r.specs[spec.Service] = spec.DeepCopy()
	return service, nil
}

// ringsInUse returns the ring of each service of which a known Deployment stays. A newcomer must not change it, whatever its seniority.
func ringsInUse(known *View, wanted []*v1alpha1.Deployment) map[string]int {
	rings := map[string]int{}
	for _, o := range wanted {
		d := DeploymentOf(o)
		if k, ok := known.deployments[d.Key]; ok && k.Ring == d.Ring {
			rings[d.Service] = d.Ring
		}
	}
	return rings
}

func conflict(loser, holder ObjectRef, what string) Problem {
	return Problem{Object: loser, Reason: Conflict, Message: fmt.Sprintf(
		"spec: %s is already declared by %s, which is older; delete one of the two", what, holder)}
}

// View returns the present topology; before the first Apply, an empty one.
func (r *Registry) View() *View { return cmp.Or(r.state.Load().view, emptyView) }

// Problems returns what was wrong with the last snapshot.
func (r *Registry) Problems() []Problem { return slices.Clone(*r.problems.Load()) }

// Synced reports whether the topology is known.
func (r *Registry) Synced() bool { return r.state.Load().view != nil }

// WaitSynced blocks until the topology is known. It fails only when ctx ends first, with an error that wraps ctx's.
func (r *Registry) WaitSynced(ctx context.Context) error {
	s := r.state.Load()
	if s.view != nil {
		return nil
	}
	select {
	case <-s.changed: // only ever left for a state with a view
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the topology: %w", context.Cause(ctx))
	}
}

// Subscribe returns the events of the topology. The sequence blocks while nothing changes and ends when ctx does; it may be ranged
// over once by each goroutine that wants its own. No goroutine runs and nothing is held for a consumer that has left the loop.
func (r *Registry) Subscribe(ctx context.Context) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		var seen *View
		for {
			s := r.state.Load()
			for e := range events(seen, s.view) {
				if ctx.Err() != nil || !yield(e) {
					return
				}
			}
			seen = s.view
			select {
			case <-s.changed:
			case <-ctx.Done():
				return
			}
		}
	}
}

func events(seen, now *View) iter.Seq[Event] {
	switch {
	case now == nil:
		return func(func(Event) bool) {}
	case seen == nil:
		return func(yield func(Event) bool) { yield(SyncEvent{View: now}) }
	}
	return changes(seen, now)
}
