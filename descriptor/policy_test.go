package descriptor

import (
	"slices"
	"strings"
	"testing"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

func policy(t *testing.T, p v1alpha1.MultiRegionPolicy) *Policy {
	t.Helper()
	out, faults := NewPolicy(&p, nil)
	if len(faults) > 0 {
		t.Fatal(faults.ToAggregate())
	}
	return out
}

const acme = "acme.example.com/"

// Policies that people write, and what they mean.
func TestPolicy(t *testing.T) {
	type criteria = []v1alpha1.DisabledSyncCriterion
	for name, tc := range map[string]struct {
		enabled  []string
		criteria criteria
		fqn      string
		owner    string
		syncing  string // regions
		readers  string // of eu, us, ap, sa: those that may read
	}{
		"no criteria: every enabled region":               {[]string{"us", "eu", "ap"}, nil, acme + "Doc", "eu", "ap eu us", "eu us ap"},
		"owner not enabled: not added, but reads its own": {[]string{"us", "ap"}, nil, acme + "Doc", "eu", "ap us", "eu us ap"},
		"1 nothing is ever copied":                        {[]string{"eu", "us"}, criteria{{}}, acme + "Doc", "eu", "eu", "eu"},
		"2 a type is not copied":                          {[]string{"eu", "us"}, criteria{{ResourceTypeName: acme + "Log"}}, acme + "Log", "us", "us", "us"},
		"2 other types are":                               {[]string{"eu", "us"}, criteria{{ResourceTypeName: acme + "Log"}}, acme + "Doc", "us", "eu us", "eu us"},
		"3 nothing leaves a region":                       {[]string{"eu", "us", "ap"}, criteria{{SourceRegion: "eu"}}, acme + "Doc", "eu", "eu", "eu"},
		"3 what others own reaches it":                    {[]string{"eu", "us", "ap"}, criteria{{SourceRegion: "eu"}}, acme + "Doc", "us", "ap eu us", "eu us ap"},
		"4 nothing reaches a region":                      {[]string{"eu", "us", "ap"}, criteria{{DestRegion: "ap"}}, acme + "Doc", "eu", "eu us", "eu us"},
		"4 it still has its own":                          {[]string{"eu", "us", "ap"}, criteria{{DestRegion: "ap"}}, acme + "Doc", "ap", "ap eu us", "eu us ap"},
		"5 a type does not go one way":                    {[]string{"eu", "us", "ap"}, criteria{{ResourceTypeName: acme + "Doc", SourceRegion: "eu", DestRegion: "us"}}, acme + "Doc", "eu", "ap eu", "eu ap"},
		"5 it goes the other way":                         {[]string{"eu", "us", "ap"}, criteria{{ResourceTypeName: acme + "Doc", SourceRegion: "eu", DestRegion: "us"}}, acme + "Doc", "us", "ap eu us", "eu us ap"},
		"several criteria add up":                         {[]string{"eu", "us", "ap"}, criteria{{DestRegion: "ap"}, {SourceRegion: "eu", DestRegion: "us"}}, acme + "Doc", "eu", "eu", "eu"},
	} {
		t.Run(name, func(t *testing.T) {
			p := policy(t, v1alpha1.MultiRegionPolicy{EnabledRegions: tc.enabled, DefaultControlRegion: tc.enabled[0], CriteriaForDisabledSync: tc.criteria})
			if got := strings.Join(p.SyncingRegions(tc.fqn, tc.owner), " "); got != tc.syncing {
				t.Errorf("SyncingRegions = %s, want %s", got, tc.syncing)
			}
			var readers []string
			for _, dest := range []string{"eu", "us", "ap", "sa"} {
				if p.CanRead(dest, tc.owner, tc.fqn) {
					readers = append(readers, dest)
				}
				if got, want := p.CanCreateIn(dest), slices.Contains(tc.enabled, dest); got != want {
					t.Errorf("CanCreateIn(%s) = %v", dest, got)
				}
			}
			if got := strings.Join(readers, " "); got != tc.readers {
				t.Errorf("CanRead: %s, want %s", got, tc.readers)
			}
		})
	}
}

func TestRegionsFor(t *testing.T) {
	p := policy(t, v1alpha1.MultiRegionPolicy{
		EnabledRegions: []string{"us", "eu", "ap"}, DefaultControlRegion: "us",
		CriteriaForDisabledSync: []v1alpha1.DisabledSyncCriterion{{DestRegion: "ap"}},
	})
	for name, tc := range map[string]struct {
		sync          v1alpha1.SyncType
		under, global string
	}{
		"default":         {v1alpha1.SyncDefault, "eu us", "*"},
		"always in scope": {v1alpha1.SyncAlwaysInScope, "ap eu us", "*"},
		"never":           {v1alpha1.SyncNever, "eu", "eu"},
		"globally":        {v1alpha1.SyncAlwaysGlobally, "*", "*"},
	} {
		t.Run(name, func(t *testing.T) {
			typ := &Type{FullName: acme + "Doc", SyncType: tc.sync}
			if got := strings.Join(RegionsFor(typ, p, "eu"), " "); got != tc.under {
				t.Errorf("under the policy: %s, want %s", got, tc.under)
			}
			if got := strings.Join(RegionsFor(typ, nil, "eu"), " "); got != tc.global {
				t.Errorf("without one: %s, want %s", got, tc.global)
			}
		})
	}
}

func TestOwningRegion(t *testing.T) {
	p := policy(t, v1alpha1.MultiRegionPolicy{EnabledRegions: []string{"eu", "us"}, DefaultControlRegion: "us"})
	for in, want := range map[string]string{"projects/p/regions/eu/secrets/s": "eu", "projects/p/secrets/s": "us"} {
		n, err := secrets(t).ParseName(in)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := OwningRegion(n, p); got != want || !ok {
			t.Errorf("OwningRegion(%s) = %s, %v", in, got, ok)
		}
	}
	n, _ := secrets(t).ParseName("projects/p/secrets/s")
	if got, ok := OwningRegion(n, nil); ok {
		t.Errorf("OwningRegion without a policy = %s", got)
	}
}

func TestPolicyFromJSON(t *testing.T) {
	for name, tc := range map[string]struct{ in, want string }{
		"valid":               {`{"enabledRegions":["eu","us"],"defaultControlRegion":"eu"}`, ""},
		"no object":           {`"eu"`, "must be a MultiRegionPolicy"},
		"unknown field":       {`{"enabledRegions":["eu"],"defaultControlRegion":"eu","defaultRegion":"eu"}`, "unknown field"},
		"no region":           {`{"enabledRegions":[],"defaultControlRegion":"eu"}`, "enabledRegions: Required"},
		"no control region":   {`{"enabledRegions":["eu"]}`, "defaultControlRegion: Required"},
		"control not enabled": {`{"enabledRegions":["eu"],"defaultControlRegion":"us"}`, "defaultControlRegion: Invalid value: \"us\": must be one of enabledRegions"},
		"region twice":        {`{"enabledRegions":["eu","eu"],"defaultControlRegion":"eu"}`, "enabledRegions[1]: Duplicate"},
		"region in capitals":  {`{"enabledRegions":["eu","US"],"defaultControlRegion":"eu"}`, "enabledRegions[1]: Invalid"},
		"short type name":     {`{"enabledRegions":["eu"],"defaultControlRegion":"eu","criteriaForDisabledSync":[{"resourceTypeName":"Doc"}]}`, "criteriaForDisabledSync[0].resourceTypeName"},
	} {
		t.Run(name, func(t *testing.T) {
			p, violations := PolicyFromJSON([]byte(tc.in))
			var got string
			for _, v := range violations {
				got += v.String() + "\n"
			}
			if (p == nil) != (tc.want != "") || !strings.Contains(got, tc.want) || (tc.want == "" && got != "") {
				t.Errorf("violations: %s, want %q", got, tc.want)
			}
		})
	}
}

func TestPolicyEqual(t *testing.T) {
	a, _ := PolicyFromJSON([]byte(`{"enabledRegions":["eu","us"],"defaultControlRegion":"eu"}`))
	b, _ := PolicyFromJSON([]byte(`{"enabledRegions":["us","eu"],"defaultControlRegion":"eu"}`))
	c, _ := PolicyFromJSON([]byte(`{"enabledRegions":["us","eu"],"defaultControlRegion":"us"}`))
	var none *Policy
	if !a.Equal(b) || a.Equal(c) || a.Equal(nil) || none.Equal(a) || !none.Equal(nil) {
		t.Error("Equal is wrong")
	}
}
