package descriptor

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apimachinery/pkg/util/validation/field"
	openapierrors "k8s.io/kube-openapi/pkg/validation/errors"
	"k8s.io/kube-openapi/pkg/validation/validate"
	sigsjson "sigs.k8s.io/json"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// MaxBodyDepth is how deep objects and lists of a body may be nested.
const MaxBodyDepth = 64

// maxViolations bounds the answer to a body that is wrong everywhere.
const maxViolations = 50

// Numbers as long as these are kept digit by digit by PostgreSQL; longer ones need not be.
const (
	maxNumberBytes    = 128
	maxExponentDigits = 3
)

// Ref is one reference in a body.
type Ref struct {
	// FieldPath is where it is, with indices: depends[3].
	FieldPath string
	// TargetService and TargetType (a full name) say what it refers to.
	TargetService, TargetType string
	// Name is the name of the target.
	Name string
	// OnTargetDeleted says what happens to the referrer.
	OnTargetDeleted v1alpha1.DeleteBehavior
}

// ValidateBody returns what is wrong with a body: nothing for a body that may be stored. A body is a JSON object in valid UTF-8
// within the limits of its type, that PostgreSQL can store, without duplicate keys and without the keys name and metadata; it
// follows the type's schema; its references are names; the policy of a policy holder is valid. At most 50 violations, sorted by field.
func (t *Type) ValidateBody(body []byte) []Violation {
	object, violations := t.decode(body)
	if object == nil {
		return violations
	}
	for _, key := range []string{"name", "metadata"} {
		if _, found := object[key]; found {
			violations = append(violations, Violation{key, "is not a field of the body: it belongs to the resource around it"})
			delete(object, key)
		}
	}
	if t.schema != nil {
		violations = append(violations, t.schema.validate(object)...)
	}
	faulty := map[string]bool{} // what the schema has said need not be said again
	for _, v := range violations {
		faulty[v.Field] = true
	}
	t.eachRef(object, func(r Ref, f *ReferenceField, fault string) {
		if fault == "" {
			fault = f.check(r.Name)
		}
		if fault != "" && !faulty[r.FieldPath] {
			violations = append(violations, Violation{r.FieldPath, fault})
		}
	})
	if t.IsPolicyHolder() && !faulty[t.Holder] {
		_, faults := t.policyOf(object)
		violations = append(violations, faults...)
	}
	slices.SortStableFunc(violations, func(a, b Violation) int { return cmp.Compare(a.Field, b.Field) })
	return violations[:min(len(violations), maxViolations)]
}

// References returns the references of a body, in the order of ReferenceFields. A value that is no reference, which ValidateBody would have
// refused, is left out. The error is a body that is no JSON object.
func (t *Type) References(body []byte) ([]Ref, error) {
	if len(t.ReferenceFields) == 0 {
		return nil, nil
	}
	var object map[string]any
	if err := sigsjson.UnmarshalCaseSensitivePreserveInts(body, &object); err != nil {
		return nil, fmt.Errorf("read references of a %s: %w", t.Name, err)
	}
	var refs []Ref
	t.eachRef(object, func(r Ref, _ *ReferenceField, fault string) {
		if fault == "" {
			refs = append(refs, r)
		}
	})
	return refs, nil
}

// PolicyOf returns the policy in the body of a policy holder.
func (t *Type) PolicyOf(body []byte) (*Policy, []Violation) {
	if !t.IsPolicyHolder() {
		return nil, []Violation{{"", fmt.Sprintf("a %s is no policy holder", t.Name)}}
	}
	object, violations := t.decode(body)
	if len(violations) > 0 {
		return nil, violations
	}
	return t.policyOf(object)
}

func (t *Type) policyOf(object map[string]any) (*Policy, []Violation) {
	var value any = object
	for _, step := range t.holder {
		parent, _ := value.(map[string]any)
		value = parent[step.name]
	}
	if value == nil {
		return nil, []Violation{{t.Holder, fmt.Sprintf("is required: a %s says in which regions the resources below it live", t.Name)}}
	}
	raw, err := json.Marshal(value)
	if err != nil {
		return nil, []Violation{{t.Holder, err.Error()}}
	}
	policy, violations := PolicyFromJSON(raw)
	for i := range violations {
		violations[i].Field = strings.TrimSuffix(t.Holder+"."+violations[i].Field, ".")
	}
	return policy, violations
}

