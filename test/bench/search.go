package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	goredis "github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/search"
	searchpostgres "github.com/dbcontroller/db-controller/search/postgres"
	searchredis "github.com/dbcontroller/db-controller/search/redis"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
	"github.com/dbcontroller/db-controller/syncing"
)

// searchSchema says what of the items is searched.
func searchSchema() (*descriptor.Version, error) {
	s, err := descriptor.Compile(&v1alpha1.ServiceDescriptorSpec{
		Service: service, MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{sourceRegion}, DefaultControlRegion: sourceRegion},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{{
			Type: "Item", Plural: "items", Patterns: []string{"items/{item}"},
			Search: &v1alpha1.ResourceSearch{
				Fields:  []v1alpha1.SearchField{{Path: "name", Weight: "A"}, {Path: "displayName", Weight: "A"}, {Path: "description", Weight: "B"}},
				Filters: []v1alpha1.SearchFilter{{Path: "priority", Type: v1alpha1.SearchNumber}, {Path: "enabled", Type: v1alpha1.SearchBoolean}, {Path: "maintainer", Type: v1alpha1.SearchString}},
			},
		}}}},
	})
	if err != nil {
		return nil, err
	}
	return s.Version("v1"), nil
}

// searchRace is one kind of search stores against its own bulk loader.
type searchRace struct {
	open func(context.Context) (search.Store, error)
	// load does by hand what is least: it writes the documents, as they are, into an empty store.
	load func(context.Context, []search.Document) error
	// bare is load without the index of exact filters, to know what that costs; nil where there is no such difference.
	bare func(context.Context, []search.Document) error
}

// searchWay is one of the ways that take turns.
type searchWay struct {
	name   string
	fill   func() (time.Duration, error)
	speeds []float64
}

// searchPostgres measures how fast an empty search database is filled. The rival COPYs the same documents into a table with the same generated tsvector, indexes and
// keys; that reads no database, compares nothing and could not be continued.
func searchPostgres(ctx context.Context, opt options) (result, error) {
	return searchFill(ctx, opt, 100_000, "rows/s of filling a search database, against COPY", func(w *world) (searchRace, func() error, error) {
		const db = "search"
		if err := w.dest.CreateDatabase(ctx, db); err != nil {
			return searchRace{}, nil, err
		}
		dsn := w.dest.DSN(db)
		conn, err := pgx.Connect(ctx, dsn)
		if err != nil {
			return searchRace{}, nil, err
		}
		load := func(filters string) func(context.Context, []search.Document) error {
			return func(ctx context.Context, docs []search.Document) error {
				_, err := conn.Exec(ctx, `DROP TABLE IF EXISTS plain; CREATE TABLE plain (name text COLLATE "C" PRIMARY KEY, type text, a text, b text, body jsonb, shard int,
					tsv tsvector GENERATED ALWAYS AS (setweight(to_tsvector('english', a), 'A') || setweight(to_tsvector('english', b), 'B')) STORED);
					CREATE INDEX ON plain USING gin (tsv); CREATE INDEX ON plain (shard); CREATE INDEX ON plain (type);`+filters, pgx.QueryExecModeSimpleProtocol)
				if err != nil {
					return err
				}
				_, err = conn.CopyFrom(ctx, pgx.Identifier{"plain"}, []string{"name", "type", "a", "b", "body", "shard"}, pgx.CopyFromSlice(len(docs), func(i int) ([]any, error) {
					d := docs[i]
					return []any{d.Name, d.Type, d.Texts[0] + " " + d.Texts[1], d.Texts[2], d.Values, d.Shard}, nil
				}))
				return err
			}
		}
		return searchRace{
			load: load("CREATE INDEX ON plain USING gin (body jsonb_path_ops)"),
			bare: load(""),
			open: func(ctx context.Context) (search.Store, error) {
				if _, err := conn.Exec(ctx, "DROP SCHEMA IF EXISTS search_v1 CASCADE"); err != nil {
					return nil, err
				}
				return searchpostgres.Open(ctx, searchpostgres.Config{DSN: dsn, Service: service, Region: sourceRegion, Version: "v1"})
			},
		}, func() error { return conn.Close(context.WithoutCancel(ctx)) }, nil
	})
}

// searchRedis is the same for Redis. The rival pipelines one HSET for each document, with no index.
func searchRedis(ctx context.Context, opt options) (result, error) {
	return searchFill(ctx, opt, 100_000, "rows/s of filling a Redis with indexes, against pipelined HSET without", func(*world) (searchRace, func() error, error) {
		server, err := redisserver.Start(ctx, nil)
		if err != nil {
			return searchRace{}, nil, err
		}
		o, err := goredis.ParseURL(server.URL())
		if err != nil {
			return searchRace{}, nil, errors.Join(err, server.Stop())
		}
		client := goredis.NewClient(o)
		return searchRace{
			open: func(ctx context.Context) (search.Store, error) {
				if err := client.FlushAll(ctx).Err(); err != nil {
					return nil, err
				}
				return searchredis.Open(searchredis.Config{URL: server.URL(), Service: service, Region: sourceRegion, Version: "v1", Ring: ring})
			},
			load: func(ctx context.Context, docs []search.Document) error {
				if err := client.FlushAll(ctx).Err(); err != nil {
					return err
				}
				for len(docs) > 0 {
					n := min(len(docs), 500)
					_, err := client.Pipelined(ctx, func(p goredis.Pipeliner) error {
						for _, d := range docs[:n] {
							p.HSet(ctx, d.Name, "type", d.Type, "a", d.Texts[0]+" "+d.Texts[1], "b", d.Texts[2], "values", string(d.Values), "version", d.Version.Number)
						}
						return nil
					})
					if err != nil {
						return err
					}
					docs = docs[n:]
				}
				return nil
			},
		}, func() error { return errors.Join(client.Close(), server.Stop()) }, nil
	})
}

