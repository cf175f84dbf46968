package apiserver

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/mixin"
)

// Mixin answers other Deployments, and people who look at shadows: mixin.Server.
type Mixin interface {
	mixin.Peer
	GetResourceShadow(context.Context, *dbcontrollerv1.GetResourceShadowRequest) (*dbcontrollerv1.ResourceShadow, error)
	ListResourceShadows(context.Context, *dbcontrollerv1.ListResourceShadowsRequest) (*dbcontrollerv1.ListResourceShadowsResponse, error)
	WatchResourceShadows(context.Context, *dbcontrollerv1.WatchResourceShadowsRequest, func(*dbcontrollerv1.WatchResourceShadowsResponse) error) error
}

// notServed answers for a server without a mixin.
func notServed() error {
	return fail(connect.CodeUnimplemented, "NOT_SERVED", nil, nil, "this server does not serve the schema mixin")
}

// admitCall believes a Call only of the Deployment that it names as its requester. Whether that one may ask, the mixin decides.
func (s *Server) admitCall(ctx context.Context, c *dbcontrollerv1.Call) error {
	r := c.GetRequester()
	if s.cfg.TLS != nil && requestOf(ctx).caller != (pki.Identity{TrustDomain: s.cfg.TrustDomain, Service: r.GetService(), Region: r.GetRegion()}) {
		return denied()
	}
	if s.cfg.Mixin == nil {
		return notServed()
	}
	return nil
}

// refused gives a refusal of the mixin the status that its caller understands. Other errors are those of every method.
func refused(err error) error {
	r, ok := errors.AsType[*mixin.Refusal](err)
	if !ok {
		return err
	}
	code := statuses[r.Err.Code].code
	switch r.Reason {
	case mixin.ReasonUnknownPeer, mixin.ReasonNotImported:
		code = connect.CodePermissionDenied
	case mixin.ReasonTooManyCalls:
		code = connect.CodeResourceExhausted
	}
	info := map[string]string{}
	for k, v := range r.Metadata {
		info[k] = v
	}
	if r.Err.Name != "" {
		info["name"] = r.Err.Name
	}
	return fail(code, r.Reason, info, r.Err.Violations, "%s", r.Err.Error())
}

// mixinService is the RPC form of the mixin.
type mixinService struct{ s *Server }

// asking runs a method of the mixin for the Deployment that its message names.
func asking[Req, Res any](ctx context.Context, s *Server, req *connect.Request[Req], method func(Mixin, context.Context, *Req) (*Res, error)) (*connect.Response[Res], error) {
	if err := s.admitCall(ctx, any(req.Msg).(interface{ GetCall() *dbcontrollerv1.Call }).GetCall()); err != nil {
		return nil, err
	}
	res, err := method(s.cfg.Mixin, ctx, req.Msg)
	if err != nil {
		return nil, refused(err)
	}
	return connect.NewResponse(res), nil
}

func (m mixinService) EstablishReferences(ctx context.Context, req *connect.Request[dbcontrollerv1.EstablishReferencesRequest]) (*connect.Response[dbcontrollerv1.EstablishReferencesResponse], error) {
	return asking(ctx, m.s, req, Mixin.EstablishReferences)
}

func (m mixinService) ConfirmBlockades(ctx context.Context, req *connect.Request[dbcontrollerv1.ConfirmBlockadesRequest]) (*connect.Response[dbcontrollerv1.ConfirmBlockadesResponse], error) {
	return asking(ctx, m.s, req, Mixin.ConfirmBlockades)
}

func (m mixinService) CheckIfResourceIsBlocked(ctx context.Context, req *connect.Request[dbcontrollerv1.CheckIfResourceIsBlockedRequest]) (*connect.Response[dbcontrollerv1.CheckIfResourceIsBlockedResponse], error) {
	return asking(ctx, m.s, req, Mixin.CheckIfResourceIsBlocked)
}

func (m mixinService) CheckIfResourceHasDeletionSubscriber(ctx context.Context, req *connect.Request[dbcontrollerv1.CheckIfResourceHasDeletionSubscriberRequest]) (*connect.Response[dbcontrollerv1.CheckIfResourceHasDeletionSubscriberResponse], error) {
	return asking(ctx, m.s, req, Mixin.CheckIfResourceHasDeletionSubscriber)
}

func (m mixinService) CheckIfHasMetaOwnee(ctx context.Context, req *connect.Request[dbcontrollerv1.CheckIfHasMetaOwneeRequest]) (*connect.Response[dbcontrollerv1.CheckIfHasMetaOwneeResponse], error) {
	return asking(ctx, m.s, req, Mixin.CheckIfHasMetaOwnee)
}

