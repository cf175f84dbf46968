package listquery_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"pgregory.net/rapid"
)

// This file says in Go, without SQL, what the package comment says in words.

// row is a resource as the oracle sees it.
type row struct {
	Name         string
	UUID         string
	Generation   int64
	Version      int64
	OwningRegion string
	Regions      []string
	CreateTime   time.Time
	DeleteTime   *time.Time
	Meta         map[string]any
	Body         map[string]any
}

// clause is a filter twice: as a user writes it, and as a predicate.
type clause struct {
	text  string
	match func(row) bool
}

// access is a field twice: as a user writes it, and how it is read. Scalars of columns are string, json.Number or time.Time.
type access struct {
	text string
	// get returns the value for comparisons, nil if it is missing or null.
	get func(row) any
	// elements returns what has looks at.
	elements func(row) []any
	kind     string // text, number, time, json, texts (labels), collection
}

func column(text, kind string, get func(row) any) access {
	return access{text, get, func(r row) []any { return present(get(r)) }, kind}
}

func present(v any) []any {
	if v == nil {
		return nil
	}
	return []any{v}
}

func document(text, kind string, doc func(row) any, path ...string) access {
	return access{
		text: text, kind: kind,
		get: func(r row) any {
			v := doc(r)
			for _, segment := range path {
				m, _ := v.(map[string]any)
				v = m[segment]
			}
			return v
		},
		elements: func(r row) []any {
			values := []any{doc(r)}
			for _, segment := range path {
				var next []any
				for _, v := range unwrap(values) {
					if m, ok := v.(map[string]any); ok {
						if member, ok := m[segment]; ok {
							next = append(next, member)
						}
					}
				}
				values = next
			}
			return slices.DeleteFunc(unwrap(values), func(v any) bool { return v == nil })
		},
	}
}

func unwrap(values []any) []any {
	var all []any
	for _, v := range values {
		if list, ok := v.([]any); ok {
			all = append(all, list...)
		} else {
			all = append(all, v)
		}
	}
	return all
}

func meta(r row) any    { return r.Meta }
func body(r row) any    { return r.Body }
func regions(r row) any { return toAny(r.Regions) }

func toAny(s []string) []any {
	all := make([]any, len(s))
	for i, v := range s {
		all[i] = v
	}
	return all
}

func number[T int64 | int](n T) json.Number { return json.Number(fmt.Sprint(n)) }

var fields = []access{
	column("name", "text", func(r row) any { return r.Name }),
	column("uuid", "text", func(r row) any { return r.UUID }),
	column("metadata.uuid", "text", func(r row) any { return r.UUID }),
	column("generation", "number", func(r row) any { return number(r.Generation) }),
	column("metadata.resourceVersion", "number", func(r row) any { return number(r.Version) }),
	column("owning_region", "text", func(r row) any { return r.OwningRegion }),
	column("metadata.syncing.owningRegion", "text", func(r row) any { return r.OwningRegion }),
	column("createTime", "time", func(r row) any { return r.CreateTime }),
	column("metadata.create_time", "time", func(r row) any { return r.CreateTime }),
	column("metadata.delete_time", "time", func(r row) any {
		if r.DeleteTime == nil {
			return nil
		}
		return *r.DeleteTime
	}),
	document("labels", "collection", meta, "labels"),
	document("metadata.labels.app.io/name", "texts", meta, "labels", "app.io/name"),
	document(`labels."a b"`, "texts", meta, "labels", "a b"),
	document("annotations.x", "texts", meta, "annotations", "x"),
	document("tags", "collection", meta, "tags"),
	document("metadata.syncing.regions", "collection", regions),
	document("a", "json", body, "a"),
	document("b", "json", body, "b"),
	document("c.x", "json", body, "c", "x"),
	document(`c."y.y"`, "json", body, "c", "y.y"),
	document("c", "json", body, "c"),
	document("d.x", "json", body, "d", "x"),  // d is a list of objects
	document(`"tags"`, "json", body, "tags"), // the body's own, not that of the metadata
	document("missing", "json", body, "missing"),
}

