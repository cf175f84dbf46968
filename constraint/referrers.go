package constraint

import (
	"context"
	"fmt"
	"slices"

	"github.com/dbcontroller/db-controller/store"
)

// Referrers asks another Deployment what there refers to resources of ours: those that would go or change with them, or would not let them go. A
// Deployment of a service that cannot know our names refers to none. The error says that it has not answered.
func (s *Store) Referrers(ctx context.Context, at store.Location, names []string) ([]store.Blocker, error) {
	answers, err := s.askPlan(ctx, hop{at: at, owner: s.cfg.Self, names: names})
	if err != nil {
		return nil, fmt.Errorf("ask %s what refers to %d resources: %w", at, len(names), err)
	}
	var all []store.Blocker
	for _, a := range answers {
		for _, c := range slices.Concat(a.GetDeletes(), a.GetUnsets()) {
			all = append(all, store.Blocker{Target: c.GetTarget(), Location: at, Referrer: c.GetName(), Field: c.GetField()})
		}
		for _, b := range a.GetBlockers() {
			all = append(all, store.Blocker{Target: b.GetTarget(), Location: at, Referrer: b.GetReferrer(), Field: b.GetField()})
		}
	}
	return all, nil
}
