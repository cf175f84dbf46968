package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// The resources of config/samples/packages.yaml.
type (
	section struct {
		Name   string `json:"name"`
		Title  string `json:"title"`
		Policy policy `json:"multiRegionPolicy"`
	}
	policy struct {
		EnabledRegions       []string `json:"enabledRegions"`
		DefaultControlRegion string   `json:"defaultControlRegion"`
	}
	maintainer struct {
		Name  string `json:"name"`
		Title string `json:"title,omitempty"`
		Email string `json:"email,omitempty"`
	}
	source struct {
		Name  string `json:"name"`
		Title string `json:"title"`
	}
	debPackage struct {
		Name            string    `json:"name"`
		Metadata        *metadata `json:"metadata,omitempty"`
		Version         string    `json:"version"`
		Architecture    string    `json:"architecture,omitempty"`
		Priority        string    `json:"priority,omitempty"`
		Essential       bool      `json:"essential,omitempty"`
		Homepage        string    `json:"homepage,omitempty"`
		Description     string    `json:"description,omitempty"`
		InstalledSizeKb int64     `json:"installedSizeKb,omitempty"`
		SizeBytes       int64     `json:"sizeBytes,omitempty"`
		Filename        string    `json:"filename,omitempty"`
		SHA256          string    `json:"sha256,omitempty"`
		Source          string    `json:"source"`
		Maintainer      string    `json:"maintainer,omitempty"`
		Depends         []string  `json:"depends,omitempty"`
		PreDepends      []string  `json:"preDepends,omitempty"`
		Recommends      []string  `json:"recommends,omitempty"`
		Suggests        []string  `json:"suggests,omitempty"`
		Tags            []string  `json:"tags,omitempty"`
	}
	// metadata has, for each field with dependencies, fieldText: the field as it is in the index, and for those that become references,
	// fieldVirtual: the clauses that no package of the output satisfies.
	metadata struct {
		Annotations map[string]string `json:"annotations"`
	}
)

// counts is what was written.
type counts struct {
	Sections, Maintainers, Sources, Packages int
	// References of packages to packages, and how many of them lead to a package that only provides what was asked for.
	References, Provided int
	// Virtual are clauses that no package satisfies.
	Virtual int
	// Skipped packages have names that cannot be an id.
	Skipped int
}

func (c counts) String() string {
	return fmt.Sprintf("%d sections, %d maintainers, %d sources, %d packages; %d references between packages (%d to providers), %d dependencies without a package, %d packages skipped",
		c.Sections, c.Maintainers, c.Sources, c.Packages, c.References, c.Provided, c.Virtual, c.Skipped)
}

// writer makes packages; what is in names is in the output, too.
type writer struct {
	counts
	names     map[string]string   // of the package resources, by package
	providers map[string][]string // of what a package provides, in the order of their names
}

