// Package nodemanager decides which node serves which shards, and keeps the nodes running. It knows nothing of what a node does.
//
// The outer manager waits for the topology and then keeps one inner set of nodes going: all kinds, all ranges, one API version. A version
// switch replaces the set as a whole: no node of the new version starts before every node of the old one has returned. Membership is
// this process alone: each kind has a fixed number of nodes here, and between them they serve every shard of the ring.
package nodemanager
