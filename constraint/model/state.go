package model

import "slices"

// The state is made of bytes only: it is compared, copied and hashed as one block of memory.

// Where a target is in its life.
const (
	live     = 0
	deleting = 1
	gone     = 2
)

// forever is the row version in questions about a target that is being deleted.
const forever = 255

// What a source is to the target, and what a page of a sweep says about a Deployment's references.
const (
	blocking   = 1
	subscriber = 2
)

// Bounds of the state; a World chooses within them.
const (
	maxRegions = 2
	maxSlots   = 2 // referrers in one Deployment
	maxSaves   = 2 // transactions of one referrer
	maxTries   = 2 // attempts of one transaction
	maxUUIDs   = 2 // incarnations of the name
	maxTasks   = 2 // deletions and prunes that are under way at once
)

// state is one moment of the whole system. What is not in a database of the owner or of a referrer is in the memory of a process, or on its way.
type state struct {
	target  target
	standby target // what the owner's standby knows; with region.listedStandby
	epoch   uint8  // of the owner's database

	hasStandby uint8 // the standby was caught up at some moment, and has learned nothing since
	accepted   uint8 // ghost: the incarnations, as bits, whose deletion was ever accepted
	deletions  uint8 // that may still be begun
	prunes     uint8
	failovers  uint8

	tasks    [maxTasks]task
	finisher finisher
	regions  [maxRegions]region
}

// target is the owner's row. Version is its row_version: odd while somebody tries to delete it or to prune one of its sources.
type target struct{ state, uuid, version uint8 }

// region is one Deployment that refers, and everything that the owner keeps about it.
type region struct {
	joined uint8

	listed        listed // in the owner's database
	listedStandby listed

	home        home  // its own database
	homeStandby home  // what its standby knows
	homeEpoch   uint8 // rises with each failover of it
	horizon     uint8 // rises when fences are purged
	hasStandby  uint8

	saves [maxSlots]save

	sent     uint8 // in worlds with late messages: requests for references that may arrive, and again; a bit for each (slot, transaction, attempt)
	confirms uint8 // the same for confirmations: a bit for each (slot, transaction)
	told     uint8 // incarnations, as bits, of whose deletion it has heard
	planned  [maxTasks]uint8
	answered [maxTasks]uint8
	checked  uint8 // what it has answered to the finisher
	sweep    sweep
}

// listed are the owner's rows in sources, blockades and referrer_epoch about one Deployment.
type listed struct {
	source    uint8
	confirmed uint8                     // the owner's epoch in which it has confirmed all its references
	blockades [maxSlots][maxSaves]uint8 // attempt of the transaction; expired is added once it is
}

const expired = 0x80

// home are the rows of a referrer's database: refs, fences, and the epoch of the owner that it has seen.
type home struct {
	refs   [maxSlots]ref
	fences [maxUUIDs]fence // the highest for each incarnation: a lower one never matters
	peer   uint8
}

// ref is a committed reference; uuid is 0 if there is none. Tx is the transaction that is to be confirmed, 0 once it is.
type ref struct{ uuid, tx uint8 }

// fence says that questions up to this moment of the target's history have been answered with no.
type fence struct{ epoch, version uint8 }

func (f fence) less(g fence) bool {
	return f.epoch < g.epoch || f.epoch == g.epoch && f.version < g.version
}

// save is the memory of the API server that writes one referrer.
type save struct {
	phase, tx, attempt uint8
	homeEpoch, horizon uint8 // the mark, from before the owner was asked
	uuid               uint8 // the grant
	at                 fence
}

const (
	idle    = 0
	asking  = 1
	replied = 2 // the grant is on its way back
	granted = 3
	checked = 4 // only with the bug SaveChecksEarly
)

// task is the memory of one attempt to delete the target or, if prune is set, to prune region prune-1.
type task struct{ phase, uuid, epoch, version, prune uint8 }

const (
	planned = 1
	begun   = 2
	begins  = 3 // only with the bug QuestionBeforeBegin: everybody was asked, and the row is not marked yet
)

