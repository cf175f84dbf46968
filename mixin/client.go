package mixin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/store"
)

const (
	// silence ends a stream of which nothing was heard for so long, several heartbeats.
	silence = 20 * time.Second
	// planTimeout is longer than that of a call: a plan reads much, and nobody's transaction waits for it.
	planTimeout = 30 * time.Second
	// maxAnswer is far above what a server sends in one piece, and far below what would hurt.
	maxAnswer = 32 << 20
)

// Client is the mixin of another Deployment, over the network. It repeats nothing.
type Client struct {
	at      store.Location
	rpc     dbcontrollerv1connect.SchemaMixinClient
	timeout time.Duration
}

var _ Peer = (*Client)(nil)

// NewClient returns a client of the Deployment at, whose API server is at endpoint. timeout bounds each call that is no stream; 0 is DefaultTimeout.
func NewClient(transport http.RoundTripper, endpoint string, at store.Location, timeout time.Duration) *Client {
	return &Client{
		at:      at,
		rpc:     dbcontrollerv1connect.NewSchemaMixinClient(pki.Client(transport), strings.TrimSuffix(endpoint, "/"), connect.WithReadMaxBytes(maxAnswer)),
		timeout: cmp.Or(timeout, DefaultTimeout),
	}
}

func call[Req, Res any](ctx context.Context, c *Client, timeout time.Duration, rpc func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	res, err := rpc(limited, connect.NewRequest(req))
	switch {
	case err == nil:
		return res.Msg, nil
	case ctx.Err() == nil && limited.Err() != nil:
		return nil, c.unavailable(fmt.Errorf("no answer within %s", timeout)) // our deadline, not the caller's
	}
	return nil, c.translate(err)
}

// EstablishReferences implements Peer.
func (c *Client) EstablishReferences(ctx context.Context, req *v1.EstablishReferencesRequest) (*v1.EstablishReferencesResponse, error) {
	res, err := call(ctx, c, c.timeout, c.rpc.EstablishReferences, req)
	if err == nil && len(res.GetGrants()) != len(req.GetTargets()) {
		return nil, c.malformed("%d grants for %d targets", len(res.GetGrants()), len(req.GetTargets()))
	}
	return res, err
}

// ConfirmBlockades implements Peer.
func (c *Client) ConfirmBlockades(ctx context.Context, req *v1.ConfirmBlockadesRequest) (*v1.ConfirmBlockadesResponse, error) {
	return call(ctx, c, c.timeout, c.rpc.ConfirmBlockades, req)
}

// CheckIfResourceIsBlocked implements Peer.
func (c *Client) CheckIfResourceIsBlocked(ctx context.Context, req *v1.CheckIfResourceIsBlockedRequest) (*v1.CheckIfResourceIsBlockedResponse, error) {
	res, err := call(ctx, c, c.timeout, c.rpc.CheckIfResourceIsBlocked, req)
	if err == nil && len(res.GetAnswers()) != len(req.GetTargets()) {
		return nil, c.malformed("%d answers for %d targets", len(res.GetAnswers()), len(req.GetTargets()))
	}
	return res, err
}

// CheckIfResourceHasDeletionSubscriber implements Peer.
func (c *Client) CheckIfResourceHasDeletionSubscriber(ctx context.Context, req *v1.CheckIfResourceHasDeletionSubscriberRequest) (*v1.CheckIfResourceHasDeletionSubscriberResponse, error) {
	return call(ctx, c, c.timeout, c.rpc.CheckIfResourceHasDeletionSubscriber, req)
}

// CheckIfHasMetaOwnee implements Peer.
func (c *Client) CheckIfHasMetaOwnee(ctx context.Context, req *v1.CheckIfHasMetaOwneeRequest) (*v1.CheckIfHasMetaOwneeResponse, error) {
	return call(ctx, c, c.timeout, c.rpc.CheckIfHasMetaOwnee, req)
}

// ConfirmMetaOwner implements Peer.
func (c *Client) ConfirmMetaOwner(ctx context.Context, req *v1.ConfirmMetaOwnerRequest) (*v1.ConfirmMetaOwnerResponse, error) {
	res, err := call(ctx, c, c.timeout, c.rpc.ConfirmMetaOwner, req)
	if err == nil && res.GetOutcome() == v1.ConfirmMetaOwnerResponse_OUTCOME_UNSPECIFIED {
		return nil, c.malformed("no outcome") // must not be taken for a refusal
	}
	return res, err
}

// UpgradeMetaOwnerVersion implements Peer.
func (c *Client) UpgradeMetaOwnerVersion(ctx context.Context, req *v1.UpgradeMetaOwnerVersionRequest) (*v1.UpgradeMetaOwnerVersionResponse, error) {
	return call(ctx, c, c.timeout, c.rpc.UpgradeMetaOwnerVersion, req)
}

// RemoveMetaOwnerReference implements Peer.
func (c *Client) RemoveMetaOwnerReference(ctx context.Context, req *v1.RemoveMetaOwnerReferenceRequest) (*v1.RemoveMetaOwnerReferenceResponse, error) {
	return call(ctx, c, c.timeout, c.rpc.RemoveMetaOwnerReference, req)
}

