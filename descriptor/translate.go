package descriptor

// Translate returns the name of the same resource in another version of its service: the same type, the pattern whose variables are all known. A name
// without a region becomes one with region, if only that has a pattern; a name with a region becomes one without only if it is that region. region is the
// default control region that the governing policy gives. It reports false if the version cannot express the name: it has no such type or pattern,
// or the region cannot be left out (spec 1.4, 8.23; F8).
//
// Different names never become the same name: where a version has both forms, with and without a region, neither stands for the other (spec 8.24).
func (n Name) Translate(to *Version, region string) (Name, bool) {
	t := to.types[n.Type.Name]
	if t == nil || t.version.Service.Name != n.Type.version.Service.Name {
		return Name{}, false
	}
	vars := n.Vars()
	if t.hasPattern(vars) {
		return t.named(vars)
	}
	if own, ok := n.Region(); !ok {
		vars[regionVar] = region
	} else {
		delete(vars, regionVar)
		if own != region || n.Type.hasPattern(vars) {
			return Name{}, false
		}
	}
	if !t.hasPattern(vars) {
		return Name{}, false
	}
	return t.named(vars)
}

func (t *Type) hasPattern(vars map[string]string) bool {
	for _, p := range t.patterns {
		if p.hasVars(vars) {
			return true
		}
	}
	return false
}

// named fails where a name would be too long, or the region is none.
func (t *Type) named(vars map[string]string) (Name, bool) {
	text, err := t.BuildName(vars)
	if err != nil {
		return Name{}, false
	}
	n, err := t.version.ParseName(text)
	return n, err == nil
}
