package mixin

import (
	"cmp"
	"context"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// PeersConfig says for whom Deployments are reached, and how.
type PeersConfig struct {
	// Service, Region and Version are the local Deployment's, for which all others are asked.
	Service, Region, Version string
	Topology                 Topology
	// TLS is the identity of the local Deployment and the CAs that it trusts; nil is plain text, for development.
	TLS pki.Source
	// DialContext opens connections; nil is a plain dialer.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
	// Timeout of a call that is no stream. Default DefaultTimeout.
	Timeout time.Duration
}

// Peers knows all Deployments with which this one has to do, as the registry sees them at each call. It keeps one connection pool for each. It is safe
// for concurrent use.
type Peers struct {
	cfg   PeersConfig
	self  store.Location
	local atomic.Pointer[Server]

	mu      sync.Mutex
	clients map[store.Location]pooled
}

type pooled struct {
	endpoint, trustDomain string
	transport             *http.Transport
	client                *Client
}

// NewPeers returns the Peers of a Deployment. Close them when nobody uses them any more.
func NewPeers(cfg PeersConfig) *Peers {
	cfg.Timeout = cmp.Or(cfg.Timeout, DefaultTimeout)
	return &Peers{cfg: cfg, self: store.Location{Service: cfg.Service, Region: cfg.Region}, clients: map[store.Location]pooled{}}
}

// SetLocal says who answers for the local Deployment. It comes later than NewPeers, because the server writes through a store that has to reach others.
func (p *Peers) SetLocal(s *Server) { p.local.Store(s) }

// Close gives the connections back. Nobody is reached any more.
func (p *Peers) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.clients {
		c.transport.CloseIdleConnections()
	}
	p.clients = nil
}

func (p *Peers) view() *registry.View { return p.cfg.Topology.View() }

// own is the schema of the local Deployment; nil if it is not declared.
func (p *Peers) own() *descriptor.Version {
	if s, ok := p.view().Service(p.self.Service); ok {
		return s.Version(p.cfg.Version)
	}
	return nil
}

// whole names the local Deployment where the zero Location stands for it.
func (p *Peers) whole(at store.Location) store.Location {
	if at == (store.Location{}) {
		return p.self
	}
	return at
}

