package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/nodemanager"
)

// exitUnowned is the exit code when nobody works on some shards.
const exitUnowned = 3

func newShards() *cobra.Command {
	var e endpoints
	var output string
	cmd := &cobra.Command{
		Use:   "shards",
		Short: "Show which manager works on which shards",
		Long: `Shards shows how the managers of a region divide the shards of its Deployments, for each kind of nodes:

  held      what a node works on
  granted   what the plan in force lets it work on; a range moves when its old node has given it up
  leader    makes the plans

One manager knows of all, so one endpoint is enough. The exit code is 3 while nobody works on some shards: their changes wait
until somebody does.`,
		Example: `  db-controller shards
  db-controller shards --endpoint http://10.0.0.7:8081 -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			s, err := e.read(cmd.Context())
			if err != nil {
				return err
			}
			kinds := divided(s)
			if output == "json" {
				err = json.NewEncoder(cmd.OutOrStdout()).Encode(kinds)
			} else {
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
				writeShards(w, kinds)
				err = w.Flush()
			}
			if err != nil {
				return err
			}
			if missing := unowned(kinds); missing != "" {
				return exitError{fmt.Errorf("nobody works on %s", missing), exitUnowned}
			}
			return nil
		},
	}
	e.flag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

// dividedKind is how the shards of a Deployment are divided among the nodes of a kind. One without a kind: no manager that was asked works on the Deployment.
type dividedKind struct {
	Service string `json:"service"`
	Region  string `json:"region"`
	nodemanager.KindStatus
}

// divided returns each kind once: as the manager that knows the newest plan sees it.
func divided(s statusz) []dividedKind {
	var all []dividedKind
	for _, d := range s.Deployments {
		kinds := d.Shards
		if len(kinds) == 0 {
			kinds = []nodemanager.KindStatus{{}}
		}
		for _, k := range kinds {
			all = append(all, dividedKind{d.Service, d.Region, k})
		}
	}
	slices.SortStableFunc(all, func(a, b dividedKind) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Region, b.Region), cmp.Compare(a.Kind, b.Kind), cmp.Compare(b.PlanVersion, a.PlanVersion))
	})
	all = slices.CompactFunc(all, func(a, b dividedKind) bool { return a.Service == b.Service && a.Region == b.Region && a.Kind == b.Kind })
	// The empty kind of a Deployment is its first.
	var known []dividedKind
	for i, k := range all {
		if k.Kind == "" && i+1 < len(all) && all[i+1].Service == k.Service && all[i+1].Region == k.Region {
			continue
		}
		known = append(known, k)
	}
	return known
}

// unowned names the shards that nobody works on; empty if there are none.
func unowned(kinds []dividedKind) string {
	var missing []string
	for _, k := range kinds {
		switch {
		case k.Kind == "":
			missing = append(missing, fmt.Sprintf("%s in %s", k.Service, k.Region))
		case k.Unowned > 0:
			missing = append(missing, fmt.Sprintf("%d of %d shards of %s in %s (%s)", k.Unowned, k.Ring, k.Service, k.Region, k.Kind))
		}
	}
	return strings.Join(missing, ", ")
}

func writeShards(w io.Writer, kinds []dividedKind) {
	fmt.Fprintln(w, "SERVICE\tREGION\tKIND\tMEMBER\tALIVE\tNODE\tHELD\tGRANTED\tSHARDS\tLEADER")
	yes := map[bool]string{true: "yes", false: "no"}
	for _, k := range kinds {
		of := fmt.Sprintf("%s\t%s\t%s", k.Service, k.Region, cmp.Or(k.Kind, "-"))
		rows := 0
		for _, m := range k.Members {
			for _, n := range m.Nodes {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", of, m.ID, yes[m.Alive], strings.TrimPrefix(string(n.ID), m.ID+"/"), shardRange(n.Held), shardRange(n.Granted),
					n.Held.To-n.Held.From, yes[m.ID == k.Leader])
				rows++
			}
		}
		if rows == 0 {
			fmt.Fprintf(w, "%s\t-\t-\t-\t-\t-\t0\t-\n", of)
		}
	}
}

func shardRange(r descriptor.ShardRange) string {
	if r.From >= r.To {
		return "-"
	}
	return r.String()
}
