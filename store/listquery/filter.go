package listquery

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/dbcontroller/db-controller/store"
)

// Why not the parser of go.einride.tech/aip: it passes decimals through float64 and integers through int64, reads 010 as 8, knows no
// exponents, cannot tell f:* from f:"*", has no way to escape a star, and refuses unquoted hyphens (labels.my-key, uuids).

// An expr is a node of a filter.
type expr interface {
	// sql returns a condition that is TRUE or FALSE, never NULL, in parentheses where it needs them.
	sql(b *builder) (string, error)
}

type junction struct {
	operator string // AND or OR
	operands []expr
}

func (j junction) sql(b *builder) (string, error) {
	parts := make([]string, len(j.operands))
	for i, o := range j.operands {
		var err error
		if parts[i], err = o.sql(b); err != nil {
			return "", err
		}
	}
	return "(" + strings.Join(parts, " "+j.operator+" ") + ")", nil
}

type negation struct{ operand expr }

func (n negation) sql(b *builder) (string, error) {
	s, err := n.operand.sql(b)
	return "(NOT " + s + ")", err
}

// A comparison is one field, one operator, one value.
type comparison struct {
	field    field
	operator string
	value    value
}

// A value is what stands right of an operator.
type value struct {
	text string // without quotes and escapes
	// like is text as a pattern for LIKE; empty if no star in it stands for anything.
	like   string
	quoted bool
	at     int // offset in the filter
}

// present says that v is the star of field:*.
func (v value) present() bool { return !v.quoted && v.text == "*" }

// numberForm is a number as JSON writes it; the exponent is bounded so that numeric can hold it.
var numberForm = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?$`)

// parser reads a filter by recursive descent; pos is always at the start of a rune.
type parser struct {
	in    string
	pos   int
	depth int
	terms int
}

// syntaxError is a fault at an offset; the entry points turn it into the user's error.
type syntaxError struct {
	at     int
	reason string
}

func (e syntaxError) Error() string { return e.reason }

func (p *parser) errorf(at int, format string, args ...any) error {
	return syntaxError{at, fmt.Sprintf(format, args...)}
}

// invalid is err as the user's error about a field of the request whose text is in. Positions count characters, from 1.
func invalid(name, in string, err error) error {
	if e, ok := err.(syntaxError); ok { //nolint:errorlint // made here, never wrapped
		return store.Invalid(name, fmt.Sprintf("at position %d: %s", utf8.RuneCountInString(in[:e.at])+1, e.reason))
	}
	return err
}

func parseFilter(filter string) (_ expr, err error) {
	defer func() { err = invalid("filter", filter, err) }()
	if len(filter) > MaxFilterLength {
		return nil, store.Invalid("filter", fmt.Sprintf("has %d bytes, at most %d are allowed", len(filter), MaxFilterLength))
	}
	if !storable(filter) {
		return nil, store.Invalid("filter", "must be UTF-8 without NUL")
	}
	p := &parser{in: filter}
	e, err := p.expression()
	if err != nil {
		return nil, err
	}
	if p.pos < len(p.in) { // only a parenthesis ends an expression early
		return nil, p.errorf(p.pos, "this parenthesis was never opened")
	}
	return e, nil
}

// expression = factor { [ "AND" ] factor } .
func (p *parser) expression() (expr, error) {
	var factors []expr
	for {
		f, err := p.factor()
		if err != nil {
			return nil, err
		}
		factors = append(factors, f)
		if !p.word("AND") && (p.pos == len(p.in) || p.in[p.pos] == ')') {
			break
		}
	}
	return join("AND", factors), nil
}

// factor = term { "OR" term } .
func (p *parser) factor() (expr, error) {
	var terms []expr
	for {
		t, err := p.term()
		if err != nil {
			return nil, err
		}
		terms = append(terms, t)
		if !p.word("OR") {
			return join("OR", terms), nil
		}
	}
}

func join(operator string, operands []expr) expr {
	if len(operands) == 1 {
		return operands[0]
	}
	return junction{operator, operands}
}

// term = [ "NOT" | "-" ] ( "(" expression ")" | comparison ) .
func (p *parser) term() (expr, error) {
	p.depth++
	defer func() { p.depth-- }()
	// The term itself is one level, so that the limit is what a user counts.
	if p.depth > MaxFilterDepth+1 {
		return nil, p.errorf(p.pos, "more than %d levels of parentheses and negations", MaxFilterDepth)
	}
	switch {
	case p.word("NOT"), p.symbol("-"):
		e, err := p.term()
		return negation{e}, err
	case p.symbol("("):
		opened := p.pos - 1
		e, err := p.expression()
		if err != nil {
			return nil, err
		}
		if !p.symbol(")") {
			return nil, p.errorf(opened, "this parenthesis is never closed")
		}
		return e, nil
	}
	return p.comparison()
}

// comparison = path operator value .
func (p *parser) comparison() (expr, error) {
	at := p.pos
	if p.terms++; p.terms > MaxFilterTerms {
		return nil, p.errorf(at, "more than %d comparisons", MaxFilterTerms)
	}
	path, err := p.path()
	if err != nil {
		return nil, err
	}
	f, reason := resolve(path)
	if reason != "" {
		return nil, p.errorf(at, "%s", reason)
	}
	p.space()
	if p.pos < len(p.in) && p.in[p.pos] == '(' {
		return nil, p.errorf(p.pos, "functions are not supported")
	}
	for _, operator := range []string{"!=", "<=", ">=", "=", "<", ">", ":"} {
		if p.symbol(operator) {
			v, err := p.value()
			if err != nil {
				return nil, err
			}
			c := comparison{f, operator, v}
			return c, c.check(p)
		}
	}
	return nil, p.errorf(p.pos, "expected an operator after %s: one of = != < <= > >= :", f.name)
}

// A path is a field as the user wrote it.
type path struct {
	segments []string
	// body is true if the first segment is quoted: then the field is in the body, even if one outside has the same name.
	body bool
}

// path = segment { "." segment } . segment = quoted | characters .
func (p *parser) path() (path, error) {
	p.space()
	all := path{body: p.pos < len(p.in) && isQuote(p.in[p.pos])}
	for {
		at := p.pos
		var segment string
		if p.pos < len(p.in) && isQuote(p.in[p.pos]) {
			v, err := p.quoted()
			if err != nil {
				return path{}, err
			}
			segment = v.text
		} else {
			segment = p.take(func(r rune) bool { return isPlain(r) && r != '.' })
			if segment == "" {
				return path{}, p.errorf(at, "expected the name of a field")
			}
			if len(all.segments) == 0 && (segment == "AND" || segment == "OR" || segment == "NOT") {
				return path{}, p.errorf(at, "expected the name of a field, not %s (quote it if a field has that name)", segment)
			}
		}
		all.segments = append(all.segments, segment)
		if p.pos == len(p.in) || p.in[p.pos] != '.' {
			return all, nil
		}
		p.pos++
	}
}

// value = quoted | characters .
func (p *parser) value() (value, error) {
	p.space()
	if p.pos < len(p.in) && isQuote(p.in[p.pos]) {
		return p.quoted()
	}
	at := p.pos
	text := p.take(isPlain)
	if text == "" {
		return value{}, p.errorf(at, "expected a value; quote it if it has blanks or special characters")
	}
	return newValue(strings.Split(text, "*"), false, at), nil
}

// newValue makes a value of what stands between the stars that mean any characters.
func newValue(pieces []string, quoted bool, at int) value {
	v := value{text: strings.Join(pieces, "*"), quoted: quoted, at: at}
	if len(pieces) > 1 {
		for i, piece := range pieces {
			pieces[i] = likeEscaper.Replace(piece)
		}
		v.like = strings.Join(pieces, "%")
	}
	return v
}

var likeEscaper = strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`)

