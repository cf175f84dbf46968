package syncing

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

const (
	// maxDifferences is how many differing names are held before they are worked off.
	maxDifferences = 100_000
	// bulkBytes of rows are written in one transaction of an initial copy.
	bulkBytes = 4 << 20
	// catchUpTimeout is how long an audit waits for live changes to arrive before it gives up.
	catchUpTimeout = 30 * time.Second
)

// compare makes the copies of the subrange equal to what the owner has, while the tail goes on. It may be cut off anywhere and repeated:
// the digests then say what is left.
func (s *session) compare(ctx context.Context) error {
	n := s.n
	n.progressed(0, 1)
	if held, err := n.peer.cfg.Target.CopyDigests(ctx, n.shards, n.peer.key.Region); err != nil {
		return fmt.Errorf("digests of copies of %s: %w", n, err)
	} else if len(held) == 0 {
		return s.copyAll(ctx, digests{epoch: s.epoch}) // nothing to compare with: the owner need not read its rows twice
	}
	d, err := s.digests(ctx)
	if err != nil {
		return err
	}
	if d.held < d.owned/2 {
		// Most rows are missing, so all are streamed; those that are here already are skipped.
		if err := s.copyAll(ctx, d); err != nil || d.held == 0 {
			return err // without a copy before there is none too many now
		}
		if d, err = s.digests(ctx); err != nil {
			return err
		}
	}
	return s.repair(ctx, d.differing, d.epoch, opCompare, nil, nil)
}

// audit compares digests of a live copy. What differs only because it is under way is no fault: differences count when they are still there
// after the copy has caught up with the moment at which they were seen. Then they are repaired.
func (s *session) audit(ctx context.Context) error {
	n := s.n
	n.set.Forget() // what an audit before this one could not finish
	seen, err := s.digests(ctx)
	if err != nil {
		return err
	}
	mismatched := map[int]struct{}{}
	if len(seen.differing) > 0 {
		if err := s.catchUp(ctx); err != nil {
			return err
		}
		again, err := s.digests(ctx)
		if err != nil {
			return err
		}
		still := again.differing.in(seen.differing)
		confirm := func(ctx context.Context) error { return s.confirm(ctx, still.shards()) }
		err = s.repair(ctx, still, again.epoch, opRepair, confirm, func(name string) {
			mismatched[descriptor.Shard(name, n.peer.cfg.Ring)] = struct{}{}
		})
		if err != nil {
			return err
		}
	}
	n.audited(len(mismatched))
	return nil
}

// repair finds out by name what differs in the shards and puts it right, extra copies last. confirm, unless nil, may take names out of the
// set before they are worked off; wrong, unless nil, hears of each name that was not right.
func (s *session) repair(ctx context.Context, shards shardDiffs, epoch int64, op string, confirm func(context.Context) error, wrong func(string)) error {
	if len(shards) == 0 {
		return nil
	}
	n := s.n
	to := &dbSyncer{s: s, epoch: epoch, op: op}
	if wrong != nil {
		to.sent = func(c Chunk) {
			_ = row.Walk(c.Rows, func(t *row.Tuple) error { // has been merged, so it is well-formed
				if !t.Removal() { // else it was deleted since it was listed
					wrong(t.Name())
				}
				return nil
			})
		}
	}
	syncer := &baseSyncer[Chunk]{set: n.set, fetch: s.source.Fetch, dest: to}
	owned, _ := shards.rows()
	var done int64
	for after, more := "", true; more; {
		var err error
		if after, more, err = s.list(ctx, shards.shards(), epoch, after, func() { done++; n.progressed(done, owned) }); err != nil {
			return err
		}
		done = 0 // a second pass lists everything again
		if confirm != nil {
			if err := confirm(ctx); err != nil {
				return err
			}
		}
		if err := syncer.putMissing(ctx); err != nil {
			return err
		}
		if _, extra := n.set.Len(); more && extra < maxDifferences/2 {
			continue
		}
		if wrong != nil {
			for _, d := range n.set.CollectMatching("", func(Difference) bool { return true }, maxDifferences) {
				wrong(d.Name)
			}
		}
		if err := syncer.dropExtras(ctx); err != nil {
			return err
		}
	}
	return nil
}

// list puts the names that differ into the set, in order, from the first one behind after. It stops when the set is full, and returns the last
// name it has put in and whether there may be more. No database snapshot stays open while what it found is worked off.
func (s *session) list(ctx context.Context, shards []int32, epoch int64, after string, listed func()) (last string, more bool, err error) {
	n := s.n
	missing, extra := n.set.Len()
	room := maxDifferences - missing - extra
	ctx, cancel := context.WithCancel(ctx) // a query for copies that is left early must not run on
	defer cancel()
	for d, err := range differences(s.source.Versions(ctx, shards), s.copies(ctx, shards), epoch, listed) {
		if err != nil {
			return "", false, fmt.Errorf("compare %s: %w", n, err)
		}
		if d.Name <= after {
			continue
		}
		if room == 0 {
			return last, true, nil
		}
		room--
		if (d.Synced != store.Version{}) {
			n.set.SetSynced(d.Name, d.Synced)
		}
		if d.missing() {
			n.set.SetSource(d.Name, d.Source)
		}
		last = d.Name
	}
	return last, false, nil
}

