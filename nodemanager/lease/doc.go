// Package lease is the membership of node managers in Kubernetes: coordination.k8s.io Leases, all in one namespace.
//
//	<prefix>-<kind>-<replica>  a process and a kind of its nodes; an annotation carries its report
//	<prefix>-plan-<kind>       an annotation carries the plan in force; resourceVersion decides between two leaders
//	<prefix>-leader            client-go's leader election
//
// All of them have the label meta.dbcontroller.io/ring, by which one watch sees them. What they say is advice and may be lost, deleted or
// edited: each process writes its own again at the next renewal, the leader a plan, and epochs live in PostgreSQL (O4).
//
// Nobody's clock is trusted. A member is dead when its Lease has not changed for its duration, measured here, from when changes arrive; and
// what measures is not the clock on the wall but our own renewals as they come back through the same watch. A watch that is cut or late
// makes nobody look dead: it stops that clock as well.
//
// Renewals have a goroutine and a connection of their own, and no rate limiter (O5). A process that could not renew until the deadline stops
// its nodes and joins again under a new identity; a Lease that another identity holds is taken over only when that one is dead.
package lease