// words are few and alike, so that comparisons hit, and full of what must be escaped.
var words = []string{
	"", "a", "b", "ab", "abc", "A", "ä", "😀", "100%", "a_c", `\`, `a\b`, "*", `"`, "'", "1", "2", "true", "null", "eu", "us", "x", "x y", "$1", "';--", "\n", "app.io/name",
}

var times = []time.Time{
	time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC),
	time.Date(2026, 1, 31, 12, 0, 0, 1000, time.UTC),
	time.Date(2026, 1, 31, 12, 0, 0, 2000, time.UTC),
	time.Date(2400, 12, 31, 23, 59, 59, 999999000, time.UTC),
}

var numbers = []string{"0", "1", "2", "-1", "1.5", "10", "100", "12345678901234567890", "0.1", "1e2"}

func drawScalar(t *rapid.T) any {
	switch rapid.IntRange(0, 5).Draw(t, "type") {
	case 0, 1:
		return rapid.SampledFrom(words).Draw(t, "string")
	case 2, 3:
		return json.Number(rapid.SampledFrom(numbers).Draw(t, "number"))
	case 4:
		return rapid.Bool().Draw(t, "bool")
	}
	return nil
}

func drawValue(t *rapid.T) any {
	switch rapid.IntRange(0, 9).Draw(t, "shape") {
	case 0:
		return drawList(t, drawScalar)
	case 1:
		return drawObject(t)
	}
	return drawScalar(t)
}

func drawList(t *rapid.T, element func(*rapid.T) any) []any {
	list := make([]any, rapid.IntRange(0, 3).Draw(t, "length"))
	for i := range list {
		list[i] = element(t)
	}
	return list
}

func drawObject(t *rapid.T) map[string]any {
	m := map[string]any{}
	for _, k := range []string{"x", "y.y", "a"} {
		if rapid.Bool().Draw(t, "has key") {
			m[k] = drawScalar(t)
		}
	}
	return m
}

func drawRow(t *rapid.T, name string) row {
	word := func() string { return rapid.SampledFrom(words).Draw(t, "word") }
	r := row{
		Name:         name,
		UUID:         fmt.Sprintf("%08x-0000-4000-8000-000000000000", rapid.IntRange(0, 20).Draw(t, "uuid")),
		Generation:   rapid.Int64Range(1, 3).Draw(t, "generation"),
		Version:      rapid.Int64Range(1, 12).Draw(t, "version"),
		OwningRegion: rapid.SampledFrom([]string{"eu", "us"}).Draw(t, "owner"),
		Regions:      []string{"eu", "us"}[:rapid.IntRange(0, 2).Draw(t, "regions")],
		CreateTime:   rapid.SampledFrom(times).Draw(t, "create"),
		Meta:         map[string]any{},
		Body:         map[string]any{},
	}
	if rapid.Bool().Draw(t, "deleting") {
		at := rapid.SampledFrom(times).Draw(t, "delete")
		r.DeleteTime = &at
	}
	labels := map[string]any{}
	for _, k := range []string{"app.io/name", "a b", "x"} {
		if rapid.Bool().Draw(t, "label") {
			labels[k] = word()
		}
	}
	if len(labels) > 0 {
		r.Meta["labels"] = labels
		r.Meta["annotations"] = maps.Clone(labels)
	}
	if rapid.Bool().Draw(t, "tagged") {
		r.Meta["tags"] = drawList(t, func(*rapid.T) any { return word() })
	}
	for _, k := range []string{"a", "b", "tags"} {
		if rapid.IntRange(0, 3).Draw(t, "body") > 0 {
			r.Body[k] = drawValue(t)
		}
	}
	if rapid.Bool().Draw(t, "c") {
		r.Body["c"] = drawObject(t)
	}
	r.Body["d"] = drawList(t, func(t *rapid.T) any {
		if rapid.Bool().Draw(t, "object") {
			return drawObject(t)
		}
		return drawScalar(t)
	})
	return r
}

