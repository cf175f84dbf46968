package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
)

const index = `Package: lamp
Version: 2.0~rc1-1
Section: non-free/home
Maintainer: Old <old@example.org>

Package: lamp
Version: 2.0-1
Architecture: amd64
Section: non-free/home
Priority: optional
Essential: yes
Maintainer: "Dr. Lux, Ltd." <Lux+Team@Example.org>, Second <second@example.org>
Source: lights (1.9-3)
Installed-Size: 120
Size: 4000
SHA256: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
Filename: pool/l/lamp.deb
Homepage: https://example.org/lamp
Tag: role::program, use::lighting,
 works-with::dark
Depends: gone | bulb:any (>= 1.0), power-socket, bulb [amd64], lamp-core, magic
 (>= 3)
Pre-Depends: bulb <!nocheck>
Recommends: lamp | nothing
Suggests: nowhere
Conflicts: candle (<< 5)
Provides: lamp-core (= 2.0-1)
Description: gives light
 in the <evening>
 .
 and at night

Package: lamp
Version: 1:1.0
Section: broken
Unknown: x

Package: bulb
Version: 1.1
Section: home
Maintainer: nobody

Package: mains
Version: 1
Provides: power-socket
Maintainer: Lux again <lux+team@example.org>

Package: battery
Version: 1
Section: home
Provides: power-socket, light
`

// fixture is index without the epoch that would make the broken stanza win over the others.
var fixture = strings.Replace(index, "Version: 1:1.0", "Version: 0:1.0", 1)

func generate(t *testing.T, text string, limit int) (map[string]map[string]any, []string, counts) {
	t.Helper()
	packages, err := readIndex(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	n, err := writeResources(&out, packages, limit)
	if err != nil {
		t.Fatal(err)
	}
	resources := map[string]map[string]any{}
	var order []string
	for line := range strings.Lines(out.String()) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		name := r["name"].(string)
		if resources[name] != nil {
			t.Errorf("%s is there twice", name)
		}
		resources[name], order = r, append(order, name)
	}
	return resources, order, n
}

func TestResources(t *testing.T) {
	resources, order, n := generate(t, fixture, 0)
	wantOrder := []string{
		"sections/home", "sections/non-free-home", "sections/none", "maintainers/lux+team-at-example.org",
		"sources/battery", "sources/bulb", "sources/lights", "sources/mains",
		"sections/home/packages/battery", "sections/home/packages/bulb", "sections/non-free-home/packages/lamp", "sections/none/packages/mains",
	}
	if !reflect.DeepEqual(order, wantOrder) {
		t.Errorf("got %q, want %q", order, wantOrder)
	}
	var want map[string]any
	if err := json.Unmarshal([]byte(`{
		"name": "sections/non-free-home/packages/lamp", "version": "2.0-1", "architecture": "amd64", "priority": "optional", "essential": true,
		"homepage": "https://example.org/lamp", "description": "gives light\nin the <evening>\n\nand at night", "installedSizeKb": 120, "sizeBytes": 4000,
		"filename": "pool/l/lamp.deb", "sha256": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
		"source": "sources/lights", "maintainer": "maintainers/lux+team-at-example.org",
		"depends": ["sections/home/packages/bulb", "sections/home/packages/battery"], "preDepends": ["sections/home/packages/bulb"],
		"tags": ["role::program", "use::lighting", "works-with::dark"],
		"metadata": {"annotations": {
			"dependsText": "gone | bulb:any (>= 1.0), power-socket, bulb [amd64], lamp-core, magic (>= 3)", "dependsVirtual": "magic (>= 3)",
			"preDependsText": "bulb <!nocheck>", "recommendsText": "lamp | nothing", "suggestsText": "nowhere", "suggestsVirtual": "nowhere",
			"conflictsText": "candle (<< 5)", "providesText": "lamp-core (= 2.0-1)"}}}`), &want); err != nil {
		t.Fatal(err)
	}
	if got := resources["sections/non-free-home/packages/lamp"]; !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if got := resources["maintainers/lux+team-at-example.org"]; got["title"] != "Dr. Lux, Ltd." || got["email"] != "lux+team@example.org" {
		t.Errorf("maintainer %v", got)
	}
	if got := resources["sections/home/packages/bulb"]; got["maintainer"] != nil {
		t.Errorf("a maintainer without an address became %v", got["maintainer"])
	}
	if want := (counts{Sections: 3, Maintainers: 1, Sources: 4, Packages: 4, References: 3, Provided: 1, Virtual: 2}); n != want {
		t.Errorf("counts %+v, want %+v", n, want)
	}
	validate(t, resources)
}

