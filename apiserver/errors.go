package apiserver

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// statuses are the codes of package store with the reason that ErrorInfo gives.
var statuses = map[store.Code]struct {
	code   connect.Code
	reason string
}{
	store.NotFound:           {connect.CodeNotFound, "RESOURCE_NOT_FOUND"},
	store.AlreadyExists:      {connect.CodeAlreadyExists, "RESOURCE_ALREADY_EXISTS"},
	store.InvalidArgument:    {connect.CodeInvalidArgument, "INVALID_REQUEST"},
	store.FailedPrecondition: {connect.CodeFailedPrecondition, "PRECONDITION_FAILED"},
	store.Aborted:            {connect.CodeAborted, "CONCURRENT_CHANGE"},
	store.Unavailable:        {connect.CodeUnavailable, "DATABASE_UNAVAILABLE"},
}

// status turns any error of a call into what its caller may see. Faults of ours are logged here, and nowhere else.
func (s *Server) status(ctx context.Context, procedure string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*store.Error](err); ok && !errors.Is(e.Cause, context.Canceled) && !errors.Is(e.Cause, context.DeadlineExceeded) {
		if known, ok := statuses[e.Code]; ok {
			if e.Cause != nil {
				s.log.ErrorContext(ctx, "store failed", "error", e.Cause, "method", procedure, "name", e.Name)
			}
			shown := *e
			shown.Cause = nil
			var info map[string]string
			if e.Name != "" {
				info = map[string]string{"name": e.Name}
			}
			refusal := fail(known.code, known.reason, info, e.Violations, "%s", shown.Error())
			if len(e.Preconditions) > 0 {
				addDetail(refusal, preconditionFailure(e.Preconditions))
			}
			return refusal
		}
	}
	if e, ok := errors.AsType[*connect.Error](err); ok {
		return e
	}
	switch {
	case errors.Is(err, feed.ErrCursorLost):
		return fail(connect.CodeFailedPrecondition, dbcontrollerv1.ReasonCursorLost, nil, nil, "cursor: %v", feed.ErrCursorLost)
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fail(connect.CodeDeadlineExceeded, "DEADLINE_EXCEEDED", nil, nil, "the deadline passed before the call was done; the outcome of a write is unknown")
	case errors.Is(err, context.Canceled) || ctx.Err() != nil:
		return connect.NewError(connect.CodeCanceled, errors.New("the call was cancelled"))
	}
	id := rand.Text()
	s.log.ErrorContext(ctx, "call failed", "error", err, "method", procedure, "requestId", id)
	return fail(connect.CodeInternal, "INTERNAL", map[string]string{"requestId": id}, nil, "internal error, request id %s", id)
}

// fail makes an error with the details of AIP-193.
func fail(code connect.Code, reason string, info map[string]string, violations []store.Violation, format string, args ...any) *connect.Error {
	e := connect.NewError(code, fmt.Errorf(format, args...))
	details := []proto.Message{&errdetails.ErrorInfo{Reason: reason, Domain: dbcontrollerv1.ErrorDomain, Metadata: info}}
	if len(violations) > 0 {
		bad := &errdetails.BadRequest{}
		for _, v := range violations {
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
				// What is shown of bad input may be cut in the middle of a character, and a message must be UTF-8.
				Field: strings.ToValidUTF8(v.Field, "?"), Description: strings.ToValidUTF8(v.Description, "?"),
			})
		}
		details = append(details, bad)
	}
	for _, m := range details {
		addDetail(e, m)
	}
	return e
}

func addDetail(e *connect.Error, m proto.Message) {
	d, err := connect.NewErrorDetail(m)
	if err != nil {
		panic(err) // our own messages always encode
	}
	e.AddDetail(d)
}

// preconditionFailure says who stands in the way, for programs.
func preconditionFailure(preconditions []store.Precondition) *errdetails.PreconditionFailure {
	out := &errdetails.PreconditionFailure{}
	for _, p := range preconditions {
		out.Violations = append(out.Violations, &errdetails.PreconditionFailure_Violation{Type: p.Type, Subject: p.Subject, Description: p.Description})
	}
	return out
}

// invalid is the refusal of one field.
func invalid(field, format string, args ...any) error {
	return store.Invalid(field, fmt.Sprintf(format, args...))
}
