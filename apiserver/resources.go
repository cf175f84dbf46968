package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/store"
)

// maxAttempts is how often a masked update is merged again because somebody else wrote in between.
const maxAttempts = 5

func (s *Server) get(ctx context.Context, req *dbcontrollerv1.GetRequest) (*dbcontrollerv1.Resource, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	name, err := parseName(v, "name", req.GetName())
	if err != nil {
		return nil, err
	}
	r, err := s.cfg.Store.Get(ctx, name.Full)
	if err != nil {
		return nil, err
	}
	return resourceOf(r), nil
}

func (s *Server) batchGet(ctx context.Context, req *dbcontrollerv1.BatchGetRequest) (*dbcontrollerv1.BatchGetResponse, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	names := req.GetNames()
	if len(names) == 0 || len(names) > store.MaxBatch {
		return nil, invalid("names", "has %d entries, want 1 to %d", len(names), store.MaxBatch)
	}
	for i, n := range names {
		if _, err := parseName(v, fmt.Sprintf("names[%d]", i), n); err != nil {
			return nil, err
		}
	}
	found, err := s.read(ctx, "names", names)
	if err != nil {
		return nil, err
	}
	res := &dbcontrollerv1.BatchGetResponse{}
	for i, r := range found {
		if r == nil {
			return nil, store.Errorf(store.NotFound, names[i], "does not exist")
		}
		res.Resources = append(res.Resources, resourceOf(r))
	}
	return res, nil
}

// readBytes bounds the bodies of one answer.
const readBytes = 64 << 20

// read is BatchGet, in parts that are sure to fit, for an answer whose size is bounded. field is what the caller has to make smaller.
func (s *Server) read(ctx context.Context, field string, names []string) (all []*store.Resource, err error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	chunk := len(names)
	for _, n := range names {
		if p, err := v.ParseName(n); err == nil {
			chunk = min(chunk, readBytes/p.Type.MaxBodyBytes)
		}
	}
	size := 0
	for part := range slices.Chunk(names, max(chunk, 1)) {
		found, err := s.cfg.Store.BatchGet(ctx, part)
		if err != nil {
			return nil, err
		}
		for _, r := range found {
			if r != nil {
				size += len(r.Body)
			}
		}
		if all = append(all, found...); size > readBytes {
			return nil, invalid(field, "would answer with more than %d MiB: ask for fewer", readBytes>>20)
		}
	}
	return all, nil
}

func (s *Server) list(ctx context.Context, req *dbcontrollerv1.ListRequest) (*dbcontrollerv1.ListResponse, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	c, err := parseCollection(v, req.GetCollection())
	if err != nil {
		return nil, err
	}
	page, err := s.cfg.Store.List(ctx, store.Query{
		Type: c.Type.Name, Prefix: c.Path + "/", Filter: req.GetFilter(), OrderBy: req.GetOrderBy(),
		PageSize: int(req.GetPageSize()), PageToken: req.GetPageToken(),
	})
	if err != nil {
		return nil, err
	}
	res := &dbcontrollerv1.ListResponse{NextPageToken: page.NextPageToken}
	for _, r := range page.Resources {
		// Types that occur again below themselves share a prefix with their descendants.
		if n, err := v.ParseName(r.Name); err == nil && c.Match(n) {
			res.Resources = append(res.Resources, resourceOf(r))
		}
	}
	return res, nil
}

func (s *Server) create(ctx context.Context, req *dbcontrollerv1.CreateRequest) (*dbcontrollerv1.Resource, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	w, err := createOf(v, "", req)
	if err != nil {
		return nil, err
	}
	p, err := s.route(ctx, w)
	if err != nil {
		return nil, err
	}
	if p != nil {
		return forward(ctx, s, p, p.client.Create, req)
	}
	return s.writeOne(ctx, w, req.GetValidateOnly())
}