// PolicyFromJSON reads a policy from JSON of the shape of v1alpha1.MultiRegionPolicy. Unknown fields are refused.
func PolicyFromJSON(raw []byte) (*Policy, []Violation) {
	var spec v1alpha1.MultiRegionPolicy
	strict, err := sigsjson.UnmarshalStrict(raw, &spec)
	if err = errors.Join(append(strict, err)...); err != nil {
		return nil, []Violation{{"", "must be a MultiRegionPolicy: " + err.Error()}}
	}
	policy, faults := NewPolicy(&spec, nil)
	return policy, violationsOf(faults)
}

// decode parses a body. The object is nil if nothing more can be said about it.
func (t *Type) decode(body []byte) (map[string]any, []Violation) {
	fail := func(format string, args ...any) (map[string]any, []Violation) {
		return nil, []Violation{{"", fmt.Sprintf(format, args...)}}
	}
	if len(body) > t.MaxBodyBytes {
		return fail("the body has %d bytes, a %s may have %d", len(body), t.Name, t.MaxBodyBytes)
	}
	if !utf8.Valid(body) {
		return fail("the body is not valid UTF-8")
	}
	if err := scan(body); err != nil {
		return fail("%s", err)
	}
	var value any
	strict, err := sigsjson.UnmarshalStrict(body, &value)
	if err != nil {
		return fail("the body is not valid JSON: %s", err)
	}
	object, ok := value.(map[string]any)
	if !ok {
		return fail("the body must be a JSON object")
	}
	var violations []Violation
	for _, err := range strict {
		v := Violation{"", err.Error()}
		if f, ok := errors.AsType[sigsjson.FieldError](err); ok {
			v = Violation{f.FieldPath(), "occurs twice in one object"}
		}
		violations = append(violations, v)
	}
	return object, violations
}

// scan refuses what the JSON syntax allows and Go decodes, but PostgreSQL does not store or would store differently: NUL, half
// surrogate pairs, numbers out of bounds; and what costs too much to decode. It leaves faults of the syntax to the decoder.
func scan(body []byte) error {
	depth := 0
	for i := 0; i < len(body); i++ {
		switch c := body[i]; {
		case c == '{' || c == '[':
			if depth++; depth > MaxBodyDepth {
				return fmt.Errorf("the body is nested deeper than %d at byte %d", MaxBodyDepth, i)
			}
		case c == '}' || c == ']':
			depth--
		case c == '-' || c >= '0' && c <= '9':
			start := i
			for i+1 < len(body) && strings.IndexByte("0123456789+-.eE", body[i+1]) >= 0 {
				i++
			}
			if err := checkNumber(string(body[start : i+1])); err != nil {
				return fmt.Errorf("the number at byte %d %w", start, err)
			}
		case c == '"':
			end, err := scanString(body, i+1)
			if err != nil {
				return err
			}
			i = end
		}
	}
	return nil
}

func checkNumber(literal string) error {
	if len(literal) > maxNumberBytes {
		return fmt.Errorf("has more than %d digits: send it as a string", maxNumberBytes)
	}
	if e := strings.IndexAny(literal, "eE"); e >= 0 && len(strings.TrimLeft(literal[e+1:], "+-0")) > maxExponentDigits {
		return fmt.Errorf("has an exponent of more than %d digits: send it as a string", maxExponentDigits)
	}
	return nil
}

// scanString returns the position of the quote that ends the string whose text begins at i.
func scanString(body []byte, i int) (int, error) {
	for ; i < len(body) && body[i] != '"'; i++ {
		if body[i] != '\\' {
			continue
		}
		i++
		r, ok := escape(body, i)
		switch {
		case !ok: // another escape
		case r == 0:
			return 0, fmt.Errorf("the escape at byte %d is NUL, which cannot be stored", i-1)
		case utf16.IsSurrogate(r):
			low, ok := escape(body, i+6)
			if !ok || body[i+5] != '\\' || utf16.DecodeRune(r, low) == utf8.RuneError {
				return 0, fmt.Errorf("the escape at byte %d is half of a surrogate pair, which is no character", i-1)
			}
			i += 10
		default:
			i += 4
		}
	}
	return i, nil
}

// escape decodes uXXXX at i.
func escape(body []byte, i int) (rune, bool) {
	if i+5 > len(body) || body[i] != 'u' {
		return 0, false
	}
	r, err := strconv.ParseUint(string(body[i+1:i+5]), 16, 16)
	return rune(r), err == nil
}

