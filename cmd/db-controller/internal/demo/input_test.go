package demo

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
)

func parse(t *testing.T, lines ...string) *input {
	t.Helper()
	schema, err := sampleSchema()
	if err != nil {
		t.Fatal(err)
	}
	in, err := parseInput(schema, []byte(strings.Join(lines, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return in
}

const (
	sectionLine = `{"name":"sections/s","multiRegionPolicy":{"enabledRegions":["eu","us"],"defaultControlRegion":"us"}}`
	packageLine = `{"name":"sections/s/packages/p","version":"1","maintainer":"maintainers/m","source":"sources/s","depends":["sections/s/packages/q","sections/t/packages/none","sections/s/packages/p"],"suggests":["sections/s/packages/q"]}`
)

func TestInput(t *testing.T) {
	in := parse(t, packageLine, "", `{"name":"maintainers/m"}`, `{"name":"sections/s/packages/q","version":"1"}`, sectionLine, `  {"name":"sources/s"}  `)
	var got []string
	for _, e := range in.edges {
		got = append(got, fmt.Sprintf("%s %s %s %s", in.nodes[e.from].name, e.path, e.behavior, in.nodes[e.to].name))
	}
	want := []string{ // the holder and the parent; what may dangle, and what is not there, is no edge
		"sections/s/packages/p   sections/s",
		"sections/s/packages/p  Block sections/s",
		"sections/s/packages/p source CascadeDelete sources/s",
		"sections/s/packages/p depends[0] Block sections/s/packages/q",
		"sections/s/packages/p depends[2] Block sections/s/packages/p",
		"sections/s/packages/p suggests[0] Unset sections/s/packages/q",
		"sections/s/packages/q   sections/s",
		"sections/s/packages/q  Block sections/s",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if p := in.nodes[0]; p.place != (place{"sections/s", "us"}) || p.bytes != len(packageLine) || in.numbers[1] != 3 {
		t.Errorf("node %+v, second line %d", p, in.numbers[1])
	}
	if s := in.nodes[3]; s.place != (place{"", "eu"}) || !s.governs || s.controls != "us" {
		t.Errorf("node %+v", s)
	}
}

func TestInputIsWrong(t *testing.T) {
	schema, err := sampleSchema()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ line, want string }{
		{`{"name":`, "line 2: is not a JSON object"},
		{`["name"]`, "line 2: is not a JSON object"},
		{`{"title":"x"}`, "line 2: name"},
		{`{"name":"books/x"}`, "line 2: name"},
		{sectionLine, "line 2: name: line 1 is sections/s, too"},
		{`{"name":"sections/x","title":"` + strings.Repeat("x", maxLine) + `"}`, "line 2: has"},
	} {
		if _, err := parseInput(schema, []byte(sectionLine+"\n"+tt.line)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.40s: %v, want %q", tt.line, err, tt.want)
		}
	}
}

func TestLineWithoutReferences(t *testing.T) {
	schema := `
service: x.example.com
multiRegionPolicy: {enabledRegions: [eu], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - type: Thing
    plural: things
    patterns: ["things/{thing}"]
    references:
    - {field: one, target: Thing, onTargetDeleted: Unset}
    - {field: "list[]", target: Thing, onTargetDeleted: Unset}
    - {field: "deep.items[].of", target: Thing, onTargetDeleted: Unset}
    - {field: "deep.items[].some[]", target: Thing, onTargetDeleted: Unset}
`
	var spec v1alpha1.ServiceDescriptorSpec
	if err := yaml.UnmarshalStrict([]byte(schema), &spec); err != nil {
		t.Fatal(err)
	}
	service, err := descriptor.Compile(&spec)
	if err != nil {
		t.Fatal(err)
	}
	line := `{"deep":{"items":[{"of":"things/a","some":["things/b","things/a","things/b"]},{"of":"things/b"}]},"list":["things/a","things/b"],"n":12345678901234567890,"name":"things/c","one":"things/a"}`
	in, err := parseInput(service.Version("v1"), []byte(`{"name":"things/a"}`+"\n"+`{"name":"things/b"}`+"\n"+line))
	if err != nil {
		t.Fatal(err)
	}
	var some, all []int
	for e := range in.edges {
		all = append(all, e)
		if in.nodes[in.edges[e].to].name == "things/b" {
			some = append(some, e)
		}
	}
	for _, tt := range []struct {
		without []int
		want    string
	}{
		{nil, line},
		{some, `{"deep":{"items":[{"of":"things/a","some":["things/a"]},{}]},"list":["things/a"],"n":12345678901234567890,"name":"things/c","one":"things/a"}`},
		{all, `{"deep":{"items":[{"some":[]},{}]},"list":[],"n":12345678901234567890,"name":"things/c"}`},
	} {
		got, err := in.line(2, tt.without)
		if err != nil || string(got) != tt.want {
			t.Errorf("without %v: %s, %v; want %s", tt.without, got, err, tt.want)
		}
	}
}

// TestBuiltInData: what the demo shows without input.
func TestBuiltInData(t *testing.T) {
	schema, err := sampleSchema()
	if err != nil {
		t.Fatal(err)
	}
	in, err := parseInput(schema, builtInData())
	if err != nil {
		t.Fatal(err)
	}
	if o := in.plan(loadLimits); o.leftOut > 0 || o.cycles > 0 {
		t.Errorf("%d references left out, %d circles", o.leftOut, o.cycles)
	}
	for i, line := range in.lines {
		var body map[string]any
		if err := json.Unmarshal(line, &body); err != nil {
			t.Fatal(err)
		}
		n, err := schema.ParseName(in.nodes[i].name)
		if err != nil {
			t.Fatal(err)
		}
		delete(body, "name")
		raw, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		if violations := n.Type.ValidateBody(raw); len(violations) > 0 {
			t.Errorf("%s: %v", n, violations)
		}
	}
	refused, granted := in.chooseDeletions()
	if refused == nil || in.nodes[refused.root].name != "sources/engine" || len(refused.blockers) != 1 {
		t.Errorf("refused %+v", refused)
	}
	if granted == nil || in.nodes[granted.root].name != "sources/puzzle" || len(granted.deletes) != 3 || len(granted.unsets) != 2 {
		t.Errorf("granted %+v", granted)
	}
	if len(bytes.TrimSpace(builtInData())) == 0 {
		t.Error("no data")
	}
}

func TestConsequences(t *testing.T) {
	in := parse(t, sectionLine,
		`{"name":"sources/base"}`, `{"name":"sources/game"}`, `{"name":"sources/nobody"}`,
		`{"name":"sections/s/packages/base","version":"1","source":"sources/base","depends":["sections/s/packages/base-data"]}`,
		`{"name":"sections/s/packages/base-data","version":"1","source":"sources/base","recommends":["sections/s/packages/game"]}`,
		`{"name":"sections/s/packages/game","version":"1","source":"sources/game","depends":["sections/s/packages/base"],"preDepends":["sections/s/packages/base-data"]}`,
		`{"name":"sections/s/packages/fan","version":"1","suggests":["sections/s/packages/game","sections/s/packages/base"],"depends":["sections/s/packages/base"]}`,
	)
	names := func(nodes []int32) (out []string) {
		for _, n := range nodes {
			out = append(out, strings.TrimPrefix(in.nodes[n].name, "sections/s/packages/"))
		}
		return out
	}
	edges := in.incoming()
	for _, tt := range []struct {
		root                            string
		deletes, unsets, blockers, held []string
	}{
		// The section puts us in control, the sources belong to eu.
		{"sources/base", []string{"sources/base", "base", "base-data"}, []string{"fan"}, nil, []string{"game", "fan"}},
		{"sources/game", []string{"sources/game", "game"}, []string{"base-data", "fan"}, nil, nil},
		{"sources/nobody", []string{"sources/nobody"}, nil, nil, nil},
		{"sections/s/packages/base", []string{"base"}, []string{"fan"}, []string{"game", "fan"}, nil},
	} {
		c := in.consequencesOf(in.index[tt.root], edges)
		for what, lists := range map[string][2][]string{
			"deletes": {names(c.deletes), tt.deletes}, "unsets": {names(c.unsets), tt.unsets}, "blockers": {names(c.blockers), tt.blockers}, "held": {names(c.held), tt.held},
		} {
			if !reflect.DeepEqual(lists[0], lists[1]) {
				t.Errorf("%s: %s %q, want %q", tt.root, what, lists[0], lists[1])
			}
		}
	}
	refused, granted := in.chooseDeletions()
	if refused != nil || granted == nil || in.nodes[granted.root].name != "sources/game" {
		t.Errorf("chosen %+v, %+v", refused, granted)
	}
}
