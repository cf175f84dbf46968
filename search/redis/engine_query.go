package redis

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store/listquery"
)

// How the fields of a document's hash stand in an index of the Query Engine:
//
//	a b c d  TEXT, the texts by weight, with blanks where the engine would not see the end of a word (textFor)
//	n        the name, for the order
//	p        TAG, what is asked of every document: n<depth of the name>, <place>v<part of the name>, h<path of a filter that has a value>
//	x:<path> TAG, the values of a filter, each a v and its bytes in hexadecimal: so nothing in a value can mean something to the engine
//	y:<path> NUMERIC, the number nearest to the value
//
// n, p, x and y are written besides what the store itself reads.

// engineFormat is part of the name of an index: a change of what indexOf makes or engineFields writes changes it.
const engineFormat = "1"

// stopWords are not indexed, and mean nothing in a query.
var stopWords = strings.Fields("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with")

// weights of the four TEXT fields. They relate as those of PostgreSQL do.
var weights = map[byte]float64{'A': 10, 'B': 4, 'C': 2, 'D': 1}

// index is one index of the Query Engine: the documents of one type under one declaration.
type index struct {
	name    string
	options *goredis.FTCreateOptions
	schema  []*goredis.FieldSchema
}

// indexPrefix begins the names of all indexes of a store.
func (s *Store) indexPrefix() string { return s.key("q:") }

func (s *Store) indexOf(t *descriptor.Type) index {
	i := index{
		name: s.indexPrefix() + t.Name + ":" + t.Search.Fingerprint + "-" + engineFormat,
		options: &goredis.FTCreateOptions{
			OnHash: true, Prefix: []any{s.key("d:")}, Filter: fmt.Sprintf("@t==%q", t.Name), DefaultLanguage: "english",
		},
	}
	for _, w := range stopWords {
		i.options.StopWords = append(i.options.StopWords, w)
	}
	for _, w := range textFields(t.Search) {
		i.schema = append(i.schema, &goredis.FieldSchema{FieldName: w, FieldType: goredis.SearchFieldTypeText, Weight: weights[w[0]-'a'+'A']})
	}
	i.schema = append(i.schema, &goredis.FieldSchema{FieldName: "n", FieldType: goredis.SearchFieldTypeTag, Sortable: true, UNF: true, NoIndex: true},
		&goredis.FieldSchema{FieldName: "p", FieldType: goredis.SearchFieldTypeTag})
	for n, f := range t.Search.Filters {
		i.schema = append(i.schema, &goredis.FieldSchema{FieldName: "x:" + f.Path, As: tagField(n), FieldType: goredis.SearchFieldTypeTag})
		if f.Type == v1alpha1.SearchNumber && !f.List { // a hash has one number in a field
			i.schema = append(i.schema, &goredis.FieldSchema{FieldName: "y:" + f.Path, As: numberField(n), FieldType: goredis.SearchFieldTypeNumeric})
		}
	}
	return i
}

func tagField(n int) string    { return fmt.Sprintf("f%d", n) }
func numberField(n int) string { return fmt.Sprintf("g%d", n) }

// textFields are those of a, b, c and d that a type uses.
func textFields(s *descriptor.Search) []string {
	var used []string
	for _, f := range s.Fields {
		used = append(used, strings.ToLower(string(f.Weight)))
	}
	slices.Sort(used)
	return slices.Compact(used)
}

// tag is a value as a TAG has it.
func tag(value string) string { return "v" + hex.EncodeToString([]byte(value)) }

