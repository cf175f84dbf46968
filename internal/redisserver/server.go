// Package redisserver runs a private redis-server for tests and benches, on a socket in a temporary folder: nothing listens on the network, and
// nothing is left when it stops.
package redisserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	startTimeout = 20 * time.Second
	pollEvery    = 5 * time.Millisecond
	program      = "redis-server"
)

// Server is a private Redis. Its methods may be called from several goroutines.
type Server struct {
	dir      string
	settings map[string]string

	mu   sync.Mutex
	cmd  *exec.Cmd     // nil while it does not run
	done chan struct{} // closed when the process of cmd is gone
	log  *bytes.Buffer // of the process of cmd; complete once done is closed
}

// Start runs a Redis without persistence. settings are further ones of redis.conf, for example maxmemory. ctx bounds the start only.
func Start(ctx context.Context, settings map[string]string) (*Server, error) {
	parent := os.TempDir()
	if len(parent) > 60 {
		parent = "/tmp" // a socket's path holds 107 bytes at most
	}
	dir, err := os.MkdirTemp(parent, "dbc-redis-")
	if err != nil {
		return nil, fmt.Errorf("start Redis: %w", err)
	}
	s := &Server{dir: dir, settings: settings}
	if err := s.Restart(ctx); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

// New starts a Redis that is stopped when the test ends.
func New(tb testing.TB, settings map[string]string) *Server {
	tb.Helper()
	s, err := Start(context.Background(), settings)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Stop(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// URL is what redis.ParseURL of go-redis understands.
func (s *Server) URL() string { return "unix://" + s.socket() }

func (s *Server) socket() string { return filepath.Join(s.dir, "r.sock") }

// Restart ends the server, if it runs, and starts it again in the same folder. Its data is gone unless settings have it saved.
func (s *Server) Restart(ctx context.Context) error {
	s.Kill()
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = os.Remove(s.socket()) // a killed server leaves it
	args := []string{"--port", "0", "--unixsocket", s.socket(), "--dir", s.dir, "--daemonize", "no"}
	all := map[string]string{"save": "", "appendonly": "no"}
	maps.Copy(all, s.settings)
	for _, k := range slices.Sorted(maps.Keys(all)) {
		args = append(args, "--"+k, all[k])
	}
	cmd := exec.Command(program, args...)
	cmd.SysProcAttr = childAttributes()
	log := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = log, log

	done, started := make(chan struct{}), make(chan error)
	go func() {
		// The kernel tells the child of the death of the thread that forked, so that thread lives as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended does not matter
			close(done)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start Redis: %w; hack/deps.sh test installs it", err)
	}
	s.cmd, s.done, s.log = cmd, done, log

	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := ping(ctx, s.socket())
		if err == nil {
			return nil
		}
		select {
		case <-done:
			return fmt.Errorf("start Redis: it ended at once: %s", bytes.TrimSpace(log.Bytes()))
		case <-ctx.Done():
			return fmt.Errorf("start Redis: %w; the last attempt: %w", ctx.Err(), err)
		case <-time.After(pollEvery):
		}
	}
}

func ping(ctx context.Context, socket string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "PING\r\n"); err != nil {
		return err
	}
	answer := make([]byte, len("+PONG\r\n"))
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	if string(answer) != "+PONG\r\n" {
		return fmt.Errorf("it answers %q", answer) // for example that it is loading
	}
	return nil
}

// Kill ends the server at once, as a crash does, also one that is paused. It returns when the process is gone.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		_ = s.cmd.Process.Kill() // it may have gone by itself
		<-s.done
		s.cmd = nil
	}
}

// Pause stops the server's process, connections stay open, until Resume.
func (s *Server) Pause() error { return s.signal(syscall.SIGSTOP) }

// Resume ends a Pause.
func (s *Server) Resume() error { return s.signal(syscall.SIGCONT) }

func (s *Server) signal(sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return errors.New("redis does not run")
	}
	return s.cmd.Process.Signal(sig)
}

// Stop ends the server and removes its folder.
func (s *Server) Stop() error {
	s.Kill()
	return os.RemoveAll(s.dir)
}
