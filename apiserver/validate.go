package apiserver

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

// Limits of what users write into the metadata.
const (
	maxEntries         = 64 // of labels, annotations, tags and owner references each
	maxKeyBytes        = 128
	maxLabelBytes      = 256 // also of a tag
	maxAnnotationBytes = 64 << 10
	maxMaskPaths       = 64
)

var keySyntax = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?$`)

// version is the schema that requests are judged by; it follows the registry.
func (s *Server) version() (*descriptor.Version, error) {
	if service, ok := s.cfg.Topology.View().Service(s.cfg.Service); ok {
		if v := service.Version(s.cfg.Version); v != nil {
			return v, nil
		}
	}
	return nil, store.Errorf(store.FailedPrecondition, "", "no ServiceDescriptor declares version %s of %s", s.cfg.Version, s.cfg.Service)
}

// write is one store.Write with the parsed name.
type write struct {
	store.Write
	name descriptor.Name
	// at is where the write is in the request: empty, or writes[3].
	at string
	// whole says that the body has been validated; a masked one is judged once it is merged.
	whole bool
}

func parseName(v *descriptor.Version, field, name string) (descriptor.Name, error) {
	if name == "" {
		return descriptor.Name{}, invalid(field, "is required")
	}
	n, err := v.ParseName(name)
	return n, nameError(field, err)
}

func parseCollection(v *descriptor.Version, path string) (descriptor.Collection, error) {
	if path == "" {
		return descriptor.Collection{}, invalid("collection", "is required: for example sections/admin/packages")
	}
	c, err := v.ParseCollection(path)
	return c, nameError("collection", err)
}

func nameError(field string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*descriptor.NameError](err); ok {
		return invalid(field, "%s", e.Error())
	}
	return invalid(field, "%v", err)
}

func under(at, field string) string {
	if at == "" {
		return field
	}
	return at + "." + field
}

func createOf(v *descriptor.Version, at string, req *dbcontrollerv1.CreateRequest) (write, error) {
	w, err := saveOf(v, at, store.Create, req.GetResource(), nil)
	if err == nil && req.GetResource().GetEtag() != "" {
		err = invalid(under(at, "resource.etag"), "a resource that is created has no etag yet")
	}
	return w, err
}

func updateOf(v *descriptor.Version, at string, req *dbcontrollerv1.UpdateRequest) (write, error) {
	op := store.Update
	if req.GetAllowMissing() {
		op = store.Save
	}
	return saveOf(v, at, op, req.GetResource(), req.GetUpdateMask().GetPaths())
}

func saveOf(v *descriptor.Version, at string, op store.Op, r *dbcontrollerv1.Resource, mask []string) (write, error) {
	if r == nil {
		return write{}, invalid(under(at, "resource"), "is required")
	}
	name, err := parseName(v, under(at, "resource.name"), r.GetName())
	if err != nil {
		return write{}, err
	}
	w := write{name: name, at: at, whole: store.MaskAll(mask)}
	w.Op, w.Name, w.Type = op, name.Full, name.Type.Name
	w.Meta = metaOf(r.GetMetadata())
	w.Body = json.RawMessage(cmp.Or(r.GetBody(), "{}"))
	if !w.whole {
		w.Mask = mask
	}
	violations := checkMeta(w.Meta)
	if w.whole {
		violations = append(violations, checkBody(name.Type, w.Body)...)
	} else {
		violations = append(violations, checkMask(mask)...)
		violations = append(violations, checkPart(name.Type, w.Body)...)
	}
	if r.GetEtag() != "" {
		if w.IfVersion, err = store.ParseETag(r.GetEtag()); err != nil {
			violations = append(violations, store.Violation{Field: "etag", Description: etagRule})
		}
	}
	return w, refuse(at, violations)
}

const etagRule = "is not an etag of this service: send back the one of a Get, List or write"

func deleteOf(v *descriptor.Version, at string, req *dbcontrollerv1.DeleteRequest) (write, error) {
	name, err := parseName(v, under(at, "name"), req.GetName())
	if err != nil {
		return write{}, err
	}
	w := write{name: name, at: at, whole: true}
	w.Op, w.Name, w.Type, w.AllowMissing = store.Delete, name.Full, name.Type.Name, req.GetAllowMissing()
	if req.GetEtag() != "" {
		if w.IfVersion, err = store.ParseETag(req.GetEtag()); err != nil {
			return write{}, invalid(under(at, "etag"), etagRule)
		}
	}
	return w, nil
}

// refuse makes an error of violations, whose fields are relative to the resource at that place of the request.
func refuse(at string, violations []store.Violation) error {
	if len(violations) == 0 {
		return nil
	}
	for i := range violations {
		violations[i].Field = under(at, violations[i].Field)
	}
	return &store.Error{Code: store.InvalidArgument, Violations: violations}
}

func checkBody(t *descriptor.Type, body []byte) []store.Violation {
	var out []store.Violation
	for _, v := range t.ValidateBody(body) {
		out = append(out, store.Violation{Field: cmp.Or(v.Field, "body"), Description: v.Description})
	}
	if bytes.Contains(body, []byte(`"etag"`)) { // in REST it stands beside the body's fields
		fields, _ := members(body) // that it is no object has been said
		if slices.ContainsFunc(fields, func(f member) bool { return f.key == "etag" }) {
			out = append(out, store.Violation{Field: "etag", Description: "is not a field of the body: it belongs to the resource around it"})
		}
	}
	return out
}

// checkPart judges what is sent with a mask: a part of a body, which need not follow the schema before it is merged.
func checkPart(t *descriptor.Type, body []byte) []store.Violation {
	var fault string
	var object map[string]json.RawMessage
	switch {
	case len(body) > t.MaxBodyBytes:
		fault = fmt.Sprintf("the body has %d bytes, a %s may have %d", len(body), t.Name, t.MaxBodyBytes)
	case depth(body) > descriptor.MaxBodyDepth:
		fault = fmt.Sprintf("the body is nested deeper than %d", descriptor.MaxBodyDepth)
	case json.Unmarshal(body, &object) != nil || object == nil:
		fault = "the body must be a JSON object"
	default:
		return nil
	}
	return []store.Violation{{Field: "body", Description: fault}}
}

// depth is how deep objects and lists are nested, at least for valid JSON.
func depth(body []byte) int {
	at, deepest, quoted := 0, 0, false
	for i := 0; i < len(body); i++ {
		switch c := body[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			at++
			deepest = max(deepest, at)
		case c == '}' || c == ']':
			at--
		}
	}
	return deepest
}

func checkMask(mask []string) []store.Violation {
	if len(mask) > maxMaskPaths {
		return []store.Violation{{Field: "update_mask", Description: fmt.Sprintf("has %d paths, at most %d are allowed", len(mask), maxMaskPaths)}}
	}
	var out []store.Violation
	for i, path := range mask {
		if path == "*" || path == "" || len(path) > 1024 || slices.Contains(strings.Split(path, "."), "") || path == "etag" {
			out = append(out, store.Violation{
				Field:       fmt.Sprintf("update_mask.paths[%d]", i),
				Description: fmt.Sprintf("%.64q is not a path: use body fields (description, spec.size) or metadata.labels and its like; * stands alone", path),
			})
		}
	}
	return out
}

func metaOf(m *dbcontrollerv1.Metadata) store.Meta {
	meta := store.Meta{Labels: m.GetLabels(), Annotations: m.GetAnnotations(), Tags: m.GetTags()}
	for _, o := range m.GetOwnerReferences() {
		meta.OwnerReferences = append(meta.OwnerReferences, store.OwnerReference{
			Kind: o.GetKind(), Version: o.GetVersion(), Name: o.GetName(), Region: o.GetRegion(), Controller: o.GetController(),
			RequiresOwnerReference: o.GetRequiresOwnerReference(), UnsetOnDelete: o.GetUnsetOnDelete(),
		})
	}
	return meta
}

func checkMeta(m store.Meta) []store.Violation {
	var out []store.Violation
	bad := func(field, format string, args ...any) {
		out = append(out, store.Violation{Field: "metadata." + field, Description: fmt.Sprintf(format, args...)})
	}
	count := func(field string, n int) {
		if n > maxEntries {
			bad(field, "has %d entries, at most %d are allowed", n, maxEntries)
		}
	}
	count("labels", len(m.Labels))
	count("annotations", len(m.Annotations))
	count("tags", len(m.Tags))
	count("ownerReferences", len(m.OwnerReferences))
	for field, entries := range map[string]map[string]string{"labels": m.Labels, "annotations": m.Annotations} {
		limit := maxLabelBytes
		if field == "annotations" {
			limit = maxAnnotationBytes
		}
		for k, v := range entries {
			if len(k) > maxKeyBytes || !keySyntax.MatchString(k) {
				bad(fmt.Sprintf("%s[%.64q]", field, k), "a key has 1 to %d letters, digits, '-', '_', '.' and '/', and begins and ends with a letter or digit", maxKeyBytes)
			}
			if !storable(v, limit) {
				bad(fmt.Sprintf("%s[%.64q]", field, k), "a value has at most %d bytes of UTF-8 without NUL", limit)
			}
		}
	}
	for i, tag := range m.Tags {
		switch {
		case tag == "" || !storable(tag, maxLabelBytes):
			bad(fmt.Sprintf("tags[%d]", i), "a tag has 1 to %d bytes of UTF-8 without NUL", maxLabelBytes)
		case slices.Contains(m.Tags[:i], tag):
			bad(fmt.Sprintf("tags[%d]", i), "occurs twice")
		}
	}
	for i, o := range m.OwnerReferences {
		for field, v := range map[string]string{"kind": o.Kind, "version": o.Version, "name": o.Name, "region": o.Region} {
			if v == "" || !storable(v, descriptor.MaxNameBytes) {
				bad(fmt.Sprintf("ownerReferences[%d].%s", i, field), "is required, at most %d bytes", descriptor.MaxNameBytes)
			}
		}
		if slices.ContainsFunc(m.OwnerReferences[:i], func(p store.OwnerReference) bool { return p.Name == o.Name }) {
			bad(fmt.Sprintf("ownerReferences[%d].name", i), "occurs twice")
		}
	}
	slices.SortFunc(out, func(a, b store.Violation) int { return cmp.Compare(a.Field, b.Field) })
	return out[:min(len(out), 50)]
}

// storable says whether PostgreSQL can hold s as text, and we want it.
func storable(s string, limit int) bool {
	return len(s) <= limit && utf8.ValidString(s) && !strings.ContainsRune(s, 0)
}