// engineFields are the arguments of upsert behind i: the names of the fields that only the engine reads, and their values.
func engineFields(name string, values map[string]any) []any {
	var places []string
	parts := strings.Split(name, "/")
	for i, part := range parts[:len(parts)-1] {
		places = append(places, strconv.Itoa(i+1)+tag(part))
	}
	places = append(places, "n"+strconv.Itoa(len(parts)))
	type field struct {
		name  string
		texts []string
	}
	fields := []field{{"n", []string{name}}, {"p", nil}}
	leaves("", values, func(path string, value any) {
		text, ok := facetText(value)
		if !ok {
			return
		}
		text = tag(indexed(text))
		if n := slices.IndexFunc(fields, func(f field) bool { return f.name == "x:"+path }); n >= 0 {
			fields[n].texts = append(fields[n].texts, text)
			return
		}
		places = append(places, "h"+hex.EncodeToString([]byte(path)))
		fields = append(fields, field{"x:" + path, []string{text}})
		if number, ok := value.(json.Number); ok {
			fields = append(fields, field{"y:" + path, []string{score(number)}})
		}
	})
	fields[1].texts = places
	var names []string
	args := make([]any, 1, len(fields)+1)
	for _, f := range fields {
		names, args = append(names, f.name), append(args, strings.Join(f.texts, ","))
	}
	args[0] = strings.Join(names, "\n")
	return args
}

// clause is a part of a query.
type clause struct {
	// query in the language of the engine; empty means everything.
	query string
	// exact: it has what is asked for, and nothing more. Otherwise it has at least that.
	exact bool
}

// nothing is found by a tag that no document has.
var nothing = clause{"@p:{none}", true}

// present has the documents with a value at the path of a filter.
func present(path string) clause {
	return clause{"@p:{h" + hex.EncodeToString([]byte(path)) + "}", true}
}

// engineQuery is the query for a plan. found is false if its text has no word that counts, and finds nothing.
func engineQuery(p search.Plan) (c clause, found bool) {
	parts := []clause{{"", true}}
	if p.Text != "" {
		text := textQuery(p.Text)
		if text == "" {
			return nothing, false
		}
		parts = append(parts, clause{text, true})
	}
	parts = append(parts, prefixQuery(p.Prefix), whereQuery(p.Type.Search, p.Where))
	return and(parts), true
}

func and(parts []clause) clause {
	all := clause{exact: true}
	var queries []string
	for _, p := range parts {
		all.exact = all.exact && p.exact
		if p.query != "" {
			queries = append(queries, p.query)
		}
	}
	if all.query = strings.Join(queries, " "); len(queries) > 1 {
		all.query = "(" + all.query + ")"
	}
	return all
}

// textQuery translates what a user types: words, prefix*, "a phrase", -not, or. Nothing but letters, digits and underscores goes from the user to the engine. It is empty without a word.
func textQuery(text string) string {
	var groups, group []string
	end := func() {
		if len(group) > 0 {
			groups = append(groups, "("+strings.Join(group, " ")+")")
		}
		group = nil
	}
	for {
		text = strings.TrimLeftFunc(text, unicode.IsSpace)
		if text == "" {
			break
		}
		rest := strings.TrimLeft(text, "-")
		not := len(rest) < len(text)
		var word string
		quoted, phrase := strings.CutPrefix(rest, `"`)
		if phrase {
			word, text, _ = strings.Cut(quoted, `"`)
		} else {
			at := strings.IndexFunc(rest, func(r rune) bool { return unicode.IsSpace(r) || r == '"' })
			if at < 0 {
				at = len(rest)
			}
			word, text = rest[:at], rest[at:]
		}
		if !phrase && !not && strings.EqualFold(word, "or") {
			end()
			continue
		}
		if term := termQuery(word, phrase); term != "" && not {
			group = append(group, "-"+term)
		} else if term != "" {
			group = append(group, term)
		}
	}
	if end(); len(groups) < 2 {
		return strings.Join(groups, "")
	}
	return "(" + strings.Join(groups, "|") + ")"
}

// minPrefix is the shortest prefix, in bytes, that the engine looks for.
const minPrefix = 2

