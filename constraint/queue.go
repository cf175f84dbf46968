package constraint

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

// Retry says how long to wait between attempts: Min after the first failure, doubling to Max, shortened by up to half so that many do not meet.
type Retry struct{ Min, Max time.Duration }

// wait returns the wait after so many failures, at least one.
func (r Retry) wait(failures int) time.Duration {
	limit := r.Max
	if shift := failures - 1; shift < 30 && r.Min<<shift > 0 {
		limit = min(limit, r.Min<<shift)
	}
	return limit - rand.N(limit/2+1)
}

// more is the outcome of work that has more to do after so long, and after others have had their turn.
type more time.Duration

func (more) Error() string { return "more to do" }

// errParked is the outcome of work that goes on when somebody adds it again.
var errParked = errors.New("parked")

// notYet is why work that has not failed cannot be done now.
type notYet string

func (n notYet) Error() string { return string(n) }

// unreachableError is a failure to reach a Deployment: everything else that involves it would fail too, and nothing that does not.
type unreachableError struct {
	at  store.Location
	err error
}

func (e *unreachableError) Error() string {
	return fmt.Sprintf("%s cannot be reached: %v", e.at, e.err)
}
func (e *unreachableError) Unwrap() error { return e.err }

// unreachable marks err as a failure of at if it is one: an answer, even a refusal, is none.
func unreachable(at store.Location, err error) error {
	if store.CodeOf(err) == store.Unavailable || errors.Is(err, context.DeadlineExceeded) {
		return &unreachableError{at, err}
	}
	return err
}

// laneKey names a lane: what is done there, and which Deployment it waits for.
type laneKey struct {
	kind string
	at   store.Location
}

// laneWidth is how many pieces of work of one lane run at once.
const laneWidth = 4

// work is a piece of work in a lane. Its fields belong to the queue.
type work struct {
	job   jobKey
	lane  laneKey
	retry Retry
	run   func(context.Context) error

	due      time.Time
	failures int
	index    int // in the lane's heap; -1 while it is not there
	dropped  bool
}

// queue runs work in lanes. A lane does not wait for another one, so that a Deployment that is away delays only what involves it; while it is away one
// piece of its lane's work finds out, with backoff, whether it is back. Work that fails for another reason waits alone. A lane is bounded.
type queue struct {
	capacity int
	away     Retry
	// failed is told of work that is not done, and when it is tried again. It runs on the lane's time.
	failed func(ctx context.Context, w *work, failures int, err error, next time.Time)

	mu    sync.Mutex
	lanes map[laneKey]*lane
	wake  chan struct{} // capacity 1: something may be due
	// missed: work was left out by a lane that is half empty now.
	missed bool
}

type lane struct {
	waiting  workHeap
	running  int
	failures int       // in a row to reach the Deployment
	opens    time.Time // when the next one may try
	missed   bool      // work was left out
	room     []chan struct{}
}

func newQueue(capacity int, away Retry, failed func(context.Context, *work, int, error, time.Time)) *queue {
	return &queue{capacity: capacity, away: away, failed: failed, lanes: map[laneKey]*lane{}, wake: make(chan struct{}, 1)}
}

// add lets w run after the delay. It returns false when the lane is full.
func (q *queue) add(w *work, delay time.Duration) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.lanes[w.lane]
	if l == nil {
		l = &lane{}
		q.lanes[w.lane] = l
	}
	if len(l.waiting)+l.running >= q.capacity {
		return false
	}
	w.due = time.Now().Add(delay)
	heap.Push(&l.waiting, w)
	q.poke()
	return true
}

// busy reports whether a lane has work that is due: it will have room soon.
func (q *queue) busy(key laneKey) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.lanes[key]
	return l != nil && len(l.waiting) > 0 && !l.dueAt().After(time.Now())
}

// waitRoom returns when the lane is less than half full, or ctx is done.
func (q *queue) waitRoom(ctx context.Context, key laneKey) {
	q.mu.Lock()
	l := q.lanes[key]
	if l == nil || q.roomy(l) {
		q.mu.Unlock()
		return
	}
	room := make(chan struct{})
	l.room = append(l.room, room)
	q.mu.Unlock()
	select {
	case <-room:
	case <-ctx.Done():
	}
}

func (q *queue) roomy(l *lane) bool { return len(l.waiting)+l.running <= q.capacity/2 }

