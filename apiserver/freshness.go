package apiserver

import (
	"context"
	"strings"

	rpc "github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/store"
)

// freshness says how old the reads of a call may be. What users read may come from a cache, and then is not older than the version in
// the MinVersionHeader, the etag that the caller has seen. All other calls decide something from what they read, or follow it: they read the database.
func freshness(ctx context.Context, procedure string) (context.Context, error) {
	switch procedure {
	case rpc.ResourcesGetProcedure, rpc.ResourcesBatchGetProcedure, rpc.ResourcesListProcedure:
		return withMinVersion(ctx, requestOf(ctx).minVersion)
	}
	return store.Fresh(ctx), nil
}

// withMinVersion takes an etag, perhaps in quotes as in HTTP's own headers; an empty one asks for nothing.
func withMinVersion(ctx context.Context, etag string) (context.Context, error) {
	if etag == "" {
		return ctx, nil
	}
	v, err := store.ParseETag(strings.Trim(etag, `"`))
	if err != nil {
		return ctx, invalid("min_version", "is not an etag of this service: send one that was received")
	}
	return store.WithMinVersion(ctx, v), nil
}
