package redis

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/listquery"
)

const (
	// readSize is how many documents are read in one round trip.
	readSize = 500
	// maxCandidates of an index that is not in the order of names are sorted here; of more, all names of the type are walked instead.
	maxCandidates = 100_000
)

// Search implements search.Store. Without a text, the indexes of a plain Redis answer whatever the server has, and hits are ordered by name.
func (s *Store) Search(ctx context.Context, q search.Query) (*search.Result, error) {
	p, err := q.Plan()
	if err != nil {
		return nil, err
	}
	if p.Text != "" {
		return s.searchText(ctx, p)
	}
	c := newCollector(p)
	if err := s.scan(ctx, p, c.take); err != nil {
		return nil, wrap(err, "search")
	}
	c.facets()
	return c.result, nil
}

// collector makes a page of what matches.
type collector struct {
	plan   search.Plan
	result *search.Result
	counts []map[string]int64 // of the values of each facet
}

func newCollector(p search.Plan) *collector {
	c := &collector{plan: p, result: &search.Result{}, counts: make([]map[string]int64, len(p.Facets))}
	for i := range c.counts {
		c.counts[i] = map[string]int64{}
	}
	return c
}

// take is told of everything that matches, in the order of names. It returns false when it has enough.
func (c *collector) take(h search.Hit, values map[string]any) bool {
	c.count(values)
	hits := &c.result.Hits
	switch {
	case c.plan.After != nil && h.Name <= c.plan.After.Name:
	case len(*hits) < c.plan.Size:
		*hits = append(*hits, h)
	case c.result.NextPageToken == "":
		c.result.NextPageToken = c.plan.Token(search.Position{Name: (*hits)[len(*hits)-1].Name})
		return len(c.plan.Facets) > 0 // facets are of all that matches
	}
	return true
}

// count counts the values of one hit.
func (c *collector) count(values map[string]any) {
	for i, path := range c.plan.Facets {
		list, ok := search.At(values, path).([]any)
		if !ok {
			list = []any{search.At(values, path)}
		}
		for _, v := range list {
			if text, ok := facetText(v); ok {
				c.counts[i][text]++
			}
		}
	}
}

func facetText(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case bool:
		return strconv.FormatBool(v), true
	case interface{ String() string }: // json.Number
		return v.String(), true
	}
	return "", false
}

func (c *collector) facets() {
	for i, path := range c.plan.Facets {
		f := search.Facet{Field: path}
		for value, count := range c.counts[i] {
			f.Values = append(f.Values, search.FacetValue{Value: value, Count: count})
		}
		slices.SortFunc(f.Values, func(a, b search.FacetValue) int {
			return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Value, b.Value))
		})
		f.Values = f.Values[:min(len(f.Values), search.MaxFacetValues)]
		c.result.Facets = append(c.result.Facets, f)
	}
}

// scan calls take for what matches, in the order of names, from the start of the page on (with facets from the first name on), until take has enough.
func (s *Store) scan(ctx context.Context, p search.Plan, take func(search.Hit, map[string]any) bool) error {
	after := ""
	if p.After != nil && len(p.Facets) == 0 {
		after = p.After.Name
	}
	next, err := s.candidates(ctx, p, after)
	if err != nil {
		return err
	}
	for {
		names, err := next(ctx)
		if err != nil || len(names) == 0 {
			return err
		}
		var docs []*goredis.SliceCmd
		_, err = s.client.Pipelined(ctx, func(pipe goredis.Pipeliner) error {
			for _, n := range names {
				docs = append(docs, pipe.HMGet(ctx, s.key("d:", n), "t", "e", "v", "j"))
			}
			return nil
		})
		if err != nil {
			return err
		}
		for i, d := range docs {
			h, values, ok := hitOf(names[i], p.Type.Name, d.Val())
			if ok && search.Shape(p.Prefix, h.Name) && search.Match(p.Where, h.Name, values) && !take(h, values) {
				return nil
			}
		}
	}
}

// hitOf reads a document: not ok if it is gone, or none of the type, or not readable, which the next audit repairs.
func hitOf(name, typ string, fields []any) (h search.Hit, values map[string]any, ok bool) {
	text := make([]string, len(fields))
	for i, f := range fields {
		if text[i], ok = f.(string); !ok {
			return h, nil, false
		}
	}
	epoch, err1 := strconv.ParseInt(text[1], 10, 64)
	number, err2 := strconv.ParseInt(text[2], 10, 64)
	values, err3 := search.ParseValues([]byte(text[3]))
	return search.Hit{Name: name, Version: store.Version{Epoch: epoch, Number: number}}, values, text[0] == typ && err1 == nil && err2 == nil && err3 == nil
}

// batches returns the next names, in their order and without repetition; none at the end.
type batches func(ctx context.Context) ([]string, error)

