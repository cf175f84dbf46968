package constraint

import (
	"testing"
	"time"
)

func TestHealth(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	job := func(kind jobKind, age time.Duration) pendingJob { return pendingJob{kind: kind, since: now.Add(-age)} }
	for name, c := range map[string]struct {
		jobs []pendingJob
		want Health
	}{
		"nothing to do": {},
		"a cascade": {[]pendingJob{job(jobDrain, time.Minute), job(jobHandle, time.Second)},
			Health{Cascading: 1, Oldest: time.Minute, OldestKind: "drain"}},
		"a refused deletion is as it should be, and so is what waits for it": {[]pendingJob{job(jobDelete, time.Hour), job(jobDrain, 2*time.Hour), job(jobHandle, time.Hour)},
			Health{Cascading: 1, Refused: 1}},
		"a confirmation waits beside it": {[]pendingJob{job(jobDelete, time.Hour), job(jobConfirm, time.Minute)},
			Health{Refused: 1, Oldest: time.Minute, OldestKind: "confirm"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := healthOf(c.jobs, now)
			if got.Cascading != c.want.Cascading || got.Refused != c.want.Refused || got.Oldest != c.want.Oldest || got.OldestKind != c.want.OldestKind {
				t.Errorf("%+v, want %+v", got, c.want)
			}
		})
	}
}
