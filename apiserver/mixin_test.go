package apiserver

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"connectrpc.com/connect"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	rpc "github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/store"
)

// idleMixin answers nothing but that it was reached.
type idleMixin struct{}

func (idleMixin) EstablishReferences(context.Context, *dbcontrollerv1.EstablishReferencesRequest) (*dbcontrollerv1.EstablishReferencesResponse, error) {
	return new(dbcontrollerv1.EstablishReferencesResponse), nil
}

func (idleMixin) ConfirmBlockades(context.Context, *dbcontrollerv1.ConfirmBlockadesRequest) (*dbcontrollerv1.ConfirmBlockadesResponse, error) {
	return new(dbcontrollerv1.ConfirmBlockadesResponse), nil
}

func (idleMixin) CheckIfResourceIsBlocked(context.Context, *dbcontrollerv1.CheckIfResourceIsBlockedRequest) (*dbcontrollerv1.CheckIfResourceIsBlockedResponse, error) {
	return new(dbcontrollerv1.CheckIfResourceIsBlockedResponse), nil
}

func (idleMixin) CheckIfResourceHasDeletionSubscriber(context.Context, *dbcontrollerv1.CheckIfResourceHasDeletionSubscriberRequest) (*dbcontrollerv1.CheckIfResourceHasDeletionSubscriberResponse, error) {
	return new(dbcontrollerv1.CheckIfResourceHasDeletionSubscriberResponse), nil
}

func (idleMixin) CheckIfHasMetaOwnee(context.Context, *dbcontrollerv1.CheckIfHasMetaOwneeRequest) (*dbcontrollerv1.CheckIfHasMetaOwneeResponse, error) {
	return new(dbcontrollerv1.CheckIfHasMetaOwneeResponse), nil
}

func (idleMixin) ConfirmMetaOwner(context.Context, *dbcontrollerv1.ConfirmMetaOwnerRequest) (*dbcontrollerv1.ConfirmMetaOwnerResponse, error) {
	return new(dbcontrollerv1.ConfirmMetaOwnerResponse), nil
}

func (idleMixin) UpgradeMetaOwnerVersion(context.Context, *dbcontrollerv1.UpgradeMetaOwnerVersionRequest) (*dbcontrollerv1.UpgradeMetaOwnerVersionResponse, error) {
	return new(dbcontrollerv1.UpgradeMetaOwnerVersionResponse), nil
}

func (idleMixin) RemoveMetaOwnerReference(context.Context, *dbcontrollerv1.RemoveMetaOwnerReferenceRequest) (*dbcontrollerv1.RemoveMetaOwnerReferenceResponse, error) {
	return new(dbcontrollerv1.RemoveMetaOwnerReferenceResponse), nil
}

func (idleMixin) ListMetaOwnees(context.Context, *dbcontrollerv1.ListMetaOwneesRequest) (*dbcontrollerv1.ListMetaOwneesResponse, error) {
	return new(dbcontrollerv1.ListMetaOwneesResponse), nil
}

func (idleMixin) PlanDeletion(context.Context, *dbcontrollerv1.PlanDeletionRequest) (*dbcontrollerv1.PlanDeletionResponse, error) {
	return new(dbcontrollerv1.PlanDeletionResponse), nil
}

func (idleMixin) WatchImportedServiceDeletions(_ context.Context, _ *dbcontrollerv1.WatchImportedServiceDeletionsRequest, emit func(*dbcontrollerv1.WatchImportedServiceDeletionsResponse) error) error {
	return emit(&dbcontrollerv1.WatchImportedServiceDeletionsResponse{})
}

func (idleMixin) GetResourceShadow(context.Context, *dbcontrollerv1.GetResourceShadowRequest) (*dbcontrollerv1.ResourceShadow, error) {
	return new(dbcontrollerv1.ResourceShadow), nil
}

func (idleMixin) ListResourceShadows(context.Context, *dbcontrollerv1.ListResourceShadowsRequest) (*dbcontrollerv1.ListResourceShadowsResponse, error) {
	return new(dbcontrollerv1.ListResourceShadowsResponse), nil
}

