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
}

const sourceRegion = "source_region"

func newMetrics(status func() []PeerStatus) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_" + name, Help: help}, append([]string{sourceRegion}, labels...))
	}
	return &metrics{
		status: status,
		propagation: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "dbcontroller_sync_propagation_duration_seconds", Help: "From the owner's write to the copy.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 18), NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}, []string{sourceRegion}),
		rows:       counter("sync_applied_rows_total", "Rows that changed a copy, by how they came.", "op"),
		bytes:      counter("sync_applied_bytes_total", "Bytes of rows handed to the database."),
		errors:     counter("sync_errors_total", "Failures of sessions, questions and audits.", "reason"),
		retries:    counter("sync_retries_total", "Sessions that were started again after a failure."),
		throttled:  counter("sync_throttled_seconds_total", "Time for which bulk work was held back, by the reason.", "reason"),
		mismatched: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dbcontroller_sync_mismatched_shards", Help: "Shards in which the last audit found copies that were not equal to their owner's rows; it repairs what it can."}, []string{sourceRegion, "shards"}),
	}
}

// forget removes the series of a peer.
func (m *metrics) forget(region string) {
	of := prometheus.Labels{sourceRegion: region}
	m.propagation.DeletePartialMatch(of)
	m.mismatched.DeletePartialMatch(of)
	for _, c := range []*prometheus.CounterVec{m.rows, m.bytes, m.errors, m.retries, m.throttled} {
		c.DeletePartialMatch(of)
	}
}

func (m *metrics) vectors() []prometheus.Collector {
	return []prometheus.Collector{m.propagation, m.rows, m.bytes, m.errors, m.retries, m.mismatched, m.throttled}
}

// gauge is a metric of a pair that is computed from its status.
type gauge struct {
	desc  *prometheus.Desc
	value func(PeerStatus) float64
}

func newGauge(name, help string, value func(PeerStatus) float64) gauge {
	return gauge{prometheus.NewDesc("dbcontroller_"+name, help, []string{sourceRegion}, nil), value}
}

var gauges = []gauge{
	newGauge("sync_contact_age_seconds", "Since the peer last answered; +Inf before it ever has.",
		func(s PeerStatus) float64 { return orInf(s.ContactAge) }),
	newGauge("sync_freshness_seconds", "Age of the peer's state up to which the copy is proven complete; +Inf before it ever was.",
		func(s PeerStatus) float64 { return orInf(s.Freshness) }),
	newGauge("sync_apply_lag_seconds", "Age of the oldest change known and not applied; 0 when there is none.",
		func(s PeerStatus) float64 { return orInf(s.ApplyLag) }),
	newGauge("sync_pending_rows", "Rows known and not applied.", func(s PeerStatus) float64 { return float64(s.PendingRows) }),
	newGauge("quarantined_rows", "Rows that could not be applied.", func(s PeerStatus) float64 { return float64(s.Quarantined) }),
	newGauge("copy_progress_ratio", "Progress of the initial copy or comparison; 1 when done.", func(s PeerStatus) float64 { return s.Progress }),
	newGauge("suspended", "1 while copying is suspended.", func(s PeerStatus) float64 {
		if s.Suspended {
			return 1
		}
		return 0
	}),
}

var clockOffset = newGauge("clock_offset_seconds", "The peer's clock minus ours, as estimated.", func(s PeerStatus) float64 { return s.ClockOffset.Seconds() })

func orInf(d *time.Duration) float64 {
	if d == nil {
		return math.Inf(1)
	}
	return d.Seconds()
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, g := range append([]gauge{clockOffset}, gauges...) {
		ch <- g.desc
	}
	for _, v := range m.vectors() {
		v.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, s := range m.status() {
		of := gauges
		if s.ClockOffset != nil {
			of = append([]gauge{clockOffset}, gauges...)
		}
		for _, g := range of {
			ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, g.value(s), s.Region)
		}
	}
	for _, v := range m.vectors() {
		v.Collect(ch)
	}
}
