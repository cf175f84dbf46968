package references

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"

	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/registry"
)

// childVar makes this program a manager of one Deployment, as a process of its own that can be killed. Its value is what it needs to know.
const childVar = "DBC_REFERENCES_MANAGER"

type childConfig struct {
	Key    registry.Key
	DSN    string
	Routes map[string]string
	Topo   registry.Snapshot
}

// child is a manager in a process of its own.
type child struct {
	cmd  *exec.Cmd
	dead chan struct{}
}

// startChild starts a manager of p in a process of its own.
func (p *place) startChild() *child {
	p.world.t.Helper()
	text, err := json.Marshal(childConfig{p.key, p.dsn, p.world.routes(p.Region), p.world.topo})
	check(p.world.t, err)
	cmd := exec.Command(os.Args[0]) //nolint:noctx // it is killed
	cmd.Env = append(os.Environ(), childVar+"="+string(text))
	cmd.Stderr = os.Stderr
	check(p.world.t, cmd.Start())
	c := &child{cmd, make(chan struct{})}
	go func() {
		defer close(c.dead)
		_ = cmd.Wait() // killed
	}()
	p.world.t.Cleanup(c.kill)
	return c
}

// kill is SIGKILL.
func (c *child) kill() {
	_ = c.cmd.Process.Kill() // it may be dead already
	<-c.dead
}

func childMain() int {
	if err := runChild(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func runChild() error {
	var c childConfig
	if err := json.Unmarshal([]byte(os.Getenv(childVar)), &c); err != nil {
		return err
	}
	reg := registry.New()
	if problems := reg.Apply(c.Topo); len(problems) > 0 {
		return fmt.Errorf("topology: %v", problems)
	}
	ctx := context.Background()
	d, err := deployment.Open(ctx, timings(false, deployment.Config{
		Key: c.Key, Registry: reg, DSN: c.DSN, Logger: slog.New(slog.DiscardHandler), MaxShardsPerNode: 256, MaxConns: 5, DialContext: dialer(c.Routes),
	}))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Run(ctx, d.Manage)
}
