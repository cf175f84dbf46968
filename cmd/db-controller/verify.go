package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/api/dbcontroller/v1/dbcontrollerv1connect"
	"github.com/dbcontroller/db-controller/verify"
)

// exitDiffers is the exit code of verify and residency when something is not as it must be.
const exitDiffers = 3

// verifying is one call of verify.
type verifying struct {
	server
	peers, types  []string
	repair, apply bool
	rate          int32
	pause         float64
	resume        string
	last          bool

	states map[string]string // by peer
	ends   map[string]*v1.VerifyProgress
	told   time.Time
}

func newVerify() *cobra.Command {
	v := &verifying{states: map[string]string{}, ends: map[string]*v1.VerifyProgress{}}
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Compare the read copies of a region with what their owners have, and its search store with its database, row by row, and repair them",
		Long: `Verify compares the read copies that the region of the server holds with the rows of their owners: the whole content, by digests made inside
the databases. Only where these differ are rows looked at, and what differs counts only if it still does at a second look, after the copies have
received all that the owner had written: writes that go on are no differences.

The search store of the region, if it has one, is the peer @search: its documents are compared with the rows of the region's own database, by version,
and by a sum in each document that tells what was changed by hand.

--repair says what would be done about each difference; --repair --apply does it: the owner's row is written over the copy, and a copy that its
owner does not know is deleted; documents are written anew from their rows, or deleted. What the region owns itself is never touched.

With --resume a pass that was interrupted goes on where it was. The same passes run in the background of a manager, all the time; --last shows up
to when they have verified the copies of each type.

Exit codes: 0 if all copies are equal, or are repaired, 3 if differences are left, 1 after an error, 2 after a wrong call.`,
		Example: `  db-controller verify --server https://us.packages.example.com:8443 --cert me.crt --key me.key --cacert ca.crt
  db-controller verify --peer eu --type Package --repair                   # what a repair would do
  db-controller verify --peer eu --type Package --repair --apply
  db-controller verify --peer @search --repair --apply
  db-controller verify --rate 20000 --resume /var/tmp/us.verify            # gently, and from where it was
  db-controller verify --last`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := v.verification()
			if err != nil {
				return err
			}
			if v.last {
				return v.showLast(cmd, c)
			}
			return v.run(cmd, c)
		},
	}
	v.flags(cmd)
	f := cmd.Flags()
	f.StringSliceVar(&v.peers, "peer", nil, "`regions` whose rows are compared, @search for the search store; empty: all others, and the search store if there is one")
	f.StringSliceVar(&v.types, "type", nil, "`types` to compare; empty: all")
	f.BoolVar(&v.repair, "repair", false, "say what would be done about each difference")
	f.BoolVar(&v.apply, "apply", false, "with --repair: do it")
	f.Int32Var(&v.rate, "rate", 0, "most `rows` per second; 0: no limit")
	f.Float64Var(&v.pause, "pause", 0, "pause after each step as a multiple of its time: 1 leaves the databases half of the time alone")
	f.StringVar(&v.resume, "resume", "", "`file` with the state of the pass: it goes on from there if the file exists, and the file is removed at its end")
	f.BoolVar(&v.last, "last", false, "show up to when the copies are verified, and compare nothing")
	return cmd
}

// verification returns the client for the flags.
func (s *server) verification() (dbcontrollerv1connect.VerificationClient, error) {
	h, base, err := s.connection()
	if err != nil {
		return nil, err
	}
	return dbcontrollerv1connect.NewVerificationClient(h, base), nil
}

