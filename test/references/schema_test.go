package references

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/store"
)

// The services. low owns the policy holders; mid imports low v1; high imports low v2 and mid v1.
const (
	low  = "low.example.com"
	mid  = "mid.example.com"
	high = "high.example.com"
)

var regions = []string{"ap", "eu", "us"}

// behaviors are the six that a reference can have.
var behaviors = []struct {
	declared v1alpha1.DeleteBehavior
	stored   store.Behavior
	word     string // for it in the names of our fields
	tail     string // what follows the word in the path
}{
	{v1alpha1.DeleteBlock, store.Block, "block", "[]"},
	{v1alpha1.DeleteUnset, store.Unset, "unset", ""},
	{v1alpha1.DeleteCascade, store.Cascade, "cascade", "[]"},
	{v1alpha1.DeleteAsyncUnset, store.AsyncUnset, "links", "[].asyncUnset"},
	{v1alpha1.DeleteAsyncCascade, store.AsyncCascade, "asyncCascade", "[]"},
	{v1alpha1.DeleteAllowDangling, store.AllowDangling, "dangling", "[]"},
}

// field is a field of a type that holds references.
type field struct {
	path     string
	declared v1alpha1.DeleteBehavior
	behavior store.Behavior
	service  string // of the targets
	typ      string
}

// target is what the fields of one prefix refer to.
type target struct{ prefix, service, typ string }

// targets says which fields the types with references have.
var targets = map[string][]target{
	low + "/Node":  {{"", low, "Node"}, {"secret", low, "Secret"}, {"box", low, "Box"}},
	low + "/Box":   {{"", low, "Node"}},
	mid + "/Node":  {{"", mid, "Node"}, {"low", low, "Node"}, {"secret", low, "Secret"}, {"box", low, "Box"}},
	high + "/Node": {{"", high, "Node"}, {"low", low, "Node"}, {"secret", low, "Secret"}, {"mid", mid, "Node"}, {"box", low, "Box"}},
}

// parents says which types have a parent that matters, and what happens when that is deleted.
var parents = map[string]store.Behavior{
	low + "/Secret": store.AsyncCascade, low + "/Leaf": store.Cascade, low + "/Twig": store.AsyncCascade, low + "/Pin": store.Block,
}

var fields = func() map[string][]field {
	all := map[string][]field{}
	for typ, prefixes := range targets {
		for _, t := range prefixes {
			for _, b := range behaviors {
				if typ == low+"/Box" && (b.stored == store.Cascade || b.stored == store.AsyncCascade) {
					continue // a type with asyncDeletion is not deleted because of its references
				}
				all[typ] = append(all[typ], field{pathOf(t.prefix, b.word) + b.tail, b.declared, b.stored, t.service, t.typ})
			}
		}
	}
	return all
}()

func pathOf(prefix, word string) string {
	if prefix == "" {
		return word
	}
	return prefix + strings.ToUpper(word[:1]) + word[1:]
}

func references(service, typ string) []v1alpha1.ReferenceField {
	var all []v1alpha1.ReferenceField
	for _, f := range fields[service+"/"+typ] {
		all = append(all, v1alpha1.ReferenceField{Field: f.path, Target: f.service + "/" + f.typ, OnTargetDeleted: f.declared})
	}
	return all
}

func descriptors() []*v1alpha1.ServiceDescriptor {
	policy := &v1alpha1.MultiRegionPolicy{EnabledRegions: regions, DefaultControlRegion: "eu"}
	lowVersion := func(name, secret string) v1alpha1.ServiceVersion {
		below := "projects/{project}/regions/{region}/nodes/{node}"
		return v1alpha1.ServiceVersion{Name: name, Resources: []v1alpha1.ResourceType{
			{Type: "Project", Plural: "projects", Patterns: []string{"projects/{project}"}, PolicyHolder: &v1alpha1.PolicyHolder{Field: "policy"}, SyncType: v1alpha1.SyncAlwaysGlobally},
			{Type: "Secret", Plural: "secrets", Patterns: []string{secret}, Parent: "Project", OnParentDeleted: v1alpha1.DeleteAsyncCascade},
			{Type: "Node", Plural: "nodes", Patterns: []string{below}, Parent: "Project", OnParentDeleted: v1alpha1.DeleteAllowDangling, References: references(low, "Node")},
			{Type: "Leaf", Plural: "leaves", Patterns: []string{below + "/leaves/{leaf}"}, Parent: "Node", OnParentDeleted: v1alpha1.DeleteCascade},
			{Type: "Twig", Plural: "twigs", Patterns: []string{below + "/twigs/{twig}"}, Parent: "Node", OnParentDeleted: v1alpha1.DeleteAsyncCascade},
			{Type: "Pin", Plural: "pins", Patterns: []string{below + "/pins/{pin}"}, Parent: "Node", OnParentDeleted: v1alpha1.DeleteBlock},
			{Type: "Box", Plural: "boxes", Patterns: []string{"projects/{project}/regions/{region}/boxes/{box}"}, Parent: "Project", OnParentDeleted: v1alpha1.DeleteAllowDangling,
				AsyncDeletion: true, References: references(low, "Box")},
		}}
	}
	node := func(service string) []v1alpha1.ResourceType {
		return []v1alpha1.ResourceType{{Type: "Node", Plural: "nodes", Patterns: []string{"regions/{region}/nodes/{node}"}, References: references(service, "Node")}}
	}
	describe := func(service string, versions ...v1alpha1.ServiceVersion) *v1alpha1.ServiceDescriptor {
		return &v1alpha1.ServiceDescriptor{ObjectMeta: metav1.ObjectMeta{Name: service}, Spec: v1alpha1.ServiceDescriptorSpec{Service: service, MultiRegionPolicy: policy, Versions: versions}}
	}
	return []*v1alpha1.ServiceDescriptor{
		describe(low, lowVersion("v1", "projects/{project}/secrets/{secret}"), lowVersion("v2", "projects/{project}/regions/{region}/secrets/{secret}")),
		describe(mid, v1alpha1.ServiceVersion{Name: "v1", Imports: []v1alpha1.ServiceImport{{Service: low, Version: "v1"}}, Resources: node(mid)}),
		describe(high, v1alpha1.ServiceVersion{Name: "v1", Imports: []v1alpha1.ServiceImport{{Service: low, Version: "v2"}, {Service: mid, Version: "v1"}}, Resources: node(high)}),
	}
}

