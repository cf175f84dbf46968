package apiserver

import (
	"context"
	"errors"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	rpc "github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/store"
)

// The REST form of Resources; VERSION is the API version. Query parameters may be written in snake_case or camelCase.
//
//	GET    /VERSION/{name}                  ?min_version=            an etag that was seen: nothing older from a cache; or X-Min-Version: etag, as with all GETs
//	GET    /VERSION/{name}:explain          ?local_only=             an id that ends so is written with %3A
//	PATCH  /VERSION/{name}                  ?update_mask= &allow_missing= &validate_only=    If-Match: etag
//	DELETE /VERSION/{name}                  ?etag= &allow_missing= &validate_only=           If-Match: etag; validate_only answers with the plan
//	GET    /VERSION/{collection}            ?page_size= &page_token= &filter= &order_by=
//	POST   /VERSION/{collection}            ?id= &validate_only=     the id of the new resource, unless its name is in the body
//	GET    /VERSION/{collection}:search     ?q= &filter= &facets= &page_size= &page_token= &order_by=
//	GET    /VERSION/{collection}:watch      ?resume_token= &filter=  one JSON object per line
//	GET    /VERSION:watch                   ?resume_token=           everything
//	GET    /VERSION:batchGet                ?names= &names=
//	POST   /VERSION:batchWrite
func (s *Server) rest() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e := s.endpoint(r)
		if e.serve == nil {
			writeError(w, e.missing)
			return
		}
		started := false
		err := s.call(r.Context(), e.procedure, e.procedure == rpc.ResourcesWatchProcedure, func(ctx context.Context) error {
			params, err := e.params(r.URL)
			if err != nil {
				return err
			}
			if ctx, err = withMinVersion(ctx, params.Get("min_version")); err != nil {
				return err
			}
			return e.serve(ctx, &exchange{w: w, r: r, params: params, path: e.path, started: &started})
		})
		switch {
		case err == nil:
		case started:
			_, _ = w.Write(append(errorJSON(err), '\n')) // the last line of a stream; if it cannot be sent, the caller sees the stream break
		default:
			writeError(w, err)
		}
	})
}

// endpoint is one line of the table above.
type endpoint struct {
	procedure string
	path      string // the name or the collection
	allowed   []string
	serve     func(context.Context, *exchange) error
	missing   error // set without serve
}

// exchange is one REST call.
type exchange struct {
	w       http.ResponseWriter
	r       *http.Request
	params  url.Values // keys in snake_case
	path    string
	started *bool
}

func (s *Server) endpoint(r *http.Request) endpoint {
	path, ok := strings.CutPrefix(r.URL.Path, "/"+s.cfg.Version)
	switch {
	case ok && path == ":batchGet":
		return only(r, http.MethodGet, endpoint{procedure: rpc.ResourcesBatchGetProcedure, allowed: []string{"names", "min_version"}, serve: s.restBatchGet})
	case ok && path == ":batchWrite":
		return only(r, http.MethodPost, endpoint{procedure: rpc.ResourcesBatchWriteProcedure, serve: s.restBatchWrite})
	case ok && path == ":watch":
		return only(r, http.MethodGet, endpoint{procedure: rpc.ResourcesWatchProcedure, allowed: []string{"resume_token"}, serve: s.restWatch})
	case !ok || !strings.HasPrefix(path, "/"):
		return endpoint{missing: fail(connect.CodeNotFound, "NO_SUCH_PATH", nil, nil, "there is nothing at %q: resources are below /%s/", r.URL.Path, s.cfg.Version)}
	}
	path = path[1:]
	if strings.Count(path, "/")%2 == 1 { // pairs of a collection and an id
		if name, ok := strings.CutSuffix(path, ":explain"); ok && strings.HasSuffix(r.URL.EscapedPath(), ":explain") && r.Method == http.MethodGet {
			return endpoint{procedure: rpc.ResourcesExplainProcedure, path: name, allowed: []string{"local_only"}, serve: s.restExplain}
		}
		switch r.Method {
		case http.MethodPatch:
			return endpoint{procedure: rpc.ResourcesUpdateProcedure, path: path, allowed: []string{"update_mask", "allow_missing", "validate_only"}, serve: s.restUpdate}
		case http.MethodDelete:
			return endpoint{procedure: rpc.ResourcesDeleteProcedure, path: path, allowed: []string{"etag", "allow_missing", "validate_only"}, serve: s.restDelete}
		}
		return only(r, http.MethodGet, endpoint{procedure: rpc.ResourcesGetProcedure, path: path, allowed: []string{"min_version"}, serve: s.restGet})
	}
	if collection, ok := strings.CutSuffix(path, ":watch"); ok {
		return only(r, http.MethodGet, endpoint{procedure: rpc.ResourcesWatchProcedure, path: collection, allowed: []string{"resume_token", "filter"}, serve: s.restWatch})
	}
	if collection, ok := strings.CutSuffix(path, ":search"); ok {
		return only(r, http.MethodGet, endpoint{procedure: rpc.ResourcesSearchProcedure, path: collection,
			allowed: []string{"q", "filter", "facets", "page_size", "page_token", "order_by"}, serve: s.restSearch})
	}
	if r.Method == http.MethodPost {
		return endpoint{procedure: rpc.ResourcesCreateProcedure, path: path, allowed: []string{"id", "validate_only"}, serve: s.restCreate}
	}
	return only(r, http.MethodGet, endpoint{procedure: rpc.ResourcesListProcedure, path: path, allowed: []string{"page_size", "page_token", "filter", "order_by", "min_version"}, serve: s.restList})
}

