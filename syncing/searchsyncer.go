package syncing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// errSearchDeclared ends a session: what is searched is declared anew.
var errSearchDeclared = errors.New("what is searched has been declared anew")

const (
	// checkInterval is how often an idle session looks whether the store is still as it left it.
	checkInterval = time.Second
	// searchGap is the least time between two reads of the feed: commits that come close together make one batch.
	searchGap = 5 * time.Millisecond
)

// searchSession is the writer of one subrange, from taking its lease to the first failure.
type searchSession struct {
	n       *searchNode
	version *descriptor.Version
	types   search.Types

	// mu makes batches one after the other. What is read from the database while it is held is still so when it is written, as far as the
	// feed has not told otherwise: so neither a bulk batch nor a live one can undo the other.
	mu    sync.Mutex
	lease *search.Lease

	caught watermark

	// Guarded by mu.
	cursor  feed.Cursor
	since   time.Time // clock of the last complete read
	proven  bool      // nothing before the cursor is missing, so it may be saved
	saved   time.Time
	checked time.Time
	dirty   bool // documents were written since the cursor was saved
}

// follow runs one session.
func (n *searchNode) follow(ctx context.Context) error {
	cfg := &n.local.cfg
	s := &searchSession{n: n, version: cfg.Schema(), caught: watermark{changed: make(chan struct{})}}
	s.types = search.TypesOf(s.version)
	n.set.SetSourceInSync(false)
	n.set.Forget()
	n.enter(Connecting)
	defer n.clock.dropped()
	var err error
	if s.lease, s.cursor, err = cfg.Search.Begin(ctx, n.shards, search.SchemaOf(s.types)); err != nil {
		return fmt.Errorf("begin %s: %w", n, err)
	}
	if s.proven = !s.cursor.IsZero(); s.proven {
		err := s.step(ctx, new(bool)) // is there a history from here?
		if err != nil && !errors.Is(err, feed.ErrCursorLost) {
			return err
		}
		s.proven = err == nil
	}
	if !s.proven {
		if s.cursor, _, err = cfg.Source.Feed().Now(ctx); err != nil {
			return err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return cfg.Source.Feed().Follow(ctx, feed.Interest{Shards: n.shards, Gap: searchGap}, func(ctx context.Context) (more bool, err error) {
			err = s.step(ctx, &more)
			return more, err
		})
	})
	g.Go(func() error { return s.supervise(ctx) })
	return g.Wait()
}

