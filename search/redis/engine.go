package redis

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
)

const (
	// minEngine is the first version of the Query Engine that is used, as MODULE LIST has it: 2.4, from which on there is DIALECT 2. Version 1 takes FT.CREATE ... ON HASH
	// and indexes nothing.
	minEngine = 20400
	// engineTimeout is how long the engine may take for a query, in milliseconds. After it, answers come in part and without a word: so it is longer than the client waits (3 s unless the
	// URL says otherwise), and than the engine's own default.
	engineTimeout = 10_000
	// maxPlace is how far the engine goes into the order of hits.
	maxPlace = 1_000_000
	// facetRead is how many documents are read at once to count values.
	facetRead = 1000
)

// engine is what is known of the server's Query Engine.
type engine struct {
	// conns counts connections: with a new one there may be another server.
	conns atomic.Int64

	mu      sync.Mutex
	known   bool
	seen    int64 // conns when the verdict was made
	verdict verdict
	ready   map[string]bool // indexes that have all documents
}

// verdict says whether the Query Engine of a server can be used.
type verdict struct {
	// version as MODULE LIST has it: 2.10.5 is 21005. 0 without one.
	version int
	// plain says why the server counts as plain; empty if the engine is used.
	plain string
}

// judge makes a verdict of the reply of MODULE LIST. An error is one that may pass.
func judge(reply any, err error, db int) (verdict, error) {
	if denied := goredis.Error(nil); errors.As(err, &denied) && (strings.HasPrefix(denied.Error(), "NOPERM") || unknownCommand(err)) {
		return verdict{plain: "whose modules cannot be listed (allow MODULE LIST)"}, nil
	}
	if err != nil {
		return verdict{}, err
	}
	modules, _ := reply.([]any)
	for _, m := range modules {
		facts := pairs(m)
		if name := facts["name"]; name != "search" && name != "ft" {
			continue
		}
		version, _ := facts["ver"].(int64)
		v := verdict{version: int(version)}
		switch {
		case v.version < minEngine:
			v.plain = fmt.Sprintf("whose Query Engine has version %s (2.4 at least is needed)", versionText(v.version))
		case db != 0:
			v.plain = fmt.Sprintf("whose Query Engine works in database 0, and the URL names database %d", db)
		}
		return v, nil
	}
	return verdict{plain: "without the Query Engine"}, nil
}

func versionText(v int) string { return fmt.Sprintf("%d.%d.%d", v/10000, v/100%100, v%100) }

// pairs reads a reply of names and values.
func pairs(reply any) map[string]any {
	list, _ := reply.([]any)
	facts := map[string]any{}
	for i := 0; i+1 < len(list); i += 2 {
		if name, ok := list[i].(string); ok {
			facts[name] = list[i+1]
		}
	}
	return facts
}

func unknownCommand(err error) bool {
	var reply goredis.Error
	return errors.As(err, &reply) && strings.HasPrefix(strings.ToLower(reply.Error()), "err unknown command")
}

func missingIndex(err error) bool {
	var reply goredis.Error
	if !errors.As(err, &reply) {
		return false
	}
	text := strings.ToLower(reply.Error())
	return strings.Contains(text, "unknown index name") || strings.Contains(text, "no such index") || strings.Contains(text, "index not found")
}

// detect returns the verdict on the server. It asks if the server may be another one than before, or always when again is set.
func (s *Store) detect(ctx context.Context, again bool) (verdict, error) {
	e := &s.engine
	e.mu.Lock()
	conns, v := e.conns.Load(), e.verdict
	if e.known && e.seen == conns && !again {
		e.mu.Unlock()
		return v, nil
	}
	e.mu.Unlock()
	reply, err := s.client.Do(ctx, "MODULE", "LIST").Result()
	if v, err = judge(reply, err, s.client.Options().DB); err != nil {
		return v, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.known || e.verdict != v {
		switch {
		case v.plain == "":
			s.log.InfoContext(ctx, "full text is searched with the Query Engine", "version", versionText(v.version))
		case v.version != 0:
			s.log.WarnContext(ctx, "full text is not available: the search store is a Redis "+v.plain)
		default:
			s.log.InfoContext(ctx, "full text is not available: the search store is a Redis "+v.plain)
		}
	}
	e.known, e.seen, e.verdict, e.ready = true, conns, v, map[string]bool{}
	return v, nil
}

// changed says whether there may be another server than the one of the verdict.
func (e *engine) changed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.seen != e.conns.Load()
}

