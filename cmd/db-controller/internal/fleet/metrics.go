package fleet

import (
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// NewProcessMetrics returns a registry with the metrics of Go, the process and the build.
func NewProcessMetrics(version string) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), BuildInfo(version))
	return r
}

// BuildInfo returns dbcontroller_build_info.
func BuildInfo(version string) prometheus.Collector {
	goVersion, revision := "unknown", "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		goVersion = info.GoVersion
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				revision = s.Value
			}
		}
	}
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dbcontroller_build_info", Help: "Always 1; what runs is in the labels.",
		ConstLabels: prometheus.Labels{"version": version, "revision": revision, "go_version": goVersion},
	}, func() float64 { return 1 })
}

var runningDesc = prometheus.NewDesc("dbcontroller_deployment_running", "1 while the Deployment runs in this process, 0 while it cannot be opened: /statusz says why.",
	[]string{"db_service", "target_region"}, nil)

// Describe implements prometheus.Collector.
func (f *Fleet) Describe(ch chan<- *prometheus.Desc) { ch <- runningDesc }

// Collect implements prometheus.Collector: whether each Deployment runs. The Deployments have metrics of their own.
func (f *Fleet) Collect(ch chan<- prometheus.Metric) {
	for _, m := range f.all() {
		value := 0.0
		if d, _ := m.state(); d != nil {
			value = 1
		}
		ch <- prometheus.MustNewConstMetric(runningDesc, prometheus.GaugeValue, value, m.spec.Service, m.spec.Region)
	}
}
