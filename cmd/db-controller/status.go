package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dbcontroller/db-controller/nodemanager"
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
		// PolicyHeld says why the declared policy of the service is not in force.
		PolicyHeld []string `json:"policyHeld,omitempty"`
		// Shards says which manager works on which shards.
		Shards []nodemanager.KindStatus `json:"shards,omitempty"`
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
  apply lag   the age of the oldest change that has arrived and is not applied

With --watch a terminal shows the present state in place; elsewhere each repetition adds lines that begin with the time.`,
		Example: `  db-controller lag
  db-controller lag --watch --endpoint http://10.0.0.7:8081,http://10.0.1.7:8081`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !watch {
				return show(cmd, e, output, writeLag)
			}
			return watchLag(cmd, e, output, every)
		},
	}
	e.flag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json (one line)")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "repeat until interrupted")
	cmd.Flags().DurationVar(&every, "every", time.Second, "pause between two repetitions")
	return cmd
}

// watchLag repeats until it is interrupted. Only the first answer must come: later a manager may restart.
func watchLag(cmd *cobra.Command, e endpoints, output string, every time.Duration) error {
	if err := checkOutput(output); err != nil {
		return err
	}
	if every <= 0 {
		return usageError{fmt.Errorf("--every %v: must be more than zero, for example 1s", every)}
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for first := true; ; first = false {
		s, err := e.read(cmd.Context())
		if cmd.Context().Err() != nil {
			return nil
		}
		if err != nil && first {
			return err
		}
		if err := drawLag(cmd.OutOrStdout(), cmd.ErrOrStderr(), output, first, time.Now(), s, err); err != nil {
			return err
		}
		select {
		case <-cmd.Context().Done():
			return nil
		case <-tick.C:
		}
	}
}

// What a terminal does with these: back to the upper left corner and clear; erase what is left of the line; erase everything below.
const (
	clearScreen = "\x1b[H\x1b[2J"
	toCorner    = "\x1b[H"
	clearLine   = "\x1b[K"
	clearBelow  = "\x1b[J"
)

// drawLag shows one repetition; failed is why there is no new state.
func drawLag(out, errOut io.Writer, output string, first bool, now time.Time, s statusz, failed error) (err error) {
	f, isFile := out.(*os.File)
	terminal := isFile && output == "table" && term.IsTerminal(int(f.Fd()))
	switch {
	case failed != nil && !terminal:
		_, err = fmt.Fprintln(errOut, failed)
		return err
	case output == "json":
		return json.NewEncoder(out).Encode(s)
	}
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 3, ' ', 0)
	writeLag(w, s)
	if err := w.Flush(); err != nil {
		return err
	}
	var text strings.Builder
	if terminal {
		text.WriteString(toCorner)
		if first {
			text.WriteString(clearScreen)
		}
		fmt.Fprintf(&text, "%s%s\n\n", now.Format(time.TimeOnly), clearLine)
		if failed != nil {
			fmt.Fprintf(&text, "%v%s\n", failed, clearLine)
		}
		text.WriteString(strings.ReplaceAll(table.String(), "\n", clearLine+"\n"))
		text.WriteString(clearBelow)
	} else {
		stamp := now.UTC().Format(time.RFC3339)
		for i, line := range strings.SplitAfter(table.String(), "\n") {
			switch {
			case line == "":
			case i > 0:
				text.WriteString(stamp + "   " + line)
			case first:
				fmt.Fprintf(&text, "%-*s   %s", len(stamp), "TIME", line)
			}
		}
	}
	_, err = io.WriteString(out, text.String())
	return err
}

func checkOutput(output string) error {
	if output != "table" && output != "json" {
		return usageError{fmt.Errorf("--output %q: is neither table nor json", output)}
	}
	return nil
}

func show(cmd *cobra.Command, e endpoints, output string, table func(io.Writer, statusz)) error {
	if err := checkOutput(output); err != nil {
		return err
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
	for _, d := range s.Deployments {
		for _, why := range d.PolicyHeld {
			fmt.Fprintf(w, "\n%s in %s follows the former multiRegionPolicy of the ServiceDescriptor: %s\n", d.Service, d.Region, why)
		}
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
