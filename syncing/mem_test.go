package syncing

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/store/row"
)

// The owner and the copies of these tests live in memory, so that time can be scripted and faults put anywhere. They keep the
// rules of the store: versions, tombstones, epochs, cursors.

const (
	memService = "library.example.com"
	memRing    = 16
)

type memRow struct {
	version store.Version
	gone    bool
	change  uint64
	written time.Time
	uuid    byte
}

// tuple returns r as it travels.
func (r memRow) tuple(name, owner string) []byte {
	i64 := func(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }
	state, body := uint16(store.Active), []byte("{}")
	if r.gone {
		state, body = uint16(store.Gone), nil
	}
	fields := [][]byte{
		[]byte(name), []byte("Book"), slices.Repeat([]byte{r.uuid}, 16), i64(r.version.Epoch), i64(r.version.Number), i64(1),
		binary.BigEndian.AppendUint32(nil, uint32(descriptor.Shard(name, memRing))), []byte(owner), {}, binary.BigEndian.AppendUint16(nil, state), {0},
		i64(0), i64(r.written.Sub(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).Microseconds()), nil, []byte("{}"), body,
	}
	return row.Append(nil, fields)
}

// memOwner is a Source whose owner is in memory.
type memOwner struct {
	region string
	ahead  time.Duration // its clock minus ours
	limit  int           // rows of a read
	frame  int           // rows of a frame

	mu      sync.Mutex
	epoch   int64
	change  uint64
	purged  uint64
	floor   int64 // a name that is born again starts above it
	rows    map[string]memRow
	changed chan struct{}
	down    chan struct{}         // nil while reachable; else nothing answers until it is closed
	fault   func(op string) error // may be nil
	asked   map[string]int        // questions by kind
	onFetch func()                // runs between the answer to a list and that to a fetch
}

func newMemOwner(region string) *memOwner {
	return &memOwner{region: region, limit: 4, frame: 2, epoch: 1, rows: map[string]memRow{}, changed: make(chan struct{}), asked: map[string]int{}}
}

func (o *memOwner) put(name string, gone bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := o.rows[name]
	o.change++
	r.version = store.Version{Epoch: o.epoch, Number: max(r.version.Number, o.floor) + 1}
	r.gone, r.change, r.written = gone, o.change, time.Now().Add(o.ahead)
	o.rows[name] = r
	o.wake()
}

func (o *memOwner) save(names ...string) {
	for _, n := range names {
		o.put(n, false)
	}
}

func (o *memOwner) wake() {
	close(o.changed)
	o.changed = make(chan struct{})
}

// backup and restore make a failover that loses what was written in between.
func (o *memOwner) backup() map[string]memRow {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.rows)
}

func (o *memOwner) restore(rows map[string]memRow) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rows = maps.Clone(rows)
	o.epoch++
	o.wake()
}

func (o *memOwner) purge() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, r := range o.rows {
		if r.gone {
			o.purged, o.floor = max(o.purged, r.change), max(o.floor, r.version.Number)
			delete(o.rows, name)
		}
	}
}

func (o *memOwner) cut() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.down == nil {
		o.down = make(chan struct{})
	}
}

func (o *memOwner) heal() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.down != nil {
		close(o.down)
		o.down = nil
	}
}

// live returns what the owner has.
func (o *memOwner) live() map[string]store.Version {
	o.mu.Lock()
	defer o.mu.Unlock()
	return liveOf(o.rows)
}

func liveOf(rows map[string]memRow) map[string]store.Version {
	live := map[string]store.Version{}
	for name, r := range rows {
		if !r.gone {
			live[name] = r.version
		}
	}
	return live
}

