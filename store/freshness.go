package store

import "context"

type (
	freshKey struct{}
	seenKey  struct{}
)

// Fresh returns a context whose reads are answered by the database, and by no cache: for those who decide something from what they read.
func Fresh(ctx context.Context) context.Context { return context.WithValue(ctx, freshKey{}, true) }

// IsFresh says whether ctx is of Fresh.
func IsFresh(ctx context.Context) bool {
	fresh, _ := ctx.Value(freshKey{}).(bool)
	return fresh
}

// WithMinVersion returns a context whose reads take nothing from a cache that is older than v: what the caller has seen. It says nothing about resources that
// the region's database itself holds in an older version. Versions are those of one name: with several names, the smallest that each of them
// must have; a List with it is answered by the database.
func WithMinVersion(ctx context.Context, v Version) context.Context {
	return context.WithValue(ctx, seenKey{}, v)
}

// MinVersion is that of WithMinVersion, or zero.
func MinVersion(ctx context.Context) Version {
	v, _ := ctx.Value(seenKey{}).(Version)
	return v
}
