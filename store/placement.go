package store

import (
	"slices"
	"strings"
	"time"
)

// Placement says in which regions an owned resource should be.
type Placement struct {
	Name, Type string
	// OwningRegion is informative: a placement never moves a resource to another owner.
	OwningRegion string
	// Regions is metadata.syncing.regions: sorted, or EveryRegion alone.
	Regions []string
}

// Holding is a group of resources that one region owns: those of one type that are in the same regions.
type Holding struct {
	Type string
	// Regional resources name their region; the others belong to the control region of their policy.
	Regional bool
	Regions  []string
	Rows     int64
	// Bytes of their metadata and bodies as JSON; 0 when they were not asked for.
	Bytes int64
	// Example is the name of one of them.
	Example string
}

// PolicyWalk is how far a policy, or a change of it, has been carried out for the resources that are owned here.
type PolicyWalk struct {
	// Holder of the policy; empty stands for the policy of the service, and for the schema.
	Holder string
	// Says is a digest of what the policy decides about resources owned here.
	Says string
	// After is the name up to which the present round has come.
	After string
	// Round counts from 1: a later one looks for what was written meanwhile by those who knew only the policy before.
	Round int
	Done  bool
	// Total is how many resources the walk was about to look at; Checked, Changed and Misplaced count over all rounds. A misplaced resource
	// belongs to another region by now, and was left as it is.
	Total, Checked, Changed, Misplaced int64
	Started, Updated                   time.Time
}

// NameRange is a half-open range of names, in the order of their bytes.
type NameRange struct{ From, To string }

// Below is the range of the names under a resource; everything if name is empty.
func Below(name string) NameRange {
	if name == "" {
		return NameRange{"", "\x7f"} // names are of ASCII letters, digits and punctuation
	}
	return NameRange{name + "/", name + "0"} // 0 follows the slash
}

// Without cuts the ranges of names under others out of r.
func (r NameRange) Without(others []string) []NameRange {
	sorted := slices.SortedFunc(slices.Values(others), func(a, b string) int { return strings.Compare(a+"/", b+"/") })
	var left []NameRange
	from := r.From
	for _, o := range sorted {
		cut := Below(o)
		if cut.From < from || cut.From >= r.To {
			continue // inside of one that is cut out already, or elsewhere
		}
		if from < cut.From {
			left = append(left, NameRange{from, cut.From})
		}
		from = cut.To
	}
	if from < r.To {
		left = append(left, NameRange{from, r.To})
	}
	return left
}
