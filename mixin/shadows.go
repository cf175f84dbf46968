package mixin

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

// shadowPrefix begins the names of shadows.
const shadowPrefix = "resourceShadows/"

// shadowsPage is the default page size of a list, and how many shadows a message of a watch has at most.
const shadowsPage = 100

// GetResourceShadow returns the shadow of one resource, or NotFound (F23).
func (s *Server) GetResourceShadow(ctx context.Context, req *v1.GetResourceShadowRequest) (*v1.ResourceShadow, error) {
	name, ok := strings.CutPrefix(req.GetName(), shadowPrefix)
	if !ok {
		return nil, invalid("name", "is not the name of a shadow: want %s and the name of the resource", shadowPrefix)
	}
	if err := checkName("name", name); err != nil {
		return nil, err
	}
	shadow, err := s.cfg.Core.Shadow(ctx, name)
	if err != nil {
		return nil, err
	}
	return s.wireShadow(shadow), nil
}

// ListResourceShadows returns one page, in the order of names.
func (s *Server) ListResourceShadows(ctx context.Context, req *v1.ListResourceShadowsRequest) (*v1.ListResourceShadowsResponse, error) {
	switch req.GetState() {
	case "", "ACTIVE", "PENDING", "DELETING":
	default:
		return nil, invalid("state", "%.64q is no state of a shadow: want ACTIVE, PENDING, DELETING or none", req.GetState())
	}
	if !storable(req.GetPrefix()) {
		return nil, invalid("prefix", "is not the beginning of a name")
	}
	after, err := parsePageToken(req.GetPageToken())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(req.GetPageSize(), shadowsPage)
	if err != nil {
		return nil, err
	}
	shadows, next, err := s.cfg.Core.Shadows(ctx, store.ShadowFilter{State: req.GetState(), Prefix: req.GetPrefix(), After: after, Limit: size})
	if err != nil {
		return nil, err
	}
	res := &v1.ListResourceShadowsResponse{NextPageToken: pageToken(next)}
	for _, shadow := range shadows {
		res.Shadows = append(res.Shadows, s.wireShadow(shadow))
	}
	return res, nil
}

// WatchResourceShadows sends the shadows that have work due, then each that gets some, until ctx is done.
func (s *Server) WatchResourceShadows(ctx context.Context, _ *v1.WatchResourceShadowsRequest, emit func(*v1.WatchResourceShadowsResponse) error) error {
	var cursor feed.Cursor
	current := false
	told := time.Time{}
	return s.cfg.Changes.Follow(ctx, feed.Interest{Owned: true}, func(ctx context.Context) (bool, error) {
		var names []string
		read, err := s.cfg.Core.ReadTasks(ctx, cursor, everyShard, func(t store.Task) error {
			names = append(names, t.Name)
			return nil
		})
		if errors.Is(err, feed.ErrCursorLost) && !cursor.IsZero() {
			cursor = feed.Cursor{}
			return true, nil
		}
		if err != nil {
			return false, err
		}
		msg := &v1.WatchResourceShadowsResponse{Current: current}
		for _, name := range names {
			shadow, err := s.cfg.Core.Shadow(ctx, name)
			if store.CodeOf(err) == store.NotFound {
				continue // complete since
			}
			if err != nil {
				return false, err
			}
			if len(msg.Shadows) == shadowsPage {
				if err := emit(msg); err != nil {
					return false, err
				}
				msg = &v1.WatchResourceShadowsResponse{Current: current}
			}
			msg.Shadows = append(msg.Shadows, s.wireShadow(shadow))
		}
		cursor = read.Cursor
		if becomes := !read.More; becomes && !current {
			current, msg.Current = true, true
		} else if len(msg.Shadows) == 0 && time.Since(told) < heartbeat {
			return read.More, nil
		}
		told = time.Now()
		return read.More, emit(msg)
	})
}

func (s *Server) wireShadow(in *store.Shadow) *v1.ResourceShadow {
	out := &v1.ResourceShadow{
		Name: shadowPrefix + in.Name, ResourceType: s.cfg.Service + "/" + in.Type, Version: s.cfg.Version, Uuid: in.UUID,
		Tasks: in.Tasks.Strings(), TaskTime: wireTime(in.TaskTime), DeleteTime: wireTime(in.DeleteTime), RowVersion: in.RowVersion,
		LastError: in.LastError, NextRetry: wireTime(in.NextRetry),
	}
	switch {
	case in.State == store.ShadowDeleting:
		out.State = "DELETING"
	case in.Tasks != 0:
		out.State = "PENDING"
	default:
		out.State = "ACTIVE"
	}
	for i, r := range in.References {
		out.References = append(out.References, &v1.ShadowReference{
			Kind: r.Kind.String(), Field: r.Field, Location: s.wireLocation(r.At), Target: r.Target, OnTargetDeleted: r.Behavior.String(), Unconfirmed: in.Unconfirmed[i],
		})
	}
	for _, src := range in.Sources {
		out.Sources = append(out.Sources, &v1.ShadowSource{Location: s.wireLocation(src.Location), Blocking: src.Blocking, Subscriber: src.Subscriber, Ownee: src.Ownee})
	}
	for _, b := range in.Blockades {
		out.TentativeBlockades = append(out.TentativeBlockades, &v1.TentativeBlockade{
			Location: s.wireLocation(b.Location), Referrer: b.Referrer, TxId: b.TxID, TxAttempt: int32(b.Attempt), ExpireTime: wireTime(b.ExpireTime),
		})
	}
	return out
}

// wireLocation names this Deployment where the zero Location stands for it.
func (s *Server) wireLocation(at store.Location) *v1.Location {
	if at == (store.Location{}) {
		at = s.self
	}
	return WireLocation(at)
}

func wireTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
