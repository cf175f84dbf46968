package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/store"
)

// askTimeout is how long an API server may take to answer a person.
const askTimeout = 30 * time.Second

// server is the API server that a person asks, and how the answer is shown.
type server struct {
	url               string
	cert, key, cacert string
	output            string
}

func (s *server) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.url, "server", cmp.Or(os.Getenv("DBC_SERVER"), "http://127.0.0.1:8443"), "`URL` of an API server of the service, in any region ($DBC_SERVER)")
	f.StringVar(&s.cert, "cert", os.Getenv("DBC_CERT"), "`file` with your certificate, for a server with TLS ($DBC_CERT)")
	f.StringVar(&s.key, "key", os.Getenv("DBC_KEY"), "`file` with its key ($DBC_KEY)")
	f.StringVar(&s.cacert, "cacert", os.Getenv("DBC_CACERT"), "`file` with the CAs of the server; empty: those of this machine ($DBC_CACERT)")
	f.StringVarP(&s.output, "output", "o", "text", "text or json")
}

// client returns the client for the flags.
func (s *server) client() (dbcontrollerv1connect.ResourcesClient, error) {
	h, base, err := s.connection()
	if err != nil {
		return nil, err
	}
	return dbcontrollerv1connect.NewResourcesClient(h, base), nil
}

// connection checks the flags.
func (s *server) connection() (*http.Client, string, error) {
	if s.output != "text" && s.output != "json" {
		return nil, "", usageError{fmt.Errorf("--output %q: is neither text nor json", s.output)}
	}
	u, err := url.Parse(s.url)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, "", usageError{fmt.Errorf("--server %q: is no URL such as https://eu.packages.example.com:8443", s.url)}
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13}
	if (s.cert == "") != (s.key == "") {
		return nil, "", usageError{errors.New("--cert and --key belong together: give both")}
	}
	if s.cert != "" {
		pair, err := tls.LoadX509KeyPair(s.cert, s.key)
		if err != nil {
			return nil, "", fmt.Errorf("read --cert and --key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	if s.cacert != "" {
		pem, err := os.ReadFile(s.cacert)
		if err != nil {
			return nil, "", fmt.Errorf("read --cacert: %w", err)
		}
		if config.RootCAs = x509.NewCertPool(); !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, "", fmt.Errorf("read --cacert: no certificate in %s", s.cacert)
		}
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment}
	return &http.Client{Transport: transport}, strings.TrimSuffix(s.url, "/"), nil
}

// failed says what to do about the error of a call.
func (s *server) failed(err error) error {
	e, ok := errors.AsType[*connect.Error](err)
	switch {
	case ok && connect.IsWireError(err) && e.Code() == connect.CodePermissionDenied:
		return fmt.Errorf("%s does not let you ask: present the certificate of a user with --cert and --key", s.url)
	case ok && connect.IsWireError(err):
		return errors.New(e.Message())
	case strings.HasPrefix(s.url, "https://") && s.cert == "":
		return fmt.Errorf("ask %s: %w; it may want to know who you are: --cert and --key", s.url, err)
	}
	return fmt.Errorf("ask %s: %w; is it the address of a running API server? Name one with --server", s.url, err)
}

// printJSON prints a message with all its fields.
func printJSON(w io.Writer, m proto.Message) error {
	b, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil { // protojson varies its blanks
		return err
	}
	_, err = fmt.Fprintln(w, out.String())
	return err
}

// oneName takes the name of a resource.
func oneName(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageError{errors.New("want one argument: the name of a resource, for example sections/admin/packages/apt")}
	}
	return nil
}

func newWhy() *cobra.Command {
	var s server
	var local bool
	cmd := &cobra.Command{
		Use:   "why NAME",
		Short: "Explain a resource: its owner, where it is held, what refers to it, what is still to be done",
		Long: `Why tells all that is known of one resource, from any region: which region owns it and which policy says so, which version each region
holds, what it refers to and what refers to it, and what the engine still has to do about it, with the last error and the next retry. A deleted
name that is not free yet is explained too: what it still waits for.

The owning region answers, and asks the others; one that does not answer is shown as such. Exit codes: 0, or 1 if there is no such
resource or nobody to ask.`,
		Example: `  db-controller why sections/admin/packages/apt
  db-controller why --server https://us.packages.example.com:8443 --cert me.crt --key me.key --cacert ca.crt sections/admin
  db-controller why --local sections/admin/packages/apt      # what this region alone knows, for when the owner is away`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := s.client()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), askTimeout)
			defer cancel()
			res, err := c.Explain(ctx, connect.NewRequest(&v1.ExplainRequest{Name: args[0], LocalOnly: local}))
			if connect.CodeOf(err) == connect.CodeUnavailable && connect.IsWireError(err) && !local {
				return fmt.Errorf("%w (--local)", s.failed(err))
			}
			if err != nil {
				return s.failed(err)
			}
			if s.output == "json" {
				return printJSON(cmd.OutOrStdout(), res.Msg)
			}
			return writeWhy(cmd.OutOrStdout(), res.Msg)
		},
	}
	s.flags(cmd)
	cmd.Flags().BoolVar(&local, "local", false, "ask neither the owner nor other regions")
	return cmd
}

