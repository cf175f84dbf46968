package descriptor

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

func TestValidateBody(t *testing.T) {
	v := packages(t)
	deep := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	for name, tc := range map[string]struct {
		typ, in string
		want    string // violations, a line each; only their beginnings
	}{
		"minimal":                          {"Package", `{"version":"1"}`, ""},
		"with references":                  {"Package", `{"version":"1","depends":["sections/libs/packages/libc6"],"source":"sources/apt","maintainer":"maintainers/deity"}`, ""},
		"reference that is null":           {"Package", `{"version":"1","tags":[]}`, ""},
		"required field missing":           {"Package", `{}`, "version: is required"},
		"empty text":                       {"Package", ``, "the body is not valid JSON"},
		"no object":                        {"Package", `[]`, "the body must be a JSON object"},
		"null":                             {"Package", `null`, "the body must be a JSON object"},
		"two values":                       {"Package", `{"version":"1"} {}`, "the body is not valid JSON"},
		"half an object":                   {"Package", `{"version":"1"`, "the body is not valid JSON"},
		"invalid UTF-8":                    {"Package", "{\"version\":\"\xff\"}", "the body is not valid UTF-8"},
		"key twice":                        {"Package", `{"version":"1","version":"2"}`, "version: occurs twice"},
		"key twice when unescaped":         {"Package", `{"version":"1","v\u0065rsion":"2"}`, "version: occurs twice"},
		"key with other capitals":          {"Package", `{"version":"1","Version":"2"}`, "Version: is not a field of the schema"},
		"name":                             {"Package", `{"version":"1","name":"x"}`, "name: is not a field of the body"},
		"metadata":                         {"Package", `{"version":"1","metadata":{}}`, "metadata: is not a field of the body"},
		"unknown field":                    {"Package", `{"version":"1","vers":"2"}`, "vers: is not a field of the schema"},
		"wrong type":                       {"Package", `{"version":1}`, "version: must be of type string"},
		"number below its minimum":         {"Package", `{"version":"1","sizeBytes":-1}`, "sizeBytes: should be greater"},
		"not the pattern":                  {"Package", `{"version":"1","sha256":"abc"}`, "sha256: should match"},
		"NUL":                              {"Package", `{"version":"1\u0000"}`, "the escape at byte 13 is NUL"},
		"escaped backslash and u":          {"Package", `{"version":"1\\u0000"}`, ""},
		"surrogate pair":                   {"Package", `{"version":"\ud83d\ude00"}`, ""},
		"half a pair":                      {"Package", `{"version":"\ud83d"}`, "the escape at byte 12 is half"},
		"half a pair and text":             {"Package", `{"version":"\ud83dxxxxxx"}`, "the escape at byte 12 is half"},
		"second half first":                {"Package", `{"version":"\ude00\ud83d"}`, "the escape at byte 12 is half"},
		"escape cut short":                 {"Package", `{"version":"\ud8`, "the body is not valid JSON"},
		"number too large":                 {"Package", `{"version":"1","sizeBytes":1e999}`, "the body is not valid JSON"},
		"number with an exponent too long": {"Package", `{"version":"1","sizeBytes":1e-99999}`, "the number at byte 27 has an exponent"},
		"number of many digits":            {"Package", `{"version":"1","sizeBytes":` + strings.Repeat("1", 129) + `}`, "the number at byte 27 has more than 128 digits"},
		"too deep":                         {"Package", `{"version":` + deep(64) + `}`, "the body is nested deeper than 64"},
		"too large":                        {"Package", `{"version":"` + strings.Repeat("x", 256<<10) + `"}`, "the body has 262158 bytes, a Package may have 262144"},
		"reference to another type":        {"Package", `{"version":"1","source":"maintainers/x"}`, "source: must be the name of a Source (sources/{source}): it is the name of a Maintainer"},
		"reference that is no name":        {"Package", `{"version":"1","depends":["sections/libs/packages/libc6","libc6"]}`, "depends[1]: must be the name of a Package (sections/{section}/packages/{package}): it matches no pattern"},
		"reference that is empty":          {"Package", `{"version":"1","source":""}`, "source: must be the name"},
		"reference that is a number":       {"Package", `{"version":"1","source":7}`, "source: must be of type string"},
		"list that is no list":             {"Package", `{"version":"1","depends":"x"}`, "depends: must be of type array"},
		"several faults":                   {"Package", `{"depends":["x","y"],"z":1}`, "depends[0]: must be\ndepends[1]: must be\nversion: is required\nz: is not"},
		"policy":                           {"Section", `{"multiRegionPolicy":{"enabledRegions":["eu"],"defaultControlRegion":"eu"}}`, ""},
		"policy missing":                   {"Section", `{}`, "multiRegionPolicy: is required"},
		"policy that is no object":         {"Section", `{"multiRegionPolicy":"eu"}`, "multiRegionPolicy: must be of type object"},
		"policy that is wrong":             {"Section", `{"multiRegionPolicy":{"enabledRegions":["eu"],"defaultControlRegion":"us"}}`, "multiRegionPolicy.defaultControlRegion: Invalid value"},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, v := range v.Type(tc.typ).ValidateBody([]byte(tc.in)) {
				got = append(got, v.String())
			}
			var want []string
			if tc.want != "" {
				want = strings.Split(tc.want, "\n")
			}
			ok := len(got) == len(want)
			for i := range want {
				ok = ok && strings.HasPrefix(got[i], want[i])
			}
			if !ok {
				t.Errorf("violations:\n%s\nwant:\n%s", strings.Join(got, "\n"), tc.want)
			}
		})
	}
}

