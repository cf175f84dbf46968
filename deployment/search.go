package deployment

import (
	"context"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/apiserver"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/search"
	searchpostgres "github.com/dbcontroller/db-controller/search/postgres"
	searchredis "github.com/dbcontroller/db-controller/search/redis"
	"github.com/dbcontroller/db-controller/syncing"
)

// openSearch opens the search store, if there is one. One that is configured wrongly costs search alone: the Deployment runs without it. One that is away is filled
// when it is back.
func (d *Deployment) openSearch(ctx context.Context) {
	if d.cfg.SearchURL == "" {
		return
	}
	s, err := func() (search.Store, error) {
		switch kind := d.spec.SearchType; kind {
		case v1alpha1.SearchPostgres:
			return searchpostgres.Open(ctx, searchpostgres.Config{DSN: d.cfg.SearchURL, Service: d.cfg.Service, Region: d.cfg.Region, Version: d.spec.Version})
		case v1alpha1.SearchRedis:
			return searchredis.Open(searchredis.Config{
				URL: d.cfg.SearchURL, Service: d.cfg.Service, Region: d.cfg.Region, Version: d.spec.Version, Ring: d.spec.Ring, Declared: d.version, Logger: d.log,
			})
		default:
			return nil, fmt.Errorf("spec.search.type %q is no search store", kind)
		}
	}()
	if err != nil {
		d.log.ErrorContext(ctx, "there is no search: spec.search is wrong", "error", err)
		return
	}
	d.search = s
}

// searcher is what the API server asks; nil without a search store.
func (d *Deployment) searcher() apiserver.Searcher {
	if d.search == nil {
		return nil
	}
	return d.search
}

// searchKinds are the nodes that fill the search store. They share nothing with those that copy, so that a slow store delays no copy.
func (d *Deployment) searchKinds() []nodemanager.Kind {
	if d.search == nil {
		return nil
	}
	return []nodemanager.Kind{kind(d, kindSearch, d.newSearchNode, func(n *syncing.LocalNode) nodeReport {
		return nodeReport{Peers: []syncing.PeerStatus{n.Status()}, Drift: n.Drift()}
	})}
}

func (d *Deployment) newSearchNode(_ string, metrics prometheus.Registerer) (*syncing.LocalNode, error) {
	return syncing.NewLocalNode(syncing.LocalConfig{
		Service: d.cfg.Service, Region: d.cfg.Region, Ring: d.spec.Ring, MaxShardsPerNode: d.cfg.MaxShardsPerNode,
		Source: d.core, Search: d.search, Schema: d.version, AuditInterval: d.cfg.AuditInterval, Metrics: metrics, Logger: d.log,
	})
}

// SearchStatus says how well the search store follows the database, and what its audits have found.
type SearchStatus struct {
	Store   v1alpha1.SearchStoreType `json:"store"`
	Syncing syncing.PeerStatus       `json:"syncing"`
	// Drift has the differences that were found last; all have been repaired.
	Drift []syncing.Drift `json:"drift,omitempty"`
}

// Search returns the state of the search store, whichever replica fills it; nil where none is filled.
func (d *Deployment) Search() *SearchStatus {
	all, _ := d.nodes.reports(kindSearch)
	merged := mergePeers(d.spec.Ring, all)
	if len(merged) == 0 {
		return nil
	}
	s := &SearchStatus{Store: d.spec.SearchType, Syncing: merged[0]}
	for _, n := range all {
		s.Drift = append(s.Drift, n.Drift...)
	}
	return s
}
