package descriptor

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// MaxSearchText is how much text of one resource is searched, in bytes. What is longer is cut off.
const MaxSearchText = 128 << 10

// SearchName is the path that stands for the last id of a resource's name.
const SearchName = "name"

// searchFormat is part of the fingerprint: a change of what Project makes of a resource changes it.
const searchFormat = "1"

// Search is what of the resources of a type is searched.
type Search struct {
	// Fields are the texts, in the order of the descriptor.
	Fields []SearchField
	// Filters are the fields that a filter may name, besides the name.
	Filters []SearchFilter
	// Facets are paths of Filters.
	Facets []string
	// Fingerprint tells whether a document was made by the same declaration: 16 hexadecimal digits.
	Fingerprint string
}

// SearchField is a text of a resource.
type SearchField struct {
	// Path as in the descriptor.
	Path string
	// Weight is 'A' to 'D'.
	Weight byte

	path fieldPath
}

// SearchFilter is a field by which a search can be filtered.
type SearchFilter struct {
	// Path as in filters: without the brackets of a list.
	Path string
	Type v1alpha1.SearchFilterType
	// List says that there may be several values: a filter asks with has (tags:red).
	List bool

	path fieldPath
}

// Filter returns the filter of a path, nil if there is none.
func (s *Search) Filter(path string) *SearchFilter {
	for i := range s.Filters {
		if s.Filters[i].Path == path {
			return &s.Filters[i]
		}
	}
	return nil
}

// Project returns what is searched of a resource: the texts in the order of Fields, and a JSON object with nothing but the values of Filters, each in its
// place in the body. The error is a body that is no JSON object.
func (s *Search) Project(name string, body []byte) (texts []string, values json.RawMessage, err error) {
	var object map[string]any
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber() // no number loses digits
	if err := d.Decode(&object); err != nil {
		return nil, nil, fmt.Errorf("project %s for search: %w", name, err)
	}
	texts = make([]string, len(s.Fields))
	left := MaxSearchText
	for i, f := range s.Fields {
		var parts []string
		if f.Path == SearchName {
			parts = []string{name[strings.LastIndexByte(name, '/')+1:]}
		} else {
			f.path.each(object, "", func(_ string, value any, fault string) {
				if text, ok := value.(string); ok && fault == "" {
					parts = append(parts, text)
				}
			})
		}
		texts[i] = cut(strings.Map(printable, strings.Join(parts, "\n")), left)
		left -= len(texts[i])
	}
	kept := map[string]any{}
	for i := range s.Filters {
		s.Filters[i].keep(object, kept)
	}
	values, err = json.Marshal(kept)
	return texts, values, err
}

// printable makes blanks of the control characters, which the search stores need for themselves.
func printable(r rune) rune {
	if r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
		return ' '
	}
	return r
}

// cut returns at most n bytes of s, whole characters.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// keep puts the value of f in from into the same place in to, if it is of f's type.
func (f *SearchFilter) keep(from, to map[string]any) {
	last := len(f.path) - 1
	for _, step := range f.path[:last] {
		next, ok := from[step.name].(map[string]any)
		if !ok {
			return
		}
		from = next
	}
	value := from[f.path[last].name]
	if list, ok := value.([]any); ok && f.List {
		value = slices.DeleteFunc(slices.Clone(list), func(item any) bool { return !f.fits(item) })
	} else if f.List || !f.fits(value) {
		return
	}
	for _, step := range f.path[:last] {
		next, ok := to[step.name].(map[string]any)
		if !ok {
			next = map[string]any{}
			to[step.name] = next
		}
		to = next
	}
	to[f.path[last].name] = value
}

func (f *SearchFilter) fits(value any) bool {
	switch value.(type) {
	case string:
		return f.Type == v1alpha1.SearchString
	case json.Number:
		return f.Type == v1alpha1.SearchNumber
	case bool:
		return f.Type == v1alpha1.SearchBoolean
	}
	return false
}

