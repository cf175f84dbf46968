// Package verify proves that a mirror equals what it mirrors: read copies and their owner's rows, a search store and its database.
//
// A pass walks through the names in order. Both sides digest the same ranges of names inside their databases; where two digests differ, the rows of the range are listed by hash. A row that differs
// is only a suspect: it may be on its way. It counts as a difference when a second look finds the same on both sides, and the mirror has received everything that the truth had written by the first.
//
//	pass.go    the walk: ranges, suspects, throttle, progress, repair; it knows no database
//	judge.go   pure: what two looks at a name mean
//	copies.go  the pair of an owner and the copies of another region
//	search.go  the pair of a database and its search store
//	background.go  passes that go on for ever, one process at a time, and what they have proved
//
// Three things always hold:
//
//   - a row that is written while a pass goes on is no difference, however long the pass takes
//   - a pass can be cut off after any report and resumed with its state; nothing is counted twice or left out
//   - repair writes only what the truth says now, over what was seen; a row that the mirror's own region owns is never touched
package verify
