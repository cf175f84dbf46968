package apiserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"runtime/debug"
	"time"

	"connectrpc.com/connect"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	rpc "github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
)

// rule says who may call a method.
type rule uint8

const (
	// users may call it.
	users rule = iota + 1
	// writers: users may call it, and Deployments of this service that forward a user's write, or ask for a user (Explain).
	writers
	// deployments of this service may call it.
	deployments
	// anyDeployment that the registry knows may call it, of whatever service.
	anyDeployment
)

// rules is the authorization table. A method that is not in it may be called by nobody.
var rules = map[string]rule{
	rpc.ResourcesGetProcedure:           users,
	rpc.ResourcesBatchGetProcedure:      users,
	rpc.ResourcesListProcedure:          users,
	rpc.ResourcesWatchProcedure:         users,
	rpc.ResourcesSearchProcedure:        users,
	rpc.ResourcesCreateProcedure:        writers,
	rpc.ResourcesUpdateProcedure:        writers,
	rpc.ResourcesDeleteProcedure:        writers,
	rpc.ResourcesBatchWriteProcedure:    writers,
	rpc.ResourcesExplainProcedure:       writers,
	rpc.ResourcesPreviewPolicyProcedure: users,
	rpc.FeedPingProcedure:               deployments,
	rpc.FeedTailProcedure:               deployments,
	rpc.FeedDigestProcedure:             deployments,
	rpc.FeedVersionsProcedure:           deployments,
	rpc.FeedFetchProcedure:              deployments,
	rpc.FeedRangesProcedure:             deployments,
	rpc.FeedHashesProcedure:             deployments,

	rpc.VerificationVerifyProcedure:       users,
	rpc.VerificationListVerifiedProcedure: users,
	rpc.VerificationResidencyProcedure:    users,

	rpc.SchemaMixinEstablishReferencesProcedure:                  anyDeployment,
	rpc.SchemaMixinConfirmBlockadesProcedure:                     anyDeployment,
	rpc.SchemaMixinCheckIfResourceIsBlockedProcedure:             anyDeployment,
	rpc.SchemaMixinCheckIfResourceHasDeletionSubscriberProcedure: anyDeployment,
	rpc.SchemaMixinCheckIfHasMetaOwneeProcedure:                  anyDeployment,
	rpc.SchemaMixinConfirmMetaOwnerProcedure:                     anyDeployment,
	rpc.SchemaMixinUpgradeMetaOwnerVersionProcedure:              anyDeployment,
	rpc.SchemaMixinRemoveMetaOwnerReferenceProcedure:             anyDeployment,
	rpc.SchemaMixinListMetaOwneesProcedure:                       anyDeployment,
	rpc.SchemaMixinWatchImportedServiceDeletionsProcedure:        anyDeployment,
	rpc.SchemaMixinMeasureHoldingsProcedure:                      deployments,
	rpc.SchemaMixinPlanDeletionProcedure:                         anyDeployment,
	rpc.ResourceShadowsGetResourceShadowProcedure:                users,
	rpc.ResourceShadowsListResourceShadowsProcedure:              users,
	rpc.ResourceShadowsWatchResourceShadowsProcedure:             users,
}

// request is what is known of a call before its message is read.
type request struct {
	// caller is the zero Identity on a server without TLS.
	caller pki.Identity
	// forwardedBy is the region that forwarded the call, empty when it comes from a user.
	forwardedBy string
	// minVersion is what the caller has seen, an etag.
	minVersion string
	// body of the request, which is counted.
	body *countedBody
	// connection sets deadlines of the connection or stream below the call.
	connection *http.ResponseController
}

type requestKey struct{}

func requestOf(ctx context.Context) request {
	r, _ := ctx.Value(requestKey{}).(request)
	return r
}

// admit establishes who calls, and bounds how long a request may take to arrive.
func (s *Server) admit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		defer s.calls.Done()
		req := request{forwardedBy: r.Header.Get(dbcontrollerv1.ForwardedByHeader), minVersion: r.Header.Get(dbcontrollerv1.MinVersionHeader), connection: http.NewResponseController(w)}
		if s.cfg.TLS != nil {
			id, err := pki.FromCertificate(r.TLS.PeerCertificates[0])
			if err != nil { // the handshake has refused such a certificate
				http.Error(w, "no identity", http.StatusForbidden)
				return
			}
			req.caller = id
		}
		body, ok := s.charge(r, req.caller)
		if !ok {
			s.refuse(w, r, errTooMuch())
			return
		}
		defer body.release()
		req.body = body
		// HTTP/1.1 keeps deadlines of the connection from one request to the next, so both are always set.
		_ = req.connection.SetReadDeadline(time.Now().Add(s.cfg.RequestTimeout))
		_ = req.connection.SetWriteDeadline(time.Now().Add(s.cfg.RequestTimeout + s.cfg.SendTimeout))
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestKey{}, req)))
	})
}

