package constraint

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

const (
	parentField = "name"
	ownersField = "metadata.ownerReferences"
)

// saving is a write of a resource with its references.
type saving struct {
	// place in the batch; a consequence has none.
	place int
	name  descriptor.Name
	write store.Write
	refs  []outgoing
}

// outgoing is a reference on its way: At is not known before it is located.
type outgoing struct {
	store.Reference
	// path is where the user finds it: depends[3].
	path string
	// target is parsed in the version in which we spell it; zero for an owner.
	target descriptor.Name
	// foreign: the target belongs to another Deployment, which must agree to the reference if it is new.
	foreign bool
	// known: the reference has been committed before, and its target's Deployment knows it.
	known bool
}

// constraint is what the core is told about the write.
func (v *saving) constraint() *store.Constraint {
	c := &store.Constraint{}
	for _, o := range v.refs {
		c.References = append(c.References, o.Reference)
	}
	return c
}

// newSaving computes the references of a write (F38): from the body, the parent in the name, and the owners. It does no I/O; view finds the schemas of imported
// services. References to types that opt out are left out (F56). In the write, owners of the same name have become one.
func newSaving(place int, n descriptor.Name, w store.Write, view *registry.View) (*saving, error) {
	v := &saving{place: place, name: n, write: w}
	if err := v.addParent(); err != nil {
		return nil, err
	}
	refs, err := n.Type.References(w.Body)
	if err != nil {
		return nil, &store.Error{Code: store.InvalidArgument, Name: w.Name, Violations: []store.Violation{{Field: "body", Description: "is not a JSON object"}}}
	}
	type key struct{ field, target string }
	seen := make(map[key]bool, len(refs))
	for _, r := range refs {
		k := key{fieldOf(r.FieldPath), r.Name}
		if seen[k] {
			continue
		}
		seen[k] = true
		if err := v.addSchema(k.field, r, view); err != nil {
			return nil, err
		}
	}
	return v, v.addOwners(view)
}

func (v *saving) fail(code store.Code, field, format string, args ...any) error {
	return &store.Error{Code: code, Name: v.name.Full, Violations: []store.Violation{{Field: field, Description: fmt.Sprintf(format, args...)}}}
}

func (v *saving) addParent() error {
	parent := v.name.Parent()
	if parent == "" || v.name.Type.OnParentDeleted == "" {
		return nil
	}
	n, err := v.name.Type.Version().ParseName(parent)
	if err != nil {
		return fmt.Errorf("parent of %s: %w", v.name.Full, err)
	}
	if n.Type.OptOutConstraints {
		return nil
	}
	v.refs = append(v.refs, outgoing{path: parentField, target: n, Reference: store.Reference{
		Field: parentField, Kind: store.ParentReference, Behavior: behaviorOf(string(v.name.Type.OnParentDeleted)), Target: parent,
	}})
	return nil
}

func (v *saving) addSchema(field string, r descriptor.Ref, view *registry.View) error {
	own := v.name.Type.Version()
	in := own
	if r.TargetService != own.Service.Name {
		in = nil
		if service, ok := view.Service(r.TargetService); ok {
			in = service.Version(own.Imports[r.TargetService])
		}
		if in == nil {
			return v.fail(store.FailedPrecondition, r.FieldPath, "version %s of service %s, which this one imports, is not declared: apply its ServiceDescriptor",
				own.Imports[r.TargetService], r.TargetService)
		}
	}
	n, err := in.ParseName(r.Name)
	if err != nil {
		return v.fail(store.InvalidArgument, r.FieldPath, "must be the name of a %s: %v", r.TargetType, err)
	}
	if n.Type.FullName != r.TargetType {
		return v.fail(store.InvalidArgument, r.FieldPath, "must be the name of a %s: %s is the name of a %s", r.TargetType, r.Name, n.Type.FullName)
	}
	if n.Type.OptOutConstraints {
		return nil
	}
	v.refs = append(v.refs, outgoing{path: r.FieldPath, target: n, Reference: store.Reference{
		Field: field, Kind: store.SchemaReference, Behavior: behaviorOf(string(r.OnTargetDeleted)), Target: r.Name,
	}})
	return nil
}

