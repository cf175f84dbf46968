package apiserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// Topology is what the server asks the registry.
type Topology interface {
	View() *registry.View
}

// Owners knows the owning region of a name, from its region segment or from the policy that governs it. Its errors are of package store.
type Owners interface {
	Owner(ctx context.Context, name descriptor.Name, batch []store.Write) (region string, err error)
}

// Config of a Server. Zero limits mean their defaults.
type Config struct {
	// Service, Region and Version are what this server serves: one API version of one Deployment.
	Service, Region, Version string

	Store    store.Store
	Owners   Owners
	Changes  Changes
	Replica  Replica
	Topology Topology
	// Mixin answers other Deployments about references. Nil: it is not served.
	Mixin Mixin
	// Planner makes the answer to a Delete with validate_only, Explainer that to Explain. Nil: that is not served.
	Planner   Planner
	Explainer *Explainer
	// Searcher answers Search. Nil: the Deployment has no search store, and Search says so.
	Searcher Searcher
	// Census asks a region, perhaps this one, what it owns under a policy, and at which rates it works: mixin.Peers. Nil: PreviewPolicy is not served.
	Census Census
	// ServicePolicy is the policy of the service that is in force here. Nil: the declared one is.
	ServicePolicy func() *descriptor.Policy
	// Verifier compares copies with their owners. Nil: that is not served.
	Verifier Verifier

	// TLS is the certificate of this Deployment and the CAs of its callers; nil serves plain text.
	TLS pki.Source
	// TrustDomain of all callers; required with TLS.
	TrustDomain string
	// AllowPlaintext lets a server without TLS listen on addresses other than loopback, where everybody who can connect may do everything.
	AllowPlaintext bool
	// DialContext opens connections to other Deployments; nil is a plain dialer.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)

	// MaxMessageBytes bounds a request. Default 4 MiB.
	MaxMessageBytes int
	// RequestTimeout is the default and the largest deadline of a call that is no stream. Default 30 s.
	RequestTimeout time.Duration
	// SendTimeout cuts a stream whose reader takes nothing for so long. Default 60 s.
	SendTimeout time.Duration
	// StopTimeout is how long calls in flight may take after Run was told to stop. Default 10 s.
	StopTimeout time.Duration
	// MaxBytesInFlight bounds the bytes of requests that are being answered; one caller has at most a quarter. Default 256 MiB.
	MaxBytesInFlight int64
	// MaxWatches bounds the watches that are open at once. Default 1000.
	MaxWatches int
	// MaxPeerStreams bounds the feed streams that one region has open at once. Default 64.
	MaxPeerStreams int

	// Registerer takes the server's own metrics; nil is none.
	Registerer prometheus.Registerer
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

func (c *Config) complete() error {
	required := map[string]bool{
		"Service": c.Service != "", "Region": c.Region != "", "Version": c.Version != "", "Store": c.Store != nil, "Owners": c.Owners != nil,
		"Changes": c.Changes != nil, "Replica": c.Replica != nil, "Topology": c.Topology != nil, "TrustDomain": c.TLS == nil || c.TrustDomain != "",
	}
	for field, ok := range required {
		if !ok {
			return fmt.Errorf("configure API server: %s is required", field)
		}
	}
	c.MaxMessageBytes = cmp.Or(c.MaxMessageBytes, 4<<20)
	c.RequestTimeout = cmp.Or(c.RequestTimeout, 30*time.Second)
	c.SendTimeout = cmp.Or(c.SendTimeout, time.Minute)
	c.StopTimeout = cmp.Or(c.StopTimeout, 10*time.Second)
	c.MaxBytesInFlight = cmp.Or(c.MaxBytesInFlight, 256<<20)
	c.MaxWatches = cmp.Or(c.MaxWatches, 1000)
	c.MaxPeerStreams = cmp.Or(c.MaxPeerStreams, 64)
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return nil
}

// Server serves one Deployment. It is safe for concurrent use; Run may be called once.
type Server struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	peers   peers
	watches *semaphore.Weighted
	budget  *budget
	errors  *connect.ErrorWriter

	streams struct { // open feed streams by region
		sync.Mutex
		open map[string]int
	}

	// draining ends the streams when Run is told to stop.
	draining context.Context
	drain    context.CancelFunc
	calls    sync.WaitGroup
}