func (s *Server) update(ctx context.Context, req *dbcontrollerv1.UpdateRequest) (*dbcontrollerv1.Resource, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	w, err := updateOf(v, "", req)
	if err != nil {
		return nil, err
	}
	p, err := s.route(ctx, w)
	if err != nil {
		return nil, err
	}
	if p != nil {
		return forward(ctx, s, p, p.client.Update, req)
	}
	return s.writeOne(ctx, w, req.GetValidateOnly())
}

func (s *Server) delete(ctx context.Context, req *dbcontrollerv1.DeleteRequest) (*dbcontrollerv1.DeleteResponse, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	w, err := deleteOf(v, "", req)
	if err != nil {
		return nil, err
	}
	p, err := s.route(ctx, w)
	if err != nil {
		return nil, err
	}
	if p != nil {
		return forward(ctx, s, p, p.client.Delete, req)
	}
	if req.GetValidateOnly() {
		return s.planDelete(ctx, w)
	}
	if _, err := s.apply(ctx, []write{w}); err != nil {
		return nil, err
	}
	return &dbcontrollerv1.DeleteResponse{}, nil
}

func (s *Server) batchWrite(ctx context.Context, req *dbcontrollerv1.BatchWriteRequest) (*dbcontrollerv1.BatchWriteResponse, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	if n := len(req.GetWrites()); n == 0 || n > store.MaxBatch {
		return nil, invalid("writes", "has %d entries, want 1 to %d", n, store.MaxBatch)
	}
	writes := make([]write, len(req.GetWrites()))
	seen := make(map[string]int, len(writes))
	for i, item := range req.GetWrites() {
		at := fmt.Sprintf("writes[%d]", i)
		var err error
		validateOnly := false
		switch op := item.GetOp().(type) {
		case *dbcontrollerv1.Write_Create:
			writes[i], err = createOf(v, at, op.Create)
			validateOnly = op.Create.GetValidateOnly()
		case *dbcontrollerv1.Write_Update:
			writes[i], err = updateOf(v, at, op.Update)
			validateOnly = op.Update.GetValidateOnly()
		case *dbcontrollerv1.Write_Delete:
			writes[i], err = deleteOf(v, at, op.Delete)
			validateOnly = op.Delete.GetValidateOnly()
		default:
			err = invalid(at, "is one of create, update and delete")
		}
		if err == nil && validateOnly {
			err = invalid(at, "validate_only is not available in a batch")
		}
		if err != nil {
			return nil, err
		}
		if first, twice := seen[writes[i].Name]; twice {
			return nil, invalid(at, "writes %s, as writes[%d] does: a name may occur once", writes[i].Name, first)
		}
		seen[writes[i].Name] = i
	}
	p, err := s.route(ctx, writes...)
	if err != nil {
		return nil, err
	}
	if p != nil {
		return forward(ctx, s, p, p.client.BatchWrite, req)
	}
	results, err := s.apply(ctx, writes)
	if err != nil {
		return nil, err
	}
	res := &dbcontrollerv1.BatchWriteResponse{}
	for i, r := range results {
		if writes[i].Op == store.Delete {
			res.Resources = append(res.Resources, &dbcontrollerv1.Resource{Name: writes[i].Name})
		} else {
			res.Resources = append(res.Resources, resourceOf(r.Resource))
		}
	}
	return res, nil
}

func (s *Server) writeOne(ctx context.Context, w write, validateOnly bool) (*dbcontrollerv1.Resource, error) {
	if validateOnly {
		return s.preview(ctx, w)
	}
	results, err := s.apply(ctx, []write{w})
	if err != nil {
		return nil, err
	}
	return resourceOf(results[0].Resource), nil
}

