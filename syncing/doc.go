// Package syncing keeps read copies: it follows every other Deployment of its service and writes into the local database the rows that
// their owners say this region should hold.
//
// A ControllerNode serves a range of shards. It learns from the registry which Deployments there are and runs, for each foreign one
// and each subrange, a remoteNode:
//
//	durable cursor valid? --yes--> live
//	        | no
//	tail from "now", applied at once; meanwhile compare: digests, then the differing names, then their rows, deletions last
//	        \--> save the cursor, live
//
//	controllernode.go  follows the topology; starts and stops peers
//	peer.go            one foreign Deployment: dialing, contact, its remote nodes, its status
//	remotenode.go      the loop of one subrange: session after session, with backoff
//	session.go         one stream: read one frame ahead, apply one at a time, live before bulk
//	compare.go         what to do without a cursor, and the audit of live copies
//	merge.go           pure: two ordered lists of versions -> the names that differ
//	versionset.go      the names that differ, and whether there are any
//	basesyncer.go      fetches what a version set misses and drops what it has too much
//	dbsyncer.go        the local database as the destination of a base syncer
//	localnode.go       the search store of the own region: its subranges, status, drift
//	searchsyncer.go    one subrange of it: follows the local feed, compares, audits; the search store as a destination
//	clocks.go          pure: contact, freshness, apply lag
//	source.go          the wire to the owner, and what its errors mean
//	throttle.go        pure: how well both ends are -> how long bulk work rests, and why
//	metaset.go         what the policies say; metaupdater.go carries it out for the resources owned here
//	metrics.go, status.go
//
// What always holds:
//
//   - only rows owned by the peer are written, and never over a newer version of the same epoch of the owner
//   - a cursor is saved only when everything up to it has been applied, and while comparing not at all
//   - a copy is deleted only on a tombstone, or after the owner was asked for it by name and did not have it, and then only at the
//     version that was seen before the question
//   - a peer that does not answer delays nobody else
//   - per subrange one frame is applied and one more is held; everything behind them waits at the source
//
// Everything may be repeated and may run twice at once: two nodes on the same shards end in the state of one.
package syncing
