package chaos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/syncing"
)

// long says that tests take the full length of what they promise: DBC_LONG=1.
func long() bool { return os.Getenv("DBC_LONG") != "" }

// beat is one write of a heartbeat: its value, which is its time, and when it was acknowledged.
type beat struct{ value, acked int64 }

// heart writes the time into a row again and again, so that anybody can see how old a copy is.
type heart struct {
	name string
	mu   sync.Mutex
	told []beat // in order
}

// run beats until ctx is done. A write whose outcome is not known promises nothing, and is tried again with a new time.
func (h *heart) run(ctx context.Context, p *place, every time.Duration) {
	for ctx.Err() == nil {
		if st := p.store(); st != nil {
			call, cancel := context.WithTimeout(ctx, 5*time.Second)
			b := beat{value: time.Now().UnixNano()}
			_, err := store.Apply(call, st, store.Write{Op: store.Save, Name: h.name, Body: fmt.Appendf(nil, `{"value":"%d"}`, b.value)})
			cancel()
			if b.acked = time.Now().UnixNano(); err == nil {
				h.mu.Lock()
				h.told = append(h.told, b)
				h.mu.Unlock()
			}
		}
		time.Sleep(every) // the rhythm
	}
}

// by returns the last beat that was acknowledged by t; 0 without one.
func (h *heart) by(t int64) int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	n, _ := slices.BinarySearchFunc(h.told, t+1, func(b beat, t int64) int { return cmp.Compare(b.acked, t) })
	if n == 0 {
		return 0
	}
	return h.told[n-1].value
}

// heard reads heartbeats from one region's database, past the product.
type heard struct {
	p    *place
	name string
	conn *pgx.Conn
}

// value is that of the copy; an error says that the database does not answer, or has none.
func (h *heard) value(ctx context.Context) (int64, error) {
	if h.conn == nil || h.conn.IsClosed() {
		c, err := pgx.Connect(ctx, h.p.pg.DSN(h.p.name))
		if err != nil {
			return 0, err
		}
		h.conn = c
	}
	var text string
	if err := h.conn.QueryRow(ctx, "SELECT body->>'value' FROM v1.resources WHERE name = $1 AND state <> 2", h.name).Scan(&text); err != nil {
		return 0, err
	}
	return strconv.ParseInt(text, 10, 64)
}

func (h *heard) close() {
	if h.conn != nil {
		_ = h.conn.Close(context.Background())
	}
}

func (w *world) settled(limit time.Duration) {
	w.t.Helper()
	var left []string
	err := retry(w.t.Context(), limit, func() (err error) {
		if left, _, err = w.differences(w.t.Context()); err == nil && len(left) > 0 {
			err = fmt.Errorf("%d differences", len(left))
		}
		return err
	})
	if err != nil {
		w.t.Fatalf("not settled: %v, for example:\n%s", err, strings.Join(left[:min(10, len(left))], "\n"))
	}
}

func raise(v *atomic.Int64, to int64) {
	for {
		was := v.Load()
		if to <= was || v.CompareAndSwap(was, to) {
			return
		}
	}
}

// follows is how well p says it follows a region.
func (p *place) follows(region string) syncing.PeerStatus {
	p.mu.Lock()
	d := p.open
	p.mu.Unlock()
	if d != nil {
		for _, s := range d.Peers() {
			if s.Region == region {
				return s
			}
		}
	}
	return syncing.PeerStatus{}
}

// TestStatusIsNeverOptimistic (P24): whatever happens to links, processes and databases, a copy holds everything that was acknowledged before the time as of which it says it is. At least
// 1,500 samples by default, 10,000 with DBC_LONG=1.
func TestStatusIsNeverOptimistic(t *testing.T) {
	const tick = 50 * time.Millisecond // what a clock that is measured through a jittering link may be wrong by
	want := 1500
	if long() {
		want = 10_000
	}
	s := cmp.Or(*seed, uint64(time.Now().UnixNano()))
	t.Logf("seed %d (repeat with -seed %d)", s, s)
	w := newWorld(t)
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	eu := w.places["eu"]
	_, err := store.Apply(ctx, eu.store(), folder("all", regions...))
	check(t, err)
	h := &heart{name: "folders/all/regions/eu/sites/heart"}
	all.Go(func() { h.run(ctx, eu, 5*time.Millisecond) })

	var samples, live, stale, worst atomic.Int64
	for _, r := range []string{"ap", "us"} {
		p := w.places[r]
		all.Go(func() {
			copies := &heard{p: p, name: h.name}
			defer copies.close()
			for ctx.Err() == nil {
				time.Sleep(10 * time.Millisecond) // the rhythm of the samples
				asked := time.Now()
				said := p.follows("eu")
				has, err := copies.value(ctx) // later than the status: never less than it was then
				if said.Freshness == nil || err != nil && !errors.Is(err, pgx.ErrNoRows) {
					continue
				}
				samples.Add(1)
				if said.State == syncing.Live {
					live.Add(1)
				}
				if *said.Freshness > time.Second {
					stale.Add(1)
				}
				raise(&worst, int64(*said.Freshness))
				asOf := asked.Add(-*said.Freshness - tick)
				if must := h.by(asOf.UnixNano()); must > has {
					t.Errorf("%s says %s and as of %v ago, but lacks a write that was acknowledged %v before that: it is as of %v ago", r, said.State, *said.Freshness,
						time.Duration(asOf.UnixNano()-must), time.Duration(asked.UnixNano()-has))
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(s, 7))
	fired := map[string]int{}
	for round := 0; round < 4 || int(samples.Load()) < want; round++ {
		for _, p := range w.places { // links that are slow and uneven
			for _, l := range p.links {
				l.SetLatency(time.Duration(rng.IntN(20))*time.Millisecond, time.Duration(rng.IntN(20))*time.Millisecond)
			}
		}
		for f, n := range w.nemesis(ctx, rng, time.Now().Add(4*time.Second)) {
			fired[f] += n
		}
		time.Sleep(time.Second) // without a fault
		if t.Failed() || round > 100 {
			break
		}
	}
	stop()
	all.Wait()
	t.Logf("%d samples, %d of them Live, %d more than a second old, the worst %v; faults: %v", samples.Load(), live.Load(), stale.Load(), time.Duration(worst.Load()), fired)
	if live.Load() == 0 || stale.Load() == 0 {
		t.Error("the run shows nothing: it needs samples of copies that follow, and of some that do not")
	}
}
