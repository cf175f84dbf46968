package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/registry"
)

// maxRetry bounds the pause between two attempts to run a Deployment.
const maxRetry = 10 * time.Second

// errDSNChanged restarts a Deployment with its new connection strings.
var errDSNChanged = errors.New("a connection string has changed")

// member is one Deployment that should run.
type member struct {
	fleet  *Fleet
	spec   registry.Deployment
	ctx    context.Context // ends the member
	cancel context.CancelFunc
	done   chan struct{}

	mu   sync.Mutex
	open *deployment.Deployment // nil while it is not running
	err  error                  // why it does not run
}

func newMember(ctx context.Context, f *Fleet, d registry.Deployment) *member {
	ctx, cancel := context.WithCancel(ctx)
	return &member{fleet: f, spec: d, ctx: ctx, cancel: cancel, done: make(chan struct{})}
}

// state returns the open Deployment, or why there is none.
func (m *member) state() (*deployment.Deployment, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.open, m.err
}

func (m *member) set(d *deployment.Deployment, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open, m.err = d, err
}

// run keeps the Deployment running until the member is cancelled.
func (m *member) run() {
	log := m.fleet.log.With("deployment", m.spec.Key.String())
	for pause := time.Second; ; pause = min(2*pause, maxRetry) {
		started := time.Now()
		err := m.runOnce()
		if errors.Is(err, errDSNChanged) {
			m.set(nil, nil) // it is being opened again, which is no fault
		} else {
			m.set(nil, err)
		}
		if errors.Is(err, nodemanager.ErrNotStopped) {
			m.fleet.fatal(err)
			return
		}
		if m.ctx.Err() != nil {
			return
		}
		if time.Since(started) > time.Minute {
			pause = time.Second // it did run
		}
		if errors.Is(err, errDSNChanged) {
			log.InfoContext(m.ctx, "restarting", "cause", err)
			continue
		}
		log.WarnContext(m.ctx, "Deployment does not run", "error", err, "retry", pause)
		select {
		case <-m.ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// runOnce opens the Deployment and runs it until something fails.
func (m *member) runOnce() (err error) {
	f := m.fleet
	dsn, err := f.connection(m.ctx, "database", m.spec.Database)
	if err != nil {
		return err
	}
	if dsn == nil {
		return errors.New("spec.database is not set: name the Secret with the connection string in spec.database.secretRef")
	}
	cache, err := f.connection(m.ctx, "cache", m.spec.Cache)
	if err != nil {
		f.log.WarnContext(m.ctx, "Deployment runs without its cache", "deployment", m.spec.Key.String(), "error", err)
	}
	search, err := f.connection(m.ctx, "search", m.spec.Search)
	if err != nil {
		f.log.WarnContext(m.ctx, "Deployment runs without search", "deployment", m.spec.Key.String(), "error", err)
	}
	cfg := f.cfg.Template
	cfg.Key, cfg.Registry, cfg.Logger = m.spec.Key, f.cfg.Registry, f.log
	cfg.DSN, cfg.CacheURL, cfg.SearchURL = string(dsn), string(cache), string(search)
	if m.spec.TLS.Name != "" {
		if cfg.TLS, err = newTLS(m.ctx, f.cfg.Secrets, m.spec.TLS, f.cfg.Reread); err != nil {
			return err
		}
	}
	d, err := deployment.Open(m.ctx, cfg)
	if err != nil {
		return err
	}
	defer func() {
		if !errors.Is(err, nodemanager.ErrNotStopped) { // that node may hold its connections for ever
			d.Close()
		}
	}()
	parts, err := f.cfg.Parts(d)
	if err != nil {
		return err
	}
	m.set(d, nil)
	f.log.InfoContext(m.ctx, "Deployment runs", "deployment", m.spec.Key.String(), "version", m.spec.Version)
	return d.Run(m.ctx, append(parts, func(ctx context.Context) error { return m.watchSecrets(ctx, dsn, cache, search) })...)
}

// connection returns the connection string that a field of the spec refers to, nil if it refers to none.
func (f *Fleet) connection(ctx context.Context, field string, ref registry.SecretRef) ([]byte, error) {
	if ref.Name == "" {
		return nil, nil
	}
	secret, err := f.cfg.Secrets.Get(ctx, ref.Namespace, ref.Name)
	if err != nil {
		return nil, fmt.Errorf("spec.%s.secretRef: %w", field, err)
	}
	if len(secret[ref.Key]) == 0 {
		return nil, fmt.Errorf("spec.%s.secretRef: secret %s has no key %q", field, ref.Name, ref.Key)
	}
	return bytes.TrimSpace(secret[ref.Key]), nil
}

// watchSecrets returns when a connection string has changed. One that cannot be read now does not stop what runs with the last one.
func (m *member) watchSecrets(ctx context.Context, dsn, cache, search []byte) error {
	tick := time.NewTicker(m.fleet.cfg.Reread)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if now, err := m.fleet.connection(m.ctx, "database", m.spec.Database); err == nil && !bytes.Equal(now, dsn) {
			return errDSNChanged
		}
		if now, err := m.fleet.connection(m.ctx, "cache", m.spec.Cache); err == nil && !bytes.Equal(now, cache) {
			return errDSNChanged
		}
		if now, err := m.fleet.connection(m.ctx, "search", m.spec.Search); err == nil && !bytes.Equal(now, search) {
			return errDSNChanged
		}
	}
}

// newTLS returns a source that follows a secret: it is read again when a handshake comes more than reread after the last reading. What
// cannot be read or does not fit together leaves the last good material in force.
func newTLS(ctx context.Context, secrets registry.Secrets, ref registry.SecretRef, reread time.Duration) (pki.Source, error) {
	read := func() (*pki.Material, error) {
		s, err := secrets.Get(ctx, ref.Namespace, ref.Name)
		if err != nil {
			return nil, fmt.Errorf("spec.tls.secretRef: %w", err)
		}
		material, err := pki.Parse(s[v1alpha1.TLSCertKey], s[v1alpha1.TLSKeyKey], s[v1alpha1.TLSCAKey])
		if err != nil {
			return nil, fmt.Errorf("spec.tls.secretRef: secret %s: %w", ref.Name, err)
		}
		return material, nil
	}
	last, err := read()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	at := time.Now()
	return func() (*pki.Material, error) {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(at) > reread {
			at = time.Now()
			if now, err := read(); err == nil {
				last = now
			}
		}
		return last, nil
	}, nil
}
