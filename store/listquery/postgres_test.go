package listquery_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/listquery"
)

func compareNumbers(a, b json.Number) int {
	x, _ := new(big.Rat).SetString(a.String())
	y, _ := new(big.Rat).SetString(b.String())
	return x.Cmp(y)
}

// connect returns a connection to a database with the columns that queries may name.
func connect(tb testing.TB) *pgx.Conn {
	tb.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, pgtest.Database(tb))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := conn.Close(ctx); err != nil {
			tb.Error(err)
		}
	})
	exec(tb, conn, `SET statement_timeout = '10s'`)
	exec(tb, conn, `SET timezone = 'Europe/Amsterdam'`) // tokens must not depend on it; its offset of 1900 has seconds
	exec(tb, conn, `CREATE TABLE resources (
		name text COLLATE "C" PRIMARY KEY, type text NOT NULL, uuid uuid NOT NULL, resource_version bigint NOT NULL, generation bigint NOT NULL,
		owning_region text NOT NULL, regions text[] NOT NULL, state smallint NOT NULL,
		create_time timestamptz NOT NULL, update_time timestamptz NOT NULL, delete_time timestamptz, meta jsonb NOT NULL, body jsonb)`)
	return conn
}

func exec(tb rapid.TB, conn *pgx.Conn, sql string, args ...any) {
	if _, err := conn.Exec(context.Background(), sql, args...); err != nil {
		tb.Fatal(err)
	}
}

func insert(tb rapid.TB, conn *pgx.Conn, typ string, r row) {
	state := store.Active
	if r.DeleteTime != nil {
		state = store.Deleting
	}
	if r.Meta == nil {
		r.Meta, r.Body = map[string]any{}, map[string]any{}
	}
	exec(tb, conn, `INSERT INTO resources VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9, $10, $11, $12)`,
		r.Name, typ, r.UUID, r.Version, r.Generation, r.OwningRegion, r.Regions, state, r.CreateTime, r.DeleteTime, r.Meta, r.Body)
}

// page runs one page the way a store does.
func page(tb rapid.TB, conn *pgx.Conn, q store.Query) (names []string, next string) {
	c, err := listquery.Compile(q)
	if err != nil {
		tb.Fatalf("compile %+v: %v", q, err)
	}
	sql := fmt.Sprintf("SELECT name, %s FROM resources WHERE state <> 2 AND %s ORDER BY %s LIMIT %d", c.Key, c.Where, c.OrderBy, c.PageSize+1)
	rows, err := conn.Query(context.Background(), sql, c.Args...)
	if err != nil {
		tb.Fatalf("%v\nquery %+v\nsql %s\nargs %q", err, q, sql, c.Args)
	}
	var keys []string
	var name, key string
	if _, err := pgx.ForEachRow(rows, []any{&name, &key}, func() error {
		names, keys = append(names, name), append(keys, key)
		return nil
	}); err != nil {
		tb.Fatalf("%v\nquery %+v\nsql %s\nargs %q", err, q, sql, c.Args)
	}
	if len(names) > c.PageSize {
		return names[:c.PageSize], c.NextToken(keys[c.PageSize-1])
	}
	return names, ""
}

// list follows the tokens to the end.
func list(tb rapid.TB, conn *pgx.Conn, q store.Query) []string {
	var all []string
	for {
		names, next := page(tb, conn, q)
		all = append(all, names...)
		if next == "" {
			return all
		}
		if len(all) > 10000 {
			tb.Fatalf("paging of %+v does not end", q)
		}
		q.PageToken = next
	}
}

// TestPagesEqualOracle lets random filters and orders run over random rows, page by page. Rapid prints the seed of a failure.
func TestPagesEqualOracle(t *testing.T) {
	conn := connect(t)
	rapid.Check(t, func(t *rapid.T) {
		exec(t, conn, "TRUNCATE resources")
		var rows []row
		for i := range rapid.IntRange(0, 25).Draw(t, "rows") {
			r := drawRow(t, fmt.Sprintf("shelves/%c/books/b%d", 'a'+i%3, i))
			rows = append(rows, r)
			insert(t, conn, "Book", r)
		}
		insert(t, conn, "Author", row{Name: "shelves/a/books/other", UUID: "00000000-0000-4000-8000-000000000000", Regions: []string{}})
		for range 12 {
			filter, orderBy := drawClause(t, 3), drawOrder(t)
			q := store.Query{Type: "Book", Filter: filter.text, OrderBy: orderBy.text, PageSize: rapid.IntRange(1, 30).Draw(t, "page size")}
			prefix := rapid.SampledFrom([]string{"", "shelves/", "shelves/b/books/", "shelves/-/books/", "shelves/c/books/"}).Draw(t, "prefix")
			q.Prefix = prefix
			var want []row
			for _, r := range rows {
				if (strings.HasPrefix(r.Name, prefix) || prefix == "shelves/-/books/") && filter.match(r) {
					want = append(want, r)
				}
			}
			slices.SortFunc(want, orderBy.compare)
			var names []string
			for _, r := range want {
				names = append(names, r.Name)
			}
			if got := list(t, conn, q); !slices.Equal(got, names) {
				all, _ := json.MarshalIndent(rows, "", " ")
				t.Fatalf("query %+v\n got %q\nwant %q\nrows %s", q, got, names, all)
			}
		}
	})
}

