package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// peerStatus and statusz are what /statusz sends.
type (
	peerStatus struct {
		Region      string   `json:"region"`
		State       string   `json:"state"`
		ContactAge  *float64 `json:"contactAgeSeconds"`
		Freshness   *float64 `json:"freshnessSeconds"`
		ApplyLag    *float64 `json:"applyLagSeconds"`
		PendingRows int64    `json:"pendingRows"`
		RowsApplied int64    `json:"rowsApplied"`
		Quarantined int64    `json:"quarantined"`
		Progress    float64  `json:"progress"`
		LastError   string   `json:"lastError,omitempty"`
	}
	deploymentStatus struct {
		Service string       `json:"service"`
		Region  string       `json:"region"`
		Version string       `json:"version"`
		Error   string       `json:"error,omitempty"`
		Peers   []peerStatus `json:"peers"`
	}
	statusz struct {
		Deployments []deploymentStatus `json:"deployments"`
	}
)

// endpoints are the operator's ports to ask.
type endpoints []string

func (e *endpoints) flag(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar((*[]string)(e), "endpoint", []string{"http://127.0.0.1:8081"}, "`URLs` of operator's ports (--health-probe-bind-address) of managers")
}

// read asks all endpoints.
func (e endpoints) read(ctx context.Context) (all statusz, err error) {
	for _, base := range e {
		one, err := readStatus(ctx, base)
		if err != nil {
			return all, fmt.Errorf("ask %s for its status: %w; is it the address of --health-probe-bind-address of a running manager?", base, err)
		}
		all.Deployments = append(all.Deployments, one.Deployments...)
	}
	return all, nil
}

func readStatus(ctx context.Context, base string) (s statusz, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if !strings.Contains(base, "://") {
		base = "http://" + base
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(base, "/")+"/statusz", nil)
	if err != nil {
		return s, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return s, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return s, fmt.Errorf("it answers %s", res.Status)
	}
	return s, json.NewDecoder(io.LimitReader(res.Body, 16<<20)).Decode(&s)
}

func newStatus() *cobra.Command {
	var e endpoints
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the Deployments that run, and what keeps one from running",
		Example: `  db-controller status
  db-controller status --endpoint http://10.0.0.7:8081 -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, e, output, writeStatus)
		},
	}
	e.flag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

func newLag() *cobra.Command {
	var e endpoints
	var output string
	var watch bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "lag",
		Short: "Show how far the read copies are behind their owners",
		Long: `Lag shows three clocks for each pair of regions:

  contact     since the owner last answered
  freshness   the age of the owner's state that is completely applied here; it grows while the owner is away
  apply lag   the age of the oldest change that has arrived and is not applied`,
		Example: `  db-controller lag
  db-controller lag --watch --endpoint http://10.0.0.7:8081,http://10.0.1.7:8081`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for {
				if err := show(cmd, e, output, writeLag); err != nil || !watch {
					return err
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
	e.flag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json (one line)")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "repeat until interrupted")
	cmd.Flags().DurationVar(&every, "every", time.Second, "pause between two repetitions")
	return cmd
}

func show(cmd *cobra.Command, e endpoints, output string, table func(io.Writer, statusz)) error {
	if output != "table" && output != "json" {
		return usageError{fmt.Errorf("--output %q: is neither table nor json", output)}
	}
	s, err := e.read(cmd.Context())
	if err != nil {
		return err
	}
	if output == "json" {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(s)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
	table(w, s)
	return w.Flush()
}

func writeStatus(w io.Writer, s statusz) {
	fmt.Fprintln(w, "SERVICE\tREGION\tVERSION\tPEERS LIVE\tQUARANTINED\tERROR")
	for _, d := range s.Deployments {
		live, quarantined := 0, int64(0)
		for _, p := range d.Peers {
			if p.State == "Live" {
				live++
			}
			quarantined += p.Quarantined
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d/%d\t%d\t%s\n", d.Service, d.Region, d.Version, live, len(d.Peers), quarantined, d.Error)
	}
}

func writeLag(w io.Writer, s statusz) {
	fmt.Fprintln(w, "SERVICE\tREGION\tFROM\tSTATE\tCONTACT\tFRESHNESS\tAPPLY LAG\tPENDING\tQUARANTINED\tLAST ERROR")
	for _, d := range s.Deployments {
		for _, p := range d.Peers {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\n", d.Service, d.Region, p.Region, p.State,
				seconds(p.ContactAge), seconds(p.Freshness), seconds(p.ApplyLag), p.PendingRows, p.Quarantined, p.LastError)
		}
	}
}

func seconds(s *float64) string {
	if s == nil {
		return "unknown"
	}
	return fmt.Sprintf("%.3fs", *s)
}