func (v *verifying) run(cmd *cobra.Command, c dbcontrollerv1connect.VerificationClient) error {
	req := &v1.VerifyRequest{Peers: v.peers, Types: v.types, Rate: v.rate, Pause: v.pause}
	switch {
	case v.apply && !v.repair:
		return usageError{errors.New("--apply belongs to --repair: give both")}
	case v.apply:
		req.Repair = v1.RepairMode_REPAIR_MODE_REPAIR
	case v.repair:
		req.Repair = v1.RepairMode_REPAIR_MODE_DRY_RUN
	}
	if err := v.load(); err != nil {
		return err
	}
	for peer, state := range v.states {
		req.Resume = append(req.Resume, &v1.VerifyState{Peer: peer, State: state})
	}
	stream, err := c.Verify(cmd.Context(), connect.NewRequest(req))
	if err != nil {
		return v.failed(err)
	}
	defer stream.Close()
	for stream.Receive() {
		if err := v.received(cmd.OutOrStdout(), cmd.ErrOrStderr(), stream.Msg()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		if v.resume != "" {
			return fmt.Errorf("%w; the same command goes on where it was", v.failed(err))
		}
		return v.failed(err)
	}
	return v.conclude(cmd.OutOrStdout())
}

// received shows a message and stores the state in it.
func (v *verifying) received(out, progress io.Writer, m *v1.VerifyResponse) error {
	p := m.GetProgress()
	if v.output == "json" {
		b, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
		if err != nil {
			return err
		}
		fmt.Fprintln(out, string(b))
	} else {
		for _, d := range m.GetDifferences() {
			writeDifference(out, m.GetPeer(), d)
		}
		if time.Since(v.told) > time.Second && !p.GetFinished() {
			v.told = time.Now()
			writeProgress(progress, m.GetPeer(), p)
		}
	}
	if p.GetFinished() {
		v.ends[m.GetPeer()] = p
	}
	v.states[m.GetPeer()] = m.GetState()
	return v.save()
}

func writeDifference(w io.Writer, peer string, d *v1.RowDifference) {
	sides := "%-8s %s of %s: owner %s, copy %s"
	if peer == verify.SearchPeer {
		sides = "%-8s %s of %s: row %s, document %s"
	}
	fmt.Fprintf(w, sides, d.GetKind(), d.GetName(), peer, orNone(d.GetOwnerVersion()), orNone(d.GetCopyVersion()))
	if d.GetBehind() {
		fmt.Fprint(w, "; the copies have not received this change yet")
	}
	switch {
	case d.GetRepaired():
		fmt.Fprintf(w, "; repaired: %s", d.GetAction())
	case d.GetAction() != "":
		fmt.Fprintf(w, "; %s", d.GetAction())
	}
	fmt.Fprintln(w)
}

func orNone(version string) string {
	if version == "" {
		return "none"
	}
	return version
}

func writeProgress(w io.Writer, peer string, p *v1.VerifyProgress) {
	eta := "unknown"
	if p.GetEta() != nil {
		eta = p.GetEta().AsDuration().Round(time.Second).String()
	}
	percent := 100.0
	if p.GetTotal() > 0 {
		percent = min(100, 100*float64(p.GetDone())/float64(p.GetTotal()))
	}
	fmt.Fprintf(w, "%s: %.0f%%, %d rows compared, %.0f rows/s, %d differences, %d to look at again, %s left\n",
		peer, percent, p.GetCompared(), p.GetRowsPerSecond(), p.GetDifferences(), p.GetPending(), eta)
}

// conclude says what the whole was worth.
func (v *verifying) conclude(out io.Writer) error {
	var left int64
	for _, peer := range sortedKeys(v.ends) {
		p := v.ends[peer]
		left += p.GetDifferences() - p.GetRepaired()
		if v.output == "json" {
			continue
		}
		fmt.Fprintf(out, "%s: %d rows compared, %d differences, %d repaired", peer, p.GetCompared(), p.GetDifferences(), p.GetRepaired())
		if p.GetVerifiedThrough() != nil {
			fmt.Fprintf(out, "; verified through %s", p.GetVerifiedThrough().AsTime().Format(time.RFC3339))
		}
		fmt.Fprintln(out)
	}
	if v.resume != "" {
		if err := os.Remove(v.resume); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if left == 0 {
		return nil
	}
	hint := "--repair shows what can be done"
	switch {
	case v.apply:
		hint = "what is said of each tells why it was left"
	case v.repair:
		hint = "--repair --apply does it"
	}
	what := "copies are not what their owners have"
	if p := v.ends[verify.SearchPeer]; p.GetDifferences() > p.GetRepaired() {
		what = "copies or search documents are not what they are made of"
	}
	return exitError{fmt.Errorf("%d %s; %s", left, what, hint), exitDiffers}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// load reads the file with the state.
func (v *verifying) load() error {
	if v.resume == "" {
		return nil
	}
	b, err := os.ReadFile(v.resume)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read --resume: %w", err)
	}
	if err := json.Unmarshal(b, &v.states); err != nil {
		return fmt.Errorf("read --resume: %s is no state of a verification: %w", v.resume, err)
	}
	return nil
}

// save replaces the file with the state at once, so that a kill leaves a whole one.
func (v *verifying) save() error {
	if v.resume == "" {
		return nil
	}
	b, err := json.Marshal(v.states)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(v.resume), filepath.Base(v.resume)+".*")
	if err != nil {
		return fmt.Errorf("write --resume: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), v.resume)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write --resume: %w", err), os.Remove(f.Name()))
	}
	return nil
}

func (v *verifying) showLast(cmd *cobra.Command, c dbcontrollerv1connect.VerificationClient) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), askTimeout)
	defer cancel()
	res, err := c.ListVerified(ctx, connect.NewRequest(&v1.ListVerifiedRequest{}))
	if err != nil {
		return v.failed(err)
	}
	if v.output == "json" {
		return printJSON(cmd.OutOrStdout(), res.Msg)
	}
	return writeVerified(cmd.OutOrStdout(), res.Msg.GetTypes())
}
