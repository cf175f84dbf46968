// Package cache is the layer of the Store that answers reads from Redis: Get and BatchGet, and the pages of List for the types that ask for it.
//
// PostgreSQL stays what is true. Redis may be down, slow, flushed, full, restarted with old data or shared with others: each of these costs time, never
// a wrong answer. Where there is doubt, the database is read.
//
// What a read promises, with t the moment at which it begins:
//
//   - a resource, or a page of a List, is as the database had it at some moment after t - MaxStaleness; the resources of one BatchGet need not be of the same moment
//   - it is not older than any write that has returned from this Store before t
//   - with store.WithMinVersion it is not older than that version; with store.Fresh it comes from the database
//
// A name that does not exist is never cached.
//
// # How it stays right
//
// Filling a cache races with invalidating it: a slow reader could put back what a writer has just thrown out. So a reader that misses first leaves a
// lease, a random token, in the entry's place, then reads the database, then puts the entry only if its lease is still there. Invalidating deletes
// whatever is there. Whichever way it ends, a flush, an eviction, a timeout after which Redis executes the command all the same, the lease is gone or the
// entry is right: the order in which Redis executes is all that counts, and no clock. A page of a List carries the tags of its collection, random tokens too, that were in force
// before the database was read; a change deletes the tag.
//
// Every process follows the change feed and deletes what has changed, in the order: read the feed, delete, then move the cursor. A process answers from Redis only
// as long as its last such step, the one that found nothing more to read, began less than MaxStaleness ago. So it depends on no other process, and a
// Redis that does not answer, or a feed that lags, turns the cache off within that time, and it comes back by itself. A writer deletes what it has
// written before it returns; where that is not possible, or a deletion has taken along what the writer cannot name, its process reads the database until a step of the
// follower has begun after the write.
//
// Entries live in a generation, whose name and cursor are kept in Redis: everything that changed before the cursor has been deleted in that generation. A process that
// starts goes on from there. If the feed can say no more what has changed since (another epoch, purged tombstones) or the state is gone, there is a new generation, and
// what was in the old one is never looked at again.
//
// The keys start with a digest of the Deployment, its database, and the run of the Redis server: a server that was restarted with yesterday's snapshot,
// or promoted without the last deletions, starts with an empty cache. Each connection proves that it reaches the same run. One Redis server serves one
// cache, by itself or behind an address that follows the primary; Redis Cluster is not supported.
//
//	cache.go      the layer: reads and writes
//	view.go       one generation in one run of a Redis server, and what is done there
//	follow.go     the follower
//	entry.go      resources and pages as bytes
package cache
