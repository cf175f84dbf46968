package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

// asProgram makes the test binary behave as the program, so that what users start is what is tested.
const asProgram = "DBC_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(pgtest.Main(m))
}

// program is a running db-controller.
type program struct {
	cmd    *exec.Cmd
	stdout bytes.Buffer
	stderr *log
	temp   string // its temporary folder
	done   chan struct{}
	err    error
}

// log keeps what is written, and passes lines on.
type log struct {
	bytes.Buffer
	lines chan string
}

func start(t *testing.T, args ...string) *program {
	t.Helper()
	// The temporary folder of a test is closed to the user that PostgreSQL runs as.
	temp, err := os.MkdirTemp("/tmp", "dbc-demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(temp, 0o755); err != nil {
		t.Fatal(err)
	}
	p := &program{cmd: exec.Command(os.Args[0], args...), stderr: &log{lines: make(chan string, 10_000)}, temp: temp, done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), asProgram+"=1", "TMPDIR="+temp)
	p.cmd.Stdout = &p.stdout
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		lines := bufio.NewScanner(io.TeeReader(stderr, p.stderr))
		for lines.Scan() {
			select {
			case p.stderr.lines <- lines.Text():
			default: // nobody waits for that much
			}
		}
		p.err = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("%s:\n%s", strings.Join(args, " "), p.stderr.String())
		}
		_ = os.RemoveAll(temp)
	})
	return p
}

// waitLine returns when a line with the text has been printed.
func (p *program) waitLine(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	for {
		select {
		case line := <-p.stderr.lines:
			if strings.Contains(line, text) {
				return
			}
		case <-p.done:
			t.Fatalf("ended (%v) without %q:\n%s", p.err, text, p.stderr.String())
		case <-deadline:
			t.Fatalf("no %q in time", text)
		}
	}
}

// code waits for the end and returns the exit code.
func (p *program) code(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(4 * time.Minute):
		t.Fatal("does not end")
	}
	if e, ok := errors.AsType[*exec.ExitError](p.err); ok {
		return e.ExitCode()
	}
	if p.err != nil {
		t.Fatal(p.err)
	}
	return 0
}

// expectNothingLeft checks that no file and no process remains.
func (p *program) expectNothingLeft(g *WithT) {
	g.Expect(filepath.Glob(filepath.Join(p.temp, "*"))).To(BeEmpty(), "files left behind")
	g.Eventually(func() []string { return processesOf(p.temp) }).WithTimeout(10*time.Second).Should(BeEmpty(), "processes left behind")
}

// processesOf lists the processes whose command line names a folder.
func processesOf(dir string) (found []string) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		text, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(text), dir) {
			found = append(found, path+": "+string(text))
		}
	}
	return found
}

// demoInput is a file of resources of the packages service, and what must be left of them.
type demoInput struct {
	path          string
	owned, copies int // without what is deleted
	deleted       int // with sources/s1, the only source that nobody needs and others recommend
	blockers      int // of sources/s0, which most need
	moved         int // packages of sections/s2, the first of those that are not everywhere and have most
}

// writeInput writes some sections that live in different regions, and packages of ten sources, all before what they refer to.
func writeInput(t *testing.T, packages int) demoInput {
	t.Helper()
	sets := [][]string{{"ap", "eu", "us"}, {"eu", "us"}, {"ap", "eu"}, {"eu"}}
	name := func(i int) string { return fmt.Sprintf("sections/s%d/packages/p%d", i%len(sets), i) }
	in := demoInput{path: filepath.Join(t.TempDir(), "input.ndjson")}
	var out bytes.Buffer
	for i := range packages {
		references := ""
		if i%10 != 0 {
			references += fmt.Sprintf(`,"depends":[%q]`, name(i-i%10))
			in.blockers++
		}
		switch {
		case i%10 == 2:
			references += fmt.Sprintf(`,"recommends":[%q]`, name(i-1))
		case i%10 == 3 && i < 50 && i+1 < packages: // a circle through two sections
			references += fmt.Sprintf(`,"suggests":[%q]`, name(i+1))
		case i%10 == 4 && i < 50:
			references += fmt.Sprintf(`,"preDepends":[%q]`, name(i-1))
		}
		fmt.Fprintf(&out, `{"name":%q,"metadata":{"labels":{"n":"%d"}},"version":"1.%d","description":%q,"source":"sources/s%d"%s}`+"\n",
			name(i), i, i, strings.Repeat("x", i%2000), i%10, references)
		if i%10 == 1 {
			in.deleted++
		} else {
			in.owned, in.copies = in.owned+1, in.copies+len(sets[i%len(sets)])-1
			if i%len(sets) == 2 {
				in.moved++
			}
		}
	}
	for i := range 10 {
		fmt.Fprintf(&out, `{"name":"sources/s%d","title":"ünï \"quoted\" \\ 12345678901234567890"}`+"\n", i)
	}
	in.owned, in.copies, in.deleted = in.owned+9, in.copies+18, in.deleted+1
	for i, set := range sets {
		regions, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, `{"name":"sections/s%d","title":"s%d","multiRegionPolicy":{"enabledRegions":%s,"defaultControlRegion":"eu"}}`+"\n", i, i, regions)
		in.owned, in.copies = in.owned+1, in.copies+2 // sections are global
	}
	if err := os.WriteFile(in.path, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return in
}

