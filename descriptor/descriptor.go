// Package descriptor is the schema model of services: what a ServiceDescriptor declares, compiled into what the engine asks.
//
// It promises that a Service that Compile returned is consistent: every name matches at most one pattern, every parent, target and
// policy holder exists, every schema compiles. A descriptor that is not is refused with the path of each fault. After that,
// questions about names, bodies and policies are answered without I/O, and without locks: all values of this package are immutable and safe for
// concurrent use.
//
//	compile.go  ServiceDescriptorSpec -> Service
//	pattern.go  the syntax of name patterns and of ids
//	name.go     names and collections: parse, match, build; the shard of a name
//	policy.go   MultiRegionPolicy and sync types: who owns, who reads
//	search.go   what of a body is searched
//	body.go     bodies: limits, JSON, schema, references, policies
package descriptor

import (
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// Service is a compiled ServiceDescriptor.
type Service struct {
	// Name of the service, for example packages.example.com.
	Name string
	// Policy governs the resources that are under no policy holder; nil without one.
	Policy *Policy
	// Versions in the order of the descriptor; at least one.
	Versions []*Version
}

// Version returns the version of that name, nil if there is none.
func (s *Service) Version(name string) *Version {
	for _, v := range s.Versions {
		if v.Name == name {
			return v
		}
	}
	return nil
}

// Version is one API version of a service.
type Version struct {
	// Name of the version, for example v1.
	Name string
	// Service is the service of this version.
	Service *Service
	// Types in the order of the descriptor; at least one.
	Types []*Type
	// Imports maps the name of an imported service to its version.
	Imports map[string]string

	types map[string]*Type
	root  *node // the trie of all patterns
}

// WithPolicy returns the version with another policy of the service, nil for none. Only its Service differs; its types are the same, and still belong to v.
func (v *Version) WithPolicy(p *Policy) *Version {
	other, service := *v, *v.Service
	service.Policy = p
	other.Service = &service
	return &other
}

// Type returns the type of that short name (Package), nil if there is none.
func (v *Version) Type(name string) *Type { return v.types[name] }

// Type is one resource type.
type Type struct {
	// Name is the short name: Package.
	Name string
	// FullName has the service before it: packages.example.com/Package. Criteria and references across services use it.
	FullName string
	// Plural is the collection segment: packages.
	Plural string
	// Patterns are the forms of its names, with optional segments expanded.
	Patterns []string
	// Parent is the type whose names are prefixes of this type's; nil for a type without one.
	Parent *Type
	// OnParentDeleted is empty without a parent.
	OnParentDeleted v1alpha1.DeleteBehavior
	// ReferenceFields are the fields that hold names of other resources.
	ReferenceFields []ReferenceField
	// Holder is the path of the policy in the body of a policy holder, for example multiRegionPolicy; empty for other types.
	Holder string
	// SyncType is never empty.
	SyncType v1alpha1.SyncType
	// AsyncDeletion: a deleted resource stays readable until its dependents are handled.
	AsyncDeletion bool
	// OptOutConstraints: references from and to this type are not checked.
	OptOutConstraints bool
	// MaxBodyBytes is the largest body, in bytes of JSON; never zero.
	MaxBodyBytes int
	// Search says what of a resource is searched; nil for a type that is not.
	Search *Search

	version  *Version
	patterns []*pattern // parallel to Patterns
	holder   fieldPath
	schema   *bodySchema // nil: any object
}

// Version returns the version that the type belongs to.
func (t *Type) Version() *Version { return t.version }

// IsPolicyHolder reports whether the body of a resource of this type has a policy that governs the resources below it.
func (t *Type) IsPolicyHolder() bool { return t.Holder != "" }

// ReferenceField is a field that holds names of other resources.
type ReferenceField struct {
	// Field is the path in the body; [] follows a list: depends[].
	Field string
	// TargetType is the full name of the target's type: packages.example.com/Package.
	TargetType string
	// TargetService is the service of the target.
	TargetService string
	// Target is the target's type if it belongs to the same service, nil if it is foreign.
	Target *Type
	// TargetVersion is the version of TargetService in which the names are written.
	TargetVersion string
	// OnTargetDeleted says what happens to the referrer.
	OnTargetDeleted v1alpha1.DeleteBehavior

	path fieldPath
}

// Violation is a fault of a resource that its sender can repair.
type Violation struct {
	// Field is the path in the body, for example depends[3]; empty for the body as a whole.
	Field string
	// Description says what is wrong and what to do.
	Description string
}

func (v Violation) String() string {
	if v.Field == "" {
		return v.Description
	}
	return v.Field + ": " + v.Description
}

// Error is why a ServiceDescriptor was refused: every fault with its path.
type Error struct {
	// Faults are never empty.
	Faults field.ErrorList
}

func (e *Error) Error() string { return e.Faults.ToAggregate().Error() }
