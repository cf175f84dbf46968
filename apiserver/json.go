package apiserver

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
)

// In REST a resource is one flat object: name, etag and metadata, and beside them the fields of its body. The body's bytes are copied,
// never decoded and encoded again, so numbers keep all their digits.

// member is one field of a JSON object, as it was written.
type member struct {
	key        string
	raw, value json.RawMessage // the key with its quotes, the value
}

// members takes a JSON object apart at its top level. What is inside the values is judged elsewhere.
func members(data []byte) ([]member, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("is not valid UTF-8")
	}
	if depth(data) > descriptor.MaxBodyDepth+8 {
		return nil, fmt.Errorf("is nested deeper than %d", descriptor.MaxBodyDepth)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("is not a JSON object")
	}
	var out []member
	for d.More() {
		before := d.InputOffset()
		key, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("is not valid JSON: %w", err)
		}
		raw := data[before:d.InputOffset()]
		m := member{raw: raw[bytes.IndexByte(raw, '"'):]} // without the comma and blanks before it
		m.key, _ = key.(string)
		if err := d.Decode(&m.value); err != nil {
			return nil, fmt.Errorf("is not valid JSON: %w", err)
		}
		out = append(out, m)
	}
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("is not valid JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("is followed by more than blanks")
	}
	return out, nil
}

// parseResource reads a flat resource.
func parseResource(at string, data []byte) (*dbcontrollerv1.Resource, error) {
	fields, err := members(data)
	if err != nil {
		return nil, invalid(cmp.Or(at, "body"), "%v", err)
	}
	r := &dbcontrollerv1.Resource{}
	seen := map[string]bool{}
	body := []byte{'{'}
	for _, f := range fields {
		var err error
		switch f.key {
		case "name":
			err = json.Unmarshal(f.value, &r.Name)
		case "etag":
			err = json.Unmarshal(f.value, &r.Etag)
		case "metadata":
			if string(f.value) != "null" {
				r.Metadata = &dbcontrollerv1.Metadata{}
				err = protojson.Unmarshal(f.value, r.Metadata)
			}
		default:
			if len(body) > 1 {
				body = append(body, ',')
			}
			body = append(append(append(body, f.raw...), ':'), f.value...)
			continue
		}
		if err != nil {
			return nil, invalid(under(at, f.key), "%s", plainError(err))
		}
		if seen[f.key] {
			return nil, invalid(under(at, f.key), "occurs twice in one object")
		}
		seen[f.key] = true
	}
	r.Body = string(append(body, '}'))
	return r, nil
}

// plainError is a decoder's error without the marks of its package.
func plainError(err error) string {
	s := strings.ReplaceAll(err.Error(), "\u00a0", " ") // protojson varies its blanks so that nobody depends on its texts
	return strings.TrimSpace(strings.TrimPrefix(strings.TrimPrefix(s, "proto:"), "json:"))
}

// appendResource writes a flat resource.
func appendResource(out []byte, r *dbcontrollerv1.Resource) ([]byte, error) {
	out = append(out, `{"name":`...)
	out = appendString(out, r.GetName())
	if r.GetEtag() != "" {
		out = append(out, `,"etag":`...)
		out = appendString(out, r.GetEtag())
	}
	if r.GetMetadata() != nil {
		out = append(out, `,"metadata":`...)
		var err error
		if out, err = appendMessage(out, r.GetMetadata()); err != nil {
			return nil, fmt.Errorf("encode metadata of %s: %w", r.GetName(), err)
		}
	}
	body := strings.TrimSpace(r.GetBody())
	if len(body) < 2 || body[0] != '{' {
		return append(out, '}'), nil
	}
	if rest := strings.TrimSpace(body[1:]); rest != "}" {
		out = append(append(out, ','), rest...)
	} else {
		out = append(out, '}')
	}
	return out, nil
}

// appendMessage writes a protobuf message in compact JSON, camelCase, 64-bit integers as strings.
func appendMessage(out []byte, m proto.Message) ([]byte, error) {
	b, err := protojson.Marshal(m)
	if err != nil {
		return nil, err
	}
	buf := bytes.NewBuffer(out)
	if err := json.Compact(buf, b); err != nil { // protojson varies its blanks
		return nil, err
	}
	return buf.Bytes(), nil
}

func appendString(out []byte, s string) []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always encodes
	}
	return append(out, b...)
}

