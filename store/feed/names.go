package feed

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// ReadNames is ReadResources for those who need no more than which names have changed, owned ones and copies alike. typ is the short type name.
func (f *Feed) ReadNames(ctx context.Context, c Cursor, emit func(name, typ string) error) (Read, error) {
	return f.read(ctx, changes, c, "name, type", resources, " AND ($1 = '' OR type = $1)", []any{""}, func(rows pgx.Rows) error {
		var change, name, typ string
		if err := rows.Scan(&change, &name, &typ); err != nil {
			return fmt.Errorf("read changed names: %w", err)
		}
		return emit(name, typ)
	})
}