// page is a text of labelled blocks, whose columns are aligned.
type page struct{ bytes.Buffer }

// block writes rows of cells, the label before the first.
func (p *page) block(label string, rows ...[]string) {
	w := tabwriter.NewWriter(p, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintf(w, "%-14s%s\n", label, strings.Join(row, "\t"))
		label = ""
	}
	_ = w.Flush() // into memory
}

func writeWhy(w io.Writer, e *v1.Explanation) error {
	var p page
	state := map[string]string{"": "not in region " + e.GetAnsweredBy(), "GONE": "deleted, and the name is still taken"}[e.GetState()]
	fmt.Fprintf(&p, "%s\n\n", e.GetName())
	p.block("Type", []string{e.GetType()})
	p.block("State", []string{cmp.Or(state, e.GetState()) + since(" since ", e.GetDeleteTime())})
	if e.GetUuid() != "" {
		p.block("UUID", []string{e.GetUuid()})
	}
	p.block("Owner", []string{cmp.Or(e.GetOwner().GetRegion(), "unknown") + ": " + e.GetOwner().GetReason()})
	p.block("Regions", regionRows(e)...)
	p.block("Refers to", outgoingRows(e)...)
	p.block("Referred from", incomingRows(e)...)
	p.block("Referrers", referrerRows(e)...)
	p.block("Blockades", blockadeRows(e)...)
	if e.GetBlockDeletion() {
		p.block("Deletion", []string{"held up by the service itself"})
	}
	p.block("Policy", policyRows(e)...)
	p.block("Pending", pendingRows(e)...)
	p.block("Next", nextRows(e)...)
	_, err := w.Write(p.Bytes())
	return err
}

// since is a time, or nothing.
func since(label string, t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return label + t.AsTime().UTC().Format(time.RFC3339)
}

func regionRows(e *v1.Explanation) (rows [][]string) {
	var owner *v1.RegionState
	for _, r := range e.GetRegions() {
		if r.GetRegion() == e.GetOwner().GetRegion() {
			owner = r
		}
	}
	for _, r := range e.GetRegions() {
		held := "nothing"
		switch {
		case r.GetError() != "":
			held = "unknown"
		case r.GetState() != "":
			held = fmt.Sprintf("version %s of epoch %d", r.GetResourceVersion(), r.GetEpoch())
		}
		row := []string{r.GetRegion(), held, verdict(e, r, owner) + since(", ", r.GetUpdateTime())}
		rows = append(rows, row)
		if q := r.GetQuarantine(); q != nil {
			rows = append(rows, []string{"", "", fmt.Sprintf("could not apply version %s of epoch %d (%d tries): %s", q.GetResourceVersion(), q.GetEpoch(), q.GetTries(), q.GetCause())})
		}
	}
	return rows
}

// verdict judges what a region holds by what the owner holds.
func verdict(e *v1.Explanation, r, owner *v1.RegionState) string {
	switch {
	case r.GetError() != "":
		return r.GetError()
	case r == owner && r.GetState() != "":
		return "owner"
	case r == owner:
		return "owner, which has none"
	case owner == nil || owner.GetError() != "":
		return "not compared with the owner"
	case r.GetState() == "" && r.GetExpected():
		return "has not arrived"
	case r.GetState() == "":
		return "not meant to be there"
	case !r.GetExpected():
		return "left over: on its way out, or a fault"
	case r.GetOwningRegion() != e.GetOwner().GetRegion():
		return "says that region " + r.GetOwningRegion() + " owns it"
	}
	switch behind := versionOf(r).Compare(versionOf(owner)); {
	case behind == 0:
		return "current"
	case behind < 0:
		return "behind"
	}
	return "ahead: the owner has lost it, or it changed while all were asked"
}