func (idleMixin) WatchResourceShadows(_ context.Context, _ *dbcontrollerv1.WatchResourceShadowsRequest, emit func(*dbcontrollerv1.WatchResourceShadowsResponse) error) error {
	return emit(&dbcontrollerv1.WatchResourceShadowsResponse{})
}

// scriptedMixin answers two methods as the test says.
type scriptedMixin struct {
	idleMixin
	establish func(context.Context, *dbcontrollerv1.EstablishReferencesRequest) (*dbcontrollerv1.EstablishReferencesResponse, error)
	watch     func(context.Context, func(*dbcontrollerv1.WatchImportedServiceDeletionsResponse) error) error
}

func (m *scriptedMixin) EstablishReferences(ctx context.Context, req *dbcontrollerv1.EstablishReferencesRequest) (*dbcontrollerv1.EstablishReferencesResponse, error) {
	return m.establish(ctx, req)
}

func (m *scriptedMixin) WatchImportedServiceDeletions(ctx context.Context, _ *dbcontrollerv1.WatchImportedServiceDeletionsRequest, emit func(*dbcontrollerv1.WatchImportedServiceDeletionsResponse) error) error {
	return m.watch(ctx, emit)
}

// The mixin over HTTP/2 and mTLS: eu is served, us asks.
var _ = Describe("The schema mixin", func() {
	var w *world
	var script *scriptedMixin
	eu, us := store.Location{Service: service, Region: "eu"}, store.Location{Service: service, Region: "us"}
	newPeers := func(dial func(ctx context.Context, network, addr string) (net.Conn, error), timeout time.Duration) *mixin.Peers {
		p := mixin.NewPeers(mixin.PeersConfig{Service: service, Region: "us", Version: "v1", Topology: w.registry, TLS: w.source(deployment("us")), DialContext: dial, Timeout: timeout})
		DeferCleanup(p.Close)
		return p
	}
	peerOf := func(p *mixin.Peers) mixin.Peer {
		GinkgoHelper()
		peer, err := p.Peer(eu)
		Expect(err).NotTo(HaveOccurred())
		return peer
	}
	request := func(p *mixin.Peers) *dbcontrollerv1.EstablishReferencesRequest {
		GinkgoHelper()
		c, err := p.Call(eu)
		Expect(err).NotTo(HaveOccurred())
		return &dbcontrollerv1.EstablishReferencesRequest{Call: c, Targets: []*dbcontrollerv1.NewReference{{Name: "sections/s"}}}
	}
	BeforeEach(func() {
		script = &scriptedMixin{}
		w = newWorld(false, func(c *Config) { c.Mixin = script }, "eu")
		d := w.deployments[0].DeepCopy()
		d.Name, d.Spec.Region = "us", "us"
		w.deployments = append(w.deployments, d)
		w.publish()
	})

	It("carries question and answer", func(ctx SpecContext) {
		script.establish = func(_ context.Context, req *dbcontrollerv1.EstablishReferencesRequest) (*dbcontrollerv1.EstablishReferencesResponse, error) {
			defer GinkgoRecover()
			Expect(mixin.LocationOf(req.GetCall().GetRequester())).To(Equal(us))
			Expect(req.GetCall().GetVersion()).To(Equal("v1"))
			return &dbcontrollerv1.EstablishReferencesResponse{Grants: []*dbcontrollerv1.Grant{{Uuid: "u", Epoch: 2, RowVersion: 3}}}, nil
		}
		p := newPeers(nil, 0)
		res, err := peerOf(p).EstablishReferences(ctx, request(p))
		Expect(err).NotTo(HaveOccurred())
		Expect(res.GetGrants()[0].GetRowVersion()).To(Equal(int64(3)))
	})

	DescribeTable("carries errors as they were", func(ctx SpecContext, sent error, want store.Error, reason string) {
		script.establish = func(context.Context, *dbcontrollerv1.EstablishReferencesRequest) (*dbcontrollerv1.EstablishReferencesResponse, error) {
			return nil, sent
		}
		p := newPeers(nil, 0)
		_, err := peerOf(p).EstablishReferences(ctx, request(p))
		got, ok := errors.AsType[*store.Error](err)
		Expect(ok).To(BeTrue(), "%v", err)
		shown := *got
		shown.Cause = nil
		Expect(shown).To(Equal(want))
		Expect(mixin.ReasonOf(err)).To(Equal(reason))
	},
		Entry("a name", store.Errorf(store.NotFound, "sections/s", "does not exist"), store.Error{Code: store.NotFound, Name: "sections/s", Reason: "does not exist"}, ""),
		Entry("fields", &store.Error{Code: store.FailedPrecondition, Name: "sections/s", Reason: "is being deleted", Violations: []store.Violation{{Field: "sections/s", Description: "is being deleted"}, {Field: "a", Description: "b"}}},
			store.Error{Code: store.FailedPrecondition, Name: "sections/s", Reason: "is being deleted", Violations: []store.Violation{{Field: "sections/s", Description: "is being deleted"}, {Field: "a", Description: "b"}}}, ""),
		Entry("fields alone", store.Invalid("tx_id", "is no UUID"), store.Error{Code: store.InvalidArgument, Violations: []store.Violation{{Field: "tx_id", Description: "is no UUID"}}}, ""),
		Entry("a race", store.Errorf(store.Aborted, "", "again"), store.Error{Code: store.Aborted, Reason: "again"}, ""),
		Entry("another version (X37)", &mixin.Refusal{Err: store.Errorf(store.FailedPrecondition, "", "v9?"), Reason: mixin.ReasonVersionMismatch, Metadata: map[string]string{mixin.MetadataVersion: "v1"}},
			store.Error{Code: store.FailedPrecondition, Reason: "v9?"}, mixin.ReasonVersionMismatch),
		Entry("no import (F25)", &mixin.Refusal{Err: store.Errorf(store.FailedPrecondition, "", "not imported"), Reason: mixin.ReasonNotImported}, store.Error{Code: store.FailedPrecondition, Reason: "not imported"}, mixin.ReasonNotImported),
		Entry("too many calls", &mixin.Refusal{Err: store.Errorf(store.Unavailable, "", "later"), Reason: mixin.ReasonTooManyCalls},
			store.Error{Code: store.Unavailable, Reason: eu.String() + " cannot be reached: repeat later"}, ""),
		Entry("the database is away", store.Errorf(store.Unavailable, "", "later"), store.Error{Code: store.Unavailable, Reason: eu.String() + " cannot be reached: repeat later"}, ""),
		Entry("a fault", context.DeadlineExceeded, store.Error{Code: store.Unavailable, Reason: eu.String() + " cannot be reached: repeat later"}, ""),
	)

	It("tells who owns a target instead", func(ctx SpecContext) {
		script.establish = func(context.Context, *dbcontrollerv1.EstablishReferencesRequest) (*dbcontrollerv1.EstablishReferencesResponse, error) {
			return nil, &mixin.Refusal{Err: store.Errorf(store.FailedPrecondition, "sections/s", "is owned by ap"), Reason: mixin.ReasonWrongRegion, Metadata: map[string]string{mixin.MetadataRegion: "ap"}}
		}
		p := newPeers(nil, 0)
		_, err := peerOf(p).EstablishReferences(ctx, request(p))
		region, ok := mixin.OwningRegion(err)
		Expect(ok).To(BeTrue())
		Expect(region).To(Equal("ap"))
	})

	It("is unavailable where nobody answers in time, and says so as its own fault", func(ctx SpecContext) {
		script.establish = func(ctx context.Context, _ *dbcontrollerv1.EstablishReferencesRequest) (*dbcontrollerv1.EstablishReferencesResponse, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		p := newPeers(nil, 200*time.Millisecond)
		_, err := peerOf(p).EstablishReferences(ctx, request(p))
		Expect(store.CodeOf(err)).To(Equal(store.Unavailable))
		Expect(err).To(MatchError(ContainSubstring("no answer within 200ms")))
		Expect(err).NotTo(MatchError(context.DeadlineExceeded))
	})

	It("is unavailable where nobody can be reached", func(ctx SpecContext) {
		refuse := func(context.Context, string, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: net.ErrClosed}
		}
		p := newPeers(refuse, 0)
		_, err := peerOf(p).EstablishReferences(ctx, request(p))
		Expect(store.CodeOf(err)).To(Equal(store.Unavailable))
	})

	It("asks nobody but the Deployment that it means (I/P18)", func(ctx SpecContext) {
		// Its name leads to another server with a certificate of the same CA.
		pair, err := w.ca.Issue(deployment("ap"), time.Now().Add(time.Hour))
		Expect(err).NotTo(HaveOccurred())
		source, err := pki.Static(pair, w.ca.CertPEM())
		Expect(err).NotTo(HaveOccurred())
		l, err := tls.Listen("tcp", "127.0.0.1:0", pki.ServerTLS(source, domain))
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(l.Close)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { _ = c.(*tls.Conn).Handshake(); _ = c.Close() }()
			}
		}()
		p := newPeers(func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
		}, 0)
		_, err = peerOf(p).EstablishReferences(ctx, request(p))
		Expect(store.CodeOf(err)).To(Equal(store.Unavailable))
		Expect(err).To(MatchError(ContainSubstring("want spiffe")))
	})

	It("streams deletions until one end has had enough", func(ctx SpecContext) {
		ended := make(chan error, 1)
		script.watch = func(ctx context.Context, emit func(*dbcontrollerv1.WatchImportedServiceDeletionsResponse) error) error {
			for _, name := range []string{"sections/a", "sections/b"} {
				if err := emit(&dbcontrollerv1.WatchImportedServiceDeletionsResponse{Deleting: []*dbcontrollerv1.DeletingShadow{{Name: name}}, ResumeToken: name, Epoch: 5}); err != nil {
					return err
				}
			}
			<-ctx.Done()
			ended <- ctx.Err()
			return ctx.Err()
		}
		p := newPeers(nil, 0)
		var got []string
		err := peerOf(p).WatchImportedServiceDeletions(ctx, &dbcontrollerv1.WatchImportedServiceDeletionsRequest{Call: request(p).GetCall()}, func(res *dbcontrollerv1.WatchImportedServiceDeletionsResponse) error {
			for _, d := range res.GetDeleting() {
				got = append(got, d.GetName())
			}
			if len(got) == 2 {
				return net.ErrClosed
			}
			return nil
		})
		Expect(err).To(MatchError(net.ErrClosed), "the consumer's own error")
		Expect(got).To(Equal([]string{"sections/a", "sections/b"}))
		Eventually(ctx, ended, "10s").Should(Receive())

		script.watch = func(context.Context, func(*dbcontrollerv1.WatchImportedServiceDeletionsResponse) error) error {
			return nil
		}
		err = peerOf(p).WatchImportedServiceDeletions(ctx, &dbcontrollerv1.WatchImportedServiceDeletionsRequest{Call: request(p).GetCall()}, nil)
		Expect(store.CodeOf(err)).To(Equal(store.Unavailable), "a stream that ends without an error has not ended well")
	})

	It("is not served where it is not wanted, nor to who speaks for another", func(ctx SpecContext) {
		plain := newWorld(true, nil, "eu")
		c := rpc.NewSchemaMixinClient(plain.client(pki.Identity{}, "eu"), plain.regions["eu"].endpoint)
		_, err := c.PlanDeletion(ctx, connect.NewRequest(&dbcontrollerv1.PlanDeletionRequest{}))
		Expect(connect.CodeOf(err)).To(Equal(connect.CodeUnimplemented))
		h := rpc.NewResourceShadowsClient(plain.client(pki.Identity{}, "eu"), plain.regions["eu"].endpoint)
		_, err = h.GetResourceShadow(ctx, connect.NewRequest(&dbcontrollerv1.GetResourceShadowRequest{}))
		Expect(connect.CodeOf(err)).To(Equal(connect.CodeUnimplemented))

		p := newPeers(nil, 0)
		req := request(p)
		req.Call.Requester.Region = "ap"
		_, err = peerOf(p).EstablishReferences(ctx, req)
		Expect(store.CodeOf(err)).To(Equal(store.FailedPrecondition))
		Expect(err).To(MatchError(ContainSubstring("does not want to be asked")))
	})
})
