package syncing

import (
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are those of one ControllerNode. Gauges are computed when asked, so that they go on growing while nothing moves.
type metrics struct {
	status func() []PeerStatus

	propagation *prometheus.HistogramVec
	rows        *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	errors      *prometheus.CounterVec
	retries     *prometheus.CounterVec
	mismatched  *prometheus.GaugeVec
	throttled   *prometheus.CounterVec
	quarantined *prometheus.CounterVec
}

const sourceRegion = "source_region"

func newMetrics(status func() []PeerStatus) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_" + name, Help: help}, append([]string{sourceRegion}, labels...))
	}
	return &metrics{
		status: status,
		propagation: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "dbcontroller_sync_propagation_duration_seconds", Help: "Seconds from the commit of the owner's write until the copy was visible, by the owner's clock.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 18), NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}, []string{sourceRegion}),
		rows:        counter("sync_applied_rows_total", "Rows that changed a copy, by how they came: tail (a change as it happened), copy, compare, repair or delete.", "op"),
		bytes:       counter("sync_applied_bytes_total", "Bytes of rows that were handed to the database."),
		errors:      counter("sync_errors_total", "Failures of sessions, questions and audits, by the reason; each is tried again.", "reason"),
		retries:     counter("sync_retries_total", "Sessions that were started again after a failure."),
		throttled:   counter("sync_throttled_seconds_total", "Seconds for which copies and comparisons were held back, by the reason: the side that is slow, or live changes that go first.", "reason"),
		quarantined: counter("sync_quarantined_rows_total", "Rows that could not be applied and were set aside; those that are still there are dbcontroller_quarantined_rows."),
		mismatched:  prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dbcontroller_sync_mismatched_shards", Help: "Shards in which the last audit found copies that were not equal to their owner's rows; it repairs what it can."}, []string{sourceRegion, "shards"}),
	}
}

// follow gives the series of a peer that count from 0, so that the first failure is an increase.
func (m *metrics) follow(region string) {
	for _, r := range reasons {
		m.errors.WithLabelValues(region, string(r))
	}
	for _, t := range throttles {
		m.throttled.WithLabelValues(region, string(t))
	}
	for _, c := range []*prometheus.CounterVec{m.bytes, m.retries, m.quarantined} {
		c.WithLabelValues(region)
	}
}

// forget removes the series of a peer.
func (m *metrics) forget(region string) {
	of := prometheus.Labels{sourceRegion: region}
	m.propagation.DeletePartialMatch(of)
	m.mismatched.DeletePartialMatch(of)
	for _, c := range []*prometheus.CounterVec{m.rows, m.bytes, m.errors, m.retries, m.throttled, m.quarantined} {
		c.DeletePartialMatch(of)
	}
}

func (m *metrics) vectors() []prometheus.Collector {
	return []prometheus.Collector{m.propagation, m.rows, m.bytes, m.errors, m.retries, m.mismatched, m.throttled, m.quarantined}
}

// gauge is a metric of a pair that is computed from its status; NaN leaves it out.
type gauge struct {
	desc  *prometheus.Desc
	value func(PeerStatus) float64
}

func newGauge(name, help string, value func(PeerStatus) float64) gauge {
	return gauge{prometheus.NewDesc("dbcontroller_"+name, help, []string{sourceRegion}, nil), value}
}

var gauges = []gauge{
	newGauge("sync_contact_age_seconds", "Seconds since the peer last answered; +Inf before it ever has.",
		func(s PeerStatus) float64 { return orInf(s.ContactAge) }),
	newGauge("sync_freshness_seconds", "Age in seconds of the peer's state up to which the copy is proven complete; grows while the peer is away; +Inf before it ever was.",
		func(s PeerStatus) float64 { return orInf(s.Freshness) }),
	newGauge("sync_apply_lag_seconds", "Age in seconds of the oldest change that is known here and not applied; 0 when there is none.",
		func(s PeerStatus) float64 { return orInf(s.ApplyLag) }),
	newGauge("sync_pending_rows", "Rows that are known and not applied: received, named by a comparison, or still to come of an initial copy.", func(s PeerStatus) float64 { return float64(s.PendingRows) }),
	newGauge("quarantined_rows", "Rows that could not be applied and wait for a correction.", func(s PeerStatus) float64 { return float64(s.Quarantined) }),
	newGauge("copy_progress_ratio", "Progress of the initial copy or comparison, 0 to 1; 1 when done.", func(s PeerStatus) float64 { return s.Progress }),
	newGauge("copy_remaining_seconds", "How long the initial copy or comparison still takes at the speed so far; 0 when done; absent while it is not known.",
		func(s PeerStatus) float64 { return orNaN(s.Remaining) }),
	newGauge("clock_offset_seconds", "The peer's clock minus ours in seconds, as estimated; absent before it was.", func(s PeerStatus) float64 { return orNaN(s.ClockOffset) }),
	newGauge("suspended", "1 while copying is suspended by the Deployment, else 0.", func(s PeerStatus) float64 {
		if s.Suspended {
			return 1
		}
		return 0
	}),
}

func orInf(d *time.Duration) float64 {
	if d == nil {
		return math.Inf(1)
	}
	return d.Seconds()
}

func orNaN(d *time.Duration) float64 {
	if d == nil {
		return math.NaN()
	}
	return d.Seconds()
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, g := range gauges {
		ch <- g.desc
	}
	for _, v := range m.vectors() {
		v.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, s := range m.status() {
		for _, g := range gauges {
			if v := g.value(s); !math.IsNaN(v) {
				ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, v, s.Region)
			}
		}
	}
	for _, v := range m.vectors() {
		v.Collect(ch)
	}
}
