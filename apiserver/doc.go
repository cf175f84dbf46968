// Package apiserver is the network surface of one Deployment: resources for users, the feed for other regions.
//
// What it promises:
//
//   - nothing reaches the store that was not validated: names, bodies, masks and sizes are refused here, with the field named
//   - a read is served from the local database; a write is executed by the region that owns the name, to which it is forwarded once. A
//     forwarded write is never forwarded again: if two regions disagree about an owner, the caller hears so
//   - a caller may do what the authorization table says for the identity in its certificate, and nothing else. A region gets only its own
//     feed, whatever its messages say
//   - every request has bounds: time, message size, page size, streams. A slow reader costs a bounded amount of memory and is cut in the end
//   - an error has a code, a sentence and details (AIP-193); of an internal one a caller sees only an id, which the log explains
//
// Without TLS there are no identities: every caller may do everything, and a region is believed who it says it is. That is for
// development, so such a server listens on loopback only, unless told otherwise.
//
//	server.go    listening, stopping
//	access.go    who may call what; what surrounds every call: deadline, metrics, recovery
//	resources.go the Resources service: reads and writes
//	validate.go  requests -> names and store.Writes
//	explain.go   what is known of one resource, over all regions
//	plan.go      what a deletion would take along
//	route.go     the owner of a write, forwarding
//	watch.go     snapshot, then changes
//	feed.go      the Feed service
//	mixin.go     the SchemaMixin service, for other Deployments, and ResourceShadows
//	rest.go      Resources as REST; json.go its flat resources
//	errors.go    errors -> status
//	ops.go       health, status and metrics, for another port
package apiserver
