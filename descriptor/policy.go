package descriptor

import (
	"encoding/json"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// Everywhere is the region list of a resource that every region of its service holds.
const Everywhere = "*"

// Policy is a compiled MultiRegionPolicy.
//
// One rule of it, a criterion for disabled sync, matches a copy by the owner (source), the destination and the type; an empty part matches everything.
type Policy struct {
	enabled []string // sorted
	control string
	rules   []v1alpha1.DisabledSyncCriterion
}

// NewPolicy compiles a policy. The faults have their path below at.
func NewPolicy(p *v1alpha1.MultiRegionPolicy, at *field.Path) (*Policy, field.ErrorList) {
	var faults field.ErrorList
	if len(p.EnabledRegions) == 0 {
		faults = append(faults, field.Required(at.Child("enabledRegions"), "name at least one region"))
	}
	seen := map[string]bool{}
	for i, r := range p.EnabledRegions {
		switch at := at.Child("enabledRegions").Index(i); {
		case !ValidRegion(r):
			faults = append(faults, field.Invalid(at, r, regionRule))
		case seen[r]:
			faults = append(faults, field.Duplicate(at, r))
		}
		seen[r] = true
	}
	if p.DefaultControlRegion == "" {
		faults = append(faults, field.Required(at.Child("defaultControlRegion"), "name one of enabledRegions"))
	} else if !seen[p.DefaultControlRegion] {
		faults = append(faults, field.Invalid(at.Child("defaultControlRegion"), p.DefaultControlRegion, "must be one of enabledRegions"))
	}
	for i, c := range p.CriteriaForDisabledSync {
		at := at.Child("criteriaForDisabledSync").Index(i)
		if c.ResourceTypeName != "" && !fullTypeSyntax.MatchString(c.ResourceTypeName) {
			faults = append(faults, field.Invalid(at.Child("resourceTypeName"), c.ResourceTypeName, "must be a full type name, as in packages.example.com/Package"))
		}
		for _, r := range []struct{ field, value string }{{"sourceRegion", c.SourceRegion}, {"destRegion", c.DestRegion}} {
			if r.value != "" && !ValidRegion(r.value) {
				faults = append(faults, field.Invalid(at.Child(r.field), r.value, regionRule))
			}
		}
	}
	if len(faults) > 0 {
		return nil, faults
	}
	enabled := slices.Clone(p.EnabledRegions)
	slices.Sort(enabled)
	return &Policy{enabled: enabled, control: p.DefaultControlRegion, rules: slices.Clone(p.CriteriaForDisabledSync)}, nil
}

// EnabledRegions returns the enabled regions, sorted. Do not change it.
func (p *Policy) EnabledRegions() []string { return p.enabled }

// Spec returns the policy as it is written, with its regions sorted.
func (p *Policy) Spec() *v1alpha1.MultiRegionPolicy {
	return &v1alpha1.MultiRegionPolicy{
		EnabledRegions: slices.Clone(p.enabled), DefaultControlRegion: p.control, CriteriaForDisabledSync: slices.Clone(p.rules),
	}
}

// JSON returns the policy as it is written, with its regions sorted: equal policies are equal strings. It is empty for no policy.
func (p *Policy) JSON() (string, error) {
	if p == nil {
		return "", nil
	}
	b, err := json.Marshal(p.Spec())
	return string(b), err
}

// ParsePolicy reads what JSON returned.
func ParsePolicy(text string) (*Policy, error) {
	if text == "" {
		return nil, nil //nolint:nilnil // no policy
	}
	p, violations := PolicyFromJSON([]byte(text))
	if len(violations) > 0 {
		return nil, fmt.Errorf("the policy is invalid: %v", violations)
	}
	return p, nil
}

// DefaultControlRegion owns the resources that have no region in their name.
func (p *Policy) DefaultControlRegion() string { return p.control }

// CanCreateIn reports whether a resource may be created with that owner.
func (p *Policy) CanCreateIn(region string) bool {
	_, found := slices.BinarySearch(p.enabled, region)
	return found
}

// CanRead reports whether dest may hold a resource of that type (full name) and owner.
func (p *Policy) CanRead(dest, owner, fullType string) bool {
	return dest == owner || p.CanCreateIn(dest) && !p.disabled(dest, owner, fullType)
}

// SyncingRegions returns the sorted enabled regions that hold a resource of that type (full name) and owner. The owner is among
// them only if it is enabled.
func (p *Policy) SyncingRegions(fullType, owner string) []string {
	out := make([]string, 0, len(p.enabled))
	for _, r := range p.enabled {
		if r == owner || !p.disabled(r, owner, fullType) {
			out = append(out, r)
		}
	}
	return out
}

func (p *Policy) disabled(dest, owner, fullType string) bool {
	for i := range p.rules {
		r := &p.rules[i]
		if (r.SourceRegion == "" || r.SourceRegion == owner) && (r.DestRegion == "" || r.DestRegion == dest) &&
			(r.ResourceTypeName == "" || r.ResourceTypeName == fullType) {
			return true
		}
	}
	return false
}

// Equal reports whether both policies decide everything alike because they are written alike. Either may be nil.
func (p *Policy) Equal(o *Policy) bool {
	if p == nil || o == nil {
		return p == o
	}
	return p.control == o.control && slices.Equal(p.enabled, o.enabled) && slices.Equal(p.rules, o.rules)
}

// RegionsFor returns metadata.syncing.regions of a resource: sorted, or a single Everywhere. policy is the one that governs the
// resource, that of its holder or else the service's; nil without one.
func RegionsFor(t *Type, policy *Policy, owner string) []string {
	switch {
	case t.SyncType == v1alpha1.SyncNever:
		return []string{owner}
	case t.SyncType == v1alpha1.SyncAlwaysGlobally || policy == nil:
		return []string{Everywhere}
	case t.SyncType == v1alpha1.SyncAlwaysInScope:
		return slices.Clone(policy.enabled)
	default:
		return policy.SyncingRegions(t.FullName, owner)
	}
}

// OwningRegion returns the region that owns a resource: the one in its name, else the control region of the policy that governs it. It reports
// false if there is neither.
func OwningRegion(n Name, policy *Policy) (string, bool) {
	if region, ok := n.Region(); ok {
		return region, true
	}
	if policy == nil {
		return "", false
	}
	return policy.control, true
}
