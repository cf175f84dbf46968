package references

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/store"
)

// TestShadows: every Deployment shows shadows (F1), one for each resource of its own (F2), and none for a mixin's resource (F3) or a copy (F4). A shadow is
// written with its resource (F5), has all that it refers to (F6), and of what refers to it the places only (F7).
func TestShadows(t *testing.T) {
	w := newWorld(t, config{services: []string{low, mid}})
	s := &scene{world: w}
	node := s.low("eu", "n")
	kinds := []string{project("eu"), w.cfg.secret("eu", "s"), node, node + "/leaves/l", node + "/twigs/t", node + "/pins/p", box("eu", "b")}
	for _, name := range kinds[1:] {
		s.put(low, name, nil)
	}
	referrer := s.low("eu", "r")
	s.put(low, referrer, refs{"block[]": {node}, "unset": {referrer}, "links[].asyncUnset": {node}, "secretCascade[]": {kinds[1]}, "boxDangling[]": {kinds[6]}})
	s.confirmed(low, referrer)

	for _, svc := range w.reg.View().Services() {
		if svc.Name != low && svc.Name != mid && svc.Name != high {
			t.Errorf("F1: the registry has a service %s", svc.Name)
		}
	}
	for _, k := range w.keys {
		var want []string
		switch {
		case k == s.at(low, "eu").key:
			want = append(slices.Clone(kinds), referrer, project("ap"), project("us")) // Projects are global, and eu controls those
		}
		slices.Sort(want)
		var got []string
		for _, h := range w.places[k].shadows(t) {
			got = append(got, strings.TrimPrefix(h.GetName(), "resourceShadows/"))
			if h.GetName() == "resourceShadows/"+referrer {
				var refers []string
				for _, r := range h.GetReferences() {
					refers = append(refers, r.GetKind()+" "+r.GetField()+" "+r.GetTarget())
				}
				slices.Sort(refers)
				if want := []string{"parent name " + project("eu"), "schema block[] " + node, "schema boxDangling[] " + kinds[6], "schema links[].asyncUnset " + node,
					"schema secretCascade[] " + kinds[1], "schema unset " + referrer}; !slices.Equal(refers, want) {
					t.Errorf("F6: the shadow of %s has %v, want %v", referrer, refers, want)
				}
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("F1 to F4: the shadows of %s are %v, want %v", k, got, want)
		}
	}
	eventually(t, soon, "us has the copies", func() error { _, err := s.at(low, "us").store().Get(t.Context(), project("eu")); return err })
	if n := len(s.at(low, "us").shadows(t)); n != 0 {
		t.Errorf("F4: copies have %d shadows", n)
	}
	if n := s.at(low, "eu").number("SELECT count(*) FROM refs f JOIN resources r ON r.name = f.referrer WHERE r.name = $1 AND f.xmin = r.xmin AND r.shadow = 1", referrer); n != 6 {
		t.Errorf("F5: %d references were written by the transaction of their resource, want 6", n)
	}

	const each = 150
	for _, r := range regions {
		s.referrers(r, each, refs{"lowBlock[]": {node}})
	}
	w.mustHold(2*soon, nil)
	for _, h := range s.at(low, "eu").shadows(t) {
		if h.GetName() == "resourceShadows/"+node && (len(h.GetSources()) != 1+len(regions) || len(h.GetTentativeBlockades()) != 0) {
			t.Errorf("F7: %d referrers leave %v and %v", each*len(regions), h.GetSources(), h.GetTentativeBlockades())
		}
	}
}

// referrers creates n resources of mid with the same references, and returns their names.
func (s *scene) referrers(region string, n int, r refs) (names []string) {
	s.t.Helper()
	for i := range n {
		names = append(names, s.node(region, fmt.Sprintf("r%03d", i)))
	}
	for some := range slices.Chunk(names, 50) { // which take less time than a grant lasts
		var writes []store.Write
		for _, name := range some {
			writes = append(writes, store.Write{Op: store.Create, Name: name, Body: r.body(1)})
		}
		check(s.t, whileUnavailable(func() error { _, err := s.write(s.t.Context(), s.at(mid, region), writes...); return err }))
	}
	return names
}

// shadows lists all shadows of a Deployment, as people do.
func (p *place) shadows(t *testing.T) (all []*v1.ResourceShadow) {
	t.Helper()
	transport := pki.Transport(nil, pki.Identity{}, nil)
	defer transport.CloseIdleConnections()
	c := dbcontrollerv1connect.NewResourceShadowsClient(&http.Client{Transport: transport}, "http://"+p.wire.addr)
	for req := (&v1.ListResourceShadowsRequest{}); ; {
		res, err := c.ListResourceShadows(t.Context(), connect.NewRequest(req))
		check(t, err)
		all = append(all, res.Msg.GetShadows()...)
		if req.PageToken = res.Msg.GetNextPageToken(); req.PageToken == "" {
			return all
		}
	}
}
