// Sbom writes the bill of materials of a Go binary as CycloneDX 1.6, from what the linker has put into the binary: the modules that are really in it, with
// their checksums, and how it was built. The same binary gives the same bytes.
//
//	go run ./hack/sbom bin/db-controller > db-controller.cdx.json
package main

import (
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"runtime/debug"
	"slices"
	"strings"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("want one argument, the path of a binary")
	}
	info, err := buildinfo.ReadFile(args[0])
	if err != nil {
		return fmt.Errorf("read build information of %s: %w", args[0], err)
	}
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return fmt.Errorf("read %s: %w", args[0], err)
	}
	e := json.NewEncoder(out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(document(info, hex.EncodeToString(hash.Sum(nil))))
}

// The parts of CycloneDX that are used here.
type bom struct {
	Format       string       `json:"bomFormat"`
	SpecVersion  string       `json:"specVersion"`
	Version      int          `json:"version"`
	Metadata     metadata     `json:"metadata"`
	Components   []component  `json:"components"`
	Dependencies []dependency `json:"dependencies"`
}

type metadata struct {
	Component component `json:"component"`
}

type component struct {
	Type       string     `json:"type"`
	Ref        string     `json:"bom-ref"`
	Name       string     `json:"name"`
	Version    string     `json:"version,omitempty"`
	PURL       string     `json:"purl"`
	Hashes     []hash     `json:"hashes,omitempty"`
	Properties []property `json:"properties,omitempty"`
}

type hash struct {
	Algorithm string `json:"alg"`
	Content   string `json:"content"`
}

type property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type dependency struct {
	Ref       string   `json:"ref"`
	DependsOn []string `json:"dependsOn"`
}

// told are the settings of a build that say something about what came out. Paths and flags with values of one machine are not among them.
var told = []string{"-buildmode", "-compiler", "-trimpath", "CGO_ENABLED", "GOARCH", "GOOS", "GOAMD64", "GOARM64", "vcs.revision", "vcs.modified"}

func document(info *debug.BuildInfo, sha256 string) bom {
	main := library(info.Main)
	main.Type, main.Name = "application", path.Base(info.Path)
	main.Hashes = []hash{{"SHA-256", sha256}}
	main.Properties = nil
	for _, s := range info.Settings {
		if slices.Contains(told, s.Key) {
			main.Properties = append(main.Properties, property{"go:build:" + s.Key, s.Value})
		}
	}
	slices.SortFunc(main.Properties, func(a, b property) int { return strings.Compare(a.Name, b.Name) })
	b := bom{Format: "CycloneDX", SpecVersion: "1.6", Version: 1, Metadata: metadata{main}}
	goVersion, _, _ := strings.Cut(strings.TrimPrefix(info.GoVersion, "go"), " ")
	b.Components = append(b.Components, library(debug.Module{Path: "stdlib", Version: goVersion}))
	for _, m := range info.Deps {
		if m.Replace != nil { // what is in the binary
			m = m.Replace
		}
		b.Components = append(b.Components, library(*m))
	}
	slices.SortFunc(b.Components, func(a, b component) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Version, b.Version))
	})
	all := dependency{Ref: main.Ref}
	for _, c := range b.Components {
		all.DependsOn = append(all.DependsOn, c.Ref)
	}
	slices.Sort(all.DependsOn)
	b.Dependencies = []dependency{all}
	return b
}

// library is a module. Its checksum is that of go.sum, which is no hash of one file.
func library(m debug.Module) component {
	c := component{Type: "library", Name: m.Path, Version: m.Version, PURL: "pkg:golang/" + escape(m.Path)}
	if m.Version != "" {
		c.PURL += "@" + url.PathEscape(m.Version)
	}
	if m.Sum != "" {
		c.Properties = []property{{"go:sum", m.Sum}}
	}
	c.Ref = c.PURL
	return c
}

// escape escapes the segments of a module's path.
func escape(p string) string {
	segments := strings.Split(p, "/")
	for i, s := range segments {
		segments[i] = url.PathEscape(s)
	}
	return strings.Join(segments, "/")
}
