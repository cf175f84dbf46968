package descriptor

import (
	"fmt"
	"regexp"
	"strings"
)

// Limits of names. A name is at most maxPairs pairs of a collection and an id.
const (
	// MaxNameBytes is the length of the longest name.
	MaxNameBytes = 1024
	// MaxIDBytes is the length of the longest id in a name.
	MaxIDBytes = 255

	maxPairs = 8
)

// Wildcard is the id that stands for all ids in a collection (sections/-/packages). It is not a valid id of a resource.
const Wildcard = "-"

// regionVar is the variable whose value is the region that owns the resource.
const regionVar = "region"

// idBytes are the bytes that an id may have: none that a URL path, a name or a filter would have to escape.
var idBytes = func() (t [256]bool) {
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.+~:" {
		t[c] = true
	}
	return t
}()

const idRule = "an id has 1 to 255 of the characters A-Z a-z 0-9 - _ . + ~ : and is none of '-', '.' and '..'"

func validID(id string) bool {
	if id == "" || len(id) > MaxIDBytes || id == Wildcard || id == "." || id == ".." {
		return false // dots: HTTP clients and proxies resolve them away
	}
	for i := 0; i < len(id); i++ {
		if !idBytes[id[i]] {
			return false
		}
	}
	return true
}

const regionRule = "a region has 1 to 30 of the characters a-z 0-9 -, begins with a letter and does not end with '-'"

// ValidRegion reports whether s can be the name of a region.
func ValidRegion(s string) bool {
	if s == "" || len(s) > 30 || s[0] < 'a' || s[0] > 'z' || s[len(s)-1] == '-' {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// pattern is one form of a type's names: pairs of a collection and a variable.
type pattern struct {
	typ         *Type
	text        string
	collections []string
	vars        []string
	node        *node // its place in the trie
}

var (
	collectionSyntax = regexp.MustCompile(`^[a-z][A-Za-z0-9]*$`)
	variableSyntax   = regexp.MustCompile(`^\{[a-z][a-z0-9_]*\}$`)
)

// parsePatterns parses a pattern and expands its optional segments: the shorter form first.
func parsePatterns(text string) ([]*pattern, error) {
	forms, err := expand(text)
	if err != nil {
		return nil, err
	}
	out := make([]*pattern, 0, len(forms))
	for _, form := range forms {
		p, err := parsePattern(form)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// expand replaces the one optional part in brackets by nothing and by itself.
func expand(text string) ([]string, error) {
	before, rest, found := strings.Cut(text, "[")
	if !found {
		return []string{text}, nil
	}
	inside, after, closed := strings.Cut(rest, "]")
	if !closed || strings.ContainsAny(inside, "[") || strings.ContainsAny(after, "[]") {
		return nil, fmt.Errorf("write at most one optional part, as in projects/{project}/[regions/{region}/]secrets/{secret}")
	}
	if !strings.HasSuffix(inside, "/") || (before != "" && !strings.HasSuffix(before, "/")) || after == "" {
		return nil, fmt.Errorf("the optional part must be whole pairs with their slash, as in [regions/{region}/], and be followed by a pair")
	}
	return []string{before + after, before + inside + after}, nil
}

func parsePattern(text string) (*pattern, error) {
	segments := strings.Split(text, "/")
	if len(segments)%2 != 0 {
		return nil, fmt.Errorf("a pattern is pairs of a collection and a variable, as in sections/{section}/packages/{package}")
	}
	if len(segments) > 2*maxPairs {
		return nil, fmt.Errorf("a pattern has at most %d pairs", maxPairs)
	}
	p := &pattern{text: text}
	for i := 0; i < len(segments); i += 2 {
		collection, variable := segments[i], segments[i+1]
		if !collectionSyntax.MatchString(collection) {
			return nil, fmt.Errorf("segment %q must be a collection in lowerCamelCase", collection)
		}
		if !variableSyntax.MatchString(variable) {
			return nil, fmt.Errorf("segment %q must be a variable in lower_snake_case and braces, as in {package}", variable)
		}
		name := variable[1 : len(variable)-1]
		for _, other := range p.vars {
			if other == name {
				return nil, fmt.Errorf("variable {%s} occurs twice: every variable needs a name of its own", name)
			}
		}
		p.collections = append(p.collections, collection)
		p.vars = append(p.vars, name)
	}
	return p, nil
}

// node is one collection in the trie of a version's patterns. Ids are not in the trie: a pattern is known by its collections alone,
// so no two patterns can match one name if their collections differ.
type node struct {
	children map[string]*node
	pattern  *pattern // nil: no type ends here
	// What a name that ends here has above it, in pairs; 0: nothing.
	parentDepth int // nearest ancestor that is a resource
	holderDepth int // nearest ancestor that is a policy holder
}

func (n *node) child(collection string) *node {
	c := n.children[collection]
	if c == nil {
		c = &node{}
		if n.children == nil {
			n.children = map[string]*node{}
		}
		n.children[collection] = c
	}
	return c
}

// link fills in the depths below n, which is at that depth.
func (n *node) link(depth int) {
	for _, c := range n.children {
		c.parentDepth, c.holderDepth = n.parentDepth, n.holderDepth
		if n.pattern != nil {
			c.parentDepth = depth
			if n.pattern.typ.IsPolicyHolder() {
				c.holderDepth = depth
			}
		}
		c.link(depth + 1)
	}
}
