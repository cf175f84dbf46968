package descriptor

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kube-openapi/pkg/validation/strfmt"
	"k8s.io/kube-openapi/pkg/validation/validate"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

var (
	serviceSyntax    = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+$`)
	versionSyntax    = regexp.MustCompile(`^v[0-9]+((alpha|beta)[0-9]+)?$`)
	typeSyntax       = regexp.MustCompile(`^[A-Z][A-Za-z0-9]*$`)
	fullTypeSyntax   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+/[A-Z][A-Za-z0-9]*$`)
	fieldSyntax      = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\[\])?(\.[A-Za-z_][A-Za-z0-9_]*(\[\])?)*$`)
	plainFieldSyntax = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`)
)

const (
	serviceRule = "must be a DNS name of at least two labels, as in packages.example.com"
	versionRule = "must be a version, as in v1 or v2beta1"
)

// Compile checks a descriptor and compiles it. The error is an *Error with all faults, each with its path from spec.
func Compile(spec *v1alpha1.ServiceDescriptorSpec) (*Service, error) {
	c := &compiler{service: &Service{Name: spec.Service}}
	at := field.NewPath("spec")
	if !serviceSyntax.MatchString(spec.Service) || len(spec.Service) > 253 {
		c.invalid(at.Child("service"), spec.Service, serviceRule)
	}
	if spec.MultiRegionPolicy != nil {
		policy, faults := NewPolicy(spec.MultiRegionPolicy, at.Child("multiRegionPolicy"))
		c.service.Policy = policy
		c.faults = append(c.faults, faults...)
	}
	c.hasPolicy = spec.MultiRegionPolicy != nil
	if len(spec.Versions) == 0 {
		c.faults = append(c.faults, field.Required(at.Child("versions"), "declare at least one version"))
	}
	for i := range spec.Versions {
		at := at.Child("versions").Index(i)
		if c.service.Version(spec.Versions[i].Name) != nil {
			c.duplicate(at.Child("name"), spec.Versions[i].Name)
		}
		c.version(&spec.Versions[i], at)
	}
	if spec.MultiRegionPolicy != nil {
		c.criteria(spec.MultiRegionPolicy, at.Child("multiRegionPolicy", "criteriaForDisabledSync"))
	}
	if len(c.faults) > 0 {
		return nil, &Error{c.faults}
	}
	return c.service, nil
}

// compiler collects the faults of one descriptor. Its steps go on after a fault, with what could be understood.
type compiler struct {
	service   *Service
	hasPolicy bool // the service has a policy, be it valid or not
	faults    field.ErrorList
}

func (c *compiler) invalid(at *field.Path, value any, format string, args ...any) {
	c.faults = append(c.faults, field.Invalid(at, value, fmt.Sprintf(format, args...)))
}

func (c *compiler) duplicate(at *field.Path, value any) {
	c.faults = append(c.faults, field.Duplicate(at, value))
}

// criteria checks that the types of this service that the policy names exist.
func (c *compiler) criteria(policy *v1alpha1.MultiRegionPolicy, at *field.Path) {
	for i, criterion := range policy.CriteriaForDisabledSync {
		service, name, _ := strings.Cut(criterion.ResourceTypeName, "/")
		known := func(v *Version) bool { return v.Type(name) != nil }
		if service == c.service.Name && !slices.ContainsFunc(c.service.Versions, known) {
			c.invalid(at.Index(i).Child("resourceTypeName"), criterion.ResourceTypeName, "no version of this service has the type %s", name)
		}
	}
}

func (c *compiler) version(spec *v1alpha1.ServiceVersion, at *field.Path) {
	v := &Version{
		Name: spec.Name, Service: c.service, Imports: map[string]string{},
		types: map[string]*Type{}, root: &node{},
	}
	c.service.Versions = append(c.service.Versions, v)
	if !versionSyntax.MatchString(spec.Name) {
		c.invalid(at.Child("name"), spec.Name, versionRule)
	}
	for i, imp := range spec.Imports {
		at := at.Child("imports").Index(i)
		if !serviceSyntax.MatchString(imp.Service) {
			c.invalid(at.Child("service"), imp.Service, serviceRule)
		}
		if imp.Service == c.service.Name {
			c.invalid(at.Child("service"), imp.Service, "a service does not import itself: write the target of a local reference without a service")
		}
		if !versionSyntax.MatchString(imp.Version) {
			c.invalid(at.Child("version"), imp.Version, versionRule)
		}
		if _, found := v.Imports[imp.Service]; found {
			c.duplicate(at.Child("service"), imp.Service)
		}
		v.Imports[imp.Service] = imp.Version
	}
	if len(spec.Resources) == 0 {
		c.faults = append(c.faults, field.Required(at.Child("resources"), "declare at least one type"))
	}
	// Types may refer to each other in any order: first what each is by itself, then what it is to the others.
	for i := range spec.Resources {
		c.declare(v, &spec.Resources[i], at.Child("resources").Index(i))
	}
	v.root.link(0)
	for i := range spec.Resources {
		c.connect(v.Types[i], &spec.Resources[i], at.Child("resources").Index(i))
	}
}