// prepare makes the indexes that are missing, and drops those of other declarations. The engine fills them by itself. What fails is tried again by a search.
func (s *Store) prepare(ctx context.Context) {
	v, err := s.detect(ctx, true)
	if err != nil || v.plain != "" || s.declared == nil {
		return
	}
	missing := map[string]index{}
	for _, t := range s.declared().Types {
		if t.Search != nil {
			i := s.indexOf(t)
			missing[i.name] = i
		}
	}
	have, err := s.client.FT_List(ctx).Result()
	if err != nil {
		s.log.WarnContext(ctx, "the indexes of the search store cannot be listed", "error", err)
		return
	}
	for _, name := range have {
		if _, ok := missing[name]; !ok && strings.HasPrefix(name, s.indexPrefix()) {
			if err := s.client.FTDropIndex(ctx, name).Err(); err != nil && !missingIndex(err) {
				s.log.WarnContext(ctx, "an index of the search store that nobody needs cannot be dropped", "index", name, "error", err)
			}
		}
		delete(missing, name)
	}
	for _, name := range slices.Sorted(maps.Keys(missing)) {
		if err := s.create(ctx, missing[name]); err != nil {
			s.log.WarnContext(ctx, "an index of the search store cannot be made", "index", name, "error", err)
		}
	}
}

func (s *Store) create(ctx context.Context, i index) error {
	err := s.client.FTCreate(ctx, i.name, i.options, i.schema...).Err()
	var reply goredis.Error
	if errors.As(err, &reply) && strings.Contains(strings.ToLower(reply.Error()), "already exists") {
		return nil // somebody else was faster
	}
	return err
}

