package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/cmd/db-controller/internal/fleet"
	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
	"github.com/dbcontroller/db-controller/internal/redisserver"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/registry/folder"
)

const metricsReference = "../../docs/reference/metrics.md"

// overwritten are labels that the Prometheus Operator puts on every series: what we say under these names would be renamed, or lost.
var overwritten = []string{"service", "namespace", "pod", "cluster", "job", "instance", "node", "endpoint", "container"}

// metric is what a Desc tells.
type metric struct {
	name, kind, help string
	labels           []string
	processes        []string
}

// TestMetricsReference holds docs/reference/metrics.md against what a manager and an API server with everything switched on register. Write it anew with
//
//	go test ./cmd/db-controller -run TestMetricsReference -update
func TestMetricsReference(t *testing.T) {
	g := NewWithT(t)
	processes := everythingOn(t)
	var metrics []metric
	g.Eventually(func(g Gomega) {
		metrics = describeMetrics(g, processes)
		var names []string
		for _, m := range metrics {
			names = append(names, m.name)
		}
		// One of each part that registers its metrics when it runs.
		for _, last := range []string{"sync_freshness_seconds", "reference_dangling", "policy_walks", "verify_interval_seconds", "search_drift_total", "requests_total", "cache_live"} {
			g.Expect(names).To(ContainElement("dbcontroller_" + last))
		}
	}).WithTimeout(time.Minute).Should(Succeed())

	for _, m := range metrics {
		g.Expect(m.name).To(HavePrefix("dbcontroller_"))
		g.Expect(m.help).To(HaveSuffix("."), "%s: HELP is a sentence", m.name)
		if strings.Contains(m.name, "_seconds") {
			g.Expect(m.help).To(MatchRegexp("[Ss]econds|How long"), "%s: HELP names the unit", m.name)
		}
		for _, l := range m.labels {
			g.Expect(overwritten).NotTo(ContainElement(l), "%s: a label that is overwritten", m.name)
		}
	}

	want := metricsText(metrics)
	if *update {
		g.Expect(os.WriteFile(metricsReference, []byte(want), 0o644)).To(Succeed())
		return
	}
	have, err := os.ReadFile(metricsReference)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(have)).To(Equal(want), "docs/reference/metrics.md is stale: go test ./cmd/db-controller -run TestMetricsReference -update")
}

// everythingOn runs a manager and an API server of a Deployment with a cache and a search store, which knows another region that is away. It returns what
// each of them registers.
func everythingOn(t *testing.T) map[string]func() []*prometheus.Registry {
	g := NewWithT(t)
	dir := t.TempDir()
	redis := redisserver.New(t, nil)
	manifests := `apiVersion: meta.dbcontroller.io/v1alpha1
kind: Deployment
metadata: {name: packages.us}
spec: {service: packages.example.com, region: us, version: v1, endpoint: "http://127.0.0.1:1"}
---
apiVersion: meta.dbcontroller.io/v1alpha1
kind: Deployment
metadata: {name: packages.eu}
spec:
  service: packages.example.com
  region: eu
  version: v1
  endpoint: http://127.0.0.1:2
  database: {secretRef: {name: connections, key: database}}
  cache: {secretRef: {name: connections, key: redis}}
  search: {type: Redis, secretRef: {name: connections, key: redis}}
---
apiVersion: v1
kind: Secret
metadata: {name: connections}
stringData: {database: "` + pgtest.Database(t) + `", redis: "` + redis.URL() + `"}
`
	g.Expect(os.WriteFile(filepath.Join(dir, "service.yaml"), samples.Packages, 0o600)).To(Succeed())
	g.Expect(os.WriteFile(filepath.Join(dir, "deployments.yaml"), []byte(manifests), 0o600)).To(Succeed())
	reg := registry.New()
	source, err := folder.New(reg, folder.Config{Dir: dir})
	g.Expect(err).NotTo(HaveOccurred())

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	t.Cleanup(cancel)
	running.Go(func() { _ = source.Run(ctx) })
	start := func(manages bool, part func(*deployment.Deployment) (func(context.Context) error, error)) func() []*prometheus.Registry {
		f := fleet.New(fleet.Config{
			Region: "eu", Registry: reg, Secrets: source, Manages: manages,
			Parts: func(d *deployment.Deployment) ([]func(context.Context) error, error) {
				p, err := part(d)
				return []func(context.Context) error{p}, err
			},
		})
		running.Go(func() { _ = f.Run(ctx) })
		process := prometheus.NewRegistry()
		process.MustRegister(fleet.BuildInfo("dev"), f, reg)
		return func() []*prometheus.Registry {
			if d := f.Deployment("packages.example.com"); d != nil {
				return []*prometheus.Registry{process, d.Metrics()}
			}
			return []*prometheus.Registry{process}
		}
	}
	return map[string]func() []*prometheus.Registry{
		"manager": start(true, func(d *deployment.Deployment) (func(context.Context) error, error) { return d.Manage, nil }),
		"apiserver": start(false, func(d *deployment.Deployment) (func(context.Context) error, error) {
			l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
			if err != nil {
				return nil, err
			}
			return d.Server(l)
		}),
	}
}

