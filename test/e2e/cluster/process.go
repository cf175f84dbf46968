package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Process is a container that runs.
type Process struct {
	// Pod is the name that it goes by.
	Pod string
	// Component is the label app.kubernetes.io/component of its workload.
	Component string
	// Ops is the address of its operator's port.
	Ops  string
	cmd  *exec.Cmd
	log  *os.File
	done chan struct{}
}

// Components of the chart.
const (
	Manager   = "manager"
	APIServer = "apiserver"
)

// Scale sets the replicas of the managers, and starts or stops processes accordingly: those of the highest numbers end first, by SIGTERM.
func (r *Region) Scale(ctx context.Context, replicas int32) error {
	workloads, err := r.workloads(ctx)
	if err != nil {
		return err
	}
	for _, w := range workloads {
		if component(&w) != Manager {
			continue
		}
		before := w.DeepCopy()
		w.Spec.Replicas = &replicas
		if err := r.c.admin.Patch(ctx, &w, client.MergeFrom(before)); err != nil {
			return err
		}
	}
	r.c.opt.Log("scaled %s to %d managers", r.Name, replicas)
	return r.Sync(ctx)
}

// Sync makes the processes what the workloads ask for; one that has ended is started again.
func (r *Region) Sync(ctx context.Context) error {
	workloads, err := r.workloads(ctx)
	if err != nil {
		return err
	}
	r.mu.Lock()
	wanted := map[string]*appsv1.Deployment{}
	for i := range workloads {
		if component(&workloads[i]) == APIServer {
			one := int32(1) // they share an address here
			workloads[i].Spec.Replicas = &one
		}
		for n := range int(*workloads[i].Spec.Replicas) {
			wanted[fmt.Sprintf("%s-%d", workloads[i].Name, n)] = &workloads[i]
		}
	}
	var ending []*Process
	for pod, p := range r.processes {
		if wanted[pod] == nil {
			ending = append(ending, p)
			delete(r.processes, pod)
		} else if p.ended() {
			delete(r.processes, pod)
		}
	}
	for pod, w := range wanted {
		if r.processes[pod] == nil {
			p, err := r.start(ctx, pod, w)
			if err != nil {
				r.mu.Unlock()
				return err
			}
			r.processes[pod] = p
		}
	}
	r.mu.Unlock()
	for _, p := range ending {
		if err := p.Stop(); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	return nil
}

func (r *Region) workloads(ctx context.Context) ([]appsv1.Deployment, error) {
	var list appsv1.DeploymentList
	if err := r.c.admin.List(ctx, &list, client.InNamespace(r.Name)); err != nil {
		return nil, err
	}
	return list.Items, nil
}

func component(w *appsv1.Deployment) string { return w.Labels["app.kubernetes.io/component"] }

var variable = regexp.MustCompile(`\$\(([A-Z_]+)\)`)

// start runs the container of a pod template as a process. Addresses are its own, since all pods are on one host here.
func (r *Region) start(ctx context.Context, pod string, w *appsv1.Deployment) (*Process, error) {
	spec := w.Spec.Template.Spec
	container := spec.Containers[0]
	kubeconfig, err := r.kubeconfigOf(ctx, spec.ServiceAccountName)
	if err != nil {
		return nil, err
	}
	env := map[string]string{"KUBECONFIG": kubeconfig, "PATH": os.Getenv("PATH"), "HOME": r.c.dir, "TMPDIR": r.c.dir}
	for _, v := range container.Env {
		value := v.Value
		if v.ValueFrom != nil {
			if value, err = field(v.ValueFrom, pod, r.Name); err != nil {
				return nil, fmt.Errorf("env %s of %s: %w", v.Name, w.Name, err)
			}
		}
		env[v.Name] = value
	}
	var args []string
	for _, a := range container.Args {
		args = append(args, variable.ReplaceAllStringFunc(a, func(m string) string { return env[m[2:len(m)-1]] }))
	}
	p := &Process{Pod: pod, Component: component(w), done: make(chan struct{})}
	if p.Ops, err = freeAddress(); err != nil {
		return nil, err
	}
	args = append(args, "--allow-loopback-peers", "--metrics-bind-address=", "--health-probe-bind-address="+p.Ops)
	if p.Component == APIServer {
		args = append(args, "--bind-address="+r.api)
	}
	if p.log, err = os.OpenFile(filepath.Join(r.c.dir, r.Name+"-"+pod+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return nil, err
	}
	p.cmd = exec.Command(r.c.binary, args...) //nolint:noctx // it is ended by name
	for name, value := range env {
		p.cmd.Env = append(p.cmd.Env, name+"="+value)
	}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
		p.log.Close()
	}()
	return p, nil
}

func field(from *corev1.EnvVarSource, pod, namespace string) (string, error) {
	if from.FieldRef != nil {
		switch from.FieldRef.FieldPath {
		case "metadata.name":
			return pod, nil
		case "metadata.namespace":
			return namespace, nil
		case "status.podIP":
			return "127.0.0.1", nil
		}
	}
	return "", errors.New("is from where no value can be had without a kubelet")
}

// Managers returns the processes of the managers that run, by name.
func (r *Region) Managers() (all []*Process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.processes {
		if p.Component == Manager && !p.ended() {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b *Process) int { return strings.Compare(a.Pod, b.Pod) })
	return all
}

func (p *Process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Kill ends the process by SIGKILL.
func (p *Process) Kill() error {
	err := p.cmd.Process.Kill()
	<-p.done
	return err
}

// Pause stops the process by SIGSTOP, Resume lets it go on.
func (p *Process) Pause() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a process go on that was paused.
func (p *Process) Resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// Stop ends the process by SIGTERM. It must end well, and within half a minute.
func (p *Process) Stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		return errors.Join(fmt.Errorf("%s does not end after SIGTERM", p.Pod), p.Kill())
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("%s ended with %d after SIGTERM", p.Pod, code)
	}
	return nil
}

func (r *Region) killAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.processes {
		_ = p.Resume()
		_ = p.Kill()
	}
}

// Logs returns what the processes of all regions have printed, by file.
func (c *Cluster) Logs() (map[string]string, error) {
	files, err := filepath.Glob(filepath.Join(c.dir, "*.log"))
	if err != nil {
		return nil, err
	}
	logs := map[string]string{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		logs[filepath.Base(f)] = string(text)
	}
	return logs, nil
}

// Tail returns the last lines of a log.
func Tail(log string, lines int) string {
	all := bytes.Split(bytes.TrimSpace([]byte(log)), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}