// TestDemoLoadsCutsDeletesAndJudges: references hold (F37, F39), a deletion is refused (F46) or cascades (F48, F49), a policy moves copies (F82), each region
// searches, edits by hand are found and repaired (P1), and the regions agree.
func TestDemoLoadsCutsDeletesAndJudges(t *testing.T) {
	g := NewWithT(t)
	in := writeInput(t, 295)
	p := start(t, "demo", "--load", in.path, "--latency", "eu-us=20ms,eu-ap=40ms", "--cut", "ap", "--for", "4s", "--exit-when-synced", "--summary", "json", "--timeout", "3m")
	g.Expect(p.code(t)).To(Equal(0), p.stderr.String())

	lines := strings.Split(strings.TrimSpace(p.stdout.String()), "\n")
	var summary map[string]float64
	g.Expect(json.Unmarshal([]byte(lines[len(lines)-1]), &summary)).To(Succeed())
	g.Expect(slices.Sorted(maps.Keys(summary))).To(Equal([]string{
		"copies", "deleted", "different", "edited", "extra", "found", "left", "missing", "owned", "p50_ms", "p99_ms", "policy_added", "policy_removed",
		"refused_blockers", "regions", "repaired", "rows_per_second", "searches",
	}))
	g.Expect(summary).To(And(
		HaveKeyWithValue("regions", 3.0), HaveKeyWithValue("owned", float64(in.owned)), HaveKeyWithValue("copies", float64(in.copies)),
		HaveKeyWithValue("missing", 0.0), HaveKeyWithValue("extra", 0.0), HaveKeyWithValue("different", 0.0),
		HaveKeyWithValue("deleted", float64(in.deleted)), HaveKeyWithValue("refused_blockers", float64(in.blockers)),
		HaveKeyWithValue("policy_added", float64(in.moved)), HaveKeyWithValue("policy_removed", float64(in.moved)), HaveKeyWithValue("searches", 4.0),
		HaveKeyWithValue("edited", 5.0), HaveKeyWithValue("found", 5.0), HaveKeyWithValue("repaired", 5.0), HaveKeyWithValue("left", 0.0),
	))
	g.Expect(summary["p50_ms"]).To(BeNumerically(">=", 10), "half a round trip")
	g.Expect(summary["p99_ms"]).To(BeNumerically(">", 1000), "the cut is in it")
	g.Expect(summary["rows_per_second"]).To(BeNumerically(">", 0))
	g.Expect(p.stderr.String()).To(And(
		ContainSubstring("CUT: ap"), ContainSubstring("HEALED: ap"), ContainSubstring("5 references of larger circles added afterwards, to 5 resources"),
		ContainSubstring("DELETE sources/s0: refused"), ContainSubstring("DELETE sources/s1: 31 resources gone, 30 others without"),
		ContainSubstring("what-if sections/s2 --add-region us in us: us gains %d rows", in.moved), ContainSubstring("PATCH sections/s2: policy accepted"),
		ContainSubstring(`search in us for "p0": `), ContainSubstring(`search in ap, which is cut off, for "p0": `),
		MatchRegexp(`verify in us --repair: .* 5 differences, 0 repaired`), MatchRegexp(`verify in us: .* 0 differences, 0 repaired`),
	))
	p.expectNothingLeft(g)
}

func TestDemoIsInterruptedInMidLoad(t *testing.T) {
	g := NewWithT(t)
	in := writeInput(t, 60_000)
	p := start(t, "demo", "--load", in.path, "--exit-when-synced")
	p.waitLine(t, "loading")
	began := time.Now()
	g.Expect(p.cmd.Process.Signal(syscall.SIGINT)).To(Succeed())
	g.Expect(p.code(t)).To(Equal(130))
	g.Expect(time.Since(began)).To(BeNumerically("<", 30*time.Second))
	g.Expect(p.stdout.String()).To(BeEmpty())
	p.expectNothingLeft(g)
}

