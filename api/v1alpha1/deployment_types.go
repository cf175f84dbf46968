package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Defaults of a DeploymentSpec.
const (
	// DefaultShards is the size of the ring when spec.shards is not set.
	DefaultShards = 4096
	// DefaultDSNKey is the key of the database Secret when database.secretRef.key is not set.
	DefaultDSNKey = "dsn"
	// DefaultTrustDomain is the trust domain when tls.trustDomain is not set.
	DefaultTrustDomain = "db-controller"
)

// Keys of the Secret that spec.tls.secretRef names, as of kubernetes.io/tls.
const (
	TLSCertKey = "tls.crt"
	TLSKeyKey  = "tls.key"
	TLSCAKey   = "ca.crt"
)

// DeploymentSpec declares one service in one region.
type DeploymentSpec struct {
	// Service is the name of the ServiceDescriptor's service, for example packages.example.com. Immutable.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+$`
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the service of a Deployment cannot change: declare a new Deployment and remove this one"
	Service string `json:"service"`

	// Region is where this Deployment runs. There is one Deployment per service and region. Immutable: rows carry the name of
	// the region that owns them.
	// +kubebuilder:validation:MaxLength=30
	// +kubebuilder:validation:Pattern=`^[a-z]([-a-z0-9]*[a-z0-9])?$`
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="the region of a Deployment cannot change: declare a Deployment in the new region and remove this one"
	Region string `json:"region"`

	// Version is the API version of the service that this Deployment serves; the ServiceDescriptor must declare it.
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:Pattern=`^v[0-9]+((alpha|beta)[0-9]+)?$`
	Version string `json:"version"`

	// Endpoint is the base URL of this Deployment's API server, as other regions reach it, for example https://eu.packages.example.com:8443.
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="isURL(self) && url(self).getScheme() in ['http', 'https'] && url(self).getHostname() != ''",message="endpoint must be an http or https URL with a host, for example https://eu.packages.example.com:8443"
	// +kubebuilder:validation:XValidation:rule="!self.contains('?') && !self.contains('#') && !self.contains('@')",message="endpoint must have no user, query or fragment"
	Endpoint string `json:"endpoint"`

	// Database is the PostgreSQL database of this Deployment. Only the controller of the same region needs it.
	// +optional
	Database *DatabaseSpec `json:"database,omitempty"`

	// Search is the search store of this Deployment. It follows the database, owned resources and read copies alike. Without it there is no search.
	// +optional
	Search *SearchSpec `json:"search,omitempty"`

	// Cache is a Redis that answers reads in place of the database, where that is right. Without it there is no cache.
	// +optional
	Cache *CacheSpec `json:"cache,omitempty"`

	// TLS is the identity of this Deployment and the authorities that it trusts. Without it the API server listens on loopback only.
	// +optional
	TLS *TLSSpec `json:"tls,omitempty"`

	// Shards is the size of the ring over which the names of resources are spread. All Deployments of a service must agree. Immutable.
	// +optional
	// +kubebuilder:default=4096
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65536
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="shards cannot change: every row carries its shard"
	Shards int32 `json:"shards,omitempty"`

	// LagObjective is the freshness that the read copies here should have. Worse than it, CaughtUp becomes False. With several replicas, what one of them knows of the copies of the
	// others is up to the time between two renewals of their Leases (2s) older than it is there, and where nothing is written the owner says so once a second: an objective of
	// less than 4s is missed now and then by the measurement alone.
	// +optional
	// +kubebuilder:default="5s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:Pattern=`^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$`
	// +kubebuilder:validation:XValidation:rule="duration(self) > duration('0s')",message="lagObjective must be more than zero, for example 5s"
	LagObjective *metav1.Duration `json:"lagObjective,omitempty"`

	// Suspend pauses all syncing into this Deployment. It goes on serving, and its clocks go on counting.
	// +optional
	Suspend bool `json:"suspend,omitempty"`

	// SuspendScopes pauses parts of the syncing into this Deployment.
	// +optional
	// +listType=map
	// +listMapKey=peerRegion
	// +kubebuilder:validation:MaxItems=64
	SuspendScopes []SuspendScope `json:"suspendScopes,omitempty"`

	// Disabled takes this Deployment out of use: nothing is routed to it and nobody copies from it or to it. Its data stays.
	// +optional
	Disabled bool `json:"disabled,omitempty"`

	// ReclaimPolicy says what becomes of the data when this object is deleted. Retain leaves everything as it is. Delete drops what db-controller has made:
	// the schemas in the database, what is in the search store and in the cache; it waits while resources here are referred to from elsewhere. Only the
	// controller of the same region acts, and only in Kubernetes: a folder of manifests always retains.
	// +optional
	// +kubebuilder:default=Retain
	// +kubebuilder:validation:Enum=Retain;Delete
	ReclaimPolicy ReclaimPolicy `json:"reclaimPolicy,omitempty"`
}

