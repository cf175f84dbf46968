package apiserver

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	rpc "github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/row"
)

var _ = Describe("Feed", func() {
	var w *world
	var feed rpc.FeedClient
	BeforeEach(func() {
		w = newWorld(false, func(c *Config) { c.MaxPeerStreams, c.SendTimeout = 2, 3*time.Second }, "eu", "us")
		feed = w.feed(deployment("us"), "eu")
	})
	all := &dbcontrollerv1.Shards{To: ring}
	us := func() *dbcontrollerv1.Peer {
		return &dbcontrollerv1.Peer{Service: service, ForRegion: "us", OfRegion: "eu", Version: "v1", Layout: row.Layout, Ring: ring}
	}
	put := func(n, size int) {
		GinkgoHelper()
		var writes []store.Write
		for i := range n {
			body := fmt.Sprintf(`{"version": "1", "note": "%s"}`, strings.Repeat("x", size))
			writes = append(writes, store.Write{Op: store.Save, Name: fmt.Sprintf("sections/a/packages/p%d", i), Type: "Package", Body: []byte(body)})
		}
		for len(writes) > 0 {
			part := writes[:min(len(writes), store.MaxBatch)]
			_, err := w.regions["eu"].server.cfg.Store.BatchWrite(GinkgoT().Context(), part)
			Expect(err).NotTo(HaveOccurred())
			writes = writes[len(part):]
		}
	}
	tail := func(cursor string) (*connect.ServerStreamForClient[dbcontrollerv1.TailResponse], func()) {
		GinkgoHelper()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		stream, err := feed.Tail(ctx, connect.NewRequest(&dbcontrollerv1.TailRequest{Peer: us(), Shards: all, Cursor: cursor}))
		Expect(err).NotTo(HaveOccurred())
		stop := func() {
			cancel()
			_ = stream.Close()
		}
		DeferCleanup(stop)
		return stream, stop
	}
	names := func(tuples []byte) (out []string) {
		GinkgoHelper()
		Expect(row.Walk(tuples, func(t *row.Tuple) error {
			out = append(out, t.Name())
			return nil
		})).To(Succeed())
		return out
	}

	It("tails from now, proves that it lives, and resumes from a cursor", func() {
		put(1, 10)
		stream, stop := tail("")
		Expect(stream.Receive()).To(BeTrue())
		first := stream.Msg()
		Expect(first.GetCursor()).NotTo(BeEmpty())
		Expect(first.GetRowCount()).To(BeZero())
		Expect(first.GetEpoch()).To(BeNumerically(">", 0))
		Expect(first.GetSinceTime()).To(BeNil())
		before, start := first.GetSourceTime().AsTime(), time.Now()
		for range 3 {
			Expect(stream.Receive()).To(BeTrue())
			Expect(stream.Msg().GetSinceTime().AsTime()).NotTo(BeTemporally("<", before))
			Expect(stream.Msg().GetSourceTime().AsTime()).To(BeTemporally(">", before))
			before = stream.Msg().GetSourceTime().AsTime()
		}
		Expect(time.Since(start)).To(BeNumerically("<", 5*time.Second))

		put(120, 10) // p0 is as it was; one transaction, so one read, whatever the limit
		var got []string
		for len(got) < 119 {
			Expect(stream.Receive()).To(BeTrue())
			got = append(got, names(stream.Msg().GetRows())...)
		}
		Expect(got).To(HaveLen(119))
		stop()
		stream, _ = tail(first.GetCursor())
		Expect(stream.Receive()).To(BeTrue())
		Expect(names(stream.Msg().GetRows())).To(ConsistOf(got))
		Expect(int(stream.Msg().GetRowCount())).To(Equal(119))
	})

	It("sends a large read in frames that are bounded, and never splits a row", func() {
		stream, stop := tail("")
		Expect(stream.Receive()).To(BeTrue())
		cursor := stream.Msg().GetCursor()
		stop()
		put(14, 1000<<10) // more than is held
		stream, _ = tail(cursor)
		rows, frames := 0, 0
		for rows < 14 {
			Expect(stream.Receive()).To(BeTrue(), "%v", stream.Err())
			msg := stream.Msg()
			if msg.GetRowCount() == 0 {
				continue
			}
			frames++
			Expect(names(msg.GetRows())).To(HaveLen(int(msg.GetRowCount())))
			Expect(len(msg.GetRows())).To(BeNumerically("<=", frameBytes))
			rows += int(msg.GetRowCount())
			Expect(msg.GetCursor() != "").To(Equal(rows == 14), "the cursor comes with the last frame of a read")
		}
		Expect(frames).To(Equal(14))
	})

	It("refuses a cursor without history", func() {
		stream, stop := tail("")
		Expect(stream.Receive()).To(BeTrue())
		cursor := stream.Msg().GetCursor()
		stop()
		_, err := w.regions["eu"].store.RaiseEpoch(GinkgoT().Context())
		Expect(err).NotTo(HaveOccurred())
		stream, _ = tail(cursor)
		Expect(stream.Receive()).To(BeFalse())
		Expect(connect.CodeOf(stream.Err())).To(Equal(connect.CodeFailedPrecondition))
		Expect(reasonOf(stream.Err())).To(Equal(dbcontrollerv1.ReasonCursorLost))
		stream, _ = tail("nonsense")
		Expect(stream.Receive()).To(BeFalse())
		Expect(fieldsOf(stream.Err())).To(Equal([]string{"cursor"}))
	})

	It("digests, versions and fetches the same rows", func() {
		put(2500, 10)
		_, err := store.Apply(GinkgoT().Context(), w.regions["eu"].server.cfg.Store, store.Write{Op: store.Create, Name: "regions/us/mirrors/m", Type: "Mirror", Body: []byte("{}")})
		Expect(store.CodeOf(err)).To(Equal(store.FailedPrecondition), "only us may own it")
		digest, err := feed.Digest(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.DigestRequest{Peer: us(), Shards: all}))
		Expect(err).NotTo(HaveOccurred())
		count := int64(0)
		var shards []int32
		for _, d := range digest.Msg.GetDigests() {
			count += d.GetCount()
			shards = append(shards, d.GetShard())
		}
		Expect(count).To(Equal(int64(2500)))

		versions, err := feed.Versions(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.VersionsRequest{Peer: us(), Shards: shards}))
		Expect(err).NotTo(HaveOccurred())
		var listed []string
		for versions.Receive() {
			Expect(len(versions.Msg().GetRows())).To(BeNumerically("<=", frameRows))
			for _, r := range versions.Msg().GetRows() {
				listed = append(listed, r.GetName())
				Expect(r.GetResourceVersion()).To(Equal(int64(1)))
			}
		}
		Expect(versions.Err()).NotTo(HaveOccurred())
		Expect(versions.Close()).To(Succeed())
		Expect(listed).To(HaveLen(2500))

		fetch := func(req *dbcontrollerv1.FetchRequest) (out []string, err error) {
			req.Peer = us()
			stream, err := feed.Fetch(GinkgoT().Context(), connect.NewRequest(req))
			Expect(err).NotTo(HaveOccurred())
			defer stream.Close()
			for stream.Receive() {
				Expect(int(stream.Msg().GetRowCount())).To(BeNumerically("<=", frameRows))
				out = append(out, names(stream.Msg().GetRows())...)
			}
			return out, stream.Err()
		}
		fetched, err := fetch(&dbcontrollerv1.FetchRequest{Shards: all})
		Expect(err).NotTo(HaveOccurred())
		Expect(slices.Sorted(slices.Values(fetched))).To(Equal(listed))
		fetched, err = fetch(&dbcontrollerv1.FetchRequest{Names: []string{"sections/a/packages/p7", "sections/a/packages/none"}})
		Expect(err).NotTo(HaveOccurred())
		Expect(fetched).To(Equal([]string{"sections/a/packages/p7"}))
		_, err = fetch(&dbcontrollerv1.FetchRequest{})
		Expect(fieldsOf(err)).To(Equal([]string{"shards"}))
		_, err = fetch(&dbcontrollerv1.FetchRequest{Names: make([]string, 5001)})
		Expect(fieldsOf(err)).To(Equal([]string{"names"}))

		ping, err := feed.Ping(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.PingRequest{Peer: us()}))
		Expect(err).NotTo(HaveOccurred())
		Expect(ping.Msg.GetServerTime().AsTime()).To(BeTemporally("~", time.Now(), time.Minute))
		Expect(ping.Msg.GetEpoch()).To(Equal(digest.Msg.GetEpoch()))
	})

	DescribeTable("refuses a peer that expects somebody else", func(change func(*dbcontrollerv1.Peer)) {
		p := us()
		change(p)
		_, err := feed.Ping(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.PingRequest{Peer: p}))
		Expect(connect.CodeOf(err)).To(Equal(connect.CodeFailedPrecondition))
		Expect(reasonOf(err)).To(Equal(dbcontrollerv1.ReasonWrongPeer))
	},
		Entry("in another region", func(p *dbcontrollerv1.Peer) { p.OfRegion = "ap" }),
		Entry("of another version", func(p *dbcontrollerv1.Peer) { p.Version = "v2" }),
		Entry("with another layout", func(p *dbcontrollerv1.Peer) { p.Layout++ }),
		Entry("with another ring", func(p *dbcontrollerv1.Peer) { p.Ring *= 2 }),
	)

	It("refuses ranges outside the ring", func() {
		for _, s := range []*dbcontrollerv1.Shards{nil, {From: 1, To: 1}, {From: -1, To: 1}, {From: 0, To: ring + 1}} {
			_, err := feed.Digest(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.DigestRequest{Peer: us(), Shards: s}))
			Expect(fieldsOf(err)).To(Equal([]string{"shards"}))
		}
		for _, s := range [][]int32{nil, {-1}, {ring}, make([]int32, ring+1)} {
			stream, err := feed.Versions(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.VersionsRequest{Peer: us(), Shards: s}))
			Expect(err).NotTo(HaveOccurred())
			Expect(stream.Receive()).To(BeFalse())
			Expect(fieldsOf(stream.Err())).To(Equal([]string{"shards"}))
			Expect(stream.Close()).To(Succeed())
		}
	})

	It("has a bounded number of streams for a region", func() {
		one, stop := tail("")
		two, _ := tail("")
		Expect(one.Receive()).To(BeTrue())
		Expect(two.Receive()).To(BeTrue())
		three, _ := tail("")
		Expect(three.Receive()).To(BeFalse())
		Expect(connect.CodeOf(three.Err())).To(Equal(connect.CodeResourceExhausted))
		stop()
		Eventually(func() bool {
			again, stop := tail("")
			defer stop()
			return again.Receive()
		}, "10s").Should(BeTrue())
	})

	It("cuts a reader that takes nothing", func() {
		stream, _ := tail("")
		Expect(stream.Receive()).To(BeTrue())
		put(14, 1000<<10)
		server := w.regions["eu"].server
		Eventually(func() int {
			server.streams.Lock()
			defer server.streams.Unlock()
			return server.streams.open["us"]
		}, "20s").Should(BeZero())
	})
})
