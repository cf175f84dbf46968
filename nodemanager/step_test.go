package nodemanager_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
)

// world is a ring with its members and plans, without time: everything that can be late is, at somebody's choice.
type world struct {
	ring    int
	plans   []nodemanager.Plan // all that were ever in force
	floor   int64
	joined  int
	members []*modelMember
	heard   map[string][2]nodemanager.Member // what two leaders have heard last of each member
	step    func(nodemanager.State) (nodemanager.Plan, bool)
	pick    func(n int) int
}

type modelMember struct {
	id             string
	alive, leaving bool
	nodes          []*modelNode
}

// modelNode does what a worker does, in as many steps.
type modelNode struct {
	id    nodemanager.NodeID
	plan  nodemanager.Plan
	works descriptor.ShardRange // on this it may have an effect at any moment
	held  descriptor.ShardRange
	seen  int64
	left  bool
}

func (w *world) now() nodemanager.Plan { return w.plans[len(w.plans)-1] }

func (w *world) join() {
	w.joined++
	m := &modelMember{id: fmt.Sprintf("m%02d", w.joined), alive: true}
	for i := range 1 + w.pick(2) {
		m.nodes = append(m.nodes, &modelNode{id: nodemanager.NodeID(fmt.Sprintf("%s/%d", m.id, i))})
	}
	w.members = append(w.members, m)
}

// report is what the member says now.
func (m *modelMember) report() nodemanager.Member {
	r := nodemanager.Member{ID: m.id, Alive: m.alive, Report: nodemanager.Report{Leaving: m.leaving}}
	for _, n := range m.nodes {
		r.Nodes = append(r.Nodes, nodemanager.NodeReport{ID: n.id, Held: n.held, Seen: n.seen, Left: n.left})
	}
	return r
}

// act is one step of a node: it learns of a plan, gives shards up, says so, takes shards, says so; or stops for good.
func (w *world) act(m *modelMember, n *modelNode) {
	if !m.alive || n.left {
		return
	}
	switch w.pick(5) {
	case 0: // some plan, not before the one it knows
		for _, p := range w.plans[w.pick(len(w.plans)):] {
			if p.Version > n.plan.Version {
				n.plan = p
				break
			}
		}
	case 1: // it gives shards up, and then says so
		n.works = overlap(n.works, n.plan.Node(n.id).Granted)
		n.held, n.seen = n.works, n.plan.Version
	case 2: // which may have begun before its member is leaving
		if n.seen == n.plan.Version {
			n.works = n.plan.Node(n.id).Granted
		}
	case 3:
		if n.seen == n.plan.Version {
			n.held = n.works
		}
	case 4:
		if m.leaving {
			n.works, n.held, n.left = descriptor.ShardRange{}, descriptor.ShardRange{}, true
		}
	}
}

func overlap(a, b descriptor.ShardRange) descriptor.ShardRange {
	r := descriptor.ShardRange{From: max(a.From, b.From), To: min(a.To, b.To)}
	if r.From >= r.To {
		return descriptor.ShardRange{}
	}
	return r
}

// lead is one step of one of two who think that they lead: they may not have heard of the latest reports, but a plan replaces the one in force.
func (w *world) lead(who int, fresh bool) bool {
	s := nodemanager.State{Ring: w.ring, Plan: w.now(), Floor: w.floor}
	for _, m := range w.members {
		h := w.heard[m.id]
		// One watch tells of plans and members in their order: who has been in one has been heard of.
		known := h[who].ID != "" || !w.planned(m)
		if !known || fresh || w.pick(2) == 0 || !m.alive {
			h[who] = m.report()
			w.heard[m.id] = h
		}
		if h[who].ID != "" {
			s.Members = append(s.Members, h[who])
		}
	}
	p, due := w.step(s)
	if due {
		if p.Version <= w.now().Version || p.Version <= w.floor {
			panic("versions go up")
		}
		w.plans = append(w.plans, p)
	}
	return due
}

func (w *world) planned(m *modelMember) bool {
	return slices.ContainsFunc(m.nodes, func(n *modelNode) bool {
		return slices.ContainsFunc(w.plans, func(p nodemanager.Plan) bool { return p.Node(n.id) != (nodemanager.PlanNode{ID: n.id}) })
	})
}

// safe says whether two living nodes could work on a shard.
func (w *world) safe() error {
	owner := make([]nodemanager.NodeID, w.ring)
	claim := func(id nodemanager.NodeID, r descriptor.ShardRange, what string) error {
		for i := r.From; i < r.To; i++ {
			if owner[i] != "" && owner[i] != id {
				return fmt.Errorf("shard %d: %s %s it, and it is %s's; plan %+v", i, id, what, owner[i], w.now())
			}
			owner[i] = id
		}
		return nil
	}
	for _, m := range w.members {
		if !m.alive {
			continue
		}
		for _, n := range m.nodes {
			if err := claim(n.id, w.now().Node(n.id).Granted, "is granted"); err != nil {
				return err
			}
			if err := claim(n.id, n.works, "works on"); err != nil {
				return err
			}
			if err := claim(n.id, n.held, "holds"); err != nil {
				return err
			}
		}
	}
	return nil
}