// ListMetaOwnees implements Peer.
func (c *Client) ListMetaOwnees(ctx context.Context, req *v1.ListMetaOwneesRequest) (*v1.ListMetaOwneesResponse, error) {
	return call(ctx, c, c.timeout, c.rpc.ListMetaOwnees, req)
}

// PlanDeletion implements Peer.
func (c *Client) PlanDeletion(ctx context.Context, req *v1.PlanDeletionRequest) (*v1.PlanDeletionResponse, error) {
	return call(ctx, c, max(c.timeout, planTimeout), c.rpc.PlanDeletion, req)
}

// WatchImportedServiceDeletions implements Peer. A stream that falls silent is cut, whatever TCP believes.
func (c *Client) WatchImportedServiceDeletions(ctx context.Context, req *v1.WatchImportedServiceDeletionsRequest, emit func(*v1.WatchImportedServiceDeletionsResponse) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := fmt.Errorf("nothing for %s", silence)
	watchdog := time.AfterFunc(silence, func() { cancel(silent) })
	defer watchdog.Stop()
	stream, err := c.rpc.WatchImportedServiceDeletions(ctx, connect.NewRequest(req))
	if err != nil {
		return c.translate(err)
	}
	defer func() { _ = stream.Close() }() // the context is cancelled next: nothing is left to be told
	for stream.Receive() {
		watchdog.Stop() // how long the consumer takes is no fault of the peer
		if err := emit(stream.Msg()); err != nil {
			return err
		}
		watchdog.Reset(silence)
	}
	err = stream.Err()
	switch {
	case errors.Is(context.Cause(ctx), silent):
		return c.unavailable(silent)
	case err != nil:
		return c.translate(err)
	}
	return c.unavailable(errors.New("it has closed the stream"))
}

func (c *Client) unavailable(cause error) error {
	return &store.Error{Code: store.Unavailable, Reason: fmt.Sprintf("%s cannot be reached: repeat later", c.at), Cause: cause}
}

func (c *Client) malformed(format string, args ...any) error {
	return &store.Error{Code: store.Unavailable, Reason: fmt.Sprintf("%s answers what cannot be read", c.at), Cause: fmt.Errorf(format, args...)}
}

// codes of answers that say something about the request. Any other one is about the peer, or the way there.
var codes = map[connect.Code]store.Code{
	connect.CodeNotFound:           store.NotFound,
	connect.CodeAlreadyExists:      store.AlreadyExists,
	connect.CodeInvalidArgument:    store.InvalidArgument,
	connect.CodeFailedPrecondition: store.FailedPrecondition,
	connect.CodeAborted:            store.Aborted,
	connect.CodePermissionDenied:   store.FailedPrecondition,
	connect.CodeUnauthenticated:    store.FailedPrecondition,
}

// translate returns the error of an answer as the peer itself would have returned it.
func (c *Client) translate(err error) error {
	rpc, ok := errors.AsType[*connect.Error](err)
	code := codes[connect.CodeOf(err)]
	if !ok || !connect.IsWireError(err) || code == 0 {
		return c.unavailable(err)
	}
	e := &store.Error{Code: code}
	var info *errdetails.ErrorInfo
	for _, d := range rpc.Details() {
		m, err := d.Value()
		if err != nil {
			continue
		}
		switch m := m.(type) {
		case *errdetails.ErrorInfo:
			if m.GetDomain() == v1.ErrorDomain {
				info = m
			}
		case *errdetails.BadRequest:
			for _, v := range m.GetFieldViolations() {
				e.Violations = append(e.Violations, store.Violation{Field: v.GetField(), Description: v.GetDescription()})
			}
		}
	}
	e.Name = info.GetMetadata()["name"]
	e.Reason = reasonIn(rpc.Message(), e)
	switch {
	case refusals[info.GetReason()]:
		return &Refusal{e, info.GetReason(), info.GetMetadata()}
	case code == store.FailedPrecondition && rpc.Code() != connect.CodeFailedPrecondition:
		e.Reason = fmt.Sprintf("%s does not want to be asked: %s", c.at, e.Reason)
	}
	return e
}

// refusals are the reasons that a caller acts on.
var refusals = map[string]bool{
	ReasonVersionMismatch: true, ReasonWrongRegion: true, ReasonWrongPeer: true, ReasonUnknownPeer: true, ReasonNotImported: true,
}

// reasonIn returns the message without the name and the violations, which Error puts around the reason.
func reasonIn(message string, e *store.Error) string {
	if e.Name != "" {
		message = strings.TrimPrefix(message, e.Name+": ")
	}
	parts := make([]string, len(e.Violations))
	for i, v := range e.Violations {
		parts[i] = v.Field + ": " + v.Description
	}
	if list := strings.Join(parts, "; "); list != "" {
		message = strings.TrimSuffix(strings.TrimSuffix(message, list), "; ")
	}
	return message
}
