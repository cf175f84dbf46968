package apiserver

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	rpc "github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/store"
)

var _ = Describe("Server", func() {
	It("speaks gRPC, gRPC-Web and JSON, over HTTP/1.1 and HTTP/2, in plain text on loopback", func() {
		w := newWorld(true, nil, "eu", "us")
		base := w.regions["eu"].endpoint
		h2 := w.client(alice, "eu")
		h1 := &http.Client{Transport: &http.Transport{}}
		DeferCleanup(h1.CloseIdleConnections)
		for _, c := range []rpc.ResourcesClient{
			rpc.NewResourcesClient(h2, base, connect.WithGRPC()),
			rpc.NewResourcesClient(h2, base, connect.WithGRPCWeb()),
			rpc.NewResourcesClient(h1, base),
			rpc.NewResourcesClient(h1, base, connect.WithProtoJSON()),
		} {
			res, err := c.Update(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.UpdateRequest{
				Resource: &dbcontrollerv1.Resource{Name: "sections/a", Body: `{"n": 9007199254740993}`}, AllowMissing: true,
			}))
			Expect(err).NotTo(HaveOccurred())
			Expect(res.Msg.GetBody()).To(ContainSubstring("9007199254740993"))
			Expect(res.Msg.GetMetadata().GetResourceVersion()).To(Equal("1"), "the same again is no change")

			_, err = c.Get(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.GetRequest{Name: "nonsense"}))
			Expect(connect.CodeOf(err)).To(Equal(connect.CodeInvalidArgument))
			Expect(fieldsOf(err)).To(Equal([]string{"name"}))
		}
		By("writes are forwarded in plain text too")
		_, err := w.resources(alice, "us").Delete(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.DeleteRequest{Name: "sections/a"}))
		Expect(err).NotTo(HaveOccurred())
	})

	It("refuses to forward a forwarded write", func() {
		w := newWorld(false, nil, "eu", "us")
		req := connect.NewRequest(&dbcontrollerv1.DeleteRequest{Name: "regions/us/mirrors/m"})
		req.Header().Set(dbcontrollerv1.ForwardedByHeader, "us")
		_, err := w.resources(deployment("us"), "eu").Delete(GinkgoT().Context(), req)
		Expect(connect.CodeOf(err)).To(Equal(connect.CodeFailedPrecondition))
		Expect(reasonOf(err)).To(Equal(dbcontrollerv1.ReasonWrongRegion))
		Expect(err).To(MatchError(ContainSubstring("region us owns the name")))
	})

	It("listens in plain text on loopback only", func() {
		w := newWorld(true, nil, "eu")
		cfg := w.regions["eu"].server.cfg
		cfg.Registerer = nil
		s, err := New(cfg)
		Expect(err).NotTo(HaveOccurred())
		l, err := net.Listen("tcp", "0.0.0.0:0")
		Expect(err).NotTo(HaveOccurred())
		Expect(s.Run(GinkgoT().Context(), l)).To(MatchError(ContainSubstring("only loopback")))
	})

	It("says which part of its configuration is missing", func() {
		_, err := New(Config{Service: service, Region: "eu", Version: "v1"})
		Expect(err).To(MatchError(MatchRegexp("configure API server: .* is required")))
	})

	It("lets calls in flight end and cuts streams when it stops", func() {
		entered, leave := make(chan struct{}), make(chan struct{})
		w := newWorld(false, func(c *Config) { c.Store = slowGet{c.Store, entered, leave} }, "eu")
		client := w.resources(alice, "eu")
		stream, err := client.Watch(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.WatchRequest{}))
		Expect(err).NotTo(HaveOccurred())
		Expect(stream.Receive()).To(BeTrue())
		got := make(chan error, 1)
		go func() {
			_, err := client.Get(context.Background(), connect.NewRequest(&dbcontrollerv1.GetRequest{Name: "sections/a"}))
			got <- err
		}()
		Eventually(entered, "10s").Should(BeClosed())

		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			defer GinkgoRecover()
			w.regions["eu"].stop()
		}()
		Expect(stream.Receive()).To(BeFalse())
		Expect(connect.CodeOf(stream.Err())).To(Equal(connect.CodeUnavailable))
		Expect(stream.Close()).To(Succeed())
		close(leave)
		var answer error
		Eventually(got, "10s").Should(Receive(&answer))
		Expect(connect.CodeOf(answer)).To(Equal(connect.CodeNotFound))
		Eventually(stopped, "10s").Should(BeClosed())
	})

	It("ends a call at its deadline and hides what is inside", func() {
		entered, leave := make(chan struct{}), make(chan struct{})
		w := newWorld(false, func(c *Config) {
			c.RequestTimeout = 100 * time.Millisecond
			c.Store = slowGet{c.Store, entered, leave}
		}, "eu")
		defer close(leave)
		_, err := w.resources(alice, "eu").Get(GinkgoT().Context(), connect.NewRequest(&dbcontrollerv1.GetRequest{Name: "sections/a"}))
		Expect(connect.CodeOf(err)).To(Equal(connect.CodeDeadlineExceeded))
	})

	It("answers an internal error with an id only", func() {
		w := newWorld(false, func(c *Config) { c.Store = brokenGet{c.Store} }, "eu")
		a := w.rest("eu").do("GET", "/sections/a", "")
		Expect(a.status).To(Equal(http.StatusInternalServerError))
		Expect(a.text).To(SatisfyAll(ContainSubstring("request id"), ContainSubstring("requestId"), Not(ContainSubstring("secret"))))
		a = w.rest("eu").do("GET", ":batchGet?names=sections/a", "")
		Expect(a.status).To(Equal(http.StatusInternalServerError))
		Expect(a.text).NotTo(ContainSubstring("secret"))
	})
})

// slowGet answers no Get until it may.
type slowGet struct {
	store.Store
	entered, leave chan struct{}
}

func (s slowGet) Get(ctx context.Context, name string) (*store.Resource, error) {
	close(s.entered)
	select {
	case <-s.leave:
		return s.Store.Get(ctx, name)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// brokenGet has faults that no database produces on demand.
type brokenGet struct{ store.Store }

func (brokenGet) Get(context.Context, string) (*store.Resource, error) {
	return nil, errors.New("secret")
}

func (brokenGet) BatchGet(context.Context, []string) ([]*store.Resource, error) { panic("secret") }

func fieldsOf(err error) (fields []string) {
	for _, d := range detailsOf(err) {
		if bad, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range bad.GetFieldViolations() {
				fields = append(fields, v.GetField())
			}
		}
	}
	return fields
}

func reasonOf(err error) string {
	for _, d := range detailsOf(err) {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

func detailsOf(err error) (out []any) {
	e, _ := errors.AsType[*connect.Error](err)
	if e == nil {
		return nil
	}
	for _, d := range e.Details() {
		if v, err := d.Value(); err == nil {
			out = append(out, v)
		}
	}
	return out
}

func metricValue(r *prometheus.Registry, name, method, code string) float64 {
	GinkgoHelper()
	families, err := r.Gather()
	Expect(err).NotTo(HaveOccurred())
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if label(m, "method") == method && label(m, "code") == code {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}
