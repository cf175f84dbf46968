package registry

import "github.com/prometheus/client_golang/prometheus"

var (
	objectsDesc  = prometheus.NewDesc("dbcontroller_registry_objects", "Objects of the topology that are in force.", []string{"kind"}, nil)
	problemsDesc = prometheus.NewDesc("dbcontroller_registry_problems", "Objects and manifests that are not in force as written.", []string{"reason"}, nil)
)

// Describe implements prometheus.Collector.
func (r *Registry) Describe(ch chan<- *prometheus.Desc) {
	ch <- objectsDesc
	ch <- problemsDesc
}

// Collect implements prometheus.Collector: a Registry is registered as it is.
func (r *Registry) Collect(ch chan<- prometheus.Metric) {
	v := r.View()
	ch <- prometheus.MustNewConstMetric(objectsDesc, prometheus.GaugeValue, float64(len(v.deployments)), "Deployment")
	ch <- prometheus.MustNewConstMetric(objectsDesc, prometheus.GaugeValue, float64(len(v.services)), "ServiceDescriptor")
	// Every reason has a value, so that a cured problem is a 0 and not a gap.
	count := map[Reason]int{Conflict: 0, InvalidDescriptor: 0, InvalidDeployment: 0, InvalidManifest: 0}
	for _, p := range r.Problems() {
		count[p.Reason]++
	}
	for reason, n := range count {
		ch <- prometheus.MustNewConstMetric(problemsDesc, prometheus.GaugeValue, float64(n), string(reason))
	}
}
