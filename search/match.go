package search

import (
	"bytes"
	"encoding/json"
	"math/big"
	"strings"

	"github.com/dbcontroller/db-controller/store/listquery"
)

// Match says whether a document matches a filter, by the rules of package listquery. values are those of ParseValues.
func Match(n listquery.Node, name string, values map[string]any) bool {
	switch n.Operator {
	case "AND":
		for _, o := range n.Operands {
			if !Match(o, name, values) {
				return false
			}
		}
		return true
	case "OR":
		for _, o := range n.Operands {
			if Match(o, name, values) {
				return true
			}
		}
		return false
	case "NOT":
		return !Match(n.Operands[0], name, values)
	}
	c := n.Comparison
	if c == nil {
		return true
	}
	if !c.Body {
		return c.Present() || compareText(c, name)
	}
	value := At(values, c.Field)
	if list, ok := value.([]any); ok {
		for _, item := range list {
			if c.Present() || compare(c, item) {
				return true
			}
		}
		return false
	}
	return value != nil && (c.Present() || compare(c, value))
}

// ParseValues reads the Values of a document. Numbers are json.Number.
func ParseValues(raw []byte) (map[string]any, error) {
	var values map[string]any
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	return values, d.Decode(&values)
}

// At returns the value at a path of names, nil without one.
func At(values map[string]any, path string) any {
	var value any = values
	for name := range strings.SplitSeq(path, ".") {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	return value
}

// compare compares a scalar. A number is compared as a number, true and false as booleans, everything else as text.
func compare(c *listquery.Comparison, value any) bool {
	equal := c.Operator == "=" || c.Operator == ":"
	switch {
	case c.Number():
		n, ok := value.(json.Number)
		if !ok {
			return c.Operator == "!="
		}
		return holds(c.Operator, compareNumbers(string(n), c.Value))
	case c.Boolean():
		b, ok := value.(bool)
		same := ok && b == (c.Value == "true")
		return equal && same || c.Operator == "!=" && !same
	}
	s, ok := value.(string)
	if !ok {
		return c.Operator == "!="
	}
	return compareText(c, s)
}

func compareText(c *listquery.Comparison, s string) bool {
	if c.Pattern != nil {
		return like(c.Pattern, s) == (c.Operator != "!=")
	}
	return holds(c.Operator, strings.Compare(s, c.Value)) // bytes of UTF-8 are in the order of code points
}

func holds(operator string, sign int) bool {
	switch operator {
	case "=", ":":
		return sign == 0
	case "!=":
		return sign != 0
	case "<":
		return sign < 0
	case "<=":
		return sign <= 0
	case ">":
		return sign > 0
	}
	return sign >= 0
}

// compareNumbers compares exactly. Both are JSON numbers with small exponents.
func compareNumbers(a, b string) int {
	x, ok1 := new(big.Rat).SetString(a)
	y, ok2 := new(big.Rat).SetString(b)
	if !ok1 || !ok2 {
		return strings.Compare(a, b)
	}
	return x.Cmp(y)
}

// like says whether s is made of the pieces with anything between them.
func like(pieces []string, s string) bool {
	rest, ok := strings.CutPrefix(s, pieces[0])
	if !ok {
		return false
	}
	last := len(pieces) - 1
	for _, piece := range pieces[1:last] {
		if _, rest, ok = strings.Cut(rest, piece); !ok {
			return false
		}
	}
	return strings.HasSuffix(rest, pieces[last])
}
