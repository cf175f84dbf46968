// Db-controller makes the PostgreSQL databases of one service, one per region, behave as one.
//
//	main.go       the commands, signals, exit codes
//	topology.go   flags and wiring that manager and apiserver share: where the topology comes from, the operator's ports
//	manager.go    keeps the read copies and the references of a region
//	replica.go    how several managers divide that work: flags of nodes and Leases
//	apiserver.go  serves the API of one Deployment
//	demo.go       flags of the demo, which is in internal/demo
//	status.go     what /statusz of running processes says; lag
//	shards.go     who works on which shards
//	why.go        what an API server knows of one resource
//	plandelete.go what a deletion would take along
//	verify.go     whether read copies are what their owners have, and their repair
//	residency.go  what a region holds, and that it may
//	whatif.go     what a change of a policy would move
//	raiseepoch.go after a restore that PostgreSQL does not show
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "dev"

// usageError is about how the program was called.
type usageError struct{ error }

// exitError ends the program with a code of its own.
type exitError struct {
	error
	code int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the process at once
	}()
	os.Exit(run(ctx, os.Args[1:]))
}

// run returns the exit code: 0, 1 after a failure, 2 after a wrong call.
func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", cmd.CommandPath(), err)
	if _, ok := errors.AsType[usageError](err); ok || cmd == root {
		fmt.Fprintf(os.Stderr, "See '%s --help'.\n", cmd.CommandPath())
		return 2
	}
	if e, ok := errors.AsType[exitError](err); ok {
		return e.code
	}
	return 1
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "db-controller",
		Short: "Makes the PostgreSQL databases of one service, one per region, behave as one",
		Long: `db-controller makes the PostgreSQL databases of one service, one per region, behave as one: a resource that is
written in one region appears as a read copy in the regions that its policy names.`,
		Example: `  db-controller demo                                          # see it work on this machine
  db-controller manager --manifests ./manifests --region eu    # keep the read copies of a region
  db-controller lag --watch                                    # how far they are`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(newDemo(), newManager(), newAPIServer(), newStatus(), newLag(), newShards(), newWhy(), newPlanDelete(), newWhatIf(), newVerify(), newResidency(), newRaiseEpoch(), newVersion())
	return root
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this program",
		Example: "  db-controller version",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			goVersion := "unknown"
			if info, ok := debug.ReadBuildInfo(); ok {
				goVersion = info.GoVersion
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "db-controller %s (%s)\n", version, goVersion)
			return err
		},
	}
}
