package kubetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
)

// Restart kills the kube-apiserver, leaves it away for a while, and starts it again on the same address and data, with the same keys. It returns when it is ready.
func (c *Cluster) Restart(ctx context.Context, away time.Duration) error {
	pid, args, err := c.apiserver()
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill kube-apiserver: %w", err)
	}
	select {
	case <-time.After(away):
	case <-ctx.Done():
		return ctx.Err()
	}
	again := exec.Command(args[0], args[1:]...) //nolint:noctx // Stop ends it
	again.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := again.Start(); err != nil {
		return fmt.Errorf("start kube-apiserver again: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = again.Wait()
	}()
	c.stops = append(c.stops, func() error {
		err := again.Process.Kill()
		<-ended
		if errors.Is(err, os.ErrProcessDone) {
			return nil
		}
		return err
	})
	clients, err := kubernetes.NewForConfig(c.Config)
	if err != nil {
		return err
	}
	for {
		_, err := clients.RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ended:
			return fmt.Errorf("kube-apiserver ended after its restart: %s", again.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("wait for kube-apiserver: %w: %w", ctx.Err(), err)
		}
	}
}

// apiserver finds the process: envtest does not tell.
func (c *Cluster) apiserver() (pid int, args []string, err error) {
	at, err := url.Parse(c.Config.Host)
	if err != nil {
		return 0, nil, err
	}
	if at.Port() == "" { // the host may come without a scheme
		if at, err = url.Parse("https://" + c.Config.Host); err != nil {
			return 0, nil, err
		}
	}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, nil, err
	}
	port := []byte("--secure-port=" + at.Port())
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended meanwhile
		}
		words := bytes.Split(bytes.TrimSuffix(line, []byte{0}), []byte{0})
		if filepath.Base(string(words[0])) != "kube-apiserver" || !bytes.Contains(line, port) {
			continue
		}
		for _, w := range words {
			args = append(args, string(w))
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		return pid, args, err
	}
	return 0, nil, fmt.Errorf("no kube-apiserver listens on port %s", at.Port())
}
