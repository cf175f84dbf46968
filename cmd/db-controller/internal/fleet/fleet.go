// Package fleet keeps the Deployments of one region running that the registry declares.
//
//	fleet.go    follows the topology: which Deployments should run, with what
//	member.go   one Deployment: credentials, open, run, again after a failure
//	ops.go      health, status and metrics of all of them, for the operator
//	metrics.go  metrics of the process, and of which Deployments run
//	status.go   what the Kubernetes controllers write into the status
//	cleanup.go  what they ask for when a Deployment is deleted with its data
//
// A Deployment that is new starts, one that is gone stops, and a change that needs it (endpoint, database, TLS, version, ring) restarts that one
// alone. A Deployment whose secrets are missing or whose database does not answer is tried again for ever, and delays no other.
package fleet

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/registry"
)

// Config says which Deployments to run, and how.
type Config struct {
	// Region whose Deployments run here.
	Region string
	// Services narrows them; empty is all.
	Services []string
	// Registry declares them.
	Registry *registry.Registry
	// Secrets has their connection strings and certificates.
	Secrets registry.Secrets
	// Template is the configuration of each, without Key, Registry, DSN, CacheURL, SearchURL, TLS and Logger.
	Template deployment.Config
	// Parts returns what runs of each Deployment, besides what every process of one needs.
	Parts func(*deployment.Deployment) ([]func(context.Context) error, error)
	// Manages says that Parts has the part that copies: the status then counts its shards.
	Manages bool
	// Reread is how often secrets are read again: there is no event for them. Default 10 s.
	Reread time.Duration
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Fleet is the running Deployments of a region. Its methods may be called from any goroutine.
type Fleet struct {
	cfg Config
	log *slog.Logger

	failed chan error // why the process must end; capacity 1

	mu      sync.Mutex
	members map[registry.Key]*member
}

// New returns a Fleet that runs nothing yet.
func New(cfg Config) *Fleet {
	cfg.Reread = cmp.Or(cfg.Reread, 10*time.Second)
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default())
	return &Fleet{cfg: cfg, log: cfg.Logger, failed: make(chan error, 1), members: map[registry.Key]*member{}}
}

// Run runs the Deployments until ctx is done, and returns after all of them have ended; with an error, at once, when something that had to stop has not: the process must
// end then (O3). It may be called once.
func (f *Fleet) Run(ctx context.Context) error {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var running sync.WaitGroup
		defer running.Wait()
		for range f.cfg.Registry.Subscribe(ctx) {
			f.reconcile(ctx, running.Go)
		}
	}()
	select {
	case <-ended:
	case err := <-f.failed:
		return err
	}
	select {
	case err := <-f.failed: // it was the reason that the members could end
		return err
	default:
		return nil
	}
}

// fatal makes Run return err.
func (f *Fleet) fatal(err error) {
	select {
	case f.failed <- err:
	default:
	}
}

// reconcile makes the members what the topology asks for.
func (f *Fleet) reconcile(ctx context.Context, start func(func())) {
	wanted := map[registry.Key]registry.Deployment{}
	for _, d := range f.cfg.Registry.View().Deployments() {
		if d.Region == f.cfg.Region && (len(f.cfg.Services) == 0 || slices.Contains(f.cfg.Services, d.Service)) {
			wanted[d.Key] = d
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, m := range f.members {
		if _, ok := wanted[key]; !ok {
			f.log.InfoContext(ctx, "Deployment is no longer declared here: stopping it", "deployment", key.String())
			m.cancel()
			delete(f.members, key)
		}
	}
	for key, d := range wanted {
		old := f.members[key]
		if old != nil && needsOf(old.spec) == needsOf(d) {
			continue
		}
		m := newMember(ctx, f, d)
		if old != nil {
			f.log.InfoContext(ctx, "Deployment has changed: restarting it", "deployment", key.String())
			old.cancel()
		}
		f.members[key] = m
		start(func() {
			defer close(m.done)
			defer m.cancel()
			if old != nil {
				<-old.done // two of one Deployment would fight over its ports
			}
			m.run()
		})
	}
}

// needs is what of a Deployment cannot change while it runs. Everything else is read from the registry when it is needed.
type needs struct {
	endpoint, version, trustDomain string
	ring                           int
	tls, database, cache, search   registry.SecretRef
	searchType                     v1alpha1.SearchStoreType
}

func needsOf(d registry.Deployment) needs {
	return needs{d.Endpoint, d.Version, d.TrustDomain, d.Ring, d.TLS, d.Database, d.Cache, d.Search, d.SearchType}
}

// all returns the members, ordered by service.
func (f *Fleet) all() []*member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.SortedFunc(maps.Values(f.members), func(a, b *member) int { return a.spec.Key.Compare(b.spec.Key) })
}

func (f *Fleet) member(key registry.Key) *member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.members[key]
}

// Deployment returns an open Deployment, or nil.
func (f *Fleet) Deployment(service string) *deployment.Deployment {
	if m := f.member(registry.Key{Service: service, Region: f.cfg.Region}); m != nil {
		d, _ := m.state()
		return d
	}
	return nil
}