var descOf = regexp.MustCompile(`^Desc\{fqName: ("(?:[^"\\]|\\.)*"), help: ("(?:[^"\\]|\\.)*"),.* constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

// describeMetrics returns the metrics of all processes, ordered by name.
func describeMetrics(g Gomega, processes map[string]func() []*prometheus.Registry) []metric {
	all := map[string]*metric{}
	for _, process := range slices.Sorted(maps.Keys(processes)) {
		kinds := map[string]string{}
		for _, r := range processes[process]() {
			families, err := r.Gather()
			g.Expect(err).NotTo(HaveOccurred())
			for _, f := range families {
				kinds[f.GetName()] = strings.ToLower(f.GetType().String())
			}
			descs := make(chan *prometheus.Desc)
			go func() {
				r.Describe(descs)
				close(descs)
			}()
			var texts []string
			for d := range descs {
				texts = append(texts, d.String())
			}
			for _, text := range texts {
				parts := descOf.FindStringSubmatch(text)
				g.Expect(parts).NotTo(BeNil(), text)
				name, err := strconv.Unquote(parts[1])
				g.Expect(err).NotTo(HaveOccurred())
				help, err := strconv.Unquote(parts[2])
				g.Expect(err).NotTo(HaveOccurred())
				m := all[name]
				if m == nil {
					m = &metric{name: name, help: help}
					all[name] = m
				}
				g.Expect(m.help).To(Equal(help), "%s: one HELP", name)
				for _, l := range strings.Split(parts[3]+","+parts[4], ",") {
					if l, _, _ = strings.Cut(l, "="); l != "" && !slices.Contains(m.labels, l) {
						m.labels = append(m.labels, l)
					}
				}
				if !slices.Contains(m.processes, process) {
					m.processes = append(m.processes, process)
				}
			}
		}
		for name, m := range all {
			if kind := kinds[name]; kind != "" {
				m.kind = kind
			}
		}
	}
	var ordered []metric
	for _, name := range slices.Sorted(maps.Keys(all)) {
		m := all[name]
		slices.Sort(m.labels)
		if m.kind == "" { // it has no series yet
			switch {
			case strings.HasSuffix(name, "_total"):
				m.kind = "counter"
			case strings.HasSuffix(name, "_duration_seconds"):
				m.kind = "histogram"
			default:
				m.kind = "gauge"
			}
		}
		ordered = append(ordered, *m)
	}
	return ordered
}

// metricsText is the text of docs/reference/metrics.md.
func metricsText(metrics []metric) string {
	var b strings.Builder
	b.WriteString(`# Metrics

<!-- Generated from the code. Write it anew: go test ./cmd/db-controller -run TestMetricsReference -update -->

Managers and API servers serve ` + "`/metrics`" + ` on ` + "`--metrics-bind-address`" + ` (and on ` + "`--health-probe-bind-address`" + `) in Prometheus' text format. Units are in the names: seconds, bytes, ratios
from 0 to 1; what ends in ` + "`_total`" + ` only grows, until the process starts anew.

## Labels

| Label | Meaning |
|--|--|
| ` + "`db_service`" + ` | the service, for example packages.example.com |
| ` + "`target_region`" + ` | the region of the Deployment whose process measures; of references that are established, the region that is asked |
| ` + "`source_region`" + ` | the region that owns what is copied; of references that are established, the region that asks |
| ` + "`kind`" + ` | of syncing, ` + "`copy`" + `: the read copies of another region; ` + "`search`" + `: the search store, which follows the region's own database, so that both regions are the same |
| ` + "`resource`" + ` | a resource type, never a name |
| ` + "`reason`" + ` | why, from a short list |
| ` + "`node_kind`" + ` | what shards are shared out for: syncing, constraint, policy, search |

No label is one that the Prometheus Operator overwrites (` + strings.Join(overwritten, ", ") + `), and none holds names of resources or users: the number of series grows with pairs of
regions and with types alone. Several managers of a region share its shards, and each measures its own: take the maximum of ages, and the sum of counts.

## Three clocks

` + "`sync_contact_age_seconds`" + ` says whether the other region answers, ` + "`sync_apply_lag_seconds`" + ` how long what is known waits, and ` + "`sync_freshness_seconds`" + ` up to when the copy is *proven*
complete. Only the last one is right when the other region is away, so alerts and objectives are about it. What was never proven is +Inf, not 0.

` + "`sync_propagation_duration_seconds`" + ` and the other durations are histograms, classic and native at the same time. With native histograms switched on in
Prometheus, also keep the classic ones (` + "`scrape_classic_histograms`" + `): dashboards and rules use them.

## Metrics of db-controller

| Metric | Type | Of | Labels | Meaning |
|--|--|--|--|--|
`)
	for _, m := range metrics {
		labels := "–"
		if len(m.labels) > 0 {
			labels = "`" + strings.Join(m.labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", m.name, m.kind, strings.Join(m.processes, ", "), labels, strings.ReplaceAll(m.help, "|", `\|`))
	}
	b.WriteString(`
## Metrics of libraries

Under their usual names: ` + "`go_*` and `process_*`" + `; in Kubernetes also ` + "`controller_runtime_*`, `workqueue_*`, `rest_client_*` and `leader_election_*`" + `.

## What there is not

- Bytes that are pending: a region is told names and versions of what has changed, and learns how large rows are when they come.
- Retained WAL, size of a change log: db-controller keeps no replication slot and no change log in the databases. A region that is away for long costs its peers
  nothing; tombstones are removed after their retention all the same (` + "`dbcontroller_purged_rows_total`" + `), and it compares when it is back.
`)
	return b.String()
}
