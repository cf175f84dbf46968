package constraint

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

func TestRetryDoublesToItsMaximumWithJitter(t *testing.T) {
	r := Retry{time.Second, time.Minute}
	for failures, limit := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 5: 16 * time.Second, 7: time.Minute, 100: time.Minute} {
		different := map[time.Duration]bool{}
		for range 200 {
			d := r.wait(failures)
			if d < limit/2 || d > limit {
				t.Fatalf("wait(%d) = %v, want %v to %v", failures, d, limit/2, limit)
			}
			different[d] = true
		}
		if len(different) < 100 {
			t.Errorf("wait(%d) has %d values in 200", failures, len(different))
		}
	}
}

// runQueue runs a queue until the test ends, and returns the failures that it reported.
func runQueue(t *testing.T, capacity int) (q *queue, failures *[]string) {
	failures = new([]string)
	var mu sync.Mutex
	q = newQueue(capacity, Retry{time.Second, time.Minute}, func(_ context.Context, w *work, n int, err error, _ time.Time) {
		mu.Lock()
		defer mu.Unlock()
		*failures = append(*failures, fmt.Sprintf("%s %d %v", w.job.name, n, err))
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); q.run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	return q, failures
}

func TestQueueRunsALaneWithItsWidthAndOthersBesides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, _ := runQueue(t, 100)
		var mu sync.Mutex
		running, most, other := 0, 0, time.Time{}
		began := time.Now()
		for range 20 {
			q.add(&work{lane: callLane(lowEU), run: func(context.Context) error {
				mu.Lock()
				running++
				most = max(most, running)
				mu.Unlock()
				time.Sleep(time.Second)
				mu.Lock()
				running--
				mu.Unlock()
				return nil
			}}, 0)
		}
		q.add(&work{lane: callLane(lowUS), run: func(context.Context) error { other = time.Now(); return nil }}, 0)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if most != laneWidth || running != 0 || !other.Equal(began) {
			t.Errorf("%d at once, %d still running, the other lane after %v", most, running, other.Sub(began))
		}
		if len(q.lanes) != 0 {
			t.Errorf("%d lanes are left without work", len(q.lanes))
		}
	})
}

func TestQueueProbesAnUnreachableDeploymentAndThenGoesOnAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, _ := runQueue(t, 1000)
		var mu sync.Mutex
		calls, done, away := 0, 0, true
		for range 200 {
			q.add(&work{lane: callLane(lowEU), retry: Retry{time.Second, time.Minute}, run: func(context.Context) error {
				mu.Lock()
				defer mu.Unlock()
				calls++
				if away {
					return &unreachableError{lowEU, errors.New("no answer")}
				}
				done++
				return nil
			}}, 0)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		mu.Lock()
		if calls > laneWidth+150 || calls < 50 {
			t.Errorf("%d calls in an hour: want one each half to whole minute", calls)
		}
		away = false
		mu.Unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		if done != 200 {
			t.Errorf("%d of 200 done a minute after the Deployment is back", done)
		}
	})
}

func TestQueueWaitsOnlyWithWhatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, failures := runQueue(t, 100)
		var tries []time.Time
		q.add(&work{job: jobKey{name: "bad"}, lane: callLane(lowEU), retry: Retry{time.Second, 10 * time.Second}, run: func(context.Context) error {
			tries = append(tries, time.Now())
			if len(tries) == 5 {
				return nil
			}
			return notYet("not yet")
		}}, 0)
		turns := 0
		var others atomic.Int64
		q.add(&work{lane: callLane(lowEU), run: func(context.Context) error {
			if turns++; turns < 10 {
				return more(0)
			}
			return nil
		}}, 0)
		for range 50 {
			q.add(&work{lane: callLane(lowEU), run: func(context.Context) error { others.Add(1); return nil }}, 0)
		}
		synctest.Wait()
		if others.Load() != 50 || turns != 10 {
			t.Errorf("%d of 50 others and %d of 10 turns done at once", others.Load(), turns)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(tries) != 5 || len(*failures) != 4 || (*failures)[3] != "bad 4 not yet" {
			t.Errorf("%d tries, reported %v", len(tries), *failures)
		}
		for i := 1; i < len(tries); i++ {
			limit := time.Second << (i - 1)
			if d := tries[i].Sub(tries[i-1]); d < limit/2 || d > limit {
				t.Errorf("try %d after %v, want %v to %v", i+1, d, limit/2, limit)
			}
		}
	})
}

func TestQueueIsBoundedAndTellsWhenThereIsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, _ := runQueue(t, 10)
		open := make(chan struct{})
		blocked := func() *work {
			return &work{lane: callLane(lowEU), run: func(context.Context) error { <-open; return nil }}
		}
		for i := range 10 {
			if !q.add(blocked(), 0) {
				t.Fatalf("no room for piece %d of 10", i)
			}
		}
		synctest.Wait()
		if q.add(blocked(), 0) || !q.busy(callLane(lowEU)) {
			t.Error("a full lane took more, or is not busy")
		}
		if !q.add(&work{lane: callLane(lowUS), run: func(context.Context) error { return nil }}, 0) {
			t.Error("another lane has no room")
		}
		q.miss(callLane(lowEU))
		if q.takeMissed() {
			t.Error("there is no room yet for what was left out")
		}
		room := make(chan struct{})
		go func() { q.waitRoom(context.Background(), callLane(lowEU)); close(room) }()
		synctest.Wait()
		select {
		case <-room:
			t.Error("there is no room")
		default:
		}
		close(open)
		<-room
		synctest.Wait()
		if !q.takeMissed() || q.takeMissed() {
			t.Error("want to hear once that there is room for what was left out")
		}
		q.waitRoom(context.Background(), callLane(lowEU)) // nothing to wait for
	})
}

func TestQueueForgetsWhatIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, _ := runQueue(t, 10)
		ran := 0
		waiting := &work{lane: callLane(lowEU), run: func(context.Context) error { ran++; return nil }}
		running := &work{lane: callLane(lowEU), retry: Retry{time.Second, time.Second}, run: func(context.Context) error { time.Sleep(time.Second); ran++; return notYet("") }}
		q.add(waiting, time.Minute)
		q.add(running, 0)
		synctest.Wait()
		q.drop([]*work{waiting, running, {lane: callLane(store.Location{}), index: -1}})
		time.Sleep(time.Hour)
		synctest.Wait()
		if ran != 1 || len(q.lanes) != 0 {
			t.Errorf("%d ran, want only the one that was running; %d lanes are left", ran, len(q.lanes))
		}
	})
}