// denied says nothing about why: who may not come in need not learn what is inside.
func denied() error {
	return fail(connect.CodePermissionDenied, "PERMISSION_DENIED", nil, nil, "permission denied")
}

// authorize answers from the table. Without TLS everybody may do everything.
func (s *Server) authorize(ctx context.Context, procedure string) error {
	rule, known := rules[procedure]
	if !known {
		return denied()
	}
	if s.cfg.TLS == nil {
		return nil
	}
	r := requestOf(ctx)
	if r.caller.IsUser() {
		if rule == deployments || rule == anyDeployment || r.forwardedBy != "" {
			return denied()
		}
		return nil
	}
	if rule == anyDeployment {
		if !s.isDeclared(r.caller) {
			return denied()
		}
		return nil
	}
	if !s.isPeer(r.caller) || rule == users || rule == writers && r.forwardedBy != r.caller.Region {
		return denied()
	}
	return nil
}

// isPeer says whether id is another Deployment of our service that the registry knows and that is not disabled.
func (s *Server) isPeer(id pki.Identity) bool {
	return id.Service == s.cfg.Service && id.Region != s.cfg.Region && s.isDeclared(id)
}

// isDeclared says whether id is a Deployment that the registry knows and that is not disabled.
func (s *Server) isDeclared(id pki.Identity) bool {
	d, known := s.cfg.Topology.View().Deployment(registry.Key{Service: id.Service, Region: id.Region})
	return known && !d.Disabled
}

// call surrounds every call, however it came in: authorization, deadline, recovery, errors as statuses, metrics.
func (s *Server) call(ctx context.Context, procedure string, stream bool, next func(context.Context) error) (err error) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %s\n%s", panicked(p), debug.Stack())
		}
		err = s.status(ctx, procedure, err)
		s.metrics.observe(procedure, stream, err, time.Since(start))
	}()
	if err := s.authorize(ctx, procedure); err != nil {
		return err
	}
	if ctx, err = freshness(ctx, procedure); err != nil {
		return err
	}
	if !stream {
		ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
		defer cancel()
		return next(ctx)
	}
	connection := requestOf(ctx).connection
	_ = connection.SetReadDeadline(time.Time{}) // the caller has said all it has to say
	_ = connection.SetWriteDeadline(time.Time{})
	defer func() { _ = connection.SetWriteDeadline(time.Now().Add(s.cfg.SendTimeout)) }() // for the end of the stream, sent after this
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.draining, func() { cancel(errStopping) })()
	err = next(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errStopping) {
		return fail(connect.CodeUnavailable, "STOPPING", nil, nil, "%v", errStopping)
	}
	return err
}

// panicked describes what was thrown. What is no fault that the runtime found may have the content of rows in its text, and is only named: the stack tells the line.
func panicked(p any) string {
	if fault, ok := p.(runtime.Error); ok {
		return fault.Error()
	}
	return fmt.Sprintf("%T", p)
}

// refuse answers a call before its message is read, in the caller's protocol.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	_, rpc := rules[r.URL.Path]
	if !rpc {
		s.metrics.observe(cmp.Or(s.endpoint(r).procedure, "unknown"), true, err, 0)
		writeError(w, err)
		return
	}
	s.metrics.observe(r.URL.Path, true, err, 0)
	_ = s.errors.Write(w, r, err) // the caller hears of it, or has gone
}

var errStopping = errors.New("this server is stopping: resume with another")

// within runs one send of a stream, which fails if the reader takes nothing for SendTimeout.
func (s *Server) within(ctx context.Context, send func() error) error {
	r := requestOf(ctx)
	r.body.consumed()
	connection := r.connection
	_ = connection.SetWriteDeadline(time.Now().Add(s.cfg.SendTimeout))
	err := send()
	_ = connection.SetWriteDeadline(time.Time{}) // else an idle stream would be cut
	return err
}

// interceptor applies call to the RPC handlers.
type interceptor struct{ s *Server }

func (i interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (res connect.AnyResponse, err error) {
		err = i.s.call(ctx, req.Spec().Procedure, false, func(ctx context.Context) (err error) {
			res, err = next(ctx, req)
			return err
		})
		return res, err
	}
}

func (i interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		return i.s.call(ctx, conn.Spec().Procedure, true, func(ctx context.Context) error { return next(ctx, conn) })
	}
}

// WrapStreamingClient is part of connect.Interceptor; this one serves no clients.
func (interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}
