package apiserver

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
)

var _ = Describe("Watch", func() {
	var w *world
	var eu rest
	BeforeEach(func() {
		w = newWorld(false, func(c *Config) { c.MaxWatches = 2 }, "eu")
		eu = w.rest("eu")
	})
	save := func(name, body string) {
		GinkgoHelper()
		a := eu.do("PATCH", "/sections/"+name+"?allow_missing=true", body)
		Expect(a.status).To(Equal(http.StatusOK), a.text)
	}

	It("sends what there is, then what changes, and resumes without a snapshot", func() {
		save("a/packages/one", `{"version": "1"}`)
		save("b/packages/other", `{"version": "1"}`)
		v := w.watch("sections/a/packages", "", "")
		Expect(v.batch()).To(Equal([]string{"sections/a/packages/one=1"}))
		save("a/packages/two", `{"version": "1"}`)
		Expect(v.batch()).To(Equal([]string{"sections/a/packages/two=1"}))
		token := v.token
		v.stop()

		save("a/packages/one", `{"version": "2"}`)
		save("b/packages/other", `{"version": "2"}`)
		Expect(eu.do("DELETE", "/sections/a/packages/two", "").status).To(Equal(http.StatusOK))
		v = w.watch("sections/a/packages", "", token)
		Expect(v.batch()).To(ConsistOf("sections/a/packages/one=2", "-sections/a/packages/two"))

		By("everything at once")
		v.stop()
		v = w.watch("", "", "")
		Expect(v.batch()).To(ConsistOf("sections/a/packages/one=2", "sections/b/packages/other=2"))
		save("c", `{}`)
		Expect(v.batch()).To(Equal([]string{"sections/c="}))
	})

	It("says that a resource left the filter", func() {
		save("a/packages/one", `{"version": "1", "kind": "tool"}`)
		save("a/packages/two", `{"version": "1", "kind": "lib"}`)
		v := w.watch("sections/-/packages", `kind = "tool"`, "")
		Expect(v.batch()).To(Equal([]string{"sections/a/packages/one=1"}))
		save("a/packages/one", `{"version": "1", "kind": "lib"}`)
		Expect(v.batch()).To(Equal([]string{"-sections/a/packages/one"}))
		save("b/packages/three", `{"version": "3", "kind": "tool"}`)
		Expect(v.batch()).To(Equal([]string{"sections/b/packages/three=3"}))
	})

	It("refuses a token that is none, or is of another query", func() {
		v := w.watch("sections/a/packages", "", "")
		Expect(v.batch()).To(BeEmpty())
		v.stop()
		for _, bad := range []*dbcontrollerv1.WatchRequest{
			{Collection: "sections/b/packages", ResumeToken: v.token},
			{Collection: "sections/a/packages", Filter: `version = "1"`, ResumeToken: v.token},
			{ResumeToken: v.token},
			{Collection: "sections/a/packages", ResumeToken: "x"},
			{Collection: "sections/a/packages", ResumeToken: strings.SplitN(v.token, ".", 2)[0]},
		} {
			stream, err := w.resources(alice, "eu").Watch(GinkgoT().Context(), connect.NewRequest(bad))
			Expect(err).NotTo(HaveOccurred())
			Expect(stream.Receive()).To(BeFalse())
			Expect(connect.CodeOf(stream.Err())).To(Equal(connect.CodeInvalidArgument))
			Expect(fieldsOf(stream.Err())).To(Equal([]string{"resume_token"}))
			Expect(stream.Close()).To(Succeed())
		}
		for query, field := range map[string]string{"/things:watch": "collection", "/sections:watch?filter=((": "filter", ":watch?filter=x": "filter", "/sections:watch?filter=" + strings.Repeat("x", 1000): "filter"} {
			Expect(eu.do("GET", query, "").violations()).To(Equal([]string{field}), query)
		}
	})

	It("starts again when the history is gone", func() {
		save("a", `{}`)
		v := w.watch("sections", "", "")
		Expect(v.batch()).To(Equal([]string{"sections/a="}))
		old := v.token
		_, err := w.regions["eu"].store.RaiseEpoch(GinkgoT().Context())
		Expect(err).NotTo(HaveOccurred())
		By("of a watch that is open")
		Expect(v.batch()).To(Equal([]string{"reset", "sections/a="}))
		By("of a token")
		v.stop()
		v = w.watch("sections", "", old)
		Expect(v.batch()).To(Equal([]string{"reset", "sections/a="}))
		v.stop()
		v = w.watch("sections", "", v.token)
		Expect(v.batch()).To(BeEmpty(), "the token is good")
		save("b", `{}`)
		Expect(v.batch()).To(Equal([]string{"sections/b="}))
	})

	It("sends more than it holds", func() {
		v := w.watch("sections/a/packages", "", "")
		Expect(v.batch()).To(BeEmpty())
		var writes []store.Write
		for i := range 6 {
			body := fmt.Sprintf(`{"version": "%d", "note": "%s"}`, i, strings.Repeat("x", 900<<10))
			writes = append(writes, store.Write{Op: store.Create, Name: fmt.Sprintf("sections/a/packages/p%d", i), Type: "Package", Body: []byte(body)})
		}
		_, err := w.regions["eu"].server.cfg.Store.BatchWrite(GinkgoT().Context(), writes)
		Expect(err).NotTo(HaveOccurred())
		Expect(v.batch()).To(HaveLen(6))
		Expect(v.largest).To(BeNumerically("<", 2<<20))
		v.stop()
		v = w.watch("sections/a/packages", "", "")
		Expect(v.batch()).To(HaveLen(6))
		Expect(v.largest).To(BeNumerically("<", 2<<20))
	})

	It("has a bounded number of watches", func() {
		first, second := w.watch("sections", "", ""), w.watch("sections", "", "")
		first.batch()
		second.batch()
		Expect(eu.do("GET", "/sections:watch", "").status).To(Equal(http.StatusTooManyRequests))
		first.stop()
		Eventually(func() error {
			v := w.watch("sections", "", "")
			defer v.stop()
			v.stream.Receive()
			return v.stream.Err()
		}, "10s").Should(Succeed())
	})

	It("is one JSON object per line in REST", func() {
		save("a", `{"n": 1.50}`)
		ctx, cancel := context.WithCancel(GinkgoT().Context())
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, eu.base+"/sections:watch", nil)
		Expect(err).NotTo(HaveOccurred())
		resp, err := eu.client.Do(req)
		Expect(err).NotTo(HaveOccurred())
		defer resp.Body.Close()
		Expect(resp.Header.Get("Content-Type")).To(Equal("application/x-ndjson"))
		lines := bufio.NewScanner(resp.Body)
		type line struct {
			Changes []struct {
				Set     map[string]any
				Removed string
			}
			ResumeToken string
		}
		next := func() (l line) {
			GinkgoHelper()
			Expect(lines.Scan()).To(BeTrue())
			Expect(json.Unmarshal(lines.Bytes(), &l)).To(Succeed(), lines.Text())
			return l
		}
		l := next()
		Expect(lines.Text()).To(ContainSubstring("1.50"))
		Expect(l.Changes[0].Set).To(HaveKeyWithValue("name", "sections/a"))
		Expect(l.ResumeToken).NotTo(BeEmpty())
		Expect(eu.do("DELETE", "/sections/a", "").status).To(Equal(http.StatusOK))
		Expect(next().Changes[0].Removed).To(Equal("sections/a"))
		By("the server stops")
		w.regions["eu"].stop()
		Expect(lines.Scan()).To(BeTrue())
		Expect(lines.Text()).To(ContainSubstring("UNAVAILABLE"))
	})

	It("ends with what the database holds, whatever was written meanwhile and however often it was cut", func() {
		seed := GinkgoRandomSeed()
		GinkgoWriter.Println("seed", seed)
		var wg sync.WaitGroup
		defer wg.Wait()
		for n := range 3 {
			random := rand.New(rand.NewPCG(uint64(seed), uint64(n)))
			wg.Go(func() {
				defer GinkgoRecover()
				for i := range 100 {
					name := fmt.Sprintf("a/packages/p%d", random.IntN(20))
					if random.IntN(4) == 0 {
						eu.do("DELETE", "/sections/"+name+"?allow_missing=true", "")
					} else {
						kind := []string{"tool", "lib"}[random.IntN(2)]
						eu.do("PATCH", "/sections/"+name+"?allow_missing=true", fmt.Sprintf(`{"version": "%d.%d", "kind": "%s"}`, n, i, kind))
					}
				}
			})
		}
		random := rand.New(rand.NewPCG(uint64(seed), 99))
		for _, filter := range []string{"", `kind = "tool"`} {
			mirror := map[string]string{}
			v := w.watch("sections/a/packages", filter, "")
			apply := func(batch []string) {
				for _, c := range batch {
					if name, removed := strings.CutPrefix(c, "-"); removed {
						delete(mirror, name)
					} else {
						name, version, _ := strings.Cut(c, "=")
						mirror[name] = version
					}
				}
			}
			for range 10 {
				apply(v.batch())
				if random.IntN(2) == 0 {
					v.stop()
					v = w.watch("sections/a/packages", filter, v.token)
				}
			}
			if filter != "" {
				wg.Wait()
			}
			current := func() map[string]string {
				page, err := w.regions["eu"].store.List(GinkgoT().Context(), store.Query{Type: "Package", Filter: filter})
				Expect(err).NotTo(HaveOccurred())
				out := map[string]string{}
				for _, r := range page.Resources {
					out[r.Name] = versionIn(string(r.Body))
				}
				return out
			}
			if filter != "" {
				// A marker that the filter lets through is behind everything written before it.
				save("a/packages/end", `{"version": "end", "kind": "tool"}`)
				for mirror["sections/a/packages/end"] == "" {
					apply(v.batch())
				}
				Expect(mirror).To(Equal(current()))
			}
			v.stop()
		}
	})
})