// candidates returns names behind after among which all are that can match.
func (s *Store) candidates(ctx context.Context, p search.Plan, after string) (batches, error) {
	all := s.walk("t:"+p.Type.Name, after, p.Prefix)
	total, err := s.client.ZCard(ctx, s.key("t:", p.Type.Name)).Result()
	if err != nil {
		return nil, err
	}
	best, least := (*lookup)(nil), total/4 // a look-up of most of them is slower than a walk
	for _, l := range lookups(p) {
		n, err := l.count(ctx, s)
		if err != nil {
			return nil, err
		}
		if n < least || n == 0 {
			best, least = &l, n
		}
	}
	switch {
	case best == nil:
		return all, nil
	case best.exact != "":
		return s.values(best.key, best.exact, after), nil
	case least > maxCandidates:
		return all, nil
	}
	members, err := best.members(ctx, s)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range members {
		if n := m[strings.LastIndexByte(m, 0)+1:]; n > after {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	return func(context.Context) ([]string, error) {
		n := min(len(names), readSize)
		part := names[:n]
		names = names[n:]
		return part, nil
	}, nil
}

// walk goes through a sorted set of names.
func (s *Store) walk(key, after, prefix string) batches {
	lo, hi := "("+after, "+"
	if prefix != "" {
		fixed := prefix
		if at := strings.Index("/"+prefix, "/-/"); at >= 0 {
			fixed = prefix[:at]
		}
		if fixed > after {
			lo = "[" + fixed
		}
		if fixed != "" {
			hi = "(" + strings.TrimSuffix(fixed, "/") + "0" // follows the slash
		}
	}
	return func(ctx context.Context) ([]string, error) {
		names, err := s.lex(ctx, key, lo, hi, readSize)
		if len(names) > 0 {
			lo = "(" + names[len(names)-1]
		}
		return names, err
	}
}

// values goes through the names with one value in an index of strings.
func (s *Store) values(key, value, after string) batches {
	lo, hi := "("+value+"\x00"+after, "("+value+"\x01"
	return func(ctx context.Context) ([]string, error) {
		members, err := s.lex(ctx, key, lo, hi, readSize)
		if len(members) > 0 {
			lo = "(" + members[len(members)-1]
		}
		names := make([]string, len(members))
		for i, m := range members {
			names[i] = m[strings.LastIndexByte(m, 0)+1:]
		}
		return names, err
	}
}

// lookup is a range of an index that has all names that match one comparison.
type lookup struct {
	key string
	// exact is the one value of the range, whose names are in order; empty for a range of several.
	exact    string
	min, max string
	scores   bool // min and max are scores
}

func (l lookup) count(ctx context.Context, s *Store) (int64, error) {
	if l.scores {
		return s.client.ZCount(ctx, s.key(l.key), l.min, l.max).Result()
	}
	return s.client.ZLexCount(ctx, s.key(l.key), l.min, l.max).Result()
}

func (l lookup) members(ctx context.Context, s *Store) ([]string, error) {
	if l.scores {
		return s.client.ZRangeArgs(ctx, goredis.ZRangeArgs{Key: s.key(l.key), Start: l.min, Stop: l.max, ByScore: true}).Result()
	}
	return s.lex(ctx, l.key, l.min, l.max, 0)
}

// lookups returns the look-ups for those comparisons of a plan that must hold for every hit.
func lookups(p search.Plan) []lookup {
	all := p.Where.Operands
	if p.Where.Operator != "AND" {
		all = []listquery.Node{p.Where}
	}
	var found []lookup
	for _, n := range all {
		if n.Operator == "" && n.Comparison != nil {
			if l, ok := lookupOf(p, n.Comparison); ok {
				found = append(found, l)
			}
		}
	}
	return found
}

func lookupOf(p search.Plan, c *listquery.Comparison) (lookup, bool) {
	f := p.Type.Search.Filter(c.Field)
	if !c.Body || f == nil || c.Present() || c.Operator == "!=" {
		return lookup{}, false
	}
	equal := c.Operator == "=" || c.Operator == ":"
	switch {
	case f.Type == v1alpha1.SearchNumber && c.Number():
		l := lookup{key: numbers(p.Type.Name, c.Field), min: "-inf", max: "+inf", scores: true}
		// Bounds are inclusive: a score is the nearest number to the value.
		at := score(json.Number(c.Value))
		if equal || c.Operator[0] == '>' {
			l.min = at
		}
		if equal || c.Operator[0] == '<' {
			l.max = at
		}
		return l, true
	case f.Type == v1alpha1.SearchNumber || c.Number() || c.Boolean() != (f.Type == v1alpha1.SearchBoolean):
		return lookup{}, false // nothing is equal; the documents say so
	}
	l := lookup{key: strs(p.Type.Name, c.Field), min: "-", max: "+"}
	value := indexed(c.Value)
	switch {
	case c.Pattern != nil:
		if value = indexed(c.Pattern[0]); value == "" {
			return lookup{}, false
		}
		l.min, l.max = "["+value, "["+value+"\xff"
	case equal && len(c.Value) <= maxIndexed:
		l.exact, l.min, l.max = value, "["+value+"\x00", "("+value+"\x01"
		return l, value != ""
	case equal:
		l.min, l.max = "["+value, "["+value+"\xff"
	case c.Operator[0] == '>':
		l.min = "[" + value
	default:
		l.max = "[" + value + "\xff"
	}
	return l, true
}