// reach waits while the owner is cut off, and may fail.
func (o *memOwner) reach(ctx context.Context, op string, patience time.Duration) error {
	for {
		o.mu.Lock()
		down, fault := o.down, o.fault
		if down == nil {
			o.asked[op]++
			o.mu.Unlock()
			if fault != nil {
				return fault(op)
			}
			return nil
		}
		o.mu.Unlock()
		select {
		case <-down:
		case <-time.After(patience):
			return &SourceError{Unreachable, op, errors.New("silent")}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (o *memOwner) Ping(ctx context.Context) (time.Time, error) {
	if err := o.reach(ctx, "ping", pingTimeout); err != nil {
		return time.Time{}, err
	}
	return time.Now().Add(o.ahead), nil
}

func (o *memOwner) Close() {}

func (o *memOwner) now() feed.Cursor {
	return feed.Cursor{Epoch: o.epoch, Snapshot: feed.Snapshot{Xmin: o.change + 1, Xmax: o.change + 1}}
}

func in(name string, shards feed.Range) bool {
	s := int32(descriptor.Shard(name, memRing))
	return s >= shards.From && s < shards.To
}

func (o *memOwner) chunk(names []string) Chunk {
	var c Chunk
	for _, n := range names {
		c.Rows = append(c.Rows, o.rows[n].tuple(n, o.region)...)
		c.Count++
	}
	return c
}

func (o *memOwner) Tail(ctx context.Context, shards feed.Range, cursor string) iter.Seq2[*Frame, error] {
	return func(yield func(*Frame, error) bool) {
		at, err := feed.ParseToken(cursor)
		if err != nil {
			yield(nil, err)
			return
		}
		var since time.Time
		for {
			if err := o.reach(ctx, "tail", tailSilence); err != nil {
				yield(nil, err)
				return
			}
			o.mu.Lock()
			changed := o.changed
			if at.IsZero() {
				at = o.now()
			}
			if at.Epoch != o.epoch || at.Snapshot.Xmax > o.change+1 || o.purged >= at.Snapshot.Xmax {
				o.mu.Unlock()
				yield(nil, &SourceError{CursorLost, "tail", feed.ErrCursorLost})
				return
			}
			var names []string
			for n, r := range o.rows {
				if in(n, shards) && r.change >= at.Snapshot.Xmax {
					names = append(names, n)
				}
			}
			slices.SortFunc(names, func(a, b string) int { return int(o.rows[a].change) - int(o.rows[b].change) })
			end := &Frame{SourceTime: time.Now().Add(o.ahead), SinceTime: since, Epoch: o.epoch}
			at = o.now()
			if len(names) > o.limit {
				names, end.More = names[:o.limit], true
				x := o.rows[names[o.limit-1]].change + 1
				at.Snapshot = feed.Snapshot{Xmin: x, Xmax: x}
			}
			end.Cursor = at.Token()
			frames := []*Frame{}
			for len(names) > o.frame {
				c := o.chunk(names[:o.frame])
				frames = append(frames, &Frame{Rows: c.Rows, RowCount: c.Count})
				names = names[o.frame:]
			}
			c := o.chunk(names)
			end.Rows, end.RowCount = c.Rows, c.Count
			since = end.SourceTime
			o.mu.Unlock()
			for _, f := range append(frames, end) {
				if !yield(f, nil) {
					return
				}
			}
			if end.More {
				continue
			}
			select {
			case <-changed:
			case <-time.After(time.Second):
			case <-ctx.Done():
				yield(nil, ctx.Err())
				return
			}
		}
	}
}

func digestsOf(rows map[string]store.Version, shards feed.Range) []postgres.ShardDigest {
	by := map[int32]postgres.ShardDigest{}
	for n, ver := range rows {
		if !in(n, shards) {
			continue
		}
		s := int32(descriptor.Shard(n, memRing))
		d := by[s]
		d.Shard = s
		d.Count++
		d.Hash ^= int64(descriptor.Shard(fmt.Sprint(n, ver), 1<<31-1))
		by[s] = d
	}
	return slices.SortedFunc(maps.Values(by), func(a, b postgres.ShardDigest) int { return int(a.Shard - b.Shard) })
}

func (o *memOwner) Digest(ctx context.Context, shards feed.Range) ([]postgres.ShardDigest, int64, error) {
	if err := o.reach(ctx, "digest", digestTimeout); err != nil {
		return nil, 0, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return digestsOf(liveOf(o.rows), shards), o.epoch, nil
}

func (o *memOwner) Versions(ctx context.Context, shards []int32) iter.Seq2[NameVersion, error] {
	return func(yield func(NameVersion, error) bool) {
		if err := o.reach(ctx, "versions", listSilence); err != nil {
			yield(NameVersion{}, err)
			return
		}
		for nv, err := range sortedList(o.live()) {
			if err != nil {
				panic(err) // it has none
			}
			if slices.Contains(shards, int32(descriptor.Shard(nv.Name, memRing))) && !yield(nv, nil) {
				return
			}
		}
	}
}

func (o *memOwner) fetch(ctx context.Context, wanted func(string, memRow) bool) iter.Seq2[Chunk, error] {
	return func(yield func(Chunk, error) bool) {
		if o.onFetch != nil {
			o.onFetch()
		}
		if err := o.reach(ctx, "fetch", listSilence); err != nil {
			yield(Chunk{}, err)
			return
		}
		o.mu.Lock()
		var chunks []Chunk
		for n, r := range o.rows {
			if wanted(n, r) {
				chunks = append(chunks, o.chunk([]string{n}))
			}
		}
		o.mu.Unlock()
		for _, c := range chunks {
			if !yield(c, nil) {
				return
			}
		}
	}
}

func (o *memOwner) Fetch(ctx context.Context, names []string) iter.Seq2[Chunk, error] {
	return o.fetch(ctx, func(n string, _ memRow) bool { return slices.Contains(names, n) })
}

func (o *memOwner) FetchShards(ctx context.Context, shards feed.Range) iter.Seq2[Chunk, error] {
	return o.fetch(ctx, func(n string, r memRow) bool { return !r.gone && in(n, shards) })
}

// memTarget is a Target in memory.
type memTarget struct {
	mu       sync.Mutex
	rows     map[string]memRow
	owner    map[string]string
	epochs   map[string]int64
	cursors  map[string]feed.Cursor
	poison   map[string]bool
	merging  int // Merges under way
	batches  int
	writes   int
	regress  error                 // the first row that went back without the owner's epoch having ended
	fault    func(op string) error // may be nil; an error of "merged" comes after the effect
	slow     time.Duration
	quarant  map[string]bool
	maxMerge int // the most Merges at once
}

func newMemTarget() *memTarget {
	return &memTarget{rows: map[string]memRow{}, owner: map[string]string{}, epochs: map[string]int64{}, cursors: map[string]feed.Cursor{}, poison: map[string]bool{}, quarant: map[string]bool{}}
}

func (t *memTarget) fails(op string) error {
	t.mu.Lock()
	fault := t.fault
	t.mu.Unlock()
	if fault == nil {
		return nil
	}
	return fault(op)
}

func (t *memTarget) live(owner string) map[string]store.Version {
	t.mu.Lock()
	defer t.mu.Unlock()
	rows := map[string]memRow{}
	for n, r := range t.rows {
		if t.owner[n] == owner {
			rows[n] = r
		}
	}
	return liveOf(rows)
}

func (t *memTarget) CopyDigests(_ context.Context, shards feed.Range, owner string) ([]postgres.ShardDigest, error) {
	return digestsOf(t.live(owner), shards), t.fails("digests")
}

func (t *memTarget) CopyVersions(_ context.Context, shards []int32, owner string, emit func(string, store.Version) error) error {
	for nv, err := range sortedList(t.live(owner)) {
		if err != nil {
			return err
		}
		if slices.Contains(shards, int32(descriptor.Shard(nv.Name, memRing))) {
			if err := emit(nv.Name, nv.Version); err != nil {
				return err
			}
		}
	}
	return t.fails("versions")
}

func (t *memTarget) note(p postgres.Peer) error {
	t.epochs[p.Region] = max(t.epochs[p.Region], p.Epoch)
	if t.epochs[p.Region] != p.Epoch {
		return postgres.ErrStaleEpoch
	}
	return nil
}

func (t *memTarget) Merge(ctx context.Context, b postgres.Batch) (postgres.Merged, error) {
	if err := t.fails("merge"); err != nil {
		return postgres.Merged{}, err
	}
	t.mu.Lock()
	t.merging++
	t.maxMerge = max(t.maxMerge, t.merging)
	slow := t.slow
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.merging--
		t.mu.Unlock()
	}()
	if slow > 0 {
		select {
		case <-time.After(slow):
		case <-ctx.Done():
			return postgres.Merged{}, ctx.Err()
		}
	}
	t.mu.Lock()
	if err := t.note(b.Peer); err != nil {
		t.mu.Unlock()
		return postgres.Merged{}, err
	}
	var m postgres.Merged
	err := row.Walk(b.Tuples, func(tu *row.Tuple) error {
		name, ver := tu.Name(), tu.Version()
		if t.poison[name] || t.owner[name] != "" && t.owner[name] != b.Peer.Region {
			t.quarant[name] = true
			m.Quarantined++
			return nil
		}
		held, ok := t.rows[name]
		if ok && held.version.Compare(ver) >= 0 && (held.version.Epoch >= b.Peer.Epoch || held.version == ver && held.gone == tu.Removal()) {
			return nil
		}
		if ok && held.version.Compare(ver) > 0 && held.version.Epoch == t.epochs[b.Peer.Region] && t.regress == nil {
			t.regress = fmt.Errorf("%s went from %v back to %v", name, held.version, ver)
		}
		t.rows[name] = memRow{version: ver, gone: tu.Removal()}
		t.owner[name] = b.Peer.Region
		delete(t.quarant, name)
		m.Applied++
		return nil
	})
	t.batches++
	t.writes += m.Applied
	if !b.Cursor.IsZero() {
		t.cursors[b.Peer.Region+b.Shards.String()] = b.Cursor
	}
	t.mu.Unlock()
	if err == nil {
		err = t.fails("merged")
	}
	return m, err
}

func (t *memTarget) DeleteExtras(_ context.Context, p postgres.Peer, extras []postgres.NameVersion) (int, error) {
	if err := t.fails("delete"); err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.note(p); err != nil {
		return 0, err
	}
	n := 0
	for _, e := range extras {
		if r := t.rows[e.Name]; t.owner[e.Name] == p.Region && !r.gone && r.version == e.Version {
			r.gone = true
			t.rows[e.Name] = r
			n++
		}
	}
	return n, nil
}

func (t *memTarget) LoadCursor(_ context.Context, _, region string, shards feed.Range) (feed.Cursor, error) {
	if err := t.fails("load"); err != nil {
		return feed.Cursor{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.cursors[region+shards.String()], nil
}

func (t *memTarget) SaveCursor(_ context.Context, _, region string, shards feed.Range, c feed.Cursor) error {
	if err := t.fails("save"); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cursors[region+shards.String()] = c
	return nil
}

func (t *memTarget) SaveRate(context.Context, string, float64) error { return t.fails("rate") }

func (t *memTarget) CopyOwners(context.Context, string) ([]string, error) {
	if err := t.fails("owners"); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Compact(slices.Sorted(maps.Values(t.owner))), nil
}

func (t *memTarget) DropCopies(_ context.Context, _, owner string, limit int) (int, error) {
	if err := t.fails("drop"); err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for name, r := range t.rows {
		if t.owner[name] == owner && !r.gone && n < limit {
			r.gone = true
			t.rows[name] = r
			n++
		}
	}
	return n, nil
}

func (t *memTarget) Quarantine(_ context.Context, _ string, _ int) ([]postgres.Quarantined, int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return nil, len(t.quarant), nil
}