// addOwners merges owners of the same name (spec 2.4) and adds them. They are trusted until the owned-pending handler checks them.
func (v *saving) addOwners(view *registry.View) error {
	var merged []store.OwnerReference
	for i, o := range v.write.Meta.OwnerReferences {
		path := func(field string) string { return fmt.Sprintf("%s[%d].%s", ownersField, i, field) }
		service, typ, ok := strings.Cut(o.Kind, "/")
		switch {
		case !ok || service == "" || typ == "":
			return v.fail(store.InvalidArgument, path("kind"), "must be a full type name, as in packages.example.com/Package")
		case o.Name == "":
			return v.fail(store.InvalidArgument, path("name"), "is required: the name of the owner")
		case o.Version == "":
			return v.fail(store.InvalidArgument, path("version"), "is required: the API version in which the owner's name is written")
		case o.Region == "":
			if o.Region = regionIn(view, service, o.Version, o.Name); o.Region == "" {
				return v.fail(store.InvalidArgument, path("region"), "is required: the metadata.syncing.owningRegion of the owner")
			}
		}
		if j := slices.IndexFunc(merged, func(m store.OwnerReference) bool { return m.Name == o.Name }); j >= 0 {
			was := merged[j]
			o.Controller = o.Controller || was.Controller
			o.RequiresOwnerReference = o.RequiresOwnerReference || was.RequiresOwnerReference
			o.UnsetOnDelete = o.UnsetOnDelete || was.UnsetOnDelete
			merged[j] = o
			continue
		}
		merged = append(merged, o)
	}
	v.write.Meta.OwnerReferences = merged
	for _, o := range merged {
		service, _, _ := strings.Cut(o.Kind, "/")
		v.refs = append(v.refs, outgoing{path: ownersField, Reference: store.Reference{
			Field: ownersField, Kind: store.OwnerRef, At: store.Location{Service: service, Region: o.Region}, Target: o.Name,
		}})
	}
	return nil
}

// regionIn returns the region segment of a name, if its service is known and the name has one.
func regionIn(view *registry.View, service, version, name string) string {
	s, ok := view.Service(service)
	if !ok || s.Version(version) == nil {
		return ""
	}
	n, err := s.Version(version).ParseName(name)
	if err != nil {
		return ""
	}
	region, _ := n.Region()
	return region
}

func behaviorOf(name string) store.Behavior {
	for b := store.Block; b <= store.AllowDangling; b++ {
		if b.String() == name {
			return b
		}
	}
	panic("constraint: no such behavior: " + name) // the descriptor has been compiled
}

// fieldOf returns the path of a field in the schema, depends[], of a place in a body, depends[3].
func fieldOf(path string) string {
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		b.WriteByte(path[i])
		if path[i] == '[' {
			for i++; path[i] != ']'; i++ {
			}
			b.WriteByte(']')
		}
	}
	return b.String()
}

// unsetReference returns a body without any reference to target in a field: an item of a list is removed, another value is cleared. changed is false if there was none. Numbers stay
// as they are written.
func unsetReference(body json.RawMessage, field, target string) (edited json.RawMessage, changed bool, err error) {
	var object map[string]any
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.UseNumber()
	if err := d.Decode(&object); err != nil {
		return nil, false, fmt.Errorf("clear %s: %w", field, err)
	}
	if !unsetIn(object, strings.Split(field, "."), target) {
		return body, false, nil
	}
	edited, err = json.Marshal(object)
	return edited, true, err
}

func unsetIn(value any, path []string, target string) (changed bool) {
	object, ok := value.(map[string]any)
	if !ok {
		return false
	}
	name, list := strings.CutSuffix(path[0], "[]")
	value, last := object[name], len(path) == 1
	if !list {
		if !last {
			return unsetIn(value, path[1:], target)
		}
		if value != target {
			return false
		}
		delete(object, name)
		return true
	}
	items, ok := value.([]any)
	if !ok {
		return false
	}
	if !last {
		for _, item := range items {
			changed = unsetIn(item, path[1:], target) || changed
		}
		return changed
	}
	kept := slices.DeleteFunc(items, func(item any) bool { return item == target })
	object[name] = kept
	return len(kept) < len(items)
}

// places knows which region owns a name. For our own service its policies say so. Of other services we know less than they do: one of their Deployments is
// asked, and corrects us; what it says holds for everything under the same policy holder. It is safe for concurrent use.
type places struct {
	cfg LayerConfig

	mu      sync.RWMutex
	learned map[placeKey]string
}

// placeKey is what has one owning region, besides names that have it in them. Without a holder it is the service's global resources.
type placeKey struct{ service, holder string }

// maxPlaces bounds the memory; beyond it everything is learned again.
const maxPlaces = 100_000

func newPlaces(cfg LayerConfig) *places { return &places{cfg: cfg, learned: map[placeKey]string{}} }

func keyOfPlace(n descriptor.Name) placeKey {
	return placeKey{n.Type.Version().Service.Name, n.HolderName()}
}

// own returns the owning region of a name of our service.
func (p *places) own(ctx context.Context, n descriptor.Name, batch []store.Write) (string, error) {
	if region, ok := n.Region(); ok {
		return region, nil
	}
	return p.cfg.Owner(ctx, n, batch)
}

