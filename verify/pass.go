package verify

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// Truth is the side that is right.
type Truth interface {
	// Ranges digests the rows of the types (none: all) that the mirror should hold, in up to parts ranges of size rows of its table, behind after.
	Ranges(ctx context.Context, types []string, after string, size, parts int) (postgres.Ranges, error)
	// Hashes yields them with names in (after, to], ordered by name.
	Hashes(ctx context.Context, types []string, after, to string) iter.Seq2[postgres.RowHash, error]
	// Look returns what is known of up to lookBatch names, whoever should hold them, and the epoch in which Change counts.
	Look(ctx context.Context, names []string) ([]postgres.RowHash, int64, error)
}

// Mirror is the side that is compared.
type Mirror interface {
	// Ranges digests the rows in given ranges.
	Ranges(ctx context.Context, types []string, after string, to []string) ([]postgres.RangeDigest, error)
	// Hashes and Look are as those of a Truth.
	Hashes(ctx context.Context, types []string, after, to string) iter.Seq2[postgres.RowHash, error]
	Look(ctx context.Context, names []string) ([]postgres.RowHash, error)
	// Reached returns what tells whether the effects of a transaction of the truth have arrived.
	Reached(ctx context.Context, epoch int64) (func(change uint64) bool, error)
	// Action says what Repair does about a difference; ok is false when it does nothing.
	Action(d Difference) (action string, ok bool)
	// Repair makes the names what the truth says now, each only if it still is what was seen in the mirror. The differences returned were left, their Action says why.
	Repair(ctx context.Context, epoch int64, differences []Difference) (left []Difference, err error)
}

// Mode says what is done about differences.
type Mode int

// The modes.
const (
	Report Mode = iota
	DryRun
	Repair
)

// Difference is a name for which the mirror is wrong.
type Difference struct {
	Name, Type string
	Kind       Kind
	// Truth and Mirror are the versions; zero where there is no such row.
	Truth, Mirror store.Version
	// Behind says that the mirror had not received the change when the pass stopped waiting for it.
	Behind bool
	// Action is what was done, or would be done; empty in mode Report.
	Action string
	// Repaired says that a look after the repair found both sides equal.
	Repaired bool

	seen postgres.RowHash // in the mirror
}

// Options of a pass. Zero values mean their defaults.
type Options struct {
	// Types to compare; none: all.
	Types []string
	// Mode defaults to Report.
	Mode Mode
	// Size is how many rows of the truth's table one digest covers, default 2000; Parts how many digests one step asks for, default 10.
	Size, Parts int
	// Rate is the most rows of the truth's table that are read per second; 0 is no limit.
	Rate int
	// Pause is the pause after each step as a multiple of its time; 0 is none.
	Pause float64
	// Grace is the time between two looks at a suspect. Default 250 ms.
	Grace time.Duration
	// Settle is how long the mirror may take to receive a change before what lacks it counts as a difference that is behind. Default 15 s: a quiet pair stores how far
	// it has come every ten.
	Settle time.Duration
	// For is how long the call goes on to new rows; then it ends when what it has found is judged, at most about Settle later. 0: only the pass ends it.
	For time.Duration
	// Now and Sleep are for tests.
	Now   func() time.Time
	Sleep func(ctx context.Context, d time.Duration) error
}

func (o Options) withDefaults() Options {
	o.Size, o.Parts = cmp.Or(o.Size, 2000), cmp.Or(o.Parts, 10)
	o.Grace, o.Settle = cmp.Or(o.Grace, 250*time.Millisecond), cmp.Or(o.Settle, 15*time.Second)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Sleep == nil {
		o.Sleep = sleep
	}
	return o
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// State is where a pass stands. It is stored as JSON, and all that a pass needs to go on.
type State struct {
	Types []string `json:"types,omitempty"`
	// After is the name up to which rows were digested; postgres.LastName: all were.
	After string `json:"after,omitempty"`
	// Pending are names that differed and are not judged yet.
	Pending []string `json:"pending,omitempty"`
	// Began is the truth's time when the pass began: what it proves, it proves up to there.
	Began time.Time `json:"began,omitzero"`
	// Done are the rows of the truth's table that were read, of about Total when the pass began; Compared those that the mirror should hold.
	Done     int64 `json:"done,omitempty"`
	Total    int64 `json:"total,omitempty"`
	Compared int64 `json:"compared,omitempty"`
	// Differences and Repaired count them by type.
	Differences map[string]int64 `json:"differences,omitempty"`
	Repaired    map[string]int64 `json:"repaired,omitempty"`
	Finished    bool             `json:"finished,omitempty"`
}

// Counts returns how many differences there were, and how many of them were put right.
func (s State) Counts() (differences, repaired int64) {
	for _, n := range s.Differences {
		differences += n
	}
	for _, n := range s.Repaired {
		repaired += n
	}
	return differences, repaired
}

// Left returns how many differences of a type are still there.
func (s State) Left(typ string) int64 { return s.Differences[typ] - s.Repaired[typ] }

// VerifiedThrough returns the truth's time up to which the mirror has everything, zero unless the pass has finished and left no difference.
func (s State) VerifiedThrough() time.Time {
	if d, r := s.Counts(); !s.Finished || d > r {
		return time.Time{}
	}
	return s.Began
}

// Token is the state as text.
func (s State) Token() string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // it has nothing that JSON lacks
	}
	return string(b)
}

