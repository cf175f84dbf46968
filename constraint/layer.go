package constraint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/mixin"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// LayerCore is what the layer asks of the local database, besides the Store below it: postgres.Store.
type LayerCore interface {
	Outgoing(ctx context.Context, names []string) (map[string][]store.Reference, store.Mark, error)
	Closure(ctx context.Context, roots []string, limit, depth, async int) (*store.Closure, error)
	BeginAttempt(ctx context.Context, names []string) (map[string]store.Question, error)
	Suspects(ctx context.Context, candidates []store.Location) ([]store.Location, error)
}

// LayerPeers is how the layer reaches other Deployments: mixin.Peers.
type LayerPeers interface {
	Peer(at store.Location) (mixin.Peer, error)
	// Call is the head of a call to a Deployment whose resources we refer to.
	Call(at store.Location) (*v1.Call, error)
	// SpellFor returns a name of ours as a Deployment that may refer to it spells it, and in which version; false if it cannot express the name.
	SpellFor(at store.Location, name string) (version, spelled string, ok bool)
	// Importers are the other Deployments that may refer to our resources.
	Importers() []store.Location
}

// LayerConfig configures Layer. What has no default is required.
type LayerConfig struct {
	// Self is the Deployment whose store this is.
	Self store.Location
	// Version is the schema in force.
	Version func() *descriptor.Version
	// View is the topology: which Deployments there are, and the schemas of the services that we import.
	View func() *registry.View
	// Owner returns the region that owns a name of our own service, as region.Store.Owner does. batch are the writes of the same transaction.
	Owner func(ctx context.Context, n descriptor.Name, batch []store.Write) (region string, err error)
	Core  LayerCore
	Peers LayerPeers

	// TTL is how long a target is protected while a save that refers to it is under way. Default 5 min.
	TTL time.Duration
	// CallTimeout is the deadline of one call to another Deployment. Default 5 s.
	CallTimeout time.Duration
	// ClosureLimit and ClosureDepth bound what one deletion takes along in its transaction: rows (default 1000, at most store.MaxClosure, of which at most store.MaxBatch
	// may be rows with fields to clear) and hops (default 16). A larger deletion is refused (spec 8.27).
	ClosureLimit, ClosureDepth int
	// Now is the clock by which elapsed time is measured. Default time.Now.
	Now func() time.Time
	// Registerer of the metrics; nil leaves them unregistered.
	Registerer prometheus.Registerer
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Store is the layer of the Store that checks references (spec 4.1 to 4.3; F37). It is safe for concurrent use.
type Store struct {
	next    store.Store
	cfg     LayerConfig
	log     *slog.Logger
	places  *places
	metrics layerMetrics
}

// Layer puts the layer on top of next, which keeps what it is told and checks it again in the write's transaction: the core. The region layer
// belongs on top, because a write must be known to be ours first.
//
//	region.Layer(constraint.Layer(core, cfg), ...)
func Layer(next store.Store, cfg LayerConfig) *Store {
	cfg.TTL = cmp.Or(cfg.TTL, mixin.DefaultTTL)
	cfg.CallTimeout = cmp.Or(cfg.CallTimeout, mixin.DefaultTimeout)
	cfg.ClosureLimit = min(cmp.Or(cfg.ClosureLimit, 1000), store.MaxClosure)
	cfg.ClosureDepth = cmp.Or(cfg.ClosureDepth, 16)
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default())
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Store{next: next, cfg: cfg, log: cfg.Logger, places: newPlaces(cfg), metrics: newLayerMetrics(cfg.Registerer, cfg.Self)}
}

// Get implements store.Reader.
func (s *Store) Get(ctx context.Context, name string) (*store.Resource, error) {
	return s.next.Get(ctx, name)
}

// BatchGet implements store.Reader.
func (s *Store) BatchGet(ctx context.Context, names []string) ([]*store.Resource, error) {
	return s.next.BatchGet(ctx, names)
}

// List implements store.Reader.
func (s *Store) List(ctx context.Context, q store.Query) (*store.Page, error) {
	return s.next.List(ctx, q)
}

// maxTries bounds how often a write is planned again because something that it depends on was changed meanwhile: about ten seconds with the
// pauses between, besides the calls to others.
const maxTries = 64

// BatchWrite implements store.Writer. The consequences of a deletion in this database, cascades and unset fields, join its transaction, even those that
// belong to another policy holder: that a transaction writes one holder's resources (I41) is about what callers write.
func (s *Store) BatchWrite(ctx context.Context, writes []store.Write) ([]store.Result, error) {
	if len(writes) == 0 || len(writes) > store.MaxBatch {
		return s.next.BatchWrite(ctx, writes) // refused there
	}
	t, err := s.parse(writes)
	if err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		results, again, err := s.try(ctx, t, try)
		if err == nil {
			return results[:len(writes)], nil
		}
		if !again {
			return nil, err
		}
		if try == maxTries {
			s.log.WarnContext(ctx, "a write was overtaken too often", "name", writes[0].Name, "writes", len(writes), "error", err)
			return nil, &store.Error{Code: store.Aborted, Name: writes[0].Name, Reason: "what it depends on is being changed all the time: repeat later", Cause: err}
		}
		if err := backOff(ctx, try); err != nil {
			return nil, fmt.Errorf("write %s: %w", writes[0].Name, err)
		}
	}
}

