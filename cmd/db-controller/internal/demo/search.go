package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// searchWord is what is searched for: in the descriptions of the input, or among the names of the small data set, which has no descriptions.
func (r *run) searchWord() string {
	if r.cfg.Load != "" {
		return "library"
	}
	return "p07"
}

// searchHits is the part of an answer that is shown.
type searchHits struct {
	Hits []struct {
		Resource   struct{ Name string }
		Highlights []struct{ Snippet string }
	}
}

// search asks each region for the same word, once its search store is complete: as many documents as its database has packages, counted past the product.
func (r *run) search(ctx context.Context) error {
	for _, name := range Regions {
		region := r.world.regions[name]
		if err := r.waitSearchable(ctx, region); err != nil {
			return err
		}
		if err := r.searchIn(ctx, region, ""); err != nil {
			return err
		}
	}
	return nil
}

// searchIn searches in a region, and shows the first hit.
func (r *run) searchIn(ctx context.Context, region *region, remark string) error {
	began := time.Now()
	body, err := region.call(ctx, http.MethodGet, "/sections/-/packages:search?"+url.Values{"q": {r.searchWord()}, "pageSize": {"3"}}.Encode(), nil)
	var found searchHits
	if err == nil {
		err = json.Unmarshal(body, &found)
	}
	if err != nil {
		return fmt.Errorf("search in %s: %w", region.name, err)
	}
	if len(found.Hits) == 0 {
		r.screen.note("search in %s%s for %q: nothing yet", region.name, remark, r.searchWord())
		return nil
	}
	hit := found.Hits[0]
	text := ""
	if n := len(hit.Highlights); n > 0 {
		text = ": " + strings.Join(strings.Fields(html.UnescapeString(strings.NewReplacer("<em>", "*", "</em>", "*").Replace(hit.Highlights[n-1].Snippet))), " ")
	}
	r.screen.note("search in %s%s for %q: %.1f ms, first %s%s", region.name, remark, r.searchWord(), milliseconds(time.Since(began)), hit.Resource.Name, text)
	return nil
}

// waitSearchable returns when a region's search database has as many packages as its database.
func (r *run) waitSearchable(ctx context.Context, region *region) error {
	conn, err := pgx.Connect(ctx, region.searchDSN)
	if err != nil {
		return fmt.Errorf("read the search database of %s: %w", region.name, err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for {
		var packages, documents int64
		if err := region.pool.QueryRow(ctx, "SELECT count(*) FROM v1.resources WHERE type = 'Package' AND state <> 2").Scan(&packages); err != nil {
			return fmt.Errorf("count the packages of %s: %w", region.name, err)
		}
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM search_v1.documents").Scan(&documents); err == nil && documents == packages {
			r.screen.note("%s has all of its %s packages in its search database", region.name, grouped(packages))
			return nil
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return fmt.Errorf("the search database of %s has %d documents, and its database %d packages: %w", region.name, documents, packages, err)
		}
	}
}
