package apiserver

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"

	"connectrpc.com/connect"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// peer is the owner of a write that is not ours.
type peer struct {
	region string
	client dbcontrollerv1connect.ResourcesClient
}

// route returns where the writes of one transaction belong; nil is here. All of them must belong to one region.
func (s *Server) route(ctx context.Context, writes ...write) (*peer, error) {
	var owner string
	names, batch := make([]descriptor.Name, len(writes)), make([]store.Write, len(writes))
	for i, w := range writes {
		names[i], batch[i] = w.name, w.Write
	}
	for i, n := range names {
		region, err := s.cfg.Owners.Owner(ctx, n, batch)
		if err != nil {
			return nil, err
		}
		if i > 0 && region != owner {
			return nil, fail(connect.CodeFailedPrecondition, dbcontrollerv1.ReasonWrongRegion, nil, nil,
				"%s belongs to region %s, %s to region %s: write them in two batches", names[0], owner, n, region)
		}
		owner = region
	}
	if owner == s.cfg.Region {
		return nil, nil
	}
	name := names[0].Full
	misrouted := func(format string, args ...any) (*peer, error) {
		return nil, fail(connect.CodeFailedPrecondition, dbcontrollerv1.ReasonWrongRegion, map[string]string{"name": name, "owningRegion": owner}, nil, format, args...)
	}
	if by := requestOf(ctx).forwardedBy; by != "" {
		return misrouted("%s: region %s forwarded the write to %s, which thinks that region %s owns the name: repeat when the policy has reached all regions",
			name, by, s.cfg.Region, owner)
	}
	d, declared := s.cfg.Topology.View().Deployment(registry.Key{Service: s.cfg.Service, Region: owner})
	switch {
	case !declared:
		return misrouted("%s: region %s owns the name, but no Deployment of %s is declared there", name, owner, s.cfg.Service)
	case d.Disabled:
		return misrouted("%s: region %s owns the name, and its Deployment is disabled", name, owner)
	case s.cfg.TLS != nil && !strings.HasPrefix(d.Endpoint, "https://"):
		return misrouted("%s: region %s owns the name, and its Deployment has no https endpoint", name, owner)
	}
	return &peer{owner, s.peers.client(s, d)}, nil
}

// forward runs a write in its owning region. What that region answers, errors too, is the answer.
func forward[Req, Res any](ctx context.Context, s *Server, p *peer, call func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	r := connect.NewRequest(req)
	r.Header().Set(dbcontrollerv1.ForwardedByHeader, s.cfg.Region)
	res, err := call(ctx, r)
	if err == nil {
		return res.Msg, nil
	}
	if e, ok := errors.AsType[*connect.Error](err); ok && connect.IsWireError(err) {
		if e.Code() == connect.CodePermissionDenied { // of us, not of the user
			s.log.ErrorContext(ctx, "forwarded write was denied", "owner", p.region)
			return nil, fail(connect.CodeFailedPrecondition, dbcontrollerv1.ReasonWrongRegion, nil, nil, "region %s does not accept writes from %s", p.region, s.cfg.Region)
		}
		// A new error: headers of the inner response are no headers of ours.
		own := connect.NewError(e.Code(), errors.New(e.Message()))
		for _, d := range e.Details() {
			own.AddDetail(d)
		}
		return nil, own
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	s.log.WarnContext(ctx, "owner cannot be reached", "owner", p.region, "error", err)
	return nil, fail(connect.CodeUnavailable, "OWNER_UNREACHABLE", map[string]string{"owningRegion": p.region}, nil,
		"region %s owns the name and cannot be reached; the outcome of the write is unknown", p.region)
}

// peers are the clients of other Deployments, made when first needed.
type peers struct {
	mu      sync.Mutex
	clients map[string]peerClient // by region
}

type peerClient struct {
	endpoint, trustDomain string
	transport             *http.Transport
	resources             dbcontrollerv1connect.ResourcesClient
}

func (p *peers) client(s *Server, d registry.Deployment) dbcontrollerv1connect.ResourcesClient {
	p.mu.Lock()
	defer p.mu.Unlock()
	c, found := p.clients[d.Region]
	if found && c.endpoint == d.Endpoint && c.trustDomain == d.TrustDomain {
		return c.resources
	}
	if found {
		c.transport.CloseIdleConnections()
	}
	transport := pki.Transport(s.cfg.TLS, pki.Identity{TrustDomain: d.TrustDomain, Service: d.Service, Region: d.Region}, s.cfg.DialContext)
	c = peerClient{
		endpoint:    d.Endpoint,
		trustDomain: d.TrustDomain,
		transport:   transport,
		resources:   dbcontrollerv1connect.NewResourcesClient(pki.Client(transport), strings.TrimSuffix(d.Endpoint, "/")),
	}
	if p.clients == nil {
		p.clients = map[string]peerClient{}
	}
	p.clients[d.Region] = c
	return c.resources
}

func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.clients {
		c.transport.CloseIdleConnections()
	}
}
