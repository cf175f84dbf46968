package mixin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"unicode/utf8"

	"github.com/google/uuid"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/policy"
)

// Config of a Server. Zero limits mean their defaults.
type Config struct {
	// Service, Region and Version are what the server speaks for: one API version of one Deployment.
	Service, Region, Version string

	Topology Topology
	Core     Core
	// Store is the whole stack: ownees are changed and deleted like any resource.
	Store    store.Store
	Owners   Owners
	Policies Policies
	Changes  Changes
	// Holdings measures what is owned here, for other regions of the service. Nil: that is not served.
	Holdings Holdings
	// ServicePolicy is the policy of the service that is in force here, for other regions of the service; nil as long as there is none. Nil: that is not told.
	ServicePolicy func() *descriptor.Policy

	// MaxCalls and MaxStreams bound what one requester has in flight. Default 64 each.
	MaxCalls, MaxStreams int
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Server is the mixin of the local Deployment. It believes what a Call says of its requester: whoever serves it to others has checked that first.
type Server struct {
	cfg  Config
	self store.Location
	log  *slog.Logger

	mu   sync.Mutex
	open map[slot]int
}

var _ Peer = (*Server)(nil)

// slot is what a requester has a bounded number of.
type slot struct {
	requester store.Location
	stream    bool
}

// NewServer returns a server. The error is about cfg.
func NewServer(cfg Config) (*Server, error) {
	required := map[string]bool{
		"Service": cfg.Service != "", "Region": cfg.Region != "", "Version": cfg.Version != "", "Topology": cfg.Topology != nil, "Core": cfg.Core != nil,
		"Store": cfg.Store != nil, "Owners": cfg.Owners != nil, "Policies": cfg.Policies != nil, "Changes": cfg.Changes != nil,
	}
	for field, ok := range required {
		if !ok {
			return nil, fmt.Errorf("configure schema mixin: %s is required", field)
		}
	}
	cfg.MaxCalls = cmp.Or(cfg.MaxCalls, 64)
	cfg.MaxStreams = cmp.Or(cfg.MaxStreams, 64)
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Server{cfg: cfg, self: store.Location{Service: cfg.Service, Region: cfg.Region}, log: cfg.Logger, open: map[slot]int{}}, nil
}

// relation is what must be between the services of the requester and of ours.
type relation uint8

const (
	// importer: the requester imports us. It asks about our resources.
	importer relation = iota + 1
	// imported: we import the requester. It asks about our references to its resources.
	imported
	// anybody: owner references need no import.
	anybody
)

// begin admits a call of a requester; its end must be called.
func (s *Server) begin(c *v1.Call, want relation, stream bool) (requester store.Location, end func(), err error) {
	requester = LocationOf(c.GetRequester())
	if err := s.admit(c, want); err != nil {
		return requester, nil, err
	}
	at, limit := slot{requester, stream}, s.cfg.MaxCalls
	if stream {
		limit = s.cfg.MaxStreams
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[at] >= limit {
		return requester, nil, &Refusal{store.Errorf(store.Unavailable, "", "%s has %d calls in flight here already: repeat later", requester, limit), ReasonTooManyCalls, nil}
	}
	s.open[at]++
	return requester, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.open[at]--; s.open[at] == 0 {
			delete(s.open, at)
		}
	}, nil
}

// admit says whether the requester may ask us.
func (s *Server) admit(c *v1.Call, want relation) error {
	requester := LocationOf(c.GetRequester())
	if callee := LocationOf(c.GetCallee()); callee != s.self {
		return refuse(ReasonWrongPeer, nil, "", "this is %s, the caller means %s", s.self, callee)
	}
	view := s.cfg.Topology.View()
	d, known := view.Deployment(keyOf(requester))
	if !known || d.Disabled && requester != s.self {
		return refuse(ReasonUnknownPeer, nil, "", "Deployment %s is not declared, or is disabled: it has nothing to ask here", requester)
	}
	if requester.Service == s.cfg.Service {
		return nil
	}
	switch {
	case want == importer && spelledBy(view, requester.Service, d.Version, s.cfg.Service) == "":
		return refuse(ReasonNotImported, nil, "", "version %s of %s does not import %s: add it to the imports", d.Version, requester.Service, s.cfg.Service)
	case want == imported && spelledBy(view, s.cfg.Service, s.cfg.Version, requester.Service) == "":
		return refuse(ReasonNotImported, nil, "", "version %s of %s does not import %s: nothing here can refer to it", s.cfg.Version, s.cfg.Service, requester.Service)
	}
	return nil
}

// version is the schema that the server runs with.
func (s *Server) version() (*descriptor.Version, error) {
	if service, ok := s.cfg.Topology.View().Service(s.cfg.Service); ok {
		if v := service.Version(s.cfg.Version); v != nil {
			return v, nil
		}
	}
	return nil, store.Errorf(store.FailedPrecondition, "", "version %s of %s is not declared: apply its ServiceDescriptor", s.cfg.Version, s.cfg.Service)
}

// understand returns our own version, and the one in which the names of a call are spelled.
func (s *Server) understand(version string) (own, spelled *descriptor.Version, err error) {
	if own, err = s.version(); err != nil {
		return nil, nil, err
	}
	if spelled = own.Service.Version(version); spelled == nil {
		return nil, nil, s.mismatch("version %q of %s is not known here", version, s.cfg.Service)
	}
	return own, spelled, nil
}

// speaks checks that a requester spells its names as our references to them do.
func (s *Server) speaks(requester store.Location, version string) error {
	if ours := spelledBy(s.cfg.Topology.View(), s.cfg.Service, s.cfg.Version, requester.Service); version != ours {
		return s.mismatch("version %q of %s is not used here: %s %s uses version %q", version, requester.Service, s.cfg.Service, s.cfg.Version, ours)
	}
	return nil
}

// mismatch makes the caller look into the registry again (X37).
func (s *Server) mismatch(format string, args ...any) error {
	return refuse(ReasonVersionMismatch, map[string]string{MetadataVersion: s.cfg.Version}, "", format+": look into the registry again and repeat", args...)
}

// ours translates a name into our version. It reports false if the text is no name in version from, or ours cannot express it.
func (s *Server) ours(ctx context.Context, own, from *descriptor.Version, text string) (descriptor.Name, bool, error) {
	n, err := from.ParseName(text)
	if err != nil {
		return n, false, nil //nolint:nilerr // that it is no name is the answer
	}
	if own == from {
		return n, true, nil
	}
	region, ok := n.Region()
	if !ok {
		region = s.cfg.Region
	}
	guess, ok := n.Translate(own, region)
	if !ok {
		return guess, false, nil
	}
	// What a name without a region means, the policy above it says.
	p, _, err := s.cfg.Policies.Of(ctx, guess, nil)
	if _, missing := errors.AsType[*policy.MissingHolderError](err); missing {
		return guess, true, nil // of what the holder left behind
	}
	if err != nil {
		return guess, false, err
	}
	if p != nil {
		region = p.DefaultControlRegion()
	}
	n, ok = n.Translate(own, region)
	return n, ok, nil
}

// local is the Location by which our own references know a Deployment.
func (s *Server) local(at store.Location) store.Location {
	if at == s.self {
		return store.Location{}
	}
	return at
}

// foreign refuses calls of a Deployment to itself where only others have a say.
func (s *Server) foreign(requester store.Location) error {
	if requester == s.self {
		return invalid("call.requester", "is the callee: references inside of one Deployment need nobody's permission")
	}
	return nil
}

// Checks of what comes in. Whatever passes can be stored as text.
func checkName(field, name string) error {
	if name == "" || !storable(name) {
		return invalid(field, "is not a name: want 1 to %d bytes of UTF-8 without NUL", descriptor.MaxNameBytes)
	}
	return nil
}

func storable(s string) bool {
	if len(s) > descriptor.MaxNameBytes || !utf8.ValidString(s) {
		return false
	}
	for i := range len(s) {
		if s[i] == 0 {
			return false
		}
	}
	return true
}

func checkCount(field string, n, least int) error {
	if n < least || n > MaxNames {
		return invalid(field, "has %d entries, want %d to %d", n, least, MaxNames)
	}
	return nil
}

func checkUUID(field, s string) error {
	if len(s) != 36 || uuid.Validate(s) != nil {
		return invalid(field, "%.64q is not a UUID", s)
	}
	return nil
}