// miss notes that work of a full lane was left out.
func (q *queue) miss(key laneKey) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l := q.lanes[key]; l != nil && !q.roomy(l) {
		l.missed = true
	} else {
		q.missed = true
	}
}

// takeMissed reports, once, that work that was left out would find room now.
func (q *queue) takeMissed() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	missed := q.missed
	q.missed = false
	return missed
}

// drop forgets work that has been overtaken; what runs is not interrupted.
func (q *queue) drop(all []*work) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range all {
		w.dropped = true
		if l := q.lanes[w.lane]; l != nil && w.index >= 0 && w.index < len(l.waiting) && l.waiting[w.index] == w {
			heap.Remove(&l.waiting, w.index)
			q.left(w.lane, l)
		}
	}
}

func (q *queue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// run runs what is due until ctx is done, and returns after everything it started has.
func (q *queue) run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		timer.Reset(q.start(ctx, &running))
		select {
		case <-ctx.Done():
		case <-q.wake:
		case <-timer.C:
		}
	}
}

// start starts what is due, and returns after how long there may be more.
func (q *queue) start(ctx context.Context, running *sync.WaitGroup) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	wait := time.Hour
	now := time.Now()
	for _, l := range q.lanes {
		for len(l.waiting) > 0 && l.running < l.width() {
			if d := l.dueAt().Sub(now); d > 0 {
				wait = min(wait, d)
				break
			}
			w := heap.Pop(&l.waiting).(*work)
			l.running++
			running.Go(func() {
				err := w.run(ctx)
				if failures, next, retried := q.ended(ctx, l, w, err); retried {
					q.failed(ctx, w, failures, err, next)
				}
			})
		}
	}
	return wait
}

// width is 1 while the Deployment is away.
func (l *lane) width() int {
	if l.failures > 0 {
		return 1
	}
	return laneWidth
}

// dueAt is when the first of the waiting may run.
func (l *lane) dueAt() time.Time {
	if due := l.waiting[0].due; due.After(l.opens) {
		return due
	}
	return l.opens
}

// ended notes how work ended, and whether and when it is tried again because it failed, the how manieth time: 0 when its Deployment could not be reached.
func (q *queue) ended(ctx context.Context, l *lane, w *work, err error) (failures int, next time.Time, retried bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l.running--
	if errors.Is(err, errParked) { // somebody may have added it again already
		l.failures, l.opens = 0, time.Time{}
		q.left(w.lane, l)
		return 0, time.Time{}, false
	}
	now := time.Now()
	w.due = now
	var away *unreachableError
	var again more
	switch {
	case errors.As(err, &away):
		if !now.Before(l.opens) { // the others that ran at the time say the same
			l.failures++
			l.opens = now.Add(q.away.wait(l.failures))
		}
		retried = true
	case err == nil, errors.As(err, &again):
		l.failures, l.opens = 0, time.Time{}
		w.due = now.Add(time.Duration(again))
	default:
		if store.CodeOf(err) != store.Unavailable { // which would be that of our own database
			l.failures, l.opens = 0, time.Time{}
		}
		w.failures++
		failures = w.failures
		w.due = now.Add(w.retry.wait(w.failures))
		retried = true
	}
	retried = retried && !w.dropped && ctx.Err() == nil
	if retried || errors.As(err, &again) && !w.dropped {
		heap.Push(&l.waiting, w)
	}
	next = w.due
	if l.opens.After(next) {
		next = l.opens
	}
	q.left(w.lane, l)
	return failures, next, retried
}

// left tidies up after a lane has become shorter.
func (q *queue) left(key laneKey, l *lane) {
	if q.roomy(l) {
		for _, room := range l.room {
			close(room)
		}
		l.room = nil
		q.missed = q.missed || l.missed
		l.missed = false
	}
	if len(l.waiting)+l.running == 0 && l.failures == 0 {
		delete(q.lanes, key)
	}
	q.poke()
}

// workHeap orders work by when it is due.
type workHeap []*work

func (h workHeap) Len() int           { return len(h) }
func (h workHeap) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h workHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements heap.Interface.
func (h *workHeap) Push(x any) {
	w := x.(*work)
	w.index = len(*h)
	*h = append(*h, w)
}

// Pop implements heap.Interface.
func (h *workHeap) Pop() any {
	last := len(*h) - 1
	w := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	w.index = -1
	return w
}
