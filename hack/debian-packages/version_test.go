package main

import (
	"fmt"
	"os/exec"
	"testing"

	"pgregory.net/rapid"
)

func TestCompareVersions(t *testing.T) {
	for _, tt := range []struct {
		situation, lower, higher string
	}{
		{"numbers are not text", "1.9", "1.10"},
		{"epoch before all else", "9.9", "1:0.1"},
		{"tilde before the end", "2.0~rc1", "2.0"},
		{"tildes before a tilde", "2.0~~", "2.0~"},
		{"the end before a letter", "2.0", "2.0a"},
		{"letters before signs", "2.0a", "2.0+"},
		{"capitals before small letters", "2.0B", "2.0a"},
		{"revision last", "2.0-1", "2.0-2"},
		{"no revision before one", "2.0", "2.0-1"},
		{"hyphens in the upstream version", "2.0-1-1", "2.0-2-0"},
		{"long numbers", "1.99999999999999999999", "1.100000000000000000000"},
		{"backport", "2.0-1~bpo1", "2.0-1"},
		{"nothing before something", "", "0a"},
	} {
		t.Run(tt.situation, func(t *testing.T) {
			if c := compareVersions(tt.lower, tt.higher); c != -1 {
				t.Errorf("compare(%q, %q) = %d, want -1", tt.lower, tt.higher, c)
			}
			if c := compareVersions(tt.higher, tt.lower); c != 1 {
				t.Errorf("compare(%q, %q) = %d, want 1", tt.higher, tt.lower, c)
			}
		})
	}
	for _, equal := range [][2]string{{"1.0", "1.0"}, {"0:1.0", "1.0"}, {"1.00", "1.0"}, {"1.0-0", "1.0"}, {"1.a01", "1.a1"}} {
		if c := compareVersions(equal[0], equal[1]); c != 0 {
			t.Errorf("compare(%q, %q) = %d, want 0", equal[0], equal[1], c)
		}
	}
}

// TestCompareVersionsAsDpkg asks the judge of all versions.
func TestCompareVersionsAsDpkg(t *testing.T) {
	dpkg, err := exec.LookPath("dpkg")
	if err != nil {
		t.Skip("no dpkg on this machine")
	}
	version := rapid.StringMatching(`([0-2]:)?[0-9][0-9a-bA+.~]{0,4}(-[0-9a+.~]{1,3})?`)
	rapid.Check(t, func(rt *rapid.T) {
		a, b := version.Draw(rt, "a"), version.Draw(rt, "b")
		operator := map[int]string{-1: "lt", 0: "eq", 1: "gt"}[compareVersions(a, b)]
		if out, err := exec.CommandContext(t.Context(), dpkg, "--compare-versions", a, operator, b).CombinedOutput(); err != nil {
			rt.Fatalf("dpkg denies that %s %s %s: %v", a, operator, b, fmt.Errorf("%w: %s", err, out))
		}
	})
}
