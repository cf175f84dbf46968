// Package registry knows which services and Deployments there are, and tells everybody who must act when that changes.
//
// A source (a folder of manifests, or Kubernetes through the controllers) hands the registry the full desired state with Apply. The
// registry decides what of it is valid, compares it with what it knows, and lets every subscriber see the difference.
//
//	deployment.go  one service in one region, as consumers see it
//	view.go        an immutable picture of the topology, and the difference of two
//	registry.go    the registry: Apply, View, Subscribe
//	folder/        the source that watches a folder of manifests
//
// What always holds:
//
//   - the first event of a subscriber is SyncEvent; its later events, applied in order, lead from that view to the present one
//   - a refresh that changes nothing gives no event
//   - a slow subscriber delays nobody: it holds a pointer to the view it has seen, not a queue; changes that it has not seen yet are
//     merged by object, so it may miss a state in between, but never the latest one
//   - an object that is not valid never replaces one that was: it is reported as a Problem and the last good state stays
package registry
