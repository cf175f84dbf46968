package demo

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/syncing"
)

// sample is what the demo sees of the regions at one moment.
type sample struct {
	at      time.Time // of the counts
	regions map[string]counts
	peers   map[string][]syncing.PeerStatus // the product's own view, by region
	applied int64                           // rows that all regions together have applied, as they say
}

// counts are those of one database, by the demo's own query.
type counts struct {
	owned, copies int64
	due           map[string]int64 // of the rows owned here, how many another region must hold
}

// due returns how many copies a region must hold.
func (s *sample) due(region string) (n int64) {
	for _, c := range s.regions {
		n += c.due[region]
	}
	return n
}

// complete says whether every region holds as many copies as it must. Whether they are the right ones, a comparison says.
func (s *sample) complete() bool {
	for name, c := range s.regions {
		if c.copies != s.due(name) {
			return false
		}
	}
	return len(s.regions) == len(Regions)
}

// sampler looks at the regions again and again.
type sampler struct {
	world *world

	mu   sync.Mutex
	last sample
}

func newSampler(w *world) *sampler {
	return &sampler{world: w, last: sample{regions: map[string]counts{}}}
}

// run samples until ctx is done. Counting takes a small part of the time, so that it does not disturb what it watches.
func (s *sampler) run(ctx context.Context) {
	for {
		start := time.Now()
		s.count(ctx)
		select {
		case <-ctx.Done():
			return
		case <-time.After(min(max(200*time.Millisecond, 10*time.Since(start)), 2*time.Second)):
		}
	}
}

func (s *sampler) count(ctx context.Context) {
	at := time.Now()
	regions := map[string]counts{}
	for _, name := range Regions {
		if c, err := s.world.regions[name].count(ctx); err == nil {
			regions[name] = c
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.Copy(s.last.regions, regions) // of a database that does not answer, the last ones stay
	s.last.at = at
}

// now returns the last counts with the present clocks.
func (s *sampler) now() sample {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.last
	now.regions = maps.Clone(now.regions)
	now.peers = map[string][]syncing.PeerStatus{}
	for _, name := range Regions {
		for _, d := range s.world.regions[name].fleet.Status() {
			now.peers[name] = d.Peers
			for _, p := range d.Peers {
				now.applied += p.RowsApplied
			}
		}
	}
	return now
}

func (r *region) count(ctx context.Context) (counts, error) {
	c := counts{due: map[string]int64{}}
	var due [3]int64
	err := r.pool.QueryRow(ctx, `SELECT count(*) FILTER (WHERE own), count(*) FILTER (WHERE NOT own),
		count(*) FILTER (WHERE own AND (regions @> ARRAY[$2] OR regions @> ARRAY['*'])),
		count(*) FILTER (WHERE own AND (regions @> ARRAY[$3] OR regions @> ARRAY['*'])),
		count(*) FILTER (WHERE own AND (regions @> ARRAY[$4] OR regions @> ARRAY['*']))
		FROM (SELECT owning_region = $1 AS own, regions FROM `+table+` WHERE state <> 2) AS x`,
		r.name, Regions[0], Regions[1], Regions[2]).Scan(&c.owned, &c.copies, &due[0], &due[1], &due[2])
	for i, name := range Regions {
		if name != r.name {
			c.due[name] = due[i]
		}
	}
	return c, err
}
