package store

import (
	"encoding/json"
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