// view is an open watch.
type view struct {
	stream  *connect.ServerStreamForClient[dbcontrollerv1.WatchResponse]
	cancel  context.CancelFunc
	token   string
	largest int
}

func (w *world) watch(collection, filter, token string) *view {
	GinkgoHelper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	stream, err := w.resources(alice, "eu").Watch(ctx, connect.NewRequest(&dbcontrollerv1.WatchRequest{Collection: collection, Filter: filter, ResumeToken: token}))
	Expect(err).NotTo(HaveOccurred())
	v := &view{stream: stream, cancel: cancel}
	DeferCleanup(v.stop)
	return v
}

func (v *view) stop() {
	v.cancel()
	_ = v.stream.Close()
}

// batch reads one consistent batch: name=version, -name, or reset.
func (v *view) batch() (changes []string) {
	GinkgoHelper()
	for {
		Expect(v.stream.Receive()).To(BeTrue(), "%v", v.stream.Err())
		msg := v.stream.Msg()
		size := 0
		if msg.GetReset_() {
			changes = append(changes, "reset")
		}
		for _, c := range msg.GetChanges() {
			if set := c.GetSet(); set != nil {
				size += len(set.GetBody())
				changes = append(changes, set.GetName()+"="+versionIn(set.GetBody()))
			} else {
				changes = append(changes, "-"+c.GetRemoved())
			}
		}
		v.largest = max(v.largest, size)
		if msg.GetResumeToken() != "" {
			v.token = msg.GetResumeToken()
			return changes
		}
	}
}

func versionIn(body string) string {
	var v struct{ Version string }
	_ = json.Unmarshal([]byte(body), &v)
	return v.Version
}
