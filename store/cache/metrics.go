package cache

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
)

// PoolStats returns the state of the connections that reads use; zero while there are none.
func (s *Store) PoolStats() *redis.PoolStats {
	if v := s.view.Load(); v != nil {
		return v.rdb.PoolStats()
	}
	return new(redis.PoolStats)
}

type metrics struct {
	hit, miss, bypass, error                 prometheus.Counter
	listHit, listMiss, listBypass, listError prometheus.Counter

	age         prometheus.Histogram
	invalidated prometheus.Counter
}

func newMetrics(r prometheus.Registerer, live func() bool) (*metrics, error) {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "dbcontroller_cache_requests_total",
		Help: "Reads by what is read (resource, or page of a type whose lists are cached) and what the cache did: hit; miss, the database was read; bypass, Redis " +
			"was not asked; error, Redis was asked in vain. The hit rate is hit over all.",
	}, []string{"read", "result"})
	const resource, page = "resource", "page"
	m := &metrics{
		hit: requests.WithLabelValues(resource, "hit"), miss: requests.WithLabelValues(resource, "miss"),
		bypass: requests.WithLabelValues(resource, "bypass"), error: requests.WithLabelValues(resource, "error"),
		listHit: requests.WithLabelValues(page, "hit"), listMiss: requests.WithLabelValues(page, "miss"),
		listBypass: requests.WithLabelValues(page, "bypass"), listError: requests.WithLabelValues(page, "error"),
		age: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "dbcontroller_cache_entry_age_seconds",
			Help:    "Seconds since what was a hit had been read from the database.",
			Buckets: []float64{.01, .1, 1, 10, 60, 600, 3600},
		}),
		invalidated: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "dbcontroller_cache_invalidated_names_total",
			Help: "Names that the change feed has had deleted from the cache.",
		}),
	}
	if r == nil {
		return m, nil
	}
	return m, errors.Join(r.Register(requests), r.Register(m.age), r.Register(m.invalidated), r.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dbcontroller_cache_live", Help: "1 while reads are answered from Redis, 0 while all of them go to the database.",
	}, func() float64 {
		if live() {
			return 1
		}
		return 0
	})))
}
