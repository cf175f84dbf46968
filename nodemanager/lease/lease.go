package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/go-logr/logr"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/kubernetes"
	coordinationclient "k8s.io/client-go/kubernetes/typed/coordination/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/klog/v2"

	"github.com/dbcontroller/db-controller/nodemanager"
)

// Config says where and as whom to be a member.
type Config struct {
	// Client reaches the API server. Needed rights, in Namespace: get, list, watch, create, update and delete leases.coordination.k8s.io.
	Client *rest.Config
	// Namespace of the Leases.
	Namespace string
	// Prefix of their names: Prefix().
	Prefix string
	// Replica is the name of this process among those of the ring: that of the pod. Two processes must not have the same; the second
	// waits until the first is dead.
	Replica string
	// Kinds of nodes.
	Kinds []string
	// Timing in whole seconds, of which a Lease is one at least.
	Timing nodemanager.Timing
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Membership is nodemanager.Membership by Leases.
type Membership struct {
	cfg Config
	// previous is the ID under which this process was a member before: it is that no more, and its Leases may be taken over.
	previous string
}

// New checks cfg. It reaches for nothing yet.
func New(cfg Config) (*Membership, error) {
	timing, err := cfg.Timing.WithDefaults()
	if err != nil {
		return nil, err
	}
	cfg.Timing = timing
	if timing.Lease < time.Second || timing.Lease%time.Second != 0 {
		return nil, fmt.Errorf("lease duration %s: want whole seconds, one at least", timing.Lease)
	}
	if cfg.Client == nil || cfg.Namespace == "" || cfg.Prefix == "" || cfg.Replica == "" || len(cfg.Kinds) == 0 {
		return nil, fmt.Errorf("membership by Leases: namespace %q, prefix %q, replica %q, kinds %q: want all of them, and a client",
			cfg.Namespace, cfg.Prefix, cfg.Replica, cfg.Kinds)
	}
	if fit(cfg.Prefix, cfg.Prefix, maxLabel, false) != cfg.Prefix {
		return nil, fmt.Errorf("membership by Leases: prefix %q is no DNS-1123 name of %d characters at most", cfg.Prefix, maxLabel)
	}
	for _, k := range cfg.Kinds {
		if k == rolePlan || k == roleLeader || fit(k, k, maxLabel, false) != k {
			return nil, fmt.Errorf("membership by Leases: %q cannot be the name of a kind", k)
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Membership{cfg: cfg}, nil
}

// Run implements nodemanager.Membership. It may not be called again before it has returned.
func (m *Membership) Run(ctx context.Context, work func(ctx context.Context, s nodemanager.Session) error) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(m.cfg.Logger.Handler()))
	renewals, closeRenewals, err := m.client("renew")
	if err != nil {
		return err
	}
	defer closeRenewals()
	others, closeOthers, err := m.client("watch")
	if err != nil {
		return err
	}
	defer closeOthers()

	id := fmt.Sprintf("%s_%08x", m.cfg.Replica, rand.Uint32())
	s := newSession(&m.cfg, id, m.previous, renewals, others)
	if !s.join(ctx) {
		s.leave(ctx)
		return nil
	}
	m.previous = id
	working, stop := context.WithCancel(ctx)
	defer stop()
	s.arm(stop)
	// What keeps the member alive goes on until work has returned, what gives it new work does not.
	background, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var parts sync.WaitGroup
	parts.Go(func() { s.keepRenewed(background) })
	parts.Go(func() { s.watch(background) })
	parts.Go(func() { s.stand(working) })
	parts.Go(func() { s.sweep(working) })
	err = work(working, s)
	stop()
	end()
	parts.Wait()
	lost := s.disarm()
	if !errors.Is(err, nodemanager.ErrNotStopped) { // then there is a node, and it must count as alive
		s.leave(ctx)
	}
	if err == nil && lost {
		return nodemanager.ErrLost
	}
	return err
}

// client returns a client with connections of its own, whom no rate limiter holds up, and what closes them.
func (m *Membership) client(purpose string) (coordinationclient.LeaseInterface, func(), error) {
	cfg := rest.CopyConfig(m.cfg.Client)
	cfg.QPS, cfg.RateLimiter = -1, flowcontrol.NewFakeAlwaysRateLimiter()
	cfg = rest.AddUserAgent(cfg, "node-manager-"+purpose)
	// Transports of equal configurations are shared; a dial function of its own makes this one different.
	dial := cfg.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: m.cfg.Timing.RenewDeadline / 2, KeepAlive: 30 * time.Second}).DialContext
	}
	cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return dial(ctx, network, address)
	}
	var h *http.Client
	h, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("client for Leases: %w", err)
	}
	c, err := kubernetes.NewForConfigAndClient(cfg, h)
	if err != nil {
		return nil, nil, fmt.Errorf("client for Leases: %w", err)
	}
	return c.CoordinationV1().Leases(m.cfg.Namespace), func() { utilnet.CloseIdleConnectionsFor(h.Transport) }, nil
}
