package descriptor

import (
	"errors"
	"strings"
	"testing"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

const valid = `
service: packages.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  imports: [{service: iam.example.com, version: v2}]
  resources:
  - {type: Section, plural: sections, patterns: ["sections/{section}"], policyHolder: {field: policy},
     schema: {type: object, properties: {policy: {type: object, x-kubernetes-preserve-unknown-fields: true}}}}
  - type: Package
    plural: packages
    patterns: ["sections/{section}/packages/{package}"]
    parent: Section
    onParentDeleted: Block
    references:
    - {field: "depends[]", target: Package, onTargetDeleted: Block}
    - {field: owner, target: iam.example.com/User, onTargetDeleted: Unset}
    - {field: "links[].to", target: packages.example.com/Source, onTargetDeleted: AllowDangling}
    schema:
      type: object
      required: [version]
      properties:
        version: {type: string, pattern: "^[0-9]", format: date}
        owner: {type: string}
        depends: {type: array, items: {type: string}}
        links: {type: array, items: {type: object, properties: {to: {type: string}}}}
  - {type: Source, plural: sources, patterns: ["sources/{source}"]}
`

func TestCompile(t *testing.T) {
	s := service(t, valid)
	v := s.Version("v1")
	if s.Version("v2") != nil || v.Type("User") != nil {
		t.Error("found what is not there")
	}
	pkg := v.Type("Package")
	if pkg.FullName != "packages.example.com/Package" || pkg.Parent != v.Type("Section") || pkg.OnParentDeleted != v1alpha1.DeleteBlock ||
		pkg.SyncType != v1alpha1.SyncDefault || pkg.MaxBodyBytes != v1alpha1.DefaultMaxBodyBytes || pkg.IsPolicyHolder() || pkg.Version() != v {
		t.Errorf("Package: %+v", pkg)
	}
	depends, owner, to := pkg.ReferenceFields[0], pkg.ReferenceFields[1], pkg.ReferenceFields[2]
	if depends.Target != pkg || depends.TargetService != s.Name || depends.TargetVersion != "v1" || depends.OnTargetDeleted != v1alpha1.DeleteBlock {
		t.Errorf("depends: %+v", depends)
	}
	if owner.Target != nil || owner.TargetService != "iam.example.com" || owner.TargetType != "iam.example.com/User" || owner.TargetVersion != "v2" {
		t.Errorf("owner: %+v", owner)
	}
	if to.Target != v.Type("Source") || to.TargetType != "packages.example.com/Source" {
		t.Errorf("links[].to: %+v", to)
	}
}

func TestCompileRefuses(t *testing.T) {
	const version, resource = "spec.versions[0].", "spec.versions[0].resources[1]."
	for name, tc := range map[string]struct {
		from, to string
		path     string // of the first fault
		want     string // part of its text
	}{
		"service of one label":      {"service: packages.example.com", "service: packages", "spec.service", "DNS name"},
		"version that is none":      {"name: v1", "name: one", version + "name", "must be a version"},
		"policy that is none":       {"defaultControlRegion: eu", "defaultControlRegion: ap", "spec.multiRegionPolicy.defaultControlRegion", "one of enabledRegions"},
		"criterion for no type":     {"defaultControlRegion: eu", "defaultControlRegion: eu, criteriaForDisabledSync: [{resourceTypeName: packages.example.com/Pack}]", "spec.multiRegionPolicy.criteriaForDisabledSync[0].resourceTypeName", "no version of this service has the type Pack"},
		"import of itself":          {"service: iam.example.com", "service: packages.example.com", version + "imports[0].service", "does not import itself"},
		"import without version":    {"version: v2", "version: ''", version + "imports[0].version", "must be a version"},
		"type in lower case":        {"type: Source", "type: source", version + "resources[2].type", "CamelCase"},
		"type declared twice":       {"type: Source", "type: Section", version + "resources[2].type", "Duplicate"},
		"plural in capitals":        {"plural: sources, patterns: [\"sources/", "plural: Sources, patterns: [\"Sources/", version + "resources[2].plural", "lowerCamelCase"},
		"no pattern":                {"patterns: [\"sources/{source}\"]", "patterns: []", version + "resources[2].patterns", "Required"},
		"pattern of one segment":    {"\"sources/{source}\"", "sources", version + "resources[2].patterns[0]", "pairs of a collection and a variable"},
		"pattern without braces":    {"sources/{source}", "sources/source", version + "resources[2].patterns[0]", "must be a variable"},
		"pattern with a slash":      {"sources/{source}", "/sources/{source}", version + "resources[2].patterns[0]", "pairs"},
		"variable as collection":    {"sources/{source}", "{x}/{source}", version + "resources[2].patterns[0]", "must be a collection"},
		"variable that is twice":    {"/{section}/packages/{package}", "/{package}/packages/{package}", resource + "patterns[0]", "occurs twice"},
		"other last collection":     {"/packages/{package}", "/parcels/{package}", resource + "patterns[0]", "it must be the plural, packages"},
		"bracket left open":         {"sources/{source}", "[regions/{region}/sources/{source}", version + "resources[2].patterns[0]", "one optional part"},
		"bracket round half a pair": {"sources/{source}", "[regions/]sources/{source}", version + "resources[2].patterns[0]", "pairs"},
		"pattern too deep":          {"sources/{source}", strings.Repeat("a/{b}/", 8) + "sources/{source}", version + "resources[2].patterns[0]", "at most 8 pairs"},
		"two types for one name":    {"plural: sources, patterns: [\"sources/{source}\"]", "plural: sections, patterns: [\"sections/{source}\"]", version + "resources[2].patterns[0]", "it matches the same names as sections/{section} of Section"},
		"pattern declared twice":    {"[\"sources/{source}\"]", "[\"sources/{source}\", \"sources/{other}\"]", version + "resources[2].patterns[1]", "it matches the same names"},
		"patterns not told apart":   {"[\"sources/{source}\"]", "[\"a/{x}/sources/{source}\", \"b/{x}/sources/{source}\"]", version + "resources[2].patterns[1]", "the same variables as a/{x}/sources/{source}"},
		"parent of no type":         {"parent: Section", "parent: Group", resource + "parent", "no such type"},
		"parent left out":           {"    parent: Section\n    onParentDeleted: Block\n", "", resource + "patterns", "set parent to Section"},
		"parent of another tree":    {"parent: Section", "parent: Source", resource + "patterns", "which is not the parent Source"},
		"no pattern below parent":   {"\"sections/{section}/packages/{package}\"", "\"packages/{package}\"", resource + "parent", "no pattern of the type begins with a pattern of its parent, as in sections/{section}/packages/{...}"},
		"parent's variable renamed": {"sections/{section}/packages", "sections/{group}/packages", resource + "patterns", "it must name its first variables as its parent's"},
		"parent without behavior":   {"    onParentDeleted: Block\n", "", resource + "onParentDeleted", "Required"},
		"behavior without parent":   {"    parent: Section\n", "", resource + "onParentDeleted", "the type has no parent"},
		"parent that unsets":        {"onParentDeleted: Block", "onParentDeleted: Unset", resource + "onParentDeleted", "Unsupported"},
		"nobody owns it":            {"multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}", "", version + "resources[0].patterns", "no region would own its resources"},
		"holder that is not copied": {"policyHolder:", "syncType: Never, policyHolder:", version + "resources[0].policyHolder.field", "other regions need its policy"},
		"holder's field not there":  {"policyHolder: {field: policy}", "policyHolder: {field: spec.policy}", version + "resources[0].policyHolder.field", "no field spec"},
		"holder's field a string":   {"policy: {type: object, x-kubernetes-preserve-unknown-fields: true}", "policy: {type: string}", version + "resources[0].policyHolder.field", "it must be object"},
		"holder's field a list":     {"policyHolder: {field: policy}", "policyHolder: {field: 'policy[]'}", version + "resources[0].policyHolder.field", "path of a field"},
		"unknown sync type":         {"parent: Section", "parent: Section\n    syncType: Sometimes", resource + "syncType", "Unsupported"},
		"body limit over the cap":   {"parent: Section", "parent: Section\n    maxBodyBytes: 1048577", resource + "maxBodyBytes", "from 1024 to 1048576"},
		"reference to no type":      {"target: Package", "target: Parcel", resource + "references[0].target", "no such type"},
		"target without import":     {"iam.example.com/User", "auth.example.com/User", resource + "references[1].target", "auth.example.com is not imported"},
		"target without a type":     {"iam.example.com/User", "iam.example.com/", resource + "references[1].target", "full type name"},
		"field that is not there":   {"\"depends[]\"", "\"needs[]\"", resource + "references[0].field", "no field needs"},
		"list written as a value":   {"\"depends[]\"", "\"depends\"", resource + "references[0].field", "of type array"},
		"value written as a list":   {"field: owner", "field: 'owner[]'", resource + "references[1].field", "no list in owner"},
		"field that is no path":     {"field: owner", "field: 'owner..x'", resource + "references[1].field", "must be the path"},
		"field declared twice":      {"field: owner", "field: 'depends[]'", resource + "references[1].field", "Duplicate"},
		"unknown delete behavior":   {"onTargetDeleted: Unset", "onTargetDeleted: UNSET", resource + "references[1].onTargetDeleted", "Unsupported"},
		"unset of what is required": {"required: [version]", "required: [version, owner]", resource + "references[1].onTargetDeleted", "cannot be unset"},
		"schema of a list":          {"      type: object\n      required", "      type: array\n      required", resource + "schema.items", "must be specified"},
		"unknown keyword":           {"required: [version]", "requires: [version]", resource + "schema.requires", "no keyword"},
		"unknown keyword in items":  {"items: {type: string}", "items: {typ: string}", resource + "schema.properties[depends].items.typ", "no keyword"},
		"default":                   {"owner: {type: string}", "owner: {type: string, default: x}", resource + "schema.properties[owner].default", "stored as they were sent"},
		"pattern that is none":      {"^[0-9]", "^[0-9", resource + "schema.properties[version].pattern", "missing closing"},
		"unknown format":            {"format: date", "format: birthday", resource + "schema.properties[version].format", "not known"},
		"field without a type":      {"owner: {type: string}", "owner: {}", resource + "schema.properties[owner].type", "must not be empty"},
		"field called name":         {"owner: {type: string}", "owner: {type: string}\n        name: {type: string}", resource + "schema.properties[name]", "not a field of the body"},
		"reference into a $ref":     {"owner: {type: string}", "owner: {$ref: '#/x'}", resource + "schema", "$ref"},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(valid, tc.from) {
				t.Fatalf("the descriptor has no %q", tc.from)
			}
			_, err := Compile(parseSpec(t, strings.Replace(valid, tc.from, tc.to, 1)))
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("Compile = %v, want an *Error", err)
			}
			if f := e.Faults[0]; f.Field != tc.path || !strings.Contains(f.Error(), tc.want) {
				t.Errorf("first fault = %s, want %s with %q\nall: %v", f, tc.path, tc.want, err)
			}
		})
	}
}