// imports of the services: whose resources each may refer to besides its own, and in which version.
var imports = map[string]map[string]string{low: {}, mid: {low: "v1"}, high: {low: "v2", mid: "v1"}}

// Names. Each region has a project whose control region it is.
func project(region string) string { return "projects/p-" + region }
func lowNode(region, id string) string {
	return project(region) + "/regions/" + region + "/nodes/" + id
}
func (c config) secret(region, id string) string {
	return c.ownName(low, project(region)+"/secrets/"+id)
}
func box(region, id string) string { return project(region) + "/regions/" + region + "/boxes/" + id }

// node is the name of a Node of mid or high.
func node(region, id string) string { return "regions/" + region + "/nodes/" + id }

// spell returns a name of low as a version spells it: v1 has secrets of the control region only, and leaves the region out. ok is false if it has no such name.
func spell(version, name string) (spelled string, ok bool) {
	s := strings.Split(name, "/") // projects/{project}/[regions/{region}/]secrets/{secret}
	switch {
	case typeOf(name) != "Secret":
		return name, true
	case version == "v1" && len(s) == 6:
		return strings.Join([]string{s[0], s[1], s[4], s[5]}, "/"), s[1] == "p-"+s[3]
	case version == "v2" && len(s) == 4:
		return strings.Join([]string{s[0], s[1], "regions", strings.TrimPrefix(s[1], "p-"), s[2], s[3]}, "/"), true
	}
	return name, true
}

// version of a service that runs here.
func (c config) version(service string) string {
	return cmp.Or(c.versions[service], map[string]string{low: "v2"}[service], "v1")
}

// nameIn returns a service's own name as another service spells it.
func nameIn(importer, service, name string) (spelled string, ok bool) {
	if version := imports[importer][service]; service == low && version != "" {
		return spell(version, name)
	}
	return name, true
}

// ownName returns the name that a service itself gives to what another one has spelled.
func (c config) ownName(service, spelled string) string {
	if service == low {
		name, _ := spell(c.version(low), spelled)
		return name
	}
	return spelled
}

// regionOf returns the owning region of a service's own name.
func regionOf(name string) string {
	s := strings.Split(name, "/")
	for i := 0; i+1 < len(s); i += 2 {
		if s[i] == "regions" {
			return s[i+1]
		}
	}
	if len(s) == 4 && s[2] == "secrets" {
		return strings.TrimPrefix(s[1], "p-") // of v1
	}
	return "eu" // a Project: the policy of the service
}

func typeOf(name string) string {
	s := strings.Split(name, "/")
	return map[string]string{"projects": "Project", "secrets": "Secret", "nodes": "Node", "leaves": "Leaf", "twigs": "Twig", "pins": "Pin", "boxes": "Box"}[s[len(s)-2]]
}

// parentOf returns the parent's name, and what its deletion means, if that is something.
func parentOf(service, name string) (parent string, b store.Behavior, ok bool) {
	typ := typeOf(name)
	if b, ok = parents[service+"/"+typ]; !ok && service == low && (typ == "Node" || typ == "Box") {
		b, ok = store.AllowDangling, true
	}
	s := strings.Split(name, "/")
	n := len(s) - 2
	if typ == "Secret" || typ == "Node" || typ == "Box" {
		n = 2
	}
	return strings.Join(s[:n], "/"), b, ok
}

// refs are the references of a resource: by the path of their field, the targets as it spells them.
type refs map[string][]string

// body returns a body with these references. Each serial makes another body.
func (r refs) body(serial int) []byte {
	object := map[string]any{"serial": serial}
	for path, names := range r {
		name, tail, list := strings.Cut(path, "[]")
		if !list {
			if len(names) > 0 {
				object[name] = names[0]
			}
			continue
		}
		items := []any{}
		for _, n := range names {
			if tail == "" {
				items = append(items, n)
			} else {
				items = append(items, map[string]any{tail[1:]: n, "note": "kept"})
			}
		}
		object[name] = items
	}
	text, err := json.Marshal(object)
	if err != nil {
		panic(err)
	}
	return text
}

// namesAt returns the names in one field of a body.
func namesAt(object map[string]any, path string) (names []string) {
	name, tail, list := strings.Cut(path, "[]")
	if !list {
		if s, ok := object[name].(string); ok && s != "" {
			return []string{s}
		}
		return nil
	}
	items, _ := object[name].([]any)
	for _, item := range items {
		if tail != "" {
			inner, _ := item.(map[string]any)
			item = inner[tail[1:]]
		}
		if s, ok := item.(string); ok && s != "" {
			names = append(names, s)
		}
	}
	return names
}

// refsIn reads the references of a body.
func refsIn(service, name string, body []byte) (refs, error) {
	var object map[string]any
	if err := json.Unmarshal(body, &object); err != nil {
		return nil, fmt.Errorf("body of %s: %w", name, err)
	}
	found := refs{}
	for _, f := range fields[service+"/"+typeOf(name)] {
		if names := namesAt(object, f.path); len(names) > 0 {
			found[f.path] = names
		}
	}
	return found, nil
}
