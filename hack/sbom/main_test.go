package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

func TestDocument(t *testing.T) {
	info := &debug.BuildInfo{
		GoVersion: "go1.26.8 X:experiment", Path: "example.com/m/cmd/tool", Main: debug.Module{Path: "example.com/m", Version: "v1.2.3+dirty"},
		Deps: []*debug.Module{
			{Path: "example.com/z", Version: "v1.0.0", Sum: "h1:z"},
			{Path: "example.com/forked", Version: "v1.0.0", Sum: "h1:old", Replace: &debug.Module{Path: "example.com/fork", Version: "v1.0.1", Sum: "h1:new"}},
			{Path: "example.com/a", Version: "v0.0.0-2026", Sum: "h1:a"},
		},
		Settings: []debug.BuildSetting{{Key: "-trimpath", Value: "true"}, {Key: "-ldflags", Value: "-X main.home=/home/me"}, {Key: "CGO_ENABLED", Value: "0"}},
	}
	text, err := json.Marshal(document(info, "abc"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"bomFormat":"CycloneDX","specVersion":"1.6","version":1,"metadata":{"component":{"type":"application","bom-ref":"pkg:golang/example.com/m@v1.2.3+dirty","name":"tool",` +
		`"version":"v1.2.3+dirty","purl":"pkg:golang/example.com/m@v1.2.3+dirty","hashes":[{"alg":"SHA-256","content":"abc"}],"properties":[{"name":"go:build:-trimpath","value":"true"},` +
		`{"name":"go:build:CGO_ENABLED","value":"0"}]}},"components":[` +
		`{"type":"library","bom-ref":"pkg:golang/example.com/a@v0.0.0-2026","name":"example.com/a","version":"v0.0.0-2026","purl":"pkg:golang/example.com/a@v0.0.0-2026","properties":[{"name":"go:sum","value":"h1:a"}]},` +
		`{"type":"library","bom-ref":"pkg:golang/example.com/fork@v1.0.1","name":"example.com/fork","version":"v1.0.1","purl":"pkg:golang/example.com/fork@v1.0.1","properties":[{"name":"go:sum","value":"h1:new"}]},` +
		`{"type":"library","bom-ref":"pkg:golang/example.com/z@v1.0.0","name":"example.com/z","version":"v1.0.0","purl":"pkg:golang/example.com/z@v1.0.0","properties":[{"name":"go:sum","value":"h1:z"}]},` +
		`{"type":"library","bom-ref":"pkg:golang/stdlib@1.26.8","name":"stdlib","version":"1.26.8","purl":"pkg:golang/stdlib@1.26.8"}],` +
		`"dependencies":[{"ref":"pkg:golang/example.com/m@v1.2.3+dirty","dependsOn":["pkg:golang/example.com/a@v0.0.0-2026","pkg:golang/example.com/fork@v1.0.1","pkg:golang/example.com/z@v1.0.0","pkg:golang/stdlib@1.26.8"]}]}`
	if string(text) != want {
		t.Errorf("document = %s\nwant       %s", text, want)
	}
	slices.Reverse(info.Deps)
	again, err := json.Marshal(document(info, "abc"))
	if err != nil || !bytes.Equal(again, text) {
		t.Errorf("in another order: %s, %v", again, err)
	}
}

// A real binary, this test: the same bytes each time, and of a copy elsewhere.
func TestOfABinary(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "other-name")
	if err := os.WriteFile(elsewhere, content, 0o600); err != nil {
		t.Fatal(err)
	}
	var first, second bytes.Buffer
	if err := run([]string{self}, &first); err != nil {
		t.Fatal(err)
	}
	if err := run([]string{elsewhere}, &second); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("a copy of the binary has another bill of materials")
	}
	var b bom
	if err := json.Unmarshal(first.Bytes(), &b); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(b.Components, func(c component) bool {
		return c.Name == "stdlib" && strings.HasPrefix("go"+c.Version, strings.Fields(runtime.Version())[0])
	}) {
		t.Errorf("the standard library is missing: %+v", b.Components)
	}
	if err := run([]string{"main.go"}, &first); err == nil {
		t.Error("a file that is no binary was accepted")
	}
	if err := run(nil, &first); err == nil {
		t.Error("no argument was accepted")
	}
}