// settle lets everybody act until nothing happens any more, and says whether that is as it should be.
func (w *world) settle() error {
	for range 20 * (len(w.members) + 2) {
		for _, m := range w.members {
			for _, n := range m.nodes {
				if !m.alive || n.left {
					continue
				}
				if m.leaving {
					n.works, n.held, n.left = descriptor.ShardRange{}, descriptor.ShardRange{}, true
					continue
				}
				n.plan = w.now()
				n.works = n.plan.Node(n.id).Granted
				n.held, n.seen = n.works, n.plan.Version
			}
		}
		if err := w.safe(); err != nil {
			return err
		}
		if !w.lead(0, true) {
			return w.settled()
		}
	}
	return fmt.Errorf("it does not come to rest: %+v", w.now())
}

func (w *world) settled() error {
	var nodes []nodemanager.NodeID
	holds := ranges{}
	for _, m := range w.members {
		for _, n := range m.nodes {
			if m.alive && !m.leaving {
				nodes = append(nodes, n.id)
				holds[n.id] = n.held
			}
		}
	}
	if len(w.now().Draining) > 0 {
		return fmt.Errorf("draining at rest: %+v", w.now())
	}
	if len(nodes) == 0 {
		return nil
	}
	for _, n := range w.now().Nodes { // where to be empty does not matter to a node, but to a cover
		if length(n.Target) == 0 && length(holds[n.ID]) == 0 {
			holds[n.ID] = n.Target
		}
	}
	return wrong(w.ring, nodes, holds)
}

// history plays a random one.
func history(step func(nodemanager.State) (nodemanager.Plan, bool), pick func(n int) int, events int) error {
	w := &world{ring: 1 + pick(40), plans: make([]nodemanager.Plan, 1), heard: map[string][2]nodemanager.Member{}, step: step, pick: pick}
	w.join()
	for range events {
		m := w.members[pick(len(w.members))]
		switch pick(20) {
		case 0:
			if len(w.members) < 8 {
				w.join()
			}
		case 1:
			if pick(3) == 0 {
				m.alive = false
			}
		case 2:
			if pick(3) == 0 {
				m.leaving = true
			}
		case 3:
			if pick(3) == 0 {
				w.floor = w.now().Version + int64(pick(3))
			}
		case 4, 5, 6, 7:
			w.lead(pick(2), false)
		default:
			w.act(m, m.nodes[pick(len(m.nodes))])
		}
		if err := w.safe(); err != nil {
			return err
		}
	}
	return w.settle()
}