func only(r *http.Request, method string, e endpoint) endpoint {
	if r.Method == method {
		return e
	}
	return endpoint{missing: fail(connect.CodeUnimplemented, "METHOD_NOT_ALLOWED", nil, nil, "%s is not possible at %q", r.Method, r.URL.Path)}
}

// params refuses what it does not know, so that a misspelt filter is not a missing one.
func (e endpoint) params(u *url.URL) (url.Values, error) {
	raw, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, invalid("query", "cannot be parsed: %v", err)
	}
	params := url.Values{}
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		name := snake(key)
		switch {
		case !slices.Contains(e.allowed, name):
			return nil, invalid(key, "is not a parameter here: there are %s", strings.Join(append(e.allowed, "no others"), ", "))
		case name != "names" && name != "facets" && len(raw[key])+len(params[name]) > 1:
			return nil, invalid(key, "is given twice")
		}
		params[name] = raw[key]
	}
	return params, nil
}

func (x *exchange) bool(name string) (bool, error) {
	if !x.params.Has(name) {
		return false, nil
	}
	v, err := strconv.ParseBool(x.params.Get(name))
	if err != nil {
		return false, invalid(name, "is true or false")
	}
	return v, nil
}

func (x *exchange) flags() (allowMissing, validateOnly bool, err error) {
	allowMissing, err1 := x.bool("allow_missing")
	validateOnly, err2 := x.bool("validate_only")
	if err1 != nil {
		err2 = err1
	}
	return allowMissing, validateOnly, err2
}

// etag is that of the body or the query, or of If-Match.
func (x *exchange) etag(given string) (string, error) {
	header := x.r.Header.Get("If-Match")
	if header == "*" {
		header = ""
	}
	header = strings.TrimSuffix(strings.TrimPrefix(header, `"`), `"`)
	if given != "" && header != "" && given != header {
		return "", invalid("etag", "differs from If-Match: send one of them")
	}
	if given == "" {
		given = header
	}
	return given, nil
}

// body reads the JSON that was sent. Insisting on its content type keeps web pages of others from sending it.
func (s *Server) body(x *exchange) ([]byte, error) {
	if t, _, err := mime.ParseMediaType(x.r.Header.Get("Content-Type")); err != nil || t != "application/json" && t != "application/merge-patch+json" {
		return nil, invalid("Content-Type", "must be application/json")
	}
	data, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, int64(s.cfg.MaxMessageBytes)))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, invalid("body", "is larger than %d bytes", s.cfg.MaxMessageBytes)
	}
	if err != nil {
		if refused, ok := errors.AsType[*connect.Error](err); ok {
			return nil, refused
		}
		return nil, fail(connect.CodeCanceled, "INCOMPLETE_REQUEST", nil, nil, "the body did not arrive whole")
	}
	if elementsOfJSON(data) > maxElements {
		return nil, invalid("body", "%v", errTooManyElements)
	}
	return data, nil
}

func (s *Server) restGet(ctx context.Context, x *exchange) error {
	res, err := s.get(ctx, &dbcontrollerv1.GetRequest{Name: x.path})
	return x.resource(res, err)
}

