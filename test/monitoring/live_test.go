package monitoring

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

// mayBeEmpty are the panels that have no data in the demo, and why.
var mayBeEmpty = map[string]string{
	"overview: Failed calls":                   "no call of the demo fails like that",
	"overview: Alerts":                         "nothing is wrong",
	"integrity: Establishing references, p99":  "all references of the demo lead to resources of the region that writes",
	"integrity: Work tried again":              "nothing fails",
	"integrity: Shards that an audit repaired": "the first audit comes after ten minutes",
	"controller: Redis connections":            "the demo has no Redis",
	"controller: Cache hit rate":               "the demo has no Redis",
	"controller: Cache in use":                 "the demo has no Redis",
	"controller: Reconcile errors":             "the demo has no Kubernetes",
	"controller: Reconcile duration, p99":      "the demo has no Kubernetes",
	"controller: Queue depth":                  "the demo has no Kubernetes",
}

// TestLive scrapes a running demo with a real Prometheus: promtool finds nothing to complain about in what is served, every rule and every query of the dashboards
// is evaluated without an error, and every panel finds data, except mayBeEmpty.
func TestLive(t *testing.T) {
	g := NewWithT(t)
	prometheus, promtool := tool(t, "prometheus"), tool(t, "promtool")
	targets := startDemo(t)
	base := startPrometheus(t, prometheus, targets)

	queries := map[string]string{}
	for file, d := range readDashboards(t) {
		for _, p := range d.Panels {
			for _, q := range p.Targets {
				queries[fmt.Sprintf("%s: %s (%s)", file, p.Title, q.RefID)] = substitute.Replace(q.Expr)
			}
		}
	}
	g.Eventually(func(g Gomega) {
		var empty []string
		for what, expr := range queries {
			n, err := query(t.Context(), base, expr)
			g.Expect(err).NotTo(HaveOccurred(), what)
			if _, may := mayBeEmpty[what[:strings.LastIndex(what, " (")]]; n == 0 && !may {
				empty = append(empty, what+"  "+expr)
			}
		}
		slices.Sort(empty)
		g.Expect(empty).To(BeEmpty(), "no data")
	}).WithTimeout(150 * time.Second).WithPolling(2 * time.Second).Should(Succeed())

	for panel := range mayBeEmpty {
		g.Expect(slices.ContainsFunc(readQueries(queries), func(q string) bool { return strings.HasPrefix(q, panel+" (") })).To(BeTrue(), "%s is no panel", panel)
	}

	t.Run("rules", func(t *testing.T) {
		g := NewWithT(t)
		var answer struct {
			Data struct {
				Groups []struct {
					Rules []struct {
						Name, Health, LastError string
						State                   string
					}
				}
			}
		}
		g.Eventually(func(g Gomega) {
			g.Expect(get(t.Context(), base+"/api/v1/rules", &answer)).To(Succeed())
			n := 0
			for _, group := range answer.Data.Groups {
				for _, r := range group.Rules {
					n++
					g.Expect(r.Health).To(Equal("ok"), "%s: %s", r.Name, r.LastError)
					g.Expect(r.State).NotTo(Equal("firing"), r.Name)
				}
			}
			want := 0
			for _, group := range readRules(t) {
				want += len(group.Rules)
				for _, r := range group.Rules {
					if r.Record != "" {
						g.Expect(query(t.Context(), base, r.Record)).To(BeNumerically(">", 0), r.Record)
					}
				}
			}
			g.Expect(n).To(Equal(want))
		}).WithTimeout(20 * time.Second).Should(Succeed())
	})

	t.Run("exposition", func(t *testing.T) {
		g := NewWithT(t)
		names := known(t)
		res, err := http.Get("http://" + targets[0] + "/metrics")
		g.Expect(err).NotTo(HaveOccurred())
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		g.Expect(err).NotTo(HaveOccurred())
		check := exec.CommandContext(t.Context(), promtool, "check", "metrics")
		check.Stdin = bytes.NewReader(text)
		out, err := check.CombinedOutput()
		g.Expect(err).NotTo(HaveOccurred(), string(out))
		reference, err := os.ReadFile(reference)
		g.Expect(err).NotTo(HaveOccurred())
		for _, m := range regexp.MustCompile(`(?m)^# TYPE (dbcontroller_\S+) (\S+)$`).FindAllStringSubmatch(string(text), -1) {
			g.Expect(names).To(HaveKey(m[1]), "is in docs/reference/metrics.md")
			g.Expect(string(reference)).To(ContainSubstring("| `" + m[1] + "` | " + m[2] + " |"))
		}
	})
}