func appendResources(out []byte, key string, resources []*dbcontrollerv1.Resource) (_ []byte, err error) {
	out = appendString(out, key)
	out = append(out, ":["...)
	for i, r := range resources {
		if i > 0 {
			out = append(out, ',')
		}
		if out, err = appendResource(out, r); err != nil {
			return nil, err
		}
	}
	return append(out, ']'), nil
}

// appendWatch writes one line of a watch.
func appendWatch(out []byte, res *dbcontrollerv1.WatchResponse) (_ []byte, err error) {
	out = append(out, `{"changes":[`...)
	for i, c := range res.GetChanges() {
		if i > 0 {
			out = append(out, ',')
		}
		if set := c.GetSet(); set != nil {
			out = append(out, `{"set":`...)
			if out, err = appendResource(out, set); err != nil {
				return nil, err
			}
		} else {
			out = append(out, `{"removed":`...)
			out = appendString(out, c.GetRemoved())
		}
		out = append(out, '}')
	}
	out = append(out, ']')
	if res.GetResumeToken() != "" {
		out = append(out, `,"resumeToken":`...)
		out = appendString(out, res.GetResumeToken())
	}
	if res.GetReset_() {
		out = append(out, `,"reset":true`...)
	}
	return append(out, "}\n"...), nil
}

// parseBatch reads {"writes": [{"create": {"resource": {...}}}, {"update": {..., "updateMask": "a,b"}}, {"delete": {"name": ...}}]}.
func parseBatch(data []byte) (*dbcontrollerv1.BatchWriteRequest, error) {
	fields, err := members(data)
	if err != nil {
		return nil, invalid("body", "%v", err)
	}
	var items []json.RawMessage
	for _, f := range fields {
		if f.key != "writes" || items != nil {
			return nil, invalid(f.key, "is not expected here: a batch has one field, writes")
		}
		if err := json.Unmarshal(f.value, &items); err != nil {
			return nil, invalid("writes", "is a list: %s", plainError(err))
		}
	}
	if len(items) > store.MaxBatch {
		return nil, invalid("writes", "has %d entries, want 1 to %d", len(items), store.MaxBatch)
	}
	req := &dbcontrollerv1.BatchWriteRequest{}
	for i, item := range items {
		w, err := parseWrite(fmt.Sprintf("writes[%d]", i), item)
		if err != nil {
			return nil, err
		}
		req.Writes = append(req.Writes, w)
	}
	return req, nil
}

func parseWrite(at string, data []byte) (*dbcontrollerv1.Write, error) {
	fields, err := members(data)
	if err != nil || len(fields) != 1 {
		return nil, invalid(at, "is an object with one field: create, update or delete")
	}
	op := fields[0]
	args, err := members(op.value)
	if err != nil {
		return nil, invalid(under(at, op.key), "%v", err)
	}
	var resource *dbcontrollerv1.Resource
	var a struct {
		name, etag, mask string
		allowMissing     bool
	}
	// into are the fields that an operation has besides the resource.
	into := map[string]map[string]any{
		"create": {},
		"update": {"updateMask": &a.mask, "allowMissing": &a.allowMissing},
		"delete": {"name": &a.name, "etag": &a.etag, "allowMissing": &a.allowMissing},
	}[op.key]
	if into == nil {
		return nil, invalid(at, "is an object with one field: create, update or delete")
	}
	for _, f := range args {
		field := under(at, op.key+"."+f.key)
		target, known := into[camel(f.key)]
		switch {
		case f.key == "resource" && op.key != "delete":
			if resource, err = parseResource(field, f.value); err != nil {
				return nil, err
			}
		case !known:
			return nil, invalid(field, "is not a field of %s", op.key)
		default:
			if err := json.Unmarshal(f.value, target); err != nil {
				return nil, invalid(field, "%s", plainError(err))
			}
		}
	}
	switch op.key {
	case "create":
		return &dbcontrollerv1.Write{Op: &dbcontrollerv1.Write_Create{Create: &dbcontrollerv1.CreateRequest{Resource: resource}}}, nil
	case "update":
		return &dbcontrollerv1.Write{Op: &dbcontrollerv1.Write_Update{Update: &dbcontrollerv1.UpdateRequest{
			Resource: resource, UpdateMask: maskOf(a.mask), AllowMissing: a.allowMissing,
		}}}, nil
	}
	return &dbcontrollerv1.Write{Op: &dbcontrollerv1.Write_Delete{Delete: &dbcontrollerv1.DeleteRequest{
		Name: a.name, Etag: a.etag, AllowMissing: a.allowMissing,
	}}}, nil
}