// step applies one read of the feed.
func (s *searchSession) step(ctx context.Context, more *bool) error {
	n, cfg := s.n, &s.n.local.cfg
	if v := cfg.Schema(); v != s.version {
		if search.SchemaOf(search.TypesOf(v)) != search.SchemaOf(s.types) {
			return errSearchDeclared
		}
		s.version = v
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var b search.Batch
	var owned []time.Time // when the rows were written, if our own clock says so
	sent := cfg.Clock()
	read, err := cfg.Source.Feed().ReadResources(ctx, s.cursor, feed.Selection{Shards: n.shards}, func(r *store.Resource) error {
		if s.version.Type(r.Type) == nil || s.version.Type(r.Type).Search == nil {
			return nil
		}
		if r.State == store.Gone {
			b.Deletions = append(b.Deletions, search.NameVersion{Name: r.Name, Version: r.Version})
			return nil
		}
		b.Upserts = append(b.Upserts, s.document(r))
		if r.OwningRegion == cfg.Region {
			owned = append(owned, r.UpdateTime)
		}
		return nil
	})
	if err != nil {
		return err
	}
	now := cfg.Clock()
	n.local.clock.ping(sent, now, read.SourceTime)
	rows := len(b.Upserts) + len(b.Deletions)
	f := &Frame{RowCount: rows, Cursor: "read", SourceTime: read.SourceTime, SinceTime: s.since, More: read.More}
	n.clock.received(f, now)
	if s.proven && (rows > 0 || s.dirty || now.Sub(s.saved) >= idleSave) {
		b.Cursor = read.Cursor
	}
	if err := s.write(ctx, opTail, b); err != nil {
		return err
	}
	s.cursor, s.since, *more = read.Cursor, read.SourceTime, read.More
	now = cfg.Clock()
	n.clock.applied(f, now, s.proven)
	for _, at := range owned {
		if took := age(n.local.clock.local(at, now), now); took != nil {
			n.local.metrics.propagation.WithLabelValues(cfg.Region).Observe(took.Seconds())
		}
	}
	switch {
	case !read.More:
		s.caught.advance(read.SourceTime)
		if s.proven {
			n.enter(Live)
		}
	case s.proven:
		n.enter(CatchingUp)
	}
	return nil
}

// document projects a resource. One that cannot be projected must not stop the others.
func (s *searchSession) document(r *store.Resource) search.Document {
	d, err := search.DocumentOf(s.version.Type(r.Type), r)
	if err != nil {
		s.n.failed(err)
	}
	return d
}

// write gives a batch to the store, or from time to time checks that the store is as it was left. s.mu is held.
func (s *searchSession) write(ctx context.Context, op string, b search.Batch) error {
	n, cfg := s.n, &s.n.local.cfg
	now := cfg.Clock()
	rows := len(b.Upserts) + len(b.Deletions)
	if rows == 0 && b.Cursor.IsZero() {
		if now.Sub(s.checked) < checkInterval {
			return nil
		}
		s.checked = now
		if err := cfg.Search.Check(ctx, s.lease); err != nil {
			return fmt.Errorf("check %s: %w", n, err)
		}
		return nil
	}
	if err := cfg.Search.Apply(ctx, s.lease, b); err != nil {
		return fmt.Errorf("apply %d changes to %s: %w", rows, n, err)
	}
	s.checked = now
	if s.dirty = s.dirty || rows > 0; !b.Cursor.IsZero() {
		s.saved, s.dirty = now, false
	}
	n.local.applied.Add(int64(rows))
	n.local.metrics.rows.WithLabelValues(cfg.Region, op).Add(float64(rows))
	bytes := 0
	for _, d := range b.Upserts {
		bytes += len(d.Values)
		for _, t := range d.Texts {
			bytes += len(t)
		}
	}
	n.local.metrics.bytes.WithLabelValues(cfg.Region).Add(float64(bytes))
	return nil
}

// supervise compares if that must be done, and then audits from time to time.
func (s *searchSession) supervise(ctx context.Context) error {
	n, cfg := s.n, &s.n.local.cfg
	if !s.isProven() {
		n.enter(Comparing)
		if err := s.compare(ctx); err != nil {
			return err
		}
		if err := s.prove(ctx); err != nil {
			return err
		}
	}
	n.set.SetSourceInSync(true)
	for interval := cfg.AuditInterval; interval > 0; {
		select {
		case <-time.After(interval/2 + rand.N(interval)): // spread: the subranges would all read at once
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := s.audit(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if _, known := errors.AsType[*store.Error](err); !known {
				return err // the lease is void
			}
			n.failed(fmt.Errorf("audit of %s: %w", n, err))
		}
	}
	return nil
}

func (s *searchSession) isProven() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proven
}

// prove saves the cursor when a comparison has ended: everything before it is in the store.
func (s *searchSession) prove(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.write(ctx, opCompare, search.Batch{Cursor: s.cursor}); err != nil {
		return err
	}
	s.proven = true
	s.n.clock.proved()
	s.n.enter(Live)
	return nil
}

// digests returns the shards in which the database and the store differ.
func (s *searchSession) digests(ctx context.Context) (shardDiffs, error) {
	n, cfg := s.n, &s.n.local.cfg
	rows, err := cfg.Source.SearchDigests(ctx, n.shards, s.types)
	if err != nil {
		return nil, err
	}
	docs, err := cfg.Search.Digests(ctx, n.shards, s.types)
	if err != nil {
		return nil, err
	}
	return differing(rows, docs), nil
}

// compare makes the store equal to the database while the feed goes on. It may be cut off anywhere and repeated.
func (s *searchSession) compare(ctx context.Context) error {
	s.n.progressed(0, 1)
	differ, err := s.digests(ctx)
	if err != nil {
		return err
	}
	return s.repair(ctx, differ, opCompare, nil)
}

// audit compares digests of a live store. What differs only because it is under way is no fault: differences count when they are still there after the store has
// caught up with the moment at which they were seen. Then they are listed and repaired.
func (s *searchSession) audit(ctx context.Context) error {
	n, cfg := s.n, &s.n.local.cfg
	n.set.Forget() // what an audit before this one could not finish
	seen, err := s.digests(ctx)
	if err != nil {
		return err
	}
	mismatched := map[int]struct{}{}
	if len(seen) > 0 {
		if err := s.catchUp(ctx); err != nil {
			return err
		}
		again, err := s.digests(ctx)
		if err != nil {
			return err
		}
		still := again.in(seen)
		err = s.repair(ctx, still, opRepair, func(ctx context.Context) error {
			if err := s.confirm(ctx, still.shards()); err != nil {
				return err
			}
			var found []Drift
			for _, d := range n.set.CollectMatching("", func(Difference) bool { return true }, maxDifferences) {
				mismatched[descriptor.Shard(d.Name, cfg.Ring)] = struct{}{}
				found = append(found, Drift{d.Name, driftOf(d), cfg.Clock()})
			}
			n.local.drifted(found)
			if len(found) > 0 {
				n.log.Warn("audit found documents that were not equal to their rows, and repairs them", "documents", len(found), "first", found[0].Name, "kind", found[0].Kind)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	n.local.metrics.mismatched.WithLabelValues(cfg.Region, n.shards.String()).Set(float64(len(mismatched)))
	return nil
}

func driftOf(d Difference) DriftKind {
	switch {
	case !d.missing():
		return Ghost
	case d.Synced == store.Version{}:
		return Hole
	}
	return Stale
}

// repair finds out by name what differs in the shards and puts it right, ghosts last. confirm, unless nil, may take names out of the set before they are
// worked off.
func (s *searchSession) repair(ctx context.Context, shards shardDiffs, op string, confirm func(context.Context) error) error {
	if len(shards) == 0 {
		return nil
	}
	n := s.n
	syncer := &baseSyncer[documents]{set: n.set, fetch: s.fetch, dest: &searchSyncer{s, op}}
	rows, _ := shards.rows()
	var done int64
	for after, more := "", true; more; {
		var err error
		if after, more, err = s.list(ctx, shards.shards(), after, func() { done++ }); err != nil {
			return err
		}
		if confirm != nil {
			if err := confirm(ctx); err != nil {
				return err
			}
		}
		if err := syncer.putMissing(ctx); err != nil {
			return err
		}
		if err := syncer.dropExtras(ctx); err != nil {
			return err
		}
		n.progressed(done, rows)
	}
	return nil
}

// list puts the names that differ into the set, in order, from the first one behind after. It stops when the set is full, and returns the last
// name it has put in and whether there may be more.
func (s *searchSession) list(ctx context.Context, shards []int32, after string, listed func()) (last string, more bool, err error) {
	n := s.n
	missing, extra := n.set.Len()
	room := maxDifferences - missing - extra
	ctx, cancel := context.WithCancel(ctx) // a query that is left early must not run on
	defer cancel()
	// The database is right about everything, whatever the versions are.
	for d, err := range differences(s.rows(ctx, shards, after), s.docs(ctx, shards, after), math.MaxInt64, listed) {
		if err != nil {
			return "", false, fmt.Errorf("compare %s: %w", n, err)
		}
		if room == 0 {
			return last, true, nil
		}
		room--
		if d.Synced != (store.Version{}) {
			n.set.SetSynced(d.Name, d.Synced)
		}
		if d.missing() {
			n.set.SetSource(d.Name, d.Source)
		}
		last = d.Name
	}
	return last, false, nil
}

// rows lists what the database has, docs what the search store has.
func (s *searchSession) rows(ctx context.Context, shards []int32, after string) iter.Seq2[NameVersion, error] {
	return listed(func(emit func(string, store.Version) error) error {
		return s.n.local.cfg.Source.SearchVersions(ctx, shards, s.types, after, emit)
	})
}

func (s *searchSession) docs(ctx context.Context, shards []int32, after string) iter.Seq2[NameVersion, error] {
	return listed(func(emit func(string, store.Version) error) error {
		return s.n.local.cfg.Search.Versions(ctx, shards, s.types, after, emit)
	})
}

// listed makes a sequence of a list that is read by a callback.
func listed(list func(emit func(string, store.Version) error) error) iter.Seq2[NameVersion, error] {
	return func(yield func(NameVersion, error) bool) {
		left := errors.New("left") // tells the reader's end from an error of the list
		err := list(func(name string, v store.Version) error {
			if !yield(NameVersion{name, v}, nil) {
				return left
			}
			return nil
		})
		if err != nil && !errors.Is(err, left) {
			yield(NameVersion{}, err)
		}
	}
}

// confirm takes those differences out of the set that were under way when they were listed: a row that has stayed as it was must be in the store in that
// version once the store has caught up.
func (s *searchSession) confirm(ctx context.Context, shards []int32) error {
	set := s.n.set
	seen := set.CollectMatching("", func(Difference) bool { return true }, maxDifferences)
	if len(seen) == 0 {
		return nil
	}
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	docs, rows := map[string]store.Version{}, map[string]store.Version{}
	for _, d := range seen {
		docs[d.Name], rows[d.Name] = store.Version{}, store.Version{}
	}
	for _, side := range []struct {
		have map[string]store.Version
		list iter.Seq2[NameVersion, error]
	}{{docs, s.docs(ctx, shards, "")}, {rows, s.rows(ctx, shards, "")}} {
		for nv, err := range side.list {
			if err != nil {
				return err
			}
			if _, asked := side.have[nv.Name]; asked {
				side.have[nv.Name] = nv.Version
			}
		}
	}
	for _, d := range seen {
		if rows[d.Name] != d.Source || docs[d.Name] == d.Source {
			set.DelSource(d.Name)
			set.DelSynced(d.Name)
			continue
		}
		set.SetSynced(d.Name, docs[d.Name])
	}
	return nil
}

// catchUp waits until everything that was visible in the database when it was called has been applied.
func (s *searchSession) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, catchUpTimeout, fmt.Errorf("not caught up within %s", catchUpTimeout))
	defer cancel()
	_, until, err := s.n.local.cfg.Source.Feed().Now(ctx)
	if err != nil {
		return err
	}
	if err := s.caught.wait(ctx, until); err != nil {
		return store.Errorf(store.Unavailable, "", "%s", cmp.Or(context.Cause(ctx), err))
	}
	return nil
}

// documents are fetched rows as the search store takes them.
type documents []search.Document

func (d documents) rows() int { return len(d) }

func (d documents) each(visit func(name string, v store.Version)) error {
	for _, doc := range d {
		visit(doc.Name, doc.Version)
	}
	return nil
}

// fetch reads the named rows as they are now. Nothing else is written until they are: its reader puts them within the loop.
func (s *searchSession) fetch(ctx context.Context, names []string) iter.Seq2[documents, error] {
	return func(yield func(documents, error) bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		var docs documents
		err := s.n.local.cfg.Source.SearchNames(ctx, names, s.types, func(r *store.Resource) error {
			docs = append(docs, s.document(r))
			return nil
		})
		if err != nil {
			yield(nil, err)
			return
		}
		if len(docs) > 0 {
			yield(docs, nil)
		}
	}
}

// searchSyncer is a search store as a destination (spec F99).
type searchSyncer struct {
	s  *searchSession
	op string
}

// put writes what fetch has read; s.mu is held there.
func (d *searchSyncer) put(ctx context.Context, docs documents) error {
	return d.s.write(ctx, d.op, search.Batch{Upserts: docs, Force: true})
}

// drop asks the database once more: what has come back in the meantime stays.
func (d *searchSyncer) drop(ctx context.Context, extras []NameVersion) error {
	if len(extras) == 0 {
		return nil
	}
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	names := make([]string, len(extras))
	for i, e := range extras {
		names[i] = e.Name
	}
	back := map[string]bool{}
	err := d.s.n.local.cfg.Source.SearchNames(ctx, names, d.s.types, func(r *store.Resource) error {
		back[r.Name] = true
		return nil
	})
	if err != nil {
		return err
	}
	b := search.Batch{Force: true}
	for _, e := range extras {
		if !back[e.Name] {
			b.Deletions = append(b.Deletions, search.NameVersion(e))
		}
	}
	return d.s.write(ctx, opDelete, b)
}
