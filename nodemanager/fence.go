package nodemanager

import (
	"context"
	"errors"

	"github.com/dbcontroller/db-controller/descriptor"
)

// Fencer gives the right to write for shards: store/postgres. It is asked where the writes go, so that a process that believes wrongly
// to own shards cannot act on it (P12).
type Fencer interface {
	// Raise makes holder, with the returned epoch, the only one whose nodes of kind may write for shards; all older claims that overlap are
	// revoked, after their transactions in flight have ended. plan is the version of the plan that grants it: ErrStalePlan if a claim that
	// overlaps was made under a newer plan.
	Raise(ctx context.Context, kind string, shards descriptor.ShardRange, plan int64, holder string) (epoch int64, err error)
	// Highest returns the highest plan version that any claim of kind was made under: a leader continues above it, whatever has become of
	// the Leases.
	Highest(ctx context.Context, kind string) (int64, error)
	// Holds reports whether the claim is still in force.
	Holds(ctx context.Context, epoch int64) (bool, error)
	// Drop gives a claim back.
	Drop(ctx context.Context, epoch int64) error
}

// ErrStalePlan means that a claim was to be made under a plan that is older than that of a claim it overlaps.
var ErrStalePlan = errors.New("a claim on these shards was made under a newer plan")

// noFence lets everybody write.
type noFence struct{}

func (noFence) Raise(context.Context, string, descriptor.ShardRange, int64, string) (int64, error) {
	return 0, nil
}
func (noFence) Highest(context.Context, string) (int64, error) { return 0, nil }
func (noFence) Holds(context.Context, int64) (bool, error)     { return true, nil }
func (noFence) Drop(context.Context, int64) error              { return nil }