// Peer returns the mixin of a Deployment: the local server itself for the local one. It connects to nobody. The error is FailedPrecondition if the registry
// does not know the Deployment, or nobody may route to it.
func (p *Peers) Peer(at store.Location) (Peer, error) {
	if at = p.whole(at); at == p.self {
		if s := p.local.Load(); s != nil {
			return s, nil
		}
		return nil, store.Errorf(store.Unavailable, "", "%s is starting: repeat later", at)
	}
	d, err := p.declared(at)
	if err != nil {
		return nil, err
	}
	switch {
	case d.Disabled:
		return nil, store.Errorf(store.FailedPrecondition, "", "Deployment %s is disabled: enable it, or delete it if it is gone for good", at)
	case p.cfg.TLS != nil && !strings.HasPrefix(d.Endpoint, "https://"):
		return nil, store.Errorf(store.FailedPrecondition, "", "Deployment %s has no https endpoint: set spec.endpoint", at)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.clients == nil {
		return nil, store.Errorf(store.Unavailable, "", "%s is stopping: repeat elsewhere", p.self)
	}
	c, found := p.clients[at]
	if found && c.endpoint == d.Endpoint && c.trustDomain == d.TrustDomain {
		return c.client, nil
	}
	if found {
		c.transport.CloseIdleConnections()
	}
	t := pki.Transport(p.cfg.TLS, pki.Identity{TrustDomain: d.TrustDomain, Service: at.Service, Region: at.Region}, p.cfg.DialContext)
	c = pooled{endpoint: d.Endpoint, trustDomain: d.TrustDomain, transport: t, client: NewClient(t, d.Endpoint, at, p.cfg.Timeout)}
	p.clients[at] = c
	return c.client, nil
}

func (p *Peers) declared(at store.Location) (registry.Deployment, error) {
	d, ok := p.view().Deployment(keyOf(at))
	if !ok {
		return d, store.Errorf(store.FailedPrecondition, "", "no Deployment %s is declared: declare it, or remove what refers to it", at)
	}
	return d, nil
}

// Call returns who asks whom, with names of at's resources spelled in the version that this Deployment imports; for its own service, in its own version.
// If it does not import the service, and only owner references lead there, the version is at's own. A question about resources of this
// Deployment has the version that SpellFor returns.
func (p *Peers) Call(at store.Location) (*v1.Call, error) {
	at = p.whole(at)
	version := spelledBy(p.view(), p.self.Service, p.cfg.Version, at.Service)
	if version == "" {
		d, err := p.declared(at)
		if err != nil {
			return nil, err
		}
		version = d.Version
	}
	return &v1.Call{Requester: WireLocation(p.self), Callee: WireLocation(at), Version: version}, nil
}

// SpellFor returns a name of this Deployment's as the Deployment at has it in its references: in the version that its current version imports, or, if it is of the
// same service, in its current version. ok is false if that version cannot express the name, so that nobody there can refer to it. Of a Deployment
// that is not declared, or does not import us, nothing is known: the name stays as it is, and asking there fails.
func (p *Peers) SpellFor(at store.Location, ownName string) (version, name string, ok bool) {
	at = p.whole(at)
	view := p.view()
	own := p.own()
	d, known := view.Deployment(keyOf(at))
	if own == nil || !known {
		return p.cfg.Version, ownName, true
	}
	to := own.Service.Version(spelledBy(view, at.Service, d.Version, p.self.Service))
	if to == nil {
		return p.cfg.Version, ownName, true
	}
	n, err := own.ParseName(ownName)
	if err != nil {
		return own.Name, ownName, true
	}
	n, ok = n.Translate(to, p.self.Region)
	return to.Name, n.Full, ok
}

// Spellings returns all spellings of a name of this Deployment, in the order of the versions. Ownees may have any of them (spec 1.4, 8.41).
func (p *Peers) Spellings(ownName string) []*v1.Spelling {
	asItIs := []*v1.Spelling{{Version: p.cfg.Version, Name: ownName}}
	own := p.own()
	if own == nil {
		return asItIs
	}
	n, err := own.ParseName(ownName)
	if err != nil {
		return asItIs
	}
	var out []*v1.Spelling
	for _, v := range own.Service.Versions {
		if m, ok := n.Translate(v, p.self.Region); ok {
			out = append(out, &v1.Spelling{Version: v.Name, Name: m.Full})
		}
	}
	return out
}

// Importers returns the Deployments that may have references to resources here: those whose current version imports this service, and the other regions of the
// service itself. Disabled ones are among them. They are ordered.
func (p *Peers) Importers() []store.Location {
	view := p.view()
	return p.locations(func(d registry.Deployment) bool {
		return locationOf(d) != p.self && (d.Service == p.self.Service || spelledBy(view, d.Service, d.Version, p.self.Service) != "")
	})
}

// Interesting returns the Deployments to whose resources there may be references here: those of the imported services and of this one in all regions,
// this Deployment itself among them (F58). They are ordered.
func (p *Peers) Interesting() []store.Location {
	own := p.own()
	return p.locations(func(d registry.Deployment) bool {
		return d.Service == p.self.Service || own != nil && own.Imports[d.Service] != ""
	})
}

func (p *Peers) locations(wanted func(registry.Deployment) bool) (out []store.Location) {
	for _, d := range p.view().Deployments() {
		if wanted(d) {
			out = append(out, locationOf(d))
		}
	}
	return out
}

func locationOf(d registry.Deployment) store.Location {
	return store.Location{Service: d.Service, Region: d.Region}
}