// bodySchema is a compiled schema. It is safe for concurrent use.
type bodySchema struct {
	structural *structuralschema.Structural
	validator  *validate.SchemaValidator
}

// validate may remove fields that the schema does not know from the object.
func (s *bodySchema) validate(object map[string]any) []Violation {
	var violations []Violation
	unknown := pruning.PruneWithOptions(object, s.structural, false, structuralschema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true})
	for _, path := range unknown {
		violations = append(violations, Violation{path, "is not a field of the schema"})
	}
	for _, err := range s.validator.Validate(object).Errors {
		v := Violation{"", err.Error()}
		if f, ok := errors.AsType[*openapierrors.Validation](err); ok {
			v.Field = strings.TrimPrefix(f.Name, ".")
			v.Description = strings.TrimPrefix(strings.TrimPrefix(v.Description, f.Name), " in body ")
		}
		violations = append(violations, v)
	}
	return append(violations, violationsOf(listtype.ValidateListSetsAndMaps(nil, s.structural, object))...)
}

func violationsOf(faults field.ErrorList) []Violation {
	var out []Violation
	for _, f := range faults {
		v := Violation{f.Field, f.ErrorBody()}
		if v.Field == "<nil>" {
			v.Field = ""
		}
		out = append(out, v)
	}
	return out
}

// check says what is wrong with a name as the value of the field.
func (f *ReferenceField) check(name string) string {
	if f.Target == nil {
		if !plausibleName(name) {
			return fmt.Sprintf("must be the name of a %s, pairs of a collection and an id: %s", f.TargetType, idRule)
		}
		return ""
	}
	n, err := f.Target.version.ParseName(name)
	if err != nil {
		reason := err.Error()
		if e, ok := errors.AsType[*NameError](err); ok {
			reason = e.Reason
		}
		return fmt.Sprintf("must be the name of a %s (%s): %s", f.Target.Name, strings.Join(f.Target.Patterns, ", "), reason)
	}
	if n.Type != f.Target {
		return fmt.Sprintf("must be the name of a %s (%s): it is the name of a %s", f.Target.Name, strings.Join(f.Target.Patterns, ", "), n.Type.Name)
	}
	return ""
}

// plausibleName reports whether a name could be that of a resource of another service, whose patterns are not known here.
func plausibleName(name string) bool {
	if len(name) > MaxNameBytes {
		return false
	}
	segments := strings.Split(name, "/")
	if len(segments)%2 != 0 {
		return false
	}
	for i := 0; i < len(segments); i += 2 {
		if !collectionSyntax.MatchString(segments[i]) || !validID(segments[i+1]) {
			return false
		}
	}
	return true
}

// fieldPath is a path in a body.
type fieldPath []fieldStep

type fieldStep struct {
	name string
	list bool // the field is a list, the path goes on in each of its items
}

func parseFieldPath(text string) fieldPath {
	var path fieldPath
	for part := range strings.SplitSeq(text, ".") {
		name, list := strings.CutSuffix(part, "[]")
		path = append(path, fieldStep{name, list})
	}
	return path
}

// eachRef calls yield for every reference of the object, and for every value in the place of one that is none, with the fault.
func (t *Type) eachRef(object map[string]any, yield func(Ref, *ReferenceField, string)) {
	for i := range t.ReferenceFields {
		f := &t.ReferenceFields[i]
		f.path.each(object, "", func(at string, value any, fault string) {
			name, ok := value.(string)
			if fault == "" && !ok {
				fault = "must be a string, the name of a " + f.TargetType
			}
			yield(Ref{at, f.TargetService, f.TargetType, name, f.OnTargetDeleted}, f, fault)
		})
	}
}

// each calls yield with every value at the path. Absent and null values are left out.
func (p fieldPath) each(value any, at string, yield func(at string, value any, fault string)) {
	if len(p) == 0 {
		yield(at, value, "")
		return
	}
	object, ok := value.(map[string]any)
	if !ok {
		yield(at, nil, "must be an object")
		return
	}
	step, rest := p[0], p[1:]
	if at != "" {
		at += "."
	}
	at += step.name
	value = object[step.name]
	if value == nil {
		return
	}
	if !step.list {
		rest.each(value, at, yield)
		return
	}
	items, ok := value.([]any)
	if !ok {
		yield(at, nil, "must be a list")
		return
	}
	for i, item := range items {
		rest.each(item, at+"["+strconv.Itoa(i)+"]", yield)
	}
}
