package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// Limits of the size of a resource body, in bytes of JSON.
const (
	DefaultMaxBodyBytes = 256 << 10
	MaxMaxBodyBytes     = 1 << 20
)

// ServiceDescriptorSpec declares a service: its versions and, in each, its resource types.
type ServiceDescriptorSpec struct {
	// Service is the name of the service: a DNS name of at least two labels, for example packages.example.com. Immutable.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+$`
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the service of a ServiceDescriptor cannot change: declare a new ServiceDescriptor"
	Service string `json:"service"`

	// MultiRegionPolicy governs the global resources of the service: those that are no descendant of a policy holder. Without it
	// they can only be owned by the region in their name.
	// +optional
	MultiRegionPolicy *MultiRegionPolicy `json:"multiRegionPolicy,omitempty"`

	// Versions are the API versions of the service.
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=8
	Versions []ServiceVersion `json:"versions"`
}

// MultiRegionPolicy says in which regions resources live. It is also the shape of a policy holder's field in its body.
// +kubebuilder:validation:XValidation:rule="self.defaultControlRegion in self.enabledRegions",message="defaultControlRegion must be one of enabledRegions"
type MultiRegionPolicy struct {
	// EnabledRegions are the regions where resources may be created and read.
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=30
	// +kubebuilder:validation:items:Pattern=`^[a-z]([-a-z0-9]*[a-z0-9])?$`
	EnabledRegions []string `json:"enabledRegions"`

	// DefaultControlRegion owns the resources that have no region in their name. It must be one of enabledRegions.
	// +kubebuilder:validation:MaxLength=30
	DefaultControlRegion string `json:"defaultControlRegion"`

	// CriteriaForDisabledSync are exceptions: a resource that matches one of them is not copied.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	CriteriaForDisabledSync []DisabledSyncCriterion `json:"criteriaForDisabledSync,omitempty"`
}

// DisabledSyncCriterion matches copies by type, owner and destination. A field that is not set matches everything.
type DisabledSyncCriterion struct {
	// ResourceTypeName is the full name of a type, for example packages.example.com/Package.
	// +optional
	// +kubebuilder:validation:MaxLength=317
	ResourceTypeName string `json:"resourceTypeName,omitempty"`

	// SourceRegion is the region that owns the resource.
	// +optional
	// +kubebuilder:validation:MaxLength=30
	SourceRegion string `json:"sourceRegion,omitempty"`

	// DestRegion is the region that would hold the copy.
	// +optional
	// +kubebuilder:validation:MaxLength=30
	DestRegion string `json:"destRegion,omitempty"`
}

// ServiceVersion is one API version of a service.
type ServiceVersion struct {
	// Name of the version: v1, v2beta1.
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:Pattern=`^v[0-9]+((alpha|beta)[0-9]+)?$`
	Name string `json:"name"`

	// Imports are the services to whose resources this version may refer.
	// +optional
	// +listType=map
	// +listMapKey=service
	// +kubebuilder:validation:MaxItems=32
	Imports []ServiceImport `json:"imports,omitempty"`

	// Resources are the resource types.
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=128
	Resources []ResourceType `json:"resources"`
}

// ServiceImport is a version of another service.
type ServiceImport struct {
	// Service is the name of the imported service.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+$`
	Service string `json:"service"`

	// Version of the imported service in which references to it are written.
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:Pattern=`^v[0-9]+((alpha|beta)[0-9]+)?$`
	Version string `json:"version"`
}

// DeleteBehavior says what happens to a referrer when the target of its reference is deleted.
type DeleteBehavior string

const (
	// DeleteBlock refuses the deletion of the target.
	DeleteBlock DeleteBehavior = "Block"
	// DeleteUnset clears the field: in the deleting transaction in the same database, afterwards in others.
	DeleteUnset DeleteBehavior = "Unset"
	// DeleteCascade deletes the referrer: in the deleting transaction in the same database, afterwards in others.
	DeleteCascade DeleteBehavior = "CascadeDelete"
	// DeleteAsyncUnset clears the field afterwards.
	DeleteAsyncUnset DeleteBehavior = "AsyncUnset"
	// DeleteAsyncCascade deletes the referrer afterwards.
	DeleteAsyncCascade DeleteBehavior = "AsyncCascadeDelete"
	// DeleteAllowDangling does nothing.
	DeleteAllowDangling DeleteBehavior = "AllowDangling"
)

