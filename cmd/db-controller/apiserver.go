package main

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/spf13/cobra"

	"github.com/dbcontroller/db-controller/cmd/db-controller/internal/fleet"
	"github.com/dbcontroller/db-controller/deployment"
)

func newAPIServer() *cobra.Command {
	var (
		t       topology
		o       ops
		tune    tuning
		service string
		address string
	)
	cmd := &cobra.Command{
		Use:   "apiserver --service SERVICE --region REGION [--manifests DIR]",
		Short: "Serve the API of one Deployment",
		Long: `Apiserver serves the resources of one Deployment (REST, Connect, gRPC), and its feed to the other regions. Reads are answered
from the region's database; a write is forwarded to the region that owns the resource.

With spec.tls in the Deployment every caller must present a certificate. Without, it serves on loopback only.`,
		Example: `  db-controller apiserver --manifests ./manifests --service packages.example.com --region eu --bind-address :8443
  db-controller apiserver --service packages.example.com --region eu       # in a cluster`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if service == "" {
				return usageError{errors.New("--service is required: the service of the Deployment, for example --service packages.example.com")}
			}
			return serveFleet(cmd.Context(), &t, &o, fleet.Config{
				Services: []string{service}, Template: tune.Config,
				Parts: func(d *deployment.Deployment) ([]func(context.Context) error, error) {
					l, err := new(net.ListenConfig).Listen(cmd.Context(), "tcp", address)
					if err != nil {
						return nil, fmt.Errorf("serve the API: %w", err)
					}
					serve, err := d.Server(l)
					if err != nil {
						l.Close()
						return nil, err
					}
					return []func(context.Context) error{serve}, nil
				},
			})
		},
	}
	t.flags(cmd.Flags())
	o.flags(cmd.Flags())
	tune.flags(cmd.Flags())
	cmd.Flags().StringVar(&service, "service", "", "the `service` of the Deployment (required)")
	cmd.Flags().StringVar(&address, "bind-address", ":8443", "serve the API here")
	return cmd
}
