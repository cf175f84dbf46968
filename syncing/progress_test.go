package syncing

import (
	"testing"
	"time"
)

// How far an initial copy is, and how long it still takes.
func TestProgress(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var p progress
	p.note(0, 1, start)
	if left := p.remaining(start.Add(time.Minute)); left != nil {
		t.Errorf("remaining before anything is done = %v", *left)
	}
	p.note(25, 100, start.Add(time.Minute))
	if left := p.remaining(start.Add(time.Minute)); left == nil || *left != 3*time.Minute {
		t.Errorf("remaining after a quarter in a minute = %v", left)
	}
	p.note(200, 100, start.Add(2*time.Minute)) // more rows came than had been counted
	if left := p.remaining(start.Add(2 * time.Minute)); p.share != 1 || left == nil || *left != 0 {
		t.Errorf("share %v, remaining %v of what is done", p.share, left)
	}
	p.note(0, 1, start.Add(time.Hour))
	p.note(1, 2, start.Add(time.Hour+time.Minute))
	if left := p.remaining(start.Add(time.Hour + time.Minute)); left == nil || *left != time.Minute {
		t.Errorf("remaining of the second comparison = %v", left)
	}
}

func TestWorstProgress(t *testing.T) {
	minute, hour := new(time.Minute), new(time.Hour)
	for _, tc := range []struct {
		name      string
		shares    []float64
		remaining []*time.Duration
		share     float64
		want      *time.Duration
	}{
		{"none", nil, nil, 1, nil},
		{"the slower one", []float64{0.5, 0.2}, []*time.Duration{minute, hour}, 0.2, hour},
		{"one is unknown", []float64{0, 0.2}, []*time.Duration{nil, hour}, 0, nil},
		{"the last one is unknown", []float64{0.2, 0}, []*time.Duration{hour, nil}, 0, nil},
	} {
		w := worst{share: 1}
		for i := range tc.shares {
			w.add(tc.shares[i], tc.remaining[i])
		}
		if w.share != tc.share || w.remaining != tc.want {
			t.Errorf("%s: share %v, remaining %v", tc.name, w.share, w.remaining)
		}
	}
}
