package postgres

import (
	"context"
	"errors"
	"strconv"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/listquery"
	"github.com/dbcontroller/db-controller/store/row"
)

// Get implements store.Reader.
func (s *Store) Get(ctx context.Context, name string) (*store.Resource, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+row.ResourceColumns+" FROM resources WHERE name = $1 AND state <> 2", name)
	if err != nil {
		return nil, wrap(err, "get %s", name)
	}
	r, err := pgx.CollectExactlyOneRow(rows, scanResource)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, store.Errorf(store.NotFound, name, "does not exist")
	}
	return r, wrap(err, "get %s", name)
}

// BatchGet implements store.Reader.
func (s *Store) BatchGet(ctx context.Context, names []string) ([]*store.Resource, error) {
	if len(names) > store.MaxBatch {
		return nil, store.Invalid("names", "has more than 1000 entries: ask in several calls")
	}
	rows, err := s.pool.Query(ctx, "SELECT "+row.ResourceColumns+" FROM resources WHERE name = ANY ($1) AND state <> 2", names)
	if err != nil {
		return nil, wrap(err, "get %d resources", len(names))
	}
	found, err := pgx.CollectRows(rows, scanResource)
	if err != nil {
		return nil, wrap(err, "get %d resources", len(names))
	}
	byName := make(map[string]*store.Resource, len(found))
	for _, r := range found {
		byName[r.Name] = r
	}
	ordered := make([]*store.Resource, len(names))
	for i, n := range names {
		ordered[i] = byName[n]
	}
	return ordered, nil
}

// List implements store.Reader.
func (s *Store) List(ctx context.Context, q store.Query) (*store.Page, error) {
	c, err := listquery.Compile(q)
	if err != nil {
		return nil, err
	}
	var page store.Page
	var key string // of the last resource
	err = s.scan(ctx, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, "SELECT "+c.Key+", "+row.ResourceColumns+" FROM resources WHERE state <> 2 AND "+c.Where+
			" ORDER BY "+c.OrderBy+" LIMIT "+strconv.Itoa(c.PageSize+1), c.Args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for size := 0; rows.Next(); {
			if n := len(page.Resources); n == c.PageSize || size >= store.MaxPageBytes {
				page.NextPageToken = c.NextToken(key)
				break
			}
			r, err := row.ScanResource(rows, &key)
			if err != nil {
				return err
			}
			page.Resources = append(page.Resources, r)
			size += len(r.Body)
		}
		rows.Close()
		return rows.Err()
	})
	if err != nil {
		return nil, wrap(err, "list %s", q.Type)
	}
	return &page, nil
}

func scanResource(r pgx.CollectableRow) (*store.Resource, error) { return row.ScanResource(r) }
