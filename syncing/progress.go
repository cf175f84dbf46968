package syncing

import "time"

// progress is how far a comparison or copy of one subrange is.
type progress struct {
	share float64 // 0 to 1
	began time.Time
}

// note sets what is done; a share of 0 begins anew.
func (p *progress) note(done, of int64, now time.Time) {
	p.share = min(1, float64(done)/float64(max(1, of)))
	if p.share == 0 || p.began.IsZero() {
		p.began = now
	}
}

// remaining is how long the rest takes if it goes on as fast as so far; nil before anything is done.
func (p *progress) remaining(now time.Time) *time.Duration {
	if p.share == 0 {
		return nil
	}
	took := float64(max(0, now.Sub(p.began)))
	return new(time.Duration(took * (1 - p.share) / p.share))
}

// worst is the progress of several subranges together: that of the one that is least far. How long it takes is not known while it is not known of one of them.
type worst struct {
	share     float64
	remaining *time.Duration
	unknown   bool
}

func (w *worst) add(share float64, remaining *time.Duration) {
	w.share = min(w.share, share)
	if w.unknown = w.unknown || remaining == nil; w.unknown {
		w.remaining = nil
		return
	}
	if w.remaining == nil || *w.remaining < *remaining {
		w.remaining = remaining
	}
}
