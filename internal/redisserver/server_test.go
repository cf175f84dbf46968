package redisserver_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dbcontroller/db-controller/internal/redisserver"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func answers(s *redisserver.Server, within time.Duration) bool {
	c, err := net.Dial("unix", strings.TrimPrefix(s.URL(), "unix://"))
	if err != nil {
		return false
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(within))
	_, _ = c.Write([]byte("PING\r\n"))
	n, _ := c.Read(make([]byte, 7))
	return n > 0
}

func TestLife(t *testing.T) {
	s := redisserver.New(t, map[string]string{"maxmemory": "4mb"})
	for _, step := range []struct {
		name string
		do   func() error
		want bool
	}{
		{"started", func() error { return nil }, true},
		{"paused", s.Pause, false},
		{"resumed", s.Resume, true},
		{"killed", func() error { s.Kill(); return nil }, false},
		{"started again", func() error { return s.Restart(context.Background()) }, true},
		{"paused and killed", func() error { err := s.Pause(); s.Kill(); return err }, false},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		within := 10 * time.Second
		if !step.want {
			within = 50 * time.Millisecond
		}
		if got := answers(s, within); got != step.want {
			t.Errorf("%s: answers = %v, want %v", step.name, got, step.want)
		}
	}
}

func TestBadSetting(t *testing.T) {
	_, err := redisserver.Start(t.Context(), map[string]string{"no-such-setting": "1"})
	if err == nil || !strings.Contains(err.Error(), "no-such-setting") {
		t.Errorf("Start = %v, want the reason that Redis gives", err)
	}
}
