package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
)

// Section is the policy holder of all packages here.
const Section = "sections/e2e"

// SetPolicy says in which regions the section lives; eu owns it.
func (c *Cluster) SetPolicy(ctx context.Context, via string, regions ...string) error {
	return c.write(ctx, c.Region(via), map[string]any{"name": Section,
		"multiRegionPolicy": map[string]any{"enabledRegions": regions, "defaultControlRegion": "eu"}})
}

// Fill writes packages [from, to) through the API server of a region.
func (c *Cluster) Fill(ctx context.Context, via string, from, to int) error {
	for from < to {
		n := min(500, to-from)
		batch := make([]map[string]any, n)
		for i := range batch {
			batch[i] = pkg(from+i, "1")
		}
		if err := c.write(ctx, c.Region(via), batch...); err != nil {
			return err
		}
		from += n
	}
	return nil
}

func pkg(n int, version string) map[string]any {
	return map[string]any{"name": fmt.Sprintf("%s/packages/p%05d", Section, n), "version": version, "description": fmt.Sprintf("package %d of the load", n)}
}

// write upserts resources in one transaction.
func (c *Cluster) write(ctx context.Context, via *Region, resources ...map[string]any) error {
	var writes []any
	for _, r := range resources {
		writes = append(writes, map[string]any{"update": map[string]any{"allowMissing": true, "resource": r}})
	}
	body, err := json.Marshal(map[string]any{"writes": writes})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+via.api+"/v1:batchWrite", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("write through %s: %s: %.300s", via.Name, res.Status, answer)
	}
	return nil
}

// Load writes packages at a rate through the API servers of two regions, in turn, and watches some of the writes until they are seen in the target.
type Load struct {
	c      *Cluster
	target *Region
	stop   context.CancelFunc
	done   chan struct{}

	writes, failed atomic.Int64

	mu   sync.Mutex
	seen []time.Duration
	lost []string
}

// Visible is how long a watched write may take before it counts as lost.
const Visible = 2 * time.Minute

// Load starts writers: perSecond updates of packages [0, spread), through the regions via in turn; one in five is watched in target.
func (c *Cluster) Load(ctx context.Context, perSecond, spread int, target string, via ...string) *Load {
	ctx, stop := context.WithCancel(ctx)
	l := &Load{c: c, target: c.Region(target), stop: stop, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		limit := rate.NewLimiter(rate.Limit(perSecond), 1)
		var g errgroup.Group
		g.SetLimit(64)
		for n := 0; limit.Wait(ctx) == nil; n++ {
			g.Go(func() error {
				l.one(ctx, n, spread, via[n%len(via)])
				return nil
			})
		}
		_ = g.Wait()
	}()
	return l
}

func (l *Load) one(ctx context.Context, n, spread int, via string) {
	version := fmt.Sprintf("load-%09d", n)
	resource := pkg(n%spread, version)
	// A write that has begun is ended, and watched, also when the load is told to stop.
	ending := context.WithoutCancel(ctx)
	if err := l.c.write(ending, l.c.Region(via), resource); err != nil {
		l.failed.Add(1)
		return
	}
	committed := time.Now()
	l.writes.Add(1)
	if n%5 != 0 {
		return
	}
	const sql = `SELECT coalesce((SELECT body->>'version' >= $2 FROM v1.resources WHERE name = $1), false)`
	for {
		var there bool
		err := l.target.DB.QueryRow(ending, sql, resource["name"], version).Scan(&there)
		waited := time.Since(committed)
		switch {
		case err == nil && there:
			l.mu.Lock()
			l.seen = append(l.seen, waited)
			l.mu.Unlock()
			return
		case waited > Visible:
			l.mu.Lock()
			l.lost = append(l.lost, fmt.Sprintf("%s %s, committed at %s: %v; %s", resource["name"], version, committed.Format(time.TimeOnly), err, l.c.whereabouts(ending, resource["name"])))
			l.mu.Unlock()
			return
		}
		time.Sleep(max(time.Millisecond, waited/20))
	}
}

