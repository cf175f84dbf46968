package fleet

import (
	"context"
	"errors"
	"fmt"

	"github.com/dbcontroller/db-controller/controllers"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Referrers implements controllers.Cleaner.
func (f *Fleet) Referrers(ctx context.Context, d registry.Deployment, leaving []registry.Key) (names []string, mark string, err error) {
	open, err := f.open(d.Service, d.Region)
	if err != nil {
		return nil, "", err
	}
	return open.Referrers(ctx, leaving)
}

// Drop implements controllers.Cleaner.
func (f *Fleet) Drop(ctx context.Context, d registry.Deployment, mark string) error {
	if f.member(d.Key) != nil {
		return fmt.Errorf("%s still runs in this process: %w", d.Key, controllers.ErrInUse)
	}
	l := deployment.Leftovers{Deployment: d}
	for _, c := range []struct {
		field string
		ref   registry.SecretRef
		to    *string
	}{{"database", d.Database, &l.DSN}, {"search", d.Search, &l.SearchURL}, {"cache", d.Cache, &l.CacheURL}} {
		text, err := f.connection(ctx, c.field, c.ref)
		if err != nil {
			return err
		}
		*c.to = string(text)
	}
	if l.DSN == "" {
		return nil // it never had a database
	}
	err := deployment.Drop(ctx, l, mark)
	switch {
	case errors.Is(err, postgres.ErrInUse):
		return fmt.Errorf("%w: %w", controllers.ErrInUse, err)
	case errors.Is(err, postgres.ErrReferred):
		return fmt.Errorf("%w: %w", controllers.ErrReferred, err)
	}
	return err
}