// complete returns nil if the index has all documents. It makes one that is missing.
func (s *Store) complete(ctx context.Context, i index) error {
	e := &s.engine
	e.mu.Lock()
	ready := e.ready[i.name]
	e.mu.Unlock()
	if ready {
		return nil
	}
	reply, err := s.client.Do(ctx, "FT.INFO", i.name).Result()
	if missingIndex(err) {
		if err := s.create(ctx, i); err != nil {
			return err
		}
		reply, err = s.client.Do(ctx, "FT.INFO", i.name).Result()
	}
	if err != nil {
		return err
	}
	facts := pairs(reply)
	if fmt.Sprint(facts["indexing"]) != "0" {
		done, _ := strconv.ParseFloat(fmt.Sprint(facts["percent_indexed"]), 64)
		return store.Errorf(store.Unavailable, "", "the index for full text is being made, %.0f %% is done: try again later; filters work meanwhile", done*100)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ready != nil {
		e.ready[i.name] = true
	}
	return nil
}

// searchText answers a query with a text by the Query Engine.
func (s *Store) searchText(ctx context.Context, p search.Plan) (*search.Result, error) {
	r, err := s.engineSearch(ctx, p, false)
	if missingIndex(err) || unknownCommand(err) || err == nil && s.engine.changed() { // the server is not what it was
		r, err = s.engineSearch(ctx, p, true)
	}
	return r, wrap(err, "search")
}

func (s *Store) engineSearch(ctx context.Context, p search.Plan, again bool) (*search.Result, error) {
	v, err := s.detect(ctx, again)
	if err == nil && v.plain != "" && !again {
		v, err = s.detect(ctx, true) // a module may have been loaded
	}
	if err != nil {
		return nil, err
	}
	if v.plain != "" {
		return nil, store.Errorf(store.FailedPrecondition, "", "full text is not available: the search store of this Deployment is a Redis %s, which has indexes for filters only. "+
			"Search with a filter (exact values, prefixes such as \"lib*\", ranges), use a Redis with the Query Engine, or set spec.search.type of the Deployment to Postgres", v.plain)
	}
	q, found := engineQuery(p)
	if !found {
		r := &search.Result{}
		for _, path := range p.Facets {
			r.Facets = append(r.Facets, search.Facet{Field: path})
		}
		return r, nil
	}
	i := s.indexOf(p.Type)
	if err := s.complete(ctx, i); err != nil {
		return nil, err
	}
	r := &search.Result{}
	if r.Facets, err = s.engineFacets(ctx, i.name, q, p); err != nil {
		return nil, err
	}
	return r, s.enginePage(ctx, i.name, q, p, r)
}

// enginePage reads the hits of a page. A page token has the place in the order of what the engine finds: it knows no other way to go on. While documents change, a hit may come twice or
// be left out between two pages.
func (s *Store) enginePage(ctx context.Context, name string, q clause, p search.Plan, r *search.Result) error {
	place := 0
	if p.After != nil {
		var err error
		if place, err = strconv.Atoi(p.After.Score); err != nil || place < 0 {
			return store.Invalid("page_token", "is not a token of this search")
		}
	}
	limit := p.Size + 1
	if !q.exact {
		limit = max(limit, 100) // some are left out
	}
	for {
		if place+limit > maxPlace {
			return store.Errorf(store.FailedPrecondition, "", "a page token leads no further than %d hits: narrow the search by more words or a filter", maxPlace)
		}
		total, rows, err := s.engineRows(ctx, name, q.query, p, place, limit)
		if err != nil {
			return err
		}
		for _, row := range rows {
			h, values, ok := hitOf(row.name, p.Type.Name, row.values("t", "e", "v", "j"))
			if ok && search.Shape(p.Prefix, h.Name) && search.Match(p.Where, h.Name, values) {
				if len(r.Hits) == p.Size {
					r.NextPageToken = p.Token(search.Position{Score: strconv.Itoa(place), Name: r.Hits[p.Size-1].Name})
					return nil
				}
				h.Score, h.Highlights = row.score, highlights(p.Type.Search, row.texts())
				r.Hits = append(r.Hits, h)
			}
			place++
		}
		if len(rows) == 0 || place >= total {
			return nil
		}
	}
}

// engineRow is one document of an answer of FT.SEARCH.
type engineRow struct {
	name   string
	score  float64
	fields map[string]any
}

func (r engineRow) values(names ...string) []any {
	values := make([]any, len(names))
	for i, n := range names {
		values[i] = r.fields[n]
	}
	return values
}

func (r engineRow) texts() map[string]string {
	texts := map[string]string{}
	for _, f := range []string{"a", "b", "c", "d"} {
		texts[f], _ = r.fields[f].(string)
	}
	return texts
}

// searchArgs is FT.SEARCH for one page, with marks in the texts. The typed command of the client has no HIGHLIGHT.
func searchArgs(name, query string, p search.Plan, place, limit int) []any {
	args := []any{"FT.SEARCH", name, query, "WITHSCORES"}
	texts := textFields(p.Type.Search)
	args = append(args, "RETURN", 4+len(texts), "t", "e", "v", "j")
	for _, f := range texts {
		args = append(args, f)
	}
	args = append(args, "HIGHLIGHT", "FIELDS", len(texts))
	for _, f := range texts {
		args = append(args, f)
	}
	args = append(args, "TAGS", search.MarkBegin, search.MarkEnd, "TIMEOUT", engineTimeout)
	if p.ByName {
		args = append(args, "SORTBY", "n", "ASC")
	}
	return append(args, "LIMIT", place, limit, "DIALECT", 2)
}

func (s *Store) engineRows(ctx context.Context, name, query string, p search.Plan, place, limit int) (int, []engineRow, error) {
	reply, err := s.client.Do(ctx, searchArgs(name, query, p, place, limit)...).Slice()
	if err != nil {
		return 0, nil, err
	}
	return parseRows(reply, s.key("d:"))
}

// parseRows reads an answer of FT.SEARCH WITHSCORES: the count, then key, score and fields of each document. One that was deleted meanwhile has no fields.
func parseRows(reply []any, prefix string) (int, []engineRow, error) {
	if len(reply)%3 != 1 {
		return 0, nil, fmt.Errorf("search: an answer of %d parts", len(reply))
	}
	total, ok := reply[0].(int64)
	if !ok {
		return 0, nil, fmt.Errorf("search: an answer that begins with %T", reply[0])
	}
	var rows []engineRow
	for part := range slices.Chunk(reply[1:], 3) {
		key, _ := part[0].(string)
		score, err := strconv.ParseFloat(fmt.Sprint(part[1]), 64)
		name, ok := strings.CutPrefix(key, prefix)
		if !ok || err != nil {
			return 0, nil, fmt.Errorf("search: a hit %q with score %v", key, part[1])
		}
		rows = append(rows, engineRow{name, score, pairs(part[2])})
	}
	return int(total), rows, nil
}

// engineFacets counts values: within the engine if its query is exact, else of the documents that it finds.
func (s *Store) engineFacets(ctx context.Context, name string, q clause, p search.Plan) ([]search.Facet, error) {
	if len(p.Facets) == 0 {
		return nil, nil
	}
	if q.exact {
		var all []search.Facet
		whole := true
		for _, path := range p.Facets {
			f, ok, err := s.engineFacet(ctx, name, q, p, path)
			if err != nil {
				return nil, err
			}
			all, whole = append(all, f), whole && ok
		}
		if whole {
			return all, nil
		}
	}
	return s.countFacets(ctx, name, q, p)
}

// facetOf is FT.AGGREGATE for one facet: the query, narrowed down to the documents that have a value, and what is done with them.
func facetOf(q clause, p search.Plan, path string) (string, *goredis.FTAggregateOptions) {
	n := slices.IndexFunc(p.Type.Search.Filters, func(f descriptor.SearchFilter) bool { return f.Path == path })
	return and([]clause{q, present(path)}).query, &goredis.FTAggregateOptions{
		Timeout: engineTimeout,
		Steps: []goredis.FTAggregateStep{
			{Load: &goredis.FTAggregateLoad{Field: "@" + tagField(n)}},
			{Apply: &goredis.FTAggregateApply{Field: "split(@" + tagField(n) + ")", As: "value"}},
			{GroupBy: &goredis.FTAggregateGroupBy{Fields: []any{"@value"}, Reduce: []goredis.FTAggregateReducer{{Reducer: goredis.SearchCount, As: "count"}}}},
			{SortBy: &goredis.FTAggregateSortByStep{
				Fields: []goredis.FTAggregateSortBy{{FieldName: "@count", Desc: true}, {FieldName: "@value", Asc: true}}, Max: search.MaxFacetValues,
			}},
		},
		Limit: search.MaxFacetValues, DialectVersion: 2,
	}
}

// engineFacet counts within the engine. It is not ok if a value is not all in the index.
func (s *Store) engineFacet(ctx context.Context, name string, q clause, p search.Plan, path string) (f search.Facet, ok bool, err error) {
	query, options := facetOf(q, p, path)
	reply, err := s.client.FTAggregateWithArgs(ctx, name, query, options).Result()
	if err != nil {
		return f, false, err
	}
	f.Field = path
	for _, row := range reply.Rows {
		text, _ := strings.CutPrefix(fmt.Sprint(row.Fields["value"]), "v")
		value, err1 := hex.DecodeString(text)
		count, err2 := strconv.ParseInt(fmt.Sprint(row.Fields["count"]), 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			return f, false, fmt.Errorf("count %s: %w", path, err)
		}
		if len(value) > maxIndexed-utf8.UTFMax {
			return f, false, nil
		}
		f.Values = append(f.Values, search.FacetValue{Value: string(value), Count: count})
	}
	return f, true, nil
}

// countFacets reads the values of all documents that the engine finds.
func (s *Store) countFacets(ctx context.Context, name string, q clause, p search.Plan) ([]search.Facet, error) {
	c := newCollector(p)
	reply, err := s.client.Do(ctx, "FT.AGGREGATE", name, q.query, "TIMEOUT", engineTimeout, "LOAD", 2, "@__key", "@j", "WITHCURSOR", "COUNT", facetRead, "DIALECT", 2).Slice()
	for {
		if err != nil {
			return nil, err
		}
		if len(reply) != 2 {
			return nil, fmt.Errorf("count facets: an answer of %d parts", len(reply))
		}
		rows, _ := reply[0].([]any)
		for _, row := range rows[min(1, len(rows)):] { // behind a count that means nothing
			facts := pairs(row)
			key, _ := facts["__key"].(string)
			text, _ := facts["j"].(string)
			docName := strings.TrimPrefix(key, s.key("d:"))
			values, err := search.ParseValues([]byte(text))
			if err == nil && search.Shape(p.Prefix, docName) && search.Match(p.Where, docName, values) {
				c.count(values)
			}
		}
		cursor := fmt.Sprint(reply[1])
		if cursor == "0" {
			c.facets()
			return c.result.Facets, nil
		}
		reply, err = s.client.Do(ctx, "FT.CURSOR", "READ", name, cursor, "COUNT", facetRead).Slice()
	}
}

// dropIndexes drops all indexes whose names begin with a prefix. A server that has no Query Engine has none.
func (s *Store) dropIndexes(ctx context.Context, prefix string) error {
	names, err := s.client.FT_List(ctx).Result()
	if refused := goredis.Error(nil); errors.As(err, &refused) {
		return nil
	}
	for _, name := range names {
		if err == nil && strings.HasPrefix(name, prefix) {
			if err = s.client.FTDropIndex(ctx, name).Err(); missingIndex(err) {
				err = nil
			}
		}
	}
	return err
}
