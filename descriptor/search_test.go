package descriptor

import (
	"slices"
	"strings"
	"testing"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

func searchSpec(search *v1alpha1.ResourceSearch) *v1alpha1.ServiceDescriptorSpec {
	return &v1alpha1.ServiceDescriptorSpec{
		Service: "books.example.com", MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu"}, DefaultControlRegion: "eu"},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{{Type: "Book", Plural: "books", Patterns: []string{"books/{book}"}, Search: search}}}},
	}
}

func TestSearchFaults(t *testing.T) {
	_, err := Compile(searchSpec(&v1alpha1.ResourceSearch{
		Fields:  []v1alpha1.SearchField{{Path: "a b"}, {Path: "title", Weight: "E"}, {Path: "title"}},
		Filters: []v1alpha1.SearchFilter{{Path: "metadata.x", Type: v1alpha1.SearchString}, {Path: "a[].b", Type: v1alpha1.SearchString}, {Path: "n", Type: "Date"}, {Path: "o", Type: v1alpha1.SearchNumber}, {Path: "o.p", Type: v1alpha1.SearchNumber}},
		Facets:  []string{"title"},
	}))
	if err == nil {
		t.Fatal("accepted")
	}
	at := "spec.versions[0].resources[0].search."
	for _, path := range []string{"fields[0].path", "fields[1].weight", "fields[2].path", "filters[0].path", "filters[1].path", "filters[2].type", "filters[4].path", "facets[0]"} {
		if !strings.Contains(err.Error(), at+path+":") {
			t.Errorf("no fault at %s in: %v", path, err)
		}
	}
	if _, err := Compile(searchSpec(&v1alpha1.ResourceSearch{})); err == nil {
		t.Error("an empty declaration is accepted")
	}
}

func TestProject(t *testing.T) {
	spec := &v1alpha1.ResourceSearch{
		Fields:  []v1alpha1.SearchField{{Path: "name", Weight: "A"}, {Path: "title", Weight: "B"}, {Path: "parts[].text"}, {Path: "none"}},
		Filters: []v1alpha1.SearchFilter{{Path: "tags[]", Type: v1alpha1.SearchString}, {Path: "spec.size", Type: v1alpha1.SearchNumber}, {Path: "ok", Type: v1alpha1.SearchBoolean}, {Path: "other", Type: v1alpha1.SearchString}},
	}
	s, err := Compile(searchSpec(spec))
	if err != nil {
		t.Fatal(err)
	}
	search := s.Version("v1").Type("Book").Search
	texts, values, err := search.Project("books/one-two", []byte(`{"title": "a\u0002\u001fb", "parts": [{"text": "x"}, {"text": 3}, {"text": "y"}],
		"tags": ["t", 1, "u"], "spec": {"size": 9007199254740993.10, "more": 1}, "ok": true, "other": 7, "else": 1}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"one-two", "a  b", "x\ny", ""}; !slices.Equal(texts, want) {
		t.Errorf("texts %q, want %q", texts, want)
	}
	if want := `{"ok":true,"spec":{"size":9007199254740993.10},"tags":["t","u"]}`; string(values) != want {
		t.Errorf("values %s, want %s", values, want)
	}
	texts, _, err = search.Project("books/b", []byte(`{"title": "`+strings.Repeat("é", MaxSearchText)+`"}`))
	if err != nil || len(texts[1]) > MaxSearchText || !strings.HasSuffix(texts[1], "é") {
		t.Errorf("a long text is cut to %d bytes, %v", len(texts[1]), err)
	}
	spec.Fields[1].Weight = "C"
	other, err := Compile(searchSpec(spec))
	if err != nil || other.Version("v1").Type("Book").Search.Fingerprint == search.Fingerprint {
		t.Errorf("another declaration has the same fingerprint: %v", err)
	}
}