// declare compiles what a type is by itself, and enters its patterns.
func (c *compiler) declare(v *Version, spec *v1alpha1.ResourceType, at *field.Path) {
	t := &Type{
		Name: spec.Type, FullName: c.service.Name + "/" + spec.Type, Plural: spec.Plural,
		SyncType: spec.SyncType, AsyncDeletion: spec.AsyncDeletion, OptOutConstraints: spec.OptOuts.DBConstraints,
		MaxBodyBytes: int(spec.MaxBodyBytes), version: v,
	}
	v.Types = append(v.Types, t)
	if !typeSyntax.MatchString(spec.Type) || len(spec.Type) > 63 {
		c.invalid(at.Child("type"), spec.Type, "must be a name in CamelCase, as in Package")
	}
	if v.types[spec.Type] != nil {
		c.duplicate(at.Child("type"), spec.Type)
	}
	v.types[spec.Type] = t
	if !collectionSyntax.MatchString(spec.Plural) || len(spec.Plural) > 63 {
		c.invalid(at.Child("plural"), spec.Plural, "must be a name in lowerCamelCase, as in packages")
	}
	switch t.SyncType {
	case "":
		t.SyncType = v1alpha1.SyncDefault
	case v1alpha1.SyncDefault, v1alpha1.SyncAlwaysInScope, v1alpha1.SyncNever, v1alpha1.SyncAlwaysGlobally:
	default:
		c.faults = append(c.faults, field.NotSupported(at.Child("syncType"), t.SyncType,
			[]v1alpha1.SyncType{v1alpha1.SyncDefault, v1alpha1.SyncAlwaysInScope, v1alpha1.SyncNever, v1alpha1.SyncAlwaysGlobally}))
	}
	switch {
	case t.MaxBodyBytes == 0:
		t.MaxBodyBytes = v1alpha1.DefaultMaxBodyBytes
	case t.MaxBodyBytes < 1024 || t.MaxBodyBytes > v1alpha1.MaxMaxBodyBytes:
		c.invalid(at.Child("maxBodyBytes"), t.MaxBodyBytes, "must be from 1024 to %d", v1alpha1.MaxMaxBodyBytes)
	}
	if spec.Schema != nil {
		t.schema = c.schema(spec.Schema.Raw, at.Child("schema"))
	}
	if spec.PolicyHolder != nil {
		c.holder(t, spec.PolicyHolder.Field, at.Child("policyHolder", "field"))
	}
	if spec.Search != nil {
		t.Search = c.search(t, spec.Search, at.Child("search"))
	}
	if len(spec.Patterns) == 0 {
		c.faults = append(c.faults, field.Required(at.Child("patterns"), "give the form of the names, as in sections/{section}/packages/{package}"))
	}
	for i, text := range spec.Patterns {
		at := at.Child("patterns").Index(i)
		patterns, err := parsePatterns(text)
		if err != nil {
			c.invalid(at, text, "%s", err)
			continue
		}
		for _, p := range patterns {
			c.pattern(t, p, at)
		}
	}
}

// pattern enters a pattern into the trie.
func (c *compiler) pattern(t *Type, p *pattern, at *field.Path) {
	p.typ = t
	if last := p.collections[len(p.collections)-1]; last != t.Plural {
		c.invalid(at, p.text, "its last collection is %s: it must be the plural, %s", last, t.Plural)
	}
	n := t.version.root
	for _, collection := range p.collections {
		n = n.child(collection)
	}
	if n.pattern != nil {
		c.invalid(at, p.text, "it matches the same names as %s of %s: a name must belong to one pattern", n.pattern.text, n.pattern.typ.Name)
		return
	}
	for _, other := range t.patterns {
		if sorted(other.vars) == sorted(p.vars) {
			c.invalid(at, p.text, "it has the same variables as %s: name them differently, so that they tell which pattern is meant", other.text)
		}
	}
	n.pattern, p.node = p, n
	t.patterns = append(t.patterns, p)
	t.Patterns = append(t.Patterns, p.text)
}