// ParseState reads a Token; an empty one is the beginning.
func ParseState(token string) (s State, err error) {
	if token == "" {
		return s, nil
	}
	if err := json.Unmarshal([]byte(token), &s); err != nil {
		return s, fmt.Errorf("this is no state of a verification: %w", err)
	}
	return s, nil
}

// Progress is told after each step.
type Progress struct {
	// State to resume from: it counts all differences that have been told.
	State State
	// Found are the differences since the last report.
	Found []Difference
	// Rate is in rows of the truth's table per second, pauses included; ETA is negative while it is not known.
	Rate float64
	ETA  time.Duration
}

const (
	// maxPending bounds the suspects; while there are so many, the pass goes no further.
	maxPending = 1000
	// lookBatch is how many names are looked at, or repaired, at once.
	lookBatch = 1000
	// repairRounds is how often a repair is tried: what is written meanwhile may undo it.
	repairRounds = 3
	// maxLooks at a name that moves each time: it is followed, if late.
	maxLooks = 40
)

// suspect is a name that differed.
type suspect struct {
	sight
	seen  bool // sight is filled in
	at    time.Time
	first time.Time
	looks int
}

// pass is one call of Run.
type pass struct {
	truth    Truth
	mirror   Mirror
	opt      Options
	state    State
	report   func(Progress) error
	suspects map[string]*suspect
	found    []Difference
	// behind is set when the pass has waited in vain: it does not wait again before the mirror moves.
	behind bool

	started   time.Time
	startDone int64
	walked    bool
	next      *postgres.Ranges // read ahead, behind state.After
}

// Run goes on with a pass, from the zero State at its beginning, until it is finished or opt.For is over. report is called after each step and once at the end, and ends the pass with its error. The State
// returned is the last one reported, with an error too.
func Run(ctx context.Context, truth Truth, mirror Mirror, opt Options, from State, report func(Progress) error) (State, error) {
	if from.Finished {
		return from, nil
	}
	if !slices.Equal(from.Types, opt.Types) && from.After != "" {
		return from, store.Errorf(store.InvalidArgument, "", "the pass to resume compares the types [%s], not [%s]: ask for the same ones, or begin anew",
			strings.Join(from.Types, " "), strings.Join(opt.Types, " "))
	}
	p := &pass{truth: truth, mirror: mirror, opt: opt.withDefaults(), state: from, report: report, suspects: map[string]*suspect{}}
	p.state.Types = opt.Types
	for _, name := range from.Pending {
		p.suspects[name] = &suspect{}
	}
	p.started, p.startDone = p.opt.Now(), from.Done
	last := from
	for {
		began, done := p.opt.Now(), p.state.Done
		if err := p.step(ctx); err != nil {
			return last, err
		}
		took := p.opt.Now().Sub(began)
		now := p.progress()
		if err := p.report(now); err != nil {
			return last, err
		}
		last = now.State
		if p.state.Finished || p.over() && len(p.suspects) == 0 {
			return last, nil
		}
		if pause := p.pause(took, p.state.Done-done); pause > 0 {
			if err := p.opt.Sleep(ctx, pause); err != nil {
				return last, err
			}
		}
	}
}

// over says that no new rows are read in this call. Each call reads some.
func (p *pass) over() bool {
	return p.walked && p.opt.For > 0 && p.opt.Now().Sub(p.started) >= p.opt.For
}

// pause is how long the databases are left alone after a step.
func (p *pass) pause(took time.Duration, rows int64) time.Duration {
	pause := time.Duration(float64(took) * p.opt.Pause)
	if p.opt.Rate > 0 {
		pause = max(pause, time.Duration(float64(rows)/float64(p.opt.Rate)*float64(time.Second))-took)
	}
	if rows == 0 { // only suspects are left, which want time
		pause = max(pause, p.opt.Grace)
	}
	return pause
}

// step digests a run of ranges, unless there are enough suspects, and looks at suspects that are due.
func (p *pass) step(ctx context.Context) error {
	if p.state.After != postgres.LastName && len(p.suspects) < maxPending && !p.over() {
		if err := p.walk(ctx); err != nil {
			return err
		}
	}
	if err := p.settle(ctx); err != nil {
		return err
	}
	p.state.Finished = p.state.After == postgres.LastName && len(p.suspects) == 0
	return nil
}