// ReclaimPolicy says what becomes of the data of a Deployment that is deleted.
type ReclaimPolicy string

// The reclaim policies.
const (
	// ReclaimRetain leaves all data as it is.
	ReclaimRetain ReclaimPolicy = "Retain"
	// ReclaimDelete drops what db-controller has made.
	ReclaimDelete ReclaimPolicy = "Delete"
)

// Finalizer and annotations of a Deployment.
const (
	// CleanupFinalizer keeps a Deployment with reclaimPolicy Delete until its data is dropped.
	CleanupFinalizer = "meta.dbcontroller.io/deployment-cleanup"
	// ForceDeleteAnnotation, when "true", ends the wait of a deletion: the data is dropped even if resources elsewhere refer to it, and if it cannot be
	// dropped at the first attempt the object goes and the data stays.
	ForceDeleteAnnotation = "meta.dbcontroller.io/force-delete"
	// ClosingAnnotation is set by the controller once nothing is in the way of the data of a deleted Deployment: all processes stop serving it. It means
	// nothing unless the object is being deleted with reclaimPolicy Delete.
	ClosingAnnotation = "meta.dbcontroller.io/closing"
	// RequestedAtAnnotation asks for a look at once; any new value will do. status.lastHandledRequestAt has it when that was done.
	RequestedAtAnnotation = "meta.dbcontroller.io/requested-at"
)

// Closing reports whether the object is being deleted and its data is about to be dropped: it is no part of the topology any more.
func (d *Deployment) Closing() bool {
	return !d.DeletionTimestamp.IsZero() && d.Spec.ReclaimPolicy == ReclaimDelete && d.Annotations[ClosingAnnotation] != ""
}

// DatabaseSpec says how to reach a PostgreSQL database.
type DatabaseSpec struct {
	// SecretRef names the Secret with the connection string (libpq keywords or URL).
	SecretRef SecretKeyRef `json:"secretRef"`
}

// SearchStoreType is a kind of search stores.
type SearchStoreType string

// The search stores.
const (
	// SearchPostgres is PostgreSQL full text, in a database of its own.
	SearchPostgres SearchStoreType = "Postgres"
	// SearchRedis is Redis, with exact-match, prefix and range indexes. A search for words is refused there.
	SearchRedis SearchStoreType = "Redis"
)

// SearchSpec says how to reach a search store.
type SearchSpec struct {
	// Type of the store.
	// +optional
	// +kubebuilder:default=Postgres
	// +kubebuilder:validation:Enum=Postgres;Redis
	Type SearchStoreType `json:"type,omitempty"`

	// SecretRef names the Secret with the connection string: libpq keywords or URL, or redis://host:6379/0 (rediss:// with TLS).
	SecretRef SecretKeyRef `json:"secretRef"`
}

// CacheSpec says how to reach a Redis server, and what is cached there.
type CacheSpec struct {
	// SecretRef names the Secret with the URL of the server: redis://user:password@host:6379/0, or rediss:// with TLS. It must be a single server, or an
	// address that follows the primary; what it holds may be lost at any time.
	SecretRef SecretKeyRef `json:"secretRef"`

	// Lists are the types whose pages of List are cached too, for example Package: good for those that are listed much more often than they change.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=63
	Lists []string `json:"lists,omitempty"`
}

// SecretKeyRef names one key of a Secret in the namespace of the object.
type SecretKeyRef struct {
	// Name of the Secret.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$`
	Name string `json:"name"`

	// Key in the Secret.
	// +optional
	// +kubebuilder:default=dsn
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Key string `json:"key,omitempty"`
}

// TLSSpec is the identity of a Deployment. Its certificate carries exactly one URI SAN,
// spiffe://<trustDomain>/service/<service>/region/<region>.
type TLSSpec struct {
	// SecretRef names the Secret with the keys tls.crt, tls.key and ca.crt. ca.crt may hold several authorities, so that they can be rotated.
	SecretRef SecretRef `json:"secretRef"`

	// TrustDomain is the first part of the identities that this Deployment has and accepts.
	// +optional
	// +kubebuilder:default=db-controller
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-._a-z0-9]*[a-z0-9])?$`
	TrustDomain string `json:"trustDomain,omitempty"`
}

// SecretRef names a Secret in the namespace of the object.
type SecretRef struct {
	// Name of the Secret.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$`
	Name string `json:"name"`
}

