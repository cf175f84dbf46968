package apiserver

import (
	"context"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/search"
	"github.com/dbcontroller/db-controller/store"
)

// Searcher finds names: a search.Store.
type Searcher interface {
	Search(ctx context.Context, q search.Query) (*search.Result, error)
}

// search answers from the search store, and shows the resources as the database has them: a document that has no row any more is left out.
func (s *Server) search(ctx context.Context, req *dbcontrollerv1.SearchRequest) (*dbcontrollerv1.SearchResponse, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	c, err := parseCollection(v, req.GetCollection())
	if err != nil {
		return nil, err
	}
	switch {
	case s.cfg.Searcher == nil:
		return nil, store.Errorf(store.FailedPrecondition, "", "%s in %s has no search: name a search store in spec.search of its Deployment", s.cfg.Service, s.cfg.Region)
	case c.Type.Search == nil:
		return nil, store.Errorf(store.FailedPrecondition, "", "a %s is not searched: declare search.fields or search.filters of the type in the ServiceDescriptor of %s", c.Type.Name, s.cfg.Service)
	}
	found, err := s.cfg.Searcher.Search(ctx, search.Query{
		Type: c.Type, Prefix: c.Path + "/", Text: req.GetQuery(), Filter: req.GetFilter(), Facets: req.GetFacets(), OrderBy: req.GetOrderBy(),
		PageSize: int(req.GetPageSize()), PageToken: req.GetPageToken(),
	})
	if err != nil {
		return nil, err
	}
	res := &dbcontrollerv1.SearchResponse{NextPageToken: found.NextPageToken}
	for _, f := range found.Facets {
		facet := &dbcontrollerv1.SearchFacet{Field: f.Field}
		for _, value := range f.Values {
			facet.Values = append(facet.Values, &dbcontrollerv1.SearchFacetValue{Value: value.Value, Count: value.Count})
		}
		res.Facets = append(res.Facets, facet)
	}
	if len(found.Hits) == 0 {
		return res, nil
	}
	names := make([]string, len(found.Hits))
	for i, h := range found.Hits {
		names[i] = h.Name
	}
	rows, err := s.read(ctx, "page_size", names)
	if err != nil {
		return nil, err
	}
	for i, h := range found.Hits {
		// Types that occur again below themselves share a prefix with their descendants.
		if n, err := v.ParseName(h.Name); err != nil || rows[i] == nil || !c.Match(n) {
			continue
		}
		hit := &dbcontrollerv1.SearchHit{Resource: resourceOf(rows[i]), Score: h.Score}
		for _, highlight := range h.Highlights {
			hit.Highlights = append(hit.Highlights, &dbcontrollerv1.SearchHighlight{Field: highlight.Field, Snippet: highlight.Snippet})
		}
		res.Hits = append(res.Hits, hit)
	}
	return res, nil
}

func (r resourcesService) Search(ctx context.Context, req *connect.Request[dbcontrollerv1.SearchRequest]) (*connect.Response[dbcontrollerv1.SearchResponse], error) {
	return unary(ctx, req, r.s.search)
}

// restSearch shows hits as {"resource": {...}, "score": ..., "highlights": [...]}.
func (s *Server) restSearch(ctx context.Context, x *exchange) error {
	size := 0
	if text := x.params.Get("page_size"); text != "" {
		var err error
		if size, err = strconv.Atoi(text); err != nil || size < 0 {
			return invalid("page_size", "is a number from 1 to %d; 0 or none is the default", search.MaxPageSize)
		}
	}
	var facets []string
	for _, f := range x.params["facets"] {
		facets = append(facets, strings.Split(f, ",")...)
	}
	res, err := s.search(ctx, &dbcontrollerv1.SearchRequest{
		Collection: x.path, Query: x.params.Get("q"), Filter: x.params.Get("filter"), Facets: facets, PageSize: int32(min(size, search.MaxPageSize)),
		PageToken: x.params.Get("page_token"), OrderBy: x.params.Get("order_by"),
	})
	if err != nil {
		return err
	}
	out, err := appendSearch(nil, res)
	if err != nil {
		return err
	}
	return x.reply(out)
}

// appendSearch writes a page of hits, whose resources are flat.
func appendSearch(out []byte, res *dbcontrollerv1.SearchResponse) ([]byte, error) {
	out = append(out, `{"hits":[`...)
	for i, h := range res.GetHits() {
		if i > 0 {
			out = append(out, ',')
		}
		var err error
		if out, err = appendResource(append(out, `{"resource":`...), h.GetResource()); err != nil {
			return nil, err
		}
		rest, err := appendMessage(nil, &dbcontrollerv1.SearchHit{Score: h.GetScore(), Highlights: h.GetHighlights()})
		if err != nil {
			return nil, err
		}
		if len(rest) > len("{}") {
			out = append(out, ',')
		}
		out = append(out, rest[1:]...)
	}
	out = append(out, ']')
	rest, err := appendMessage(nil, &dbcontrollerv1.SearchResponse{Facets: res.GetFacets(), NextPageToken: res.GetNextPageToken()})
	if err != nil {
		return nil, err
	}
	if len(rest) > len("{}") {
		out = append(out, ',')
	}
	return append(out, rest[1:]...), nil
}
