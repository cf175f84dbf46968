package references

import (
	"cmp"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

var theSeed = sync.OnceValue(func() uint64 {
	if s, err := strconv.ParseUint(os.Getenv(seedVar), 10, 64); err == nil {
		return s
	}
	return uint64(time.Now().UnixNano()) % 1e9
})

// seed of this run.
func seed() uint64 { return theSeed() }

// event is one operation on one name.
type event struct {
	at      key
	op      string
	detail  string
	began   time.Duration
	ended   time.Duration // 0: not yet
	outcome string
}

// history is what was done to each name, by the clock of this process.
type history struct {
	start time.Time

	mu     sync.Mutex
	byName map[string][]*event
	count  map[string]int // operations that have ended, by outcome
}

func newHistory() *history {
	return &history{start: time.Now(), byName: map[string][]*event{}, count: map[string]int{}}
}

// begin notes a transaction. The function that it returns notes the outcome.
func (h *history) begin(at key, writes []store.Write) func(error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var events []*event
	for _, w := range writes {
		e := &event{at: at, op: w.Op.String(), began: time.Since(h.start)}
		if len(writes) > 1 {
			e.op += " in batch with"
			for _, o := range writes {
				if o.Name != w.Name {
					e.op += " " + o.Op.String() + " " + o.Name
				}
			}
		}
		if w.Op != store.Delete {
			e.detail = string(w.Body)
			if len(w.Meta.OwnerReferences) > 0 {
				e.detail += fmt.Sprintf(" owners %+v", w.Meta.OwnerReferences)
			}
		}
		h.byName[w.Name] = append(h.byName[w.Name], e)
		events = append(events, e)
	}
	return func(err error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		outcome := "ok"
		if err != nil {
			outcome = cmp.Or(store.CodeOf(err).String(), "error")
		}
		for _, e := range events {
			e.ended, e.outcome = time.Since(h.start), outcome
			if err != nil {
				e.outcome = err.Error()
			}
			h.count[e.op[:min(6, len(e.op))]+" "+outcome]++
		}
	}
}

// note adds something that was done without a write.
func (h *history) note(name, format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.byName[name] = append(h.byName[name], &event{op: fmt.Sprintf(format, args...), began: time.Since(h.start), ended: time.Since(h.start)})
}

// of returns the last events of a name, one a line.
func (h *history) of(name string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var text strings.Builder
	events := h.byName[name]
	fmt.Fprintf(&text, "    %s: %d operations\n", name, len(events))
	for _, e := range events[max(0, len(events)-15):] {
		fmt.Fprintf(&text, "      %8.3f-%8.3f %s %s -> %.300s %.400s\n", e.began.Seconds(), e.ended.Seconds(), e.at, e.op, e.outcome, e.detail)
	}
	return text.String()
}

// operations is how many names have been written, whatever came of it.
func (h *history) operations() (n int) {
	for _, k := range h.counts() {
		n += k
	}
	return n
}

func (h *history) counts() map[string]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[string]int{}
	for k, n := range h.count {
		out[k] = n
	}
	return out
}
