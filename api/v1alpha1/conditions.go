package v1alpha1

// Condition types of a Deployment. A controller sets each to Unknown on its first visit and keeps observedGeneration current.
const (
	// ConditionReady says that the Deployment works for its consumers: it serves, and its read copies are within the objective.
	ConditionReady = "Ready"
	// ConditionProgressing says that a change is being carried out: of the spec, or a first copy.
	ConditionProgressing = "Progressing"
	// ConditionReconciling says the same as ConditionProgressing, under the name that kstatus reads.
	ConditionReconciling = "Reconciling"
	// ConditionStalled says that nothing more will happen until someone changes something. kstatus reads it.
	ConditionStalled = "Stalled"
	// ConditionDegraded says that the Deployment works with loss: with rows in quarantine, with a policy of the service that is not the declared one, or without the search store or the cache that it
	// should have. Of a ServiceDescriptor it says that its policy is held back.
	ConditionDegraded = "Degraded"
	// ConditionConflict says that another Deployment object declares the same service and region; the older object wins.
	ConditionConflict = "Conflict"
	// ConditionPeersReachable says that every peer has answered within the grace period.
	ConditionPeersReachable = "PeersReachable"
	// ConditionInitialSyncComplete says that the first copy of every peer's rows is complete.
	ConditionInitialSyncComplete = "InitialSyncComplete"
	// ConditionCaughtUp says that the freshness of every pair is within spec.lagObjective.
	ConditionCaughtUp = "CaughtUp"
	// ConditionReferencesHealthy says that no reference points to nothing and no work on references is overdue. A deletion that is refused because
	// something refers to the resource is as it should be.
	ConditionReferencesHealthy = "ReferencesHealthy"
	// ConditionSearchInSync says that the search store follows the database within spec.lagObjective, or that there is none.
	ConditionSearchInSync = "SearchInSync"
	// ConditionVerified says that the last passes over the copies of all peers found no difference, and are not too old.
	ConditionVerified = "Verified"
	// ConditionCleanupBlocked says why a Deployment that was deleted is still there. Only such a one has it.
	ConditionCleanupBlocked = "CleanupBlocked"
	// ConditionSuspended says that syncing is paused, wholly or in the scopes that the message names.
	ConditionSuspended = "Suspended"
	// ConditionCredentialsValid says that the Secrets the spec names exist and work.
	ConditionCredentialsValid = "CredentialsValid"
)

// A ServiceDescriptor has ConditionReady (it compiles and is in use) and ConditionStalled (it is refused).

// Condition reasons.
const (
	// ReasonPending: not looked at yet, or waiting for the first answer.
	ReasonPending = "Pending"
	// ReasonInSync: everything that the condition asks for holds.
	ReasonInSync = "InSync"
	// ReasonSyncing: the first copy, or a comparison, is running.
	ReasonSyncing = "Syncing"
	// ReasonLagging: the freshness of a pair is over the objective.
	ReasonLagging = "Lagging"
	// ReasonPeerUnreachable: a peer has not answered for longer than the grace period. What depends on it is Unknown, not False.
	ReasonPeerUnreachable = "PeerUnreachable"
	// ReasonNoPeers: there is no other region of this service.
	ReasonNoPeers = "NoPeers"
	// ReasonQuarantine: rows that cannot be applied were set aside.
	ReasonQuarantine = "Quarantine"
	// ReasonPolicyNotInForce: the declared policy of the service would leave resources behind that nobody may own, or it is not known yet whether it would; the former one is in force.
	ReasonPolicyNotInForce = "PolicyNotInForce"
	// ReasonSuspended: spec.suspend, or a scope of it.
	ReasonSuspended = "Suspended"
	// ReasonNotSuspended: nothing is suspended.
	ReasonNotSuspended = "NotSuspended"
	// ReasonDisabled: spec.disabled.
	ReasonDisabled = "Disabled"
	// ReasonSecretNotFound: a Secret, or a key of it, is missing.
	ReasonSecretNotFound = "SecretNotFound"
	// ReasonDatabaseUnavailable: the database refuses connections, or the credentials.
	ReasonDatabaseUnavailable = "DatabaseUnavailable"
	// ReasonDescriptorNotFound: no ServiceDescriptor declares the service, or it lacks spec.version.
	ReasonDescriptorNotFound = "DescriptorNotFound"
	// ReasonDuplicate: an older object declares the same service and region, or the same service.
	ReasonDuplicate = "Duplicate"
	// ReasonUnique: no other object declares the same.
	ReasonUnique = "Unique"
	// ReasonInvalid: the spec is refused; the message has the path of each fault.
	ReasonInvalid = "Invalid"
	// ReasonCompiled: the ServiceDescriptor compiled and is in use.
	ReasonCompiled = "Compiled"
	// ReasonAvailable: the thing that the condition is about works.
	ReasonAvailable = "Available"
	// ReasonNotConfigured: there is no such thing here, so nothing is wrong with it.
	ReasonNotConfigured = "NotConfigured"
	// ReasonHealthy: nothing dangles and nothing is overdue.
	ReasonHealthy = "Healthy"
	// ReasonDangling: a committed reference points to nothing.
	ReasonDangling = "Dangling"
	// ReasonOverdue: work is not done for longer than it should take.
	ReasonOverdue = "Overdue"
	// ReasonStale: what was found out is too old to say anything about now.
	ReasonStale = "Stale"
	// ReasonDeleting: the object is deleted and its data is about to be dropped.
	ReasonDeleting = "Deleting"
	// ReasonReferenced: resources elsewhere refer to resources of this Deployment.
	ReasonReferenced = "Referenced"
	// ReasonInUse: processes still use the database.
	ReasonInUse = "InUse"
	// ReasonCleanupFailed: the data cannot be dropped now.
	ReasonCleanupFailed = "CleanupFailed"
)
