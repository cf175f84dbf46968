package deployment

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/syncing"
)

func shards(from, to int32) descriptor.ShardRange { return descriptor.ShardRange{From: from, To: to} }

func peer(region string, state syncing.State, contact, freshness, lag time.Duration) syncing.PeerStatus {
	return syncing.PeerStatus{Service: "s", Region: region, State: state, ContactAge: &contact, Freshness: &freshness, ApplyLag: &lag, Progress: 1}
}

func report(from, to int32, age time.Duration, peers ...syncing.PeerStatus) aged {
	return aged{nodeReport{Shards: shards(from, to), Peers: peers}, age}
}

func TestMergePeersIsTheWorstOfAllNodes(t *testing.T) {
	g := NewWithT(t)
	one := peer("us", syncing.Live, time.Second, 2*time.Second, 0)
	one.PendingRows, one.RowsApplied, one.Quarantined, one.Progress = 3, 10, 1, 1
	g.Expect(mergePeers(100, []aged{report(0, 100, 0, one)})).To(Equal([]syncing.PeerStatus{one}), "one node is shown as it is")

	two := peer("us", syncing.CatchingUp, time.Second/2, 5*time.Second, time.Second)
	two.PendingRows, two.RowsApplied, two.Quarantined, two.Progress = 4, 20, 2, 0.5
	two.LastError, two.LastErrorTime = "gone", time.Unix(5, 0)
	merged := mergePeers(100, []aged{report(0, 25, 0, one), report(25, 100, 2*time.Second, two)})
	want := peer("us", syncing.CatchingUp, 2500*time.Millisecond, 7*time.Second, 3*time.Second)
	want.PendingRows, want.RowsApplied, want.Quarantined, want.Progress = 7, 30, 3, 0.25+0.375
	want.LastError, want.LastErrorTime = "gone", time.Unix(5, 0)
	g.Expect(merged).To(Equal([]syncing.PeerStatus{want}))
}

func TestMergePeersDoesNotKnowWhatNobodyReports(t *testing.T) {
	us, asia := peer("us", syncing.Live, 1, 1, 1), peer("asia", syncing.Live, 1, 1, 1)
	unknown := us
	unknown.Freshness = nil
	for name, reports := range map[string][]aged{
		"a gap in the ring":                           {report(0, 60, 0, us)},
		"a node that does not know the region yet":    {report(0, 60, 0, us), report(60, 100, 0, asia)},
		"a node that does not know how far it is yet": {report(0, 60, 0, us), report(60, 100, 0, unknown)},
		"a replica whose report cannot be read":       readReports([]aged{report(0, 60, 0, us)}, []byte("{"), 0),
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			for _, p := range mergePeers(100, reports) {
				g.Expect(p.Freshness).To(BeNil())
			}
		})
	}
	g := NewWithT(t)
	g.Expect(mergePeers(100, nil)).To(BeEmpty())
	g.Expect(mergePeers(100, []aged{report(0, 100, 0, us, asia)})).To(HaveLen(2))
	g.Expect(*mergePeers(100, []aged{report(0, 100, 0, us), report(0, 0, 0)})[0].Freshness).To(Equal(time.Duration(1)), "a node without shards has no say")
}

// working is a node that works until it is told to stop.
type working struct{ err error }

func (w working) Run(ctx context.Context) error {
	<-ctx.Done()
	return w.err
}
func (w working) UpdateShardRange(context.Context, descriptor.ShardRange) error { return w.err }

func TestRunningNodesReportWhileTheyRun(t *testing.T) {
	g := NewWithT(t)
	var r running
	n := r.track(working{}, func() nodeReport {
		return nodeReport{Peers: []syncing.PeerStatus{peer("us", syncing.Live, time.Second, time.Second, 0)}}
	})
	g.Expect(n.UpdateShardRange(t.Context(), shards(5, 7))).To(Succeed())
	g.Expect(r.reports()).To(BeEmpty())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- n.Run(ctx) }()
	g.Eventually(r.reports).Should(HaveLen(1))
	data, err := json.Marshal(r.reports())
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(readReports(nil, data, time.Second)).To(Equal([]aged{report(5, 7, time.Second, peer("us", syncing.Live, time.Second, time.Second, 0))}), "what is sent is what is read")
	g.Expect(n.UpdateShardRange(t.Context(), shards(5, 5))).To(Succeed())
	g.Expect(r.reports()).To(BeEmpty(), "without shards there is nothing to tell")
	cancel()
	g.Expect(<-done).To(Succeed())

	failing := r.track(working{errors.New("no")}, nil)
	g.Expect(failing.UpdateShardRange(t.Context(), shards(0, 1))).NotTo(Succeed())
	g.Expect(r.reports()).To(BeEmpty())
}
