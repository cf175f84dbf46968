package deployment

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
)

// servicePolicy is the policy of the service that is in force in this region. It is kept in the database, and follows the ServiceDescriptor only where that leaves no resources behind
// that nobody may own (spec 4.9): see followPolicy. It is safe for concurrent use.
type servicePolicy struct {
	policy  atomic.Pointer[descriptor.Policy]
	reasons atomic.Pointer[[]string]

	mu       sync.Mutex
	declared *descriptor.Version // of which inForce was made
	inForce  *descriptor.Version
}

// apply returns the declared version with the policy in force. It is the same pointer as long as both are.
func (p *servicePolicy) apply(declared *descriptor.Version) *descriptor.Version {
	now := p.policy.Load()
	if declared.Service == nil || declared.Service.Policy.Equal(now) {
		return declared
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.declared != declared || p.inForce.Service.Policy != now {
		p.declared, p.inForce = declared, declared.WithPolicy(now)
	}
	return p.inForce
}

// PolicyHeld says, as sentences, why the policy of the service that is declared is not in force here: the former one is, as long as there are any. Nil if there are none. It asks no database.
func (d *Deployment) PolicyHeld() []string {
	if reasons := d.servicePolicy.reasons.Load(); reasons != nil {
		return *reasons
	}
	return nil
}

// ServicePolicy is the policy of the service that is in force here; nil without one.
func (d *Deployment) ServicePolicy() *descriptor.Policy { return d.servicePolicy.policy.Load() }

// policyLook is the time between two looks, at memory, whether another policy is declared; one that is held back is judged again after policyAgain, or later if that takes long.
const (
	policyLook    = 100 * time.Millisecond
	policyAgain   = time.Second
	policyAgainAt = time.Minute // at the latest
)

// followPolicy is the part of every process that brings the declared policy of the service into force. What a ServiceDescriptor says was not asked of any region before it was applied, other
// than the policy of a resource, so each region judges it when it learns of it, and again until it is in force.
func (d *Deployment) followPolicy(ctx context.Context) error {
	for {
		wait := policyLook
		if s := d.declared().Service; s != nil && !s.Policy.Equal(d.ServicePolicy()) {
			began := time.Now()
			reasons, err := d.takePolicy(ctx, s.Policy)
			if ctx.Err() != nil {
				return nil //nolint:nilerr // asked to stop
			}
			if err != nil {
				reasons = []string{"it cannot be judged: " + err.Error()}
			}
			if !slices.Equal(reasons, d.PolicyHeld()) && len(reasons) > 0 {
				d.log.WarnContext(ctx, "the declared policy of the service is not in force, the former one is", "reasons", reasons)
			}
			d.servicePolicy.reasons.Store(&reasons)
			if len(reasons) > 0 {
				wait = min(max(policyAgain, 20*time.Since(began)), policyAgainAt) // counting takes a twentieth of the time at most
			}
		} else if len(d.PolicyHeld()) > 0 {
			d.servicePolicy.reasons.Store(nil) // it was taken back
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// openTimeout is how long the other regions are asked, when a database is opened for the first time, which policy is in force.
const openTimeout = 3 * time.Second

// openPolicy finds out which policy is in force: the one that is stored. A database that is opened for the first time follows the other regions, and if none of them answers, what is
// declared: a region that is added while a policy is held back must not be the only one that follows it.
func (d *Deployment) openPolicy(ctx context.Context) error {
	_, known, err := d.core.ServicePolicy(ctx)
	if err != nil {
		return err
	}
	if !known {
		initial := d.policyElsewhere(ctx)
		if s := d.declared().Service; initial == nil && s != nil {
			initial = s.Policy
		}
		text, err := initial.JSON()
		if err != nil {
			return err
		}
		if _, err := d.core.TakeServicePolicy(ctx, text, text); err != nil { // unless another process was first
			return err
		}
	}
	_, err = d.readPolicy(ctx)
	return err
}

// policyElsewhere asks the other regions which policy is in force there; nil if nobody knows one.
func (d *Deployment) policyElsewhere(ctx context.Context) *descriptor.Policy {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	regions := slices.DeleteFunc(d.regions(), func(r string) bool { return r == d.cfg.Region })
	answers := make([]*descriptor.Policy, len(regions))
	var asking sync.WaitGroup
	for i, region := range regions {
		asking.Go(func() {
			if told, err := d.peers.ServicePolicy(ctx, region); err == nil {
				answers[i] = told.InForce
			}
		})
	}
	asking.Wait()
	for _, p := range answers {
		if p != nil {
			return p
		}
	}
	return nil
}

// readPolicy returns the policy in force as it is stored. Every process of the Deployment may have changed it.
func (d *Deployment) readPolicy(ctx context.Context) (string, error) {
	stored, known, err := d.core.ServicePolicy(ctx)
	if err != nil || !known {
		return "", cmp.Or(err, errors.New("ctl.service_policy is empty"))
	}
	p, err := descriptor.ParsePolicy(stored)
	if err != nil {
		return "", fmt.Errorf("read the policy of the service from ctl.service_policy: %w", err)
	}
	d.servicePolicy.policy.Store(p)
	return stored, nil
}

// takePolicy brings the declared policy of the service into force, or says why not.
func (d *Deployment) takePolicy(ctx context.Context, now *descriptor.Policy) (reasons []string, err error) {
	text, err := now.JSON()
	if err != nil {
		return nil, err
	}
	stored, err := d.readPolicy(ctx)
	if err != nil {
		return nil, err
	}
	was := d.ServicePolicy()
	if now.Equal(was) {
		return nil, nil
	}
	concerned := policy.Concerned(was, now, d.regions())
	for _, region := range concerned {
		first := region != d.cfg.Region && (region < d.cfg.Region || !slices.Contains(concerned, d.cfg.Region))
		reasons = append(reasons, d.judge(ctx, region, now, first)...)
	}
	if len(reasons) > 0 {
		return reasons, nil
	}
	if _, err := d.core.TakeServicePolicy(ctx, stored, text); err != nil {
		return nil, err
	}
	if _, err := d.readPolicy(ctx); err != nil { // if another one was taken meanwhile, that is judged next
		return nil, err
	}
	d.log.InfoContext(ctx, "the policy of the service is in force", "was", stored, "now", text)
	return nil, nil
}

// judge says why a region, from which a policy takes something, holds it back. Those regions take it one after the other, in the order of their names, and before all others (first): from
// then on they create nothing that they may not own. If somebody else went first, a resource could be created in two regions.
func (d *Deployment) judge(ctx context.Context, region string, now *descriptor.Policy, first bool) []string {
	if !slices.Contains(d.regions(), region) {
		return nil // it owns nothing
	}
	told, err := d.peers.ServicePolicy(ctx, region)
	if err != nil {
		return []string{fmt.Sprintf("region %s must say whether it owns resources that this policy takes from it, and cannot be asked: %v", region, err)}
	}
	if told.InForce.Equal(now) {
		return nil // what it owns all the same was created meanwhile, and stays with it
	}
	if reasons := policy.Orphans(region, told.Owned, now); len(reasons) > 0 {
		return reasons
	}
	if !told.Declared.Equal(now) {
		return []string{fmt.Sprintf("region %s, from which it takes something, has not been given this policy: apply the ServiceDescriptor there, too", region)}
	}
	if first {
		return []string{fmt.Sprintf("region %s, from which it takes something, must take it first", region)}
	}
	return nil
}

// regions are all that the service is declared in.
func (d *Deployment) regions() (regions []string) {
	for _, d := range d.cfg.Registry.View().DeploymentsOf(d.cfg.Service) {
		regions = append(regions, d.Region)
	}
	return regions
}

// census is the Census of the region layer.
func (d *Deployment) census(ctx context.Context, in, holder string) ([]store.Holding, error) {
	if !slices.Contains(d.regions(), in) {
		return nil, nil
	}
	owned, _, err := d.peers.Holdings(ctx, in, holder, false)
	return owned, err
}
