package listquery

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// kind says how the values of a field compare.
type kind uint8

const (
	textField kind = iota + 1
	intField
	timeField
	// jsonField is a place in a document: the value of a row has any JSON type, or there is none.
	jsonField
)

// A field is where the values that a user names are found. All SQL in it is constant; what comes from the user is path.
type field struct {
	name string // as the user may write it, for messages
	kind kind
	// source is a column (or an expression over one), for a jsonField the document.
	source string
	// path is where in the document, for a jsonField.
	path []string
	// nullable is true where source may be NULL.
	nullable bool
	// text is true for a jsonField that holds only strings, so that quotes do not matter: labels, annotations, tags.
	text bool
	// collection is true for a jsonField that is always an array or a map, so that only has makes sense.
	collection bool
}

// columns are the fields outside the body, by their path. Those with a prefix of metadata can be written without it where the short form is here, too.
var columns = func() map[string]field {
	text := func(sql string) field { return field{kind: textField, source: sql + ` COLLATE "C"`} }
	number := func(column string) field { return field{kind: intField, source: column} }
	timestamp := func(column string) field { return field{kind: timeField, source: column} }
	short := map[string]field{
		"uuid":             text("uuid::text"),
		"generation":       number("generation"),
		"resource_version": number("resource_version"),
		"create_time":      timestamp("create_time"),
		"update_time":      timestamp("update_time"),
		"labels":           {kind: jsonField, source: "meta", path: []string{"labels"}, text: true, collection: true},
		"annotations":      {kind: jsonField, source: "meta", path: []string{"annotations"}, text: true, collection: true},
		"tags":             {kind: jsonField, source: "meta", path: []string{"tags"}, text: true, collection: true},
	}
	all := map[string]field{
		"name":                           text("name"),
		"owning_region":                  text("owning_region"),
		"metadata.syncing.owning_region": text("owning_region"),
		"metadata.syncing.regions":       {kind: jsonField, source: "to_jsonb(regions)", text: true, collection: true},
		"metadata.state":                 text("CASE state WHEN 0 THEN 'ACTIVE' WHEN 1 THEN 'DELETING' ELSE 'GONE' END"),
		"metadata.delete_time":           {kind: timeField, source: "delete_time", nullable: true},
	}
	for path, f := range short {
		all[path] = f
		all["metadata."+path] = f
	}
	for path, f := range all {
		f.name = path
		all[path] = f
	}
	return all
}()

// camel maps the spellings of JSON to those of the columns.
var camel = map[string]string{
	"createTime": "create_time", "updateTime": "update_time", "deleteTime": "delete_time",
	"resourceVersion": "resource_version", "owningRegion": "owning_region",
}

// resolve returns the field at p, or says why there is none.
func resolve(p path) (_ field, reason string) {
	name := strings.Join(p.segments, ".")
	body := field{name: name, kind: jsonField, source: "body", path: p.segments}
	if p.body {
		return body, ""
	}
	words := slices.Clone(p.segments)
	for i, s := range words {
		words[i] = cmp.Or(camel[s], s)
	}
	// The longest path of a column that p begins with.
	for n := min(len(words), 3); n > 0; n-- {
		f, ok := columns[strings.Join(words[:n], ".")]
		switch {
		case !ok:
			continue
		case n == len(words):
			return f, ""
		case f.path != nil && f.path[0] != "tags":
			// The keys of labels and annotations may have dots in them.
			key := strings.Join(p.segments[n:], ".")
			f.name += "." + key
			f.path = []string{f.path[0], key}
			f.collection = false
			return f, ""
		}
		return field{}, fmt.Sprintf("%s has no fields of its own", f.name)
	}
	if words[0] == "metadata" {
		return field{}, fmt.Sprintf("there is no field %s to search by", name)
	}
	return body, ""
}

// at returns the SQL of the JSON value of a jsonField: NULL where there is none.
func (f field) at(b *builder) string {
	if len(f.path) == 0 {
		return f.source
	}
	return "(" + f.source + " #> " + b.arg(f.path, "text[]") + ")"
}

// elements returns the SQL of the set of values that has looks at, named v: those at the path, also of objects within arrays, and if they
// are arrays, their elements.
func (f field) elements(b *builder) string {
	path := "lax $"
	for _, segment := range f.path {
		quoted, _ := json.Marshal(segment) // a string always has a JSON form, which is a string of jsonpath, too
		path += "." + string(quoted)
	}
	return "jsonb_path_query(" + f.source + ", " + b.parsed(path+"[*]", "jsonpath") + ", '{}', true) AS v"
}