// search compiles what of a type is searched. The type's schema is compiled already.
func (c *compiler) search(t *Type, spec *v1alpha1.ResourceSearch, at *field.Path) *Search {
	s := &Search{}
	if len(spec.Fields) == 0 && len(spec.Filters) == 0 {
		c.faults = append(c.faults, field.Required(at, "give fields, filters or both, or remove it"))
	}
	for i, f := range spec.Fields {
		s.field(c, t, f, at.Child("fields").Index(i))
	}
	for i, f := range spec.Filters {
		s.filter(c, t, f, at.Child("filters").Index(i))
	}
	for i, path := range spec.Facets {
		at := at.Child("facets").Index(i)
		path := strings.TrimSuffix(path, "[]")
		switch {
		case slices.Contains(s.Facets, path):
			c.duplicate(at, path)
		case s.Filter(path) == nil:
			c.invalid(at, path, "a facet counts the values of a filter: declare it among the filters, too")
		}
		s.Facets = append(s.Facets, path)
	}
	described, err := json.Marshal(s)
	if err != nil {
		c.invalid(at, "", "%s", err)
	}
	sum := sha256.Sum256(append([]byte(searchFormat), described...))
	s.Fingerprint = hex.EncodeToString(sum[:8])
	return s
}

func (s *Search) field(c *compiler, t *Type, spec v1alpha1.SearchField, at *field.Path) {
	f := SearchField{Path: spec.Path, Weight: 'D'}
	switch {
	case len(spec.Weight) == 1 && spec.Weight[0] >= 'A' && spec.Weight[0] <= 'D':
		f.Weight = spec.Weight[0]
	case spec.Weight != "":
		c.faults = append(c.faults, field.NotSupported(at.Child("weight"), spec.Weight, []string{"A", "B", "C", "D"}))
	}
	if slices.ContainsFunc(s.Fields, func(o SearchField) bool { return o.Path == f.Path }) {
		c.duplicate(at.Child("path"), spec.Path)
	}
	if !fieldSyntax.MatchString(spec.Path) {
		c.invalid(at.Child("path"), spec.Path, "must be the path of a field, with [] after a list, as in description or tags[]")
		return
	}
	f.path = parseFieldPath(spec.Path)
	if f.Path != SearchName && t.schema != nil {
		if fault := t.schema.hasField(f.path, "string"); fault != "" {
			c.invalid(at.Child("path"), spec.Path, "%s", fault)
		}
	}
	s.Fields = append(s.Fields, f)
}

// reservedFilters are first words of paths that mean something else in a filter.
var reservedFilters = []string{SearchName, "metadata"}

func (s *Search) filter(c *compiler, t *Type, spec v1alpha1.SearchFilter, at *field.Path) {
	plain, list := strings.CutSuffix(spec.Path, "[]")
	f := SearchFilter{Path: plain, Type: spec.Type, List: list}
	types := map[v1alpha1.SearchFilterType][]string{
		v1alpha1.SearchString: {"string"}, v1alpha1.SearchNumber: {"integer", "number"}, v1alpha1.SearchBoolean: {"boolean"},
	}
	if types[spec.Type] == nil {
		c.faults = append(c.faults, field.NotSupported(at.Child("type"), spec.Type,
			[]v1alpha1.SearchFilterType{v1alpha1.SearchString, v1alpha1.SearchNumber, v1alpha1.SearchBoolean}))
		return
	}
	if s.Filter(plain) != nil {
		c.duplicate(at.Child("path"), spec.Path)
	}
	if !plainFieldSyntax.MatchString(plain) {
		c.invalid(at.Child("path"), spec.Path, "must be the path of a field, with [] only at the end, as in architecture or tags[]")
		return
	}
	f.path = parseFieldPath(spec.Path)
	if slices.Contains(reservedFilters, f.path[0].name) {
		c.invalid(at.Child("path"), spec.Path, "%s is not a field of the body; the name can be filtered by without being declared", f.path[0].name)
		return
	}
	for _, o := range s.Filters {
		if strings.HasPrefix(o.Path+".", plain+".") || strings.HasPrefix(plain+".", o.Path+".") {
			c.invalid(at.Child("path"), spec.Path, "it lies within %s, or the other way round: a filter is a single value or a list", o.Path)
			return
		}
	}
	if t.schema != nil {
		var fault string
		for _, typ := range types[spec.Type] {
			if fault = t.schema.hasField(f.path, typ); fault == "" {
				break
			}
		}
		if fault != "" {
			c.invalid(at.Child("path"), spec.Path, "%s", fault)
		}
	}
	s.Filters = append(s.Filters, f)
}
