package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/listquery"
)

// headline asks for up to two parts of a text. The marks are control characters, which no document has in it.
const headline = `StartSel="` + search.MarkBegin + `", StopSel="` + search.MarkEnd + `", MaxFragments=2, MinWords=8, MaxWords=24, FragmentDelimiter=" … "`

// Search implements search.Store.
func (s *Store) Search(ctx context.Context, q search.Query) (*search.Result, error) {
	p, err := q.Plan()
	if err != nil {
		return nil, err
	}
	c, err := listquery.Compile(store.Query{Type: p.Type.Name, Prefix: p.Prefix, Filter: p.Filter})
	if err != nil {
		return nil, err
	}
	b := statement{where: c.Where, args: c.Args}
	if narrow := b.contained(p.Where, p.Type.Search); narrow != "" {
		b.where += " AND " + narrow
	}
	b.score = "0::float4"
	if p.Text != "" {
		b.text = "websearch_to_tsquery('english', " + b.arg(p.Text, "text") + ")"
		b.where += " AND tsv @@ " + b.text
		b.score = "ts_rank(tsv, " + b.text + ")"
	}
	result := &search.Result{}
	// One snapshot, so that the counts are those of the hits.
	err = pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		for _, path := range p.Facets {
			facet, err := b.facet(ctx, tx, path)
			if err != nil {
				return err
			}
			result.Facets = append(result.Facets, facet)
		}
		return b.page(ctx, tx, p, result)
	})
	if err != nil {
		return nil, wrap(err, "search")
	}
	return result, nil
}

// statement are the pieces that the statements of one query share. What comes from the user is in args.
type statement struct {
	where, text, score string
	args               []any
}

func (b *statement) arg(v any, typ string) string {
	b.args = append(b.args, v)
	return fmt.Sprintf("$%d::%s", len(b.args), typ)
}

// contained is a condition that follows from the filter n and that the index of body can answer; empty without one. It only ever narrows down: the filter itself is judged, too.
func (b *statement) contained(n listquery.Node, s *descriptor.Search) string {
	if n.Operator == "NOT" {
		return ""
	}
	var parts []string
	before := len(b.args)
	for _, o := range n.Operands {
		part := b.contained(o, s)
		if part == "" && n.Operator == "OR" {
			b.args = b.args[:before] // PostgreSQL takes no parameter that is not used
			return ""                // anything may match
		}
		if part != "" {
			parts = append(parts, part)
		}
	}
	c := n.Comparison
	switch {
	case c == nil && len(parts) == 0:
		return ""
	case c == nil:
		return "(" + strings.Join(parts, " "+n.Operator+" ") + ")"
	case !c.Body || c.Pattern != nil || c.Present() || c.Operator != "=" && c.Operator != ":":
		return ""
	}
	var value any = c.Value
	if c.Number() || c.Boolean() {
		if value = json.RawMessage(c.Value); !json.Valid([]byte(c.Value)) {
			return ""
		}
	}
	if f := s.Filter(c.Field); f == nil {
		return ""
	} else if f.List {
		value = []any{value}
	}
	path := strings.Split(c.Field, ".")
	for i := range path {
		value = map[string]any{path[len(path)-1-i]: value}
	}
	text, err := json.Marshal(value)
	if err != nil {
		return "" // without it the filter costs more, and says the same
	}
	return "body @> " + b.arg(string(text), "jsonb")
}

// facet counts the values at a path.
func (b statement) facet(ctx context.Context, tx pgx.Tx, path string) (search.Facet, error) {
	at := "(body #> " + b.arg(strings.Split(path, "."), "text[]") + ")"
	rows, err := tx.Query(ctx, `SELECT (v #>> '{}') COLLATE "C", count(*) FROM documents, LATERAL jsonb_path_query(`+at+`, 'lax $[*]') v
		WHERE `+b.where+` GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT `+strconv.Itoa(search.MaxFacetValues), b.args...)
	if err != nil {
		return search.Facet{}, err
	}
	values, err := pgx.CollectRows(rows, pgx.RowToStructByPos[search.FacetValue])
	return search.Facet{Field: path, Values: values}, err
}

// page reads the hits of the page, and one more to know whether there is a next one.
func (b statement) page(ctx context.Context, tx pgx.Tx, p search.Plan, result *search.Result) error {
	order, after := "score DESC, name", "true"
	if p.ByName {
		order = "name"
	}
	if p.After != nil {
		after = "name > " + b.arg(p.After.Name, "text")
		if !p.ByName {
			score, err := strconv.ParseFloat(p.After.Score, 32)
			if err != nil {
				return store.Invalid("page_token", "is not a token of this search")
			}
			at := b.arg(float32(score), "float4")
			after = "(score < " + at + " OR score = " + at + " AND " + after + ")"
		}
	}
	marked, fields := b.highlights(p.Type.Search)
	rows, err := tx.Query(ctx, "SELECT name, epoch, resource_version, score::text, "+marked+" FROM (SELECT * FROM (SELECT *, "+b.score+" AS score FROM documents WHERE "+b.where+
		") d WHERE "+after+" ORDER BY "+order+" LIMIT "+b.arg(p.Size+1, "int")+") d ORDER BY "+order, b.args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	var last search.Position
	for rows.Next() {
		if len(result.Hits) == p.Size {
			result.NextPageToken = p.Token(last)
			break
		}
		var h search.Hit
		var score string
		var parts []*string
		if err := rows.Scan(&h.Name, &h.Version.Epoch, &h.Version.Number, &score, &parts); err != nil {
			return err
		}
		if h.Score, err = strconv.ParseFloat(score, 64); err != nil {
			return err
		}
		for i, part := range parts {
			if part == nil {
				continue
			}
			if snippet, ok := search.Snippet(*part); ok {
				h.Highlights = append(h.Highlights, search.Highlight{Field: fields[i], Snippet: snippet})
			}
		}
		last = search.Position{Score: score, Name: h.Name}
		result.Hits = append(result.Hits, h)
	}
	rows.Close()
	return rows.Err()
}

// highlights is the SQL of an array with the marked text of each field, and the fields in its order.
func (b statement) highlights(s *descriptor.Search) (sql string, fields []string) {
	if b.text == "" {
		return "'{}'::text[]", nil
	}
	var parts []string
	nth := map[byte]int{}
	for _, f := range s.Fields {
		nth[f.Weight]++
		parts = append(parts, fmt.Sprintf("ts_headline('english', split_part(%s, chr(31), %d), %s, '%s')", strings.ToLower(string(f.Weight)), nth[f.Weight], b.text, headline))
		fields = append(fields, f.Path)
	}
	return "ARRAY[" + strings.Join(parts, ", ") + "]", fields
}
