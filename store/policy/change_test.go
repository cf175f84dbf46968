package policy_test

import (
	"testing"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store/policy"
)

func TestConcerned(t *testing.T) {
	const none = ""
	for name, tc := range map[string]struct {
		was, now string
		want     []string
	}{
		"a region more":                 {`"eu","us"],"defaultControlRegion":"eu"`, `"ap","eu","us"],"defaultControlRegion":"eu"`, nil},
		"a region less":                 {`"eu","us"],"defaultControlRegion":"eu"`, `"eu"],"defaultControlRegion":"eu"`, []string{"us"}},
		"another control region":        {`"eu","us"],"defaultControlRegion":"eu"`, `"eu","us"],"defaultControlRegion":"us"`, []string{"eu"}},
		"the control region goes":       {`"eu","us"],"defaultControlRegion":"eu"`, `"us"],"defaultControlRegion":"us"`, []string{"eu"}},
		"the same":                      {`"eu","us"],"defaultControlRegion":"eu"`, `"us","eu"],"defaultControlRegion":"eu"`, nil},
		"the first: anybody owned all":  {none, `"eu","us"],"defaultControlRegion":"eu"`, []string{"ap", "us"}},
		"the last: everybody keeps his": {`"eu","us"],"defaultControlRegion":"eu"`, none, nil},
		"none":                          {none, none, nil},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			parse := func(s string) *descriptor.Policy {
				if s != none {
					s = `{"enabledRegions":[` + s + `}`
				}
				p, err := descriptor.ParsePolicy(s)
				g.Expect(err).NotTo(HaveOccurred())
				return p
			}
			g.Expect(policy.Concerned(parse(tc.was), parse(tc.now), []string{"ap", "eu", "us"})).To(Equal(tc.want))
		})
	}
}
