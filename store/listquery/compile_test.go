package listquery_test

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/listquery"
)

// isInvalid says whether err is about this field of the request.
func isInvalid(err error, field string) bool {
	var e *store.Error
	return errors.As(err, &e) && e.Code == store.InvalidArgument && len(e.Violations) == 1 && e.Violations[0].Field == field
}

func TestBadQueries(t *testing.T) {
	valid, err := listquery.Compile(store.Query{Type: "T"})
	if err != nil {
		t.Fatal(err)
	}
	token := valid.NextToken(`["a/1"]`)
	for _, tt := range []struct {
		name  string
		query store.Query
		field string
		says  string
	}{
		{"no type", store.Query{}, "type", "is required"},
		{"negative page size", store.Query{PageSize: -1}, "page_size", "negative"},
		{"prefix without a slash", store.Query{Prefix: "a/b"}, "prefix", "sections/admin/packages/"},
		{"prefix with an empty segment", store.Query{Prefix: "a//"}, "prefix", ""},
		{"prefix that begins with a slash", store.Query{Prefix: "/a/"}, "prefix", ""},
		{"prefix that is not UTF-8", store.Query{Prefix: "\xff/"}, "prefix", ""},
		{"prefix with NUL", store.Query{Prefix: "a\x00/"}, "prefix", ""},

		{"long filter", store.Query{Filter: "a=" + strings.Repeat("b", 2048)}, "filter", "at most 2048"},
		{"deep filter", store.Query{Filter: strings.Repeat("(", 21) + "a=1" + strings.Repeat(")", 21)}, "filter", "20 levels"},
		{"many negations", store.Query{Filter: strings.Repeat("NOT ", 21) + "a=1"}, "filter", "20 levels"},
		{"many comparisons", store.Query{Filter: strings.Repeat("a=1 ", 51)}, "filter", "50 comparisons"},
		{"filter that is not UTF-8", store.Query{Filter: "a=\xff"}, "filter", "UTF-8"},
		{"filter with NUL", store.Query{Filter: "a='\x00'"}, "filter", "NUL"},
		{"only a field", store.Query{Filter: "a"}, "filter", "at position 2: expected an operator after a"},
		{"only a string", store.Query{Filter: `"a b"`}, "filter", "expected an operator"},
		{"no value", store.Query{Filter: "a ="}, "filter", "at position 4: expected a value"},
		{"no field", store.Query{Filter: "= 1"}, "filter", "at position 1: expected the name of a field"},
		{"empty segment", store.Query{Filter: "a..b = 1"}, "filter", "at position 3"},
		{"nothing after AND", store.Query{Filter: "a=1 AND "}, "filter", "at position 9"},
		{"OR first", store.Query{Filter: "OR a=1"}, "filter", "not OR"},
		{"two operators", store.Query{Filter: "a == 1"}, "filter", "at position 4"},
		{"positions count characters", store.Query{Filter: `ä="ö" AND ü`}, "filter", "at position 12"},
		{"parenthesis never closed", store.Query{Filter: "a=1 AND (b=2"}, "filter", "at position 9: this parenthesis is never closed"},
		{"parenthesis never opened", store.Query{Filter: "a=1)"}, "filter", "at position 4: this parenthesis was never opened"},
		{"empty parentheses", store.Query{Filter: "()"}, "filter", "at position 2"},
		{"quote never closed", store.Query{Filter: `a="b`}, "filter", "at position 3: this quote"},
		{"unknown escape", store.Query{Filter: `a="\n"`}, "filter", "backslash"},
		{"backslash at the end", store.Query{Filter: `a="\`}, "filter", "backslash"},
		{"function", store.Query{Filter: "timestamp(a)"}, "filter", "functions"},
		{"unknown metadata", store.Query{Filter: "metadata.colour = red"}, "filter", "no field metadata.colour"},
		{"metadata itself", store.Query{Filter: "metadata:*"}, "filter", "no field metadata"},
		{"field of a column", store.Query{Filter: "name.x = 1"}, "filter", "name has no fields"},
		{"field of tags", store.Query{Filter: "tags.x = 1"}, "filter", "tags has no fields"},
		{"tags compared", store.Query{Filter: "tags = x"}, "filter", "ask with tags:value"},
		{"star in an order", store.Query{Filter: `a < "b*"`}, "filter", "only with = and !="},
		{"order of booleans", store.Query{Filter: "a > true"}, "filter", "no order"},
		{"generation with a word", store.Query{Filter: "generation = many"}, "filter", "a number"},
		{"octal", store.Query{Filter: "generation = 010"}, "filter", "a number"},
		{"huge exponent", store.Query{Filter: "generation = 1e9999"}, "filter", "a number"},
		{"time without quotes", store.Query{Filter: "create_time > 2026-01-31"}, "filter", "at position 15: create_time is compared with a time"},
		{"time with nanoseconds", store.Query{Filter: `create_time > "2026-01-31T00:00:00.000000001Z"`}, "filter", "microseconds"},
		{"time before the era", store.Query{Filter: `create_time > "0001-01-01T00:00:00+01:00"`}, "filter", "a time"},

		{"long order", store.Query{OrderBy: strings.Repeat("a", 513)}, "order_by", "at most 512"},
		{"order that is not UTF-8", store.Query{OrderBy: "\xff"}, "order_by", "UTF-8"},
		{"many fields", store.Query{OrderBy: "a,b,c,d,e,f"}, "order_by", "at position 11: more than 5 fields"},
		{"unknown direction", store.Query{OrderBy: "a down"}, "order_by", "at position 3"},
		{"comma at the end", store.Query{OrderBy: "a,"}, "order_by", "at position 3"},
		{"order with an operator", store.Query{OrderBy: "a = 1"}, "order_by", "at position 3"},
		{"order by labels", store.Query{OrderBy: "labels"}, "order_by", "no order"},
		{"order by unknown metadata", store.Query{OrderBy: "metadata.x"}, "order_by", "no field"},
		{"field twice", store.Query{OrderBy: "create_time, metadata.createTime"}, "order_by", "twice"},

		{"token of another query", store.Query{PageToken: token, Filter: "a=1"}, "page_token", "another query"},
		{"token of another prefix", store.Query{PageToken: token, Prefix: "a/"}, "page_token", "another query"},
		{"token of another order", store.Query{PageToken: token, OrderBy: "name desc"}, "page_token", "another query"},
		{"token that is no base64", store.Query{PageToken: "!"}, "page_token", "not a token"},
		{"short token", store.Query{PageToken: "AQ"}, "page_token", "not a token"},
		{"token of another format", store.Query{PageToken: base64.RawURLEncoding.EncodeToString([]byte("\x02aaaaaaaaaaaa[]"))}, "page_token", "not a token"},
		{"token with too few keys", store.Query{PageToken: valid.NextToken("[]")}, "page_token", "not a token"},
		{"token with a number for the name", store.Query{PageToken: valid.NextToken("[1]")}, "page_token", "not a token"},
		{"cut token", store.Query{PageToken: token[:len(token)-2]}, "page_token", "not a token"},
		{"huge token", store.Query{PageToken: strings.Repeat("A", 1<<21)}, "page_token", "not a token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.field != "type" {
				tt.query.Type = "T"
			}
			_, err := listquery.Compile(tt.query)
			if !isInvalid(err, tt.field) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("Compile = %v, want a violation of %s that says %q", err, tt.field, tt.says)
			}
		})
	}
}

func TestLimitsAreAllowed(t *testing.T) {
	for _, q := range []store.Query{
		{Filter: "a=" + strings.Repeat("b", 2046)},
		{Filter: strings.Repeat("(", 20) + "a=1" + strings.Repeat(")", 20)},
		{Filter: strings.Repeat("a=1 ", 50)},
		{OrderBy: "a, b, c, d, e"},
		{Filter: " \n\t "},
	} {
		q.Type = "T"
		if _, err := listquery.Compile(q); err != nil {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

func TestPageSize(t *testing.T) {
	for given, want := range map[int]int{0: 100, 1: 1, 1000: 1000, 5000: 1000} {
		c, err := listquery.Compile(store.Query{Type: "T", PageSize: given})
		if err != nil || c.PageSize != want {
			t.Errorf("page size %d became %d, %v, want %d", given, c.PageSize, err, want)
		}
	}
}

func TestOrderEndsWithTheName(t *testing.T) {
	for given, want := range map[string]string{
		"":                      `name COLLATE "C"`,
		"name desc, generation": `name COLLATE "C" DESC`,
		"generation desc":       `generation DESC, name COLLATE "C"`,
	} {
		c, err := listquery.Compile(store.Query{Type: "T", OrderBy: given})
		if err != nil || c.OrderBy != want {
			t.Errorf("order_by %q became %q, %v, want %q", given, c.OrderBy, err, want)
		}
	}
}

func FuzzCompile(f *testing.F) {
	f.Add("sections/-/packages/", `a.b="x*" AND (NOT labels."k":* OR -c>=1.5e2)`, "a.b desc, name", "AQ")
	f.Add("", `a='\'`, "a,,b", "")
	f.Add("a/", "((((", "metadata.", "\x00")
	f.Fuzz(func(t *testing.T, prefix, filter, orderBy, token string) {
		q := store.Query{Type: "T", Prefix: prefix, Filter: filter, OrderBy: orderBy, PageToken: token}
		c, err := listquery.Compile(q)
		if err != nil {
			if store.CodeOf(err) != store.InvalidArgument {
				t.Fatalf("%+v: %v", q, err)
			}
			return
		}
		if n := len(c.Args); strings.Contains(c.Where, "\x00") || n == 0 || n > 1000 {
			t.Fatalf("%+v: %d parameters, %q", q, n, c.Where)
		}
	})
}