// Without a schema the engine's own rules still hold.
func TestValidateBodyWithoutSchema(t *testing.T) {
	v := secrets(t)
	for in, want := range map[string]string{
		`{"anything":{"at":["all"]}}`:                     "",
		`{"owner":"users/u"}`:                             "",
		`{"owner":"users"}`:                               "owner: must be the name of a iam.example.com/User",
		`{"owner":7}`:                                     "owner: must be a string",
		`{"owner":null,"uses":null}`:                      "",
		`{"uses":[{"secret":"projects/p/secrets/s"},{}]}`: "",
		`{"uses":[{"secret":"projects/p"}]}`:              "uses[0].secret: must be the name of a Secret",
		`{"uses":["x"]}`:                                  "uses[0]: must be an object",
		`{"uses":{}}`:                                     "uses: must be a list",
	} {
		violations := v.Type("Secret").ValidateBody([]byte(in))
		if want == "" && len(violations) > 0 || want != "" && (len(violations) != 1 || !strings.HasPrefix(violations[0].String(), want)) {
			t.Errorf("%s: %v, want %q", in, violations, want)
		}
	}
}

func TestValidateBodyBoundsItsAnswer(t *testing.T) {
	body := `{"version":"1","depends":["` + strings.Repeat(`x","`, 1000) + `x"]}`
	if got := len(packages(t).Type("Package").ValidateBody([]byte(body))); got != maxViolations {
		t.Errorf("%d violations", got)
	}
}

func TestReferences(t *testing.T) {
	refs, err := packages(t).Type("Package").References([]byte(
		`{"version":"1","recommends":["sections/a/packages/r"],"depends":["sections/a/packages/d0",null,"sections/a/packages/d2"],"source":"sources/s"}`))
	if err != nil {
		t.Fatal(err)
	}
	const service = "packages.example.com"
	want := []Ref{
		{"source", service, service + "/Source", "sources/s", v1alpha1.DeleteCascade},
		{"depends[0]", service, service + "/Package", "sections/a/packages/d0", v1alpha1.DeleteBlock},
		{"depends[2]", service, service + "/Package", "sections/a/packages/d2", v1alpha1.DeleteBlock},
		{"recommends[0]", service, service + "/Package", "sections/a/packages/r", v1alpha1.DeleteUnset},
	}
	if len(refs) != len(want) {
		t.Fatalf("References = %+v", refs)
	}
	for i := range want {
		if refs[i] != want[i] {
			t.Errorf("reference %d = %+v, want %+v", i, refs[i], want[i])
		}
	}
	refs, err = secrets(t).Type("Secret").References([]byte(`{"uses":[{},{"secret":"projects/p/secrets/s"}],"owner":"users/u"}`))
	if err != nil || len(refs) != 2 || refs[0].TargetService != "iam.example.com" || refs[1].FieldPath != "uses[1].secret" {
		t.Errorf("References = %+v, %v", refs, err)
	}
	if _, err := secrets(t).Type("Secret").References([]byte(`[`)); err == nil {
		t.Error("References of no JSON succeeded")
	}
}

