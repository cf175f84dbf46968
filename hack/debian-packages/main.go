// Debian-packages turns the package index of this machine's apt into resources of the service of config/samples/packages.yaml: one JSON object
// per line, {"name": ..., fields}, sections first, then maintainers, sources and packages.
//
// The resources are closed: every reference in them points to a resource in the same output. A dependency that no package of the index
// satisfies is no reference; it stays in the annotations, where the fields with dependencies also are as the index has them.
//
// Each section has a policy of its own. Which regions it lives in depends only on its name, so that the output is the same on every run over
// the same index. All sections are controlled by eu, because that is where they are meant to be loaded.
//
//	index.go    reads the index
//	version.go  compares versions
//	resource.go makes the resources
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

func main() {
	out := flag.String("o", "", "write to this `file` instead of standard output")
	limit := flag.Int("limit", 0, "take only the first `n` packages by name (0: all)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *out, *limit); err != nil {
		fmt.Fprintln(os.Stderr, "debian-packages:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out string, limit int) (err error) {
	packages, err := readApt(ctx)
	if err != nil {
		return err
	}
	if len(packages) == 0 {
		if os.Geteuid() != 0 {
			return errors.New("apt's package index is empty: run `sudo apt-get update` first")
		}
		fmt.Fprintln(os.Stderr, "apt's package index is empty, so running apt-get update")
		update := exec.CommandContext(ctx, "apt-get", "update")
		update.Stdout, update.Stderr = os.Stderr, os.Stderr
		if err := update.Run(); err != nil {
			return fmt.Errorf("run apt-get update: %w", err)
		}
		if packages, err = readApt(ctx); err != nil {
			return err
		}
		if len(packages) == 0 {
			return errors.New("apt's package index is empty after apt-get update: check /etc/apt/sources.list")
		}
	}

	file := os.Stdout
	if out != "" {
		if file, err = os.Create(out); err != nil {
			return fmt.Errorf("create output: %w", err)
		}
		defer func() { err = errors.Join(err, file.Close()) }()
	}
	w := bufio.NewWriterSize(file, 1<<20)
	counts, err := writeResources(w, packages, limit)
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		return fmt.Errorf("write resources: %w", err)
	}
	fmt.Fprintln(os.Stderr, counts)
	return nil
}

// readApt returns what apt knows: of each package the version that it would install.
func readApt(ctx context.Context) (packages map[string]*stanza, err error) {
	cmd := exec.CommandContext(ctx, "apt-cache", "dumpavail")
	cmd.Stderr = os.Stderr
	index, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("run apt-cache: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("run apt-cache (this needs a Debian or a relative of it): %w", err)
	}
	packages, err = readIndex(index)
	if err != nil {
		_, _ = io.Copy(io.Discard, index) // so that apt-cache can end
	}
	if waitErr := cmd.Wait(); err == nil && waitErr != nil {
		err = fmt.Errorf("run apt-cache dumpavail: %w", waitErr)
	}
	return packages, err
}
