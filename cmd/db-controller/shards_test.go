package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"text/tabwriter"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
)

// ringOf is a kind whose first shards are held by a living member, and the rest by one that is dead.
func ringOf(kind string, plan int64, held int32) nodemanager.KindStatus {
	return nodemanager.KindStatus{Kind: kind, Ring: 100, Owned: int(held), Unowned: 100 - int(held), PlanVersion: plan, Leader: "a_1", Members: []nodemanager.MemberStatus{
		{ID: "a_1", Alive: true, Nodes: []nodemanager.NodeStatus{{ID: "a_1/0", Held: descriptor.ShardRange{To: held}, Granted: descriptor.ShardRange{To: held}}}},
		{ID: "b_2", Nodes: []nodemanager.NodeStatus{{ID: "b_2/0"}}},
	}}
}

func TestShardsAreShownAsTheNewestPlanHasThem(t *testing.T) {
	g := NewWithT(t)
	of := func(region string, kinds ...nodemanager.KindStatus) deploymentStatus {
		return deploymentStatus{Service: "books.example.com", Region: region, Shards: kinds}
	}
	kinds := divided(statusz{Deployments: []deploymentStatus{
		of("us"),
		of("eu", ringOf("syncing", 3, 40), ringOf("policy", 3, 100)),
		of("eu"), // an API server, which runs no nodes
		of("eu", ringOf("syncing", 4, 100)),
	}})
	g.Expect(kinds).To(HaveLen(3))
	g.Expect(unowned(kinds)).To(Equal("books.example.com in us"))
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 1, ' ', 0)
	writeShards(w, kinds)
	g.Expect(w.Flush()).To(Succeed())
	g.Expect(text.String()).To(Equal(`SERVICE           REGION KIND    MEMBER ALIVE NODE HELD    GRANTED SHARDS LEADER
books.example.com eu     policy  a_1    yes   0    [0,100) [0,100) 100    yes
books.example.com eu     policy  b_2    no    0    -       -       0      no
books.example.com eu     syncing a_1    yes   0    [0,100) [0,100) 100    yes
books.example.com eu     syncing b_2    no    0    -       -       0      no
books.example.com us     -       -      -     -    -       -       0      -
`))
	g.Expect(unowned(divided(statusz{Deployments: []deploymentStatus{of("eu", ringOf("syncing", 4, 30))}}))).To(Equal("70 of 100 shards of books.example.com in eu (syncing)"))
}

func TestShardsExitsWithThreeWhileSomeAreUnowned(t *testing.T) {
	for held, want := range map[int32]int{100: 0, 99: exitUnowned} {
		manager := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_ = json.NewEncoder(w).Encode(statusz{Deployments: []deploymentStatus{{Service: "books.example.com", Region: "eu", Shards: []nodemanager.KindStatus{ringOf("syncing", 1, held)}}}})
		}))
		for _, output := range []string{"table", "json"} {
			if code := run(t.Context(), []string{"shards", "--endpoint", manager.URL, "-o", output}); code != want {
				t.Errorf("with %d of 100 shards held: exit code %d, want %d", held, code, want)
			}
		}
		manager.Close()
	}
	if code := run(t.Context(), []string{"shards", "-o", "yaml"}); code != 2 {
		t.Errorf("a wrong output: exit code %d, want 2", code)
	}
}

func TestReplicaFlagsAreChecked(t *testing.T) {
	g := NewWithT(t)
	for _, args := range [][]string{
		{"--nodes", "0"}, {"--lease-duration", "9s"}, {"--renew-deadline", "1s"}, {"--lease-duration", "15500ms"},
	} {
		g.Expect(run(t.Context(), append([]string{"manager", "--region", "eu"}, args...))).To(Equal(2), "%v", args)
	}
	t.Setenv("POD_NAMESPACE", "here")
	g.Expect(podNamespace()).To(Equal("here"))
	g.Expect((&topology{kubeconfig: "/none"}).namespaceOfKubeconfig()).To(Or(BeEmpty(), Equal("default")))
	g.Expect(hostName()).NotTo(Equal(hostName()))
}
