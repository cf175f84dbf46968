package demo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// A transaction is a request, which may have 4 MiB; a circle of references may need a large one.
var loadLimits = limits{rows: 250, bytes: 1 << 20, cycleRows: 1000, cycleBytes: maxLine, inFlight: 2}

// loader writes the input through a region's API server: many resources in one transaction, several transactions in flight.
type loader struct {
	world  *world
	region *region
	input  *input
	order  *order

	rows    atomic.Int64 // written
	updated atomic.Int64 // written again
}

// load writes the whole input in the planned order.
func (l *loader) load(ctx context.Context) error {
	if err := l.run(ctx, l.order.writes, &l.rows); err != nil {
		return err
	}
	return l.run(ctx, l.order.updates, &l.updated)
}

// run makes transactions. Each one is sent when those that it needs are committed and, so that the order keeps its sense, those before it are sent.
func (l *loader) run(ctx context.Context, steps []step, count *atomic.Int64) error {
	writes, ctx := errgroup.WithContext(ctx)
	writes.SetLimit(loadLimits.inFlight)
	committed := make([]chan struct{}, len(steps))
	for i, s := range steps {
		for _, need := range s.needs {
			select {
			case <-committed[need]:
			case <-ctx.Done():
				return cmp.Or(writes.Wait(), ctx.Err())
			}
		}
		committed[i] = make(chan struct{})
		writes.Go(func() error {
			defer close(committed[i])
			if err := l.write(ctx, s); err != nil {
				return err
			}
			count.Add(int64(len(s.rows)))
			return l.waitFor(ctx, s)
		})
	}
	return writes.Wait()
}

// waitFor returns when the regions that are in control of what the policy holders of a step govern know them: before, they would refuse what is forwarded
// to them.
func (l *loader) waitFor(ctx context.Context, s step) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, n := range s.rows {
		name, r := l.input.nodes[n].name, l.world.regions[l.input.nodes[n].controls]
		if r == nil || r == l.region {
			continue
		}
		for {
			_, err := r.version(ctx, name)
			if err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("wait for the copy of %s in %s: %w", name, r.name, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// write makes one transaction. It may be repeated: it makes the resources what the lines say, whatever they were.
func (l *loader) write(ctx context.Context, s step) error {
	body := []byte(`{"writes":[`)
	for i, n := range s.rows {
		if i > 0 {
			body = append(body, ',')
		}
		line, err := l.input.line(n, s.without[n])
		if err != nil {
			return err
		}
		body = append(append(append(body, `{"update":{"allowMissing":true,"resource":`...), line...), "}}"...)
	}
	body = append(body, "]}"...)
	err := retry(ctx, func() error {
		_, err := l.region.call(ctx, http.MethodPost, ":batchWrite", body)
		return err
	})
	if err != nil {
		return l.input.about(s.rows, err)
	}
	return nil
}

// retry repeats what can be repeated for a minute.
func retry(ctx context.Context, call func() error) error {
	deadline := time.Now().Add(time.Minute)
	for pause := 50 * time.Millisecond; ; pause *= 2 {
		err := call()
		if e, ok := errors.AsType[*callError](err); !ok || !e.retry || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// messageOf returns what an error of the API server says.
func messageOf(answer []byte) string {
	var e struct {
		Error struct {
			Message string `json:"message"`
			Details []struct {
				FieldViolations []struct {
					Field       string `json:"field"`
					Description string `json:"description"`
				} `json:"fieldViolations"`
			} `json:"details"`
		} `json:"error"`
	}
	if err := json.Unmarshal(answer, &e); err != nil || e.Error.Message == "" {
		return string(answer[:min(len(answer), 200)])
	}
	text := e.Error.Message
	for _, d := range e.Error.Details {
		for _, v := range d.FieldViolations {
			if !strings.Contains(text, v.Field) {
				text += fmt.Sprintf("; %s: %s", v.Field, v.Description)
			}
		}
	}
	return text
}

// builtIn is a small data set whose sections live in different regions and are controlled by different ones.
var builtIn = []struct {
	section, control string
	regions          []string
}{
	{"admin", "eu", []string{"ap", "eu", "us"}},
	{"libs", "eu", []string{"eu", "us"}},
	{"web", "us", []string{"ap", "us"}},
	{"games", "ap", []string{"ap", "eu", "us"}},
}

const builtInPackages = 25 // per section

// builtInSources are two sources with packages in several regions. One cannot be deleted, because the dashboard depends on it; the other can, and the
// dashboard and a package of another region then recommend it no longer.
var builtInSources = []string{
	`{"name":"sections/admin/packages/dashboard","version":"1","depends":["sections/libs/packages/engine"],"recommends":["sections/libs/packages/puzzle-solver"]}`,
	`{"name":"sections/web/packages/portal","version":"1","suggests":["sections/libs/packages/puzzle-solver"]}`,
	`{"name":"sections/libs/packages/engine","version":"1","source":"sources/engine","recommends":["sections/games/packages/engine-data"]}`,
	`{"name":"sections/games/packages/engine-data","version":"1","source":"sources/engine"}`,
	`{"name":"sections/libs/packages/puzzle-solver","version":"1","source":"sources/puzzle"}`,
	`{"name":"sections/games/packages/puzzle","version":"1","source":"sources/puzzle"}`,
	`{"name":"sources/engine","title":"engine"}`,
	`{"name":"sources/puzzle","title":"puzzle"}`,
}

// builtInData returns the data set as lines.
func builtInData() []byte {
	var out bytes.Buffer
	for _, s := range builtIn {
		regions, _ := json.Marshal(s.regions) // strings always encode
		fmt.Fprintf(&out, `{"name":"sections/%s","title":"%s","multiRegionPolicy":{"enabledRegions":%s,"defaultControlRegion":"%s"}}`+"\n", s.section, s.section, regions, s.control)
	}
	for _, s := range builtIn {
		for i := range builtInPackages {
			fmt.Fprintf(&out, `{"name":"sections/%s/packages/p%02d","version":"1"}`+"\n", s.section, i)
		}
	}
	for _, line := range builtInSources {
		fmt.Fprintln(&out, line)
	}
	return out.Bytes()
}

// synthetic updates random packages of the data set, rate times a second, each through the API server of the region that owns it.
type synthetic struct {
	world  *world
	writes atomic.Int64
	failed atomic.Int64
	paused atomic.Bool
}

// run writes until ctx is done.
func (s *synthetic) run(ctx context.Context, rate int) {
	const writers = 8
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	var g errgroup.Group
	for range writers {
		g.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case <-tick.C:
				}
				if s.paused.Load() {
					continue
				}
				in := builtIn[rand.IntN(len(builtIn))]
				path := fmt.Sprintf("/sections/%s/packages/p%02d", in.section, rand.IntN(builtInPackages))
				_, err := s.world.regions[in.control].call(ctx, http.MethodPatch, path, fmt.Appendf(nil, `{"version":"%d"}`, s.writes.Add(1)))
				if err != nil && ctx.Err() == nil {
					s.failed.Add(1)
				}
			}
		})
	}
	_ = g.Wait() // no writer fails
}
