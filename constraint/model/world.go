package model

import "slices"

// World is one small configuration of the system. All counts are bounds of the search.
type World struct {
	Name string
	// About says what the world is for.
	About string
	// Regions are the Deployments that refer to the target.
	Regions []Region
	// Deletions and Prunes are how many attempts are begun, at most two at once.
	Deletions, Prunes int
	// Late messages: every request for a reference and every confirmation may arrive any number of times, at any time, and its answer may be lost.
	Late bool
	// Recreates: the name is used again after the deletion, once.
	Recreates bool
	// OwnerFails is how often the owner's database may fail over to a standby that lacks its last commits.
	OwnerFails int
	// Durable: negative answers and sweeps of a referrer are sent only once they would survive its failover.
	Durable bool
	// Purges: each Deployment may purge its fences once.
	Purges bool
}

// Region is a Deployment with referrers.
type Region struct {
	// Referrers by what their reference asks for: blocking (BLOCK) or subscriber (ASYNC_*).
	Referrers []uint8
	// Saves is how many transactions each of them begins, Tries how many attempts each has.
	Saves, Tries int
	// Removes: users take references out again.
	Removes bool
	// Joins: the Deployment comes into being during the run.
	Joins bool
	// Fails: its database may fail over, once, to a standby that lacks its last commits.
	Fails bool
}

func (r Region) kind(i int) uint8 { return r.Referrers[i] }

func (w *World) symmetric() bool {
	if len(w.Regions) != 2 {
		return false
	}
	a, b := w.Regions[0], w.Regions[1]
	return slices.Equal(a.Referrers, b.Referrers) && a.Saves == b.Saves && a.Tries == b.Tries && a.Removes == b.Removes && a.Joins == b.Joins && a.Fails == b.Fails
}

func (w *World) initial() state {
	s := state{target: target{uuid: 1}, epoch: 1, deletions: uint8(w.Deletions), prunes: uint8(w.Prunes), failovers: uint8(w.OwnerFails)}
	for r, c := range w.Regions {
		reg := &s.regions[r]
		reg.homeEpoch, reg.home.peer = 1, 1
		if !c.Joins {
			reg.joined = 1
		}
	}
	return s
}

var (
	block = []uint8{blocking}
	async = []uint8{subscriber}
)

// Worlds returns all configurations that are searched.
func Worlds() []World {
	return []World{
		{
			Name: "two-block", About: "two Deployments with a blocking reference each",
			Regions:   []Region{{Referrers: block, Saves: 1, Tries: 2, Removes: true}, {Referrers: block, Saves: 1, Tries: 2, Removes: true}},
			Deletions: 2, Prunes: 1,
		},
		{
			Name: "async-and-block", About: "one Deployment is told of the deletion, the other blocks it until a user lets go",
			Regions:   []Region{{Referrers: async, Saves: 1, Tries: 2}, {Referrers: block, Saves: 1, Tries: 2, Removes: true}},
			Deletions: 2, Prunes: 1,
		},
		{
			Name: "join", About: "a Deployment joins at any moment, be it in the middle of a cascade",
			Regions:   []Region{{Referrers: async, Saves: 1, Tries: 1}, {Referrers: []uint8{blocking, subscriber}, Saves: 1, Tries: 2, Joins: true}},
			Deletions: 2,
		},
		{
			Name: "two-deletions", About: "attempts to delete the target run at once; transactions repeat",
			Regions:   []Region{{Referrers: block, Saves: 2, Tries: 2, Removes: true}},
			Deletions: 3,
		},
		{
			Name: "one-deployment", About: "two referrers of one Deployment, one blocks and one is told",
			Regions:   []Region{{Referrers: []uint8{blocking, subscriber}, Saves: 1, Tries: 2, Removes: true}},
			Deletions: 2, Prunes: 1,
		},
		{
			Name: "expiry", About: "expired blockades are asked after while a deletion runs",
			Regions:   []Region{{Referrers: block, Saves: 2, Tries: 1, Removes: true}},
			Deletions: 2, Prunes: 2,
		},
		{
			Name: "late-messages", About: "two attempts of two transactions; requests and confirmations are lost, late and repeated",
			Regions:   []Region{{Referrers: block, Saves: 2, Tries: 2, Removes: true}},
			Deletions: 2, Prunes: 1, Late: true,
		},
		{
			Name: "recreation", About: "the name is used again while transactions, handlers and news of the first are still about",
			Regions:   []Region{{Referrers: []uint8{subscriber, subscriber}, Saves: 1, Tries: 2}},
			Deletions: 3, Recreates: true,
		},
		{
			Name: "recreation-block", About: "the same with a blocking reference and late messages",
			Regions:   []Region{{Referrers: block, Saves: 2, Tries: 1}},
			Deletions: 3, Recreates: true, Late: true,
		},
		{
			Name: "owner-fails", About: "the owner loses its last commits: sources, blockades, attempts, the deletion itself",
			Regions:   []Region{{Referrers: block, Saves: 1, Tries: 2}, {Referrers: block, Saves: 1, Tries: 1}},
			Deletions: 1, OwnerFails: 1,
		},
		{
			Name: "owner-fails-deletions", About: "the same with deletions and prunes that go on with what they knew before",
			Regions:   []Region{{Referrers: block, Saves: 2, Tries: 1}},
			Deletions: 2, Prunes: 1, OwnerFails: 1,
		},
		{
			Name: "owner-fails-async", About: "the owner loses its last commits while it finishes deletions",
			Regions:   []Region{{Referrers: async, Saves: 2, Tries: 1}},
			Deletions: 2, OwnerFails: 1,
		},
		{
			Name: "owner-fails-mixed", About: "the owner keeps that a Deployment blocks, and loses that it must be told",
			Regions:   []Region{{Referrers: []uint8{blocking, subscriber}, Saves: 1, Tries: 1}},
			Deletions: 1, OwnerFails: 1,
		},
		{
			Name: "owner-fails-twice", About: "sweeps of one epoch go on in the next",
			Regions:   []Region{{Referrers: block, Saves: 1, Tries: 2}},
			Deletions: 1, OwnerFails: 2,
		},
		{
			Name: "referrer-fails", About: "a referrer loses its last commits, fences among them; no standby is synchronous, and no reference is taken out",
			Regions:   []Region{{Referrers: block, Saves: 2, Tries: 2, Fails: true}},
			Deletions: 2, Prunes: 1,
		},
		{
			Name: "referrer-fails-durable", About: "the same with references that are taken out and cleared; answers are sent once they are durable",
			Regions:   []Region{{Referrers: []uint8{blocking, subscriber}, Saves: 1, Tries: 1, Removes: true, Fails: true}},
			Deletions: 2, Prunes: 1, Durable: true,
		},
		{
			Name: "both-fail", About: "owner and referrer lose their last commits; sweeps are sent once they are durable",
			Regions:   []Region{{Referrers: async, Saves: 1, Tries: 2, Removes: true, Fails: true}},
			Deletions: 1, OwnerFails: 1, Durable: true,
		},
		{
			Name: "both-fail-block", About: "the same without any synchronous standby, and no reference is taken out",
			Regions:   []Region{{Referrers: block, Saves: 1, Tries: 2, Fails: true}},
			Deletions: 2, OwnerFails: 1,
		},
		{
			Name: "purge", About: "old fences are purged under open transactions",
			Regions:   []Region{{Referrers: block, Saves: 1, Tries: 2}, {Referrers: async, Saves: 1, Tries: 1}},
			Deletions: 1, Purges: true,
		},
	}
}
