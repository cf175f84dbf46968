package nodemanager

import "github.com/prometheus/client_golang/prometheus"

// metrics of a manager. Whose they are, service and region, is for the registry they go to.
type metrics struct {
	owned    *prometheus.GaugeVec
	unowned  *prometheus.GaugeVec
	moves    *prometheus.CounterVec
	handover *prometheus.HistogramVec
	leader   prometheus.Gauge
}

func newMetrics() *metrics {
	kind := []string{"node_kind"}
	return &metrics{
		owned: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dbcontroller_shards_owned", Help: "Shards that nodes of this process work on.",
		}, kind),
		unowned: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dbcontroller_shards_unowned", Help: "Shards of the ring that no living node works on. Told by the leader alone.",
		}, kind),
		moves: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dbcontroller_shard_moves_total", Help: "Shards granted to another node than before, by why: start, join, leave, death, ring. Told by the leader alone.",
		}, []string{"node_kind", "cause"}),
		handover: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "dbcontroller_shard_handover_duration_seconds",
			Help:    "Seconds from a plan that wants more shards of a node of this process until the node works on them.",
			Buckets: []float64{.01, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 40, 80},
		}, kind),
		leader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "dbcontroller_node_leader", Help: "1 if this process makes the plans of the shards, 0 otherwise.",
		}),
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.owned, m.unowned, m.moves, m.handover, m.leader}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(to chan<- *prometheus.Desc) {
	for _, c := range m.all() {
		c.Describe(to)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(to chan<- prometheus.Metric) {
	for _, c := range m.all() {
		c.Collect(to)
	}
}

func (m *metrics) leads(yes bool) {
	m.leader.Set(0)
	if yes {
		m.leader.Set(1)
	}
}

// reset forgets what was true of a membership that is over.
func (m *metrics) reset() {
	m.leads(false)
	m.unowned.Reset()
	m.owned.Reset()
}