func searchFill(ctx context.Context, opt options, rows int, unit string, prepare func(*world) (searchRace, func() error, error)) (res result, err error) {
	rows = cmp.Or(opt.rows, rows)
	version, err := searchSchema()
	if err != nil {
		return res, err
	}
	w, err := newWorld(ctx, opt)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := seed(ctx, w.sourceConn, rows); err != nil {
		return res, err
	}
	if _, err := w.sourceConn.Exec(ctx, "VACUUM ANALYZE v1.resources"); err != nil {
		return res, err
	}
	st, err := postgres.Open(ctx, postgres.Config{DSN: w.source.DSN(w.sourceDB), Service: service, Region: sourceRegion, Version: "v1", Ring: ring, Logger: quiet})
	if err != nil {
		return res, err
	}
	defer st.Close()
	race, end, err := prepare(w)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, end()) }()
	docs, err := searchDocuments(ctx, w.sourceConn, version, rows)
	if err != nil {
		return res, err
	}
	plain := func(load func(context.Context, []search.Document) error) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			began := time.Now()
			err := load(ctx, docs)
			return time.Since(began), err
		}
	}
	ways := []*searchWay{
		{name: "ours", fill: func() (time.Duration, error) { return fillSearch(ctx, opt, st, race, version, rows) }},
		{name: "plain", fill: plain(race.load)},
	}
	if race.bare != nil {
		ways = append(ways, &searchWay{name: "bare", fill: plain(race.bare)})
	}
	for run := range opt.runs {
		for i := range ways {
			way := ways[(run+i)%len(ways)]
			took, err := way.fill()
			if err != nil {
				return res, fmt.Errorf("%s: %w", way.name, err)
			}
			speed := float64(rows) / took.Seconds()
			way.speeds = append(way.speeds, speed)
			fmt.Fprintf(opt.out, "run %d  %-6s  %8.2f s  %8.0f rows/s  %s\n", run+1, way.name, took.Seconds(), speed, load())
		}
	}
	ours, theirs := median(ways[0].speeds), median(ways[1].speeds)
	if race.bare != nil {
		fmt.Fprintf(opt.out, "the index of exact filters leaves COPY %.2f of its speed\n", theirs/median(ways[2].speeds))
	}
	return faster(ours, theirs, unit), nil
}

// fillSearch runs a node on an empty store until that is live, and proves that nothing is missing.
func fillSearch(ctx context.Context, opt options, st *postgres.Store, race searchRace, version *descriptor.Version, rows int) (took time.Duration, err error) {
	s, err := race.open(ctx)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	node, err := syncing.NewLocalNode(syncing.LocalConfig{
		Service: service, Region: sourceRegion, Ring: ring, MaxShardsPerNode: opt.maxShardsPerNode, Source: st, Search: s,
		Schema: func() *descriptor.Version { return version }, AuditInterval: -1, Logger: quiet,
	})
	if err != nil {
		return 0, err
	}
	all := feed.Range{To: ring}
	if err := node.UpdateShardRange(ctx, all); err != nil {
		return 0, err
	}
	nctx, cancel := context.WithCancel(ctx)
	g, nctx := errgroup.WithContext(nctx)
	began := time.Now()
	g.Go(func() error { return node.Run(nctx) })
	defer func() {
		cancel()
		err = errors.Join(err, g.Wait())
	}()
	for node.Status().State != syncing.Live {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	took = time.Since(began)
	digests, err := s.Digests(ctx, all, search.TypesOf(version))
	if err != nil {
		return 0, err
	}
	var held int64
	for _, d := range digests {
		held += d.Count
	}
	if held != int64(rows+markers) {
		return 0, fmt.Errorf("%d documents of %d rows", held, rows+markers)
	}
	return took, nil
}

func searchDocuments(ctx context.Context, c *pgx.Conn, v *descriptor.Version, rows int) ([]search.Document, error) {
	found, err := c.Query(ctx, "SELECT name, uuid::text, shard, body FROM v1.resources WHERE name < 'items/marker' ORDER BY name LIMIT $1", rows)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(found, func(row pgx.CollectableRow) (search.Document, error) {
		r := &store.Resource{Type: "Item", Version: store.Version{Epoch: 1, Number: 1}}
		if err := row.Scan(&r.Name, &r.UUID, &r.Shard, &r.Body); err != nil {
			return search.Document{}, err
		}
		return search.DocumentOf(v.Type("Item"), r)
	})
}
