package store

import (
	"context"
	"errors"
)

type claimKey struct{}

// WithClaim returns a context whose writes to the database are made under a claim on shards (postgres.Store.Raise): the database refuses them once the claim has been revoked,
// with an error that IsFenced knows, and what it has accepted is finished before the claim is. epoch says which claim that is at the moment; it is called for every use of a
// connection, from any goroutine. 0 is none: no write is accepted. Writes under a context without a claim are not fenced.
func WithClaim(ctx context.Context, epoch func() int64) context.Context {
	return context.WithValue(ctx, claimKey{}, epoch)
}

// ClaimOf returns the epoch of the claim that ctx carries; not ok if it carries none.
func ClaimOf(ctx context.Context) (epoch int64, ok bool) {
	f, ok := ctx.Value(claimKey{}).(func() int64)
	if !ok {
		return 0, false
	}
	return f(), true
}

var (
	errFenced = errors.New("FENCED")
	// ErrStalePlan means that a claim was asked for under a plan that a newer one has replaced: read the plan again.
	ErrStalePlan = errors.New("the shards have been claimed under a newer plan")
)

// Fenced is the error of a write whose claim has been revoked.
func Fenced(reason string) *Error {
	return &Error{Code: FailedPrecondition, Reason: reason, Cause: errFenced}
}

// IsFenced reports whether err is that of a write whose claim has been revoked: another process works on the shards, or is about to. Nothing has been written.
func IsFenced(err error) bool { return errors.Is(err, errFenced) }
