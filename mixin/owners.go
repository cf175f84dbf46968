package mixin

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
)

// Why an owner is not confirmed.
const (
	OwnerNotFound     = "NOT_FOUND"
	OwnerDeleting     = "DELETING"
	NoSchemaReference = "NO_SCHEMA_REFERENCE"
)

// checkOwner checks that the requester speaks for the owner: a Deployment names only resources of its own as owners.
func checkOwner(requester store.Location, kind string) error {
	if service, _, ok := strings.Cut(kind, "/"); !ok || service != requester.Service || !storable(kind) {
		return invalid("owner_kind", "%.64q is no type of %s, which asks", kind, requester.Service)
	}
	return nil
}

// spellings returns the distinct names of an owner.
func spellings(field string, list []*v1.Spelling) ([]string, error) {
	if err := checkCount(field, len(list), 1); err != nil {
		return nil, err
	}
	names := make([]string, len(list))
	for i, o := range list {
		if err := checkName(fmt.Sprintf("%s[%d].name", field, i), o.GetName()); err != nil {
			return nil, err
		}
		names[i] = o.GetName()
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// CheckIfHasMetaOwnee implements Peer (spec 3.5; F15).
func (s *Server) CheckIfHasMetaOwnee(ctx context.Context, req *v1.CheckIfHasMetaOwneeRequest) (*v1.CheckIfHasMetaOwneeResponse, error) {
	requester, end, err := s.begin(req.GetCall(), anybody, false)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := checkOwner(requester, req.GetOwnerKind()); err != nil {
		return nil, err
	}
	names, err := spellings("owner_names", req.GetOwnerNames())
	if err != nil {
		return nil, err
	}
	has, err := s.cfg.Core.CheckOwnee(ctx, req.GetOwnerKind(), requester, names)
	if err != nil {
		return nil, err
	}
	return &v1.CheckIfHasMetaOwneeResponse{HasOwnee: has}, nil
}

// ListMetaOwnees implements Peer (spec 3.9; F20).
func (s *Server) ListMetaOwnees(ctx context.Context, req *v1.ListMetaOwneesRequest) (*v1.ListMetaOwneesResponse, error) {
	requester, end, err := s.begin(req.GetCall(), anybody, false)
	if err != nil {
		return nil, err
	}
	defer end()
	own, err := s.version()
	if err != nil {
		return nil, err
	}
	if err := checkOwner(requester, req.GetOwnerKind()); err != nil {
		return nil, err
	}
	names, err := spellings("owner_names", req.GetOwnerNames())
	if err != nil {
		return nil, err
	}
	after, err := parsePageToken(req.GetPageToken())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(req.GetPageSize(), store.MaxPageSize)
	if err != nil {
		return nil, err
	}
	found, err := s.cfg.Core.Ownees(ctx, requester, names, after, size)
	if err != nil {
		return nil, err
	}
	res := &v1.ListMetaOwneesResponse{}
	if len(found) == 0 {
		return res, nil
	}
	if len(found) == size {
		res.NextPageToken = pageToken(found[size-1])
	}
	for chunk := range slices.Chunk(found, owneesRead) {
		resources, err := s.cfg.Store.BatchGet(ctx, chunk)
		if err != nil {
			return nil, err
		}
		for _, r := range resources {
			if r == nil {
				continue // gone since
			}
			n, err := own.ParseName(r.Name)
			if err != nil {
				return nil, fmt.Errorf("ownee: %w", err)
			}
			for _, o := range r.Meta.OwnerReferences {
				if owns(o, req.GetOwnerKind(), requester.Region, names) && (o.RequiresOwnerReference || !req.GetOnlyRequiringOwnerReference()) {
					res.Ownees = append(res.Ownees, &v1.MetaOwnee{Kind: n.Type.FullName, Ownee: &v1.Spelling{Version: own.Name, Name: r.Name}, Reference: wireOwner(o)})
				}
			}
		}
	}
	return res, nil
}

// owneesRead is how many ownees are in memory at once, with their bodies.
const owneesRead = 50

func wireOwner(o store.OwnerReference) *v1.OwnerReference {
	return &v1.OwnerReference{
		Kind: o.Kind, Version: o.Version, Name: o.Name, Region: o.Region,
		Controller: o.Controller, RequiresOwnerReference: o.RequiresOwnerReference, UnsetOnDelete: o.UnsetOnDelete,
	}
}

// owns says whether an owner reference is to one of these names, which are spellings of one resource.
func owns(o store.OwnerReference, kind, region string, names []string) bool {
	return o.Kind == kind && o.Region == region && slices.Contains(names, o.Name)
}

// ConfirmMetaOwner implements Peer (spec 3.6; F17). The location is recorded before the owner's references are read: an owner that drops the one that is
// required afterwards knows that it has an ownee to tell.
func (s *Server) ConfirmMetaOwner(ctx context.Context, req *v1.ConfirmMetaOwnerRequest) (*v1.ConfirmMetaOwnerResponse, error) {
	requester, end, err := s.begin(req.GetCall(), anybody, false)
	if err != nil {
		return nil, err
	}
	defer end()
	own, spelled, err := s.understand(req.GetOwner().GetVersion())
	if err != nil {
		return nil, err
	}
	if err := cmp.Or(checkName("owner.name", req.GetOwner().GetName()), checkName("ownee.name", req.GetOwnee().GetName())); err != nil {
		return nil, err
	}
	no := func(reason string) (*v1.ConfirmMetaOwnerResponse, error) {
		return &v1.ConfirmMetaOwnerResponse{Outcome: v1.ConfirmMetaOwnerResponse_OUTCOME_NOT_CONFIRMED, Reason: reason}, nil
	}
	n, ok, err := s.ours(ctx, own, spelled, req.GetOwner().GetName())
	if err != nil {
		return nil, err
	}
	if !ok || n.Type.FullName != req.GetOwnerKind() {
		return no(OwnerNotFound)
	}
	found, state, err := s.cfg.Core.AddOwnee(ctx, n.Full, requester)
	switch {
	case err != nil:
		return nil, err
	case !found || state == store.NoShadow:
		return no(OwnerNotFound)
	case state == store.ShadowDeleting:
		return no(OwnerDeleting)
	}
	if req.GetRequiresOwnerReference() {
		shadow, err := s.cfg.Core.Shadow(ctx, n.Full)
		switch {
		case store.CodeOf(err) == store.NotFound:
			return no(OwnerNotFound)
		case err != nil:
			return nil, err
		case shadow.State == store.ShadowDeleting:
			return no(OwnerDeleting)
		case !s.refersTo(shadow, requester, req.GetOwnee()):
			return no(NoSchemaReference)
		}
	}
	if spelled != own {
		return &v1.ConfirmMetaOwnerResponse{Outcome: v1.ConfirmMetaOwnerResponse_OUTCOME_VERSION_MISMATCH, Current: &v1.Spelling{Version: own.Name, Name: n.Full}}, nil
	}
	return &v1.ConfirmMetaOwnerResponse{Outcome: v1.ConfirmMetaOwnerResponse_OUTCOME_CONFIRMED}, nil
}

// refersTo says whether the owner has a schema reference to the ownee, which is spelled by its own Deployment.
func (s *Server) refersTo(owner *store.Shadow, at store.Location, ownee *v1.Spelling) bool {
	names := []string{ownee.GetName()}
	view := s.cfg.Topology.View()
	if service, ok := view.Service(at.Service); ok {
		from, to := service.Version(ownee.GetVersion()), service.Version(spelledBy(view, s.cfg.Service, s.cfg.Version, at.Service))
		if from != nil && to != nil {
			n, err := from.ParseName(ownee.GetName())
			if err != nil {
				return false
			}
			if n, ok = n.Translate(to, at.Region); !ok {
				return false
			}
			names = []string{n.Full}
		}
	}
	return slices.ContainsFunc(owner.References, func(r store.Reference) bool {
		return r.Kind == store.SchemaReference && r.At == s.local(at) && slices.Contains(names, r.Target)
	})
}

// UpgradeMetaOwnerVersion implements Peer (spec 3.7; F18).
func (s *Server) UpgradeMetaOwnerVersion(ctx context.Context, req *v1.UpgradeMetaOwnerVersionRequest) (*v1.UpgradeMetaOwnerVersionResponse, error) {
	from, to := req.GetFrom(), req.GetTo()
	name, end, err := s.beginOwnee(ctx, req.GetCall(), req.GetOwnee(), req.GetOwnerKind(), req.GetOwnerRegion())
	if err != nil {
		return nil, err
	}
	defer end()
	if err := cmp.Or(checkName("from.name", from.GetName()), checkName("to.name", to.GetName()), checkName("to.version", to.GetVersion())); err != nil {
		return nil, err
	}
	taken := false
	err = s.edit(ctx, name, func(r *store.Resource) (store.Write, bool) {
		var owners []store.OwnerReference
		upgraded := false
		for _, o := range r.Meta.OwnerReferences {
			if owns(o, req.GetOwnerKind(), req.GetOwnerRegion(), []string{from.GetName()}) && o.Version == from.GetVersion() {
				o.Version, o.Name = to.GetVersion(), to.GetName()
				upgraded = true
			}
			if i := slices.IndexFunc(owners, func(p store.OwnerReference) bool { return p.Name == o.Name }); i >= 0 {
				if taken = owners[i].Kind != o.Kind || owners[i].Region != o.Region; taken {
					return store.Write{}, false // nobody takes the place of another Deployment's owner
				}
				owners[i] = merge(owners[i], o) // both spellings were there
				continue
			}
			owners = append(owners, o)
		}
		return ownersOnly(owners), upgraded && !slices.Equal(owners, r.Meta.OwnerReferences)
	})
	if taken {
		err = invalid("to.name", "is the name of another owner of the resource")
	}
	if err != nil {
		return nil, err
	}
	return &v1.UpgradeMetaOwnerVersionResponse{}, nil
}

// merge makes one reference of two to the same owner (spec 2.4). It keeps what makes the ownee live longer.
func merge(a, b store.OwnerReference) store.OwnerReference {
	a.Controller = a.Controller || b.Controller
	a.RequiresOwnerReference = a.RequiresOwnerReference && b.RequiresOwnerReference
	a.UnsetOnDelete = a.UnsetOnDelete || b.UnsetOnDelete
	return a
}

// RemoveMetaOwnerReference implements Peer (spec 3.8; F19). With its last owner the ownee goes, unless that one was only to be unset. An ownee that cannot
// go yet keeps the reference and becomes a task.
func (s *Server) RemoveMetaOwnerReference(ctx context.Context, req *v1.RemoveMetaOwnerReferenceRequest) (*v1.RemoveMetaOwnerReferenceResponse, error) {
	name, end, err := s.beginOwnee(ctx, req.GetCall(), req.GetOwnee(), req.GetOwnerKind(), req.GetOwnerRegion())
	if err != nil {
		return nil, err
	}
	defer end()
	spelled, err := spellings("owner", req.GetOwner())
	if err != nil {
		return nil, err
	}
	removed, deleting := false, false
	err = s.edit(ctx, name, func(r *store.Resource) (store.Write, bool) {
		var left []store.OwnerReference
		unset := false
		for _, o := range r.Meta.OwnerReferences {
			if owns(o, req.GetOwnerKind(), req.GetOwnerRegion(), spelled) {
				unset = o.UnsetOnDelete // the last one decides
			} else {
				left = append(left, o)
			}
		}
		removed = len(left) < len(r.Meta.OwnerReferences)
		if deleting = removed && len(left) == 0 && !unset; deleting {
			return store.Write{Op: store.Delete, AllowMissing: true}, true
		}
		return ownersOnly(left), removed
	})
	if deleting && store.CodeOf(err) == store.FailedPrecondition { // something blocks it
		err = s.cfg.Core.RaiseTasks(ctx, []string{name}, store.PendingDelete)
	}
	if err != nil {
		return nil, err
	}
	if removed {
		s.log.InfoContext(ctx, "owner reference removed", "name", name, "owner", spelled[0], "reason", req.GetReason(),
			"by", LocationOf(req.GetCall().GetRequester()).String(), "delete", deleting)
	}
	return &v1.RemoveMetaOwnerReferenceResponse{}, nil
}

func ownersOnly(owners []store.OwnerReference) store.Write {
	return store.Write{Op: store.Update, Mask: []string{"metadata.ownerReferences"}, Meta: store.Meta{OwnerReferences: owners}}
}

// beginOwnee admits a call that changes an ownee, and returns the ownee's name here: empty if there can be none. Only the owner's Deployment and the
// ownee's own may do that.
func (s *Server) beginOwnee(ctx context.Context, c *v1.Call, ownee *v1.Spelling, kind, region string) (name string, end func(), err error) {
	requester, end, err := s.begin(c, anybody, false)
	if err != nil {
		return "", nil, err
	}
	if name, err = s.ownee(ctx, requester, ownee, kind, region); err != nil {
		end()
		return "", nil, err
	}
	return name, end, nil
}

func (s *Server) ownee(ctx context.Context, requester store.Location, ownee *v1.Spelling, kind, region string) (string, error) {
	if requester != s.self {
		if err := checkOwner(requester, kind); err != nil {
			return "", err
		}
		if region != requester.Region {
			return "", invalid("owner_region", "is %.64q, but %s asks", region, requester)
		}
	}
	own, spelled, err := s.understand(ownee.GetVersion())
	if err != nil {
		return "", err
	}
	if err := checkName("ownee.name", ownee.GetName()); err != nil {
		return "", err
	}
	n, ok, err := s.ours(ctx, own, spelled, ownee.GetName())
	if err != nil || !ok {
		return "", err
	}
	return n.Full, nil
}

// Repeats of an edit that somebody else's write overtook (X38).
const (
	editAttempts = 10
	editPause    = 10 * time.Millisecond
)

// edit changes or deletes a resource at the version that change has seen; change says false if there is nothing to do. A resource that is gone, or going,
// needs no change.
func (s *Server) edit(ctx context.Context, name string, change func(*store.Resource) (store.Write, bool)) error {
	if name == "" {
		return nil
	}
	for attempt := 1; ; attempt++ {
		r, err := s.cfg.Store.Get(ctx, name)
		switch {
		case store.CodeOf(err) == store.NotFound:
			return nil
		case err != nil:
			return err
		case r.OwningRegion != "" && r.OwningRegion != s.cfg.Region:
			return refuse(ReasonWrongRegion, map[string]string{MetadataRegion: r.OwningRegion}, name, "is owned by region %s: change it there", r.OwningRegion)
		case r.State != store.Active:
			return nil
		}
		w, wanted := change(r)
		if !wanted {
			return nil
		}
		w.Name, w.Type, w.IfVersion = r.Name, r.Type, r.Version
		_, err = store.Apply(ctx, s.cfg.Store, w)
		switch code := store.CodeOf(err); {
		case err == nil || code == store.NotFound:
			return nil
		case code != store.Aborted || attempt == editAttempts:
			return err
		}
		select {
		case <-ctx.Done():
			return &store.Error{Code: store.Unavailable, Name: name, Reason: "somebody else changes the resource", Cause: ctx.Err()}
		case <-time.After(editPause/2 + rand.N(editPause*time.Duration(attempt))):
		}
	}
}

// Pages. The token is the last name of the page before.
func pageToken(name string) string { return base64.RawURLEncoding.EncodeToString([]byte(name)) }

func parsePageToken(token string) (string, error) {
	name, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || !storable(string(name)) {
		return "", invalid("page_token", "is no token of this list: send back the last one received, or none")
	}
	return string(name), nil
}

func pageSize(asked int32, otherwise int) (int, error) {
	if asked < 0 {
		return 0, invalid("page_size", "is %d, want 0 to %d", asked, store.MaxPageSize)
	}
	return min(cmp.Or(int(asked), otherwise), store.MaxPageSize), nil
}
