package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/dbcontroller/db-controller/cmd/db-controller/internal/fleet"
	"github.com/dbcontroller/db-controller/deployment"
)

func newManager() *cobra.Command {
	var (
		t        topology
		o        ops
		tune     tuning
		share    replica
		services []string
	)
	cmd := &cobra.Command{
		Use:   "manager --region REGION [--manifests DIR]",
		Short: "Keep the read copies of a region",
		Long: `Manager runs the nodes of every Deployment of a region: each follows the same service in all other regions and keeps the
read copies that their policies ask for.

The Deployments come from Kubernetes, or from a folder of manifests. A new one starts without a restart, one that is removed
stops, and one whose endpoint, database or certificates change is restarted alone. Certificates and connection strings are
read again while it runs. In Kubernetes the status of the Deployments is written back.

In Kubernetes several managers of a region share the work: each has its part of the shards, and when one comes, goes or dies the
others take over. Those that read a folder of manifests do not know of each other: run one.`,
		Example: `  db-controller manager --manifests ./manifests --region eu
  db-controller manager --region eu --leader-elect                      # in a cluster
  db-controller manager --region eu --service packages.example.com      # only one of the region's services`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if tune.Membership, err = share.membership(&t); err != nil {
				return err
			}
			tune.Nodes, tune.Settle = share.nodes, share.settle(&t)
			return serveFleet(cmd.Context(), &t, &o, fleet.Config{
				Services: services, Template: tune.Config, Manages: true,
				Parts: func(d *deployment.Deployment) ([]func(context.Context) error, error) {
					return []func(context.Context) error{d.Manage}, nil
				},
			})
		},
	}
	t.flags(cmd.Flags())
	t.electionFlags(cmd.Flags())
	o.flags(cmd.Flags())
	tune.flags(cmd.Flags())
	tune.managerFlags(cmd.Flags())
	share.flags(cmd.Flags())
	cmd.Flags().StringSliceVar(&services, "service", nil, "`services` to manage; empty: all that have a Deployment in the region")
	return cmd
}