func readQueries(queries map[string]string) (all []string) {
	for what := range queries {
		all = append(all, what)
	}
	return all
}

// substitute does what Grafana does with variables.
var substitute = strings.NewReplacer("$__rate_interval", "20s", "$db_service", ".*", "$source_region", ".*", "$target_region", ".*")

// startDemo runs the demo until the test ends, and returns the addresses of the operator's ports of its regions.
func startDemo(t *testing.T) (addresses []string) {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "db-controller")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "../../cmd/db-controller").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	found, read := make(chan string, len("eu us ap")), make(chan struct{})
	t.Cleanup(func() { <-read }) // after the demo has ended
	demo := exec.Command(binary, "demo", "--latency", "5ms", "--rate", "40")
	stderr := run(t, demo)
	where := regexp.MustCompile(`status and metrics http://(\S+)/statusz`)
	go func() {
		defer close(read)
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "db-controller demo:") {
				t.Log(lines.Text()) // why it has failed
			}
			if m := where.FindStringSubmatch(lines.Text()); m != nil {
				found <- m[1]
			}
		}
		close(found)
	}()
	deadline := time.After(time.Minute)
	for len(addresses) < 3 {
		select {
		case a, ok := <-found:
			if !ok {
				t.Fatal("the demo has ended")
			}
			addresses = append(addresses, a)
		case <-deadline:
			t.Fatal("the demo does not start within a minute")
		}
	}
	return addresses
}

// startPrometheus runs a Prometheus that scrapes targets and evaluates the rules every second, and returns its URL.
func startPrometheus(t *testing.T, program string, targets []string) string {
	t.Helper()
	dir := t.TempDir()
	rules, err := filepath.Abs(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]any{ // which is YAML, too
		"global":         map[string]string{"scrape_interval": "1s", "evaluation_interval": "1s"},
		"rule_files":     []string{rules},
		"scrape_configs": []any{map[string]any{"job_name": "demo", "static_configs": []any{map[string]any{"targets": targets}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yaml"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	stderr := run(t, exec.Command(program, "--config.file="+filepath.Join(dir, "prometheus.yaml"), "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+address, "--log.level=warn"))
	go func() { _, _ = io.Copy(os.Stderr, stderr) }()
	return "http://" + address
}

// run starts a program, and stops it when the test ends.
func run(t *testing.T, cmd *exec.Cmd) (stderr io.Reader) {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		select {
		case <-done:
		case <-time.After(40 * time.Second):
			_ = cmd.Process.Kill()
			<-done
			t.Errorf("%s did not end after SIGINT", filepath.Base(cmd.Path))
		}
		r.Close()
	})
	return r
}

// query returns how many series an expression has now.
func query(ctx context.Context, base, expr string) (int, error) {
	var answer struct {
		Data struct{ Result []json.RawMessage }
	}
	if err := get(ctx, base+"/api/v1/query?query="+url.QueryEscape(expr), &answer); err != nil {
		return 0, fmt.Errorf("%s: %w", expr, err)
	}
	return len(answer.Data.Result), nil
}

func get(ctx context.Context, url string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", res.Status, body)
	}
	return json.Unmarshal(body, into)
}
