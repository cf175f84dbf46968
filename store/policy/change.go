package policy

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

// Holder is a source of Holdings: postgres.Store.
type Holder interface {
	List(ctx context.Context, q store.Query) (*store.Page, error)
	Holdings(ctx context.Context, in []store.NameRange, formed []string, bytes bool) ([]store.Holding, error)
}

// Holdings groups what is owned here and governed by the policy of holder, or by that of the service for an empty name: not what a nearer holder governs.
// With bytes every body is read.
func Holdings(ctx context.Context, v *descriptor.Version, from Holder, holder string, bytes bool) ([]store.Holding, error) {
	var nearer []string
	for _, t := range v.Types {
		if !t.IsPolicyHolder() {
			continue
		}
		q := store.Query{Type: t.Name, PageSize: store.MaxPageSize}
		if holder != "" {
			q.Prefix = holder + "/"
		}
		for {
			page, err := from.List(ctx, q)
			if err != nil {
				return nil, fmt.Errorf("list policy holders below %q: %w", holder, err)
			}
			for _, r := range page.Resources {
				nearer = append(nearer, r.Name)
			}
			if q.PageToken = page.NextPageToken; q.PageToken == "" {
				break
			}
		}
	}
	groups, err := from.Holdings(ctx, store.Below(holder).Without(nearer), formed(v), bytes)
	if err != nil {
		return nil, err
	}
	for i := range groups {
		if n, err := v.ParseName(groups[i].Example); err == nil {
			_, groups[i].Regional = n.Region()
		}
	}
	return groups, nil
}

// formed are the types of which some names say the region and others, of as many segments, do not.
func formed(v *descriptor.Version) []string {
	var types []string
	for _, t := range v.Types {
		regional := map[int]bool{}
		for _, p := range t.Patterns {
			n, is := strings.Count(p, "/"), strings.Contains(p, "{region}")
			if was, seen := regional[n]; seen && was != is {
				types = append(types, t.Name)
				break
			}
			regional[n] = is
		}
	}
	return types
}

// Concerned are the regions that a change of a policy could leave with resources that they may not own any more: they must be asked. Either policy may be nil, which governs
// nothing: all are the regions of the service, each of which may own anything where there was none before.
func Concerned(was, now *descriptor.Policy, all []string) []string {
	var regions []string
	switch {
	case now == nil:
		return nil
	case was == nil:
		for _, r := range all {
			if r != now.DefaultControlRegion() {
				regions = append(regions, r)
			}
		}
		return regions
	}
	for _, r := range was.EnabledRegions() {
		if !now.CanCreateIn(r) {
			regions = append(regions, r)
		}
	}
	if old := was.DefaultControlRegion(); old != now.DefaultControlRegion() && !slices.Contains(regions, old) {
		regions = append(regions, old)
	}
	return regions
}

// Orphans says, as sentences, why a region that owns these resources forbids the policy; none if it does not. A region that is not enabled any more
// may own nothing, and what has no region in its name belongs to the control region: nobody would hand it over (spec 4.9).
func Orphans(region string, owned []store.Holding, now *descriptor.Policy) []string {
	if now == nil {
		return nil
	}
	count := func(keep func(store.Holding) bool) (rows int64, kinds string) {
		byType := map[string]int64{}
		var order []string
		for _, h := range owned {
			if !keep(h) {
				continue
			}
			if byType[h.Type] == 0 {
				order = append(order, h.Type)
			}
			byType[h.Type] += h.Rows
			rows += h.Rows
		}
		slices.Sort(order)
		for i, t := range order {
			order[i] = fmt.Sprintf("%d %s", byType[t], t)
		}
		return rows, strings.Join(order, ", ")
	}
	var why []string
	if !now.CanCreateIn(region) {
		if n, kinds := count(func(h store.Holding) bool { return h.Regional }); n > 0 {
			why = append(why, fmt.Sprintf("region %s, which it does not enable any more, still owns %d resources (%s): delete them first, or keep the region enabled", region, n, kinds))
		}
	}
	if now.DefaultControlRegion() != region {
		if n, kinds := count(func(h store.Holding) bool { return !h.Regional }); n > 0 {
			why = append(why, fmt.Sprintf("region %s still owns %d resources without a region in their names (%s), which would belong to %s: delete them first, or keep defaultControlRegion",
				region, n, kinds, now.DefaultControlRegion()))
		}
	}
	return why
}

// Move is a number of copies that appear in a region, or vanish from it, when a policy changes.
type Move struct {
	Region, Owner, Type string
	Dropped             bool
	Rows, Bytes         int64
}

// Moves returns what a policy changes for what owner owns, ordered, and how many resources get another metadata.syncing. all are the regions of the service.
func Moves(v *descriptor.Version, owner string, owned []store.Holding, now *descriptor.Policy, all []string) (moves []Move, updates int64) {
	type key struct {
		region, typ string
		dropped     bool
	}
	sums := map[key]Move{}
	for _, h := range owned {
		t := v.Type(h.Type)
		if t == nil {
			continue
		}
		regions := descriptor.RegionsFor(t, now, owner)
		if len(regions) == 0 {
			regions = []string{owner}
		}
		if slices.Equal(regions, h.Regions) {
			continue
		}
		updates += h.Rows
		for _, r := range all {
			had, has := reaches(h.Regions, r), reaches(regions, r)
			if r == owner || had == has {
				continue
			}
			k := key{r, h.Type, had}
			m := sums[k]
			sums[k] = Move{Region: r, Owner: owner, Type: h.Type, Dropped: had, Rows: m.Rows + h.Rows, Bytes: m.Bytes + h.Bytes}
		}
	}
	for _, m := range sums {
		moves = append(moves, m)
	}
	slices.SortFunc(moves, CompareMoves)
	return moves, updates
}

// CompareMoves orders moves by region, owner and type.
func CompareMoves(a, b Move) int {
	if c := strings.Compare(a.Region, b.Region); c != 0 {
		return c
	}
	if c := strings.Compare(a.Owner, b.Owner); c != 0 {
		return c
	}
	return strings.Compare(a.Type, b.Type)
}

func reaches(regions []string, region string) bool {
	return slices.Contains(regions, region) || slices.Contains(regions, descriptor.Everywhere)
}
