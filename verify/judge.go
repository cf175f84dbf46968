package verify

import (
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Kind says how a mirror differs for one name.
type Kind string

// The kinds.
const (
	Missing Kind = "missing" // the mirror lacks the row
	Extra   Kind = "extra"   // the mirror has a row that the truth does not give it
	Stale   Kind = "stale"   // the mirror's row is of an older version
	Ahead   Kind = "ahead"   // the mirror's row is of a version that the truth has not reached
	Content Kind = "content" // the versions are the same and the rows are not
	Owner   Kind = "owner"   // the mirror says that another region owns the row
)

// sight is one look at a name. A zero RowHash is a name that is not known.
type sight struct {
	truth, mirror postgres.RowHash
}

// equal says whether the mirror is right.
func (s sight) equal() bool {
	if s.truth.Held != s.mirror.Held {
		return false
	}
	return !s.truth.Held || s.truth.Hash == s.mirror.Hash
}

// kind of a sight that is not equal.
func (s sight) kind() Kind {
	switch {
	case s.truth.Held && !s.mirror.Held && s.mirror.Owner != "" && s.mirror.Owner != s.truth.Owner:
		return Owner
	case !s.mirror.Held:
		return Missing
	case !s.truth.Held:
		return Extra
	}
	switch s.mirror.Version.Compare(s.truth.Version) {
	case -1:
		return Stale
	case 1:
		return Ahead
	}
	return Content
}

// verdict is what two looks mean.
type verdict int

const (
	// lookAgain: something moved, or may be on its way.
	lookAgain verdict = iota
	// right: nothing differs any more.
	right
	// wrong: it is a difference.
	wrong
)

// judge compares a look with the one before. reached says whether the mirror had received a transaction of the truth when the second look at the mirror began.
func judge(before, now sight, reached func(change uint64) bool) verdict {
	if now.equal() {
		return right
	}
	if before.mirror != now.mirror {
		return lookAgain // it follows
	}
	switch before.kind() {
	case Content, Ahead:
		// No delay explains these: a copy is never ahead of its owner, and a version has one content.
		if before.truth == now.truth {
			return wrong
		}
		return lookAgain
	}
	// What the truth had at the look before, or has no more, must have arrived since; that it changes again does not excuse the mirror.
	if before.truth.Change == 0 || reached(before.truth.Change) {
		if before.truth == now.truth || now.kind() == before.kind() {
			return wrong
		}
	}
	return lookAgain
}