// whereabouts says what each region has of a name, as its database tells.
func (c *Cluster) whereabouts(ctx context.Context, name any) string {
	const sql = `SELECT coalesce((SELECT format('%s.%s state %s in %s, version %s', epoch, resource_version, state, regions, body->>'version') FROM v1.resources WHERE name = $1), 'nothing')
		|| coalesce((SELECT '; in quarantine: ' || cause FROM ctl.quarantine WHERE name = $1 LIMIT 1), '')`
	var all []string
	for _, region := range c.Regions() {
		var found string
		if err := c.Region(region).DB.QueryRow(ctx, sql, name).Scan(&found); err != nil {
			found = err.Error()
		}
		all = append(all, region+" has "+found)
	}
	return strings.Join(all, "; ")
}

// Figures are what a load has seen.
type Figures struct {
	Writes, Failed int64
	P50, P99, Max  time.Duration
	Watched        int
}

// Reset forgets what has been seen so far, and returns it.
func (l *Load) Reset() Figures {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := Figures{Writes: l.writes.Swap(0), Failed: l.failed.Swap(0), Watched: len(l.seen)}
	slices.Sort(l.seen)
	if n := len(l.seen); n > 0 {
		f.P50, f.P99, f.Max = l.seen[n/2], l.seen[min(n-1, n*99/100)], l.seen[n-1]
	}
	l.seen = nil
	return f
}

// Stop ends the writers. It is an error if a watched write has not been seen.
func (l *Load) Stop() error {
	l.stop()
	<-l.done
	if len(l.lost) > 0 {
		return fmt.Errorf("%d writes were not seen in %s within %s, the first is %s", len(l.lost), l.target.Name, Visible, l.lost[0])
	}
	return nil
}

const rowsSQL = `SELECT count(*), coalesce(md5(string_agg(md5(ROW(name, uuid, epoch, resource_version, meta, body)::text), '' ORDER BY name)), '')
	FROM v1.resources WHERE state <> 2 AND owning_region = $1 AND (regions @> ARRAY[$2] OR regions @> '{*}')`

// Differences compares what every region holds of every other one with what its owner has, by SQL of its own, and says where they differ.
func (c *Cluster) Differences(ctx context.Context) (differences []string, err error) {
	for _, owner := range c.Regions() {
		for _, holder := range c.Regions() {
			if owner == holder {
				continue
			}
			var want, got struct {
				n    int64
				hash string
			}
			if err := c.Region(owner).DB.QueryRow(ctx, rowsSQL, owner, holder).Scan(&want.n, &want.hash); err != nil {
				return nil, err
			}
			if err := c.Region(holder).DB.QueryRow(ctx, rowsSQL, owner, holder).Scan(&got.n, &got.hash); err != nil {
				return nil, err
			}
			var extra int64
			err := c.Region(holder).DB.QueryRow(ctx, `SELECT count(*) FROM v1.resources WHERE state <> 2 AND owning_region = $1 AND NOT (regions @> ARRAY[$2] OR regions @> '{*}')`,
				owner, holder).Scan(&extra)
			if err != nil && !errors.Is(err, pgx.ErrNoRows) {
				return nil, err
			}
			if want != got || extra != 0 {
				differences = append(differences, fmt.Sprintf("%s in %s: %d rows of %d, %d too much", owner, holder, got.n, want.n, extra))
			}
		}
	}
	return differences, nil
}

// Missing names what a region should hold of another one's and does not, or not at the owner's version.
func (c *Cluster) Missing(ctx context.Context, owner, holder string) (missing []string, err error) {
	held := map[string]string{}
	collect := func(db *pgxpool.Pool, sql string, args []any, each func(name, version string)) error {
		rows, err := db.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		var name, version string
		_, err = pgx.ForEachRow(rows, []any{&name, &version}, func() error {
			each(name, version)
			return nil
		})
		return err
	}
	err = collect(c.Region(holder).DB, `SELECT name, epoch || '.' || resource_version || ' state ' || state FROM v1.resources WHERE owning_region = $1`, []any{owner},
		func(name, version string) { held[name] = version })
	if err != nil {
		return nil, err
	}
	err = collect(c.Region(owner).DB, `SELECT name, epoch || '.' || resource_version || ' state ' || state FROM v1.resources
		WHERE owning_region = $1 AND (regions @> ARRAY[$2] OR regions @> '{*}')`, []any{owner, holder},
		func(name, version string) {
			if held[name] != version {
				missing = append(missing, fmt.Sprintf("%s: %s has %s, %s %s", name, owner, version, holder, held[name]))
			}
		})
	return missing, err
}
