package nodemanager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

// Membership is where the processes that share a ring meet. It is advice: it says who should work on what, and is right nearly always.
// What makes it safe to be wrong is the Fencer.
type Membership interface {
	// Run makes the process a member, and calls work once. The process stays a member until work returns, which it must do soon after its
	// context has ended: that is when ctx ends, or when the membership is lost. Run then takes the member off, without which others would
	// have to wait until it is dead, and returns work's error, or else ErrLost if the membership was lost, or else nil. Called again, it
	// joins as a new member.
	Run(ctx context.Context, work func(ctx context.Context, s Session) error) error
}

// Session is the time of a process as one member. Its methods may be called at the same time.
type Session interface {
	// Member is the member's ID. No other member has had it, of this process or of others.
	Member() string
	// Report replaces what the member says of its nodes of a kind, but for its Status. It is published soon, and again whenever the registration is renewed.
	Report(kind string, r Report)
	// Tell makes status the source of what the member says in Report.Status: it is asked whenever the registration is renewed, so that what others hear is no older than that. It must
	// return at once, as renewals wait for it.
	Tell(kind string, status func() []byte)
	// View returns what is known of a kind now. It may be of a moment ago. Plans in it have rising versions; one that was lost, or put back by
	// hand, shows as none.
	View(kind string) View
	// Changes gets a value after views may have changed in more than Report.Status and Heard. It has one reader.
	Changes() <-chan struct{}
	// Publish puts plan in force, if the one in force has the version after, 0 for none; otherwise it returns ErrConflict.
	Publish(ctx context.Context, kind string, plan Plan, after int64) error
	// Lost is closed when the registration could not be renewed for too long. Work must have stopped within Grace from then: after that
	// others may take the member for dead.
	Lost() <-chan struct{}
	Grace() time.Duration
}

// View is what a member knows of a kind.
type View struct {
	Plan    Plan
	Members []Member // in order of their ID
	// Leader is the ID of the member that makes the plans; empty if nobody is known to. Leading: it is this one.
	Leader  string
	Leading bool
}

var (
	// ErrLost means that a process is not a member any more, because it could not renew its registration.
	ErrLost = errors.New("membership is lost: its registration could not be renewed in time")
	// ErrConflict means that another plan is in force than the one that was to be replaced.
	ErrConflict = errors.New("another plan is in force")
	// ErrNotStopped means that a node works on although it had to stop. The process must end: nothing else can stop the node.
	ErrNotStopped = errors.New("a node did not stop in time")
)

// Timing says how soon a silent member counts as dead, and by when it has stopped by itself. Nobody's clock is compared to another's:
// each counts from what it has seen.
type Timing struct {
	// Lease: others take a member for dead when they have seen no renewal for so long. Whole seconds in Kubernetes. Default 15 s.
	Lease time.Duration
	// RenewDeadline: a member that has not renewed for so long stops working. Default 10 s.
	RenewDeadline time.Duration
	// RetryPeriod is the time between renewals. Default 2 s.
	RetryPeriod time.Duration
}

// WithDefaults returns the timing with defaults where it is zero, and whether it makes sense.
func (t Timing) WithDefaults() (Timing, error) {
	t.Lease, t.RenewDeadline, t.RetryPeriod = cmp.Or(t.Lease, 15*time.Second), cmp.Or(t.RenewDeadline, 10*time.Second), cmp.Or(t.RetryPeriod, 2*time.Second)
	// Election retries after 1.2 retry periods at most.
	if t.RetryPeriod <= 0 || t.RenewDeadline <= t.RetryPeriod*6/5 || t.Lease <= t.RenewDeadline {
		return t, fmt.Errorf("lease duration %s, renew deadline %s, retry period %s: each must be longer than the next, the deadline longer than 1.2 retry periods",
			t.Lease, t.RenewDeadline, t.RetryPeriod)
	}
	return t, nil
}
