package redis

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/search/searchtest"
	"github.com/dbcontroller/db-controller/store/feed"
)

// F34: what a user types becomes words, prefixes, phrases, or and not.
func TestTextQuery(t *testing.T) {
	for text, want := range map[string]string{
		"library":                       "(library)",
		"Walking library":               "(Walking library)",
		`"walking library"`:             `("walking library")`,
		`"walking library`:              `("walking library")`,
		`"library"`:                     `("library")`,
		"library -walk":                 "(library -walk)",
		`library --"long walk"`:         `(library -"long walk")`,
		"-walk":                         "(-walk)",
		"silence or gardens":            "((silence)|(gardens))",
		"a silence OR the gardens walk": "((silence)|(gardens walk))",
		"or gardens or":                 "(gardens)",
		`x "or" y`:                      "(x y)",
		"lib*":                          "(lib*)",
		"-lib*":                         "(-lib*)",
		"l*":                            "(l)",
		"*":                             "",
		"li*b":                          `("li b")`,
		"libssl-dev":                    `("libssl dev")`,
		"libssl-de*":                    "((libssl de*))",
		"a-b-de*":                       "((b de*))",
		"the":                           "",
		"the library":                   "(library)",
		`"the library of books"`:        `("library books")`,
		"tha*":                          "(tha*)",
		"the*":                          "(the*)",
		"&|! ' ) (":                     "",
		"@t:{Book} | [1 2] => $x %a%":   `("t Book" 1 2 x)`,
		`\"a\\b"`:                       `("b")`,
		"Ærlig größe 10.5 x_y":          `(Ærlig größe "10 5" x_y)`,
		"naïve… “quoted”":               "(naïve quoted)",
		"a\tb\nc":                       "(b c)",
	} {
		if got := textQuery(text); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

// safeQuery is all that may come of a text: groups of words, prefixes and phrases.
var safeQuery = regexp.MustCompile(`^(|GROUP|\(GROUP(\|GROUP)+\))$`)

// X35: nothing that a user types is an operator of the engine.
func FuzzTextQuery(f *testing.F) {
	for _, seed := range []string{`a "b c" -d or e*`, `@p:{none}`, `x)|(@t:{Book}`, `"`, `-"-"`, "$x => {$weight: 2}", "\\", "\x00a", "w'x*'", "a\xffb", "%%x%%", "~a", "[1 2]", `"a`, "or or"} {
		f.Add(seed)
	}
	const (
		word  = `[\p{L}\p{N}\p{M}_]+`
		words = word + `( ` + word + `)*`
		term  = `(` + word + `\*?|"` + words + `"|\((` + word + `|"` + words + `") ` + word + `\*\))`
	)
	group := regexp.MustCompile(`\(-?` + term + `( -?` + term + `)*\)`)
	f.Fuzz(func(t *testing.T, text string) {
		got := textQuery(text)
		if shape := group.ReplaceAllString(got, "GROUP"); !safeQuery.MatchString(shape) {
			t.Errorf("%q becomes %s", text, got)
		}
	})
}

// What the engine is given tells words as a reader does, and what it gives back is the text.
func FuzzText(f *testing.F) {
	for _, seed := range []string{"", "one\ntwo", "C:\\new folder", "“walking”…", "a\tb", "é\u0301", "日本語", "\x1f", "-"} {
		f.Add(seed, seed)
	}
	f.Fuzz(func(t *testing.T, one, two string) {
		clean := func(s string) string { // as descriptor.Search.Project does
			return strings.Map(func(r rune) rune {
				if r < ' ' && r != '\n' && r != '\t' || r == 0x7f || r == []rune(filler)[0] {
					return ' '
				}
				return r
			}, strings.ToValidUTF8(s, " "))
		}
		one, two = clean(one), clean(two)
		text := textFor([]string{one, two})
		back := strings.Split(textFrom.Replace(text), partEnd)
		if len(back) != 2 || back[0] != strings.ReplaceAll(one, "\t", " ") || back[1] != strings.ReplaceAll(two, "\t", " ") {
			t.Fatalf("%q, %q come back as %q", one, two, back)
		}
		// The engine's own rule: blanks and ASCII punctuation end a word, control characters are dropped, a backslash takes along what follows.
		var got []string
		for _, w := range strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(" \t,./(){}[]:;~!@#$%^&*-=+|'`\"<>?", r) }) {
			w = strings.Map(func(r rune) rune {
				if unicode.IsControl(r) {
					return -1
				}
				return r
			}, w)
			if strings.ContainsFunc(w, wordRune) {
				got = append(got, w)
			}
		}
		want := strings.FieldsFunc(one+" "+two, func(r rune) bool { return !wordRune(r) })
		if !slices.Equal(got, want) || strings.Contains(text, `\`) {
			t.Fatalf("%q has the words %q, want %q", text, got, want)
		}
	})
}

// F33: marks become snippets of the field in which they are.
func TestHighlights(t *testing.T) {
	s := searchtest.Version(t).Type("Book").Search // name A, title A, summary C, chapters[].heading D
	m := func(text string) string {
		return strings.NewReplacer("[", search.MarkBegin, "]", search.MarkEnd).Replace(text)
	}
	long := strings.Repeat("before ", 30) + m("[here]") + strings.Repeat(" between", 40) + m(" [there]") + strings.Repeat(" after", 40) + m(" [third]")
	got := highlights(s, map[string]string{
		"a": m("a\t" + partEnd + "\tThe [walking] <library>"), "c": m("C:\t" + string(backslash) + "\tnew\t\n\t[books]"), "d": long,
	})
	want := []search.Highlight{
		{Field: "title", Snippet: "The <em>walking</em> &lt;library&gt;"},
		{Field: "summary", Snippet: `C:\new <em>books</em>`},
		{Field: "chapters[].heading", Snippet: strings.Repeat("before ", 8) + "<em>here</em>" + strings.Repeat(" between", 15) + " … " +
			strings.Repeat("between ", 8) + "<em>there</em>" + strings.Repeat(" after", 15)},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	if got := excerpt(m("x [two words] y")); got != m("x [two] [words] y") {
		t.Errorf("a mark over two words: %q", got)
	}
	if got := highlights(s, map[string]string{"a": "no" + partEnd + "mark"}); got != nil {
		t.Errorf("without marks: %q", got)
	}
}

// F34: filters and prefixes become queries that have at least what they ask for.
func TestWhereQuery(t *testing.T) {
	h := func(s string) string { return hex.EncodeToString([]byte(s)) }
	genre, labels, color, pages := "@p:{h"+h("genre")+"}", "@p:{h"+h("labels")+"}", "@p:{h"+h("print.color")+"}", "@p:{h"+h("pages")+"}"
	for filter, want := range map[string]clause{
		``:                                     {"", true},
		`genre = crime`:                        {"@f0:{v" + h("crime") + "}", true},
		`genre = "} | @p:{x"`:                  {"@f0:{v" + h("} | @p:{x") + "}", true},
		`genre = ""`:                           {"@f0:{v}", true},
		`genre != crime`:                       {"(" + genre + " -@f0:{v" + h("crime") + "})", true},
		`NOT genre = crime`:                    {"-(@f0:{v" + h("crime") + "})", true},
		`NOT genre = "c*"`:                     {"", false},
		`genre = "c*"`:                         {genre, false},
		`genre > a`:                            {genre, false},
		`genre:*`:                              {genre, true},
		`genre = 5`:                            {"@p:{none}", true},
		`genre != 5`:                           {genre, true},
		`genre = "` + strings.Repeat("x", 300): {},
		`pages = 100`:                          {"@g1:[100 100]", false},
		`pages > 1e30`:                         {"@g1:[1e30 +inf]", false},
		`pages <= -2.5`:                        {"@g1:[-inf -2.5]", false},
		`pages != 3`:                           {pages, false},
		`pages = "7"`:                          {"@p:{none}", true},
		`print.color = true`:                   {"@f2:{v" + h("true") + "}", true},
		`print.color != true`:                  {"(" + color + " -@f2:{v" + h("true") + "})", true},
		`"labels":red`:                         {"@f3:{v" + h("red") + "}", true},
		`"labels":"Ü*"`:                        {labels, false},
		`"labels":red AND genre = a`:           {"(@f3:{v" + h("red") + "} @f0:{v" + h("a") + "})", true},
		`"labels":red OR pages < 0`:            {"((@f3:{v" + h("red") + "})|(@g1:[-inf 0]))", false},
		`name = "shelves/b/*" OR pages < 0`:    {"", false},
		`name = "shelves/b/*" AND pages < 0`:   {"@g1:[-inf 0]", false},
	} {
		if strings.Contains(filter, "xxx") {
			filter, want = filter+`"`, clause{"@f0:{v" + h(strings.Repeat("x", maxIndexed)) + "}", false}
		}
		p, err := search.Query{Type: searchtest.Version(t).Type("Book"), Filter: filter}.Plan()
		if err != nil {
			t.Fatalf("%s: %v", filter, err)
		}
		if got := whereQuery(p.Type.Search, p.Where); got != want {
			t.Errorf("%s: %+v, want %+v", filter, got, want)
		}
	}
	for prefix, want := range map[string]clause{
		"":                 {"", true},
		"shelves/a/books/": {"(@p:{1v" + h("shelves") + "} @p:{2v" + h("a") + "} @p:{3v" + h("books") + "})", true},
		"shelves/-/books/": {"(@p:{1v" + h("shelves") + "} @p:{3v" + h("books") + "} @p:{n4})", true},
		"-/":               {"@p:{n2}", true},
		"shelves/a/bo":     {"(@p:{1v" + h("shelves") + "} @p:{2v" + h("a") + "})", false},
		"shelves/-/bo":     {"", false},
		"a//":              {"", false},
	} {
		if got := prefixQuery(prefix); got != want {
			t.Errorf("%s: %+v, want %+v", prefix, got, want)
		}
	}
}

// F34: an index is made of the declaration.
func TestIndexOf(t *testing.T) {
	s, err := Open(Config{URL: "redis://localhost", Service: "books.example.com", Region: "eu", Version: "v1", Ring: searchtest.Ring})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	book := searchtest.Version(t).Type("Book")
	i := s.indexOf(book)
	if want := "dbc-search-1:{books.example.com/eu/v1}:q:Book:" + book.Search.Fingerprint + "-1"; i.name != want {
		t.Errorf("name %s, want %s", i.name, want)
	}
	o := i.options
	if got := fmt.Sprintln(o.OnHash, o.Prefix, o.Filter, o.DefaultLanguage, len(o.StopWords)); got != "true [dbc-search-1:{books.example.com/eu/v1}:d:] @t==\"Book\" english 33\n" {
		t.Errorf("options %+v", o)
	}
	var got []string
	for _, f := range i.schema {
		got = append(got, strings.Join(strings.Fields(fmt.Sprintf("%s %s %s %v", f.FieldName, f.As, f.FieldType, f.Weight)), " "))
	}
	want := []string{"a TEXT 10", "c TEXT 2", "d TEXT 1", "n TAG 0", "p TAG 0", "x:genre f0 TAG 0", "x:pages f1 TAG 0", "y:pages g1 NUMERIC 0", "x:print.color f2 TAG 0", "x:labels f3 TAG 0"}
	if !slices.Equal(got, want) {
		t.Errorf("schema %q, want %q", got, want)
	}
}

// X35: the version decides. Version 1 takes FT.CREATE and indexes nothing.
func TestJudge(t *testing.T) {
	module := func(name string, version int64) any {
		return []any{"name", name, "ver", version, "path", "/x.so", "args", []any{}}
	}
	for what, c := range map[string]struct {
		reply any
		err   error
		db    int
		plain string // part of it; ! for none
	}{
		"Redis 8":        {reply: []any{module("ReJSON", 80001), module("search", 80001)}, plain: "!"},
		"2.10":           {reply: []any{module("search", 21005)}, plain: "!"},
		"2.4":            {reply: []any{module("search", 20400)}, plain: "!"},
		"2.2":            {reply: []any{module("search", 20207)}, plain: "version 2.2.7"},
		"1.2 of Debian":  {reply: []any{module("ft", 10202)}, plain: "version 1.2.2 (2.4 at least"},
		"other modules":  {reply: []any{module("bf", 20400)}, plain: "without the Query Engine"},
		"none":           {reply: []any{}, plain: "without the Query Engine"},
		"another form":   {reply: "OK", plain: "without the Query Engine"},
		"database 3":     {reply: []any{module("search", 21005)}, db: 3, plain: "names database 3"},
		"not allowed":    {err: replyError("NOPERM this user has no permissions to run the 'module|list' command"), plain: "allow MODULE LIST"},
		"unknown":        {err: replyError("ERR unknown command 'MODULE'"), plain: "allow MODULE LIST"},
		"being loaded":   {err: replyError("LOADING Redis is loading the dataset in memory")},
		"not answering":  {err: errors.New("i/o timeout")},
		"no such module": {reply: []any{[]any{"name"}}, plain: "without the Query Engine"},
	} {
		v, err := judge(c.reply, c.err, c.db)
		switch {
		case c.plain == "":
			if err == nil {
				t.Errorf("%s: %+v, want an error", what, v)
			}
		case err != nil || c.plain == "!" && v.plain != "" || c.plain != "!" && !strings.Contains(v.plain, c.plain):
			t.Errorf("%s: %+v, %v", what, v, err)
		}
	}
}

type replyError string

func (e replyError) Error() string { return string(e) }
func (replyError) RedisError()     {}

var _ goredis.Error = replyError("")

// F34, P16: what the scripts write for the engine, and what queries ask of it, are the same. The fields are those in a Redis; what the engine finds is reckoned from them here.
func TestQueriesFindWhatScriptsWrite(t *testing.T) {
	s, err := Open(Config{URL: redisserver.New(t, nil).URL(), Service: "books.example.com", Region: "eu", Version: "v1", Ring: searchtest.Ring})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	v := searchtest.Version(t)
	lease, _, err := s.Begin(t.Context(), feed.Range{To: searchtest.Ring}, "schema")
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 255)
	bodies := []searchtest.Body{
		{Genre: "crime", Pages: 100, Labels: []string{"red", "new", "red"}, Print: &searchtest.Print{Color: true}},
		{Genre: "cricket, and more", Pages: 250.5, Labels: []string{"red"}, Print: &searchtest.Print{Color: false}},
		{Genre: "", Pages: 1e30}, {Pages: -3, Genre: 5, Labels: []string{"Über", "a\x00b", ",", ""}}, {Genre: long + "é"}, {Genre: long + "è", Labels: []string{}}, {},
	}
	var docs []search.Document
	for i, b := range bodies {
		docs = append(docs, searchtest.Document(t, v, fmt.Sprintf("shelves/%d/books/b é%d", i%2, i), 1, b))
	}
	docs = append(docs, searchtest.Document(t, v, "shelves/0/books/b/books/c", 1, bodies[0]))
	if err := s.Apply(t.Context(), lease, search.Batch{Upserts: docs}); err != nil {
		t.Fatal(err)
	}
	hashes := map[string]map[string]string{}
	for _, d := range docs {
		if hashes[d.Name], err = s.client.HGetAll(t.Context(), s.key("d:", d.Name)).Result(); err != nil {
			t.Fatal(err)
		}
	}
	fields := map[string]string{"p": "p"}
	for _, f := range s.indexOf(v.Type("Book")).schema {
		if f.As != "" {
			fields[f.As] = f.FieldName
		}
	}
	values := []string{"crime", `""`, `"cricket, and more"`, "100", "250.5", "1e30", "-3", "5", "true", "false", "red", `"a\u0000b"`, `","`, `"c*"`, "*", `"` + long + `é"`, `"` + long + `"`, "Über", `"7"`}
	var filters []string
	for _, field := range []string{"genre", "pages", "print.color", `"labels"`, "name"} {
		for _, op := range []string{"=", "!=", "<", ">=", ":"} {
			for _, value := range values {
				filters = append(filters, field+" "+op+" "+value, "NOT "+field+" "+op+" "+value)
			}
		}
	}
	for i := range 400 {
		a, b := filters[i*7%len(filters)], filters[i*13%len(filters)]
		filters = append(filters, fmt.Sprintf("(%s) AND (%s)", a, b), fmt.Sprintf("(%s) OR (%s)", a, b), fmt.Sprintf("NOT ((%s) OR (%s))", a, b))
	}
	asked, exact := 0, 0
	for _, filter := range filters {
		for _, prefix := range []string{"", "shelves/-/books/", "shelves/0/books/", "shelves/0/books/b/books/", "shelves/0/bo"} {
			p, err := search.Query{Type: v.Type("Book"), Filter: filter, Prefix: prefix}.Plan()
			if err != nil {
				break // not for this field
			}
			asked++
			q, _ := engineQuery(p)
			if q.exact {
				exact++
			}
			for _, d := range docs {
				parsed, err := search.ParseValues(d.Values)
				if err != nil {
					t.Fatal(err)
				}
				want := search.Shape(prefix, d.Name) && search.Match(p.Where, d.Name, parsed)
				e := evaluator{query: q.query, fields: fields, hash: hashes[d.Name]}
				if got := e.all(); got != want && (want || q.exact) || e.query != "" {
					t.Fatalf("%s below %q: %+v finds %s: %v, want %v (rest %q) in %v", filter, prefix, q, d.Name, got, want, e.query, hashes[d.Name])
				}
			}
		}
	}
	if asked < 3000 || exact < asked/4 {
		t.Errorf("%d queries, %d of them exact", asked, exact)
	}
}

// evaluator judges the part of the query language that filters use on one hash.
type evaluator struct {
	query        string
	fields, hash map[string]string
}

// all reads alternatives of which each is a list of conditions, up to the end or a closing parenthesis.
func (e *evaluator) all() bool {
	found, here := false, true
	for {
		e.query = strings.TrimPrefix(e.query, " ")
		switch {
		case e.query == "" || e.query[0] == ')':
			return found || here
		case e.query[0] == '|':
			e.query = e.query[1:]
			found, here = found || here, true
		default:
			one := e.one() // also of what is false already: it must be read
			here = here && one
		}
	}
}

func (e *evaluator) one() bool {
	switch rest, _ := strings.CutPrefix(e.query, "-"); {
	case rest != e.query:
		e.query = rest
		return !e.one()
	case rest[0] == '(':
		e.query = rest[1:]
		found := e.all()
		e.query = strings.TrimPrefix(e.query, ")")
		return found
	}
	var name, rest string
	name, rest, _ = strings.Cut(strings.TrimPrefix(e.query, "@"), ":")
	value, ok := e.hash[e.fields[name]]
	if tag, of := strings.CutPrefix(rest, "{"); of {
		tag, e.query, _ = strings.Cut(tag, "}")
		return ok && slices.Contains(strings.Split(value, ","), tag)
	}
	bounds, after, _ := strings.Cut(strings.TrimPrefix(rest, "["), "]")
	e.query = after
	lo, hi, _ := strings.Cut(bounds, " ")
	var numbers [3]float64
	for i, text := range []string{lo, value, hi} {
		var err error
		if numbers[i], err = strconv.ParseFloat(text, 64); err != nil && (ok || i != 1) {
			panic(fmt.Sprint(slices.Collect(maps.Keys(e.hash)), err))
		}
	}
	return ok && numbers[0] <= numbers[1] && numbers[1] <= numbers[2]
}