func sorted(vars []string) string { return strings.Join(slices.Sorted(slices.Values(vars)), ",") }

func (c *compiler) holder(t *Type, path string, at *field.Path) {
	if !plainFieldSyntax.MatchString(path) {
		c.invalid(at, path, "must be the path of a field, as in multiRegionPolicy or spec.policy")
		return
	}
	t.Holder, t.holder = path, parseFieldPath(path)
	if t.SyncType == v1alpha1.SyncNever {
		c.invalid(at, path, "a policy holder cannot have syncType Never: other regions need its policy")
	}
	if t.schema == nil {
		return
	}
	if fault := t.schema.hasField(t.holder, "object"); fault != "" {
		c.invalid(at, path, "%s", fault)
	}
}

// connect compiles what a type is to the others: its parent, its policy, its references.
func (c *compiler) connect(t *Type, spec *v1alpha1.ResourceType, at *field.Path) {
	c.parent(t, spec, at)
	for _, p := range t.patterns {
		governed := p.node.holderDepth > 0 || c.hasPolicy
		if t.SyncType == v1alpha1.SyncNever && !governed {
			c.invalid(at.Child("syncType"), t.SyncType, "only resources under a policy can have it: %s has no policy holder above, and the service no multiRegionPolicy", p.text)
		}
		if !governed && !slices.Contains(p.vars, regionVar) {
			c.invalid(at.Child("patterns"), p.text, "no region would own its resources: put {region} into the pattern, put it below a policy holder, or give the service a multiRegionPolicy")
		}
	}
	seen := map[string]bool{}
	for i := range spec.References {
		at := at.Child("references").Index(i)
		if seen[spec.References[i].Field] {
			c.duplicate(at.Child("field"), spec.References[i].Field)
		}
		seen[spec.References[i].Field] = true
		c.reference(t, &spec.References[i], at)
	}
}

// parent checks that the patterns of a type begin with those of its parent, and of no other type between.
func (c *compiler) parent(t *Type, spec *v1alpha1.ResourceType, at *field.Path) {
	switch behaviors := []v1alpha1.DeleteBehavior{
		v1alpha1.DeleteBlock, v1alpha1.DeleteCascade, v1alpha1.DeleteAsyncCascade, v1alpha1.DeleteAllowDangling,
	}; {
	case spec.Parent == "" && spec.OnParentDeleted != "":
		c.invalid(at.Child("onParentDeleted"), spec.OnParentDeleted, "the type has no parent: set parent, or remove it")
	case spec.Parent != "" && spec.OnParentDeleted == "":
		c.faults = append(c.faults, field.Required(at.Child("onParentDeleted"), "say what happens when the parent is deleted"))
	case spec.OnParentDeleted != "" && !slices.Contains(behaviors, spec.OnParentDeleted):
		c.faults = append(c.faults, field.NotSupported(at.Child("onParentDeleted"), spec.OnParentDeleted, behaviors))
	}
	t.OnParentDeleted = spec.OnParentDeleted
	if spec.Parent != "" {
		if t.Parent = t.version.types[spec.Parent]; t.Parent == nil {
			c.invalid(at.Child("parent"), spec.Parent, "this version has no such type")
			return
		}
	}
	below := false
	for _, p := range t.patterns {
		above := t.version.ancestor(p)
		if above == nil {
			continue
		}
		at := at.Child("patterns")
		switch {
		case t.Parent == nil:
			c.invalid(at, p.text, "it begins with %s of %s: set parent to %s", above.text, above.typ.Name, above.typ.Name)
		case above.typ != t.Parent:
			c.invalid(at, p.text, "it begins with %s of %s, which is not the parent %s", above.text, above.typ.Name, t.Parent.Name)
		case !slices.Equal(above.vars, p.vars[:len(above.vars)]):
			c.invalid(at, p.text, "it must name its first variables as its parent's %s does", above.text)
		default:
			below = true
		}
	}
	if t.Parent != nil && !below && len(t.patterns) > 0 && len(t.Parent.patterns) > 0 {
		c.invalid(at.Child("parent"), spec.Parent, "no pattern of the type begins with a pattern of its parent, as in %s/%s/{...}", t.Parent.Patterns[0], t.Plural)
	}
}

