package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// The benches start this very program as a node.
func TestMain(m *testing.M) {
	if isNode() {
		if err := nodeMain(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// Every bench works at a small size: both contenders end equal, and the last line says what came out. Reshard has no small size: test/e2e does what it does.
func TestBenchesAtASmallSize(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var small []bench
	args := []string{"-runs", "1", "-rows", "1000", "-hot", "100", "-duration", "100ms", "-rate", "100"}
	for _, b := range benches {
		if b.name != "reshard" {
			small, args = append(small, b), append(args, b.name)
		}
	}
	var out bytes.Buffer
	if err := run(ctx, args, &out, t.Output()); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log(out.String())
	var results []result
	for line := range strings.Lines(out.String()) {
		if !strings.HasPrefix(line, "{") {
			continue
		}
		var r result
		d := json.NewDecoder(strings.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(&r); err != nil {
			t.Fatalf("result %q: %v", line, err)
		}
		if r.Runs != 1 || r.Unit == "" || r.Ours <= 0 || r.Rival <= 0 || r.Ratio <= 0 {
			t.Errorf("result %+v: want all of it measured", r)
		}
		results = append(results, r)
	}
	for i, b := range small {
		if i >= len(results) || results[i].Bench != b.name {
			t.Fatalf("results %+v: want one of %s", results, b.name)
		}
	}
	if !strings.HasSuffix(out.String(), "}\n") {
		t.Error("the last line is not the result")
	}
}

func TestUnknownBenchIsRefused(t *testing.T) {
	err := run(t.Context(), []string{"speed"}, t.Output(), t.Output())
	if err == nil || !strings.Contains(err.Error(), "initial-copy") {
		t.Errorf("run = %v, want an error that names the benches", err)
	}
}
