package search

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/listquery"
)

// Limits of a query.
const (
	// MaxTextLength of a query, in bytes.
	MaxTextLength = 1024
	// DefaultPageSize and MaxPageSize count hits.
	DefaultPageSize = 20
	MaxPageSize     = 200
	// MaxFacetValues are shown of one facet, the most frequent ones.
	MaxFacetValues = 20
)

// Orders of hits.
const (
	ByRelevance = "relevance"
	ByName      = "name"
)

// Query is what a user asks.
type Query struct {
	// Type is one with a Search.
	Type *descriptor.Type
	// Prefix of the names, as in store.Query: sections/admin/packages/. Empty: all of the type.
	Prefix string
	// Text is for full text: words that must all occur, "a phrase", or, -not. Empty: everything that the filter matches.
	Text string
	// Filter is an AIP-160 expression over the name and the declared filters.
	Filter string
	// Facets are declared facets whose values are counted.
	Facets []string
	// OrderBy is ByRelevance or ByName. Empty is ByRelevance; without a Text, hits are ordered by name.
	OrderBy string
	// PageSize: 0 is DefaultPageSize; more than MaxPageSize is MaxPageSize.
	PageSize int
	// PageToken continues a search of the same query.
	PageToken string
}

// Result is one page.
type Result struct {
	Hits []Hit
	// Facets in the order of the query.
	Facets []Facet
	// NextPageToken is empty on the last page.
	NextPageToken string
}

// Hit is a document that matches.
type Hit struct {
	Name    string
	Version store.Version
	// Score orders the hits of one query; it means nothing across queries. 0 without a text.
	Score float64
	// Highlights has at most one entry for each field.
	Highlights []Highlight
}

// Highlight is a part of a field in which words of the text occur.
type Highlight struct {
	// Field is the path of the field.
	Field string
	// Snippet is HTML: the words are in <em>, everything else is escaped.
	Snippet string
}

// Facet are the values of a field among all hits.
type Facet struct {
	Field string
	// Values by falling count, at most MaxFacetValues.
	Values []FacetValue
}

// FacetValue is how many hits have a value.
type FacetValue struct {
	// Value as JSON writes it, strings without quotes.
	Value string
	Count int64
}

// Plan is a query that has been checked.
type Plan struct {
	Query
	// Where is the parsed filter.
	Where listquery.Node
	// Size of the page.
	Size int
	// ByName: the hits are ordered by name alone. Else by falling score, then by name.
	ByName bool
	// After is where the page begins; nil for the first one.
	After *Position

	hash string
}

// Position is a place in the order of hits.
type Position struct {
	// Score is opaque to all but the store.
	Score string
	Name  string
}

// Plan checks a query. The error is an InvalidArgument.
func (q Query) Plan() (Plan, error) {
	p := Plan{Query: q, Size: min(q.PageSize, MaxPageSize)}
	p.Text = strings.TrimSpace(q.Text)
	var err error
	switch {
	case q.PageSize < 0:
		return p, store.Invalid("page_size", "must not be negative")
	case len(q.Text) > MaxTextLength:
		return p, store.Invalid("query", fmt.Sprintf("has %d bytes, at most %d are allowed", len(q.Text), MaxTextLength))
	case !utf8.ValidString(q.Text) || strings.ContainsRune(q.Text, 0):
		return p, store.Invalid("query", "must be UTF-8 without NUL")
	case p.Text != "" && len(q.Type.Search.Fields) == 0:
		return p, store.Invalid("query", fmt.Sprintf("no text of a %s is searched, only its filters: the ServiceDescriptor declares no search.fields", q.Type.Name))
	case !slices.Contains([]string{"", ByRelevance, ByName}, q.OrderBy):
		return p, store.Invalid("order_by", fmt.Sprintf("%q is no order of hits: there are relevance and name", q.OrderBy))
	case q.PageSize == 0:
		p.Size = DefaultPageSize
	}
	p.ByName = p.Text == "" || q.OrderBy == ByName
	if p.Where, err = listquery.Parse(q.Filter); err != nil {
		return p, err
	}
	p.Where.Comparisons(func(c *listquery.Comparison) {
		if err == nil {
			err = q.permits(c)
		}
	})
	if err != nil {
		return p, err
	}
	for _, path := range q.Facets {
		if !slices.Contains(q.Type.Search.Facets, path) {
			return p, store.Invalid("facets", fmt.Sprintf("%q is no facet of a %s: there are %s", path, q.Type.Name, known(q.Type.Search.Facets)))
		}
	}
	sum := sha256.Sum256([]byte(strings.Join([]string{q.Type.FullName, q.Type.Search.Fingerprint, q.Prefix, p.Text, q.Filter, q.OrderBy}, "\x00")))
	p.hash = base64.RawURLEncoding.EncodeToString(sum[:9])
	return p, p.parseToken()
}