// apply runs the writes in one transaction. A masked update is merged with what is stored, judged as a whole, and written only onto
// the version that it was merged with; when somebody else was faster, again.
func (s *Server) apply(ctx context.Context, writes []write) ([]store.Result, error) {
	for attempt := 1; ; attempt++ {
		whole, pinned, err := s.merge(ctx, writes)
		if err != nil {
			return nil, err
		}
		results, err := s.cfg.Store.BatchWrite(ctx, whole)
		e, refused := errors.AsType[*store.Error](err)
		if !refused || !pinned[e.Name] || e.Code != store.Aborted && e.Code != store.AlreadyExists || attempt == maxAttempts {
			return results, err
		}
	}
}

// merge returns the writes without masks, and the names for which that depends on what was read.
func (s *Server) merge(ctx context.Context, writes []write) (whole []store.Write, pinned map[string]bool, err error) {
	var names []string
	for _, w := range writes {
		if !w.whole {
			names = append(names, w.Name)
		}
	}
	stored := map[string]*store.Resource{}
	if len(names) > 0 {
		found, err := s.cfg.Store.BatchGet(ctx, names)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range found {
			if r != nil {
				stored[r.Name] = r
			}
		}
		pinned = map[string]bool{}
	}
	for _, w := range writes {
		out := w.Write
		if !w.whole {
			old := stored[w.Name]
			switch {
			case old == nil && w.Op == store.Update:
				return nil, nil, store.Errorf(store.NotFound, w.Name, "does not exist")
			case old == nil: // AIP-134: a missing resource is created whole, whatever the mask
				out.Mask, out.Op = nil, store.Create
			default:
				if out, err = store.ApplyMask(old, w.Write); err != nil {
					if e, ok := errors.AsType[*store.Error](err); ok {
						return nil, nil, refuse(w.at, slices.Clone(e.Violations))
					}
					return nil, nil, err
				}
			}
			if old == nil || !bytes.Equal(out.Body, old.Body) {
				if err := refuse(w.at, checkBody(w.name.Type, out.Body)); err != nil {
					return nil, nil, err
				}
			}
			if out.IfVersion == (store.Version{}) { // else the caller's own etag decides
				pinned[w.Name] = true
				if old != nil {
					out.IfVersion = old.Version
				}
			}
		}
		whole = append(whole, out)
	}
	return whole, pinned, nil
}

// preview says what a write would do, and does nothing (AIP-163).
func (s *Server) preview(ctx context.Context, w write) (*dbcontrollerv1.Resource, error) {
	whole, _, err := s.merge(ctx, []write{w})
	if err != nil {
		return nil, err
	}
	found, err := s.cfg.Store.BatchGet(ctx, []string{w.Name})
	if err != nil {
		return nil, err
	}
	old := found[0]
	switch {
	case old == nil && (w.Op == store.Update || w.Op == store.Delete && !w.AllowMissing):
		return nil, store.Errorf(store.NotFound, w.Name, "does not exist")
	case old != nil && w.Op == store.Create:
		return nil, store.Errorf(store.AlreadyExists, w.Name, "exists already")
	case w.IfVersion != (store.Version{}) && (old == nil || old.Version != w.IfVersion):
		return nil, store.Errorf(store.Aborted, w.Name, "has another etag than the one sent: read it again and repeat")
	case w.Op == store.Delete:
		return &dbcontrollerv1.Resource{Name: w.Name}, nil
	}
	next := store.Resource{Name: w.Name, Type: w.Type}
	if old != nil {
		next = *old
	}
	next.Meta, next.Body = whole[0].Meta, whole[0].Body
	return resourceOf(&next), nil
}

