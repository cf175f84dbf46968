// Package nodemanager decides which node serves which shards, and keeps the nodes running. It knows nothing of what a node does.
//
// # Who is there
//
// Each process is a member of its ring (Membership): of Leases in Kubernetes (package lease), of a Local otherwise. It has some nodes of
// each kind, reports what they hold and which plan they have seen, and hears the same of the others. One member is the leader. It makes the
// plans, one for each kind, each with a version; a plan is published by compare-and-swap on the one in force, so that two who both think
// that they lead cannot undo each other.
//
// # How a shard moves
//
// Assign (pure) computes targets: one contiguous range for each node, sizes within 20 % of each other's mean, as few moves as that allows. It
// does so when nodes come or go, and only then. Step (pure) turns a plan, targets and reports into the next plan:
//
//	plan 7   a: [0,10)                                 b joins
//	plan 8   a: [0,5)  b: none   draining a [5,10)     a gives up [5,10): nothing works on it any more
//	         a reports: holds [0,5), seen 8
//	plan 9   a: [0,5)  b: [5,10)                       b claims [5,10), starts, reports
//
// What is taken from a node stays in Draining until the node has seen a plan without it and does not hold it, or is dead. A shard is granted
// to nobody as long as another living node is granted it, holds it or is draining it. The next leader knows all this from the plan and
// the reports, for Step has no other memory.
//
// A node that is to give up and to take gives up first, says so, and then takes. One that holds nothing of what it is granted is stopped and
// made anew; without a grant there is no node.
//
// # Why that is safe
//
// It is not, by itself: a process can be paused and go on after it was taken for dead, a Lease can be edited by hand. All of the above is
// advice that makes conflicts rare. What enforces it is the Fencer, in the database: before a node works on shards it claims them, with the
// version of the plan that grants them, and gets an epoch. That revokes all older claims that overlap, after their transactions in flight;
// every write carries its epoch, and is refused if its claim is revoked. A claim under an older plan than that of a claim it overlaps is
// refused too (ErrStalePlan): the node waits for a newer plan. Plans are numbered above the highest version of any claim, and above all
// that was seen, so a plan that was lost comes back under a higher number, from what the nodes hold.
//
// Whenever its range changes a node claims the whole of the new one. A claim that was revoked while the plan still grants the shards is made
// again when that is noticed, within CheckEvery.
//
// # Silence
//
// A member renews its registration every RetryPeriod. When no renewal has succeeded for RenewDeadline, counted from before it was asked
// for, all its nodes are stopped; others take it for dead when they have heard nothing for Lease. A node that does not stop in between ends
// the process, by Run's ErrNotStopped. After that the process joins again, as a new member whose nodes have other names. Nobody compares
// clocks with anybody: each measures from what it has seen itself.
//
// A member that ends says so first, stops its nodes, reports that they hold nothing, and only then takes itself off.
//
// # Versions
//
// The outer manager waits for the topology and then keeps one inner set of nodes going: all kinds, all ranges, one API version. A version
// switch replaces the set as a whole: no node of the new version starts before every node of the old one has returned.
//
//	assign.go, split.go, plan.go, step.go   pure deciding
//	membership.go, local.go, lease/         who is there
//	manager.go, crew.go, worker.go          the nodes of this process
//	leader.go                               when to publish a plan
//	fence.go                                the right to write
//	status.go, metrics.go                   what people see
package nodemanager
