package deployment

import (
	"context"
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

// openPolicy finds out which policy is in force. What is declared when a database is opened for the first time is.
func (d *Deployment) openPolicy(ctx context.Context) error {
	s := d.declared().Service
	if s == nil {
		return d.checkVersion()
	}
	declared, err := s.Policy.JSON()
	if err == nil {
		_, err = d.readPolicy(ctx, declared)
	}
	return err
}

// readPolicy returns the policy in force as it is stored, at first that which is declared. Every process of the Deployment may have changed it.
func (d *Deployment) readPolicy(ctx context.Context, declared string) (string, error) {
	stored, err := d.core.ServicePolicy(ctx, declared)
	if err != nil {
		return "", err
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
	stored, err := d.readPolicy(ctx, text)
	if err != nil {
		return nil, err
	}
	was := d.ServicePolicy()
	if now.Equal(was) {
		return nil, nil
	}
	for _, region := range policy.Concerned(was, now, d.regions()) {
		reasons = append(reasons, d.judge(ctx, region, now)...)
	}
	if len(reasons) > 0 {
		return reasons, nil
	}
	if _, err := d.core.TakeServicePolicy(ctx, stored, text); err != nil {
		return nil, err
	}
	if _, err := d.readPolicy(ctx, text); err != nil { // if another one was taken meanwhile, that is judged next
		return nil, err
	}
	d.log.InfoContext(ctx, "the policy of the service is in force", "was", stored, "now", text)
	return nil, nil
}

// judge says why a region, from which a policy takes something, holds it back. All regions ask the same ones, and take a policy only after it has been declared to each of those: otherwise
// one that has not heard of it yet could go on to create what it may not own.
func (d *Deployment) judge(ctx context.Context, region string, now *descriptor.Policy) []string {
	if !slices.Contains(d.regions(), region) {
		return nil // it owns nothing
	}
	declared, owned, err := d.peers.Declared(ctx, region)
	if err != nil {
		return []string{fmt.Sprintf("region %s must say whether it owns resources that this policy takes from it, and cannot be asked: %v", region, err)}
	}
	if reasons := policy.Orphans(region, owned, now); len(reasons) > 0 {
		return reasons
	}
	if !declared.Equal(now) {
		return []string{fmt.Sprintf("region %s, from which it takes something, has not been given this policy: apply the ServiceDescriptor there, too", region)}
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
