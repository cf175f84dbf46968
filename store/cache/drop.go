package cache

import (
	"context"
	"errors"
	"fmt"

	"github.com/redis/go-redis/v9"
)

// Drop deletes what is cached for an identity (Config.Identity).
func Drop(ctx context.Context, url, identity string) error {
	o, err := redis.ParseURL(url)
	if err != nil {
		return errors.New("empty the cache: the URL cannot be parsed: use redis://user:password@host:6379/0") // err repeats parts of the URL
	}
	o.DisableIdentity = true
	client := redis.NewClient(o)
	defer func() { _ = client.Close() }()
	run, err := runOf(ctx, client)
	if err != nil {
		return fmt.Errorf("empty the cache: %w", err)
	}
	keys := client.Scan(ctx, 0, prefixOf(identity, run)+"*", 1000).Iterator()
	for keys.Next(ctx) {
		if err := client.Unlink(ctx, keys.Val()).Err(); err != nil {
			return fmt.Errorf("empty the cache: %w", err)
		}
	}
	if err := keys.Err(); err != nil {
		return fmt.Errorf("empty the cache: %w", err)
	}
	return nil
}
