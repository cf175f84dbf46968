package syncing

import (
	"fmt"
	"iter"

	"github.com/dbcontroller/db-controller/store"
)

// NameVersion is one row of a list of versions.
type NameVersion struct {
	Name    string
	Version store.Version
}

// Difference is a name whose version differs between an owner and a copy. A zero version means that this side has no such row.
type Difference struct {
	Name   string
	Source store.Version
	Synced store.Version
}

// missing says whether the destination lacks something that the source has; else the destination has a row too much.
func (d Difference) missing() bool { return d.Source != store.Version{} }

// differences yields, in the order of names, where two lists differ. Both must be strictly ordered by name, bytewise; a list that is not
// ends the sequence with an error, because a merge of it would take rows that exist for extras. counted is called for each
// name of the source, and may be nil.
//
// Where the copy's version is the higher one, it is a difference only if its epoch has ended at the owner: then the owner has lost that write, and is
// right. Within the owner's present epoch, a live frame has simply been faster than the list.
func differences(source, synced iter.Seq2[NameVersion, error], ownerEpoch int64, counted func()) iter.Seq2[Difference, error] {
	return func(yield func(Difference, error) bool) {
		next, stop := iter.Pull2(ordered(synced, "copies"))
		defer stop()
		have, err, ok := next()
		for want, serr := range ordered(source, "owner's rows") {
			if serr != nil {
				yield(Difference{}, serr)
				return
			}
			if counted != nil {
				counted()
			}
			for ok && err == nil && have.Name < want.Name {
				if !yield(Difference{Name: have.Name, Synced: have.Version}, nil) {
					return
				}
				have, err, ok = next()
			}
			if err != nil {
				yield(Difference{}, err)
				return
			}
			d := Difference{Name: want.Name, Source: want.Version}
			if ok && have.Name == want.Name {
				d.Synced = have.Version
				have, err, ok = next()
			}
			if differs(d, ownerEpoch) && !yield(d, nil) {
				return
			}
		}
		for ; ok; have, err, ok = next() {
			if err != nil {
				yield(Difference{}, err)
				return
			}
			if !yield(Difference{Name: have.Name, Synced: have.Version}, nil) {
				return
			}
		}
	}
}

func differs(d Difference, ownerEpoch int64) bool {
	switch d.Source.Compare(d.Synced) {
	case 0:
		return false
	case -1:
		return d.Synced.Epoch < ownerEpoch
	}
	return true
}

// ordered passes a list on while it is strictly ordered by name.
func ordered(list iter.Seq2[NameVersion, error], what string) iter.Seq2[NameVersion, error] {
	return func(yield func(NameVersion, error) bool) {
		last, first := "", true
		for nv, err := range list {
			if err == nil && !first && nv.Name <= last {
				err = fmt.Errorf("list of %s is not in order: %q after %q", what, nv.Name, last)
			}
			if !yield(nv, err) || err != nil {
				return
			}
			last, first = nv.Name, false
		}
	}
}