// termQuery translates one word of a text, or a phrase; empty if nothing of it counts. What the engine has as several words is searched as a phrase.
func termQuery(text string, phrase bool) string {
	words := strings.FieldsFunc(text, func(r rune) bool { return !wordRune(r) })
	prefix := ""
	if n := len(words); !phrase && n > 0 && strings.HasSuffix(text, words[n-1]+"*") && len(words[n-1]) >= minPrefix {
		words, prefix = words[:n-1], words[n-1]+"*"
	}
	words = slices.DeleteFunc(words, func(w string) bool { return slices.Contains(stopWords, strings.ToLower(w)) })
	term := strings.Join(words, " ")
	if phrase && term != "" || len(words) > 1 {
		term = `"` + term + `"`
	}
	switch {
	case prefix == "":
		return term
	case term == "":
		return prefix
	}
	return "(" + term + " " + prefix + ")"
}

func wordRune(r rune) bool { return r == '_' || unicode.In(r, unicode.L, unicode.N, unicode.M) }

// prefixQuery translates search.Shape.
func prefixQuery(prefix string) clause {
	if prefix == "" {
		return clause{exact: true}
	}
	c := clause{exact: strings.HasSuffix(prefix, "/")}
	parts := strings.Split(prefix, "/")
	parts = parts[:len(parts)-1]
	var all []clause
	wild := false
	for i, part := range parts {
		switch part {
		case "":
			return clause{}
		case "-":
			wild = true
		default:
			all = append(all, clause{fmt.Sprintf("@p:{%d%s}", i+1, tag(part)), true})
		}
	}
	if wild {
		if !c.exact {
			return clause{}
		}
		all = append(all, clause{fmt.Sprintf("@p:{n%d}", len(parts)+1), true})
	}
	return and(append(all, c))
}

// whereQuery translates a filter.
func whereQuery(s *descriptor.Search, n listquery.Node) clause {
	switch n.Operator {
	case "AND", "OR":
		var parts []clause
		for _, o := range n.Operands {
			parts = append(parts, whereQuery(s, o))
		}
		if n.Operator == "AND" {
			return and(parts)
		}
		var queries []string
		exact := true
		for _, p := range parts {
			if p.query == "" {
				return clause{exact: p.exact} // everything
			}
			queries, exact = append(queries, "("+p.query+")"), exact && p.exact
		}
		return clause{"(" + strings.Join(queries, "|") + ")", exact}
	case "NOT":
		c := whereQuery(s, n.Operands[0])
		switch {
		case !c.exact:
			return clause{} // of what is more than asked for, the rest is less
		case c.query == "":
			return nothing
		}
		return clause{"-(" + c.query + ")", true}
	}
	if n.Comparison == nil {
		return clause{exact: true}
	}
	return comparisonQuery(s, n.Comparison)
}

// comparisonQuery translates one comparison. There are no prefixes and ranges of strings: the engine stops after a number of values of a TAG, and says nothing.
func comparisonQuery(s *descriptor.Search, c *listquery.Comparison) clause {
	n := slices.IndexFunc(s.Filters, func(f descriptor.SearchFilter) bool { return f.Path == c.Field })
	if !c.Body || n < 0 {
		return clause{exact: c.Present()}
	}
	f := &s.Filters[n]
	present := present(f.Path)
	literal := v1alpha1.SearchString
	switch {
	case c.Present():
		return present
	case c.Number():
		literal = v1alpha1.SearchNumber
	case c.Boolean():
		literal = v1alpha1.SearchBoolean
	}
	equal, ordered := c.Operator == "=" || c.Operator == ":", strings.ContainsAny(c.Operator, "<>")
	switch {
	case f.Type != literal && c.Operator == "!=":
		return present
	case f.Type != literal:
		return nothing
	case literal == v1alpha1.SearchNumber:
		if f.List || c.Operator == "!=" {
			return clause{present.query, false}
		}
		// Inclusive: an index has the nearest number to the value.
		lo, hi := "-inf", "+inf"
		if at := strings.Replace(score(json.Number(c.Value)), "+", "", 1); !ordered { // in a query, a + ends a number
			lo, hi = at, at
		} else if c.Operator[0] == '>' {
			lo = at
		} else {
			hi = at
		}
		return clause{fmt.Sprintf("@%s:[%s %s]", numberField(n), lo, hi), false}
	case c.Pattern != nil || ordered:
		return clause{present.query, false}
	}
	// A longer value may stand in the index as the same one.
	exact := len(c.Value) <= maxIndexed-utf8.UTFMax
	value := fmt.Sprintf("@%s:{%s}", tagField(n), tag(indexed(c.Value)))
	switch {
	case equal:
		return clause{value, exact}
	case exact:
		return clause{"(" + present.query + " -" + value + ")", true}
	}
	return clause{present.query, false}
}