func (m mixinService) ConfirmMetaOwner(ctx context.Context, req *connect.Request[dbcontrollerv1.ConfirmMetaOwnerRequest]) (*connect.Response[dbcontrollerv1.ConfirmMetaOwnerResponse], error) {
	return asking(ctx, m.s, req, Mixin.ConfirmMetaOwner)
}

func (m mixinService) UpgradeMetaOwnerVersion(ctx context.Context, req *connect.Request[dbcontrollerv1.UpgradeMetaOwnerVersionRequest]) (*connect.Response[dbcontrollerv1.UpgradeMetaOwnerVersionResponse], error) {
	return asking(ctx, m.s, req, Mixin.UpgradeMetaOwnerVersion)
}

func (m mixinService) RemoveMetaOwnerReference(ctx context.Context, req *connect.Request[dbcontrollerv1.RemoveMetaOwnerReferenceRequest]) (*connect.Response[dbcontrollerv1.RemoveMetaOwnerReferenceResponse], error) {
	return asking(ctx, m.s, req, Mixin.RemoveMetaOwnerReference)
}

func (m mixinService) ListMetaOwnees(ctx context.Context, req *connect.Request[dbcontrollerv1.ListMetaOwneesRequest]) (*connect.Response[dbcontrollerv1.ListMetaOwneesResponse], error) {
	return asking(ctx, m.s, req, Mixin.ListMetaOwnees)
}

func (m mixinService) PlanDeletion(ctx context.Context, req *connect.Request[dbcontrollerv1.PlanDeletionRequest]) (*connect.Response[dbcontrollerv1.PlanDeletionResponse], error) {
	return asking(ctx, m.s, req, Mixin.PlanDeletion)
}

func (m mixinService) MeasureHoldings(ctx context.Context, req *connect.Request[dbcontrollerv1.MeasureHoldingsRequest]) (*connect.Response[dbcontrollerv1.MeasureHoldingsResponse], error) {
	return asking(ctx, m.s, req, func(served Mixin, ctx context.Context, req *dbcontrollerv1.MeasureHoldingsRequest) (*dbcontrollerv1.MeasureHoldingsResponse, error) {
		census, ok := served.(mixin.Census)
		if !ok {
			return nil, notServed()
		}
		return census.MeasureHoldings(ctx, req)
	})
}

func (m mixinService) WatchImportedServiceDeletions(ctx context.Context, req *connect.Request[dbcontrollerv1.WatchImportedServiceDeletionsRequest], stream *connect.ServerStream[dbcontrollerv1.WatchImportedServiceDeletionsResponse]) error {
	s := m.s
	if err := s.admitCall(ctx, req.Msg.GetCall()); err != nil {
		return err
	}
	return refused(s.cfg.Mixin.WatchImportedServiceDeletions(ctx, req.Msg, func(res *dbcontrollerv1.WatchImportedServiceDeletionsResponse) error {
		return s.within(ctx, func() error { return stream.Send(res) })
	}))
}

// shadowsService is the RPC form of shadows for people.
type shadowsService struct{ s *Server }

// looking runs a method of the mixin for a user.
func looking[Req, Res any](ctx context.Context, s *Server, req *connect.Request[Req], method func(Mixin, context.Context, *Req) (*Res, error)) (*connect.Response[Res], error) {
	if s.cfg.Mixin == nil {
		return nil, notServed()
	}
	res, err := method(s.cfg.Mixin, ctx, req.Msg)
	if err != nil {
		return nil, refused(err)
	}
	return connect.NewResponse(res), nil
}

func (h shadowsService) GetResourceShadow(ctx context.Context, req *connect.Request[dbcontrollerv1.GetResourceShadowRequest]) (*connect.Response[dbcontrollerv1.ResourceShadow], error) {
	return looking(ctx, h.s, req, Mixin.GetResourceShadow)
}

func (h shadowsService) ListResourceShadows(ctx context.Context, req *connect.Request[dbcontrollerv1.ListResourceShadowsRequest]) (*connect.Response[dbcontrollerv1.ListResourceShadowsResponse], error) {
	return looking(ctx, h.s, req, Mixin.ListResourceShadows)
}

func (h shadowsService) WatchResourceShadows(ctx context.Context, req *connect.Request[dbcontrollerv1.WatchResourceShadowsRequest], stream *connect.ServerStream[dbcontrollerv1.WatchResourceShadowsResponse]) error {
	s := h.s
	if s.cfg.Mixin == nil {
		return notServed()
	}
	if !s.watches.TryAcquire(1) {
		return fail(connect.CodeResourceExhausted, "TOO_MANY_WATCHES", nil, nil, "%d watches are open already: close one or ask another server", s.cfg.MaxWatches)
	}
	defer s.watches.Release(1)
	return refused(s.cfg.Mixin.WatchResourceShadows(ctx, req.Msg, func(res *dbcontrollerv1.WatchResourceShadowsResponse) error {
		return s.within(ctx, func() error { return stream.Send(res) })
	}))
}
