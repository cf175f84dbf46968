package mixin

import (
	"context"
	"fmt"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

// measureTimeout is the deadline of a measurement: it reads what a region owns under a policy, and its bodies if bytes are asked for.
const measureTimeout = time.Minute

// Holdings measures what this Deployment owns under a policy, and at which rates it was seen to work.
type Holdings func(ctx context.Context, holder string, bytes bool) ([]store.Holding, map[string]float64, error)

// MeasureHoldings implements Census.
func (s *Server) MeasureHoldings(ctx context.Context, req *v1.MeasureHoldingsRequest) (*v1.MeasureHoldingsResponse, error) {
	requester, end, err := s.begin(req.GetCall(), anybody, false)
	if err != nil {
		return nil, err
	}
	defer end()
	if requester.Service != s.cfg.Service {
		return nil, refuse(ReasonNotImported, nil, "", "%s is of another service: what is owned here is not its concern", requester)
	}
	if v := req.GetCall().GetVersion(); v != s.cfg.Version {
		return nil, s.mismatch("version %q is not used here", v)
	}
	if s.cfg.Holdings == nil {
		return nil, store.Errorf(store.FailedPrecondition, "", "%s does not measure what it owns", s.self)
	}
	if req.GetHolder() != "" {
		if err := checkName("holder", req.GetHolder()); err != nil {
			return nil, err
		}
	}
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	groups, rates, err := s.cfg.Holdings(ctx, req.GetHolder(), req.GetBytes())
	if err != nil {
		return nil, err
	}
	res := &v1.MeasureHoldingsResponse{Rates: rates}
	if res.DeclaredPolicy, err = v.Service.Policy.JSON(); err != nil {
		return nil, err
	}
	if s.cfg.ServicePolicy != nil {
		if res.PolicyInForce, err = s.cfg.ServicePolicy().JSON(); err != nil {
			return nil, err
		}
	}
	for _, g := range groups {
		res.Groups = append(res.Groups, &v1.HoldingGroup{Type: g.Type, Regional: g.Regional, Regions: g.Regions, Rows: g.Rows, Bytes: g.Bytes, Example: g.Example})
	}
	return res, nil
}

// MeasureHoldings implements Census.
func (c *Client) MeasureHoldings(ctx context.Context, req *v1.MeasureHoldingsRequest) (*v1.MeasureHoldingsResponse, error) {
	return call(ctx, c, max(c.timeout, measureTimeout), c.rpc.MeasureHoldings, req)
}

// Holdings asks a region of the own service, perhaps this one, what it owns under a policy.
func (p *Peers) Holdings(ctx context.Context, region, holder string, bytes bool) ([]store.Holding, map[string]float64, error) {
	res, err := p.measure(ctx, region, holder, bytes)
	return groups(res), res.GetRates(), err
}

// ServicePolicy is what a region says of the policy of the service: the one that it has been given, the one that is in force there, each nil for none, and what it owns under it.
type ServicePolicy struct {
	Declared, InForce *descriptor.Policy
	Owned             []store.Holding
}

// ServicePolicy asks a region of the own service, perhaps this one.
func (p *Peers) ServicePolicy(ctx context.Context, region string) (told ServicePolicy, err error) {
	res, err := p.measure(ctx, region, "", false)
	if err != nil {
		return told, err
	}
	declared, err := descriptor.ParsePolicy(res.GetDeclaredPolicy())
	if err != nil {
		return told, fmt.Errorf("the policy that region %s has been given: %w", region, err)
	}
	inForce, err := descriptor.ParsePolicy(res.GetPolicyInForce())
	if err != nil {
		return told, fmt.Errorf("the policy that is in force in region %s: %w", region, err)
	}
	return ServicePolicy{declared, inForce, groups(res)}, nil
}

func (p *Peers) measure(ctx context.Context, region, holder string, bytes bool) (*v1.MeasureHoldingsResponse, error) {
	at := store.Location{Service: p.self.Service, Region: region}
	peer, err := p.Peer(at)
	if err != nil {
		return nil, err
	}
	census, ok := peer.(Census)
	if !ok {
		return nil, fmt.Errorf("%s cannot be asked what it owns", at)
	}
	call, err := p.Call(at)
	if err != nil {
		return nil, err
	}
	return census.MeasureHoldings(ctx, &v1.MeasureHoldingsRequest{Call: call, Holder: holder, Bytes: bytes})
}

func groups(res *v1.MeasureHoldingsResponse) []store.Holding {
	groups := make([]store.Holding, len(res.GetGroups()))
	for i, g := range res.GetGroups() {
		groups[i] = store.Holding{Type: g.GetType(), Regional: g.GetRegional(), Regions: g.GetRegions(), Rows: g.GetRows(), Bytes: g.GetBytes(), Example: g.GetExample()}
	}
	return groups
}