func drawClause(t *rapid.T, depth int) clause {
	switch n := rapid.IntRange(0, 9).Draw(t, "node"); {
	case depth > 0 && n < 2:
		l, r := drawClause(t, depth-1), drawClause(t, depth-1)
		and := rapid.SampledFrom([]string{" AND ", " ", "\n AND\t"}).Draw(t, "and")
		return clause{"(" + l.text + and + r.text + ")", func(x row) bool { return l.match(x) && r.match(x) }}
	case depth > 0 && n < 4:
		l, m, r := drawClause(t, depth-1), drawClause(t, depth-1), drawClause(t, depth-1)
		// OR binds tighter than AND.
		return clause{"(" + l.text + " OR " + m.text + " AND " + r.text + ")", func(x row) bool { return (l.match(x) || m.match(x)) && r.match(x) }}
	case depth > 0 && n < 6:
		c := drawClause(t, depth-1)
		not := rapid.SampledFrom([]string{"NOT ", "-", "NOT("}).Draw(t, "not")
		text := not + c.text
		if not == "NOT(" {
			text += ")"
		}
		return clause{text, func(x row) bool { return !c.match(x) }}
	}
	return drawComparison(t)
}

func drawComparison(t *rapid.T) clause {
	f := rapid.SampledFrom(fields).Draw(t, "field")
	operator := rapid.SampledFrom([]string{"=", "!=", "<", "<=", ">", ">=", ":"}).Draw(t, "operator")
	if f.kind == "collection" {
		operator = ":"
	}
	if operator == ":" && rapid.IntRange(0, 3).Draw(t, "present") == 0 {
		return clause{f.text + ":*", func(r row) bool { return len(f.elements(r)) > 0 }}
	}
	blank := rapid.SampledFrom([]string{"", " "}).Draw(t, "blank")
	text, match := drawLiteral(t, f.kind, operator)
	c := clause{text: f.text + blank + operator + blank + text}
	c.match = func(r row) bool {
		if operator == ":" {
			return slices.ContainsFunc(f.elements(r), func(v any) bool {
				if m, ok := v.(map[string]any); ok {
					key := strings.Trim(text, `"`)
					if strings.HasPrefix(text, `"`) {
						key = unescape(text)
					}
					_, has := m[key]
					return has
				}
				return match(v, "=")
			})
		}
		v := f.get(r)
		return v != nil && match(v, operator)
	}
	return c
}

// unescape is what a quoted value means when its stars are plain.
func unescape(quoted string) string {
	return strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\*`, `*`).Replace(quoted[1 : len(quoted)-1])
}

// drawLiteral returns a value as a user writes it, and how it compares with what a row holds.
func drawLiteral(t *rapid.T, kind, operator string) (string, func(v any, operator string) bool) {
	switch kind {
	case "number":
		n := rapid.SampledFrom(numbers).Draw(t, "number")
		return n, func(v any, op string) bool { return holds(op, compareNumbers(v.(json.Number), json.Number(n))) }
	case "time":
		at := rapid.SampledFrom(times).Draw(t, "time")
		zone := rapid.SampledFrom([]*time.Location{time.UTC, time.FixedZone("", 5400)}).Draw(t, "zone")
		return `"` + at.In(zone).Format(time.RFC3339Nano) + `"`, func(v any, op string) bool { return holds(op, v.(time.Time).Compare(at)) }
	}
	literal := drawScalar(t)
	ordered := operator == "<" || operator == "<=" || operator == ">" || operator == ">="
	if _, isBool := literal.(bool); isBool && ordered {
		literal = nil
	}
	switch literal := literal.(type) {
	case json.Number:
		return literal.String(), func(v any, op string) bool {
			if kind != "json" {
				s, ok := v.(string)
				return ok && holds(op, cmp.Compare(s, literal.String()))
			}
			n, ok := v.(json.Number)
			if !ok {
				return op == "!="
			}
			return holds(op, compareNumbers(n, literal))
		}
	case bool:
		return fmt.Sprint(literal), func(v any, op string) bool {
			if kind != "json" {
				return holds(op, cmp.Compare(v.(string), fmt.Sprint(literal)))
			}
			b, ok := v.(bool)
			return (ok && b == literal) == (op == "=")
		}
	}
	word, _ := literal.(string) // null draws the empty string
	escaped := strings.NewReplacer(`\`, `\\`, `"`, `\"`, `*`, `\*`).Replace(word)
	if !ordered && kind != "collection" && rapid.IntRange(0, 2).Draw(t, "wildcard") == 0 {
		form := rapid.SampledFrom([]string{`"%s*"`, `"*%s"`, `"*%s*"`}).Draw(t, "form")
		contains := map[string]func(string, string) bool{`"%s*"`: strings.HasPrefix, `"*%s"`: strings.HasSuffix, `"*%s*"`: strings.Contains}[form]
		return fmt.Sprintf(form, escaped), func(v any, op string) bool {
			s, ok := v.(string)
			return (ok && contains(s, word)) == (op == "=")
		}
	}
	return `"` + escaped + `"`, func(v any, op string) bool {
		s, ok := v.(string)
		if !ok {
			return op == "!="
		}
		return holds(op, cmp.Compare(s, word))
	}
}