func (s *Server) restBatchGet(ctx context.Context, x *exchange) error {
	res, err := s.batchGet(ctx, &dbcontrollerv1.BatchGetRequest{Names: x.params["names"]})
	if err != nil {
		return err
	}
	return x.resources(res.GetResources(), "")
}

func (s *Server) restList(ctx context.Context, x *exchange) error {
	size := 0
	if text := x.params.Get("page_size"); text != "" {
		var err error
		if size, err = strconv.Atoi(text); err != nil || size < 0 {
			return invalid("page_size", "is a number from 1 to %d; 0 or none is the default", store.MaxPageSize)
		}
	}
	res, err := s.list(ctx, &dbcontrollerv1.ListRequest{
		Collection: x.path, PageSize: int32(min(size, store.MaxPageSize)), PageToken: x.params.Get("page_token"),
		Filter: x.params.Get("filter"), OrderBy: x.params.Get("order_by"),
	})
	if err != nil {
		return err
	}
	return x.resources(res.GetResources(), res.GetNextPageToken())
}

func (s *Server) restCreate(ctx context.Context, x *exchange) error {
	_, validateOnly, err := x.flags()
	if err != nil {
		return err
	}
	data, err := s.body(x)
	if err != nil {
		return err
	}
	r, err := parseResource("", data)
	if err != nil {
		return err
	}
	id := x.params.Get("id")
	switch {
	case id != "" && r.Name != "" && r.Name != x.path+"/"+id:
		return invalid("name", "is %q, and the path and the id are %q", r.Name, x.path+"/"+id)
	case id != "":
		r.Name = x.path + "/" + id
	case r.Name == "":
		return invalid("id", "is required: the id of the new resource")
	case !strings.HasPrefix(r.Name, x.path+"/") || strings.Contains(r.Name[len(x.path)+1:], "/"):
		return invalid("name", "is %q, which is not in the collection %q", r.Name, x.path)
	}
	res, err := s.create(ctx, &dbcontrollerv1.CreateRequest{Resource: r, ValidateOnly: validateOnly})
	return x.resource(res, err)
}

func (s *Server) restUpdate(ctx context.Context, x *exchange) error {
	allowMissing, validateOnly, err := x.flags()
	if err != nil {
		return err
	}
	data, err := s.body(x)
	if err != nil {
		return err
	}
	r, err := parseResource("", data)
	if err != nil {
		return err
	}
	if r.Name != "" && r.Name != x.path {
		return invalid("name", "is %q, and the path is %q", r.Name, x.path)
	}
	r.Name = x.path
	if r.Etag, err = x.etag(r.Etag); err != nil {
		return err
	}
	res, err := s.update(ctx, &dbcontrollerv1.UpdateRequest{
		Resource: r, UpdateMask: maskOf(x.params.Get("update_mask")), AllowMissing: allowMissing, ValidateOnly: validateOnly,
	})
	return x.resource(res, err)
}

func (s *Server) restDelete(ctx context.Context, x *exchange) error {
	allowMissing, validateOnly, err := x.flags()
	if err != nil {
		return err
	}
	etag, err := x.etag(x.params.Get("etag"))
	if err != nil {
		return err
	}
	res, err := s.delete(ctx, &dbcontrollerv1.DeleteRequest{Name: x.path, Etag: etag, AllowMissing: allowMissing, ValidateOnly: validateOnly})
	if err != nil {
		return err
	}
	return x.message(res)
}

func (s *Server) restExplain(ctx context.Context, x *exchange) error {
	localOnly, err := x.bool("local_only")
	if err != nil {
		return err
	}
	res, err := s.explain(ctx, &dbcontrollerv1.ExplainRequest{Name: x.path, LocalOnly: localOnly})
	if err != nil {
		return err
	}
	return x.message(res)
}

func (s *Server) restBatchWrite(ctx context.Context, x *exchange) error {
	data, err := s.body(x)
	if err != nil {
		return err
	}
	req, err := parseBatch(data)
	if err != nil {
		return err
	}
	res, err := s.batchWrite(ctx, req)
	if err != nil {
		return err
	}
	return x.resources(res.GetResources(), "")
}