// SyncType says which regions hold copies of a type.
type SyncType string

const (
	// SyncDefault copies to the regions that the policy allows; without a policy everywhere.
	SyncDefault SyncType = "Default"
	// SyncAlwaysInScope copies to all enabled regions of the policy and ignores its criteria; without a policy everywhere.
	SyncAlwaysInScope SyncType = "AlwaysInScope"
	// SyncNever copies nowhere. Only for types under a policy holder.
	SyncNever SyncType = "Never"
	// SyncAlwaysGlobally copies everywhere the service runs, whatever the policy says.
	SyncAlwaysGlobally SyncType = "AlwaysGlobally"
)

// ResourceType is one type of resource.
// +kubebuilder:validation:XValidation:rule="has(self.parent) == has(self.onParentDeleted)",message="parent and onParentDeleted go together: a type with a parent must say what happens when the parent is deleted"
// +kubebuilder:validation:XValidation:rule="!has(self.policyHolder) || !has(self.syncType) || self.syncType != 'Never'",message="a policy holder cannot have syncType Never: other regions need its policy"
type ResourceType struct {
	// Type is the name of the type in CamelCase: Package.
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[A-Z][A-Za-z0-9]*$`
	Type string `json:"type"`

	// Plural is the collection segment in lowerCamelCase: packages.
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z][A-Za-z0-9]*$`
	Plural string `json:"plural"`

	// Patterns are the forms of the type's names: pairs of a collection and an id, for example sections/{section}/packages/{package}.
	// The last collection is the plural. A segment in brackets is optional and stands for two patterns:
	// projects/{project}/[regions/{region}/]secrets/{secret}. The id {region} is the region that owns the resource.
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=8
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=512
	Patterns []string `json:"patterns"`

	// Parent is the type of the resource whose name a name of this type begins with: Section.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[A-Z][A-Za-z0-9]*$`
	Parent string `json:"parent,omitempty"`

	// OnParentDeleted says what happens to a resource when its parent is deleted.
	// +optional
	// +kubebuilder:validation:Enum=Block;CascadeDelete;AsyncCascadeDelete;AllowDangling
	OnParentDeleted DeleteBehavior `json:"onParentDeleted,omitempty"`

	// References are the fields that hold names of other resources.
	// +optional
	// +listType=map
	// +listMapKey=field
	// +kubebuilder:validation:MaxItems=32
	References []ReferenceField `json:"references,omitempty"`

	// PolicyHolder makes this type a policy holder: the policy in its body governs the resources below it, not the holder itself.
	// +optional
	PolicyHolder *PolicyHolder `json:"policyHolder,omitempty"`

	// SyncType says which regions hold copies of the type.
	// +optional
	// +kubebuilder:default=Default
	// +kubebuilder:validation:Enum=Default;AlwaysInScope;Never;AlwaysGlobally
	SyncType SyncType `json:"syncType,omitempty"`

	// AsyncDeletion keeps a deleted resource readable in state DELETING until its dependents are handled.
	// +optional
	AsyncDeletion bool `json:"asyncDeletion,omitempty"`

	// OptOuts leave the type out of parts of the engine.
	// +optional
	OptOuts OptOuts `json:"optOuts,omitempty"`

	// Search makes the resources of the type searchable in each region whose Deployment has a search store.
	// +optional
	Search *ResourceSearch `json:"search,omitempty"`

	// MaxBodyBytes is the largest body of a resource of this type, in bytes of JSON.
	// +optional
	// +kubebuilder:default=262144
	// +kubebuilder:validation:Minimum=1024
	// +kubebuilder:validation:Maximum=1048576
	MaxBodyBytes int32 `json:"maxBodyBytes,omitempty"`

	// Schema is the structural OpenAPI v3 schema of the body, as in a CustomResourceDefinition. Fields that it does not name are refused unless it
	// says x-kubernetes-preserve-unknown-fields. Without a schema the body is any JSON object.
	// +optional
	// +kubebuilder:pruning:PreserveUnknownFields
	Schema *runtime.RawExtension `json:"schema,omitempty"`
}