func versionOf(r *v1.RegionState) store.Version {
	n, err := strconv.ParseInt(r.GetResourceVersion(), 10, 64)
	if err != nil {
		return store.Version{}
	}
	return store.Version{Epoch: r.GetEpoch(), Number: n}
}

func outgoingRows(e *v1.Explanation) (rows [][]string) {
	for _, r := range e.GetReferences() {
		how := cmp.Or(r.GetOnTargetDeleted(), r.GetKind())
		if r.GetUnconfirmed() {
			how += ", not confirmed there yet"
		}
		rows = append(rows, []string{r.GetTarget(), "in " + r.GetLocation(), r.GetField(), how})
	}
	return rows
}

func incomingRows(e *v1.Explanation) (rows [][]string) {
	for _, in := range e.GetReferredFrom() {
		var what []string
		if in.GetBlocking() {
			what = append(what, "blocks the deletion")
		}
		if in.GetSubscriber() {
			what = append(what, "handles the deletion")
		}
		if in.GetOwnee() {
			what = append(what, "is owned")
		}
		if what == nil {
			what = []string{"refers to it"} // in its own database: the referrers say how
			if in.GetAwaited() {
				what = []string{"may refer to it"}
			}
		}
		row := []string{in.GetLocation(), strings.Join(what, ", ")}
		if in.GetAwaited() {
			row = append(row, "the deletion waits for it")
		}
		rows = append(rows, row)
	}
	return rows
}

func referrerRows(e *v1.Explanation) (rows [][]string) {
	for _, r := range e.GetReferrers() {
		rows = append(rows, []string{r.GetName(), r.GetField(), r.GetOnTargetDeleted()})
	}
	if e.GetMoreReferrers() {
		rows = append(rows, []string{"and more"})
	}
	return rows
}

func blockadeRows(e *v1.Explanation) (rows [][]string) {
	for _, b := range e.GetBlockades() {
		rows = append(rows, []string{b.GetReferrer(), "of " + b.GetLocation(), "a write that may not have ended" + since(", until ", b.GetExpireTime())})
	}
	return rows
}

// policyRows tells how far policies are carried out that may still move the resource.
func policyRows(e *v1.Explanation) (rows [][]string) {
	for _, w := range e.GetPolicyProgress() {
		of := "the policy of " + cmp.Or(w.GetHolder(), "the service") + " is being carried out"
		far := fmt.Sprintf("round %d: %d of %d resources looked at in all, %d changed", w.GetRound(), w.GetChecked(), w.GetTotal(), w.GetChanged())
		if w.GetAhead() {
			far += "; this one is still to come"
		}
		rows = append(rows, []string{of + since(" since ", w.GetSince())}, []string{far})
	}
	return rows
}

func pendingRows(e *v1.Explanation) (rows [][]string) {
	work := e.GetPending()
	if work == nil {
		return nil
	}
	rows = append(rows, []string{cmp.Or(strings.Join(work.GetTasks(), ", "), "finish the deletion") + since(", since ", work.GetSince())})
	if work.GetLastError() != "" {
		rows = append(rows, []string{"last error: " + work.GetLastError()})
	}
	if work.GetNextRetry() != nil {
		rows = append(rows, []string{since("next retry: ", work.GetNextRetry())})
	}
	return rows
}

// nextRows is what a person can do.
func nextRows(e *v1.Explanation) (rows [][]string) {
	add := func(format string, args ...any) { rows = append(rows, []string{fmt.Sprintf(format, args...)}) }
	for _, r := range e.GetRegions() {
		switch {
		case r.GetError() != "":
			add("region %s: ask it alone, with --local and its own --server", r.GetRegion())
		case r.GetQuarantine() != nil:
			add("region %s: remove the cause there; the next version of the resource is tried again", r.GetRegion())
		}
	}
	var awaited []string
	for _, in := range e.GetReferredFrom() {
		if in.GetAwaited() {
			awaited = append(awaited, in.GetLocation())
		}
	}
	if len(awaited) > 0 {
		add("the name is free when nothing in %s refers to it any more", strings.Join(awaited, ", "))
	}
	if e.GetPending().GetState() == "PENDING" && e.GetPending().GetLastError() != "" {
		add("nothing: it is tried again by itself, once the error above is cured")
	}
	return rows
}
