package deployment

import (
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
)

// registerer takes metrics that do not name the Deployment themselves.
func (d *Deployment) registerer() prometheus.Registerer {
	return prometheus.WrapRegistererWith(prometheus.Labels{"db_service": d.cfg.Service, "target_region": d.cfg.Region}, d.metrics)
}

// measure registers the metrics of what the whole Deployment uses: connections, certificates, and what the purge removes.
func (d *Deployment) measure() error {
	d.purged = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dbcontroller_purged_rows_total",
		Help: "Rows that were removed because they are older than the retention, by kind: tombstones of deleted resources, fences of references."}, []string{"kind"})
	for _, kind := range []string{purgedTombstones, purgedFences} {
		d.purged.WithLabelValues(kind)
	}
	held := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dbcontroller_policy_held",
		Help: "1 while the policy of the service that is declared is not in force, and the former one is; otherwise 0. /statusz says why."}, func() float64 {
		return float64(min(1, len(d.PolicyHeld())))
	})
	return registerAll(d.registerer(), d.purged, d.fencedWrites(), held, &connections{d})
}

func registerAll(r prometheus.Registerer, all ...prometheus.Collector) error {
	for _, c := range all {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

// What is purged.
const (
	purgedTombstones = "tombstone"
	purgedFences     = "fence"
)

// redisPool is a store with connections to a Redis.
type redisPool interface{ PoolStats() *redis.PoolStats }

// connections collects the state of pools and certificates when it is asked.
type connections struct{ d *Deployment }

var (
	postgresOpen = prometheus.NewDesc("dbcontroller_postgres_connections", "Connections to the database, by state: used, idle or opening.", []string{"state"}, nil)
	postgresMax  = prometheus.NewDesc("dbcontroller_postgres_connections_max", "Most connections to the database that the process opens.", nil, nil)
	postgresUses = prometheus.NewDesc("dbcontroller_postgres_acquires_total", "Times that a connection to the database was taken from the pool.", nil, nil)
	postgresWait = prometheus.NewDesc("dbcontroller_postgres_acquire_waits_total", "Times that a connection had to be waited for, since none was idle.", nil, nil)
	postgresTime = prometheus.NewDesc("dbcontroller_postgres_acquire_wait_seconds_total", "Seconds that were spent waiting for a connection to the database.", nil, nil)
	postgresGave = prometheus.NewDesc("dbcontroller_postgres_acquires_canceled_total", "Times that the caller gave up before there was a connection.", nil, nil)
	redisOpen    = prometheus.NewDesc("dbcontroller_redis_connections", "Connections to Redis, by what it is for (cache, search) and state (used, idle).", []string{"kind", "state"}, nil)
	redisNew     = prometheus.NewDesc("dbcontroller_redis_acquires_total", "Times that a connection to Redis was asked for, by what came: hit (an idle one), miss (a new one) or timeout.",
		[]string{"kind", "result"}, nil)
	certificateStart = prometheus.NewDesc("dbcontroller_certificate_start_timestamp_seconds", "Unix time in seconds from which the Deployment's certificate is valid; absent without TLS.", nil, nil)
	certificateEnd   = prometheus.NewDesc("dbcontroller_certificate_expiry_timestamp_seconds", "Unix time in seconds at which the Deployment's certificate ends; absent without TLS.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *connections) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{postgresOpen, postgresMax, postgresUses, postgresWait, postgresTime, postgresGave, redisOpen, redisNew, certificateStart, certificateEnd} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *connections) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	c.postgres(c.d.core.PoolStats(), gauge, counter)
	pools := map[string]any{"search": c.d.search}
	if c.d.cache != nil {
		pools["cache"] = c.d.cache
	}
	for kind, p := range pools {
		if p, ok := p.(redisPool); ok {
			s := p.PoolStats()
			gauge(redisOpen, float64(s.TotalConns-min(s.IdleConns, s.TotalConns)), kind, "used")
			gauge(redisOpen, float64(s.IdleConns), kind, "idle")
			counter(redisNew, float64(s.Hits), kind, "hit")
			counter(redisNew, float64(s.Misses), kind, "miss")
			counter(redisNew, float64(s.Timeouts), kind, "timeout")
		}
	}
	if c.d.cfg.TLS != nil {
		if m, err := c.d.cfg.TLS(); err == nil && m.Certificate.Leaf != nil {
			gauge(certificateStart, float64(m.Certificate.Leaf.NotBefore.Unix()))
			gauge(certificateEnd, float64(m.Certificate.Leaf.NotAfter.Unix()))
		}
	}
}

func (c *connections) postgres(s *pgxpool.Stat, gauge, counter func(*prometheus.Desc, float64, ...string)) {
	gauge(postgresOpen, float64(s.AcquiredConns()), "used")
	gauge(postgresOpen, float64(s.IdleConns()), "idle")
	gauge(postgresOpen, float64(s.ConstructingConns()), "opening")
	gauge(postgresMax, float64(s.MaxConns()))
	counter(postgresUses, float64(s.AcquireCount()))
	counter(postgresWait, float64(s.EmptyAcquireCount()))
	counter(postgresTime, s.EmptyAcquireWaitTime().Seconds())
	counter(postgresGave, float64(s.CanceledAcquireCount()))
}