// ancestor returns the pattern of the nearest resource above p, nil without one.
func (v *Version) ancestor(p *pattern) *pattern {
	if p.node.parentDepth == 0 {
		return nil
	}
	n := v.root
	for _, collection := range p.collections[:p.node.parentDepth] {
		n = n.children[collection]
	}
	return n.pattern
}

var deleteBehaviors = []v1alpha1.DeleteBehavior{
	v1alpha1.DeleteBlock, v1alpha1.DeleteUnset, v1alpha1.DeleteCascade,
	v1alpha1.DeleteAsyncUnset, v1alpha1.DeleteAsyncCascade, v1alpha1.DeleteAllowDangling,
}

func (c *compiler) reference(t *Type, spec *v1alpha1.ReferenceField, at *field.Path) {
	f := ReferenceField{Field: spec.Field, TargetService: c.service.Name, TargetVersion: t.version.Name, OnTargetDeleted: spec.OnTargetDeleted}
	service, name, foreign := strings.Cut(spec.Target, "/")
	switch {
	case foreign && !fullTypeSyntax.MatchString(spec.Target):
		c.invalid(at.Child("target"), spec.Target, "must be a type of this service, as in Package, or a full type name, as in iam.example.com/User")
	case foreign && service != c.service.Name:
		f.TargetService, f.TargetType = service, spec.Target
		if f.TargetVersion = t.version.Imports[service]; f.TargetVersion == "" {
			c.invalid(at.Child("target"), spec.Target, "service %s is not imported: add it to the imports of the version", service)
		}
	default:
		if !foreign {
			name = spec.Target
		}
		f.TargetType = c.service.Name + "/" + name
		if f.Target = t.version.types[name]; f.Target == nil {
			c.invalid(at.Child("target"), spec.Target, "this version has no such type")
		}
	}
	if !slices.Contains(deleteBehaviors, spec.OnTargetDeleted) {
		c.faults = append(c.faults, field.NotSupported(at.Child("onTargetDeleted"), spec.OnTargetDeleted, deleteBehaviors))
	}
	cascades := spec.OnTargetDeleted == v1alpha1.DeleteCascade || spec.OnTargetDeleted == v1alpha1.DeleteAsyncCascade
	if t.AsyncDeletion && cascades {
		c.invalid(at.Child("onTargetDeleted"), spec.OnTargetDeleted, "a type with asyncDeletion cannot be deleted because of a reference of its own")
	}
	if !fieldSyntax.MatchString(spec.Field) {
		c.invalid(at.Child("field"), spec.Field, "must be the path of a field, with [] after a list, as in source or depends[]")
		return
	}
	f.path = parseFieldPath(spec.Field)
	if t.schema != nil {
		if fault := t.schema.hasField(f.path, "string"); fault != "" {
			c.invalid(at.Child("field"), spec.Field, "%s", fault)
		}
		unsets := spec.OnTargetDeleted == v1alpha1.DeleteUnset || spec.OnTargetDeleted == v1alpha1.DeleteAsyncUnset
		if unsets && t.schema.requires(f.path) {
			c.invalid(at.Child("onTargetDeleted"), spec.OnTargetDeleted, "the schema requires the field, so it cannot be unset")
		}
	}
	t.ReferenceFields = append(t.ReferenceFields, f)
}

// hasField says what is wrong if the schema does not have a field of that type at the path. What the schema leaves open may be anything.
func (s *bodySchema) hasField(path fieldPath, typ string) string {
	at := s.structural
	for _, step := range path {
		next, found := at.Properties[step.name]
		switch {
		case found:
			at = &next
		case at.XPreserveUnknownFields:
			return ""
		case at.AdditionalProperties != nil && at.AdditionalProperties.Structural != nil:
			at = at.AdditionalProperties.Structural
		case at.AdditionalProperties != nil && at.AdditionalProperties.Bool:
			return ""
		default:
			return fmt.Sprintf("the schema has no field %s there", step.name)
		}
		if !step.list {
			continue
		}
		if at.Type != "array" || at.Items == nil {
			return fmt.Sprintf("the schema has no list in %s: write it without []", step.name)
		}
		at = at.Items
	}
	if at.Type != typ && !(at.Type == "" && at.XPreserveUnknownFields) {
		return fmt.Sprintf("the schema says that it is of type %s: it must be %s", at.Type, typ)
	}
	return ""
}

// requires reports whether the field at a path without lists is required by the object that it is in.
func (s *bodySchema) requires(path fieldPath) bool {
	at := s.structural
	for i, step := range path {
		if step.list {
			return false // unsetting removes the item
		}
		if i == len(path)-1 {
			return at.ValueValidation != nil && slices.Contains(at.ValueValidation.Required, step.name)
		}
		next, found := at.Properties[step.name]
		if !found {
			return false
		}
		at = &next
	}
	return false
}

