package demo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// words that are searched for if a description of the input has them.
var words = [][]byte{[]byte("library"), []byte("compression")}

// searchWords are what is searched for: words of descriptions, or, if no description has them, the name of a package that is not deleted.
func (in *input) searchWords(deleted map[string]bool) (found []string) {
	for _, word := range words {
		for _, line := range in.lines {
			var p struct{ Description string }
			if bytes.Contains(line, word) && json.Unmarshal(line, &p) == nil && strings.Contains(p.Description, string(word)) {
				found = append(found, string(word))
				break
			}
		}
	}
	if len(found) > 0 {
		return found
	}
	for i := range in.nodes {
		if _, name, ok := strings.Cut(in.nodes[i].name, "/packages/"); ok && !deleted[in.nodes[i].name] {
			return []string{name}
		}
	}
	return nil
}

// searchHits is the part of an answer that is shown.
type searchHits struct {
	Hits []struct {
		Resource   struct{ Name string }
		Highlights []struct{ Snippet string }
	}
}

// search asks each region for the same words, once its search store is complete: as many documents as its database has packages, counted past the product.
// Then it cuts a region off and asks that one again.
func (r *run) search(ctx context.Context) error {
	if len(r.words) == 0 {
		r.screen.note("the input has no package to search for")
		return nil
	}
	for _, name := range Regions {
		region := r.world.regions[name]
		if err := r.waitSearchable(ctx, region); err != nil {
			return err
		}
		for _, word := range r.words {
			if err := r.searchIn(ctx, region, word, ""); err != nil {
				return err
			}
			r.searches++
		}
	}
	name := Regions[len(Regions)-1]
	if len(r.cfg.Cuts) > 0 {
		name = r.cfg.Cuts[0].Region
	}
	r.world.cut(name)
	defer r.world.heal(name)
	for _, word := range r.words {
		if err := r.searchIn(ctx, r.world.regions[name], word, ", which is cut off,"); err != nil {
			return err
		}
		r.searches++
	}
	return nil
}

// searchIn searches in a region and shows the first hit. All hits must be rows of the region's own database, and there must be some if its packages have the word.
func (r *run) searchIn(ctx context.Context, region *region, word, remark string) error {
	began := time.Now()
	body, err := region.call(ctx, http.MethodGet, "/sections/-/packages:search?"+url.Values{"q": {word}, "pageSize": {"3"}}.Encode(), nil)
	took := time.Since(began)
	var found searchHits
	if err == nil {
		err = json.Unmarshal(body, &found)
	}
	var has int64
	if err == nil {
		err = region.pool.QueryRow(ctx, `SELECT count(*) FROM `+table+` WHERE type = 'Package' AND state <> 2 AND body->>'description' ~* ('\m' || $1 || '\M')`, word).Scan(&has)
	}
	if err != nil {
		return fmt.Errorf("search in %s: %w", region.name, err)
	}
	names := make([]string, len(found.Hits))
	for i, h := range found.Hits {
		names[i] = h.Resource.Name
	}
	var known int
	if err := region.pool.QueryRow(ctx, "SELECT count(*) FROM "+table+" WHERE state <> 2 AND name = ANY ($1)", names).Scan(&known); err != nil {
		return fmt.Errorf("search in %s: %w", region.name, err)
	}
	switch {
	case known != len(names):
		return fmt.Errorf("search in %s for %q: %v are not all in its database", region.name, word, names)
	case len(names) == 0 && has > 0:
		return fmt.Errorf("search in %s for %q: %w in the search database, and %d packages have the word", region.name, word, errNoHits, has)
	case len(names) == 0:
		r.screen.note("search in %s%s for %q: nothing", region.name, remark, word)
		return nil
	}
	hit := found.Hits[0]
	text := ""
	if n := len(hit.Highlights); n > 0 {
		text = ": " + strings.Join(strings.Fields(html.UnescapeString(strings.NewReplacer("<em>", "*", "</em>", "*").Replace(hit.Highlights[n-1].Snippet))), " ")
	}
	of := ""
	if has > 0 {
		of = fmt.Sprintf("%s in its database have it, ", count(int(has), "package"))
	}
	r.screen.note("search in %s%s for %q: %.1f ms, %sfirst %s%s", region.name, remark, word, milliseconds(took), of, hit.Resource.Name, text)
	return nil
}

// errNoHits is a search that finds nothing although there is something, as while the search database still fills.
var errNoHits = errors.New("nothing")

// searchDuring searches in a region while it is cut off, in what it has got so far. During the load that may be nothing at first.
func (r *run) searchDuring(ctx context.Context, c Cut) error {
	if len(r.words) == 0 {
		return nil // the searches at the end say so
	}
	ctx, cancel := context.WithTimeout(ctx, c.For)
	defer cancel()
	for {
		var packages int64
		region := r.world.regions[c.Region]
		err := region.pool.QueryRow(ctx, "SELECT count(*) FROM (SELECT FROM "+table+" WHERE type = 'Package' AND state <> 2 LIMIT 1) AS x").Scan(&packages)
		if err == nil && packages > 0 {
			err = r.searchIn(ctx, region, r.words[0], ", which is cut off,")
			if !errors.Is(err, errNoHits) {
				return err
			}
		}
		if sleep(ctx, 200*time.Millisecond) != nil {
			r.screen.note("search in %s, which is cut off: %v", c.Region, cmp.Or(err, errNoHits))
			return nil
		}
	}
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
		if err := region.pool.QueryRow(ctx, "SELECT count(*) FROM "+table+" WHERE type = 'Package' AND state <> 2").Scan(&packages); err != nil {
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
