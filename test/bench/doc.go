// Command bench measures db-controller against PostgreSQL's own logical replication: the same rows, the same tables with the same indexes, the
// same pair of clusters, the same writers. docs/benchmarks.md says what came out, and what each number means.
//
//	go run ./test/bench [flags] [NAME...]
//
// Without a name it runs all. Every bench prints what each run measured, then one line of JSON. All of it lives in private clusters
// and child processes that end with this one.
//
//	main.go        flags, the list of benches, the result
//	world.go       two clusters, a source database and one destination for each contender
//	rows.go        what is copied: seeding, backlogs, the comparison by our own SQL
//	contender.go   a way to copy rows from source to destination
//	node.go        ours: a Deployment in a process of its own
//	native.go      the rival: publication and subscription
//	usage.go       CPU and memory from the kernel's accounting
//	copy.go, catchup.go, latency.go, writercost.go, feedread.go, memory.go
package main
