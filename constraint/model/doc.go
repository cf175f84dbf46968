// Package model is the protocol of references between Deployments as a model that can be searched exhaustively: every interleaving of a small world is
// visited, breadth first, until a state violates what is promised, and then the shortest way there is told in words.
//
// The world has one target at its owner, and one or two Deployments with referrers. Nothing has a clock: a blockade may expire at any moment after it was
// granted, a message may take for ever, and a process that crashes is one that never goes on. Each step is one transaction of one database, or touches only the
// memory of one process.
//
//	state.go       what there is: the databases of the owner and the referrers, what their standbys know, the memory of processes, messages
//	rules.go       what can happen: the protocol
//	invariants.go  what must hold
//	world.go       the configurations that are searched, with their bounds
//	bugs.go        rules switched off one at a time, each with the world in which that must be found
//	search.go      the search, and the traces
//	step.go        steps in words
//
// The rules are documentation of code that is elsewhere. They are not shared with it, for there they are SQL, or lie between calls to other Deployments:
//
//	begin, receive, crashSave      constraint/save.go and layer.go; the mark is Outgoing in store/postgres/shadow.go
//	establish, confirm             functions establish and confirm_references in store/postgres/migrations/version/0002_references.sql
//	commit, accept                 function write_references there, the second half of a write
//	plan                           constraint/delete.go; Closure in store/postgres/closure.go
//	mark                           BeginAttempt in store/postgres/shadow.go
//	ask, check                     function check_references in 0002_references.sql
//	plan and prune of blockades    constraint/pending.go; DropBlockades and PruneSource in store/postgres/shadow.go
//	hear, handle, sweep            constraint/subscribed.go; ConfirmEpoch in store/postgres/shadow.go
//	finish                         constraint/deleting.go; function finish_deletion in 0002_references.sql
//	failOwner, failHome            ctl.prove_epoch, and Suspects in store/postgres/shadow.go
//	purge                          PurgeFences in store/postgres/purge.go
//
// What must hold in every state: no committed reference points to an incarnation that is gone (P7); none that blocks points to one that is being deleted (I1);
// its Deployment is among the target's sources, or suspect (I4, I5). In every step: no deletion is accepted under an unexpired blockade (I3); no such blockade
// is taken away by a message about another attempt or transaction (X5, X41); no referrer is cleared or deleted because of an incarnation whose deletion was
// never accepted. And from every state: a deletion that was accepted can be finished (I16), a target to which nothing refers can be deleted (X1), and a new
// reference to a live target can be committed, whatever fences are left.
//
// Bounds: two Deployments, two referrers in one, two transactions of two attempts each, three deletions and two prunes of which two at once, two incarnations of
// the name, one failover of each database (two of the owner in one world). Deployments with equal configurations are interchangeable, and so are the two
// tasks of the owner; of states that differ only in that, one is visited.
//
// Messages are lost, late, repeated and reordered where that can show: requests for references and confirmations, in worlds that say so. A question is
// answered in one step with the receipt of its answer, because until the last transaction nobody looks at what was received; a question that arrives
// late is that of a task that has not crashed yet. A repeated one leaves a fence that is there already.
//
// # Without synchronous standbys
//
// A failover is to a standby that knows the database as of any earlier moment. What holds then:
//
//   - The owner may lose anything: sources, blockades, row versions, fenced attempts, even that a deletion was accepted or finished. References stay whole.
//     But referrers may then have been cleared or deleted for a deletion that the owner has forgotten.
//   - If the owner loses that a target was created, references to it dangle. No protocol can mend that, and the worlds do not contain it; the sweep
//     reports such targets as missing.
//   - A referrer may lose references, fences, and that it has asked for a grant: the rise of its own epoch voids its open grants.
//   - If a referrer loses that a reference was taken out or cleared, after it has answered that none is left, the reference comes back, and dangles. So negative
//     answers, and the pages of a sweep, must be durable when they are sent: with a synchronous standby, or by having nothing to lose (bug AnswersNotDurable,
//     found in world referrer-fails-durable). Nothing else of the protocol needs one.
//
// After a failover the former primary must not go on: that it cannot is the matter of those who promote the standby.
//
// # Left out
//
// References within one database, which one transaction decides under row locks; cascades over several targets, each of which has a row version of its own; meta
// owners; versions of an API and the spelling of names; Deployments that leave the registry; pages, queues and pauses.
//
// Two of the rules make another superfluous: since a question about a live target carries an odd row version and a grant an even one, they are never equal, and
// whether fences void with < or <= makes no difference.
package model
