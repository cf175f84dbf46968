package deployment

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/syncing"
	"github.com/dbcontroller/db-controller/verify"
)

// Verifier compares the read copies of a Deployment with what their owners have. Its methods may be called from any goroutine.
type Verifier struct{ d *Deployment }

// Verifier returns the Verifier of the Deployment.
func (d *Deployment) Verifier() Verifier { return Verifier{d} }

// Peers are the other regions of the service that are in use.
func (v Verifier) Peers() []string {
	var peers []string
	for _, p := range v.d.cfg.Registry.View().DeploymentsOf(v.d.cfg.Service) {
		if p.Region != v.d.cfg.Region && !p.Disabled {
			peers = append(peers, p.Region)
		}
	}
	slices.Sort(peers)
	return peers
}

// Verify runs a pass over the copies of a peer, or goes on with one, as verify.Run. What a finished pass has proved is written down.
func (v Verifier) Verify(ctx context.Context, peer string, opt verify.Options, from verify.State, report func(verify.Progress) error) (verify.State, error) {
	d := v.d
	source, err := v.dial(peer)
	if err != nil {
		return from, err
	}
	defer source.Close()
	copies := &verify.Copies{
		Store: d.core, Service: d.cfg.Service, Region: d.cfg.Region, Peer: peer, Ring: d.spec.Ring, Fetch: source.Fetch, Claims: verify.ClaimsOf(v.dial),
	}
	state, err := verify.Run(ctx, source, copies, opt, from, report)
	if err != nil || !state.Finished {
		return state, err
	}
	types := opt.Types
	if len(types) == 0 {
		for _, t := range d.version().Types {
			types = append(types, t.Name)
		}
	}
	return state, verify.Note(ctx, d.core, peer, state, types)
}

// dial returns a connection to the owner of copies, for one pass.
func (v Verifier) dial(peer string) (syncing.ContentSource, error) {
	d := v.d
	p, ok := d.cfg.Registry.View().Deployment(registry.Key{Service: d.cfg.Service, Region: peer})
	if !ok || p.Disabled || peer == d.cfg.Region {
		return nil, store.Errorf(store.InvalidArgument, "", "%q is no other region of %s in use: choose from %s", peer, d.cfg.Service, strings.Join(v.Peers(), ", "))
	}
	t := syncing.NewTransport(d.cfg.TLS, pki.Identity{TrustDomain: d.spec.TrustDomain, Service: p.Service, Region: p.Region}, d.cfg.DialContext)
	return syncing.NewContentSource(t, p.Endpoint, syncing.Peer{Service: p.Service, ForRegion: d.cfg.Region, OfRegion: p.Region, Version: d.spec.Version, Ring: d.spec.Ring}), nil
}

// Verified lists up to when the copies of each peer and type are verified.
func (v Verifier) Verified(ctx context.Context) ([]postgres.Verified, error) {
	return v.d.core.Verified(ctx)
}

// Residency counts what the database holds. regions are those whose Deployments count as owners.
func (v Verifier) Residency(ctx context.Context) (rows []postgres.Residency, regions []string, err error) {
	for _, p := range v.d.cfg.Registry.View().DeploymentsOf(v.d.cfg.Service) {
		regions = append(regions, p.Region)
	}
	slices.Sort(regions)
	rows, err = v.d.core.ResidencyReport(ctx, regions)
	return rows, regions, err
}

// verifyCopies is the part of Manage that verifies all copies again and again.
func (d *Deployment) verifyCopies(ctx context.Context) error {
	if d.cfg.VerifyInterval < 0 {
		return nil
	}
	b := verify.Background{
		Ledger: d.core, Peers: func() []string { return d.copied(ctx) }, Verify: d.Verifier().Verify, Interval: cmp.Or(d.cfg.VerifyInterval, DefaultVerifyInterval), Logger: d.log,
		Metrics: prometheus.WrapRegistererWith(prometheus.Labels{"db_service": d.cfg.Service, "target_region": d.cfg.Region}, d.metrics),
	}
	return b.Run(ctx)
}

// copied are the peers whose initial copy is complete: before, there is nothing to verify.
func (d *Deployment) copied(ctx context.Context) (peers []string) {
	for _, p := range d.Verifier().Peers() {
		c, err := d.core.LoadCursor(ctx, d.cfg.Service, p, feed.Range{From: 0, To: int32(d.spec.Ring)})
		if err == nil && !c.IsZero() {
			peers = append(peers, p)
		}
	}
	return peers
}

// DefaultVerifyInterval is the time between two verifications of the same copies.
const DefaultVerifyInterval = time.Hour
