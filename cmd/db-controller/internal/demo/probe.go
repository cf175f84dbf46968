package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	probeName  = "sections/db-controller-demo"
	probeEvery = 200 * time.Millisecond
	probePoll  = 2 * time.Millisecond
)

// prober measures from commit to visible: it writes one resource in eu again and again, and asks the databases of the other regions for
// it, with queries of its own. A write does not wait for the one before, so what is slow is measured as slow.
type prober struct {
	world *world

	mu      sync.Mutex
	waiting map[string][]probe // by region, in the order of writing
	took    []time.Duration

	done chan struct{} // closed when run has returned
}

func newProber(w *world) *prober {
	return &prober{world: w, waiting: map[string][]probe{}, done: make(chan struct{})}
}

type probe struct {
	version int64
	written time.Time
}

// run writes probes until writing is done, and returns when they have all arrived, or with ctx.
func (p *prober) run(writing, ctx context.Context) {
	defer close(p.done)
	ctx, cancel := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	for _, name := range Regions[1:] {
		readers.Go(func() { p.watch(ctx, p.world.regions[name]) })
	}
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for n := 1; writing.Err() == nil; n++ {
		version, err := p.write(writing, n)
		now := time.Now()
		if err == nil {
			p.mu.Lock()
			for _, name := range Regions[1:] {
				p.waiting[name] = append(p.waiting[name], probe{version, now})
			}
			p.mu.Unlock()
		}
		select {
		case <-writing.Done():
		case <-tick.C:
		}
	}
	for p.pending() && ctx.Err() == nil {
		_ = sleep(ctx, probePoll) // the loop sees that ctx is done
	}
}

// wait returns when run has returned, or with ctx.
func (p *prober) wait(ctx context.Context) {
	select {
	case <-p.done:
	case <-ctx.Done():
	}
}

func (p *prober) write(ctx context.Context, n int) (int64, error) {
	body := fmt.Appendf(nil, `{"title":"probe %d","multiRegionPolicy":{"enabledRegions":["ap","eu","us"],"defaultControlRegion":"eu"}}`, n)
	answer, err := p.world.regions[Regions[0]].call(ctx, http.MethodPatch, "/"+probeName+"?allow_missing=true", body)
	if err != nil {
		return 0, err
	}
	var r struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(answer, &r); err != nil {
		return 0, err
	}
	return strconv.ParseInt(r.Metadata.ResourceVersion, 10, 64)
}

// watch asks one database while there is something to wait for, the less often the longer it takes already.
func (p *prober) watch(ctx context.Context, r *region) {
	pause := probePoll
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		p.mu.Lock()
		idle := len(p.waiting[r.name]) == 0
		p.mu.Unlock()
		if idle {
			pause = probePoll
			continue
		}
		version, err := r.version(ctx, probeName)
		if err != nil {
			version = 0 // not there yet
		}
		pause = p.seen(r.name, version, time.Now())
	}
}

// seen notes which probes have arrived, and returns when to look again.
func (p *prober) seen(region string, version int64, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	waiting := p.waiting[region]
	for len(waiting) > 0 && waiting[0].version <= version {
		p.took = append(p.took, now.Sub(waiting[0].written))
		waiting = waiting[1:]
	}
	p.waiting[region] = waiting
	if len(waiting) == 0 {
		return probePoll
	}
	return min(max(probePoll, now.Sub(waiting[0].written)/50), 200*time.Millisecond)
}

// pending says whether a probe has not arrived yet.
func (p *prober) pending() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.waiting {
		if len(w) > 0 {
			return true
		}
	}
	return false
}

// percentiles returns the median and the 99th percentile, 0 without any.
func (p *prober) percentiles() (p50, p99 time.Duration) {
	p.mu.Lock()
	took := slices.Clone(p.took)
	p.mu.Unlock()
	if len(took) == 0 {
		return 0, 0
	}
	slices.Sort(took)
	at := func(percent int) time.Duration { return took[(len(took)*percent+99)/100-1] }
	return at(50), at(99)
}

// remove deletes the probe, so that the databases hold only the user's resources.
func (p *prober) remove(ctx context.Context) error {
	return retry(ctx, func() error {
		_, err := p.world.regions[Regions[0]].call(ctx, http.MethodDelete, "/"+probeName+"?allow_missing=true", nil)
		return err
	})
}

// version returns the version of a live row, or pgx.ErrNoRows.
func (r *region) version(ctx context.Context, name string) (v int64, err error) {
	err = r.pool.QueryRow(ctx, "SELECT resource_version FROM "+table+" WHERE name = $1 AND state <> 2", name).Scan(&v)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		err = fmt.Errorf("read %s in %s: %w", name, r.name, err)
	}
	return v, err
}
