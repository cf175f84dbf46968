package descriptor

import (
	"hash/fnv"
	"maps"
	"regexp"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParseName(t *testing.T) {
	for name, tc := range map[string]struct {
		in                                   string
		typ, id, parent, holder, region, col string
	}{
		"holder":                     {"projects/p", "Project", "p", "", "", "", "projects"},
		"holder below a holder":      {"organizations/o/projects/p", "Project", "p", "organizations/o", "organizations/o", "", "organizations/o/projects"},
		"without the region":         {"projects/p/secrets/s", "Secret", "s", "projects/p", "projects/p", "", "projects/p/secrets"},
		"with the region":            {"projects/p/regions/eu/secrets/s", "Secret", "s", "projects/p", "projects/p", "eu", "projects/p/regions/eu/secrets"},
		"global":                     {"folders/f", "Folder", "f", "", "", "", "folders"},
		"type below itself":          {"folders/f/folders/g", "Folder", "g", "folders/f", "", "", "folders/f/folders"},
		"ids with every character":   {"projects/-_.+~:A9/secrets/..x", "Secret", "..x", "projects/-_.+~:A9", "projects/-_.+~:A9", "", "projects/-_.+~:A9/secrets"},
		"longest id":                 {"folders/" + strings.Repeat("x", 255), "Folder", strings.Repeat("x", 255), "", "", "", "folders"},
		"id that looks like a name":  {"projects/secrets/secrets/projects", "Secret", "projects", "projects/secrets", "projects/secrets", "", "projects/secrets/secrets"},
		"id of two wildcards is one": {"folders/--", "Folder", "--", "", "", "", "folders"},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := secrets(t).ParseName(tc.in)
			if err != nil {
				t.Fatal(err)
			}
			region, hasRegion := n.Region()
			if n.Full != tc.in || n.Type.Name != tc.typ || n.ID() != tc.id || n.Parent() != tc.parent || n.HolderName() != tc.holder ||
				region != tc.region || hasRegion != (tc.region != "") || n.Collection() != tc.col {
				t.Errorf("got type %s id %s parent %q holder %q region %q collection %q, want %+v",
					n.Type.Name, n.ID(), n.Parent(), n.HolderName(), region, n.Collection(), tc)
			}
		})
	}
}

func TestParseNameRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ in, want string }{
		"empty":                   {"", "no pattern"},
		"collection":              {"folders", "no pattern"},
		"collection of a child":   {"projects/p/secrets", "no pattern"},
		"slash at the end":        {"folders/f/", "no pattern"},
		"slash at the beginning":  {"/folders/f", "no pattern"},
		"two slashes":             {"folders//f", "id \"\" of folders"},
		"empty id":                {"folders/", "id \"\" of folders"},
		"unknown collection":      {"files/f", "no pattern"},
		"pair that is no type":    {"projects/p/regions/eu", "no pattern"},
		"deeper than any pattern": {strings.Repeat("folders/f/", 60) + "folders/f", "no pattern"},
		"wildcard":                {"folders/-", "id \"-\""},
		"dot":                     {"folders/.", "id \".\""},
		"two dots":                {"projects/../secrets/s", "id \"..\""},
		"space":                   {"folders/a b", "id"},
		"percent":                 {"folders/a%2fb", "id"},
		"control character":       {"folders/a\x00", "id"},
		"invalid UTF-8":           {"folders/\xff", "id"},
		"letter beyond ASCII":     {"folders/é", "id"},
		"id too long":             {"folders/" + strings.Repeat("x", 256), "id"},
		"name too long":           {"folders/" + strings.Repeat("x", 1100), "1108 bytes"},
		"region in capitals":      {"projects/p/regions/EU/secrets/s", "region \"EU\""},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := secrets(t).ParseName(tc.in)
			if err == nil || !strings.Contains(err.Error(), tc.want) || n != (Name{}) {
				t.Errorf("ParseName(%q) = %v, %v, want an error with %q", tc.in, n.Full, err, tc.want)
			}
			if len(err.Error()) > 500 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestParseCollection(t *testing.T) {
	for name, tc := range map[string]struct {
		in, typ, prefix, parent string
		exact                   bool
		match, other            string // names inside and outside
	}{
		"top level": {"projects", "Project", "projects/", "", true, "projects/p", "organizations/o/projects/p"},
		"children":  {"projects/p/secrets", "Secret", "projects/p/secrets/", "projects/p", true, "projects/p/secrets/s", "projects/p2/secrets/s"},
		"children by region": {"projects/p/regions/eu/secrets", "Secret", "projects/p/regions/eu/secrets/", "projects/p/regions/eu", true,
			"projects/p/regions/eu/secrets/s", "projects/p/secrets/s"},
		"of every parent":        {"projects/-/secrets", "Secret", "projects/", "projects/-", false, "projects/p/secrets/s", "projects/p/regions/eu/secrets/s"},
		"of every region":        {"projects/p/regions/-/secrets", "Secret", "projects/p/regions/", "projects/p/regions/-", false, "projects/p/regions/eu/secrets/s", "projects/q/regions/eu/secrets/s"},
		"fixed after wildcard":   {"projects/-/regions/eu/secrets", "Secret", "projects/", "projects/-/regions/eu", false, "projects/p/regions/eu/secrets/s", "projects/p/regions/us/secrets/s"},
		"of a type below itself": {"folders", "Folder", "folders/", "", false, "folders/f", "folders/f/folders/g"},
		"id with meaning":        {"projects/a.c+/secrets", "Secret", "projects/a.c+/secrets/", "projects/a.c+", true, "projects/a.c+/secrets/s", "projects/abcc/secrets/s"},
	} {
		t.Run(name, func(t *testing.T) {
			v := secrets(t)
			c, err := v.ParseCollection(tc.in)
			if err != nil {
				t.Fatal(err)
			}
			if c.Path != tc.in || c.Type.Name != tc.typ || c.Prefix != tc.prefix || c.Exact != tc.exact || c.Parent() != tc.parent {
				t.Errorf("got %+v, want %+v", c, tc)
			}
			for in, want := range map[string]bool{tc.match: true, tc.other: false} {
				n, err := v.ParseName(in)
				if err != nil {
					t.Fatal(err)
				}
				if got := c.Match(n); got != want {
					t.Errorf("Match(%s) = %v", in, got)
				}
				if got := regexp.MustCompile(c.Regexp()).MatchString(in); got != want {
					t.Errorf("%s matches %s: %v", c.Regexp(), in, got)
				}
				if want && !strings.HasPrefix(in, c.Prefix) {
					t.Errorf("%s does not begin with %s", in, c.Prefix)
				}
			}
		})
	}
	for _, in := range []string{"", "secrets", "projects/p", "projects/p/regions", "projects/ /secrets", "projects//secrets", "projects/p/secrets/", strings.Repeat("x", 2000)} {
		if c, err := secrets(t).ParseCollection(in); err == nil {
			t.Errorf("ParseCollection(%q) = %+v", in, c)
		}
	}
	c, _ := secrets(t).ParseCollection("projects/p/secrets")
	if n, err := c.NameOf("s"); err != nil || n.Full != "projects/p/secrets/s" {
		t.Errorf("NameOf: %v, %v", n, err)
	}
	folders, _ := secrets(t).ParseCollection("folders")
	if n, err := folders.NameOf("f/folders/g"); err == nil {
		t.Errorf("NameOf took an id with a slash: %v", n)
	}
}

func TestBuildName(t *testing.T) {
	secret := secrets(t).Type("Secret")
	for name, tc := range map[string]struct {
		vars map[string]string
		want string
	}{
		"without the region":                  {map[string]string{"project": "p", "secret": "s"}, "projects/p/secrets/s"},
		"with the region":                     {map[string]string{"project": "p", "secret": "s", "region": "eu"}, "projects/p/regions/eu/secrets/s"},
		"missing variable":                    {map[string]string{"project": "p"}, ""},
		"other variable":                      {map[string]string{"project": "p", "file": "s"}, ""},
		"id with a slash":                     {map[string]string{"project": "p", "secret": "s/t"}, ""},
		"id that is a way out of the pattern": {map[string]string{"project": "p/regions/eu", "secret": "s"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := secret.BuildName(tc.vars)
			if got != tc.want || (err != nil) != (tc.want == "") {
				t.Errorf("BuildName = %q, %v, want %q", got, err, tc.want)
			}
		})
	}
}

var anyID = rapid.StringMatching(`[A-Za-z0-9_.+~:-]{1,40}`).Filter(validID)

func anyName(t *rapid.T, v *Version) (typ *Type, vars map[string]string) {
	typ = rapid.SampledFrom(v.Types).Draw(t, "type")
	p := rapid.SampledFrom(typ.patterns).Draw(t, "pattern")
	vars = map[string]string{}
	for _, name := range p.vars {
		if name == regionVar {
			vars[name] = rapid.SampledFrom([]string{"eu", "us", "a-1"}).Draw(t, name)
		} else {
			vars[name] = anyID.Draw(t, name)
		}
	}
	return typ, vars
}

// What is built is parsed into what it was built from, and is a member of its collections.
func TestParseOfBuildIsIdentity(t *testing.T) {
	v := secrets(t)
	rapid.Check(t, func(t *rapid.T) {
		typ, vars := anyName(t, v)
		full, err := typ.BuildName(vars)
		if err != nil {
			t.Fatalf("BuildName(%v): %v", vars, err)
		}
		n, err := v.ParseName(full)
		if err != nil || n.Type != typ || !maps.Equal(n.Vars(), vars) {
			t.Fatalf("ParseName(%s) = %s %v, %v, want %s %v", full, n.Type.Name, n.Vars(), err, typ.Name, vars)
		}
		for _, ancestor := range []string{n.Parent(), n.HolderName()} {
			if ancestor == "" {
				continue
			}
			if _, err := v.ParseName(ancestor); err != nil || !strings.HasPrefix(full, ancestor+"/") {
				t.Fatalf("ancestor %s of %s: %v", ancestor, full, err)
			}
		}
		for _, wildcard := range []bool{false, true} {
			path := n.Collection()
			if segments := strings.Split(path, "/"); wildcard && len(segments) > 1 {
				segments[1] = Wildcard
				path = strings.Join(segments, "/")
			}
			c, err := v.ParseCollection(path)
			if err != nil || c.Type != typ || !c.Match(n) || !strings.HasPrefix(full, c.Prefix) || !regexp.MustCompile(c.Regexp()).MatchString(full) {
				t.Fatalf("collection %s of %s: %+v, %v", path, full, c, err)
			}
		}
	})
}

func FuzzParseName(f *testing.F) {
	v := secrets(f)
	for _, seed := range []string{"", "/", "folders/f", "projects/p/regions/eu/secrets/s", "folders/-", "folders/\x00", "folders/f/folders/", "projects/../secrets/s", "folders/\xff"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		n, err := v.ParseName(in)
		if err != nil {
			if n != (Name{}) {
				t.Errorf("an error and a name: %+v", n)
			}
			return
		}
		if got, err := n.Type.BuildName(n.Vars()); err != nil || got != in {
			t.Errorf("BuildName of %q = %q, %v", in, got, err)
		}
		if n.Collection()+"/"+n.ID() != in {
			t.Errorf("collection %q and id %q of %q", n.Collection(), n.ID(), in)
		}
	})
}

// The shard is part of the stored format, and other languages must compute the same.
func TestShard(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name, ring := rapid.String().Draw(t, "name"), rapid.IntRange(1, 65536).Draw(t, "ring")
		h := fnv.New64a()
		h.Write([]byte(name))
		if got, want := Shard(name, ring), int(h.Sum64()%uint64(ring)); got != want {
			t.Fatalf("Shard(%q, %d) = %d, want %d", name, ring, got, want)
		}
	})
}

func TestParseNameDoesNotAllocate(t *testing.T) {
	v := packages(t)
	if got := testing.AllocsPerRun(100, func() {
		n, _ := v.ParseName("sections/admin/packages/apt")
		_, _ = n.HolderName(), Shard(n.Full, 4096)
	}); got != 0 {
		t.Errorf("ParseName allocates %v times", got)
	}
}

func BenchmarkParseName(b *testing.B) {
	v := packages(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.ParseName("sections/admin/packages/libreoffice-common"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkShard(b *testing.B) {
	for b.Loop() {
		Shard("sections/admin/packages/libreoffice-common", 4096)
	}
}
