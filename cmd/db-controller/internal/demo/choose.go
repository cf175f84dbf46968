package demo

import (
	"slices"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// maxCascade is what one deletion may take along in its transaction.
const maxCascade = 1000

// consequences are what the deletion of a resource means, as far as the input tells.
type consequences struct {
	root int32
	// deletes are the root and what cascades; unsets lose a reference to one of them and stay. Both are sorted.
	deletes, unsets []int32
	// blockers refer to what the root's own region would delete, so that it refuses; they are sorted. held are those that would only hold up what follows.
	blockers, held []int32
}

// incoming are the edges to each node.
func (g *graph) incoming() [][]*edge {
	in := make([][]*edge, len(g.nodes))
	for i := range g.edges {
		e := &g.edges[i]
		in[e.to] = append(in[e.to], e)
	}
	return in
}

// consequencesOf follows the references to a root.
func (g *graph) consequencesOf(root int32, in [][]*edge) consequences {
	c := consequences{root: root, deletes: []int32{root}}
	doomed := map[int32]bool{root: true}
	for i := 0; i < len(c.deletes); i++ {
		for _, e := range in[c.deletes[i]] {
			cascades := e.behavior == v1alpha1.DeleteCascade || e.behavior == v1alpha1.DeleteAsyncCascade
			if cascades && !doomed[e.from] {
				doomed[e.from] = true
				c.deletes = append(c.deletes, e.from)
			}
		}
	}
	for _, n := range c.deletes {
		for _, e := range in[n] {
			switch {
			case doomed[e.from]:
			case e.unsets():
				c.unsets = append(c.unsets, e.from)
			case e.behavior == v1alpha1.DeleteBlock && g.nodes[n].owner == g.nodes[root].owner:
				c.blockers = append(c.blockers, e.from)
			case e.behavior == v1alpha1.DeleteBlock:
				c.held = append(c.held, e.from)
			}
		}
	}
	for _, list := range []*[]int32{&c.deletes, &c.unsets, &c.blockers, &c.held} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	return c
}

// chooseDeletions returns two deletions of resources that others belong to: of the one whose deletion most resources forbid, and of one that nothing forbids and
// that takes most along, of both kinds if there is one. Each is nil without a candidate.
func (g *graph) chooseDeletions() (refused, granted *consequences) {
	in := g.incoming()
	for n := range g.nodes {
		owns := func(e *edge) bool {
			return e.behavior == v1alpha1.DeleteCascade || e.behavior == v1alpha1.DeleteAsyncCascade
		}
		if !slices.ContainsFunc(in[n], owns) {
			continue
		}
		c := g.consequencesOf(int32(n), in)
		switch {
		case len(c.deletes)+len(c.unsets) > maxCascade:
		case len(c.blockers) > 0 && (refused == nil || len(c.blockers) > len(refused.blockers)):
			refused = &c
		case len(c.blockers)+len(c.held) == 0 && (granted == nil || c.worth() > granted.worth()):
			granted = &c
		}
	}
	return refused, granted
}

// worth is higher for a deletion that shows more: something that is deleted, and somebody who stays.
func (c *consequences) worth() int {
	return min(len(c.deletes)-1, len(c.unsets))*maxCascade + len(c.deletes)
}
