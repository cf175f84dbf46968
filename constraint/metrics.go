package constraint

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/dbcontroller/db-controller/store"
)

// metrics are those of one Node. What is pending is computed when asked, so that its age goes on growing while nothing moves.
type metrics struct {
	pending   func() []pendingJob
	blockades func() int

	dangling  prometheus.Gauge
	danglings atomic.Int64 // the same number, for Health
	handled   *prometheus.CounterVec
	retries   *prometheus.CounterVec
}

// pendingJob is a job for the metrics.
type pendingJob struct {
	kind      jobKind
	since     time.Time
	blockades int
}

func newMetrics(pending func() []pendingJob, blockades func() int) *metrics {
	m := &metrics{
		pending: pending, blockades: blockades,
		dangling: prometheus.NewGauge(prometheus.GaugeOpts{Name: "dbcontroller_reference_dangling",
			Help: "Committed references that were found to point to nothing since the process started. Must be 0."}),
		handled: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_reference_handled_total",
			Help: "Referrers of deleted resources that were handled: fields unset, resources deleted, or deletions deferred because something blocks them."}, []string{"action"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_reference_retries_total",
			Help: "Work on references that could not be done and is tried again."}, []string{"kind", "reason"}),
	}
	for _, action := range []string{actionUnset, actionDelete, actionDefer} {
		m.handled.WithLabelValues(action)
	}
	return m
}

// What was done with a referrer.
const (
	actionUnset  = "unset"
	actionDelete = "delete"
	actionDefer  = "defer"
)

var (
	pendingDesc = prometheus.NewDesc("dbcontroller_reference_pending_tasks", "Work on references that is not done, as far as this process has read it: at most the size of its queue of each kind.", []string{"kind"}, nil)
	oldestDesc  = prometheus.NewDesc("dbcontroller_reference_oldest_seconds", "Age in seconds of the oldest work on references that is not done; 0 without any.", []string{"kind"}, nil)
	heldDesc    = prometheus.NewDesc("dbcontroller_reference_blockades", "Tentative blockades held: writes elsewhere that may refer to resources here, and are not known to have ended.", nil, nil)
	expiredDesc = prometheus.NewDesc("dbcontroller_reference_expired_blockades", "Tentative blockades that have expired and whose Deployment has not answered yet.", nil, nil)
	cascadeDesc = prometheus.NewDesc("dbcontroller_cascade_pending_rows", "Deleted resources of which others must still be told.", nil, nil)
	deletedDesc = prometheus.NewDesc("dbcontroller_cascade_oldest_seconds", "Age in seconds of the oldest deletion of which others must still be told; 0 without any.", nil, nil)
)

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{pendingDesc, oldestDesc, heldDesc, expiredDesc, cascadeDesc, deletedDesc} {
		ch <- d
	}
	m.dangling.Describe(ch)
	m.handled.Describe(ch)
	m.retries.Describe(ch)
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	now := time.Now()
	count, oldest, blockades := map[jobKind]int{}, map[jobKind]float64{}, 0
	for _, j := range m.pending() {
		count[j.kind]++
		oldest[j.kind] = max(oldest[j.kind], now.Sub(j.since).Seconds())
		blockades += j.blockades
	}
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	// Every kind has a value, so that work that is done is a 0 and not a gap.
	for _, kind := range []jobKind{jobConfirm, jobOwners, jobOwnees, jobDelete, jobExpire, jobDrain, jobHandle, jobSweep, jobForget} {
		gauge(pendingDesc, float64(count[kind]), string(kind))
		gauge(oldestDesc, oldest[kind], string(kind))
	}
	gauge(heldDesc, float64(m.blockades()))
	gauge(expiredDesc, float64(blockades))
	gauge(cascadeDesc, float64(count[jobDrain]))
	gauge(deletedDesc, oldest[jobDrain])
	m.dangling.Collect(ch)
	m.handled.Collect(ch)
	m.retries.Collect(ch)
}

// pending returns the jobs that are under way.
func (s *session) pending() []pendingJob {
	s.jobsMu.Lock()
	defer s.jobsMu.Unlock()
	all := make([]pendingJob, 0, len(s.jobs))
	for _, j := range s.jobs {
		if h := s.handlers[j.key.kind]; !j.begun && !h.shadow && time.Since(j.added) < h.delay {
			continue // planned for later: nobody waits for it
		}
		since := j.task.TaskTime
		if since.IsZero() {
			since = j.added
		}
		all = append(all, pendingJob{j.key.kind, since, len(j.blockades)})
	}
	return all
}

// layerMetrics are those of one layer.
type layerMetrics struct {
	blocked   *prometheus.CounterVec
	establish *prometheus.HistogramVec
}

// Why a deletion is refused.
const (
	blockedHere        = "referenced"
	blockedElsewhere   = "referenced_elsewhere"
	blockedTentatively = "tentative"
	blockedByService   = "block_deletion"
	blockedUnasked     = "unreachable"
	blockedTooLarge    = "too_large"
)

// newLayerMetrics names the Deployment in each series: one process may serve several.
func newLayerMetrics(r prometheus.Registerer, self store.Location) layerMetrics {
	with := promauto.With(r)
	m := layerMetrics{
		blocked: with.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_deletes_blocked_total", Help: "Deletions that were refused, by the reason.",
			ConstLabels: prometheus.Labels{"db_service": self.Service, "target_region": self.Region}}, []string{"reason"}),
		establish: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "dbcontroller_establish_duration_seconds", Help: "Seconds that calls took which establish new references at the Deployment of their targets, within a save.",
			ConstLabels: prometheus.Labels{"db_service": self.Service, "source_region": self.Region},
			Buckets:     prometheus.ExponentialBuckets(0.001, 2, 14), NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}, []string{"target_service", "target_region", "outcome"}),
	}
	for _, reason := range []string{blockedHere, blockedElsewhere, blockedTentatively, blockedByService, blockedUnasked, blockedTooLarge} {
		m.blocked.WithLabelValues(reason)
	}
	return m
}

type backgroundKey struct{}

// inBackground marks writes that nobody waits for: they are tried again by themselves, and their refusals are no news.
func inBackground(ctx context.Context) context.Context {
	return context.WithValue(ctx, backgroundKey{}, true)
}

// refused counts the refusal of a deletion, says so, and returns what the user gets.
func (s *Store) refused(ctx context.Context, err error) error {
	e, ok := errors.AsType[*blockedError](err)
	if !ok {
		return err
	}
	s.metrics.blocked.WithLabelValues(e.reason).Inc()
	level := slog.LevelInfo
	if ctx.Value(backgroundKey{}) != nil {
		level = slog.LevelDebug
	}
	s.log.Log(ctx, level, "references: a deletion was refused", "reason", e.reason, "error", e.err)
	return e.err
}
