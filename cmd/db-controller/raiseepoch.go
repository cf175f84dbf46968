package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dbcontroller/db-controller/store/postgres"
)

func newRaiseEpoch() *cobra.Command {
	var cfg postgres.Config
	var dsnFile string
	cmd := &cobra.Command{
		Use:   "raise-epoch",
		Short: "Start a new feed epoch after a restore that PostgreSQL does not show",
		Long: `Raise-epoch tells a Deployment's database that it may have lost commits which other regions have copied. All cursors into its
change feed become invalid, and every region compares its copies with it; about all older states it is right.

A failover, a restore to a point in time, and a dump and reload need no such call: they change the system identifier or the timeline, which
each connection checks. A file-level snapshot that is put back in place changes neither.`,
		Example: "  db-controller raise-epoch --dsn-file ./dsn --service packages.example.com --region eu --version v1",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dsn, err := os.ReadFile(dsnFile)
			if err != nil {
				return fmt.Errorf("read --dsn-file: %w", err)
			}
			cfg.DSN = strings.TrimSpace(string(dsn))
			s, err := postgres.Open(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			defer s.Close()
			epoch, err := s.RaiseEpoch(cmd.Context())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "The change feed of %s in %s is now in epoch %d.\n", cfg.Service, cfg.Region, epoch)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&dsnFile, "dsn-file", "", "file with the connection string of the database (required)")
	f.StringVar(&cfg.Service, "service", "", "service of the Deployment (required)")
	f.StringVar(&cfg.Region, "region", "", "region of the Deployment (required)")
	f.StringVar(&cfg.Version, "version", "v1", "API version of the Deployment")
	f.IntVar(&cfg.Ring, "shards", 4096, "spec.shards of the Deployment")
	for _, name := range []string{"dsn-file", "service", "region"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is defined above
		}
	}
	return cmd
}
