package deployment

import (
	"context"
	"slices"
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store/policy"
)

// Orphans says, as sentences, which resources the Deployment owns that the policy of its service does not let it own, as was counted last; none if there are none, or where Manage does
// not run. A ServiceDescriptor can be changed without asking any region, other than a resource with a policy, which is refused (spec 4.9). Nothing happens to such resources: they stay,
// and can be changed and deleted where they are. It asks no database.
func (d *Deployment) Orphans() []string {
	if o := d.orphans.Load(); o != nil {
		return *o
	}
	return nil
}

func (d *Deployment) countOrphans(ctx context.Context) ([]string, *descriptor.Policy, error) {
	v := d.version()
	owned, err := policy.Holdings(ctx, v, d.core, "", false)
	if err != nil {
		return nil, nil, err
	}
	return policy.Orphans(d.cfg.Region, owned, v.Service.Policy), v.Service.Policy, nil
}

// watchPolicy is the part of Manage that keeps Orphans. It counts when the policy has changed and, while something is left behind, again and again until it is gone.
func (d *Deployment) watchPolicy(ctx context.Context) error {
	var counted *descriptor.Policy
	for {
		wait := lookInterval
		if orphans := d.Orphans(); len(orphans) > 0 || d.version().Service.Policy != counted {
			began := time.Now()
			now, of, err := d.countOrphans(ctx)
			switch {
			case err != nil && ctx.Err() == nil:
				d.log.WarnContext(ctx, "what the policy of the service leaves behind is not known", "error", err)
			case err == nil:
				if !slices.Equal(now, orphans) {
					d.log.WarnContext(ctx, "what the policy of the service leaves behind has changed", "resources", now)
				}
				d.orphans.Store(&now)
				counted = of
				wait = max(wait, 100*time.Since(began)) // counting takes a hundredth of the time at most
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}
