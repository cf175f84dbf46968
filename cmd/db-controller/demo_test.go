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

// writeInput writes resources of the packages service: some sections that live in different regions, and their packages.
func writeInput(t *testing.T, packages int) (path string, owned, copies int) {
	t.Helper()
	sets := [][]string{{"ap", "eu", "us"}, {"eu", "us"}, {"ap", "eu"}, {"eu"}}
	var out bytes.Buffer
	for i, set := range sets {
		regions, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, `{"name":"sections/s%d","title":"s%d","multiRegionPolicy":{"enabledRegions":%s,"defaultControlRegion":"eu"}}`+"\n", i, i, regions)
		owned, copies = owned+1, copies+2 // sections are global
	}
	fmt.Fprintln(&out, `{"name":"sources/s","title":"ünï \"quoted\" \\ 12345678901234567890"}`)
	owned, copies = owned+1, copies+2
	for i := range packages {
		s := i % len(sets)
		fmt.Fprintf(&out, `{"name":"sections/s%d/packages/p%d","metadata":{"labels":{"n":"%d"}},"version":"1.%d","description":%q,"source":"sources/s"}`+"\n",
			s, i, i, i, strings.Repeat("x", i%2000))
		owned, copies = owned+1, copies+len(sets[s])-1
	}
	path = filepath.Join(t.TempDir(), "input.ndjson")
	if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, owned, copies
}

func TestDemoLoadsCutsHealsAndJudges(t *testing.T) {
	g := NewWithT(t)
	input, owned, copies := writeInput(t, 295)
	p := start(t, "demo", "--load", input, "--latency", "eu-us=20ms,eu-ap=40ms", "--cut", "ap", "--for", "4s", "--exit-when-synced", "--summary", "json", "--timeout", "3m")
	g.Expect(p.code(t)).To(Equal(0), p.stderr.String())

	lines := strings.Split(strings.TrimSpace(p.stdout.String()), "\n")
	var summary map[string]float64
	g.Expect(json.Unmarshal([]byte(lines[len(lines)-1]), &summary)).To(Succeed())
	g.Expect(slices.Sorted(maps.Keys(summary))).To(Equal([]string{
		"copies", "different", "extra", "missing", "owned", "p50_ms", "p99_ms", "regions", "rows_per_second",
	}))
	g.Expect(summary).To(And(
		HaveKeyWithValue("regions", 3.0), HaveKeyWithValue("owned", float64(owned)), HaveKeyWithValue("copies", float64(copies)),
		HaveKeyWithValue("missing", 0.0), HaveKeyWithValue("extra", 0.0), HaveKeyWithValue("different", 0.0),
	))
	g.Expect(summary["p50_ms"]).To(BeNumerically(">=", 10), "half a round trip")
	g.Expect(summary["p99_ms"]).To(BeNumerically(">", 1000), "the cut is in it")
	g.Expect(summary["rows_per_second"]).To(BeNumerically(">", 0))
	g.Expect(p.stderr.String()).To(And(ContainSubstring("CUT: ap"), ContainSubstring("HEALED: ap")))
	p.expectNothingLeft(g)
}

func TestDemoIsInterruptedInMidLoad(t *testing.T) {
	g := NewWithT(t)
	input, _, _ := writeInput(t, 60_000)
	p := start(t, "demo", "--load", input, "--exit-when-synced")
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
	p.waitLine(t, "running until Ctrl-C")
	p.waitLine(t, "writes")
	g.Expect(p.cmd.Process.Signal(syscall.SIGTERM)).To(Succeed())
	g.Expect(p.code(t)).To(Equal(0), p.stderr.String())
	var summary map[string]float64
	g.Expect(json.Unmarshal(p.stdout.Bytes(), &summary)).To(Succeed())
	// 4 sections, and 4 times 25 packages; web is controlled by us and not in eu.
	g.Expect(summary).To(And(HaveKeyWithValue("owned", 104.0), HaveKeyWithValue("copies", float64(4*2+25*(2+1+1+2)))))
	p.expectNothingLeft(g)
}

func TestDemoSaysWhatIsWrongWithTheInput(t *testing.T) {
	for name, c := range map[string]struct{ line, want string }{
		"not JSON":      {`{"name":`, "line 2: is not a JSON object"},
		"unknown type":  {`{"name":"books/x"}`, "line 2: name"},
		"against rules": {`{"name":"sections/s/packages/p","version":7}`, "lines 2 to 2"},
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
	input, _, _ := writeInput(t, 20)
	p := start(t, "demo", "--load", input, "--cut", "ap", "--for", "10m", "--exit-when-synced", "--timeout", "8s", "--summary", "json")
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