// Characters in texts that stand for something else.
const (
	// partEnd separates the texts of one weight.
	partEnd = "\x1f"
	// backslash stands for one: the engine would take what follows as part of the word.
	backslash = '\x1e'
	// filler is in texts without a word, whose marks some engines misplace. It is of no use in a query.
	filler = "\ue000"
)

// textFor is a text of a document as the engine is given it: what is neither a letter nor ASCII ends a word only with a tab beside it, nor does a line's end.
func textFor(parts []string) string {
	if len(parts) == 0 {
		return ""
	}
	var b strings.Builder
	words := false
	apart := func(r rune) {
		b.WriteByte('\t')
		b.WriteRune(r)
		b.WriteByte('\t')
	}
	for i, part := range parts {
		if i > 0 {
			apart(rune(partEnd[0]))
		}
		for _, r := range part {
			switch {
			case wordRune(r):
				words = true
				b.WriteRune(r)
			case r == '\t':
				b.WriteByte(' ')
			case r == '\\':
				apart(backslash)
			case r < ' ' || r > unicode.MaxASCII:
				apart(r)
			default:
				b.WriteRune(r)
			}
		}
	}
	if !words {
		b.WriteString("\t" + filler)
	}
	return b.String()
}

var textFrom = strings.NewReplacer("\t", "", string(backslash), `\`, filler, "")

// highlights makes the snippets of a hit. marked has the marked texts by weight.
func highlights(s *descriptor.Search, marked map[string]string) []search.Highlight {
	var found []search.Highlight
	next := map[byte]int{}
	for _, f := range s.Fields {
		parts := strings.Split(marked[strings.ToLower(string(f.Weight))], partEnd)
		n := next[f.Weight]
		if next[f.Weight]++; n >= len(parts) {
			continue
		}
		if snippet, ok := search.Snippet(excerpt(textFrom.Replace(parts[n]))); ok {
			found = append(found, search.Highlight{Field: f.Path, Snippet: snippet})
		}
	}
	return found
}

// Of a text are shown up to fragments parts of fragmentWords words, each with up to leadWords before its first mark.
const (
	fragments     = 2
	fragmentWords = 24
	leadWords     = 8
)

// excerpt takes the parts of a marked text in which marks are.
func excerpt(marked string) string {
	words := strings.Fields(marked)
	open := false
	for i, w := range words { // marks end with their word
		was := open
		if at := strings.LastIndexAny(w, search.MarkBegin+search.MarkEnd); at >= 0 {
			open = w[at:at+1] == search.MarkBegin
		}
		if was {
			words[i] = search.MarkBegin + words[i]
		}
		if open {
			words[i] += search.MarkEnd
		}
	}
	var parts []string
	for from := 0; len(parts) < fragments; {
		at := slices.IndexFunc(words[from:], func(w string) bool { return strings.Contains(w, search.MarkBegin) })
		if at < 0 {
			break
		}
		begin := max(from, from+at-leadWords)
		from = min(len(words), begin+fragmentWords)
		parts = append(parts, strings.Join(words[begin:from], " "))
	}
	return strings.Join(parts, " … ")
}
