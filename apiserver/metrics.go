package apiserver

import (
	"errors"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dbcontroller/db-controller/internal/pki"
)

type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	refused  *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dbcontroller_requests_total",
			Help: "Calls that ended, by method and code (ok or the name of a google.rpc.Code in lower case). REST calls count as the RPC they stand for.",
		}, []string{"method", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:                            "dbcontroller_request_duration_seconds",
			Help:                            "Seconds that calls took that are no streams.",
			Buckets:                         []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
			NativeHistogramBucketFactor:     1.1,
			NativeHistogramMaxBucketNumber:  100,
			NativeHistogramMinResetDuration: time.Hour,
		}, []string{"method"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dbcontroller_tls_handshake_errors_total",
			Help: "Connections that were refused, or given up, before their TLS handshake was done, by reason.",
		}, []string{"reason"}),
	}
	for _, reason := range pki.Refusals {
		m.refused.WithLabelValues(reason)
	}
	if r == nil {
		return m, nil
	}
	return m, errors.Join(r.Register(m.requests), r.Register(m.duration), r.Register(m.refused))
}

func (m *metrics) observe(procedure string, stream bool, err error, took time.Duration) {
	method := procedure[strings.LastIndexByte(procedure, '.')+1:] // Resources/Get
	code := "ok"
	if err != nil {
		code = connect.CodeOf(err).String()
	}
	m.requests.WithLabelValues(method, code).Inc()
	if !stream {
		m.duration.WithLabelValues(method).Observe(took.Seconds())
	}
}
