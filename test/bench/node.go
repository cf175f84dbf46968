package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
)

// nodeVar in the environment makes this program a node: one Deployment, as in production a process of its own.
const nodeVar = "DBC_BENCH_NODE"

func isNode() bool { return os.Getenv(nodeVar) != "" }

// nodeSpec is what a node reads, as one line of JSON, before anything else.
type nodeSpec struct {
	Region           string
	DSN              string
	Endpoints        map[string]string
	Cert, Key, CA    []byte
	Manage           bool // run the nodes that copy, besides the API server
	MaxShardsPerNode int
	Profile          string // file for a CPU profile
}

// open makes the Deployment of a spec.
func (spec nodeSpec) open(ctx context.Context) (*deployment.Deployment, error) {
	tls, err := pki.Static(pki.KeyPair{CertPEM: spec.Cert, KeyPEM: spec.Key}, spec.CA)
	if err != nil {
		return nil, err
	}
	deployments, descriptor := topology(spec.Endpoints)
	r := registry.New()
	if problems := r.Apply(registry.Snapshot{Deployments: deployments, Services: []*v1alpha1.ServiceDescriptor{descriptor}}); len(problems) > 0 {
		return nil, fmt.Errorf("declare the topology: %s", problems[0])
	}
	return deployment.Open(ctx, deployment.Config{
		Key: registry.Key{Service: service, Region: spec.Region}, Registry: r, DSN: spec.DSN, TLS: tls,
		MaxShardsPerNode: spec.MaxShardsPerNode, AuditInterval: -1, VerifyInterval: -1, Logger: quiet,
	})
}

// nodeMain is the process of a node. It says "ready" when it has opened the database, works once it is told to go, and ends with its input.
func nodeMain(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("node: read what to do: %w", err)
	}
	var spec nodeSpec
	if err := json.Unmarshal(line, &spec); err != nil {
		return fmt.Errorf("node: read what to do: %w", err)
	}
	listener, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	d, err := spec.open(ctx)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	defer d.Close()
	server, err := d.Server(listener)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	parts := []func(context.Context) error{server}
	if spec.Manage {
		parts = append(parts, d.Manage)
	}
	fmt.Println("ready")
	if _, err := in.ReadBytes('\n'); err != nil {
		return nil // not needed after all
	}
	if spec.Profile != "" {
		f, err := os.Create(spec.Profile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	go func() {
		_, _ = io.Copy(io.Discard, in) // until the parent closes it, or is no more
		cancel()
	}()
	if err := d.Run(ctx, parts...); err != nil && ctx.Err() == nil {
		return fmt.Errorf("node: %w", err)
	}
	return nil
}

// node is a running child.
type node struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	done chan error
}

// startNode starts a node and returns when it is ready to go.
func startNode(ctx context.Context, spec nodeSpec, listener *net.TCPListener) (*node, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	socket, err := listener.File()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	line, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), nodeVar+"=1")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	n := &node{cmd: cmd, done: make(chan error, 1)}
	if n.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	started := make(chan error, 1)
	ready := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the kernel tells the child when the thread ends that made it
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_, err = bufio.NewReader(out).ReadString('\n')
		ready <- err
		n.done <- cmd.Wait()
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start the node of %s: %w", spec.Region, err)
	}
	if _, err = n.in.Write(append(line, '\n')); err == nil {
		select {
		case err = <-ready:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the node of %s: %w", spec.Region, err), n.stop())
	}
	return n, nil
}

func (n *node) pid() int { return n.cmd.Process.Pid }

func (n *node) run() error {
	_, err := io.WriteString(n.in, "go\n")
	return err
}

// stop ends the node and waits for it.
func (n *node) stop() error {
	_ = n.in.Close() // the node may have ended already: done tells how
	select {
	case err := <-n.done:
		return err
	case <-time.After(30 * time.Second):
		_ = n.cmd.Process.Kill()
		return errors.Join(errors.New("a node did not stop within 30s and was killed"), <-n.done)
	}
}

// product is ours: a process that serves the source and one that copies to the destination, with mutual TLS between them.
type product struct {
	w            *world
	source, dest *node
	// inProcess says that the source's Deployment runs in this process, which is then also the one that writes.
	inProcess bool
	endpoint  *sites // with inProcess; otherwise start makes them
	starts    int
}

func (p *product) name() string     { return "ours" }
func (p *product) database() string { return p.w.oursDB }

func (p *product) reset(ctx context.Context) error {
	c, err := p.w.dest.Connect(ctx, p.w.oursDB)
	if err != nil {
		return err
	}
	defer c.Close(context.WithoutCancel(ctx))
	_, err = c.Exec(ctx, "TRUNCATE v1.resources, ctl.sync_cursor, ctl.quarantine, ctl.peer_epoch")
	return err
}

func (w *world) spec(region, dsn string, at *sites) (nodeSpec, error) {
	pair, err := w.certificate(region)
	if err != nil {
		return nodeSpec{}, err
	}
	return nodeSpec{Region: region, DSN: dsn, Endpoints: at.endpoints, Cert: pair.CertPEM, Key: pair.KeyPEM, CA: w.ca.CertPEM(),
		Manage: region == destRegion, MaxShardsPerNode: w.opt.maxShardsPerNode}, nil
}

func (p *product) start(ctx context.Context, ready func() error) (err error) {
	at := p.endpoint
	if at == nil {
		if at, err = listen(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, at.close()) }() // the nodes have their own ends
	}
	p.starts++
	launch := func(region, dsn string) (*node, error) {
		spec, err := p.w.spec(region, dsn, at)
		if err != nil {
			return nil, err
		}
		if dir := p.w.opt.profiles; dir != "" {
			spec.Profile = filepath.Join(dir, fmt.Sprintf("%s-%d.pprof", strings.ToLower(region), p.starts))
		}
		return startNode(ctx, spec, at.listeners[region])
	}
	if !p.inProcess {
		if p.source, err = launch(sourceRegion, p.w.source.DSN(p.w.sourceDB)); err != nil {
			return err
		}
	}
	if p.dest, err = launch(destRegion, p.w.dest.DSN(p.w.oursDB)); err != nil {
		return err
	}
	if p.source != nil {
		if err := p.source.run(); err != nil {
			return err
		}
	}
	if err := ready(); err != nil {
		return err
	}
	return p.dest.run()
}

func (p *product) copied(ctx context.Context, dest *pgx.Conn) error {
	// A cursor is saved when everything before it is there.
	return poll(ctx, longest, "initial copy", func(ctx context.Context) (done bool, err error) {
		err = dest.QueryRow(ctx, "SELECT coalesce(sum(upper(shards) - lower(shards)), 0) = $1 FROM ctl.sync_cursor", ring).Scan(&done)
		return done, err
	})
}

func (p *product) cpu() (source, dest time.Duration) {
	if p.source != nil {
		source = processCPU(p.source.pid())
	}
	if p.dest != nil {
		dest = processCPU(p.dest.pid())
	}
	return source, dest
}

func (p *product) stop(context.Context) error {
	var errs []error
	for _, n := range []**node{&p.dest, &p.source} {
		if *n != nil {
			errs = append(errs, (*n).stop())
			*n = nil
		}
	}
	return errors.Join(errs...)
}
