package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// MaskAll says whether mask replaces the whole resource.
func MaskAll(mask []string) bool {
	return len(mask) == 0 || slices.Equal(mask, []string{"*"})
}

// ApplyMask returns w as a write of the whole resource: old with the masked fields taken from w. A masked field that w does not have is
// removed. The error names the path that cannot be applied.
func ApplyMask(old *Resource, w Write) (Write, error) {
	if MaskAll(w.Mask) {
		return w, nil
	}
	var to, from map[string]any
	if err := decodeObject(old.Body, &to); err != nil {
		return Write{}, fmt.Errorf("stored body of %s: %w", old.Name, err)
	}
	if err := decodeObject(w.Body, &from); err != nil {
		return Write{}, Invalid("body", "is not a JSON object")
	}
	meta := old.Meta
	touched := false
	for i, path := range w.Mask {
		field := fmt.Sprintf("update_mask.paths[%d]", i)
		switch path {
		case "metadata.labels":
			meta.Labels = w.Meta.Labels
			continue
		case "metadata.annotations":
			meta.Annotations = w.Meta.Annotations
			continue
		case "metadata.tags":
			meta.Tags = w.Meta.Tags
			continue
		case "metadata.ownerReferences", "metadata.owner_references":
			meta.OwnerReferences = w.Meta.OwnerReferences
			continue
		}
		if path == "name" || path == "metadata" || strings.HasPrefix(path, "metadata.") {
			return Write{}, Invalid(field, fmt.Sprintf("%q cannot be written: use body fields, metadata.labels, metadata.annotations, metadata.tags or metadata.ownerReferences", path))
		}
		if err := copyPath(to, from, strings.Split(path, ".")); err != nil {
			return Write{}, Invalid(field, fmt.Sprintf("%q: %v", path, err))
		}
		touched = true
	}
	w.Meta, w.Mask = meta, nil
	w.Body = old.Body
	if touched {
		body, err := json.Marshal(to)
		if err != nil {
			return Write{}, fmt.Errorf("merge body of %s: %w", old.Name, err)
		}
		w.Body = body
	}
	return w, nil
}

// Unmask turns masked writes into writes of whole resources, as r has them now. Such a write holds only while the resource stays as it was read:
// outdated reports whether a later refusal says no more than that, so that the writes are to be unmasked again and repeated. A masked Save of what
// does not exist creates it; an Update of that fails with NotFound.
func Unmask(ctx context.Context, r Reader, writes []Write) (whole []Write, outdated func(error) bool, err error) {
	var names []string
	for _, w := range writes {
		if masked(w) {
			names = append(names, w.Name)
		}
	}
	if names == nil {
		return writes, func(error) bool { return false }, nil
	}
	stored, err := r.BatchGet(ctx, names)
	if err != nil {
		return nil, nil, err
	}
	ours := map[string]bool{} // what the write demands of the stored resource, we demand and not the caller
	whole = make([]Write, len(writes))
	for i, w := range writes {
		if !masked(w) {
			whole[i] = w
			continue
		}
		old := stored[0]
		stored = stored[1:]
		asked := w.IfVersion != (Version{})
		switch {
		case old == nil && w.Op == Update && !asked:
			return nil, nil, Errorf(NotFound, w.Name, "does not exist")
		case old == nil && asked: // refused for that
		case old == nil:
			w.Op, w.Mask = Create, nil
			ours[w.Name] = true
		default:
			if w, err = ApplyMask(old, w); err != nil {
				return nil, nil, err
			}
			if !asked {
				w.IfVersion = old.Version
				ours[w.Name] = true
			}
		}
		whole[i] = w
	}
	return whole, func(err error) bool {
		var e *Error
		return errors.As(err, &e) && (e.Code == Aborted || e.Code == AlreadyExists) && ours[e.Name]
	}, nil
}

func masked(w Write) bool {
	return (w.Op == Update || w.Op == Save) && !MaskAll(w.Mask)
}

// decodeObject keeps numbers as they are written.
func decodeObject(body json.RawMessage, into *map[string]any) error {
	if len(body) == 0 {
		*into = map[string]any{}
		return nil
	}
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.UseNumber()
	return d.Decode(into)
}

func copyPath(to, from map[string]any, path []string) error {
	for len(path) > 1 {
		if path[0] == "" || path[0] == "*" {
			return fmt.Errorf("is not a path of field names")
		}
		next, exists := from[path[0]]
		sub, isObject := next.(map[string]any)
		if exists && !isObject {
			return fmt.Errorf("%s is not an object", path[0])
		}
		dest, isObject := to[path[0]].(map[string]any)
		if !isObject {
			if _, occupied := to[path[0]]; occupied && exists {
				return fmt.Errorf("%s is not an object in the stored resource: mask it whole", path[0])
			}
			if sub == nil {
				return nil // nothing to set, nothing to remove
			}
			dest = map[string]any{}
			to[path[0]] = dest
		}
		to, from, path = dest, sub, path[1:]
	}
	if path[0] == "" || path[0] == "*" {
		return fmt.Errorf("is not a path of field names")
	}
	if v, ok := from[path[0]]; ok {
		to[path[0]] = v
	} else {
		delete(to, path[0])
	}
	return nil
}