// TestNoShardHasTwoNodes: P12 as far as plans can do it, O6, O7, P13's cover.
func TestNoShardHasTwoNodes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pick := func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "pick") }
		if err := history(nodemanager.Step, pick, 150); err != nil {
			t.Fatal(err)
		}
	})
	for seed := range uint64(600) {
		r := rand.New(rand.NewPCG(seed, 1))
		if err := history(nodemanager.Step, r.IntN, 300); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// TestHistoriesFindMistakes plants mistakes in the deciding: the histories above must find each.
func TestHistoriesFindMistakes(t *testing.T) {
	change := func(change func(*nodemanager.State)) func(nodemanager.State) (nodemanager.Plan, bool) {
		return func(s nodemanager.State) (nodemanager.Plan, bool) {
			s.Members, s.Plan.Nodes = slices.Clone(s.Members), slices.Clone(s.Plan.Nodes)
			for i := range s.Members {
				s.Members[i].Nodes = slices.Clone(s.Members[i].Nodes)
			}
			change(&s)
			return nodemanager.Step(s)
		}
	}
	nodes := func(f func(*nodemanager.NodeReport)) func(*nodemanager.State) {
		return func(s *nodemanager.State) {
			for i := range s.Members {
				for j := range s.Members[i].Nodes {
					f(&s.Members[i].Nodes[j])
				}
			}
		}
	}
	for what, mistake := range map[string]func(nodemanager.State) (nodemanager.Plan, bool){
		"what drains is forgotten": change(func(s *nodemanager.State) {
			s.Plan.Draining = nil
			nodes(func(n *nodemanager.NodeReport) { n.Held = descriptor.ShardRange{} })(s)
		}),
		"not to hold is to have given up": change(nodes(func(n *nodemanager.NodeReport) { n.Seen = 1 << 40 })),
		"to have seen is to have given up": change(func(s *nodemanager.State) {
			nodes(func(n *nodemanager.NodeReport) { n.Held, n.Seen = descriptor.ShardRange{}, 1<<40 })(s)
		}),
		"who leaves has left": change(func(s *nodemanager.State) {
			for i := range s.Members {
				s.Members[i].Alive = s.Members[i].Alive && !s.Members[i].Leaving
			}
		}),
		"granted in one step": func(s nodemanager.State) (nodemanager.Plan, bool) {
			p, due := nodemanager.Step(s)
			p.Nodes = slices.Clone(p.Nodes)
			for i := range p.Nodes {
				p.Nodes[i].Granted = p.Nodes[i].Target
			}
			return p, due
		},
		"nobody gets what was drained": func(s nodemanager.State) (nodemanager.Plan, bool) {
			p, due := nodemanager.Step(s)
			return p, due && s.Plan.Version%2 == 0
		},
	} {
		found := -1
		for seed := 0; seed < 3000 && found < 0; seed++ {
			r := rand.New(rand.NewPCG(uint64(seed), 1))
			if history(mistake, r.IntN, 300) != nil {
				found = seed
			}
		}
		if found < 0 {
			t.Errorf("not found: %s", what)
		}
		t.Logf("%s: found in history %d", what, found)
	}
}

func TestAtRestNothingIsPlanned(t *testing.T) {
	m := nodemanager.Member{ID: "a", Alive: true, Report: nodemanager.Report{Nodes: []nodemanager.NodeReport{{ID: "a/0"}, {ID: "a/1"}}}}
	s := nodemanager.State{Ring: 10, Members: []nodemanager.Member{m}}
	p, due := nodemanager.Step(s)
	if !due || p.Version != 1 || p.Cause != nodemanager.CauseStart || p.Node("a/0").Granted != (descriptor.ShardRange{To: 5}) {
		t.Fatalf("%+v, %v", p, due)
	}
	s.Plan = p
	if p, due := nodemanager.Step(s); due {
		t.Fatalf("then %+v", p)
	}
	s.Floor = 7 // somebody has acted under a plan that is lost (O4)
	if p, due = nodemanager.Step(s); !due || p.Version != 8 || !maps.Equal(granted(p), granted(s.Plan)) {
		t.Fatalf("above the floor: %+v, %v", p, due)
	}
}

func granted(p nodemanager.Plan) ranges {
	r := ranges{}
	for _, n := range p.Nodes {
		r[n.ID] = n.Granted
	}
	return r
}

// TestLostPlan: a plan that has been deleted comes back from what the nodes hold (O4).
func TestLostPlan(t *testing.T) {
	held := func(id string, from, to int32) nodemanager.Member {
		return nodemanager.Member{ID: id, Alive: true, Report: nodemanager.Report{Nodes: []nodemanager.NodeReport{
			{ID: nodemanager.NodeID(id), Held: descriptor.ShardRange{From: from, To: to}, Seen: 5},
		}}}
	}
	p, due := nodemanager.Step(nodemanager.State{Ring: 10, Floor: 5, Members: []nodemanager.Member{held("a", 5, 10), held("b", 0, 5)}})
	if want := (ranges{"a": {From: 5, To: 10}, "b": {From: 0, To: 5}}); !due || p.Version != 6 || !maps.Equal(granted(p), want) {
		t.Fatalf("%+v", p)
	}
}

func TestCauses(t *testing.T) {
	node := func(id string, alive, leaving bool) nodemanager.Member {
		return nodemanager.Member{ID: id, Alive: alive, Report: nodemanager.Report{Leaving: leaving, Nodes: []nodemanager.NodeReport{{ID: nodemanager.NodeID(id)}}}}
	}
	first, _ := nodemanager.Step(nodemanager.State{Ring: 10, Members: []nodemanager.Member{node("a", true, false), node("b", true, false)}})
	for _, c := range []struct {
		why     string
		ring    int
		members []nodemanager.Member
	}{
		{nodemanager.CauseJoin, 10, []nodemanager.Member{node("a", true, false), node("b", true, false), node("c", true, false)}},
		{nodemanager.CauseLeave, 10, []nodemanager.Member{node("a", true, false), node("b", true, true)}},
		{nodemanager.CauseDeath, 10, []nodemanager.Member{node("a", true, false), node("b", false, false)}},
		{nodemanager.CauseDeath, 10, []nodemanager.Member{node("a", true, false)}},
		{nodemanager.CauseRing, 12, []nodemanager.Member{node("a", true, false), node("b", true, false)}},
	} {
		if p, due := nodemanager.Step(nodemanager.State{Ring: c.ring, Plan: first, Members: c.members}); !due || p.Cause != c.why {
			t.Errorf("%s: %+v", c.why, p)
		}
	}
}
