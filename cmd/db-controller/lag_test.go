package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// output is where a watch writes, and what ends it.
type output struct {
	text  strings.Builder
	lines int
	stop  context.CancelFunc
}

func (o *output) Write(b []byte) (int, error) {
	n, err := o.text.Write(b)
	if strings.Count(o.text.String(), "\n") >= o.lines {
		o.stop()
	}
	return n, err
}

func TestLagWatch(t *testing.T) {
	var asked atomic.Int64
	manager := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) == 2 { // it restarts
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, `{"deployments":[{"service":"packages.example.com","region":"us","version":"v1","peers":[
			{"region":"eu","state":"Live","contactAgeSeconds":0.01,"freshnessSeconds":0.25,"applyLagSeconds":0}]}]}`)
	}))
	defer manager.Close()
	run := func(lines int, args ...string) (out, errOut string, err error) {
		asked.Store(0)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		o := &output{lines: lines, stop: cancel}
		var e strings.Builder
		cmd := newLag()
		cmd.SetArgs(append([]string{"--endpoint", manager.URL, "--every", "5ms"}, args...))
		cmd.SetOut(o)
		cmd.SetErr(&e)
		err = cmd.ExecuteContext(ctx)
		return o.text.String(), e.String(), err
	}

	out, errOut, err := run(4, "--watch")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if !strings.HasPrefix(lines[0], "TIME ") || strings.Count(out, "FRESHNESS") != 1 {
		t.Errorf("the header is not there once:\n%s", out)
	}
	for _, line := range lines[1:] {
		fields := strings.Fields(line)
		if _, err := time.Parse(time.RFC3339, fields[0]); err != nil || strings.Join(fields[1:8], " ") != "packages.example.com us eu Live 0.010s 0.250s 0.000s" {
			t.Errorf("a line is not time, pair and three clocks: %q", line)
		}
	}
	if !strings.Contains(errOut, "503") {
		t.Errorf("an answer that failed is not reported: %q", errOut)
	}

	out, _, err = run(2, "--watch", "--output", "json")
	if err != nil || strings.Count(out, `"freshnessSeconds":0.25`) != 2 {
		t.Errorf("JSON = %v, not one line for each repetition:\n%s", err, out)
	}
	if _, _, err = run(1, "--watch", "--output", "xml"); err == nil {
		t.Error("an unknown output is accepted")
	}
	if _, _, err = run(1, "--watch", "--every", "0s"); err == nil {
		t.Error("a pause of zero is accepted")
	}
}
