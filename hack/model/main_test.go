package main

import (
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The command searches all worlds without a violation and finds every planted bug. It is built here without the race detector, which would make it ten times
// as slow.
func TestCommand(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "model")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	line, err := exec.CommandContext(t.Context(), bin).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		t.Fatalf("%v\n%s", err, exit.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	var got report
	if err := json.Unmarshal(line, &got); err != nil || strings.Count(string(line), "\n") != 1 {
		t.Fatalf("standard output is not one line of JSON: %q (%v)", line, err)
	}
	if got.Worlds < 9 || got.States < 1_000_000 || got.Transitions < got.States || got.Violations != 0 || got.Planted < 20 || got.Found != got.Planted {
		t.Errorf("got %+v", got)
	}

	help, err := exec.CommandContext(t.Context(), bin, "--help").CombinedOutput()
	if err != nil || !strings.Contains(string(help), "go run ./hack/model") {
		t.Errorf("--help: %v\n%s", err, help)
	}
}
