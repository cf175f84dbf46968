package deployment

import (
	"context"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/cache"
)

// openCache puts the cache on top of the stack, if there is one. One that is configured wrongly costs speed: the Deployment runs without it.
func (d *Deployment) openCache(ctx context.Context) error {
	if d.cfg.CacheURL == "" {
		return nil
	}
	database, err := d.core.Identity(ctx)
	if err != nil {
		return err
	}
	d.cache, err = cache.Layer(d.stack, cache.Config{
		URL: d.cfg.CacheURL, Identity: cacheIdentity(d.cfg.Key, d.spec.Version, database),
		Lists: d.listsCached, Registerer: d.registerer(), Logger: d.log,
	})
	if err != nil {
		d.log.ErrorContext(ctx, "there is no cache: spec.cache is wrong", "error", err)
	}
	return nil
}

// listsCached says whether pages of the type are cached; an edit of the Deployment applies live.
func (d *Deployment) listsCached(typ string) bool {
	spec, _ := d.cfg.Registry.View().Deployment(registry.Key{Service: d.cfg.Service, Region: d.cfg.Region})
	return slices.Contains(spec.CacheLists, typ)
}

// served is what the API server reads from and writes to.
func (d *Deployment) served() store.Store {
	if d.cache != nil {
		return d.cache
	}
	return d.stack
}

// withCache runs serve, and what keeps the cache right.
func (d *Deployment) withCache(ctx context.Context, serve func(context.Context) error) error {
	if d.cache == nil {
		return serve(ctx)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.cache.Run(ctx, d.core.Feed()) })
	g.Go(func() error { return serve(ctx) })
	return g.Wait()
}
