// Package constraint keeps references whole: it refuses what would leave one dangling, and carries a deletion to everything that depends on it, in
// this database at once, in others afterwards.
//
// A Deployment decides alone about its own database. What concerns others it asks them before it opens a transaction, never during one, and the
// transaction then checks everything again: what was read is still so, and what others have answered still counts.
//
// Three things always hold:
//
//   - a committed reference pointed, when it was committed, to a resource that existed and was not being deleted
//   - nothing is deleted while a committed reference, or one that may be committed at this moment, forbids it
//   - whoever must act on a deletion hears of it, however late; until then the name stays taken
//
// The Store layer, which every write passes:
//
//	layer.go       the layer: a write is planned, others are asked, and it is handed down; what changed meanwhile is planned again
//	references.go  which references a resource has (pure), and which Deployment owns their targets
//	save.go        new references to other Deployments are established there before the save is committed
//	delete.go      what goes with a deleted resource, who must be asked, and who objects
//	plan.go        the same as a plan over all Deployments, which writes nothing
//
// The nodes do what remains after the commit: they confirm references, finish deletions, and act on those of others.
//
//	node.go        what is due becomes jobs; queue.go: their lanes, one for each Deployment that may be away
//	pending.go     confirmations, owners, expired blockades, deletions that were refused
//	deleting.go    who must be told of a deletion, and when the name is free
//	subscribed.go  deletions of others, and the referrers here
//	metrics.go     both, for people
package constraint