// other returns the region of the Deployment to ask about a name of another service. It reports false if there is none.
func (p *places) other(view *registry.View, n descriptor.Name) (string, bool) {
	service := n.Type.Version().Service
	deployed := func(region string) bool {
		_, ok := view.Deployment(registry.Key{Service: service.Name, Region: region})
		return ok
	}
	if region, ok := n.Region(); ok {
		return region, deployed(region)
	}
	key := keyOfPlace(n)
	p.mu.RLock()
	region, ok := p.learned[key]
	p.mu.RUnlock()
	switch {
	case ok && deployed(region):
		return region, true
	case key.holder == "" && service.Policy != nil && deployed(service.Policy.DefaultControlRegion()):
		return service.Policy.DefaultControlRegion(), true
	case deployed(p.cfg.Self.Region):
		return p.cfg.Self.Region, true
	}
	for _, d := range view.DeploymentsOf(service.Name) {
		if !d.Disabled {
			return d.Region, true
		}
	}
	return "", false
}

// learn notes that region owns n.
func (p *places) learn(n descriptor.Name, region string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.learned) >= maxPlaces {
		clear(p.learned)
	}
	p.learned[keyOfPlace(n)] = region
}

// locate finds out where the targets of all references are, and which of the references are new. home is where our database stood before anybody was asked. Without
// references to other Deployments it does no I/O (F40).
func (s *Store) locate(ctx context.Context, saves []*saving, batch []store.Write) (home store.Mark, err error) {
	view := s.cfg.View()
	var names []string
	ask := false
	for _, v := range saves {
		foreign := false
		for i := range v.refs {
			if err := s.place(ctx, v, &v.refs[i], view, batch); err != nil {
				return home, err
			}
			foreign = foreign || v.refs[i].foreign
		}
		ask = ask || foreign
		if foreign && v.write.Op != store.Create {
			names = append(names, v.name.Full)
		}
	}
	if !ask {
		return home, nil
	}
	stored, home, err := s.cfg.Core.Outgoing(ctx, names)
	if err != nil {
		return home, err
	}
	for _, v := range saves {
		for i := range v.refs {
			v.refs[i].recognize(stored[v.name.Full], s.cfg.Self.Service)
		}
	}
	return home, nil
}

// place sets where the target of one reference is.
func (s *Store) place(ctx context.Context, v *saving, o *outgoing, view *registry.View, batch []store.Write) error {
	if o.Kind == store.OwnerRef {
		return nil
	}
	dangling := o.Behavior == store.AllowDangling
	service := o.target.Type.Version().Service.Name
	if service != s.cfg.Self.Service {
		region, ok := s.places.other(view, o.target)
		if !ok && !dangling {
			return v.fail(store.FailedPrecondition, o.path, "%s: %s", o.Target, noDeployment(service, region))
		}
		if region == "" {
			region = s.cfg.Self.Region // nobody is asked about a reference that may dangle
		}
		o.At, o.foreign = store.Location{Service: service, Region: region}, !dangling
		return nil
	}
	region, err := s.places.own(ctx, o.target, batch)
	switch {
	case err != nil && store.CodeOf(err) == store.FailedPrecondition && dangling:
		return nil
	case err != nil && store.CodeOf(err) == store.FailedPrecondition:
		return v.fail(store.FailedPrecondition, o.path, "%v", err)
	case err != nil:
		return fmt.Errorf("find the region of %s: %w", o.Target, err)
	case region == s.cfg.Self.Region:
		o.At, o.foreign = store.Location{}, false
		return nil
	}
	if _, ok := view.Deployment(registry.Key{Service: service, Region: region}); !ok && !dangling {
		return v.fail(store.FailedPrecondition, o.path, "%s: %s", o.Target, noDeployment(service, region))
	}
	o.At, o.foreign = store.Location{Service: service, Region: region}, !dangling
	return nil
}

func noDeployment(service, region string) string {
	if region == "" {
		return fmt.Sprintf("service %s has no Deployment anywhere", service)
	}
	return fmt.Sprintf("service %s has no Deployment in region %s: deploy it there, or refer to a resource of another region", service, region)
}

// recognize marks a reference that is among the stored ones as known, with the location under which it was granted. One whose behavior has changed is new:
// the target's Deployment must learn of it. About our own service the policies are right, not what is stored.
func (o *outgoing) recognize(stored []store.Reference, service string) {
	if !o.foreign {
		return
	}
	for _, r := range stored {
		if r.Field != o.Field || r.Target != o.Target || r.Kind != o.Kind || r.Behavior != o.Behavior {
			continue
		}
		if r.At == o.At || r.At.Service == o.At.Service && o.At.Service != service {
			o.At, o.known = r.At, true
			return
		}
	}
}