func TestPolicyOf(t *testing.T) {
	project := secrets(t).Type("Project")
	p, violations := project.PolicyOf([]byte(`{"spec":{"policy":{"enabledRegions":["us","eu"],"defaultControlRegion":"us"}}}`))
	if len(violations) > 0 || p.DefaultControlRegion() != "us" || strings.Join(p.EnabledRegions(), " ") != "eu us" {
		t.Errorf("PolicyOf = %+v, %v", p, violations)
	}
	for in, want := range map[string]string{
		`{}`:          "spec.policy: is required",
		`{"spec":[]}`: "spec.policy: is required",
		`{"spec":{"policy":{"enabledRegions":["eu"],"defaultControlRegion":"us"}}}`: "spec.policy.defaultControlRegion",
		`{"spec":{"policy":{"enabledRegions":["eu"],"x":1}}}`:                       "spec.policy: must be a MultiRegionPolicy",
		`[`: "the body is not valid JSON",
	} {
		if p, violations := project.PolicyOf([]byte(in)); p != nil || len(violations) == 0 || !strings.HasPrefix(violations[0].String(), want) {
			t.Errorf("PolicyOf(%s) = %v, %v, want %q", in, p, violations, want)
		}
	}
	if _, violations := secrets(t).Type("Secret").PolicyOf([]byte(`{}`)); len(violations) == 0 {
		t.Error("a Secret has a policy")
	}
}

// Whatever the bytes, there is an answer; and what is accepted can be decoded, and its references are names.
func FuzzValidateBody(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `[]`, `{"version":"1"}`, `{"version":"\ud83d"}`, `{"version":"\u0000"}`, `{"version":"\`, `{"version":"\u`, `{"a":1e99999}`, `"`,
		`{"version":"1","depends":["sections/a/packages/b",null,{}]}`, `{"version":"1","version":"2"}`, "{\"version\":\"\xff\"}", strings.Repeat("[", 100),
	} {
		f.Add([]byte(seed))
	}
	v := packages(f)
	typ := v.Type("Package")
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(typ.ValidateBody(body)) > 0 {
			return
		}
		var object map[string]any
		if err := json.Unmarshal(body, &object); err != nil || object == nil || !utf8.Valid(body) {
			t.Fatalf("accepted %q: %v", body, err)
		}
		refs, err := typ.References(body)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range refs {
			if n, err := v.ParseName(r.Name); err != nil || n.Type.FullName != r.TargetType {
				t.Errorf("reference %+v: %v", r, err)
			}
		}
	})
}

func BenchmarkValidateBody(b *testing.B) {
	typ := packages(b).Type("Package")
	body := []byte(`{"version":"2.6.1","architecture":"amd64","priority":"important","description":"commandline package manager","sizeBytes":1378896,
		"source":"sources/apt","maintainer":"maintainers/deity","depends":["sections/libs/packages/libc6","sections/libs/packages/libapt-pkg6.0","sections/admin/packages/adduser"],
		"recommends":["sections/misc/packages/ca-certificates"]}`)
	b.ReportAllocs()
	for b.Loop() {
		if v := typ.ValidateBody(body); len(v) > 0 {
			b.Fatal(v)
		}
	}
}