func (s *Server) restWatch(ctx context.Context, x *exchange) error {
	flush := http.NewResponseController(x.w).Flush
	return s.watch(ctx, &dbcontrollerv1.WatchRequest{
		Collection: x.path, ResumeToken: x.params.Get("resume_token"), Filter: x.params.Get("filter"),
	}, func(res *dbcontrollerv1.WatchResponse) error {
		line, err := appendWatch(nil, res)
		if err != nil {
			return err
		}
		if !*x.started {
			*x.started = true
			x.w.Header().Set("Content-Type", "application/x-ndjson")
		}
		if _, err = x.w.Write(line); err == nil {
			err = flush()
		}
		if err != nil {
			return fail(connect.CodeCanceled, "READER_GONE", nil, nil, "the reader is gone or took nothing for too long")
		}
		return nil
	})
}

func (x *exchange) resource(r *dbcontrollerv1.Resource, err error) error {
	if err != nil {
		return err
	}
	out, err := appendResource(nil, r)
	if err != nil {
		return err
	}
	if r.GetEtag() != "" {
		x.w.Header().Set("ETag", `"`+r.GetEtag()+`"`)
	}
	return x.reply(out)
}

func (x *exchange) resources(list []*dbcontrollerv1.Resource, nextPageToken string) error {
	out, err := appendResources([]byte("{"), "resources", list)
	if err != nil {
		return err
	}
	if nextPageToken != "" {
		out = appendString(append(out, `,"nextPageToken":`...), nextPageToken)
	}
	return x.reply(append(out, '}'))
}

// message sends what is no resource.
func (x *exchange) message(m proto.Message) error {
	out, err := appendMessage(nil, m)
	if err != nil {
		return err
	}
	return x.reply(out)
}

// reply sends a whole answer. That the caller is gone is no failure of the call.
func (x *exchange) reply(body []byte) error {
	x.w.Header().Set("Content-Type", "application/json")
	x.w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = x.w.Write(body)
	return nil
}

// httpStatus is the HTTP status of a code, as google/rpc/code.proto gives it.
var httpStatus = map[connect.Code]int{
	connect.CodeCanceled:           499,
	connect.CodeInvalidArgument:    http.StatusBadRequest,
	connect.CodeDeadlineExceeded:   http.StatusGatewayTimeout,
	connect.CodeNotFound:           http.StatusNotFound,
	connect.CodeAlreadyExists:      http.StatusConflict,
	connect.CodePermissionDenied:   http.StatusForbidden,
	connect.CodeResourceExhausted:  http.StatusTooManyRequests,
	connect.CodeFailedPrecondition: http.StatusBadRequest,
	connect.CodeAborted:            http.StatusConflict,
	connect.CodeUnimplemented:      http.StatusNotImplemented,
	connect.CodeUnavailable:        http.StatusServiceUnavailable,
}

func statusOf(err error) int {
	if status, ok := httpStatus[connect.CodeOf(err)]; ok {
		return status
	}
	return http.StatusInternalServerError
}

func writeError(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(statusOf(err))
	_, _ = w.Write(errorJSON(err))
}

// errorJSON is the form of AIP-193.
func errorJSON(err error) []byte {
	message := err.Error()
	var details []*connect.ErrorDetail
	if e, ok := errors.AsType[*connect.Error](err); ok {
		message, details = e.Message(), e.Details()
	}
	out := append([]byte(`{"error":{"code":`), strconv.Itoa(statusOf(err))...)
	out = appendString(append(out, `,"message":`...), message)
	out = appendString(append(out, `,"status":`...), strings.ToUpper(connect.CodeOf(err).String()))
	out = append(out, `,"details":[`...)
	separator := ""
	for _, d := range details {
		value, err := d.Value()
		if err != nil {
			continue // a type that another region knows and this one does not
		}
		any, err := anypb.New(value)
		if err != nil {
			continue
		}
		b, err := protojson.Marshal(any)
		if err != nil {
			continue
		}
		out = append(append(out, separator...), b...)
		separator = ","
	}
	return append(out, "]}}"...)
}

// maskOf reads a comma-separated mask; nil without one. Paths are taken as they are: fields of bodies have their own spelling.
func maskOf(text string) *fieldmaskpb.FieldMask {
	if text == "" {
		return nil
	}
	return &fieldmaskpb.FieldMask{Paths: strings.Split(text, ",")}
}

func snake(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
			r += 'a' - 'A'
		}
		b.WriteRune(r)
	}
	return b.String()
}

func camel(s string) string {
	parts := strings.Split(s, "_")
	for i, p := range parts[1:] {
		if p != "" {
			parts[i+1] = strings.ToUpper(p[:1]) + p[1:]
		}
	}
	return strings.Join(parts, "")
}
