package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
)

// measureTimeout is how long the regions may take to measure what they own.
const measureTimeout = 2 * time.Minute

func newWhatIf() *cobra.Command {
	var s server
	req := &v1.PreviewPolicyRequest{}
	cmd := &cobra.Command{
		Use:   "what-if [NAME]",
		Short: "Show what a change of a policy would move between regions; nothing is written",
		Long: `What-if asks every region what it owns under a policy holder, or without a NAME under the policy of the service, and shows what a change of the
policy would do: how many copies, and about how many bytes, would appear in each region or vanish from it, about how long that would take at the rates that
were measured here, and what would refuse it. It writes nothing, anywhere. The change itself looks again.

Exit codes: 0 if the change would be accepted as far as could be asked, 3 if it would be refused, 1 after an error, 2 after a wrong call.`,
		Example: `  db-controller what-if sections/admin --add-region ap
  db-controller what-if sections/admin --policy '{"enabledRegions":["eu"],"defaultControlRegion":"eu"}'
  db-controller what-if --remove-region us -o json | jq .moves`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError{errors.New("want at most one argument: the name of a policy holder, for example sections/admin")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if req.GetPolicy() == "" && len(req.GetAddRegions()) == 0 && len(req.GetRemoveRegions()) == 0 {
				return usageError{errors.New("say what would change: --policy, --add-region or --remove-region")}
			}
			c, err := s.client()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				req.Name = args[0]
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), measureTimeout)
			defer cancel()
			res, err := c.PreviewPolicy(ctx, connect.NewRequest(req))
			if err != nil {
				return s.failed(err)
			}
			if s.output == "json" {
				err = printJSON(cmd.OutOrStdout(), res.Msg)
			} else {
				err = writePreview(cmd.OutOrStdout(), res.Msg)
			}
			if err == nil && len(res.Msg.GetRefusals()) > 0 {
				return exitError{errors.New("the change would be refused"), exitRefused}
			}
			return err
		},
	}
	s.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Policy, "policy", "", "the policy that would be, as `JSON`; without it the present one")
	f.StringSliceVar(&req.AddRegions, "add-region", nil, "a `region` to enable; may be repeated")
	f.StringSliceVar(&req.RemoveRegions, "remove-region", nil, "a `region` to disable; may be repeated")
	return cmd
}

func writePreview(w io.Writer, v *v1.PolicyPreview) error {
	var p page
	p.block("Policy now", []string{v.GetBefore()})
	p.block("Would be", []string{v.GetAfter()})
	var updates, moves, unasked [][]string
	for _, owner := range slices.Sorted(maps.Keys(v.GetUpdates())) {
		updates = append(updates, []string{owner, fmt.Sprintf("%d resources get another metadata.syncing", v.GetUpdates()[owner])})
	}
	for _, m := range v.GetMoves() {
		what := "gains"
		if m.GetDropped() {
			what = "drops"
		}
		moves = append(moves, []string{m.GetRegion(), what, fmt.Sprintf("%d %s", m.GetRows(), m.GetType()), "of " + m.GetOwner(), "about " + bytesText(m.GetBytes())})
	}
	if len(moves) == 0 {
		moves = [][]string{{"nothing"}}
	}
	for _, u := range v.GetUnasked() {
		unasked = append(unasked, []string{u.GetLocation(), u.GetError()})
	}
	p.block("Changes", updates...)
	p.block("Copies", moves...)
	if len(updates) > 0 {
		took := "about " + (time.Duration(v.GetSeconds() * float64(time.Second))).String()
		switch {
		case len(v.GetUnknownRates()) > 0 && v.GetSeconds() == 0:
			took = "unknown: nothing was measured yet"
		case len(v.GetUnknownRates()) > 0:
			took += " and more: nothing was measured yet of " + strings.Join(v.GetUnknownRates(), ", ")
		}
		p.block("Takes", []string{took})
	}
	var refusals [][]string
	for _, r := range v.GetRefusals() {
		refusals = append(refusals, []string{r})
	}
	p.block("Refused", refusals...)
	p.block("Not asked", unasked...)
	_, err := w.Write(p.Bytes())
	return err
}

// bytesText is a size for people.
func bytesText(n int64) string {
	switch {
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 10<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}
