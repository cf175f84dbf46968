package descriptor

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Name is a resource name that matches a pattern of its type. It is a comparable value; the zero Name is no name.
type Name struct {
	// Full is the whole name: sections/admin/packages/apt.
	Full string
	// Type of the resource.
	Type *Type

	pattern *pattern
	ends    [maxPairs]uint16 // where each id ends in Full
}

// NameError is why a text is not the name of a resource, or not a collection.
type NameError struct {
	// Name is the text.
	Name string
	// Reason says what is wrong with it and what to do.
	Reason string
}

func (e *NameError) Error() string {
	name := e.Name
	if len(name) > 128 {
		name = name[:128] + "..."
	}
	return fmt.Sprintf("name %q: %s", name, e.Reason)
}

// ParseName parses the name of a resource of this version. It does not allocate, except for its error, a *NameError.
func (v *Version) ParseName(name string) (Name, error) {
	if len(name) > MaxNameBytes {
		return Name{}, &NameError{name, fmt.Sprintf("it has %d bytes, at most %d are allowed", len(name), MaxNameBytes)}
	}
	n := Name{Full: name}
	at := v.root
	for start, pair := 0, 0; ; pair++ {
		slash := strings.IndexByte(name[start:], '/')
		if slash < 0 {
			return Name{}, v.nameError(name)
		}
		collection := name[start : start+slash]
		start += slash + 1
		at = at.children[collection]
		if at == nil {
			return Name{}, v.nameError(name)
		}
		end := len(name)
		if slash = strings.IndexByte(name[start:], '/'); slash >= 0 {
			end = start + slash
		}
		if id := name[start:end]; !validID(id) {
			return Name{}, &NameError{name, fmt.Sprintf("id %.64q of %s is not valid: %s", id, collection, idRule)}
		}
		n.ends[pair] = uint16(end)
		if slash < 0 {
			break
		}
		start = end + 1
	}
	if at.pattern == nil {
		return Name{}, v.nameError(name)
	}
	n.pattern, n.Type = at.pattern, at.pattern.typ
	if region, ok := n.Region(); ok && !ValidRegion(region) {
		return Name{}, &NameError{name, fmt.Sprintf("region %.64q is not valid: %s", region, regionRule)}
	}
	return n, nil
}

func (v *Version) nameError(name string) error {
	return &NameError{name, fmt.Sprintf("it matches no pattern of %s %s", v.Service.Name, v.Name)}
}

func (n Name) String() string { return n.Full }

// id returns the id of a pair.
func (n Name) id(pair int) string {
	start := len(n.pattern.collections[pair]) + 1
	if pair > 0 {
		start += int(n.ends[pair-1]) + 1
	}
	return n.Full[start:n.ends[pair]]
}

// ID returns the last id: apt.
func (n Name) ID() string { return n.id(len(n.pattern.vars) - 1) }

// Pattern returns the pattern that the name matches: sections/{section}/packages/{package}.
func (n Name) Pattern() string { return n.pattern.text }

// Var returns the id of a variable of the pattern, and whether the pattern has it.
func (n Name) Var(name string) (string, bool) {
	for i, v := range n.pattern.vars {
		if v == name {
			return n.id(i), true
		}
	}
	return "", false
}

// Vars returns the ids of all variables of the pattern.
func (n Name) Vars() map[string]string {
	out := make(map[string]string, len(n.pattern.vars))
	for i, v := range n.pattern.vars {
		out[v] = n.id(i)
	}
	return out
}

// Region returns the region segment of the name, and whether it has one. It names the owner of the resource.
func (n Name) Region() (string, bool) { return n.Var(regionVar) }

// Parent returns the name of the nearest ancestor that is a resource: sections/admin. Empty without one.
func (n Name) Parent() string { return n.prefix(n.pattern.node.parentDepth) }

// HolderName returns the name of the policy holder that governs the resource: the nearest above it, never itself. Empty for a global resource.
func (n Name) HolderName() string { return n.prefix(n.pattern.node.holderDepth) }

// Collection returns the collection that the resource is in: sections/admin/packages.
func (n Name) Collection() string { return n.Full[:len(n.Full)-len(n.ID())-1] }

func (n Name) prefix(pairs int) string {
	if pairs == 0 {
		return ""
	}
	return n.Full[:n.ends[pairs-1]]
}

// BuildName builds a name from the ids of its variables. Their set chooses the pattern; the error says which sets there are.
func (t *Type) BuildName(vars map[string]string) (string, error) {
	for _, p := range t.patterns {
		if !p.hasVars(vars) {
			continue
		}
		var b strings.Builder
		for i, collection := range p.collections {
			id := vars[p.vars[i]]
			if !validID(id) { // an id with a slash would lead to another pattern
				return "", fmt.Errorf("build name of %s: id %.64q of %s is not valid: %s", t.Name, id, collection, idRule)
			}
			if i > 0 {
				b.WriteByte('/')
			}
			b.WriteString(collection)
			b.WriteByte('/')
			b.WriteString(id)
		}
		if _, err := t.version.ParseName(b.String()); err != nil { // its length, its region
			return "", fmt.Errorf("build name of %s: %w", t.Name, err)
		}
		return b.String(), nil
	}
	return "", fmt.Errorf("build name of %s: the variables must be those of one of the patterns %s", t.Name, strings.Join(t.Patterns, ", "))
}

