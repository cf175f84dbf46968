package feed

import (
	"errors"
	"slices"
	"strconv"
	"strings"
)

// Snapshot is a pg_snapshot: which transactions had ended when it was taken. A transaction is seen by it when its id is below Xmax and not in Xip.
type Snapshot struct {
	// Xmin is the lowest id that was still in progress; everything below had ended.
	Xmin uint64
	// Xmax is the first id that had not been assigned.
	Xmax uint64
	// Xip are the ids in progress, Xmin <= id < Xmax, ascending.
	Xip []uint64
}

var errSnapshot = errors.New("not a pg_snapshot")

// ParseSnapshot reads PostgreSQL's text form, xmin:xmax:xip,xip,...
func ParseSnapshot(text string) (Snapshot, error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return Snapshot{}, errSnapshot
	}
	var s Snapshot
	var err error
	if s.Xmin, err = strconv.ParseUint(parts[0], 10, 64); err != nil {
		return Snapshot{}, errSnapshot
	}
	if s.Xmax, err = strconv.ParseUint(parts[1], 10, 64); err != nil || s.Xmin == 0 || s.Xmax < s.Xmin {
		return Snapshot{}, errSnapshot
	}
	if parts[2] == "" {
		return s, nil
	}
	for p := range strings.SplitSeq(parts[2], ",") {
		x, err := strconv.ParseUint(p, 10, 64)
		if err != nil || x < s.Xmin || x >= s.Xmax || len(s.Xip) > 0 && x <= s.Xip[len(s.Xip)-1] {
			return Snapshot{}, errSnapshot
		}
		s.Xip = append(s.Xip, x)
	}
	return s, nil
}

// String returns PostgreSQL's text form.
func (s Snapshot) String() string {
	b := strconv.AppendUint(nil, s.Xmin, 10)
	b = append(b, ':')
	b = strconv.AppendUint(b, s.Xmax, 10)
	b = append(b, ':')
	for i, x := range s.Xip {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, x, 10)
	}
	return string(b)
}

// Sees says whether the effects of transaction x are visible to s.
func (s Snapshot) Sees(x uint64) bool {
	if x >= s.Xmax {
		return false
	}
	_, running := slices.BinarySearch(s.Xip, x)
	return !running
}

// Until returns s restricted to ids up to and including last, which must be below s.Xmax: what a reader knows who took s and has read only
// the changes up to last.
func (s Snapshot) Until(last uint64) Snapshot {
	cut, _ := slices.BinarySearch(s.Xip, last+1)
	return Snapshot{Xmin: min(s.Xmin, last+1), Xmax: last + 1, Xip: slices.Clip(s.Xip[:cut])}
}

// Merge returns the snapshot that sees exactly what both a and b see.
func Merge(a, b Snapshot) Snapshot {
	m := Snapshot{Xmin: min(a.Xmin, b.Xmin), Xmax: min(a.Xmax, b.Xmax)}
	m.Xip = append(slices.Clone(a.Xip), b.Xip...)
	slices.Sort(m.Xip)
	m.Xip = slices.Compact(m.Xip)
	m.Xip = slices.DeleteFunc(m.Xip, func(x uint64) bool { return x >= m.Xmax })
	return m
}
