package deployment

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
	searchpostgres "github.com/dbcontroller/db-controller/search/postgres"
	searchredis "github.com/dbcontroller/db-controller/search/redis"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/cache"
	"github.com/dbcontroller/db-controller/store/postgres"
)

const (
	// maxReferrers is how many are listed of those that are in the way of a deletion.
	maxReferrers = 10
	// referredPage is how many references others are asked about at once.
	referredPage = 500
)

// Referrers lists some of the resources of other Deployments that refer to resources here, or may be about to. Those of Deployments that are not declared, and of
// those in leaving, do not count; owner references do not, either: who is owned notices that its owner is gone. Without any, mark says of which state of the
// database that is true (postgres.Drop). An error says that it cannot be known now.
func (d *Deployment) Referrers(ctx context.Context, leaving []registry.Key) (names []string, mark string, err error) {
	if mark, err = d.core.ReferenceMark(ctx); err != nil {
		return nil, "", err
	}
	view := d.cfg.Registry.View()
	if _, ok := view.Service(d.cfg.Service); !ok {
		return nil, "", fmt.Errorf("no ServiceDescriptor of %s is declared: others cannot be asked for references to its resources", d.cfg.Service)
	}
	counts := func(at store.Location) bool {
		key := registry.Key(at)
		_, declared := view.Deployment(key)
		return declared && key != d.cfg.Key && !slices.Contains(leaving, key)
	}
	suspects, err := d.core.Suspects(ctx, d.peers.Importers())
	if err != nil {
		return nil, "", err
	}
	if suspects = slices.DeleteFunc(suspects, func(at store.Location) bool { return !counts(at) }); len(suspects) > 0 {
		return nil, "", fmt.Errorf("after a failover of the database the references of %s are not known again yet", suspects[0])
	}
	tentative, err := d.core.Tentative(ctx, referredPage)
	if err != nil {
		return nil, "", err
	}
	for _, b := range tentative {
		if counts(b.Location) {
			names = append(names, fmt.Sprintf("a write of %s in %s, not known to have ended", b.Referrer, b.Location))
		}
	}
	for after := (store.Blocker{}); len(names) < maxReferrers; {
		page, err := d.core.ReferredElsewhere(ctx, after, referredPage)
		if err != nil {
			return nil, "", err
		}
		if len(page) == 0 {
			break
		}
		after = page[len(page)-1]
		by := map[store.Location][]string{}
		for _, b := range page {
			if counts(b.Location) {
				by[b.Location] = append(by[b.Location], b.Target)
			}
		}
		for at, targets := range by {
			found, err := d.constraints.Referrers(ctx, at, targets)
			if err != nil {
				return nil, "", err
			}
			for _, b := range found {
				names = append(names, fmt.Sprintf("%s in %s", b.Referrer, at))
			}
		}
	}
	slices.Sort(names)
	if names = slices.Compact(names); len(names) > maxReferrers {
		names = append(names[:maxReferrers:maxReferrers], "and others")
	}
	return names, mark, nil
}

// Leftovers are where the data of a Deployment is that is no part of the topology any more.
type Leftovers struct {
	registry.Deployment
	// DSN, CacheURL and SearchURL are those of Config; never logged.
	DSN, CacheURL, SearchURL string
}

// Drop drops the data of a Deployment: first what is in the database, as postgres.Drop does with its errors and mark, then what others can fill again. What is not there is dropped, so it may be
// repeated.
func Drop(ctx context.Context, l Leftovers, mark string) error {
	identity, err := postgres.IdentityOf(ctx, l.DSN)
	if err != nil {
		return err
	}
	if err := postgres.Drop(ctx, postgres.Config{DSN: l.DSN, Service: l.Service, Region: l.Region}, mark); err != nil {
		return err
	}
	var failed []error
	if l.SearchURL != "" {
		var err error
		switch l.SearchType {
		case v1alpha1.SearchPostgres:
			err = searchpostgres.Drop(ctx, searchpostgres.Config{DSN: l.SearchURL, Service: l.Service, Region: l.Region, Version: l.Version})
		case v1alpha1.SearchRedis:
			err = searchredis.Drop(ctx, searchredis.Config{URL: l.SearchURL, Service: l.Service, Region: l.Region, Version: l.Version})
		}
		failed = append(failed, err)
	}
	if l.CacheURL != "" {
		failed = append(failed, cache.Drop(ctx, l.CacheURL, cacheIdentity(l.Key, l.Version, identity)))
	}
	return errors.Join(failed...)
}

// cacheIdentity names what is cached (cache.Config).
func cacheIdentity(key registry.Key, version, database string) string {
	return strings.Join([]string{key.String(), version, database}, " ")
}