// walk compares the next ranges. The truth reads those behind them meanwhile.
func (p *pass) walk(ctx context.Context) error {
	p.walked = true
	if p.next == nil {
		r, err := p.truth.Ranges(ctx, p.state.Types, p.state.After, p.opt.Size, p.opt.Parts)
		if err != nil {
			return fmt.Errorf("digest the truth: %w", err)
		}
		p.next = &r
	}
	now := *p.next
	p.next = nil
	if p.state.After == "" {
		p.state.Began, p.state.Total = now.Time, now.Total
	}
	to := make([]string, len(now.Ranges))
	for i, r := range now.Ranges {
		to[i] = r.To
	}
	end := to[len(to)-1]

	var ahead *postgres.Ranges
	var digests []postgres.RangeDigest
	g, gctx := errgroup.WithContext(ctx)
	if end != postgres.LastName {
		g.Go(func() error {
			r, err := p.truth.Ranges(gctx, p.state.Types, end, p.opt.Size, p.opt.Parts)
			ahead = &r
			return err
		})
	}
	g.Go(func() (err error) {
		digests, err = p.mirror.Ranges(gctx, p.state.Types, p.state.After, to)
		return err
	})
	if err := g.Wait(); err != nil {
		return fmt.Errorf("digest ranges: %w", err)
	}
	if len(digests) != len(to) {
		return fmt.Errorf("digest ranges: %d of %d were answered", len(digests), len(to))
	}
	for i, want := range now.Ranges {
		if digests[i] != want {
			listed, stopped, err := p.list(ctx, p.state.After, want.To)
			if err != nil {
				return err
			}
			if stopped { // enough for now: the rest of the range is digested again
				p.state.Compared += listed
				p.state.Done += listed
				return nil
			}
		}
		p.state.After = want.To
		p.state.Compared += want.Count
	}
	p.state.Done += now.Scanned // of ranges that are left early, what was listed: near enough for a progress
	if p.state.Total = max(p.state.Total, p.state.Done); p.state.After == postgres.LastName {
		p.state.Total = p.state.Done // it was an estimate
	}
	p.next = ahead
	return nil
}

// list makes suspects of the rows in (after, to] that differ. It stops, with state.After at the last one, when there are too many. listed counts the truth's rows.
func (p *pass) list(ctx context.Context, after, to string) (listed int64, stopped bool, err error) {
	next, stop := iter.Pull2(p.mirror.Hashes(ctx, p.state.Types, after, to))
	defer stop()
	have, err, ok := next()
	add := func(name string) (full bool) {
		p.suspects[name] = &suspect{} // its first look will see both sides at about one time
		if len(p.suspects) < maxPending {
			return false
		}
		p.state.After = name
		return true
	}
	for want, terr := range p.truth.Hashes(ctx, p.state.Types, after, to) {
		if terr != nil {
			return 0, false, fmt.Errorf("list the truth: %w", terr)
		}
		for ok && err == nil && have.Name < want.Name {
			if add(have.Name) {
				return listed, true, nil
			}
			have, err, ok = next()
		}
		if err != nil {
			return 0, false, fmt.Errorf("list the mirror: %w", err)
		}
		listed++
		s := sight{truth: want}
		if ok && have.Name == want.Name {
			s.mirror = have
			have, err, ok = next()
		}
		if !s.equal() && add(want.Name) {
			return listed, true, nil
		}
	}
	for ; ok; have, err, ok = next() {
		if err != nil {
			return 0, false, fmt.Errorf("list the mirror: %w", err)
		}
		if add(have.Name) {
			return listed, true, nil
		}
	}
	return listed, false, nil
}

// settle looks at the suspects that are due, and repairs what is wrong if it shall.
func (p *pass) settle(ctx context.Context) error {
	now := p.opt.Now()
	var due []string
	for name, s := range p.suspects {
		if !s.seen || now.Sub(s.at) >= p.opt.Grace {
			due = append(due, name)
		}
	}
	slices.Sort(due)
	for batch := range slices.Chunk(due, lookBatch) {
		if err := p.look(ctx, batch); err != nil {
			return err
		}
	}
	return nil
}