func TestPrefixes(t *testing.T) {
	conn := connect(t)
	for _, name := range []string{
		"a/1/b/1", "a/1/b/2", "a/1/b/2/c/1", "a/1/bb/1", "a/1/b0/1", "a/2/b/1", "a/2/x/1/b/1", "a/-/b/1", "a/1.1/b/1", "a/1x1/b/1",
		"(a/1/b/1", "aa/1/b/1", "a/1/b", "a/1/b/ü\nx",
	} {
		insert(t, conn, "T", row{Name: name, UUID: "00000000-0000-4000-8000-000000000000", Regions: []string{}})
	}
	for _, tt := range []struct {
		prefix string
		want   []string
	}{
		{"a/1/b/", []string{"a/1/b/1", "a/1/b/2", "a/1/b/2/c/1", "a/1/b/ü\nx"}},
		{"a/-/b/", []string{"a/-/b/1", "a/1.1/b/1", "a/1/b/1", "a/1/b/2", "a/1/b/ü\nx", "a/1x1/b/1", "a/2/b/1"}},
		{"-/1/b/", []string{"(a/1/b/1", "a/1/b/1", "a/1/b/2", "a/1/b/ü\nx", "aa/1/b/1"}},
		{"a/1/b/-/c/", []string{"a/1/b/2/c/1"}},
		{"a/-/b/-/c/", []string{"a/1/b/2/c/1"}},
		{"a/1.1/-/", []string{"a/1.1/b/1"}},
		{"(a/1/-/", []string{"(a/1/b/1"}},
		{"a/9/b/", nil},
	} {
		t.Run(tt.prefix, func(t *testing.T) {
			if got := list(t, conn, store.Query{Type: "T", Prefix: tt.prefix, PageSize: 2}); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestStars(t *testing.T) {
	conn := connect(t)
	values := []string{"abc", "a_c", "a%c", `a\c`, "a*c", "", "ABC"}
	for i, v := range values {
		insert(t, conn, "T", row{Name: fmt.Sprint("a/", i), UUID: "00000000-0000-4000-8000-000000000000", Regions: []string{},
			Meta: map[string]any{"labels": map[string]any{"v": v}}, Body: map[string]any{"v": v}})
	}
	for _, tt := range []struct {
		value string
		want  []string
	}{
		{`a*`, []string{"abc", "a_c", "a%c", `a\c`, "a*c"}},
		{`*c`, []string{"abc", "a_c", "a%c", `a\c`, "a*c"}},
		{`a_*`, []string{"a_c"}},
		{`*%c`, []string{"a%c"}},
		{`"a\\*"`, []string{`a\c`}},
		{`"a\*c"`, []string{"a*c"}},
		{`"a\**"`, []string{"a*c"}},
		{`'*_*'`, []string{"a_c"}},
		{`*b*`, []string{"abc"}},
		{`a*b*c`, []string{"abc"}},
		{`"*"`, values},
	} {
		for _, field := range []string{"v=", "v:", "labels.v="} {
			var got []string
			for _, name := range list(t, conn, store.Query{Type: "T", Filter: field + tt.value}) {
				var i int
				if _, err := fmt.Sscanf(name, "a/%d", &i); err != nil {
					t.Fatal(err)
				}
				got = append(got, values[i])
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%s%s: got %q, want %q", field, tt.value, got, tt.want)
			}
		}
	}
}

// TestValuesNeverReachTheStatement tries values that would do harm as SQL, as patterns or as JSON paths, at every place that takes one.
func TestValuesNeverReachTheStatement(t *testing.T) {
	conn := connect(t)
	insert(t, conn, "T", row{Name: "a/1", UUID: "00000000-0000-4000-8000-000000000000", Regions: []string{}, Meta: map[string]any{}, Body: map[string]any{"k": "v"}})
	for _, evil := range []string{
		`'; DROP TABLE resources; --`, `' OR '1'='1`, `$1`, `$99`, `{}`, `{a,b}`, `"}`, `\`, `\'`, `') || pg_sleep(9) || ('`, `%`, `_`, `[*] ? (true)`, `" ? (1 == 1)`,
		`null`, `/*`, `--`, `E'\\'`, "\u2028", `U&'\0000'`, `:name`, `@x`, `(`, `***:^`,
	} {
		quoted := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `*`, `\*`).Replace(evil) + `"`
		queries := []store.Query{{Type: evil}, {Type: "T", OrderBy: quoted}, {Type: "T", OrderBy: "labels." + quoted + " desc"}}
		if !strings.Contains(evil, "/") {
			queries = append(queries, store.Query{Type: "T", Prefix: evil + "/"}, store.Query{Type: "T", Prefix: "-/" + evil + "/"})
		}
		for _, operator := range []string{"=", "!=", "<", ">=", ":"} {
			queries = append(queries,
				store.Query{Type: "T", Filter: "k" + operator + quoted},
				store.Query{Type: "T", Filter: "name" + operator + quoted},
				store.Query{Type: "T", Filter: quoted + operator + quoted},
				store.Query{Type: "T", Filter: "a." + quoted + ".b" + operator + quoted},
				store.Query{Type: "T", Filter: "labels." + quoted + operator + "x"})
		}
		for _, q := range queries {
			c, err := listquery.Compile(q)
			if err != nil {
				t.Fatalf("compile %+v: %v", q, err)
			}
			if len(evil) > 3 && strings.Contains(c.Where+c.OrderBy+c.Key, evil) && evil != "null" {
				t.Errorf("a value of %+v stands in the statement: %s", q, c.Where)
			}
			page(t, conn, q)
		}
	}
	if got := list(t, conn, store.Query{Type: "T", Filter: `k="v"`}); len(got) != 1 {
		t.Errorf("the row is gone: %q", got)
	}
}

// TestNoRowRaisesAnError runs comparisons of every kind against every kind of JSON, so that a plan may evaluate them in any order.
func TestNoRowRaisesAnError(t *testing.T) {
	conn := connect(t)
	for i, v := range []string{`1`, `"1"`, `true`, `null`, `[]`, `[1,"x",null,[1]]`, `{}`, `{"x":{"y":1}}`, `"not a number"`, `1e300`, `-0`, `""`} {
		insert(t, conn, "T", row{Name: fmt.Sprint("a/", i), UUID: "00000000-0000-4000-8000-000000000000", Regions: []string{}, Meta: map[string]any{},
			Body: map[string]any{"v": json.RawMessage(v)}})
	}
	for _, f := range []string{"v", "v.x", "v.0", "v.x.y", `v."-1"`} {
		for _, operator := range []string{"=", "!=", "<", "<=", ">", ">=", ":"} {
			for _, value := range []string{"1", "-1e999", "1.5e-999", `"1"`, `""`, "true", "word", `"w*"`, "*", `"\*"`} {
				q := store.Query{Type: "T", Filter: f + operator + value, OrderBy: f}
				if _, err := listquery.Compile(q); err == nil {
					page(t, conn, q)
				}
			}
		}
	}
}

// TestForgedTokens changes tokens that were valid: the answer is an error about the token or a page, never a failing statement.
func TestForgedTokens(t *testing.T) {
	conn := connect(t)
	rapid.Check(t, func(t *rapid.T) {
		q := store.Query{Type: "T", OrderBy: rapid.SampledFrom([]string{"", "a", "create_time desc", "generation, labels.x, a.b desc", "metadata.delete_time", "uuid"}).Draw(t, "order")}
		c, err := listquery.Compile(q)
		if err != nil {
			t.Fatal(err)
		}
		values := rapid.SliceOfN(rapid.SampledFrom([]string{
			`null`, `true`, `0`, `-1`, `1.5`, `1e5`, `1e999999`, `9223372036854775807`, `-9223372036854775808`, `99999999999999999999`, `"x"`, `"\u0000"`,
			`"\ud800"`, `""`, `[]`, `{}`, `[[`, `253402300800000000`, `-62135596800000001`, "\"\xff\"", strings.Repeat("9", 131073),
		}), 0, 6).Draw(t, "values")
		q.PageToken = c.NextToken("[" + strings.Join(values, ",") + "]")
		if _, err := listquery.Compile(q); err == nil {
			page(t, conn, q)
		} else if !isInvalid(err, "page_token") {
			t.Fatalf("token %q: %v", values, err)
		}
	})
}
