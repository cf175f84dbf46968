package store

import (
	"errors"
	"time"
)

// ErrChanged is in the chain of an Aborted Error when what the constraint layer had read before no longer holds: the closure of a deletion, who was
// asked, or a grant that has been voided. Nothing was written: plan again and repeat.
var ErrChanged = errors.New("what was read before has changed")

// Question names a resource whose references are asked for, with what a fence for it must say (spec 3.3).
type Question struct {
	Name, UUID        string
	Epoch, RowVersion int64
}

// Establish asks for new references to resources of this Deployment (spec 3.1).
type Establish struct {
	Requester Location
	// Referrer is spelled as by the requester. TxID is a UUID; a higher attempt of the same transaction replaces a lower one.
	Referrer, TxID string
	Attempt        int
	// TTL is how long the targets are protected from now.
	TTL     time.Duration
	Targets []EstablishTarget
}

// EstablishTarget is one new reference.
type EstablishTarget struct {
	Name                 string
	Blocking, Subscriber bool
}

// Confirmed is a committed reference of another Deployment. Without a TxID no tentative blockade is removed.
type Confirmed struct {
	Referrer, Name       string
	Blocking, Subscriber bool
	TxID                 string
	// Field is one of those through which the referrer refers to the name, a blocking one if there is any. Only ReferencesTo tells it.
	Field string
}

// BlockedAnswer answers a Question.
type BlockedAnswer struct {
	// Blocked: a blocking reference is left. HasAny: any reference is left.
	Blocked, HasAny bool
	// Sample of at most 10 blocking referrers.
	Sample []string
}

// ShadowFilter selects shadows for a list.
type ShadowFilter struct {
	// State is ACTIVE, PENDING or DELETING; empty is all.
	State string
	// Prefix of the resource names.
	Prefix string
	// After is the name that the page before ended with.
	After string
	// Limit of the page; at most 1000.
	Limit int
}

// Task is a shadow that has work due.
type Task struct {
	Name, Type, UUID string
	Shard            int32
	State            ShadowState
	Tasks            Tasks
	// TaskTime is when the work was raised.
	TaskTime time.Time
	// Seen is what ClearTasks needs to know whether something was raised since.
	Seen string
}