// permits says whether a comparison asks for something that documents have.
func (q Query) permits(c *listquery.Comparison) error {
	if !c.Body && c.Field == descriptor.SearchName {
		return nil
	}
	if f := q.Type.Search.Filter(c.Field); f != nil && c.Body {
		if f.List && c.Operator != ":" {
			return store.Invalid("filter", fmt.Sprintf("%s holds several values: ask with %s:value", c.Field, c.Field))
		}
		return nil
	}
	names := []string{descriptor.SearchName}
	for _, f := range q.Type.Search.Filters {
		names = append(names, f.Path)
	}
	return store.Invalid("filter", fmt.Sprintf("a search of a %s cannot be filtered by %s: there are %s (quote the first word of a path that means something else in a List)",
		q.Type.Name, c.Field, known(names)))
}

func known(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// token is the JSON in a page token.
type token struct {
	Hash  string `json:"h"`
	Score string `json:"s,omitempty"`
	Name  string `json:"n"`
}

// Token is the page token of the page after the hit at a position.
func (p Plan) Token(at Position) string {
	text, err := json.Marshal(token{p.hash, at.Score, at.Name})
	if err != nil {
		panic(err) // three strings always have a JSON form
	}
	return base64.RawURLEncoding.EncodeToString(text)
}

func (p *Plan) parseToken() error {
	if p.PageToken == "" {
		return nil
	}
	var t token
	text, err := base64.RawURLEncoding.DecodeString(p.PageToken)
	if err == nil {
		err = json.Unmarshal(text, &t)
	}
	if err != nil || t.Hash != p.hash || !utf8.ValidString(t.Name+t.Score) || strings.ContainsRune(t.Name+t.Score, 0) {
		return store.Invalid("page_token", "is not a token of this search: repeat the query that it came from, or leave it out")
	}
	p.After = &Position{t.Score, t.Name}
	return nil
}

// Marks that stores put around the words of a text, and that no document has in it.
const (
	MarkBegin = "\x02"
	MarkEnd   = "\x03"
)

var marks = strings.NewReplacer(MarkBegin, "<em>", MarkEnd, "</em>")

// Snippet makes HTML of a text with marks. ok is false if there are none in it.
func Snippet(marked string) (_ string, ok bool) {
	return marks.Replace(html.EscapeString(marked)), strings.Contains(marked, MarkBegin)
}

// Shape says whether a name is directly below a prefix in which "-" stands for any id (AIP-159). An empty prefix has every name.
func Shape(prefix, name string) bool {
	if prefix == "" {
		return true
	}
	if !strings.Contains("/"+prefix, "/-/") {
		return strings.HasPrefix(name, prefix)
	}
	want, have := strings.Split(strings.TrimSuffix(prefix, "/"), "/"), strings.Split(name, "/")
	if len(have) != len(want)+1 {
		return false
	}
	for i, w := range want {
		if w != "-" && w != have[i] {
			return false
		}
	}
	return true
}
