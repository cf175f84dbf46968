package redis

import (
	"context"
	"strings"

	"github.com/dbcontroller/db-controller/search"
)

// Drop deletes all keys and indexes of a Deployment from the server, in all API versions.
func Drop(ctx context.Context, cfg Config) error {
	s, err := Open(cfg)
	if err != nil {
		return err
	}
	defer s.Close()
	// Of all versions: the prefix up to the version, whatever it is.
	prefix, ok := strings.CutSuffix(s.prefix, cfg.Version+"}:")
	if !ok {
		panic("search keys do not carry the version")
	}
	if err := s.dropIndexes(ctx, prefix); err != nil { // first, or they follow each deletion
		return search.Unavailable(err, "be dropped")
	}
	keys := s.client.Scan(ctx, 0, escapeGlob(prefix)+"*", 1000).Iterator()
	var found []string
	flush := func() error {
		if len(found) == 0 {
			return nil
		}
		err := s.client.Unlink(ctx, found...).Err()
		found = found[:0]
		return err
	}
	for keys.Next(ctx) {
		if found = append(found, keys.Val()); len(found) == 1000 {
			if err := flush(); err != nil {
				return search.Unavailable(err, "be dropped")
			}
		}
	}
	if err := keys.Err(); err != nil {
		return search.Unavailable(err, "be dropped")
	}
	if err := flush(); err != nil {
		return search.Unavailable(err, "be dropped")
	}
	return nil
}

// escapeGlob makes a pattern that matches the text alone.
func escapeGlob(text string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(text)
}
