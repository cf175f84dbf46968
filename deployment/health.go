package deployment

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/verify"
)

// lookInterval is the time between two looks at what is verified.
const lookInterval = 10 * time.Second

// Verified lists what is verified of each peer and type, and of the search store under verify.SearchPeer, as it was some seconds ago: nil where Manage does not run. It asks no database.
func (d *Deployment) Verified() []postgres.Verified {
	if all := d.verified.Load(); all != nil {
		return *all
	}
	return nil
}

// VerifyInterval is the time between two verifications of the same copies in the background; negative: there are none.
func (d *Deployment) VerifyInterval() time.Duration {
	return cmp.Or(d.cfg.VerifyInterval, DefaultVerifyInterval)
}

// watchVerified is the part of Manage that keeps Verified.
func (d *Deployment) watchVerified(ctx context.Context) error {
	for {
		if all, err := d.core.Verified(ctx); err == nil { // without an answer the times just get older
			all = slices.DeleteFunc(all, func(v postgres.Verified) bool { return d.isGone(v) })
			d.verified.Store(&all)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookInterval):
		}
	}
}

// isGone reports whether an entry is about a type that the schema does not have any more, or that is not searched any more: no pass looks at it again.
func (d *Deployment) isGone(v postgres.Verified) bool {
	interval := d.VerifyInterval()
	if interval > 0 && time.Since(v.FinishedAt) < 3*interval {
		return false
	}
	version := d.version()
	if v.Peer == verify.SearchPeer {
		_, searched := search.TypesOf(version)[v.Type]
		return !searched
	}
	return version.Type(v.Type) == nil
}

// References says how the references of the Deployment are; nil while some shards have no node that works on them. It asks no database.
func (d *Deployment) References() *constraint.Health {
	all, _ := d.nodes.reports(kindConstraint)
	return mergeReferences(d.spec.Ring, all)
}

func mergeReferences(ring int, all []aged) *constraint.Health {
	covered := 0
	var h constraint.Health
	for _, n := range all {
		if n.References == nil {
			continue
		}
		covered += int(n.Shards.To - n.Shards.From)
		r := *n.References
		h.Dangling += r.Dangling
		h.Cascading += r.Cascading
		h.Refused += r.Refused
		if r.OldestKind != "" && r.Oldest+n.age >= h.Oldest {
			h.Oldest, h.OldestKind = r.Oldest+n.age, r.OldestKind
		}
		h.Unreachable = append(h.Unreachable, r.Unreachable...)
	}
	if covered < ring {
		return nil
	}
	slices.SortFunc(h.Unreachable, func(a, b store.Location) int { return registry.Key(a).Compare(registry.Key(b)) })
	h.Unreachable = slices.Compact(h.Unreachable)
	return &h
}
