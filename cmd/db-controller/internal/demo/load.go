package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	batchRows  = 250
	batchBytes = 1 << 20 // a request may have 4 MiB
	inFlight   = 2
	maxLine    = 3 << 20
)

// loader writes a stream of resources through a region's API server: many in one transaction, several transactions in flight. A transaction has
// one policy holder, and policy holders are written before what they govern.
type loader struct {
	world  *world
	region *region

	rows atomic.Int64 // written
	read atomic.Int64 // bytes of the input
}

// batch is a number of lines for one transaction.
type batch struct {
	lines       [][]byte
	bytes       int
	first, last int // line numbers
}

// load writes all resources of in, one JSON object per line.
func (l *loader) load(ctx context.Context, in io.Reader) error {
	writes, wctx := errgroup.WithContext(ctx)
	writes.SetLimit(inFlight)
	open := map[string]*batch{} // by policy holder
	send := func(holder string) {
		b := open[holder]
		delete(open, holder)
		ctx := wctx // the next barrier replaces it
		writes.Go(func() error { return l.write(ctx, b) })
	}
	barrier := func() error {
		for holder := range open {
			send(holder)
		}
		err := writes.Wait()
		writes, wctx = errgroup.WithContext(ctx)
		writes.SetLimit(inFlight)
		return err
	}

	schema := l.world.schema()
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 64<<10), maxLine)
	var holders []holder // written since the last barrier
	for number := 1; lines.Scan() && wctx.Err() == nil; number++ {
		line := bytes.Clone(bytes.TrimSpace(lines.Bytes()))
		l.read.Add(int64(len(lines.Bytes()) + 1))
		if len(line) == 0 {
			continue
		}
		var head struct {
			Name string `json:"name"`
		}
		if err := json.Unmarshal(line, &head); err != nil {
			return errors.Join(fmt.Errorf("line %d: is not a JSON object: %w", number, err), writes.Wait())
		}
		name, err := schema.ParseName(head.Name)
		if err != nil {
			return errors.Join(fmt.Errorf("line %d: name: %w", number, err), writes.Wait())
		}
		if isHolder := name.Type.IsPolicyHolder(); isHolder != (len(holders) > 0) {
			if err := barrier(); err != nil {
				return err
			}
			if err := l.waitFor(ctx, holders); err != nil {
				return err
			}
			holders = nil
		}
		if name.Type.IsPolicyHolder() {
			policy, _ := name.Type.PolicyOf(line) // its faults are the server's to report
			h := holder{name: head.Name}
			if policy != nil {
				h.region = policy.DefaultControlRegion()
			}
			holders = append(holders, h)
		}
		key := name.HolderName()
		b := open[key]
		if b == nil {
			b = &batch{first: number}
			open[key] = b
		}
		b.lines, b.bytes, b.last = append(b.lines, line), b.bytes+len(line), number
		if len(b.lines) == batchRows || b.bytes > batchBytes {
			send(key)
		}
	}
	if err := lines.Err(); err != nil {
		return errors.Join(fmt.Errorf("read: %w (a line may have %d bytes)", err, maxLine), barrier())
	}
	return barrier()
}

// holder is a policy holder and the region that its policy puts in control.
type holder struct{ name, region string }

// waitFor returns when the regions that control what the holders govern know them: before, they would refuse what is forwarded to them.
func (l *loader) waitFor(ctx context.Context, holders []holder) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, h := range holders {
		r := l.world.regions[h.region]
		if r == nil || r == l.region {
			continue
		}
		for {
			_, err := r.version(ctx, h.name)
			if err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("wait for the copy of %s in %s: %w", h.name, h.region, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// write applies one batch. It may be repeated: it makes the resources what the lines say, whatever they were.
func (l *loader) write(ctx context.Context, b *batch) error {
	body := make([]byte, 0, b.bytes+64*len(b.lines))
	body = append(body, `{"writes":[`...)
	for i, line := range b.lines {
		if i > 0 {
			body = append(body, ',')
		}
		body = append(append(append(body, `{"update":{"allowMissing":true,"resource":`...), line...), "}}"...)
	}
	body = append(body, "]}"...)
	if err := retry(ctx, func() error {
		_, err := l.region.call(ctx, http.MethodPost, ":batchWrite", body)
		return err
	}); err != nil {
		return fmt.Errorf("write lines %d to %d: %w", b.first, b.last, err)
	}
	l.rows.Add(int64(len(b.lines)))
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
	return out.Bytes()
}

// synthetic updates random packages of the data set, rate times a second, each through the API server of the region that owns it.
type synthetic struct {
	world  *world
	writes atomic.Int64
	failed atomic.Int64
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
