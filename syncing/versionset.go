package syncing

import (
	"slices"
	"strings"
	"sync"

	"github.com/dbcontroller/db-controller/store"
)

// VersionSet compares one source with one destination by the versions of names. It holds only the names that differ: a name that is not in
// it is equal on both sides, as the digests said. So its memory follows the backlog, not the database.
//
// The interface of the protocol (spec 5.5) is all here, in this form: each destination has a set of its own, so SetSynced and DelSynced of the set whose
// destination is a search store are SetSearch and DelSearch; instead of listening for changes of the source, a syncer collects what differs; the
// size of the source is checked by digests, which also find what a count does not (audit); and a lock takes the place of a goroutine that runs.
//
// All methods may be called from any goroutine. Listeners are called in the goroutine that made the change, in the order of changes.
type VersionSet struct {
	ready func(bool) // may be nil

	mu      sync.Mutex
	differ  map[string]Difference
	missing int
	inSync  bool // the source has supplied everything up to now
	told    bool // what ready was last told
}

// NewVersionSet returns an empty set whose source is not in sync. ready, unless nil, is told when the destination becomes equal to a
// source that is in sync, and when it no longer is. It must not call the set.
func NewVersionSet(ready func(bool)) *VersionSet {
	return &VersionSet{ready: ready, differ: map[string]Difference{}}
}

// SetSource notes that the source has name at version v. A version that is not greater than the known one is ignored.
func (s *VersionSet) SetSource(name string, v store.Version) {
	s.change(name, func(d *Difference) {
		if v.Compare(d.Source) > 0 {
			d.Source = v
		}
	})
}

// DelSource notes that the source does not have name.
func (s *VersionSet) DelSource(name string) {
	s.change(name, func(d *Difference) { d.Source = store.Version{} })
}

// SetSynced notes what the destination really holds: seen in its snapshot, or acknowledged by it.
func (s *VersionSet) SetSynced(name string, v store.Version) {
	s.change(name, func(d *Difference) { d.Synced = v })
}

// DelSynced notes that the destination does not have name.
func (s *VersionSet) DelSynced(name string) {
	s.change(name, func(d *Difference) { d.Synced = store.Version{} })
}

// SetSourceInSync says whether the source has supplied everything up to now.
func (s *VersionSet) SetSourceInSync(inSync bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inSync = inSync
	s.tell()
}

// Forget drops all differences: they will be found again.
func (s *VersionSet) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.differ)
	s.missing = 0
	s.tell()
}

// CollectMatching returns, in the order of names, up to limit differences whose names start with prefix and that match keeps.
func (s *VersionSet) CollectMatching(prefix string, keep func(Difference) bool, limit int) []Difference {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []Difference
	for name, d := range s.differ {
		if strings.HasPrefix(name, prefix) && keep(d) {
			found = append(found, d)
			if len(found) == limit {
				break // any will do: the order matters within a batch only
			}
		}
	}
	slices.SortFunc(found, func(a, b Difference) int { return strings.Compare(a.Name, b.Name) })
	return found
}

// Len returns how many names the destination lacks or has too old, and how many it has too much.
func (s *VersionSet) Len() (missing, extra int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.missing, len(s.differ) - s.missing
}

// settle notes that source and destination hold name at v, or that the destination has put it aside, which is on record there.
func (s *VersionSet) settle(name string, v store.Version) {
	s.change(name, func(d *Difference) { d.Source, d.Synced = v, v })
}

// get returns the difference of one name.
func (s *VersionSet) get(name string) (Difference, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, ok := s.differ[name]
	return d, ok
}

func (s *VersionSet) change(name string, edit func(*Difference)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, held := s.differ[name]
	if held && d.missing() {
		s.missing--
	}
	d.Name = name
	edit(&d)
	if d.Source == d.Synced {
		delete(s.differ, name)
	} else {
		s.differ[name] = d
		if d.missing() {
			s.missing++
		}
	}
	s.tell()
}

// tell is called with mu held, so that listeners hear of changes in their order.
func (s *VersionSet) tell() {
	ready := s.inSync && len(s.differ) == 0
	if ready != s.told && s.ready != nil {
		s.ready(ready)
	}
	s.told = ready
}
