package references

import (
	"time"

	"github.com/dbcontroller/db-controller/constraint"
	"github.com/dbcontroller/db-controller/deployment"
)

// grace is how long an owner may be missing.
const grace = 2 * time.Second

func timings(impatient bool, c deployment.Config) deployment.Config {
	c.PurgeAfter = 2 * time.Second
	retry := constraint.Retry{Min: 50 * time.Millisecond, Max: time.Second}
	c.References = deployment.References{
		TTL: 10 * time.Second, CallTimeout: 5 * time.Second, Grace: grace, GoneAfter: 2 * time.Second, Debounce: 100 * time.Millisecond,
		ScanInterval: 500 * time.Millisecond, Resync: 3 * time.Second, SweepAfter: 3 * time.Second,
		Poll: retry, DeleteRetry: retry, Away: retry, Reconnect: retry,
	}
	if impatient {
		c.References.TTL, c.References.CallTimeout = 4*time.Second, time.Second
	}
	return c
}
