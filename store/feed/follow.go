package feed

import (
	"context"
	"time"
)

// Poll intervals without hints: the wait doubles from the first to the last. The last one is also how often an idle reader proves
// that it has missed nothing.
const (
	minPoll = 50 * time.Millisecond
	maxPoll = time.Second
)

// Follow calls step for ever: at once again while step returns more, else after a hint that concerns want or the poll interval. It returns step's
// error, or ctx's.
func (f *Feed) Follow(ctx context.Context, want Interest, step func(context.Context) (more bool, err error)) error {
	wait := minPoll
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		hint := f.hub.wait(want) // before the read, so that a commit during it is not missed
		more, err := step(ctx)
		if err != nil || more {
			f.hub.leave(hint)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return err
			}
			continue
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
		case <-hint.wake:
			wait = minPoll
		case <-timer.C:
			wait = min(2*wait, maxPoll)
		}
		f.hub.leave(hint)
		if want.Gap > 0 {
			timer.Reset(want.Gap)
			select {
			case <-ctx.Done():
			case <-timer.C:
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}