func holds(operator string, c int) bool {
	switch operator {
	case "=":
		return c == 0
	case "!=":
		return c != 0
	case "<":
		return c < 0
	case "<=":
		return c <= 0
	case ">":
		return c > 0
	}
	return c >= 0
}

// order is an order_by twice: as a user writes it, and as a comparison of rows.
type order struct {
	text    string
	compare func(a, b row) int
}

func drawOrder(t *rapid.T) order {
	n := rapid.IntRange(0, 4).Draw(t, "order fields")
	o := order{compare: func(a, b row) int { return cmp.Compare(a.Name, b.Name) }}
	var chosen []access
	var texts []string
	directions := map[string]int{}
	seen := map[string]bool{}
	for range n {
		f := rapid.SampledFrom(fields).Draw(t, "order field")
		id := camelless(f.text)
		if f.kind == "collection" || seen[id] {
			continue
		}
		seen[id] = true
		suffix := rapid.SampledFrom([]string{"", " desc", " asc"}).Draw(t, "direction")
		directions[f.text] = 1
		if suffix == " desc" {
			directions[f.text] = -1
		}
		chosen = append(chosen, f)
		texts = append(texts, f.text+suffix)
	}
	o.text = strings.Join(texts, rapid.SampledFrom([]string{",", " , "}).Draw(t, "comma"))
	byName := o.compare
	o.compare = func(a, b row) int {
		for _, f := range chosen {
			x, y := scalar(f.get(a)), scalar(f.get(b))
			switch {
			case x == nil && y == nil:
				continue
			case x == nil: // missing is last in both directions
				return 1
			case y == nil:
				return -1
			}
			if c := compareScalars(x, y); c != 0 {
				return c * directions[f.text]
			}
		}
		return byName(a, b)
	}
	return o
}

// camelless is the same for two spellings of one field.
func camelless(text string) string {
	text = strings.TrimPrefix(strings.TrimPrefix(text, "metadata."), "syncing.")
	return strings.NewReplacer("createTime", "create_time", "owningRegion", "owning_region", "resourceVersion", "resource_version").Replace(text)
}

func scalar(v any) any {
	switch v.(type) {
	case []any, map[string]any:
		return nil
	}
	return v
}

func compareScalars(a, b any) int {
	rank := func(v any) int {
		switch v.(type) {
		case string:
			return 0
		case json.Number:
			return 1
		case bool:
			return 2
		}
		return 3
	}
	if c := rank(a) - rank(b); c != 0 {
		return c
	}
	switch a := a.(type) {
	case string:
		return cmp.Compare(a, b.(string))
	case json.Number:
		return compareNumbers(a, b.(json.Number))
	case bool:
		if a == b.(bool) {
			return 0
		}
		if a {
			return 1
		}
		return -1
	}
	return a.(time.Time).Compare(b.(time.Time))
}