// quoted reads a string in single or double quotes. A backslash takes the meaning from a quote, a star or a backslash.
func (p *parser) quoted() (value, error) {
	at := p.pos
	quote := p.in[at]
	pieces := []string{""}
	for i := at + 1; i < len(p.in); i++ {
		c := p.in[i]
		switch c {
		case quote:
			p.pos = i + 1
			return newValue(pieces, true, at), nil
		case '*':
			pieces = append(pieces, "")
			continue
		case '\\':
			i++
			if i == len(p.in) || !strings.ContainsRune(`"'\*`, rune(p.in[i])) {
				return value{}, p.errorf(i-1, "a backslash must be followed by a quote, a star or a backslash")
			}
			c = p.in[i]
		}
		pieces[len(pieces)-1] += string([]byte{c})
	}
	return value{}, p.errorf(at, "this quote is never closed")
}

func (p *parser) space() { p.take(unicode.IsSpace) }

// take reads as long as ok holds.
func (p *parser) take(ok func(rune) bool) string {
	rest := p.in[p.pos:]
	n := strings.IndexFunc(rest, func(r rune) bool { return !ok(r) })
	if n < 0 {
		n = len(rest)
	}
	p.pos += n
	return rest[:n]
}

// symbol reads s, and blanks before it, if s comes next.
func (p *parser) symbol(s string) bool {
	p.space()
	if !strings.HasPrefix(p.in[p.pos:], s) {
		return false
	}
	p.pos += len(s)
	return true
}

// word is symbol for a keyword, which ends where a blank or a parenthesis begins.
func (p *parser) word(w string) bool {
	before := p.pos
	if p.symbol(w) {
		next, _ := utf8.DecodeRuneInString(p.in[p.pos:])
		if p.pos == len(p.in) || next == '(' || unicode.IsSpace(next) {
			return true
		}
	}
	p.pos = before
	p.space()
	return false
}

func isQuote(c byte) bool { return c == '"' || c == '\'' }

// isPlain says whether r may stand in a segment or a value without quotes.
func isPlain(r rune) bool { return !unicode.IsSpace(r) && !strings.ContainsRune(`()"'=!<>:,\`, r) }

// storable says whether PostgreSQL can hold s as text.
func storable(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }
