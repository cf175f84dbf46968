package pgserver

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// process is a running postmaster with all its children.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed once every process of the cluster is gone
	err  error         // how the postmaster ended; set before done is closed
}

// run starts the postmaster of the cluster in data. It takes over log and
// closes it when the cluster has ended.
func run(bin, data string, as *syscall.Credential, log *os.File) (*process, error) {
	cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", data)
	cmd.Dir = data
	cmd.Env = environ()
	// Not the file itself: with a pipe, Wait returns only when the last
	// process of the cluster has closed its end. A new postmaster is refused
	// as long as one of the old backends lives.
	cmd.Stderr = struct{ io.Writer }{log}
	cmd.SysProcAttr = childAttributes(as)

	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The kernel's promise to tell the child of its parent's death is
		// about the thread that forked, so that thread must live until the
		// child has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer log.Close()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("run %s: %w", cmd.Path, err)
	}
	return p, nil
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// signal sends sig to the postmaster. SIGKILL goes to its children too: they
// would notice its death only when they next wait for something.
func (p *process) signal(sig syscall.Signal) error {
	var children []int
	if sig == syscall.SIGKILL {
		children = childrenOf(p.cmd.Process.Pid)
	}
	if err := p.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("send %s to postmaster %d: %w", sig, p.cmd.Process.Pid, err)
	}
	for _, pid := range children {
		_ = syscall.Kill(pid, sig) // it may have gone by itself
	}
	return nil
}

// childrenOf returns the children of a process, as far as /proc tells.
func childrenOf(pid int) []int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var children []int
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			continue // the process or the thread has ended
		}
		for _, field := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				children = append(children, child)
			}
		}
	}
	return children
}

// serverUser returns whom PostgreSQL's programs must run as: nil for
// ourselves, or, as PostgreSQL refuses root, the user postgres or nobody.
func serverUser() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, fmt.Errorf("PostgreSQL refuses to run as root, and there is no user postgres or nobody: %w", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user id of %s: %w", u.Username, err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("group id of %s: %w", u.Username, err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// give makes path belong to the user that the server runs as.
func give(path string, to *syscall.Credential) error {
	if to == nil {
		return nil
	}
	return os.Lchown(path, int(to.Uid), int(to.Gid))
}

// environ is our environment without the variables that change the meaning of
// PostgreSQL's programs (PGPORT, PGDATA and so on).
func environ() []string {
	env := []string{"LC_ALL=C", "TZ=UTC"}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PG") && !strings.HasPrefix(v, "LC_") && !strings.HasPrefix(v, "TZ=") {
			env = append(env, v)
		}
	}
	return env
}
