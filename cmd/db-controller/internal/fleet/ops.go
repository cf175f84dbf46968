package fleet

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// checkTimeout bounds each check of /readyz.
const checkTimeout = 3 * time.Second

// Handler serves the operator:
//
//	/healthz   the process answers
//	/readyz    the topology is known and every Deployment runs and reaches its database; ?verbose lists the checks.
//	           How far peers are does not decide: a region that is away does not make this one unready
//	/statusz   Status as JSON
//	/metrics   of all Deployments, and of process; docs/reference/metrics.md lists them
//
// /readyz fails once stopping is done.
func (f *Fleet) Handler(stopping context.Context, process prometheus.Gatherer) http.Handler {
	own := prometheus.NewRegistry()
	own.MustRegister(f)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { f.ready(stopping, w, r) })
	mux.HandleFunc("GET /statusz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(struct {
			Deployments []Status `json:"deployments"`
		}{f.Status()})
	})
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		gatherers := prometheus.Gatherers{process, own}
		for _, m := range f.all() {
			if d, _ := m.state(); d != nil {
				gatherers = append(gatherers, d.Metrics())
			}
		}
		promhttp.HandlerFor(gatherers, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}).ServeHTTP(w, r)
	})
	return mux
}

func (f *Fleet) ready(stopping context.Context, w http.ResponseWriter, r *http.Request) {
	ready := true
	var report strings.Builder
	check := func(name string, err error) {
		if err == nil {
			fmt.Fprintf(&report, "[+] %s\n", name)
			return
		}
		ready = false
		fmt.Fprintf(&report, "[-] %s: %v\n", name, err)
	}
	check("running", stopping.Err())
	var unknown error
	if !f.cfg.Registry.Synced() {
		unknown = fmt.Errorf("it is not known yet")
	}
	check("topology", unknown)
	for _, m := range f.all() {
		d, err := m.state()
		if d != nil {
			ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
			err = d.Core().Ping(ctx)
			cancel()
		} else if err == nil {
			err = fmt.Errorf("it is being opened")
		}
		check(m.spec.Key.String(), err)
	}
	verdict := "ready"
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if !ready {
		verdict = "not ready"
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	if !ready || r.URL.Query().Has("verbose") {
		_, _ = fmt.Fprint(w, report.String())
	}
	_, _ = fmt.Fprintln(w, verdict)
}