func TestCompileRefusesCascadeOfAsyncType(t *testing.T) {
	doc := strings.Replace(valid, "parent: Section", "parent: Section\n    asyncDeletion: true", 1)
	if _, err := Compile(parseSpec(t, doc)); err != nil {
		t.Fatal(err)
	}
	_, err := Compile(parseSpec(t, strings.Replace(doc, "onTargetDeleted: Unset", "onTargetDeleted: CascadeDelete", 1)))
	if err == nil || !strings.Contains(err.Error(), "references[1].onTargetDeleted") {
		t.Errorf("Compile = %v", err)
	}
}

// All faults are found at once.
func TestCompileReportsEveryFault(t *testing.T) {
	doc := valid
	for _, r := range [][2]string{{"name: v1", "name: one"}, {"target: Package", "target: Parcel"}, {"sources/{source}", "sources"}, {"{type: array", "{typ: array"}} {
		doc = strings.Replace(doc, r[0], r[1], 1)
	}
	_, err := Compile(parseSpec(t, doc))
	e, ok := errors.AsType[*Error](err)
	if !ok || len(e.Faults) != 4 {
		t.Errorf("Compile = %v, want 4 faults", err)
	}
}

// Whatever the input, Compile answers; a folder of manifests has not been through an API server.
func TestCompileOfNothing(t *testing.T) {
	for _, doc := range []string{"{}", "versions: [{}]", "versions: [{resources: [{}]}]", "versions: [{resources: [{patterns: [''], references: [{}], policyHolder: {}, schema: null}]}]",
		"multiRegionPolicy: {}\nversions: [{imports: [{}], resources: [{type: A, plural: as, parent: A, patterns: ['as/{a}'], schema: {}}, {}]}]"} {
		if _, err := Compile(parseSpec(t, doc)); err == nil {
			t.Errorf("Compile(%s) succeeded", doc)
		}
	}
}