func (p *pass) look(ctx context.Context, names []string) error {
	sights, epoch, reached, err := p.sights(ctx, names)
	if err != nil {
		return err
	}
	now := p.opt.Now()
	var found []Difference
	for _, name := range names {
		s, at := p.suspects[name], sights[name]
		if !s.seen {
			*s = suspect{sight: at, seen: true, at: now, first: now}
			if at.equal() {
				delete(p.suspects, name)
			}
			continue
		}
		v := judge(s.sight, at, reached)
		behind := false
		moved := s.mirror != at.mirror
		if moved { // it is followed
			s.first, p.behind = now, false
			s.looks++
		}
		s.sight, s.at = at, now
		switch {
		case v == lookAgain && moved && s.looks >= maxLooks:
			v = right
		case v == lookAgain && !moved && (p.behind || now.Sub(s.first) >= p.opt.Settle):
			v, behind = wrong, true
		}
		switch v {
		case right:
			delete(p.suspects, name)
		case wrong:
			p.behind = p.behind || behind
			delete(p.suspects, name)
			found = append(found, Difference{
				Name: name, Type: cmp.Or(at.truth.Type, at.mirror.Type), Kind: at.kind(), Behind: behind, Truth: versionOf(at.truth), Mirror: at.mirror.Version, seen: at.mirror,
			})
		}
	}
	return p.judged(ctx, epoch, found)
}

// versionOf is the version of a row that the mirror should hold.
func versionOf(r postgres.RowHash) store.Version {
	if !r.Held {
		return store.Version{}
	}
	return r.Version
}

// sights looks at names on both sides. What the mirror has received is read in between, so that it is not newer than the look at the mirror.
func (p *pass) sights(ctx context.Context, names []string) (map[string]sight, int64, func(uint64) bool, error) {
	truth, epoch, err := p.truth.Look(ctx, names)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("look at the truth: %w", err)
	}
	reached, err := p.mirror.Reached(ctx, epoch)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("look how far the mirror is: %w", err)
	}
	mirror, err := p.mirror.Look(ctx, names)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("look at the mirror: %w", err)
	}
	sights := make(map[string]sight, len(names))
	for _, r := range truth {
		sights[r.Name] = sight{truth: r}
	}
	for _, r := range mirror {
		s := sights[r.Name]
		s.mirror = r
		// Where a row was written last in the mirror's own database says nothing.
		s.mirror.Change = 0
		sights[r.Name] = s
	}
	return sights, epoch, reached, nil
}

// judged counts differences and repairs them if that is the mode.
func (p *pass) judged(ctx context.Context, epoch int64, found []Difference) error {
	if len(found) == 0 {
		return nil
	}
	if p.opt.Mode != Report {
		var todo []int
		for i := range found {
			var ok bool
			if found[i].Action, ok = p.mirror.Action(found[i]); ok {
				todo = append(todo, i)
			}
		}
		if p.opt.Mode == Repair {
			if err := p.repair(ctx, epoch, found, todo); err != nil {
				return err
			}
		}
	}
	if p.state.Differences == nil {
		p.state.Differences, p.state.Repaired = map[string]int64{}, map[string]int64{}
	}
	for _, d := range found {
		p.state.Differences[d.Type]++
		if d.Repaired {
			p.state.Repaired[d.Type]++
		}
	}
	p.found = append(p.found, found...)
	return nil
}

// repair works off the differences at todo and marks those that a look finds right afterwards.
func (p *pass) repair(ctx context.Context, epoch int64, found []Difference, todo []int) error {
	for range repairRounds {
		if len(todo) == 0 {
			return nil
		}
		batch, names := make([]Difference, len(todo)), make([]string, len(todo))
		at := map[string]int{}
		for i, n := range todo {
			batch[i], names[i] = found[n], found[n].Name
			at[names[i]] = n
		}
		left, err := p.mirror.Repair(ctx, epoch, batch)
		if err != nil {
			return fmt.Errorf("repair: %w", err)
		}
		for _, d := range left {
			found[at[d.Name]].Action = d.Action
			delete(at, d.Name)
		}
		sights, e, _, err := p.sights(ctx, names)
		if err != nil {
			return err
		}
		epoch, todo = e, todo[:0]
		for _, name := range names {
			n, mine := at[name]
			if !mine {
				continue
			}
			s := sights[name]
			if found[n].Repaired = s.equal(); !found[n].Repaired {
				found[n].seen = s.mirror
				todo = append(todo, n)
			}
		}
	}
	return nil
}

// progress tells what has happened since it was last called. Nothing in it changes afterwards.
func (p *pass) progress() Progress {
	p.state.Pending = slices.Sorted(maps.Keys(p.suspects))
	pr := Progress{State: p.state, Found: p.found, ETA: -1}
	pr.State.Differences, pr.State.Repaired = maps.Clone(p.state.Differences), maps.Clone(p.state.Repaired)
	p.found = nil
	if elapsed := p.opt.Now().Sub(p.started); elapsed > 0 {
		pr.Rate = float64(p.state.Done-p.startDone) / elapsed.Seconds()
	}
	if left := p.state.Total - p.state.Done; p.state.Finished || left <= 0 {
		pr.ETA = 0
	} else if pr.Rate > 0 {
		pr.ETA = time.Duration(float64(left) / pr.Rate * float64(time.Second))
	}
	return pr
}