// SuspendScope is a part of the syncing into a Deployment. To pause everything set spec.suspend.
type SuspendScope struct {
	// PeerRegion is the region from which copies are paused.
	// +kubebuilder:validation:MaxLength=30
	// +kubebuilder:validation:Pattern=`^[a-z]([-a-z0-9]*[a-z0-9])?$`
	PeerRegion string `json:"peerRegion"`
}

// DeploymentStatus is what the controller of the Deployment's region observes.
type DeploymentStatus struct {
	// ObservedGeneration is the generation of the spec that this status describes.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// LastHandledRequestAt is the annotation meta.dbcontroller.io/requested-at that was followed last.
	// +optional
	LastHandledRequestAt string `json:"lastHandledRequestAt,omitempty"`

	// Conditions of the Deployment: Ready, Progressing, Reconciling, Stalled, Degraded, Conflict, PeersReachable, InitialSyncComplete, CaughtUp,
	// ReferencesHealthy, SearchInSync, Verified, Suspended, CredentialsValid; and CleanupBlocked while a deletion waits.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// CurrentVersion is the API version that takes writes now.
	// +optional
	CurrentVersion string `json:"currentVersion,omitempty"`

	// Lag is the worst freshness of all peers. Not set while it is unknown.
	// +optional
	Lag *metav1.Duration `json:"lag,omitempty"`

	// PendingRows is the sum of the peers' pendingRows.
	// +optional
	PendingRows int64 `json:"pendingRows,omitempty"`

	// PeersInSync says how many peers are copied within the objective, of how many, for example 2/2.
	// +optional
	PeersInSync string `json:"peersInSync,omitempty"`

	// Peers are the other regions of the service, as seen from here.
	// +optional
	// +listType=map
	// +listMapKey=region
	Peers []PeerStatus `json:"peers,omitempty"`

	// Verified is the time up to which the copies of all peers are verified by content, without a gap. Not set before the first pass over each.
	// +optional
	Verified *metav1.Time `json:"verified,omitempty"`

	// Shards are the shards of the ring, as served in this region.
	// +optional
	Shards *ShardsStatus `json:"shards,omitempty"`
}

// PeerStatus says how well this region follows another one.
type PeerStatus struct {
	// Region of the peer.
	Region string `json:"region"`

	// ContactAge is the time since the peer last answered. Not set before its first answer.
	// +optional
	ContactAge *metav1.Duration `json:"contactAge,omitempty"`

	// Freshness is the age of the peer's state that is completely applied here. Not set before the first copy is complete.
	// +optional
	Freshness *metav1.Duration `json:"freshness,omitempty"`

	// ApplyLag is the age of the oldest change that is received here and not applied; zero without one.
	// +optional
	ApplyLag *metav1.Duration `json:"applyLag,omitempty"`

	// PendingRows is the number of rows known to differ from the peer's.
	// +optional
	PendingRows int64 `json:"pendingRows,omitempty"`

	// Verified is the peer's time up to which its copies are verified by content, without a gap.
	// +optional
	Verified *metav1.Time `json:"verified,omitempty"`
}

// ShardsStatus counts shards.
type ShardsStatus struct {
	// Total is the size of the ring.
	Total int32 `json:"total"`

	// Owned is how many of them a live node of this region serves. Less than total: copies of the rest do not move.
	Owned int32 `json:"owned"`

	// Summary is owned/total, for example 4096/4096.
	// +optional
	Summary string `json:"summary,omitempty"`
}

// Deployment is one service in one region: the owner of one database. Its short name is dbd, because kubectl's
// "deployments" are those of apps.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=dbd,categories=dbc
// +kubebuilder:printcolumn:name="Service",type=string,JSONPath=`.spec.service`
// +kubebuilder:printcolumn:name="Region",type=string,JSONPath=`.spec.region`
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.status.currentVersion`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Lag",type=string,JSONPath=`.status.lag`
// +kubebuilder:printcolumn:name="Peers",type=string,JSONPath=`.status.peersInSync`
// +kubebuilder:printcolumn:name="Shards",type=string,JSONPath=`.status.shards.summary`
// +kubebuilder:printcolumn:name="Pending",type=integer,JSONPath=`.status.pendingRows`,priority=1
// +kubebuilder:printcolumn:name="Verified",type=date,JSONPath=`.status.verified`,priority=1
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Deployment struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec DeploymentSpec `json:"spec"`
	// +optional
	Status DeploymentStatus `json:"status,omitempty"`
}

// DeploymentList is a list of Deployments.
//
// +kubebuilder:object:root=true
type DeploymentList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Deployment `json:"items"`
}
