// Package policy knows which MultiRegionPolicy governs a name.
//
// A resource is governed by the nearest ancestor in its name that is a policy holder, never by itself; a holder without a policy leaves it
// to the next one above; without any holder the service's own policy decides (spec 2.5, 2.11). Policies are read once and then kept: the hot
// path does no I/O. The change feed forgets those that change, and a writer of this process forgets at once what it has written.
package policy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// readGap spares the database: policies change rarely, everything else often.
const readGap = 100 * time.Millisecond

// maxKept bounds the memory; beyond it everything is read again.
const maxKept = 100_000

// Cache finds governing policies. It is safe for concurrent use.
type Cache struct {
	version func() *descriptor.Version
	reader  store.Reader
	log     *slog.Logger

	mu   sync.RWMutex
	kept map[string]*descriptor.Policy // by holder; nil: the holder has no policy of its own
	gen  int                           // raised by every Forget: what was read before it must not be kept
}

// New returns an empty cache. version is the schema in force; reader finds the policy holders, owned or copied.
func New(version func() *descriptor.Version, reader store.Reader, log *slog.Logger) *Cache {
	return &Cache{version: version, reader: reader, log: log, kept: map[string]*descriptor.Policy{}}
}

// MissingHolderError means that the policy holder above a name does not exist here, so that nothing says where the name belongs.
type MissingHolderError struct{ Name, Holder string }

// Error says what to do.
func (e *MissingHolderError) Error() string {
	return fmt.Sprintf("%s: its policy holder %s does not exist: create that first", e.Name, e.Holder)
}

// Of returns the policy that governs n, nil if there is none, and the holder that has it, empty if it is the service's. pending holds the
// bodies of holders that the caller is about to write. The error is a MissingHolderError, or the reader's.
func (c *Cache) Of(ctx context.Context, n descriptor.Name, pending map[string][]byte) (p *descriptor.Policy, holder string, err error) {
	version := c.version()
	for holder = n.HolderName(); holder != ""; {
		h, err := version.ParseName(holder)
		if err != nil {
			return nil, "", fmt.Errorf("policy holder of %s: %w", n.Full, err)
		}
		if body, ok := pending[holder]; ok {
			p, _ = h.Type.PolicyOf(body) // its faults are reported where the body is validated
		} else if p, err = c.of(ctx, h); store.CodeOf(err) == store.NotFound {
			return nil, "", &MissingHolderError{n.Full, holder}
		} else if err != nil {
			return nil, "", fmt.Errorf("policy holder of %s: %w", n.Full, err)
		}
		if p != nil {
			return p, holder, nil
		}
		holder = h.HolderName()
	}
	return version.Service.Policy, "", nil
}

func (c *Cache) of(ctx context.Context, h descriptor.Name) (*descriptor.Policy, error) {
	c.mu.RLock()
	p, ok := c.kept[h.Full]
	gen := c.gen
	c.mu.RUnlock()
	if ok {
		return p, nil
	}
	r, err := c.reader.Get(ctx, h.Full)
	if err != nil {
		return nil, err
	}
	p, violations := h.Type.PolicyOf(r.Body)
	if len(violations) > 0 {
		return nil, store.Errorf(store.FailedPrecondition, h.Full, "its policy is invalid: %v", violations)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if gen == c.gen {
		if len(c.kept) >= maxKept {
			clear(c.kept)
		}
		c.kept[h.Full] = p
	}
	return p, nil
}

// Forget makes the next question about what holder governs read it again.
func (c *Cache) Forget(holder string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.kept, holder)
	c.gen++
}

func (c *Cache) forgetAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.kept)
	c.gen++
}

// Run forgets what changes in f, until ctx is done. It returns nil.
func (c *Cache) Run(ctx context.Context, f *feed.Feed) error {
	var g errgroup.Group
	for _, t := range c.version().Types {
		if t.IsPolicyHolder() {
			g.Go(func() error { return c.follow(ctx, f, t.Name) })
		}
	}
	return g.Wait()
}

func (c *Cache) follow(ctx context.Context, f *feed.Feed, typ string) error {
	for {
		err := c.followOnce(ctx, f, typ) // never nil
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // asked to stop
		case errors.Is(err, feed.ErrCursorLost):
			continue
		}
		c.log.WarnContext(ctx, "policies may be stale: the change feed cannot be read", "type", typ, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

func (c *Cache) followOnce(ctx context.Context, f *feed.Feed, typ string) error {
	cursor, _, err := f.Now(ctx)
	if err != nil {
		return err
	}
	c.forgetAll() // what was kept may have changed before that cursor
	return f.Follow(ctx, feed.Interest{Gap: readGap}, func(ctx context.Context) (bool, error) {
		r, err := f.ReadResources(ctx, cursor, feed.Selection{Type: typ}, func(r *store.Resource) error {
			c.Forget(r.Name)
			return nil
		})
		if err != nil {
			return false, err
		}
		cursor = r.Cursor
		return r.More, nil
	})
}