func TestDemoWithoutInputRunsUntilInterrupted(t *testing.T) {
	g := NewWithT(t)
	p := start(t, "demo", "--latency", "0", "--insecure", "--summary", "json")
	p.waitLine(t, "DELETE sources/engine: refused because of 1 resource in the input, among them sections/admin/packages/dashboard")
	p.waitLine(t, "DELETE sources/puzzle: 3 resources gone, 2 others without their references to them")
	p.waitLine(t, "PATCH sections/libs: policy accepted")
	p.waitLine(t, `search in ap, which is cut off, for "p00": `)
	p.waitLine(t, "verify in us: ")
	p.waitLine(t, "running until Ctrl-C")
	p.waitLine(t, "writes")
	g.Expect(p.cmd.Process.Signal(syscall.SIGTERM)).To(Succeed())
	g.Expect(p.code(t)).To(Equal(0), p.stderr.String())
	var summary map[string]float64
	g.Expect(json.Unmarshal(p.stdout.Bytes(), &summary)).To(Succeed())
	// 4 sections, and 4 times 25 packages; web is controlled by us and not in eu; and what refers to each other, without what was deleted.
	g.Expect(summary).To(And(HaveKeyWithValue("owned", 104.0+5), HaveKeyWithValue("copies", float64(4*2+25*(2+1+1+2)+8))))
	p.expectNothingLeft(g)
}

func TestDemoSaysWhatIsWrongWithTheInput(t *testing.T) {
	for name, c := range map[string]struct{ line, want string }{
		"not JSON":       {`{"name":`, "line 2: is not a JSON object"},
		"unknown type":   {`{"name":"books/x"}`, "line 2: name"},
		"against rules":  {`{"name":"sections/s/packages/p","version":7}`, "line 2: "},
		"no such target": {`{"name":"sections/s/packages/p","version":"1","depends":["sections/s/packages/none"]}`, "sections/s/packages/none"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			path := filepath.Join(t.TempDir(), "input.ndjson")
			text := `{"name":"sections/s","multiRegionPolicy":{"enabledRegions":["eu"],"defaultControlRegion":"eu"}}` + "\n" + c.line + "\n"
			g.Expect(os.WriteFile(path, []byte(text), 0o600)).To(Succeed())
			p := start(t, "demo", "--load", path, "--exit-when-synced")
			g.Expect(p.code(t)).To(Equal(1))
			g.Expect(p.stderr.String()).To(ContainSubstring(c.want))
			p.expectNothingLeft(g)
		})
	}
}

func TestDemoGivesUpWhenTheTimeIsUp(t *testing.T) {
	g := NewWithT(t)
	in := writeInput(t, 20)
	p := start(t, "demo", "--load", in.path, "--cut", "ap", "--for", "10m", "--exit-when-synced", "--timeout", "8s", "--summary", "json")
	g.Expect(p.code(t)).To(Equal(1))
	g.Expect(p.stderr.String()).To(ContainSubstring("--timeout"))
	p.expectNothingLeft(g)
}

func TestCalls(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"version"}, 0},
		{[]string{"--help"}, 0},
		{[]string{"nonsense"}, 2},
		{[]string{"demo", "--cut", "mars"}, 2},
		{[]string{"demo", "--latency", "eu-mars=1ms"}, 2},
		{[]string{"demo", "--latency", "fast"}, 2},
		{[]string{"demo", "--for", "1s", "--for", "2s"}, 2},
		{[]string{"demo", "--rate", "-1"}, 2},
		{[]string{"demo", "--load", "/does/not/exist"}, 1},
		{[]string{"manager"}, 2},
		{[]string{"manager", "--region", "eu", "--manifests", "/does/not/exist"}, 2},
		{[]string{"apiserver", "--region", "eu"}, 2},
		{[]string{"status", "-o", "xml"}, 2},
		{[]string{"lag", "--endpoint", "http://127.0.0.1:1"}, 1},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			if got := run(context.Background(), c.args); got != c.code {
				t.Errorf("exit code %d, want %d", got, c.code)
			}
		})
	}
	for _, cmd := range newRoot().Commands() {
		if cmd.Example == "" || cmd.Short == "" {
			t.Errorf("%s has no example or no short help", cmd.Name())
		}
	}
}