// New returns a server that does not listen yet. The error is about cfg.
func New(cfg Config) (*Server, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("register metrics of the API server: %w", err)
	}
	s := &Server{cfg: cfg, log: cfg.Logger, metrics: m, watches: semaphore.NewWeighted(int64(cfg.MaxWatches)),
		budget: newBudget(cfg.MaxBytesInFlight), errors: connect.NewErrorWriter()}
	s.streams.open = map[string]int{}
	s.draining, s.drain = context.WithCancel(context.Background())
	return s, nil
}

// handler serves everything but the operator's endpoints.
func (s *Server) handler() http.Handler {
	options := []connect.HandlerOption{
		connect.WithInterceptors(interceptor{s}),
		connect.WithReadMaxBytes(s.cfg.MaxMessageBytes),
		codecs(s.cfg.MaxMessageBytes),
	}
	mux := http.NewServeMux()
	mux.Handle(dbcontrollerv1connect.NewResourcesHandler(resourcesService{s}, options...))
	// Rows between regions are not compressed: the time would be taken from copying.
	mux.Handle(dbcontrollerv1connect.NewFeedHandler(feedService{s}, append(options, connect.WithCompression("gzip", nil, nil))...))
	mux.Handle(dbcontrollerv1connect.NewSchemaMixinHandler(mixinService{s}, options...))
	mux.Handle(dbcontrollerv1connect.NewResourceShadowsHandler(shadowsService{s}, options...))
	mux.Handle(dbcontrollerv1connect.NewVerificationHandler(verificationService{s}, options...))
	mux.Handle("/", s.rest())
	return s.admit(mux)
}

// Run serves on l until ctx is done, then stops in two steps: it takes no more work and ends the streams, and gives the calls in flight
// StopTimeout. It closes l, and returns once nothing of it is running. Being told to stop is not an error.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	defer s.peers.close()
	defer s.drain()
	if s.cfg.TLS == nil && !s.cfg.AllowPlaintext && !loopback(l.Addr()) {
		_ = l.Close()
		return fmt.Errorf("serve on %s: without TLS only loopback is allowed", l.Addr())
	}
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           s.handler(),
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		// Refused handshakes and broken connections are the business of those who caused them.
		ErrorLog:  slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnState: s.connState,
		Protocols: new(http.Protocols),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: 1000,
			SendPingTimeout:      30 * time.Second,
			PingTimeout:          15 * time.Second,
		},
	}
	srv.Protocols.SetHTTP1(true)
	serve := func() error { return srv.Serve(l) }
	if s.cfg.TLS != nil {
		srv.Protocols.SetHTTP2(true)
		srv.TLSConfig = pki.ServerTLS(s.cfg.TLS, s.cfg.TrustDomain)
		serve = func() error { return srv.ServeTLS(l, "", "") }
	} else {
		srv.Protocols.SetUnencryptedHTTP2(true)
	}

	served := make(chan error, 1)
	go func() { served <- serve() }()
	var err error
	select {
	case err = <-served:
		err = fmt.Errorf("serve on %s: %w", l.Addr(), err)
	case <-ctx.Done():
		s.drain()
		grace, stop := context.WithTimeout(base, s.cfg.StopTimeout)
		if serr := srv.Shutdown(grace); serr != nil && !errors.Is(serr, context.DeadlineExceeded) {
			err = fmt.Errorf("stop serving on %s: %w", l.Addr(), serr)
		}
		stop()
		if serr := <-served; !errors.Is(serr, http.ErrServerClosed) {
			err = errors.Join(err, fmt.Errorf("serve on %s: %w", l.Addr(), serr))
		}
	}
	cancel()
	_ = srv.Close() // what is left has had its time
	s.calls.Wait()
	return err
}

// connState counts handshakes that failed.
func (s *Server) connState(c net.Conn, state http.ConnState) {
	if state != http.StateClosed || s.draining.Err() != nil {
		return
	}
	if reason := pki.HandshakeRefusal(c); reason != "" {
		s.metrics.refused.WithLabelValues(reason).Inc()
	}
}

func loopback(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return !ok || tcp.IP.IsLoopback() // not TCP: a Unix socket or a pipe
}