// ReferenceField is a field that holds the name of another resource.
type ReferenceField struct {
	// Field is the path in the body: source, spec.owner, and with [] after a list: depends[], links[].target.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_]*(\[\])?(\.[A-Za-z_][A-Za-z0-9_]*(\[\])?)*$`
	Field string `json:"field"`

	// Target is the type that the field refers to: Package in this service, or iam.example.com/User in an imported one.
	// +kubebuilder:validation:MaxLength=317
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+/)?[A-Z][A-Za-z0-9]*$`
	Target string `json:"target"`

	// OnTargetDeleted says what happens to the referrer when the target is deleted.
	// +kubebuilder:validation:Enum=Block;Unset;CascadeDelete;AsyncUnset;AsyncCascadeDelete;AllowDangling
	OnTargetDeleted DeleteBehavior `json:"onTargetDeleted"`
}

// PolicyHolder says where a policy holder keeps its policy.
type PolicyHolder struct {
	// Field is the path in the body of an object of the shape of MultiRegionPolicy: multiRegionPolicy, spec.policy.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`
	Field string `json:"field"`
}

// ResourceSearch says what of a resource is searched. Edits apply live: what is stored is searched anew by them.
type ResourceSearch struct {
	// Fields are what full text looks into.
	// +optional
	// +listType=map
	// +listMapKey=path
	// +kubebuilder:validation:MaxItems=16
	Fields []SearchField `json:"fields,omitempty"`

	// Filters are the fields by which a search can be filtered, besides the name.
	// +optional
	// +listType=map
	// +listMapKey=path
	// +kubebuilder:validation:MaxItems=16
	Filters []SearchFilter `json:"filters,omitempty"`

	// Facets are those of the filters whose values a search can count.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=8
	// +kubebuilder:validation:items:MaxLength=253
	Facets []string `json:"facets,omitempty"`
}

// SearchField is a text that is searched.
type SearchField struct {
	// Path in the body: description, spec.title, and with [] after a list: tags[], links[].title. The path name stands for the last id of the resource's name.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_]*(\[\])?(\.[A-Za-z_][A-Za-z0-9_]*(\[\])?)*$`
	Path string `json:"path"`

	// Weight of the field for the order of the hits, from A, the heaviest, to D.
	// +optional
	// +kubebuilder:default=D
	// +kubebuilder:validation:Enum=A;B;C;D
	Weight string `json:"weight,omitempty"`
}

// SearchFilterType is the type of the values of a filter.
type SearchFilterType string

// The types of filters. A value of another type is taken for missing.
const (
	SearchString  SearchFilterType = "String"
	SearchNumber  SearchFilterType = "Number"
	SearchBoolean SearchFilterType = "Boolean"
)

// SearchFilter is a field by which a search can be filtered.
type SearchFilter struct {
	// Path in the body: architecture, spec.size; [] at its end is a list of values: tags[].
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*(\[\])?$`
	Path string `json:"path"`

	// Type of the values.
	// +kubebuilder:validation:Enum=String;Number;Boolean
	Type SearchFilterType `json:"type"`
}

// OptOuts leave a type out of parts of the engine.
type OptOuts struct {
	// DBConstraints: references from and to the type are not checked, and it is never deleted because of another resource.
	// +optional
	DBConstraints bool `json:"dbConstraints,omitempty"`
}

// ServiceDescriptorStatus is what the controller observes.
type ServiceDescriptorStatus struct {
	// ObservedGeneration is the generation of the spec that this status describes.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Conditions of the ServiceDescriptor: Ready, Stalled.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ServiceDescriptor is the schema of a service.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=sd,categories=dbc
// +kubebuilder:printcolumn:name="Service",type=string,JSONPath=`.spec.service`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type ServiceDescriptor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec ServiceDescriptorSpec `json:"spec"`
	// +optional
	Status ServiceDescriptorStatus `json:"status,omitempty"`
}

// ServiceDescriptorList is a list of ServiceDescriptors.
//
// +kubebuilder:object:root=true
type ServiceDescriptorList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ServiceDescriptor `json:"items"`
}
