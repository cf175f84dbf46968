package listquery

import "strings"

// Node is a filter as a tree, for stores that are no PostgreSQL. The zero Node matches everything.
type Node struct {
	// Operator is AND, OR or NOT; empty for a comparison.
	Operator string
	Operands []Node
	// Comparison is set without an Operator.
	Comparison *Comparison
}

// Comparison is one field, one operator, one value.
type Comparison struct {
	// Field is the path in the body, or the name of a field outside it.
	Field string
	// Body says that it is in the body.
	Body bool
	// Operator is one of = != < <= > >= and :.
	Operator string
	// Value is what the field is compared with, without quotes and escapes.
	Value  string
	Quoted bool
	// Pattern are the pieces between the stars that stand for any characters; nil if no star does.
	Pattern []string
	// At is the offset of the value in the filter.
	At int
}

// Present says that the comparison asks whether there is a value at all: field:*.
func (c *Comparison) Present() bool { return c.Operator == ":" && !c.Quoted && c.Value == "*" }

// Number says that the value is a number, and is compared as one.
func (c *Comparison) Number() bool { return !c.Quoted && numberForm.MatchString(c.Value) }

// Boolean says that the value is true or false, and is compared as such.
func (c *Comparison) Boolean() bool { return !c.Quoted && (c.Value == "true" || c.Value == "false") }

// Parse reads a filter. The error is an InvalidArgument of the field filter.
func Parse(filter string) (Node, error) {
	if strings.TrimSpace(filter) == "" {
		return Node{}, nil
	}
	e, err := parseFilter(filter)
	if err != nil {
		return Node{}, err
	}
	return nodeOf(e), nil
}

// Comparisons calls visit for each comparison below n.
func (n Node) Comparisons(visit func(*Comparison)) {
	if n.Comparison != nil {
		visit(n.Comparison)
	}
	for _, o := range n.Operands {
		o.Comparisons(visit)
	}
}

func nodeOf(e expr) Node {
	switch e := e.(type) {
	case junction:
		n := Node{Operator: e.operator}
		for _, o := range e.operands {
			n.Operands = append(n.Operands, nodeOf(o))
		}
		return n
	case negation:
		return Node{Operator: "NOT", Operands: []Node{nodeOf(e.operand)}}
	case comparison:
		c := &Comparison{Field: e.field.name, Operator: e.operator, Value: e.value.text, Quoted: e.value.quoted, At: e.value.at}
		if c.Body = e.field.source == "body"; c.Body {
			c.Field = strings.Join(e.field.path, ".")
		}
		if e.value.like != "" {
			c.Pattern = piecesOf(e.value.like)
		}
		return Node{Comparison: c}
	}
	panic("listquery: an expression of an unknown kind")
}

// piecesOf takes a pattern for LIKE apart again.
func piecesOf(like string) []string {
	pieces := []string{""}
	for i := 0; i < len(like); i++ {
		switch like[i] {
		case '%':
			pieces = append(pieces, "")
			continue
		case '\\':
			i++
		}
		pieces[len(pieces)-1] += like[i : i+1]
	}
	return pieces
}