// writeResources writes the resources of the packages, of the first limit by name unless it is 0.
func writeResources(out io.Writer, packages map[string]*stanza, limit int) (counts, error) {
	w := &writer{names: map[string]string{}, providers: map[string][]string{}}
	var taken []*stanza
	sections, sources := map[string]string{}, map[string]string{}
	maintainers := map[string]maintainer{}
	for _, name := range slices.Sorted(maps.Keys(packages)) {
		if limit > 0 && len(taken) == limit {
			break
		}
		p := packages[name]
		if !idForm.MatchString(name) || !idForm.MatchString(p.source()) {
			w.Skipped++
			continue
		}
		taken = append(taken, p)
		w.names[name] = p.sectionName() + "/packages/" + name
		for _, c := range parseClauses(p.fields["Provides"]) {
			w.providers[c.alternatives[0]] = append(w.providers[c.alternatives[0]], name)
		}
		if _, ok := sections[p.sectionName()]; !ok {
			sections[p.sectionName()] = p.fields["Section"]
		}
		sources["sources/"+p.source()] = p.source()
		if m := p.maintainer(); m.Name != "" && maintainers[m.Name].Name == "" {
			maintainers[m.Name] = m
		}
	}

	lines := json.NewEncoder(out)
	lines.SetEscapeHTML(false)
	for _, name := range slices.Sorted(maps.Keys(sections)) {
		w.Sections++
		if err := lines.Encode(section{name, cmp.Or(sections[name], "no section"), policyOf(name)}); err != nil {
			return w.counts, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(maintainers)) {
		w.Maintainers++
		if err := lines.Encode(maintainers[name]); err != nil {
			return w.counts, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(sources)) {
		w.Sources++
		if err := lines.Encode(source{name, sources[name]}); err != nil {
			return w.counts, err
		}
	}
	for _, p := range taken {
		w.Packages++
		if err := lines.Encode(w.resource(p)); err != nil {
			return w.counts, err
		}
	}
	return w.counts, nil
}

// regionSets are the places that sections live in.
var regionSets = [...][]string{{"ap", "eu", "us"}, {"eu", "us"}, {"ap", "eu"}, {"eu"}}

func policyOf(section string) policy {
	h := fnv.New32a()
	_, _ = h.Write([]byte(section)) // never fails
	return policy{regionSets[h.Sum32()%uint32(len(regionSets))], "eu"}
}

// idForm is what an id of a name may be; "-" alone would be every parent.
var idForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.+~:-]{0,254}$`)

// notID is what may not be in an id.
var notID = regexp.MustCompile(`[^A-Za-z0-9_.+~:-]+`)

// sectionName returns the resource of the section; non-free/libs becomes sections/non-free-libs.
func (p *stanza) sectionName() string {
	id := strings.Trim(notID.ReplaceAllString(p.fields["Section"], "-"), "-.")
	return "sections/" + cmp.Or(id, "none")
}

// source returns the name of the source; without the field it is that of the package.
func (p *stanza) source() string {
	name, _, _ := strings.Cut(p.fields["Source"], " ") // a version may follow
	return cmp.Or(name, p.name)
}

// address is one person of a list: Name <address>.
var address = regexp.MustCompile(`^\s*"?([^<]*?)"?\s*<\s*([^<>@\s]+@[^<>@\s]+)\s*>`)

// maintainer returns the (first) maintainer, whose id is made of the address; a zero one if there is none.
func (p *stanza) maintainer() maintainer {
	m := address.FindStringSubmatch(p.fields["Maintainer"])
	if m == nil {
		return maintainer{}
	}
	email := strings.ToLower(m[2])
	id := notID.ReplaceAllString(strings.ReplaceAll(email, "@", "-at-"), "-")
	if !idForm.MatchString(id) {
		return maintainer{}
	}
	return maintainer{"maintainers/" + id, limited(m[1], 256), limited(email, 320)}
}

var sha256Form = regexp.MustCompile(`^[0-9a-f]{64}$`)

// resource returns the package. Fields that the schema would refuse are left out or cut.
func (w *writer) resource(p *stanza) debPackage {
	r := debPackage{
		Name:         w.names[p.name],
		Version:      limited(p.version, 256),
		Architecture: limited(p.fields["Architecture"], 64),
		Priority:     limited(p.fields["Priority"], 64),
		Essential:    p.fields["Essential"] == "yes",
		Homepage:     limited(p.fields["Homepage"], 2048),
		Description:  limited(p.fields["Description"], 65536),
		Filename:     limited(p.fields["Filename"], 4096),
		Source:       "sources/" + p.source(),
		Maintainer:   p.maintainer().Name,
	}
	r.InstalledSizeKb = size(p.fields["Installed-Size"])
	r.SizeBytes = size(p.fields["Size"])
	if sum := p.fields["SHA256"]; sha256Form.MatchString(sum) {
		r.SHA256 = sum
	}
	for tag := range strings.SplitSeq(p.fields["Tag"], ",") {
		if tag = strings.TrimSpace(tag); tag != "" && len(r.Tags) < 256 {
			r.Tags = append(r.Tags, limited(tag, 256))
		}
	}
	annotations := map[string]string{}
	for _, f := range []struct {
		field, key string
		references *[]string
	}{
		{"Depends", "depends", &r.Depends},
		{"Pre-Depends", "preDepends", &r.PreDepends},
		{"Recommends", "recommends", &r.Recommends},
		{"Suggests", "suggests", &r.Suggests},
		{"Enhances", "enhances", nil},
		{"Conflicts", "conflicts", nil},
		{"Breaks", "breaks", nil},
		{"Replaces", "replaces", nil},
		{"Provides", "provides", nil},
	} {
		text := strings.Join(strings.Fields(p.fields[f.field]), " ")
		if text == "" {
			continue
		}
		annotations[f.key+"Text"] = annotation(text)
		if f.references == nil {
			continue
		}
		var virtual []string
		*f.references, virtual = w.references(p, text)
		if len(virtual) > 0 {
			annotations[f.key+"Virtual"] = annotation(strings.Join(virtual, ", "))
		}
	}
	if len(annotations) > 0 {
		r.Metadata = &metadata{annotations}
	}
	return r
}

// references returns the resources that satisfy the clauses of a field of p, each once, and the clauses that none does.
func (w *writer) references(p *stanza, field string) (names, virtual []string) {
	seen := map[string]bool{p.name: true} // a package that provides what it asks for needs no reference to itself
	for _, c := range parseClauses(field) {
		target, provided := w.target(c)
		switch {
		case target == "":
			w.Virtual++
			virtual = append(virtual, c.text)
		case !seen[target]:
			seen[target] = true
			w.References++
			if provided {
				w.Provided++
			}
			names = append(names, w.names[target])
		}
	}
	return names, virtual
}

// target returns the first alternative that is a package, else the first provider of the first that has one, else nothing.
func (w *writer) target(c clause) (name string, provided bool) {
	for _, a := range c.alternatives {
		if _, ok := w.names[a]; ok {
			return a, false
		}
	}
	for _, a := range c.alternatives {
		if providers := w.providers[a]; len(providers) > 0 {
			return providers[0], true
		}
	}
	return "", false
}

func size(field string) int64 {
	n, err := strconv.ParseInt(field, 10, 64)
	if err != nil || n < 0 {
		return 0 // no size is known
	}
	return n
}

// annotation cuts s to the bytes that the value of an annotation may have.
func annotation(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), 64<<10)], "")
}

// limited cuts s to n characters.
func limited(s string, n int) string {
	if len(s) <= n {
		return s
	}
	if r := []rune(s); len(r) > n {
		return string(r[:n])
	}
	return s
}