func (p *pattern) hasVars(vars map[string]string) bool {
	if len(vars) != len(p.vars) {
		return false
	}
	for _, v := range p.vars {
		if _, ok := vars[v]; !ok {
			return false
		}
	}
	return true
}

// Collection is the set of resources of one type under one parent, or under all parents where an id is the wildcard "-".
type Collection struct {
	// Path is the whole text: sections/admin/packages, sections/-/packages.
	Path string
	// Type of its resources.
	Type *Type
	// Prefix begins the name of each of its resources: sections/admin/packages/, or sections/ where the rest is a wildcard. Not every name with
	// this prefix is in the collection: see Exact.
	Prefix string
	// Exact says that every resource of Type whose name begins with Prefix is in the collection. Otherwise filter with Match, or Regexp.
	Exact bool

	pattern *pattern
	ids     []string // of the parents
}

// ParseCollection parses the path of a collection. Its error is a *NameError.
func (v *Version) ParseCollection(path string) (Collection, error) {
	fail := func(reason string) (Collection, error) { return Collection{}, &NameError{path, reason} }
	if len(path) > MaxNameBytes {
		return fail(fmt.Sprintf("it has %d bytes, at most %d are allowed", len(path), MaxNameBytes))
	}
	segments := strings.Split(path, "/")
	if len(segments)%2 == 0 {
		return fail("a collection ends with a collection segment, as in sections/admin/packages")
	}
	c := Collection{Path: path, Exact: true}
	at := v.root
	fixed := 0 // bytes before the first wildcard
	for i := 0; i < len(segments); i += 2 {
		if at = at.children[segments[i]]; at == nil {
			return fail(fmt.Sprintf("it is no collection of %s %s", v.Service.Name, v.Name))
		}
		if c.Exact {
			fixed += len(segments[i]) + 1
		}
		if i+1 == len(segments) {
			break
		}
		id := segments[i+1]
		switch {
		case id == Wildcard:
			c.Exact = false
		case !validID(id):
			return fail(fmt.Sprintf("id %.64q of %s is not valid: %s", id, segments[i], idRule))
		case c.Exact:
			fixed += len(id) + 1
		}
		c.ids = append(c.ids, id)
	}
	if at.pattern == nil {
		return fail(fmt.Sprintf("it is no collection of %s %s", v.Service.Name, v.Name))
	}
	c.pattern, c.Type = at.pattern, at.pattern.typ
	if c.Exact {
		c.Prefix = path + "/"
		c.Exact = !at.repeats(c.Type)
	} else {
		c.Prefix = path[:fixed]
	}
	return c, nil
}

// repeats reports whether a type occurs again below n, as folders do in folders/{folder}/folders/{subfolder}.
func (n *node) repeats(t *Type) bool {
	for _, c := range n.children {
		if c.pattern != nil && c.pattern.typ == t || c.repeats(t) {
			return true
		}
	}
	return false
}

// Match reports whether a resource of that name is in the collection.
func (c Collection) Match(n Name) bool {
	if n.pattern != c.pattern {
		return false
	}
	for i, id := range c.ids {
		if id != Wildcard && id != n.id(i) {
			return false
		}
	}
	return true
}

// Parent returns the part of the path before the last collection: sections/admin, sections/-. Empty for a top-level collection.
func (c Collection) Parent() string {
	if i := strings.LastIndexByte(c.Path, '/'); i >= 0 {
		return c.Path[:i]
	}
	return ""
}

// Regexp returns an anchored regular expression, the same for Go and PostgreSQL, that matches exactly the names in the collection.
func (c Collection) Regexp() string {
	var b strings.Builder
	b.WriteByte('^')
	for i, collection := range c.pattern.collections {
		b.WriteString(collection)
		b.WriteByte('/')
		switch {
		case i == len(c.ids) || c.ids[i] == Wildcard:
			b.WriteString("[^/]+")
		default:
			b.WriteString(regexp.QuoteMeta(c.ids[i]))
		}
		if i < len(c.ids) {
			b.WriteByte('/')
		}
	}
	b.WriteByte('$')
	return b.String()
}

// NameOf returns the name of the resource with that id in the collection. It is an error, a *NameError, if the id is not valid or the
// collection has a wildcard.
func (c Collection) NameOf(id string) (Name, error) {
	if !validID(id) { // with a slash in it the name could be one of another collection
		return Name{}, &NameError{id, "it is not valid as an id: " + idRule}
	}
	return c.Type.version.ParseName(c.Path + "/" + id)
}

// Shard returns the shard of a name on a ring of that size: FNV-1a 64 of the name, modulo the size. It is part of the stored format.
func Shard(name string, ring int) int {
	const offset, prime = 14695981039346656037, 1099511628211
	h := uint64(offset)
	for i := 0; i < len(name); i++ {
		h ^= uint64(name[i])
		h *= prime
	}
	return int(h % uint64(ring))
}

// ShardRange is a half-open range of shard numbers.
type ShardRange struct{ From, To int32 }

// String is [from,to), PostgreSQL's text form of an int4range.
func (r ShardRange) String() string {
	return "[" + strconv.Itoa(int(r.From)) + "," + strconv.Itoa(int(r.To)) + ")"
}