func TestHighestVersionStays(t *testing.T) {
	resources, _, _ := generate(t, index, 0)
	if got := resources["sections/broken/packages/lamp"]; got == nil || got["version"] != "1:1.0" {
		t.Errorf("lamp is %v, want version 1:1.0", got)
	}
}

// TestLimitIsClosed: what is left out is no target either.
func TestLimitIsClosed(t *testing.T) {
	resources, _, n := generate(t, fixture, 3)
	if n.Packages != 3 || resources["sections/none/packages/mains"] != nil {
		t.Errorf("counts %+v", n)
	}
	resources, _, _ = generate(t, strings.ReplaceAll(fixture, "Package: lamp", "Package: a-lamp"), 1)
	validate(t, resources)
}

func TestPoliciesDiffer(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"admin", "comm", "database", "libs", "python", "games", "doc", "net"} {
		p := policyOf("sections/" + name)
		if !reflect.DeepEqual(p, policyOf("sections/"+name)) || p.DefaultControlRegion != "eu" {
			t.Errorf("policy of %s: %+v", name, p)
		}
		seen[strings.Join(p.EnabledRegions, "+")] = true
	}
	if len(seen) < 3 {
		t.Errorf("only %d sets of regions", len(seen))
	}
}

func TestDamagedIndex(t *testing.T) {
	if _, err := readIndex(strings.NewReader("Package: a\nnonsense\n")); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("err = %v, want one that names line 2", err)
	}
	if _, err := readIndex(strings.NewReader("Package: a\nDescription: " + strings.Repeat("x", 1<<25))); err == nil {
		t.Error("a line of 32 MiB was accepted")
	}
	packages, err := readIndex(strings.NewReader(" leading\n\n\nVersion: 1\n\nPackage: b\n\nPackage: ../c\nVersion: 1\n\nPackage: d\nVersion: \xff\n"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	n, err := writeResources(&out, packages, 0)
	if err != nil || n.Packages != 1 || n.Skipped != 1 {
		t.Errorf("counts %+v, %v", n, err)
	}
}

// TestMachinesIndex makes resources of the real index: valid ones, with all references closed.
func TestMachinesIndex(t *testing.T) {
	if testing.Short() {
		t.Skip("reads some 60,000 packages")
	}
	if _, err := exec.LookPath("apt-cache"); err != nil {
		t.Skip("no apt on this machine")
	}
	packages, err := readApt(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(packages) == 0 {
		t.Skip("apt's index is empty")
	}
	var out bytes.Buffer
	n, err := writeResources(&out, packages, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(n)
	resources := map[string]map[string]any{}
	for line := range bytes.Lines(out.Bytes()) {
		var r map[string]any
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		resources[r["name"].(string)] = r
	}
	if lines := n.Sections + n.Maintainers + n.Sources + n.Packages; len(resources) != lines {
		t.Errorf("%d names in %d lines", len(resources), lines)
	}
	validate(t, resources)
}

// validate looks up each reference, and asks the descriptor of the sample about some 2000 of them.
func validate(t *testing.T, resources map[string]map[string]any) {
	t.Helper()
	sample, err := os.ReadFile("../../config/samples/packages.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var sd v1alpha1.ServiceDescriptor
	if err := yaml.UnmarshalStrict(sample, &sd); err != nil {
		t.Fatal(err)
	}
	service, err := descriptor.Compile(&sd.Spec)
	if err != nil {
		t.Fatal(err)
	}
	step, i := 1+len(resources)/2000, 0
	for name, r := range resources {
		n, err := service.Version("v1").ParseName(name)
		if err != nil {
			t.Fatal(err)
		}
		if n.Type.Name == "Package" && resources[n.HolderName()] == nil {
			t.Errorf("%s has no section", name)
		}
		for _, field := range []string{"source", "maintainer", "depends", "preDepends", "recommends", "suggests"} {
			for _, target := range texts(r[field]) {
				if resources[target] == nil {
					t.Errorf("%s refers to %s, which does not exist", name, target)
				}
			}
		}
		if i++; i%step != 0 {
			continue
		}
		body := maps.Clone(r)
		delete(body, "name")
		delete(body, "metadata")
		raw, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		if violations := n.Type.ValidateBody(raw); len(violations) > 0 {
			t.Errorf("%s: %v", name, violations)
		}
	}
}

// texts returns a string, or those in a list.
func texts(v any) []string {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		var all []string
		for _, e := range v {
			all = append(all, texts(e)...)
		}
		return all
	}
	return nil
}
