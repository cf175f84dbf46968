package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
)

func newResidency() *cobra.Command {
	var s server
	var region string
	cmd := &cobra.Command{
		Use:   "residency",
		Short: "Report which rows a region holds, and prove that none of them is forbidden there",
		Long: `Residency counts the rows in the database of the region that is asked, by owner and type, and those of them that policy forbids there: their regions do
not name it, they have left it, or nobody known owns them. The query that was run in the database is part of the report, so that anybody can run it again.

That the regions of a copy are those that its owner set is what verify proves; the report says up to when.

Exit codes: 0 if the region holds nothing that it must not, 3 if it does, 1 after an error, 2 after a wrong call.`,
		Example: `  db-controller residency --region us --server https://us.packages.example.com:8443 --cert me.crt --key me.key --cacert ca.crt
  db-controller residency -o json | jq '[.rows[] | select(.reason != "")]'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := s.verification()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), askTimeout)
			defer cancel()
			res, err := c.Residency(ctx, connect.NewRequest(&v1.ResidencyRequest{}))
			if err != nil {
				return s.failed(err)
			}
			if region != "" && res.Msg.GetRegion() != region {
				return fmt.Errorf("%s is an API server of region %s, not of %s: name one of %s with --server", s.url, res.Msg.GetRegion(), region, region)
			}
			if s.output == "json" {
				err = printJSON(cmd.OutOrStdout(), res.Msg)
			} else {
				err = writeResidency(cmd.OutOrStdout(), res.Msg)
			}
			if n := forbidden(res.Msg); err == nil && n > 0 {
				return exitError{fmt.Errorf("region %s holds %d rows that it must not hold", res.Msg.GetRegion(), n), exitDiffers}
			}
			return err
		},
	}
	s.flags(cmd)
	cmd.Flags().StringVar(&region, "region", "", "`region` to report about: the server must be one of it; empty: that of the server")
	return cmd
}

// forbidden counts the rows that must not be there.
func forbidden(r *v1.ResidencyResponse) (n int64) {
	for _, x := range r.GetRows() {
		if x.GetReason() != "" {
			n += x.GetCount()
		}
	}
	return n
}

func writeResidency(out io.Writer, r *v1.ResidencyResponse) error {
	fmt.Fprintf(out, "Region %s holds, by owner and type:\n\n", r.GetRegion())
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "OWNER\tTYPE\tROWS\tFORBIDDEN BECAUSE\tFOR EXAMPLE")
	for _, x := range r.GetRows() {
		example := ""
		if x.GetReason() != "" {
			example = x.GetExample()
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", x.GetOwningRegion(), x.GetType(), x.GetCount(), orDash(x.GetReason()), orDash(example))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\nForbidden rows: %d\n\nThe query, run in the database of region %s (search_path: the API version):\n\n%s\n\n", forbidden(r), r.GetRegion(), r.GetQuery())
	for i, p := range r.GetParameters() {
		fmt.Fprintf(out, "  $%d = %s\n", i+1, p)
	}
	fmt.Fprintf(out, "\nThat copies are what their owners have is verified:\n\n")
	return writeVerified(out, r.GetVerified())
}

func writeVerified(out io.Writer, types []*v1.VerifiedType) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "OWNER\tTYPE\tVERIFIED THROUGH\tLAST PASS\tDIFFERENCES")
	for _, t := range types {
		through := "never"
		if t.GetVerifiedThrough() != nil {
			through = t.GetVerifiedThrough().AsTime().Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\n", t.GetPeer(), t.GetType(), through, t.GetFinishedAt().AsTime().Format(time.RFC3339), t.GetDifferences())
	}
	return w.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
