package demo

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/dbcontroller/db-controller/syncing"
)

// screen shows how it goes: on a terminal as a table that is drawn again in its place, below the messages; elsewhere as lines.
type screen struct {
	out      io.Writer
	terminal bool
	sampler  *sampler
	extra    func() string // the first line
	start    time.Time

	mu    sync.Mutex
	drawn int                // lines of the table on the screen
	rates map[string]*window // by pair
}

// window is the rate of a counter over the last moments.
type window struct {
	at    []time.Time
	value []int64
}

// add notes a value and returns the rate per second over about five seconds.
func (w *window) add(now time.Time, value int64) float64 {
	w.at, w.value = append(w.at, now), append(w.value, value)
	for len(w.at) > 2 && now.Sub(w.at[0]) > 5*time.Second {
		w.at, w.value = w.at[1:], w.value[1:]
	}
	passed := now.Sub(w.at[0]).Seconds()
	if passed <= 0 {
		return 0
	}
	return max(0, float64(value-w.value[0])/passed)
}

func newScreen(out io.Writer, terminal bool) *screen {
	return &screen{out: out, terminal: terminal, start: time.Now(), rates: map[string]*window{}}
}

// Write prints messages above the table.
func (s *screen) Write(text []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	return s.out.Write(text)
}

// note prints one line with the time.
func (s *screen) note(format string, args ...any) {
	fmt.Fprintf(s, "%s  %s\n", s.clock(), fmt.Sprintf(format, args...))
}

// clock is the time since the start.
func (s *screen) clock() string {
	return fmt.Sprintf("%6.1fs", time.Since(s.start).Seconds())
}

// run shows the state until ctx is done.
func (s *screen) run(ctx context.Context) {
	every := 3 * time.Second
	if s.terminal {
		every = 500 * time.Millisecond
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.mu.Lock()
			s.drawn = 0 // the last table stays
			s.mu.Unlock()
			return
		case <-tick.C:
		}
		now := s.sampler.now()
		if s.terminal {
			s.draw(s.table(now))
		} else {
			s.note("%s", s.line(now))
		}
	}
}

func (s *screen) draw(text []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	s.drawn = bytes.Count(text, []byte("\n"))
	_, _ = s.out.Write(text) // a terminal that is gone hurts nobody
}

// erase removes the table. s.mu is held.
func (s *screen) erase() {
	if s.drawn > 0 {
		fmt.Fprintf(s.out, "\x1b[%dA\r\x1b[J", s.drawn)
		s.drawn = 0
	}
}

func (s *screen) rate(now time.Time, target string, p syncing.PeerStatus) float64 {
	key := target + "<-" + p.Region
	w := s.rates[key]
	if w == nil {
		w = &window{}
		s.rates[key] = w
	}
	return w.add(now, p.RowsApplied)
}

func (s *screen) table(now sample) []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "\n%s  %s\n\n", s.clock(), s.extra())
	w := tabwriter.NewWriter(&out, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "REGION\tOWNED\tCOPIES\tOF\t\n")
	for _, name := range Regions {
		c := now.regions[name]
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t\n", name, grouped(c.owned), grouped(c.copies), grouped(now.due(name)))
	}
	_ = w.Flush() // to a buffer
	out.WriteByte('\n')
	fmt.Fprint(w, "COPIES\tFROM\tSTATE\tCONTACT\tFRESHNESS\tAPPLY LAG\tPENDING\tROWS/S\tQUARANTINED\t\n")
	at := time.Now()
	for _, name := range Regions {
		for _, p := range now.peers[name] {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t\n", name, p.Region, p.State,
				age(p.ContactAge), age(p.Freshness), age(p.ApplyLag), grouped(p.PendingRows), grouped(int64(s.rate(at, name, p))), p.Quarantined)
		}
	}
	_ = w.Flush()
	return out.Bytes()
}

// line is the state in one line: what each region owns, how many copies it holds of how many, then for each pair its freshness, its rate, and
// its state unless it is live.
func (s *screen) line(now sample) string {
	var owned, copies, pairs []string
	at := time.Now()
	for _, name := range Regions {
		c := now.regions[name]
		if c.owned > 0 {
			owned = append(owned, name+" "+grouped(c.owned))
		}
		if due := now.due(name); due > 0 || c.copies > 0 {
			copies = append(copies, fmt.Sprintf("%s %s/%s", name, grouped(c.copies), grouped(due)))
		}
		for _, p := range now.peers[name] {
			if now.regions[p.Region].due[name] == 0 && p.State == syncing.Live {
				continue // nothing to copy, and nothing wrong
			}
			text := fmt.Sprintf("%s<-%s %s", name, p.Region, age(p.Freshness))
			if rate := s.rate(at, name, p); rate >= 1 {
				text += fmt.Sprintf(" %s/s", grouped(int64(rate)))
			}
			if p.State != syncing.Live {
				text += fmt.Sprintf(" %s (contact %s ago)", p.State, age(p.ContactAge))
			}
			if p.Quarantined > 0 {
				text += fmt.Sprintf(" QUARANTINED %d", p.Quarantined)
			}
			pairs = append(pairs, text)
		}
	}
	return fmt.Sprintf("%s | owned %s | copies %s | freshness %s", s.extra(), strings.Join(owned, " "), strings.Join(copies, " "), strings.Join(pairs, ", "))
}

// age shows a clock; what is not known yet is no number.
func age(d *time.Duration) string {
	switch {
	case d == nil:
		return "unknown"
	case *d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1fs", d.Seconds())
}

// grouped shows a number with its thousands apart.
func grouped(n int64) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
