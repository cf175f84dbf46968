package nodemanager_test

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/nodemanager/membershiptest"
)

// localPlace is a Local with a network that can be cut.
type localPlace struct {
	*nodemanager.Local
	timing nodemanager.Timing
	mu     sync.Mutex
	cut    map[string]bool
}

func newLocalPlace(t *testing.T, timing nodemanager.Timing) *localPlace {
	timing, err := timing.WithDefaults()
	if err != nil {
		t.Fatal(err)
	}
	l, err := nodemanager.NewLocal(timing)
	if err != nil {
		t.Fatal(err)
	}
	p := &localPlace{Local: l, timing: timing, cut: map[string]bool{}}
	nodemanager.Reach(l, func(member string) bool {
		name, _, _ := strings.Cut(member, "_")
		p.mu.Lock()
		defer p.mu.Unlock()
		return !p.cut[name]
	})
	return p
}

func (p *localPlace) Cut(name string, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut[name] = cut
}

func (p *localPlace) Timing() nodemanager.Timing { return p.timing }

func TestLocalMembership(t *testing.T) {
	membershiptest.Run(t, func(t *testing.T, f func(*testing.T, membershiptest.Place)) {
		synctest.Test(t, func(t *testing.T) { f(t, newLocalPlace(t, nodemanager.Timing{})) })
	})
}

func TestTiming(t *testing.T) {
	for _, bad := range []nodemanager.Timing{
		{Lease: 10 * time.Second}, {RenewDeadline: 2 * time.Second}, {RetryPeriod: -1}, {Lease: 3 * time.Second, RenewDeadline: 3 * time.Second, RetryPeriod: time.Second},
	} {
		if _, err := bad.WithDefaults(); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
	if got, err := (nodemanager.Timing{}).WithDefaults(); err != nil || got != (nodemanager.Timing{Lease: 15 * time.Second, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second}) {
		t.Errorf("%+v, %v", got, err)
	}
}