// resourceOf is the form that users see. Times and etag are left out as long as there are none.
func resourceOf(r *store.Resource) *dbcontrollerv1.Resource {
	meta := &dbcontrollerv1.Metadata{
		Uuid: r.UUID, Generation: r.Generation,
		Labels: r.Meta.Labels, Annotations: r.Meta.Annotations, Tags: r.Meta.Tags,
		State: r.State.String(),
	}
	if !r.CreateTime.IsZero() {
		meta.CreateTime, meta.UpdateTime = timestamppb.New(r.CreateTime), timestamppb.New(r.UpdateTime)
	}
	if !r.DeleteTime.IsZero() {
		meta.DeleteTime = timestamppb.New(r.DeleteTime)
	}
	if r.OwningRegion != "" {
		meta.Syncing = &dbcontrollerv1.Syncing{OwningRegion: r.OwningRegion, Regions: r.Regions}
	}
	for _, o := range r.Meta.OwnerReferences {
		meta.OwnerReferences = append(meta.OwnerReferences, &dbcontrollerv1.OwnerReference{
			Kind: o.Kind, Version: o.Version, Name: o.Name, Region: o.Region, Controller: o.Controller,
			RequiresOwnerReference: o.RequiresOwnerReference, UnsetOnDelete: o.UnsetOnDelete,
		})
	}
	out := &dbcontrollerv1.Resource{Name: r.Name, Type: r.Type, Metadata: meta, Body: string(r.Body)}
	if r.Version.Number > 0 {
		meta.ResourceVersion = strconv.FormatInt(r.Version.Number, 10)
		out.Etag = r.Version.ETag()
	}
	return out
}

// resourcesService is the RPC form of the methods above.
type resourcesService struct{ s *Server }

func unary[Req, Res any](ctx context.Context, req *connect.Request[Req], method func(context.Context, *Req) (*Res, error)) (*connect.Response[Res], error) {
	res, err := method(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (r resourcesService) Get(ctx context.Context, req *connect.Request[dbcontrollerv1.GetRequest]) (*connect.Response[dbcontrollerv1.Resource], error) {
	return unary(ctx, req, r.s.get)
}

func (r resourcesService) BatchGet(ctx context.Context, req *connect.Request[dbcontrollerv1.BatchGetRequest]) (*connect.Response[dbcontrollerv1.BatchGetResponse], error) {
	return unary(ctx, req, r.s.batchGet)
}

func (r resourcesService) List(ctx context.Context, req *connect.Request[dbcontrollerv1.ListRequest]) (*connect.Response[dbcontrollerv1.ListResponse], error) {
	return unary(ctx, req, r.s.list)
}

func (r resourcesService) Create(ctx context.Context, req *connect.Request[dbcontrollerv1.CreateRequest]) (*connect.Response[dbcontrollerv1.Resource], error) {
	return unary(ctx, req, r.s.create)
}

func (r resourcesService) Update(ctx context.Context, req *connect.Request[dbcontrollerv1.UpdateRequest]) (*connect.Response[dbcontrollerv1.Resource], error) {
	return unary(ctx, req, r.s.update)
}

func (r resourcesService) Delete(ctx context.Context, req *connect.Request[dbcontrollerv1.DeleteRequest]) (*connect.Response[dbcontrollerv1.DeleteResponse], error) {
	return unary(ctx, req, r.s.delete)
}

func (r resourcesService) BatchWrite(ctx context.Context, req *connect.Request[dbcontrollerv1.BatchWriteRequest]) (*connect.Response[dbcontrollerv1.BatchWriteResponse], error) {
	return unary(ctx, req, r.s.batchWrite)
}

func (r resourcesService) PreviewPolicy(ctx context.Context, req *connect.Request[dbcontrollerv1.PreviewPolicyRequest]) (*connect.Response[dbcontrollerv1.PolicyPreview], error) {
	return unary(ctx, req, r.s.previewPolicy)
}

func (r resourcesService) Explain(ctx context.Context, req *connect.Request[dbcontrollerv1.ExplainRequest]) (*connect.Response[dbcontrollerv1.Explanation], error) {
	return unary(ctx, req, r.s.explain)
}

func (r resourcesService) Watch(ctx context.Context, req *connect.Request[dbcontrollerv1.WatchRequest], stream *connect.ServerStream[dbcontrollerv1.WatchResponse]) error {
	return r.s.watch(ctx, req.Msg, stream.Send)
}