// copies lists the rows held here of the owner.
func (s *session) copies(ctx context.Context, shards []int32) iter.Seq2[NameVersion, error] {
	return func(yield func(NameVersion, error) bool) {
		left := errors.New("left") // tells the query's end from an error of its own
		err := s.n.peer.cfg.Target.CopyVersions(ctx, shards, s.n.peer.key.Region, func(name string, v store.Version) error {
			if !yield(NameVersion{name, v}, nil) {
				return left
			}
			return nil
		})
		if err != nil && !errors.Is(err, left) {
			yield(NameVersion{}, fmt.Errorf("list copies: %w", err))
		}
	}
}

// confirm takes those differences out of the set that were under way when they were listed.
func (s *session) confirm(ctx context.Context, shards []int32) error {
	set := s.n.set
	seen := set.CollectMatching("", func(Difference) bool { return true }, maxDifferences)
	if len(seen) == 0 {
		return nil
	}
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	held := make(map[string]store.Version, len(seen))
	for _, d := range seen {
		held[d.Name] = store.Version{}
	}
	for nv, err := range s.copies(ctx, shards) {
		if err != nil {
			return err
		}
		if _, asked := held[nv.Name]; asked {
			held[nv.Name] = nv.Version
		}
	}
	for _, d := range seen {
		switch now := held[d.Name]; {
		case d.missing() && now.Compare(d.Source) >= 0, !d.missing() && now != d.Synced:
			set.DelSource(d.Name)
			set.DelSynced(d.Name)
		default:
			set.SetSynced(d.Name, now)
		}
	}
	return nil
}

// catchUp waits until everything that was visible at the owner when it was called has been applied. Only the owner's clock is used.
func (s *session) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, catchUpTimeout, fmt.Errorf("not caught up within %s", catchUpTimeout))
	defer cancel()
	until, err := s.source.Ping(ctx)
	if err != nil {
		return err
	}
	if err := s.caught.wait(ctx, until); err != nil {
		return context.Cause(ctx)
	}
	return nil
}

// copyAll streams all rows of the subrange.
func (s *session) copyAll(ctx context.Context, d digests) error {
	n := s.n
	to := &dbSyncer{s: s, epoch: d.epoch, empty: d.held == 0, op: opCopy}
	n.copying(d.owned - d.held)
	defer n.copying(0)
	var c Chunk
	var done int64
	flush := func() error {
		if c.Count == 0 {
			return nil
		}
		if err := to.put(ctx, c); err != nil {
			return fmt.Errorf("copy %s: %w", n, err)
		}
		done += int64(c.Count)
		if d.owned > 0 { // else nobody has counted, and the progress stays unknown
			n.progressed(done, d.owned)
			n.copying(d.owned - max(done, d.held))
		}
		c = Chunk{c.Rows[:0], 0}
		return nil
	}
	for part, err := range s.source.FetchShards(ctx, n.shards) {
		if err != nil {
			return err
		}
		if len(c.Rows)+len(part.Rows) > bulkBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		c = Chunk{append(c.Rows, part.Rows...), c.Count + part.Count}
	}
	return flush()
}

// shardDiffs are shards whose digests differ, ordered.
type shardDiffs []shardDiff

type shardDiff struct {
	shard       int32
	owned, held int64 // rows at the owner, and copies here
}

// digests is a comparison of both sides.
type digests struct {
	owned, held int64 // rows of the whole subrange
	epoch       int64 // of the owner
	differing   shardDiffs
}

func (s *session) digests(ctx context.Context) (d digests, err error) {
	n := s.n
	source, epoch, err := s.source.Digest(ctx, n.shards)
	if err != nil {
		return digests{}, err
	}
	copies, err := n.peer.cfg.Target.CopyDigests(ctx, n.shards, n.peer.key.Region)
	if err != nil {
		return digests{}, fmt.Errorf("digests of copies of %s: %w", n, err)
	}
	d = digests{epoch: epoch, differing: differing(source, copies)}
	for _, x := range source {
		d.owned += x.Count
	}
	for _, x := range copies {
		d.held += x.Count
	}
	return d, nil
}

// differing returns the shards in which two lists of digests, ordered by shard, are not the same. A shard without rows is not listed.
func differing(source, copies []postgres.ShardDigest) shardDiffs {
	var diffs shardDiffs
	for len(source) > 0 || len(copies) > 0 {
		switch {
		case len(copies) == 0 || len(source) > 0 && source[0].Shard < copies[0].Shard:
			diffs = append(diffs, shardDiff{source[0].Shard, source[0].Count, 0})
			source = source[1:]
		case len(source) == 0 || copies[0].Shard < source[0].Shard:
			diffs = append(diffs, shardDiff{copies[0].Shard, 0, copies[0].Count})
			copies = copies[1:]
		default:
			if source[0] != copies[0] {
				diffs = append(diffs, shardDiff{source[0].Shard, source[0].Count, copies[0].Count})
			}
			source, copies = source[1:], copies[1:]
		}
	}
	return diffs
}

// rows returns how many rows the shards have at the owner and here.
func (d shardDiffs) rows() (owned, held int64) {
	for _, s := range d {
		owned += s.owned
		held += s.held
	}
	return owned, held
}

func (d shardDiffs) shards() []int32 {
	shards := make([]int32, len(d))
	for i, s := range d {
		shards[i] = s.shard
	}
	return shards
}

// in returns those shards of d that are also in other.
func (d shardDiffs) in(other shardDiffs) shardDiffs {
	var both shardDiffs
	for _, s := range d {
		for len(other) > 0 && other[0].shard < s.shard {
			other = other[1:]
		}
		if len(other) > 0 && other[0].shard == s.shard {
			both = append(both, s)
		}
	}
	return both
}
