package store

import (
	"errors"
	"fmt"
)

// Code says what a caller can do about an Error; the API server maps it to a status.
type Code uint8

// The codes, named as in google.rpc.Code.
const (
	NotFound Code = iota + 1
	AlreadyExists
	// InvalidArgument: the request itself is wrong; Violations say where.
	InvalidArgument
	// FailedPrecondition: the state of the system forbids it; repeating does not help until that changes.
	FailedPrecondition
	// Aborted: somebody else changed the resource (etag), read again and repeat.
	Aborted
	// Unavailable: repeat later. The outcome of a write is unknown.
	Unavailable
)

// String returns the name of the code in google.rpc.Code.
func (c Code) String() string {
	if c < NotFound || c > Unavailable {
		return fmt.Sprintf("Code(%d)", uint8(c))
	}
	return [...]string{"NOT_FOUND", "ALREADY_EXISTS", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "ABORTED", "UNAVAILABLE"}[c-1]
}

// Violation names a field and what is wrong with it.
type Violation struct {
	Field       string
	Description string
}

// Precondition is something that stands in the way of a request: who refers to Subject, and forbids its deletion.
type Precondition struct {
	// Type is PreconditionReferenced or PreconditionBlocked.
	Type string
	// Subject is the name of the resource that it is about, Description says who or what it is.
	Subject, Description string
}

// Types of a Precondition: a resource refers to the subject; its service blocks its deletion.
const (
	PreconditionReferenced = "REFERENCED"
	PreconditionBlocked    = "DELETION_BLOCKED"
)

// Error is every failure of a Store that a caller can act on.
type Error struct {
	Code Code
	// Name of the resource, if one is concerned.
	Name string
	// Reason is a sentence for people: what is wrong and what to do.
	Reason     string
	Violations []Violation
	// Preconditions of a FailedPrecondition, as many as are known and at most a hundred: the blockers of a deletion.
	Preconditions []Precondition
	// Cause is the driver's error for Unavailable; never shown to users.
	Cause error
}

// Error returns one line.
func (e *Error) Error() string {
	s := e.Reason
	for _, v := range e.Violations {
		if s != "" {
			s += "; "
		}
		s += v.Field + ": " + v.Description
	}
	if e.Name != "" {
		s = e.Name + ": " + s
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// CodeOf returns the code of the Error in err's chain, or 0.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// Invalid returns an InvalidArgument for one field.
func Invalid(field, description string) *Error {
	return &Error{Code: InvalidArgument, Violations: []Violation{{field, description}}}
}

// Errorf returns an Error about name with a formatted reason.
func Errorf(code Code, name, format string, args ...any) *Error {
	return &Error{Code: code, Name: name, Reason: fmt.Sprintf(format, args...)}
}
