package deployment

import (
	"context"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store/policy"
)

// Orphans says, as sentences, which resources the Deployment owns that the policy of its service does not let it own; none if there are none. A ServiceDescriptor can be changed without
// asking any region, other than a resource with a policy, which is refused (spec 4.9). Nothing happens to such resources: they stay, and can be changed and deleted where they are.
func (d *Deployment) Orphans(ctx context.Context) ([]string, error) {
	v := d.version()
	owned, err := policy.Holdings(ctx, v, d.core, "", false)
	if err != nil {
		return nil, err
	}
	return policy.Orphans(d.cfg.Region, owned, v.Service.Policy), nil
}

// watchPolicy is the part of Manage that says what a new policy of the service leaves behind.
func (d *Deployment) watchPolicy(ctx context.Context) error {
	var said *descriptor.Policy
	for range d.cfg.Registry.Subscribe(ctx) {
		now := d.version().Service.Policy
		if now == said {
			continue
		}
		orphans, err := d.Orphans(ctx)
		if err != nil {
			d.log.WarnContext(ctx, "what the policy of the service leaves behind is not known", "error", err)
			continue // the next event asks again
		}
		for _, o := range orphans {
			d.log.WarnContext(ctx, "the policy of the service orphans resources", "resources", o)
		}
		said = now
	}
	return nil
}
