package deployment

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/search"
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

// Peers are the other regions of the service that are in use and, if there is one, the own search store (verify.SearchPeer).
func (v Verifier) Peers() []string {
	peers := v.regions()
	if v.d.search != nil {
		peers = append(peers, verify.SearchPeer)
	}
	return peers
}

func (v Verifier) regions() (peers []string) {
	for _, p := range v.d.cfg.Registry.View().DeploymentsOf(v.d.cfg.Service) {
		if p.Region != v.d.cfg.Region && !p.Disabled {
			peers = append(peers, p.Region)
		}
	}
	slices.Sort(peers)
	return peers
}

// Verify runs a pass over the copies of a peer or over the search store, or goes on with one, as verify.Run. What a finished pass has proved is written down.
func (v Verifier) Verify(ctx context.Context, peer string, opt verify.Options, from verify.State, report func(verify.Progress) error) (verify.State, error) {
	d := v.d
	if peer == verify.SearchPeer && d.search != nil {
		return v.verifySearch(ctx, opt, from, report)
	}
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
		types = d.types()
	}
	return state, verify.Note(ctx, d.core, peer, state, types)
}

// verifySearch compares the search store with the database.
func (v Verifier) verifySearch(ctx context.Context, opt verify.Options, from verify.State, report func(verify.Progress) error) (verify.State, error) {
	d := v.d
	documents := d.documents()
	state, err := verify.Run(ctx, &verify.Rows{Store: d.core, Searched: documents.Searched}, documents, opt, from, report)
	if err != nil || !state.Finished {
		return state, err
	}
	var types []string
	for t := range documents.Searched {
		if len(opt.Types) == 0 || slices.Contains(opt.Types, t) {
			types = append(types, t)
		}
	}
	return state, verify.Note(ctx, d.core, verify.SearchPeer, state, types)
}

// documents are those of the search store, under the schema in force.
func (d *Deployment) documents() *verify.Documents {
	version := d.version()
	searched := search.TypesOf(version)
	return &verify.Documents{Index: d.search, Searched: searched, Ring: d.spec.Ring, Project: func(ctx context.Context, names []string) (docs []search.Document, err error) {
		err = d.core.SearchNames(ctx, names, searched, func(r *store.Resource) error {
			doc, err := search.DocumentOf(version.Type(r.Type), r)
			if err != nil {
				d.log.WarnContext(ctx, "a resource is found by its name alone", "name", r.Name, "error", err)
			}
			docs = append(docs, doc)
			return nil
		})
		return docs, err
	}}
}

// types are the names of the resource types of the schema in force.
func (d *Deployment) types() (names []string) {
	for _, t := range d.version().Types {
		names = append(names, t.Name)
	}
	return names
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

// Residency counts what the database holds, and what the search store holds, if there is one: as owner verify.SearchPeer. regions are those whose Deployments count as owners.
func (v Verifier) Residency(ctx context.Context) (rows []postgres.Residency, regions []string, err error) {
	for _, p := range v.d.cfg.Registry.View().DeploymentsOf(v.d.cfg.Service) {
		regions = append(regions, p.Region)
	}
	slices.Sort(regions)
	if rows, err = v.d.core.ResidencyReport(ctx, regions); err != nil || v.d.search == nil {
		return rows, regions, err
	}
	documents := v.d.documents()
	residents, err := documents.Residents(ctx, &verify.Rows{Store: v.d.core, Searched: documents.Searched}, residencyGrace)
	for _, r := range residents {
		if r.WithoutRow > 0 {
			rows = append(rows, postgres.Residency{Owner: verify.SearchPeer, Type: r.Type, Reason: "a document of the search store has no row in the database", Rows: r.WithoutRow, Example: r.Example})
		}
		if n := r.Documents - r.WithoutRow; n > 0 {
			rows = append(rows, postgres.Residency{Owner: verify.SearchPeer, Type: r.Type, Rows: n, Example: r.First})
		}
	}
	return rows, regions, err
}

// residencyGrace is how long a document may outlive its row: the search store follows the database within moments.
const residencyGrace = 2 * time.Second

// verifyCopies is the part of Manage that verifies all copies again and again.
func (d *Deployment) verifyCopies(ctx context.Context) error {
	if d.cfg.VerifyInterval < 0 {
		return nil
	}
	b := verify.Background{
		Ledger: d.core, Types: d.types, Peers: func() []string { return d.copied(ctx) }, Verify: d.Verifier().Verify, Interval: cmp.Or(d.cfg.VerifyInterval, DefaultVerifyInterval), Logger: d.log,
		Metrics: d.registerer(),
	}
	return b.Run(ctx)
}

// copied are the peers whose initial copy is complete, and the search store once it is filled: before, there is nothing to verify.
func (d *Deployment) copied(ctx context.Context) (peers []string) {
	for _, p := range d.Verifier().regions() {
		c, err := d.core.LoadCursor(ctx, d.cfg.Service, p, feed.Range{From: 0, To: int32(d.spec.Ring)})
		if err == nil && !c.IsZero() {
			peers = append(peers, p)
		}
	}
	if d.search != nil && d.documents().Complete(ctx) {
		peers = append(peers, verify.SearchPeer)
	}
	return peers
}

// DefaultVerifyInterval is the time between two verifications of the same copies.
const DefaultVerifyInterval = time.Hour
