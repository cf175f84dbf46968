package monitoring

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	"sigs.k8s.io/yaml"
)

const (
	rulesFile = "../../charts/db-controller/files/alerts.yaml"
	runbooks  = "../../docs/runbooks"
	reference = "../../docs/reference/metrics.md"
)

// tool returns the path of a program of Debian's package prometheus.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("DBC_REQUIRE_PROMETHEUS") != "" {
			t.Fatalf("DBC_REQUIRE_PROMETHEUS is set, but there is no %s: run \"make deps\"", name)
		}
		t.Skipf("there is no %s: run \"make deps\", which installs the Debian package prometheus", name)
	}
	return path
}

type (
	rule struct {
		Record, Alert, Expr, For string
		Labels, Annotations      map[string]string
	}
	ruleGroup struct {
		Name  string
		Rules []rule
	}
)

func readRules(t *testing.T) (groups []ruleGroup) {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Groups []ruleGroup }
	if err := yaml.UnmarshalStrict(text, &file); err != nil {
		t.Fatal(err)
	}
	return file.Groups
}

// known are the metrics of docs/reference/metrics.md, which is generated from the code.
func known(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(dbcontroller_[a-z0-9_]+)` \\| ([a-z]+) \\|").FindAllStringSubmatch(string(text), -1) {
		names[m[1]] = true
		if m[2] == "histogram" {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				names[m[1]+suffix] = true
			}
		}
	}
	if len(names) == 0 {
		t.Fatalf("%s names no metric", reference)
	}
	return names
}

var metricName = regexp.MustCompile(`(?:pair:)?dbcontroller_[a-z0-9_:]+`)

func TestRulesAreWhole(t *testing.T) {
	g := NewWithT(t)
	names := known(t)
	groups := readRules(t)
	for _, group := range groups {
		for _, r := range group.Rules {
			if r.Record != "" {
				names[r.Record] = true
			}
		}
	}
	alerts := map[string]bool{}
	for _, group := range groups {
		for _, r := range group.Rules {
			for _, name := range metricName.FindAllString(r.Expr, -1) {
				g.Expect(names).To(HaveKey(name), "%s%s: a metric that is not in docs/reference/metrics.md", r.Alert, r.Record)
			}
			if r.Record != "" {
				continue
			}
			alerts[r.Alert] = true
			g.Expect(r.Alert).To(HavePrefix("DBController"))
			g.Expect(r.For).NotTo(BeEmpty(), r.Alert)
			g.Expect(r.Labels).To(HaveKeyWithValue("severity", BeElementOf("warning", "critical")), r.Alert)
			g.Expect(r.Annotations).To(And(HaveKey("summary"), HaveKey("description")), r.Alert)
			g.Expect(r.Annotations["runbook_url"]).To(HaveSuffix("/docs/runbooks/"+r.Alert+".md"), r.Alert)
			text, err := os.ReadFile(filepath.Join(runbooks, r.Alert+".md"))
			g.Expect(err).NotTo(HaveOccurred(), "every alert has a runbook")
			for _, section := range []string{"# " + r.Alert + "\n", "## Meaning\n", "## Impact\n", "## How to look\n", "## How to mend\n", "## When it is no trouble\n"} {
				g.Expect(string(text)).To(ContainSubstring(section), r.Alert)
			}
			for _, link := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(string(text), -1) {
				g.Expect(filepath.Join(runbooks, link[1])).To(BeAnExistingFile(), "%s links to it", r.Alert)
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(runbooks, "*.md"))
	g.Expect(err).NotTo(HaveOccurred())
	for _, f := range files {
		g.Expect(alerts).To(HaveKey(strings.TrimSuffix(filepath.Base(f), ".md")), "every runbook has an alert")
	}
}

func TestRulesAreValid(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), tool(t, "promtool"), "check", "rules", rulesFile).CombinedOutput()
	if err != nil {
		t.Fatalf("promtool check rules: %v\n%s", err, out)
	}
}

// alertCase is what Prometheus sees every minute, in promtool's notation, and which alerts fire at a moment.
type alertCase struct {
	alert, name string
	series      []string
	at          string
	// fires has the labels of each alert that fires, besides alertname; none means that it must be silent.
	fires []string
}

const (
	pairLabels = `db_service="s",source_region="eu",target_region="us",kind="copy"`
	ownLabels  = `db_service="s",target_region="us"`
)

// one is a case with one series of the pair, or of the Deployment.
func pair(metric, values string) string { return metric + "{" + pairLabels + "} " + values }
func own(metric, values string) string  { return metric + "{" + ownLabels + "} " + values }

var (
	warning  = `severity="warning",`
	critical = `severity="critical",`
)

// alertCases have at least one of each alert that fires, and one that is silent although it is near.
var alertCases = []alertCase{
	{"SyncLagHigh", "warns after five minutes over a minute", []string{pair("dbcontroller_sync_apply_lag_seconds", "0 120x10")}, "8m", []string{warning + pairLabels}},
	{"SyncLagHigh", "is critical over five minutes", []string{pair("dbcontroller_sync_apply_lag_seconds", "0 400x10")}, "8m", []string{warning + pairLabels, critical + pairLabels}},
	{"SyncLagHigh", "takes the worst of several replicas", []string{
		`dbcontroller_sync_apply_lag_seconds{pod="a",` + pairLabels + `} 0x10`, `dbcontroller_sync_apply_lag_seconds{pod="b",` + pairLabels + `} 90x10`,
	}, "8m", []string{warning + pairLabels}},
	{"SyncLagHigh", "is silent for a short lag", []string{pair("dbcontroller_sync_apply_lag_seconds", "120x3 0x10")}, "8m", nil},
	{"SyncLagHigh", "is silent while a first copy runs", []string{
		pair("dbcontroller_sync_apply_lag_seconds", strings.Repeat("Inf ", 10)), pair("dbcontroller_copy_progress_ratio", "0.1+0.01x10"),
	}, "8m", nil},
	{"SyncLagHigh", "is silent for what is suspended", []string{pair("dbcontroller_sync_apply_lag_seconds", "900x10"), pair("dbcontroller_suspended", "1x10")}, "8m", nil},
	{"SyncFreshnessLost", "fires", []string{pair("dbcontroller_sync_freshness_seconds", "1 301+60x15"), pair("dbcontroller_copy_progress_ratio", "1x15")}, "8m", []string{critical + pairLabels}},
	{"SyncFreshnessLost", "fires for what was never proven", []string{pair("dbcontroller_sync_freshness_seconds", strings.Repeat("Inf ", 15))}, "8m", []string{critical + pairLabels}},
	{"SyncFreshnessLost", "is silent when it is back", []string{pair("dbcontroller_sync_freshness_seconds", "0+100x6 1x10")}, "9m", nil},
	{"SyncFreshnessLost", "is silent for what is suspended", []string{pair("dbcontroller_sync_freshness_seconds", "900x15"), pair("dbcontroller_suspended", "1x15")}, "12m", nil},
	{"PeerUnreachable", "fires", []string{pair("dbcontroller_sync_contact_age_seconds", "1 61+60x10")}, "5m", []string{warning + pairLabels}},
	{"PeerUnreachable", "is silent after a restart", []string{pair("dbcontroller_sync_contact_age_seconds", "Inf 90 1x10")}, "5m", nil},
	{"PeerUnreachable", "is silent for what is suspended", []string{pair("dbcontroller_sync_contact_age_seconds", "900x10"), pair("dbcontroller_suspended", "1x10")}, "5m", nil},
	{"SyncErrors", "fires", []string{`dbcontroller_sync_errors_total{reason="apply",` + pairLabels + `} 0+3x20`}, "15m", []string{warning + `reason="apply",` + pairLabels}},
	{"SyncErrors", "is silent when it was once", []string{`dbcontroller_sync_errors_total{reason="apply",` + pairLabels + `} 0 3x20`}, "15m", nil},
	{"SyncErrors", "leaves a peer that is away to PeerUnreachable", []string{`dbcontroller_sync_errors_total{reason="unreachable",` + pairLabels + `} 0+3x20`}, "15m", nil},
	{"RowsQuarantined", "fires", []string{pair("dbcontroller_quarantined_rows", "0 2x5")}, "4m", []string{warning + pairLabels}},
	{"RowsQuarantined", "is silent when they are mended", []string{pair("dbcontroller_quarantined_rows", "2x2 0x5")}, "4m", nil},
	{"CopyStalled", "fires", []string{pair("dbcontroller_copy_progress_ratio", "0.4x40"), `dbcontroller_sync_applied_rows_total{op="copy",` + pairLabels + `} 100x40`}, "35m", []string{warning + pairLabels}},
	{"CopyStalled", "is silent while it goes on", []string{pair("dbcontroller_copy_progress_ratio", "0.4+0.01x40")}, "35m", nil},
	{"CopyStalled", "is silent while rows come that nobody has counted", []string{
		pair("dbcontroller_copy_progress_ratio", "0x40"), `dbcontroller_sync_applied_rows_total{op="copy",` + pairLabels + `} 0+1000x40`,
	}, "35m", nil},
	{"CopyStalled", "is silent when it is done", []string{pair("dbcontroller_copy_progress_ratio", "1x40")}, "35m", nil},
	{"CopyStalled", "is silent for what is suspended", []string{pair("dbcontroller_copy_progress_ratio", "0.4x40"), pair("dbcontroller_suspended", "1x40")}, "35m", nil},
	{"ThrottledTooLong", "fires", []string{`dbcontroller_sync_throttled_seconds_total{reason="target_slow",` + pairLabels + `} 0+50x100`}, "90m", []string{warning + `reason="target_slow",` + pairLabels}},
	{"ThrottledTooLong", "is silent for a third of the time", []string{`dbcontroller_sync_throttled_seconds_total{reason="target_slow",` + pairLabels + `} 0+20x100`}, "90m", nil},
	{"ClockSkew", "fires for a clock that is behind", []string{pair("dbcontroller_clock_offset_seconds", "-3x20")}, "15m", []string{warning + pairLabels}},
	{"ClockSkew", "is silent below two seconds", []string{pair("dbcontroller_clock_offset_seconds", "1.5x20")}, "15m", nil},
	{"CascadeStuck", "fires", []string{own("dbcontroller_cascade_oldest_seconds", "0+60x30")}, "25m", []string{warning + ownLabels}},
	{"CascadeStuck", "is silent while cascades come and go", []string{own("dbcontroller_cascade_oldest_seconds", "0+60x10 0+60x10")}, "15m", nil},
	{"DanglingReferences", "fires", []string{own("dbcontroller_reference_dangling", "0x2 1x5")}, "5m", []string{critical + ownLabels}},
	{"DanglingReferences", "is silent", []string{own("dbcontroller_reference_dangling", "0x9")}, "5m", nil},
	{"VerificationFailed", "fires", []string{`dbcontroller_verify_mismatched_rows{resource="Package",db_service="s",source_region="eu",target_region="us"} 3x10`}, "8m",
		[]string{critical + `resource="Package",db_service="s",source_region="eu",target_region="us"`}},
	{"VerificationFailed", "is silent without a difference", []string{`dbcontroller_verify_mismatched_rows{resource="Package",db_service="s",source_region="eu",target_region="us"} 0x10`}, "8m", nil},
	{"VerificationFailed", "is silent for what is suspended", []string{
		`dbcontroller_verify_mismatched_rows{resource="Package",db_service="s",source_region="eu",target_region="us"} 3x10`, pair("dbcontroller_suspended", "1x10"),
	}, "8m", nil},
	{"VerificationStale", "fires after six hours", []string{
		`dbcontroller_verify_verified_through_timestamp_seconds{resource="Package",db_service="s",source_region="eu",target_region="us"} -25200x30`,
		`dbcontroller_verify_verified_through_timestamp_seconds{resource="Section",db_service="s",source_region="eu",target_region="us"} 0+60x30`,
		own("dbcontroller_verify_interval_seconds", "3600x30"),
	}, "25m", []string{warning + `db_service="s",source_region="eu",target_region="us"`}},
	{"VerificationStale", "is silent within three long intervals", []string{
		`dbcontroller_verify_verified_through_timestamp_seconds{resource="Package",db_service="s",source_region="eu",target_region="us"} -25200x30`,
		own("dbcontroller_verify_interval_seconds", "86400x30"),
	}, "25m", nil},
	{"SearchDrift", "fires", []string{`dbcontroller_search_drift_total{drift="hole",kind="search",` + ownLabels + `} 0x3 2x20`}, "15m", []string{warning + `drift="hole",` + ownLabels}},
	{"SearchDrift", "is silent", []string{`dbcontroller_search_drift_total{drift="hole",kind="search",` + ownLabels + `} 2x20`}, "15m", nil},
	{"ShardUnowned", "fires", []string{`dbcontroller_shards_unowned{node_kind="syncing",` + ownLabels + `} 0 128x10`}, "5m", []string{critical + `node_kind="syncing",` + ownLabels}},
	{"ShardUnowned", "is silent during a hand-over", []string{`dbcontroller_shards_unowned{node_kind="syncing",` + ownLabels + `} 128 0x10`}, "5m", nil},
	{"NoLeader", "fires", []string{own("dbcontroller_node_leader", "1 0x10")}, "5m", []string{critical + ownLabels}},
	{"NoLeader", "is silent while one of them leads", []string{`dbcontroller_node_leader{pod="a",` + ownLabels + `} 0x10`, `dbcontroller_node_leader{pod="b",` + ownLabels + `} 1x10`}, "5m", nil},
	{"ShardFlapping", "fires", []string{
		`dbcontroller_shard_moves_total{node_kind="syncing",cause="dead",` + ownLabels + `} 0+1024x60`, `dbcontroller_shards_owned{node_kind="syncing",` + ownLabels + `} 4096x60`,
	}, "50m", []string{warning + `node_kind="syncing",` + ownLabels}},
	{"ShardFlapping", "is silent when replicas are added", []string{
		`dbcontroller_shard_moves_total{node_kind="syncing",cause="join",` + ownLabels + `} 0x20 4096x40`, `dbcontroller_shards_owned{node_kind="syncing",` + ownLabels + `} 4096x60`,
	}, "50m", nil},
	{"FencedWrites", "fires", []string{own("dbcontroller_fenced_writes_total", "0+2x20")}, "16m", []string{warning + ownLabels}},
	{"FencedWrites", "is silent after one pause", []string{own("dbcontroller_fenced_writes_total", "0 5x20")}, "16m", nil},
	{"CertificateExpiring", "is critical within six hours", []string{
		own("dbcontroller_certificate_start_timestamp_seconds", "-86400x30"), own("dbcontroller_certificate_expiry_timestamp_seconds", "10800x30"),
	}, "20m", []string{warning + ownLabels, critical + ownLabels}},
	{"CertificateExpiring", "warns early for a long life", []string{
		own("dbcontroller_certificate_start_timestamp_seconds", "-31536000x30"), own("dbcontroller_certificate_expiry_timestamp_seconds", "864000x30"),
	}, "20m", []string{warning + ownLabels}},
	{"CertificateExpiring", "is silent before", []string{
		own("dbcontroller_certificate_start_timestamp_seconds", "0x30"), own("dbcontroller_certificate_expiry_timestamp_seconds", "7776000x30"),
	}, "20m", nil},
	{"ControllerAbsent", "fires", []string{`other 1x10`}, "8m", []string{critical}},
	{"ControllerAbsent", "is silent", []string{`dbcontroller_build_info{version="v1"} 1x10`}, "8m", nil},
	{"DeploymentNotRunning", "fires for one of several processes", []string{
		`dbcontroller_deployment_running{pod="a",` + ownLabels + `} 1x10`, `dbcontroller_deployment_running{pod="b",` + ownLabels + `} 0x10`,
	}, "8m", []string{critical + ownLabels}},
	{"DeploymentNotRunning", "is silent after a slow start", []string{own("dbcontroller_deployment_running", "0x3 1x10")}, "8m", nil},
	{"ReconcileErrors", "fires", []string{`controller_runtime_reconcile_errors_total{controller="deployment"} 0+1x30`}, "25m", []string{warning + `controller="deployment"`}},
	{"ReconcileErrors", "is silent for a conflict now and then", []string{`controller_runtime_reconcile_errors_total{controller="deployment"} 0 1x15 2x15`}, "25m", nil},
	{"PolicyHeld", "fires", []string{`dbcontroller_policy_held{db_service="s",target_region="eu"} 1x20`}, "18m", []string{warning + `db_service="s", target_region="eu"`}},
	{"PolicyHeld", "is silent while a descriptor is rolled out", []string{`dbcontroller_policy_held{db_service="s",target_region="eu"} 1x5 0x20`}, "18m", nil},
	{"TopologyProblems", "fires", []string{`dbcontroller_registry_problems{reason="Conflict"} 1x20`}, "18m", []string{warning + `reason="Conflict"`}},
	{"TopologyProblems", "is silent when it is mended at once", []string{`dbcontroller_registry_problems{reason="Conflict"} 1x5 0x20`}, "18m", nil},
}

func TestAlerts(t *testing.T) {
	promtool := tool(t, "promtool")
	fires, silent := map[string]bool{}, map[string]bool{}
	path, err := filepath.Abs(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	var groups []string
	for _, group := range readRules(t) {
		groups = append(groups, group.Name)
		for _, r := range group.Rules {
			if r.Alert != "" {
				fires[r.Alert], silent[r.Alert] = false, false
			}
		}
	}
	type (
		series map[string]string
		sample struct {
			Labels string  `json:"labels"`
			Value  float64 `json:"value"`
		}
		expression struct {
			Expr    string   `json:"expr"`
			At      string   `json:"eval_time"`
			Samples []sample `json:"exp_samples"`
		}
		test struct {
			Name     string       `json:"name"`
			Interval string       `json:"interval"`
			Series   []series     `json:"input_series"`
			Tests    []expression `json:"promql_expr_test"`
		}
	)
	var tests []test
	for _, c := range alertCases {
		alert := "DBController" + c.alert
		if len(c.fires) > 0 {
			fires[alert] = true
		} else {
			silent[alert] = true
		}
		one := test{Name: alert + " " + c.name, Interval: "1m"}
		for _, s := range c.series {
			// The values follow the last brace, or the name.
			cut := strings.Index(s, " ")
			if brace := strings.LastIndex(s, "}"); brace >= 0 {
				cut = brace + 1
			}
			one.Series = append(one.Series, series{"series": s[:cut], "values": strings.TrimSpace(s[cut:])})
		}
		e := expression{Expr: fmt.Sprintf("ALERTS{alertname=%q, alertstate=\"firing\"}", alert), At: c.at, Samples: []sample{}}
		for _, labels := range c.fires {
			e.Samples = append(e.Samples, sample{fmt.Sprintf("ALERTS{alertname=%q, alertstate=\"firing\", %s}", alert, strings.TrimSuffix(labels, ",")), 1})
		}
		one.Tests = []expression{e}
		tests = append(tests, one)
	}
	for _, of := range []map[string]bool{fires, silent} {
		for alert, has := range of {
			if !has {
				t.Errorf("%s: want one case in which it fires and one in which it is silent", alert)
			}
		}
	}
	text, err := yaml.Marshal(map[string]any{"rule_files": []string{path}, "evaluation_interval": "1m", "group_eval_order": slices.Clone(groups), "tests": tests})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "alerts_test.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), promtool, "test", "rules", file).CombinedOutput(); err != nil {
		t.Fatalf("promtool test rules: %v\n%s", err, out)
	}
}