// schema compiles the schema of a body, with the rules for the structural schemas of CustomResourceDefinitions.
func (c *compiler) schema(raw []byte, at *field.Path) *bodySchema {
	before := len(c.faults)
	var doc any
	if err := json.Unmarshal(raw, &doc); err != nil {
		c.invalid(at, "", "it is not valid JSON: %s", err)
		return nil
	}
	c.keywords(doc, at)
	if root, ok := doc.(map[string]any); ok {
		properties, _ := root["properties"].(map[string]any)
		for _, reserved := range []string{"name", "metadata"} {
			if _, found := properties[reserved]; found {
				c.invalid(at.Child("properties").Key(reserved), reserved, "it is not a field of the body: it belongs to the resource around it")
			}
		}
	}
	if len(c.faults) > before {
		return nil
	}
	var v1 apiextensionsv1.JSONSchemaProps
	if err := json.Unmarshal(raw, &v1); err != nil {
		c.invalid(at, "", "it is no OpenAPI v3 schema: %s", err)
		return nil
	}
	var props apiextensions.JSONSchemaProps
	if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(&v1, &props, nil); err != nil {
		c.invalid(at, "", "it is no OpenAPI v3 schema: %s", err)
		return nil
	}
	structural, err := structuralschema.NewStructural(&props)
	if err != nil {
		c.invalid(at, "", "it is no structural schema: %s", err)
		return nil
	}
	c.faults = append(c.faults, structuralschema.ValidateStructural(at, structural)...)
	if len(c.faults) > before {
		return nil
	}
	return &bodySchema{structural, validate.NewSchemaValidator(structural.ToKubeOpenAPI(), nil, "", strfmt.Default)}
}

// schemaKeywords are the keywords that a schema may have.
var schemaKeywords = func() map[string]bool {
	out := map[string]bool{}
	for f := range reflect.TypeFor[apiextensionsv1.JSONSchemaProps]().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		out[name] = true
	}
	return out
}()

// unusedKeywords are keywords of CustomResourceDefinitions that have no effect on bodies. A schema that relies on one would not do what it says.
var unusedKeywords = map[string]string{
	"default":                        "bodies are stored as they were sent: remove it",
	"x-kubernetes-validations":       "bodies are not checked with CEL: remove it",
	"x-kubernetes-embedded-resource": "bodies do not embed Kubernetes objects: remove it",
}

// keywords checks the keywords of a schema and of those inside it, and that patterns compile and formats exist.
func (c *compiler) keywords(doc any, at *field.Path) {
	schema, ok := doc.(map[string]any)
	if !ok {
		c.invalid(at, doc, "must be a schema, an object")
		return
	}
	for _, key := range slices.Sorted(maps.Keys(schema)) {
		value, at := schema[key], at.Child(key)
		switch {
		case !schemaKeywords[key]:
			c.invalid(at, key, "it is no keyword of an OpenAPI v3 schema")
			continue
		case unusedKeywords[key] != "":
			c.invalid(at, key, "%s", unusedKeywords[key])
			continue
		}
		switch key {
		case "properties":
			properties, _ := value.(map[string]any)
			for _, name := range slices.Sorted(maps.Keys(properties)) {
				c.keywords(properties[name], at.Key(name))
			}
		case "items", "not":
			c.keywords(value, at)
		case "additionalProperties":
			if _, ok := value.(bool); !ok {
				c.keywords(value, at)
			}
		case "allOf", "anyOf", "oneOf":
			alternatives, _ := value.([]any)
			for i, alternative := range alternatives {
				c.keywords(alternative, at.Index(i))
			}
		case "pattern":
			text, _ := value.(string)
			if _, err := regexp.Compile(text); err != nil {
				c.invalid(at, text, "%s", err)
			}
		case "format":
			text, _ := value.(string)
			if typ, _ := schema["type"].(string); !knownFormat(typ, text) {
				c.invalid(at, text, "this format is not known for type %q, so it would not be checked", typ)
			}
		}
	}
}

// knownFormat reports whether values of that type are checked against the format.
func knownFormat(typ, format string) bool {
	switch typ {
	case "integer":
		return format == "int32" || format == "int64"
	case "number":
		return format == "float" || format == "double"
	default:
		return strfmt.Default.ContainsName(format)
	}
}
