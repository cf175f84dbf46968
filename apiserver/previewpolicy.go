package apiserver

import (
	"context"
	"fmt"
	"math"
	"slices"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
)

// Census tells what a region of the service owns under a policy, and the rates that it has measured: mixin.Peers.
type Census interface {
	Holdings(ctx context.Context, region, holder string, bytes bool) ([]store.Holding, map[string]float64, error)
}

// Names of measured rates: of changes of metadata.syncing at their owner, and, before the name of the owner, of copies where they are held.
const (
	ratePolicy = "policy"
	rateCopy   = "copy "
)

// previewPolicy asks every region what it owns under a policy, and adds up what a change would move. It writes nothing.
func (s *Server) previewPolicy(ctx context.Context, req *dbcontrollerv1.PreviewPolicyRequest) (*dbcontrollerv1.PolicyPreview, error) {
	if s.cfg.Census == nil {
		return nil, fail(connect.CodeUnimplemented, "NOT_SERVED", nil, nil, "this server previews no policies")
	}
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	was, err := s.policyOf(ctx, v, req.GetName())
	if err != nil {
		return nil, err
	}
	now, err := changedPolicy(was, req)
	if err != nil {
		return nil, err
	}
	p := preview{version: v, was: was, now: now, rates: map[string]map[string]float64{}}
	for _, d := range s.cfg.Topology.View().DeploymentsOf(s.cfg.Service) {
		p.regions = append(p.regions, d.Region)
	}
	slices.Sort(p.regions)
	p.owned = make([][]store.Holding, len(p.regions))
	p.errs = make([]error, len(p.regions))
	rates := make([]map[string]float64, len(p.regions))
	var g errgroup.Group
	for i, region := range p.regions {
		g.Go(func() error {
			p.owned[i], rates[i], p.errs[i] = s.cfg.Census.Holdings(ctx, region, req.GetName(), true)
			return nil
		})
	}
	_ = g.Wait() // each has its own error
	for i, region := range p.regions {
		p.rates[region] = rates[i]
	}
	return p.answer(s.cfg.Service)
}

// policyOf returns the policy of a holder, or of the service.
func (s *Server) policyOf(ctx context.Context, v *descriptor.Version, name string) (*descriptor.Policy, error) {
	if name == "" {
		p := v.Service.Policy
		if s.cfg.ServicePolicy != nil {
			p = s.cfg.ServicePolicy()
		}
		if p == nil {
			return nil, store.Errorf(store.FailedPrecondition, "", "service %s has no policy", s.cfg.Service)
		}
		return p, nil
	}
	n, err := parseName(v, "name", name)
	if err != nil {
		return nil, err
	}
	if !n.Type.IsPolicyHolder() {
		return nil, store.Invalid("name", fmt.Sprintf("a %s has no policy: name a policy holder", n.Type.Name))
	}
	r, err := s.cfg.Store.Get(ctx, n.Full)
	if err != nil {
		return nil, err
	}
	p, violations := n.Type.PolicyOf(r.Body)
	if len(violations) > 0 {
		return nil, store.Errorf(store.FailedPrecondition, n.Full, "its policy is invalid: %v", violations)
	}
	return p, nil
}

// changedPolicy is the policy that would be.
func changedPolicy(was *descriptor.Policy, req *dbcontrollerv1.PreviewPolicyRequest) (*descriptor.Policy, error) {
	spec := was.Spec()
	if text := req.GetPolicy(); text != "" {
		p, violations := descriptor.PolicyFromJSON([]byte(text))
		if len(violations) > 0 {
			return nil, store.Invalid("policy", fmt.Sprint(violations))
		}
		spec = p.Spec()
	}
	for _, r := range req.GetAddRegions() {
		if slices.Contains(spec.EnabledRegions, r) {
			return nil, store.Invalid("add_regions", fmt.Sprintf("%q is enabled already", r))
		}
		spec.EnabledRegions = append(spec.EnabledRegions, r)
	}
	for _, r := range req.GetRemoveRegions() {
		i := slices.Index(spec.EnabledRegions, r)
		if i < 0 {
			return nil, store.Invalid("remove_regions", fmt.Sprintf("%q is not enabled", r))
		}
		spec.EnabledRegions = slices.Delete(spec.EnabledRegions, i, i+1)
	}
	p, faults := descriptor.NewPolicy(spec, nil)
	if len(faults) > 0 {
		return nil, store.Invalid("policy", faults.ToAggregate().Error())
	}
	return p, nil
}

// preview is what the regions have answered. owned and errs are in the order of regions.
type preview struct {
	version  *descriptor.Version
	was, now *descriptor.Policy
	regions  []string
	owned    [][]store.Holding
	errs     []error
	rates    map[string]map[string]float64
}

// answer adds up. Owners work at the same time, and so do the regions that copy; what one region copies, it copies one after the other.
func (p *preview) answer(service string) (*dbcontrollerv1.PolicyPreview, error) {
	out := &dbcontrollerv1.PolicyPreview{Updates: map[string]int64{}}
	for _, text := range []struct {
		policy *descriptor.Policy
		to     *string
	}{{p.was, &out.Before}, {p.now, &out.After}} {
		var err error
		if *text.to, err = text.policy.JSON(); err != nil {
			return nil, fmt.Errorf("encode a policy: %w", err)
		}
	}
	concerned := policy.Concerned(p.was, p.now, p.regions)
	copying := map[string]float64{}
	unknown := map[string]bool{}
	var moves []policy.Move
	for i, owner := range p.regions {
		if err := p.errs[i]; err != nil {
			out.Unasked = append(out.Unasked, &dbcontrollerv1.UnaskedDeployment{Location: service + "/" + owner, Error: err.Error()})
			continue
		}
		if slices.Contains(concerned, owner) {
			out.Refusals = append(out.Refusals, policy.Orphans(owner, p.owned[i], p.now)...)
		}
		from, updates := policy.Moves(p.version, owner, p.owned[i], p.now, p.regions)
		moves = append(moves, from...)
		if updates > 0 {
			out.Updates[owner] = updates
			if rate := p.rates[owner][ratePolicy]; rate > 0 {
				out.Seconds = max(out.Seconds, float64(updates)/rate)
			} else {
				unknown["changes in "+owner] = true
			}
		}
		for _, m := range from {
			if rate := p.rates[m.Region][rateCopy+owner]; rate > 0 {
				copying[m.Region] += float64(m.Rows) / rate
			} else {
				unknown["copies from "+owner+" in "+m.Region] = true
			}
		}
	}
	for _, seconds := range copying {
		out.Seconds = max(out.Seconds, seconds)
	}
	out.Seconds = math.Ceil(out.Seconds*10) / 10
	for what := range unknown {
		out.UnknownRates = append(out.UnknownRates, what)
	}
	slices.Sort(out.UnknownRates)
	slices.SortFunc(moves, policy.CompareMoves)
	for _, m := range moves {
		out.Moves = append(out.Moves, &dbcontrollerv1.PolicyMove{Region: m.Region, Owner: m.Owner, Type: m.Type, Dropped: m.Dropped, Rows: m.Rows, Bytes: m.Bytes})
	}
	return out, nil
}
