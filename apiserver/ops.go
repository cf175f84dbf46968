package apiserver

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// checkTimeout bounds each check of /readyz.
const checkTimeout = 3 * time.Second

// Check is one named condition of readiness.
type Check struct {
	Name string
	// Run returns what is wrong, or nil.
	Run func(context.Context) error
	// Informational checks are shown by ?verbose and do not decide: a peer that is away does not make this server unready.
	Informational bool
}

// OpsHandler serves the operator, on a port that users need not reach: /healthz (the process answers), /readyz (all checks but
// informational ones pass; ?verbose lists them), /statusz (JSON) and /metrics.
func (s *Server) OpsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.HandleFunc("GET /statusz", s.statusz)
	if s.cfg.Metrics != nil {
		mux.Handle("GET /metrics", s.cfg.Metrics)
	}
	return mux
}

func (s *Server) readyz(w http.ResponseWriter, r *http.Request) {
	ready := s.draining.Err() == nil
	var report strings.Builder
	line := func(name, verdict string) { fmt.Fprintf(&report, "[%s] %s\n", verdict, name) }
	if !ready {
		line("stopping", "-")
	}
	for _, c := range s.cfg.Checks {
		ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
		err := c.Run(ctx)
		cancel()
		switch {
		case err == nil:
			line(c.Name, "+")
		case c.Informational:
			line(c.Name+": "+err.Error()+" (does not decide)", "-")
		default:
			line(c.Name+": "+err.Error(), "-")
			ready = false
		}
	}
	verdict, status := "ready", http.StatusOK
	if !ready {
		verdict, status = "not ready", http.StatusServiceUnavailable
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	if r.URL.Query().Has("verbose") || !ready {
		_, _ = fmt.Fprint(w, report.String())
	}
	_, _ = fmt.Fprintln(w, verdict)
}

func (s *Server) statusz(w http.ResponseWriter, r *http.Request) {
	var status any = struct{}{}
	if s.cfg.Status != nil {
		status = s.cfg.Status()
	}
	body, err := json.MarshalIndent(status, "", "  ")
	if err != nil {
		s.log.ErrorContext(r.Context(), "status cannot be encoded", "error", err)
		http.Error(w, "status cannot be encoded", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(body, '\n'))
}
