package nodemanager

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Local is the meeting place of managers of one process: of the only one when there is no Kubernetes, and of several in tests. The member
// that has been there longest leads.
type Local struct {
	timing Timing
	// reachable says whether a member hears and is heard. Tests cut members off with it.
	reachable func(member string) bool

	mu      sync.Mutex
	joined  int
	members []*localSession // in order of joining
	plans   map[string]Plan
}

// NewLocal returns an empty place.
func NewLocal(t Timing) (*Local, error) {
	t, err := t.WithDefaults()
	if err != nil {
		return nil, err
	}
	return &Local{timing: t, reachable: func(string) bool { return true }, plans: map[string]Plan{}}, nil
}

// Member returns the membership of a process of that name.
func (l *Local) Member(name string) Membership { return localMembership{l, name} }

type localMembership struct {
	at   *Local
	name string
}

// Run implements Membership.
func (m localMembership) Run(ctx context.Context, work func(ctx context.Context, s Session) error) error {
	if ctx.Err() != nil {
		return nil
	}
	s := m.at.join(m.name)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	worked := make(chan struct{})
	var renewing sync.WaitGroup
	renewing.Go(func() { s.renew(cancel, worked) })
	err := work(ctx, s)
	close(worked)
	renewing.Wait()
	if !errors.Is(err, ErrNotStopped) { // then there is a node, and it must count as alive
		m.at.leave(s)
	}
	if err == nil && s.isLost() {
		return ErrLost
	}
	return err
}

func (l *Local) join(name string) *localSession {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.joined++
	s := &localSession{
		at: l, id: name + "_" + strconv.Itoa(l.joined), renewed: time.Now(), changes: make(chan struct{}, 1), lost: make(chan struct{}),
		reports: map[string]Report{}, status: map[string]func() []byte{}, seen: map[string]View{},
	}
	l.members = append(l.members, s)
	l.tell()
	return s
}

func (l *Local) leave(s *localSession) {
	if !l.reachable(s.id) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.members = slices.DeleteFunc(l.members, func(m *localSession) bool { return m == s })
	l.tell()
}

// tell says that something has changed. With mu held.
func (l *Local) tell() {
	for _, s := range l.members {
		select {
		case s.changes <- struct{}{}:
		default:
		}
	}
}

// forget takes off who is dead, and says whether anybody was. With mu held.
func (l *Local) forget() bool {
	n := len(l.members)
	l.members = slices.DeleteFunc(l.members, func(m *localSession) bool { return time.Since(m.renewed) >= l.timing.Lease })
	return len(l.members) < n
}

type localSession struct {
	at      *Local
	id      string
	changes chan struct{}
	lost    chan struct{}
	// Of at.mu.
	renewed time.Time
	reports map[string]Report
	status  map[string]func() []byte
	heard   time.Time       // when status was last asked; zero: never
	seen    map[string]View // what it has seen last
}

// renew keeps the session alive until worked is closed, or ends it.
func (s *localSession) renew(cancel context.CancelFunc, worked <-chan struct{}) {
	tick := time.NewTicker(s.at.timing.RetryPeriod)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-worked:
			return
		}
		said, asked := s.say(), time.Now()
		s.at.mu.Lock()
		late := time.Since(s.renewed) >= s.at.timing.RenewDeadline
		if !late && s.at.reachable(s.id) {
			s.renewed, s.heard = time.Now(), asked
			for kind, status := range said {
				r := s.reports[kind]
				r.Status = status
				s.reports[kind] = r
			}
		}
		if s.at.forget() {
			s.at.tell()
		}
		s.at.mu.Unlock()
		if late {
			close(s.lost)
			cancel()
			return
		}
	}
}

// Member implements Session.
func (s *localSession) Member() string { return s.id }

// Report implements Session.
func (s *localSession) Report(kind string, r Report) {
	s.at.mu.Lock()
	defer s.at.mu.Unlock()
	s.reports[kind] = Report{slices.Clone(r.Nodes), r.Leaving, s.reports[kind].Status}
	s.at.tell()
}

// Tell implements Session.
func (s *localSession) Tell(kind string, status func() []byte) {
	s.at.mu.Lock()
	defer s.at.mu.Unlock()
	s.status[kind] = status
}

// say asks for the status of all kinds.
func (s *localSession) say() map[string][]byte {
	s.at.mu.Lock()
	status := maps.Clone(s.status)
	s.at.mu.Unlock()
	said := map[string][]byte{}
	for kind, ask := range status {
		said[kind] = ask()
	}
	return said
}

// View implements Session.
func (s *localSession) View(kind string) View {
	s.at.mu.Lock()
	defer s.at.mu.Unlock()
	if !s.at.reachable(s.id) {
		v := s.seen[kind]
		v.Leading = v.Leading && !s.isLost()
		return v
	}
	v := View{Plan: s.at.plans[kind]}
	for _, m := range s.at.members {
		alive := time.Since(m.renewed) < s.at.timing.Lease
		if alive && v.Leader == "" {
			v.Leader = m.id
		}
		member := Member{ID: m.id, Alive: alive, Heard: m.heard, Report: m.reports[kind]}
		if !s.at.reachable(m.id) { // what it says now is not heard
			was := s.last(kind, m.id)
			member.Heard, member.Report = was.Heard, was.Report
		}
		v.Members = append(v.Members, member)
	}
	slices.SortFunc(v.Members, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	v.Leading = v.Leader == s.id
	s.seen[kind] = v
	return v
}

// last is how a member was seen last.
func (s *localSession) last(kind, member string) Member {
	for _, m := range s.seen[kind].Members {
		if m.ID == member {
			return m
		}
	}
	return Member{}
}

// Changes implements Session.
func (s *localSession) Changes() <-chan struct{} { return s.changes }

// Publish implements Session.
func (s *localSession) Publish(_ context.Context, kind string, plan Plan, after int64) error {
	s.at.mu.Lock()
	defer s.at.mu.Unlock()
	switch {
	case !s.at.reachable(s.id):
		return ErrLost
	case s.at.plans[kind].Version != after:
		return ErrConflict
	}
	s.at.plans[kind] = plan
	s.at.tell()
	return nil
}

// Lost implements Session.
func (s *localSession) Lost() <-chan struct{} { return s.lost }

func (s *localSession) isLost() bool {
	select {
	case <-s.lost:
		return true
	default:
		return false
	}
}

// Grace implements Session.
func (s *localSession) Grace() time.Duration { return s.at.timing.Lease - s.at.timing.RenewDeadline }