// Answers of a region to a task or to the finisher.
const (
	noAnswer   = 0
	unfenced   = 1 // only with the bug LateFence: the answer is no, and the fence is not yet written
	nothing    = 2 // no reference at all; to a deletion or the finisher: none that matters
	nonBlocker = 3 // references, but none that blocks
	blocked    = 4
)

// finisher is the memory of the owned-deleting handler: which deletion it works on, in which epoch. Its answers are in the regions.
type finisher struct {
	uuid, epoch uint8
	reads       uint8 // only with the bug BlockersCountAsChecked: it has read the sources, and has yet to read who is suspect
}

// sweep is the memory of the handler that confirms all references to an owner whose epoch has risen: that epoch, and, once it has read them, which kinds
// of references there are.
type sweep struct{ epoch, read, page uint8 }

// suspect reports whether region r has not confirmed its references since the owner's epoch began. In the first epoch nothing can have been lost.
func (s *state) suspect(r int) bool { return s.epoch > 1 && s.regions[r].listed.confirmed < s.epoch }

// tentative reports whether an unexpired blockade stands.
func (s *state) tentative() bool {
	for r := range s.regions {
		for _, txs := range s.regions[r].listed.blockades {
			for _, b := range txs {
				if b != 0 && b < expired {
					return true
				}
			}
		}
	}
	return false
}

func bit(i int) uint8 { return 1 << i }

func pack(b ...uint8) (k uint64) {
	for _, x := range b {
		k = k<<8 | uint64(x)
	}
	return k
}

// order is some order of regions; regions that compare equal may still differ, which only costs states.
func (reg *region) order() [4]uint64 {
	sv, l, h := &reg.saves[0], &reg.listed, &reg.home
	return [4]uint64{
		pack(sv.phase, sv.tx, sv.attempt, sv.uuid, sv.at.epoch, sv.at.version, h.refs[0].uuid, h.refs[0].tx),
		pack(l.source, l.confirmed, l.blockades[0][0], l.blockades[0][1], h.fences[0].epoch, h.fences[0].version, h.fences[1].epoch, h.fences[1].version),
		pack(reg.planned[0], reg.planned[1], reg.answered[0], reg.answered[1], reg.checked, reg.told, reg.sweep.epoch, reg.sweep.page),
		pack(reg.homeEpoch, reg.horizon, h.peer, reg.sent, reg.confirms, reg.listedStandby.source, reg.listedStandby.blockades[0][0], reg.hasStandby),
	}
}

// canonical returns a representative of the states that differ from s only in which of two equal regions, or which of two tasks, is which.
func (s state) canonical(symmetric bool) state {
	a, b := s.tasks[0], s.tasks[1]
	if pack(a.phase, a.prune, a.uuid, a.epoch, a.version) < pack(b.phase, b.prune, b.uuid, b.epoch, b.version) {
		s.swapTasks()
	}
	if symmetric {
		x, y := s.regions[0].order(), s.regions[1].order()
		if slices.Compare(x[:], y[:]) > 0 {
			s.swapRegions()
		}
	}
	return s
}

func (s *state) swapTasks() {
	s.tasks[0], s.tasks[1] = s.tasks[1], s.tasks[0]
	for r := range s.regions {
		p := &s.regions[r]
		p.planned[0], p.planned[1] = p.planned[1], p.planned[0]
		p.answered[0], p.answered[1] = p.answered[1], p.answered[0]
	}
}

func (s *state) swapRegions() {
	s.regions[0], s.regions[1] = s.regions[1], s.regions[0]
	for k := range s.tasks {
		if p := s.tasks[k].prune; p != 0 {
			s.tasks[k].prune = 3 - p
		}
	}
}

// same reports whether s and t differ only in which region and which task is which.
func (s state) same(t state, symmetric bool) bool {
	for range 2 {
		for range 2 {
			if s == t {
				return true
			}
			s.swapTasks()
		}
		if !symmetric {
			return false
		}
		s.swapRegions()
	}
	return false
}
