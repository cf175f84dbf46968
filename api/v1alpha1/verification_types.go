package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// RepairMode says what a Verification does about differences.
// +kubebuilder:validation:Enum=None;DryRun;Repair
type RepairMode string

// The repair modes.
const (
	// RepairNone lists differences.
	RepairNone RepairMode = "None"
	// RepairDryRun says of each what would be done.
	RepairDryRun RepairMode = "DryRun"
	// RepairRepair writes the owner's rows over copies that differ and deletes those that the owner does not have.
	RepairRepair RepairMode = "Repair"
)

// VerificationSpec says which read copies are compared with what their owners have, once. It cannot change: make another Verification.
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a Verification cannot change: make another one"
type VerificationSpec struct {
	// Service and Region name the Deployment whose read copies are compared.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:MinLength=1
	Service string `json:"service"`
	// +kubebuilder:validation:MaxLength=30
	// +kubebuilder:validation:MinLength=1
	Region string `json:"region"`

	// PeerRegion is the owner of the rows; "@search" is the region's own search store, which is compared with its database. Empty: every other region, and the search store if there is one,
	// one after the other.
	// +optional
	// +kubebuilder:validation:MaxLength=30
	PeerRegion string `json:"peerRegion,omitempty"`

	// Types to compare, by their short names. Empty: all.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=128
	Types []string `json:"types,omitempty"`

	// Repair says what is done about differences.
	// +optional
	// +kubebuilder:default=None
	Repair RepairMode `json:"repair,omitempty"`

	// RowsPerSecond bounds how fast rows are read; 0 is no limit. Whatever it is, the databases are left alone for as long as they are read.
	// +optional
	// +kubebuilder:validation:Minimum=0
	RowsPerSecond int32 `json:"rowsPerSecond,omitempty"`
}

// VerificationPhase is where a Verification stands.
type VerificationPhase string

// The phases.
const (
	// VerificationRunning: rows are compared, or the next try is due.
	VerificationRunning VerificationPhase = "Running"
	// VerificationSucceeded: all copies are what their owners have, or were repaired.
	VerificationSucceeded VerificationPhase = "Succeeded"
	// VerificationFailed: differences are left, or it could not be carried out at all.
	VerificationFailed VerificationPhase = "Failed"
)

// VerificationStatus is what a Verification has found.
type VerificationStatus struct {
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// +optional
	Phase VerificationPhase `json:"phase,omitempty"`
	// Conditions has Succeeded: Unknown while it runs.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Scope is the pair or pairs, for people: us<-eu.
	// +optional
	Scope string `json:"scope,omitempty"`
	// Progress is how much of the owners' tables has been read, for people: 73%.
	// +optional
	Progress string `json:"progress,omitempty"`
	// RemainingTime is an estimate for the region that is being compared.
	// +optional
	RemainingTime *metav1.Duration `json:"remainingTime,omitempty"`
	// Compared rows, Differences among them that a second look confirmed, and those of them that were Repaired.
	// +optional
	Compared int64 `json:"compared,omitempty"`
	// +optional
	Differences int64 `json:"differences,omitempty"`
	// +optional
	Repaired int64 `json:"repaired,omitempty"`
	// VerifiedThrough is the owners' time up to which everything is here; only set after success.
	// +optional
	VerifiedThrough *metav1.Time `json:"verifiedThrough,omitempty"`
	// Peers are the regions that are compared.
	// +optional
	// +listType=map
	// +listMapKey=region
	Peers []VerificationPeer `json:"peers,omitempty"`
	// Found are the first 100 differences.
	// +optional
	// +listType=atomic
	Found []RowDifference `json:"found,omitempty"`
}

// VerificationPeer is where the comparison with one region stands.
type VerificationPeer struct {
	Region string `json:"region"`
	// State is what the pass is resumed with; it is of no use to people.
	// +optional
	State string `json:"state,omitempty"`
	// +optional
	Finished bool `json:"finished,omitempty"`
}

// RowDifference is a copy that is not what its owner has.
type RowDifference struct {
	PeerRegion string `json:"peerRegion"`
	Name       string `json:"name"`
	Type       string `json:"type"`
	// Kind is missing, extra, stale, ahead, content or owner.
	Kind string `json:"kind"`
	// Behind: the copies had not received this change when the pass stopped waiting for it.
	// +optional
	Behind bool `json:"behind,omitempty"`
	// Action is what was done, or would be.
	// +optional
	Action string `json:"action,omitempty"`
	// +optional
	Repaired bool `json:"repaired,omitempty"`
}

// ConditionSucceeded says how a one-shot act ended; it is Unknown while the act goes on.
const ConditionSucceeded = "Succeeded"

// Reasons of ConditionSucceeded of a Verification.
const (
	// ReasonRunning: rows are compared.
	ReasonRunning = "Running"
	// ReasonEqual: all copies are what their owners have.
	ReasonEqual = "Equal"
	// ReasonRepaired: they are since differences were repaired.
	ReasonRepaired = "Repaired"
	// ReasonDiffers: differences are left.
	ReasonDiffers = "Differs"
	// ReasonRetrying: the last try met an error and is repeated.
	ReasonRetrying = "Retrying"
)

// Verification compares the read copies of a Deployment with what their owners have, once.
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=verifications,singular=verification,shortName=dbv,categories=dbcontroller
// +kubebuilder:printcolumn:name="Scope",type=string,JSONPath=`.status.scope`
// +kubebuilder:printcolumn:name="Progress",type=string,JSONPath=`.status.progress`
// +kubebuilder:printcolumn:name="Compared",type=integer,JSONPath=`.status.compared`
// +kubebuilder:printcolumn:name="Mismatched",type=integer,JSONPath=`.status.differences`
// +kubebuilder:printcolumn:name="Result",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Verification struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   VerificationSpec   `json:"spec"`
	Status VerificationStatus `json:"status,omitempty"`
}

// VerificationList is a list of Verifications.
// +kubebuilder:object:root=true
type VerificationList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Verification `json:"items"`
}
