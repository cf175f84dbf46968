package descriptor

import "testing"

func versions(t testing.TB) *Service {
	t.Helper()
	return service(t, `
service: secrets.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  resources:
  - {type: Project, plural: projects, patterns: ["projects/{project}"]}
  - {type: Secret, plural: secrets, patterns: ["projects/{project}/secrets/{secret}"], parent: Project, onParentDeleted: Block}
  - {type: Key, plural: keys, patterns: ["projects/{project}/keys/{key}"], parent: Project, onParentDeleted: Block}
  - {type: Device, plural: devices, patterns: ["devices/{device}"]}
  - {type: Old, plural: olds, patterns: ["olds/{old}"]}
- name: v2
  resources:
  - {type: Organization, plural: organizations, patterns: ["organizations/{organization}"]}
  - {type: Project, plural: projects, patterns: ["projects/{project}", "organizations/{organization}/projects/{project}"], parent: Organization, onParentDeleted: Block}
  - {type: Secret, plural: secrets, patterns: ["projects/{project}/[regions/{region}/]secrets/{secret}"], parent: Project, onParentDeleted: Block}
  - {type: Key, plural: keys, patterns: ["projects/{project}/regions/{region}/keys/{key}"], parent: Project, onParentDeleted: Block}
  - {type: Device, plural: machines, patterns: ["machines/{device}"]}
`)
}

// F8, spec 8.23.
func TestTranslate(t *testing.T) {
	for situation, tc := range map[string]struct {
		from, name, to, region string
		want                   string // empty: not expressible
	}{
		"same form":                                {"v1", "projects/p", "v2", "eu", "projects/p"},
		"same version":                             {"v2", "projects/p/regions/us/secrets/s", "v2", "eu", "projects/p/regions/us/secrets/s"},
		"renamed collection":                       {"v1", "devices/d", "v2", "eu", "machines/d"},
		"renamed collection, back":                 {"v2", "machines/d", "v1", "eu", "devices/d"},
		"of several patterns, the one that fits":   {"v2", "projects/p", "v1", "eu", "projects/p"},
		"of several patterns, one that is new":     {"v2", "organizations/o/projects/p", "v1", "eu", ""},
		"region becomes known":                     {"v1", "projects/p/keys/k", "v2", "eu", "projects/p/regions/eu/keys/k"},
		"region becomes known, and is none":        {"v1", "projects/p/keys/k", "v2", "", ""},
		"region left out, the default one":         {"v2", "projects/p/regions/eu/keys/k", "v1", "eu", "projects/p/keys/k"},
		"region left out, another one":             {"v2", "projects/p/regions/us/keys/k", "v1", "eu", ""},
		"region optional, absent":                  {"v1", "projects/p/secrets/s", "v2", "eu", "projects/p/secrets/s"},
		"region optional, absent, back":            {"v2", "projects/p/secrets/s", "v1", "eu", "projects/p/secrets/s"},
		"region optional, present: another secret": {"v2", "projects/p/regions/eu/secrets/s", "v1", "eu", ""},
		"type that is gone":                        {"v1", "olds/o", "v2", "eu", ""},
		"type that is new":                         {"v2", "organizations/o", "v1", "eu", ""},
	} {
		t.Run(situation, func(t *testing.T) {
			s := versions(t)
			n, err := s.Version(tc.from).ParseName(tc.name)
			if err != nil {
				t.Fatal(err)
			}
			got, ok := n.Translate(s.Version(tc.to), tc.region)
			if got.Full != tc.want || ok != (tc.want != "") {
				t.Fatalf("got %q, %t, want %q", got, ok, tc.want)
			}
			if !ok {
				return
			}
			if back, ok := got.Translate(s.Version(tc.from), tc.region); !ok || back.Full != tc.name {
				t.Errorf("and back: %q, %t", back, ok)
			}
		})
	}
}

func TestTranslateToAnotherService(t *testing.T) {
	n, err := versions(t).Version("v1").ParseName("projects/p")
	if err != nil {
		t.Fatal(err)
	}
	other := service(t, `
service: other.example.com
multiRegionPolicy: {enabledRegions: [eu], defaultControlRegion: eu}
versions: [{name: v1, resources: [{type: Project, plural: projects, patterns: ["projects/{project}"]}]}]
`)
	if got, ok := n.Translate(other.Version("v1"), "eu"); ok {
		t.Errorf("got %q of another service", got)
	}
	if got, ok := n.Translate(new(Version), "eu"); ok {
		t.Errorf("got %q of a version without types", got)
	}
}
