// Package pgserver runs private PostgreSQL clusters that live no longer than
// this process: for tests, benches and the demo.
//
// A cluster listens on a unix socket in a folder that only its own user can
// enter, so it needs no password and no free port. Its postmaster is our
// direct child and is told by the kernel when we die, however we die.
// Stop leaves no process and no file; what a killed process leaves behind in
// the temporary folder, the next Start removes.
//
// By default a cluster trades safety against power cuts for speed. Commits
// still survive the death of every process of the cluster (Kill, Crash):
// each commit reaches the operating system before it is acknowledged.
//
//	find.go     where PostgreSQL's programs are
//	server.go   a cluster's life: Start, Stop, Kill, Crash, Restart
//	standby.go  streaming standbys: copy, cut, promote
//	process.go  the postmaster as a child that cannot outlive us
//	tempdir.go  folders that the next Start removes if their owner was killed
package pgserver