// transaction is one BatchWrite over all its tries.
type transaction struct {
	writes []store.Write
	names  []descriptor.Name // parallel to writes
	// id is the transaction's for other Deployments; empty until one must be told.
	id string
}

// constrained says whether the i-th write takes part in references at all (F56).
func (t *transaction) constrained(i int) bool { return !t.names[i].Type.OptOutConstraints }

func (s *Store) parse(writes []store.Write) (*transaction, error) {
	t := &transaction{writes: writes, names: make([]descriptor.Name, len(writes))}
	version := s.cfg.Version()
	for i, w := range writes {
		n, err := version.ParseName(w.Name)
		if err != nil {
			return nil, store.Invalid("name", err.Error())
		}
		t.names[i] = n
	}
	return t, nil
}

// txID returns the id of the transaction, the same in all tries: a later try replaces what an earlier one has left with others.
func (t *transaction) txID() (string, error) {
	if t.id == "" {
		id, err := uuid.NewRandom()
		if err != nil {
			return "", fmt.Errorf("make a transaction id: %w", err)
		}
		t.id = id.String()
	}
	return t.id, nil
}

// try plans the transaction and hands it down once. again says that the error is no refusal: what was read has changed.
func (s *Store) try(ctx context.Context, t *transaction, try int) (results []store.Result, again bool, err error) {
	whole, outdated, err := s.unmask(ctx, t)
	if err != nil {
		return nil, false, err
	}
	saves, err := s.saves(t, whole)
	if err != nil {
		return nil, false, err
	}
	gone, err := s.planDeletes(ctx, t, whole, saves)
	if err != nil {
		return nil, errors.Is(err, store.ErrChanged), err
	}
	unsets, err := s.planUnsets(ctx, gone)
	if err != nil {
		return nil, false, err
	}
	home, err := s.locate(ctx, slices.Concat(saves, unsets), whole)
	if err != nil {
		return nil, false, err
	}
	if err := gone.check(saves); err != nil {
		return nil, false, s.refused(ctx, err)
	}
	if err := s.ask(ctx, gone); err != nil {
		return nil, errors.Is(err, store.ErrChanged), s.refused(ctx, err)
	}
	given, err := s.establish(ctx, t, slices.Concat(saves, unsets), home, try)
	if err != nil {
		return nil, errors.Is(err, store.ErrChanged), err
	}
	all := slices.Clone(whole) // the next try begins with what the caller has sent
	for _, v := range saves {
		all[v.place].Meta = v.write.Meta
		all[v.place].Constraint = v.constraint()
	}
	all = gone.apply(all)
	for _, v := range unsets {
		v.write.Constraint = v.constraint()
		v.write.Constraint.Closure = true
		all = append(all, v.write)
	}
	if given.late(s.cfg.Now()) {
		return nil, true, &store.Error{Code: store.Aborted, Name: whole[0].Name, Reason: "the permissions to refer to others have grown old: repeat", Cause: store.ErrChanged}
	}
	results, err = s.next.BatchWrite(ctx, all)
	if err != nil {
		return nil, errors.Is(err, store.ErrChanged) || outdated(err), err
	}
	return results, false, nil
}

// unmask makes the constrained writes whole, for only then their references are known. The others are left to the core.
func (s *Store) unmask(ctx context.Context, t *transaction) (whole []store.Write, outdated func(error) bool, err error) {
	var mine []store.Write
	var places []int
	for i, w := range t.writes {
		if t.constrained(i) && w.Op != store.Delete && !store.MaskAll(w.Mask) {
			mine, places = append(mine, w), append(places, i)
		}
	}
	if mine == nil {
		return t.writes, func(error) bool { return false }, nil
	}
	if mine, outdated, err = store.Unmask(ctx, s.next, mine); err != nil {
		return nil, nil, err
	}
	whole = slices.Clone(t.writes)
	for i, w := range mine {
		whole[places[i]] = w
	}
	return whole, outdated, nil
}

// backOff waits before the next try, longer each time, with full jitter: two transactions that overtake each other must not do so for ever.
func backOff(ctx context.Context, tries int) error {
	limit := min(time.Millisecond<<min(tries-1, 10), 320*time.Millisecond)
	timer := time.NewTimer(rand.N(limit))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
