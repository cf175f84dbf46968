// Package cluster runs regions the way their users do: the chart's objects on a real kube-apiserver, the real binary as the processes of its
// containers, a PostgreSQL database per region. There is no kubelet; its part is played here: a process for each replica of each workload, with the
// arguments, environment and service account token of the pod template.
//
//	cluster.go   what regions have in common; install, declare
//	process.go   the processes: scale, kill, pause, resume
//	load.go      writers through the API servers, and how long their writes take to be seen elsewhere
//	audit.go     what was written under which claim, from the databases' own triggers
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/jackc/pgx/v5/pgxpool"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/internal/kubetest"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pki"
)

// Service is the one that all regions run.
const Service = "packages.example.com"

// Options of a Cluster.
type Options struct {
	// Lease, RenewDeadline and RetryPeriod are those of the managers.
	Lease, RenewDeadline, RetryPeriod time.Duration
	// Managers is how many a region has when it is installed.
	Managers int
	// WithoutCRDs leaves the custom resources to the chart.
	WithoutCRDs bool
	// Log gets a line for what happens.
	Log func(format string, args ...any)
}

// Cluster is a control plane, a PostgreSQL and the regions on them.
type Cluster struct {
	opt    Options
	root   string // of the module
	dir    string
	binary string
	helm   string
	kube   *kubetest.Cluster
	admin  client.Client
	pg     *pgserver.Server
	ca     *pki.CA
	http   *http.Client

	kubeconfig string // of the administrator

	mu      sync.Mutex
	regions map[string]*Region
}

// Region is one installation of the chart.
type Region struct {
	c    *Cluster
	Name string
	DSN  string
	DB   *pgxpool.Pool
	api  string // address
	pair pki.KeyPair

	mu        sync.Mutex
	processes map[string]*Process
	tokens    map[string]string // kubeconfig files by service account
}

// Start starts the control plane and PostgreSQL, and builds the binary. It fails with kubetest.ErrNoAssets where there is no kube-apiserver and none is
// required. Close ends everything that was started, also after an error.
func Start(ctx context.Context, opt Options) (c *Cluster, err error) {
	if opt.Log == nil {
		opt.Log = func(string, ...any) {}
	}
	ctrllog.SetLogger(logr.Discard())
	c = &Cluster{opt: opt, regions: map[string]*Region{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	var options []kubetest.Option
	if opt.WithoutCRDs {
		options = append(options, kubetest.WithoutCRDs())
	}
	if c.kube, err = kubetest.Start(options...); err != nil {
		return c, err
	}
	if c.root, err = moduleRoot(ctx); err != nil {
		return c, err
	}
	if c.dir, err = os.MkdirTemp("/tmp", "dbc-e2e-"); err != nil {
		return c, err
	}
	c.binary = filepath.Join(c.dir, "db-controller")
	if _, err := c.run(ctx, "go", "build", "-o", c.binary, "./cmd/db-controller"); err != nil {
		return c, err
	}
	helm, err := c.run(ctx, "hack/tool.sh", "helm")
	if err != nil {
		return c, err
	}
	c.helm = filepath.Join(strings.TrimSpace(helm), "helm")
	if c.pg, err = pgserver.Start(ctx, pgserver.Config{Settings: map[string]string{"max_connections": "600", "shared_buffers": "128MB"}}); err != nil {
		return c, err
	}
	if c.ca, err = pki.NewCA("e2e"); err != nil {
		return c, err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return c, err
	}
	if c.admin, err = client.New(c.kube.Config, client.Options{Scheme: scheme}); err != nil {
		return c, err
	}
	text, err := c.kube.Kubeconfig("e2e-admin", "system:masters")
	if err != nil {
		return c, err
	}
	c.kubeconfig = filepath.Join(c.dir, "admin.kubeconfig")
	if err := os.WriteFile(c.kubeconfig, text, 0o600); err != nil {
		return c, err
	}
	return c, c.openClient()
}

func (c *Cluster) openClient() error {
	user, err := c.ca.User("db-controller", "e2e")
	if err != nil {
		return err
	}
	source, err := pki.Static(user, c.ca.CertPEM())
	if err != nil {
		return err
	}
	material, err := source()
	if err != nil {
		return err
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig = pki.ClientTLS(source, pki.Identity{})
	t.TLSClientConfig.InsecureSkipVerify = false
	t.TLSClientConfig.VerifyConnection = nil
	t.TLSClientConfig.RootCAs = material.Roots
	t.MaxIdleConnsPerHost = 64
	c.http = &http.Client{Transport: t, Timeout: 30 * time.Second}
	return nil
}

// Close kills all processes and removes what they have left.
func (c *Cluster) Close() (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.regions {
		r.killAll()
		if r.DB != nil {
			r.DB.Close()
		}
	}
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
	if c.pg != nil {
		err = errors.Join(err, c.pg.Stop())
	}
	if c.kube != nil {
		err = errors.Join(err, c.kube.Stop())
	}
	if c.dir != "" {
		err = errors.Join(err, os.RemoveAll(c.dir))
	}
	return err
}

// Region returns a region that has been installed.
func (c *Cluster) Region(name string) *Region {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.regions[name]
}

// Regions returns the names of those that are installed, in the order of their names.
func (c *Cluster) Regions() (names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name := range c.regions {
		names = append(names, name)
	}
	return sorted(names)
}

// Prepare makes what a region has before the chart is installed: a database, an address, an identity.
func (c *Cluster) Prepare(ctx context.Context, name string) (r *Region, err error) {
	r = &Region{c: c, Name: name, processes: map[string]*Process{}, tokens: map[string]string{}}
	if err := c.pg.CreateDatabase(ctx, "e2e_"+name); err != nil {
		return nil, err
	}
	r.DSN = c.pg.DSN("e2e_" + name)
	if r.api, err = freeAddress(); err != nil {
		return nil, err
	}
	if r.pair, err = c.ca.Deployment("db-controller", Service, name, "127.0.0.1"); err != nil {
		return nil, err
	}
	if r.DB, err = pgxpool.New(ctx, r.DSN); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.regions[name] = r
	return r, nil
}

// Files writes what the quick start takes for granted into a folder: connection strings, certificates, endpoints.
func (c *Cluster) Files(dir string, regions ...*Region) error {
	user, err := c.ca.User("db-controller", "quickstart")
	if err != nil {
		return err
	}
	files := map[string][]byte{"ca.crt": c.ca.CertPEM(), "user.crt": user.CertPEM, "user.key": user.KeyPEM}
	for _, r := range regions {
		files[r.Name+".dsn"], files[r.Name+".crt"], files[r.Name+".key"] = []byte(r.DSN), r.pair.CertPEM, r.pair.KeyPEM
		files[r.Name+".endpoint"] = []byte("https://" + r.api)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	for _, folder := range []string{"charts", "config"} {
		if err := os.Symlink(filepath.Join(c.root, folder), filepath.Join(dir, folder)); err != nil {
			return err
		}
	}
	return nil
}

// Shell runs a script in a folder, as a person at a terminal of this cluster with kubectl and helm.
func (c *Cluster) Shell(ctx context.Context, dir, script string) (string, error) {
	kubectl, err := c.kube.Kubectl()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.kubeconfig, "PATH="+filepath.Dir(kubectl)+":"+filepath.Dir(c.helm)+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%w\n%s\n%s", err, script, out)
	}
	return string(out), nil
}

// Install installs the chart for a region, in a namespace of its own that enforces the restricted pod security standard, and starts its processes. Nothing is
// declared yet.
func (c *Cluster) Install(ctx context.Context, name string) (*Region, error) {
	r, err := c.Prepare(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := c.admin.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}}}); err != nil {
		return nil, err
	}
	values := map[string]any{
		"region":       name,
		"replicaCount": c.opt.Managers,
		"crds":         map[string]any{"enabled": false}, // the control plane of the test has them
		"rbac":         map[string]any{"namespaced": true},
		"apiServers":   []any{map[string]any{"service": Service}},
		"leaderElection": map[string]any{
			"leaseDuration": c.opt.Lease.String(), "renewDeadline": c.opt.RenewDeadline.String(), "retryPeriod": c.opt.RetryPeriod.String(),
		},
		"log": map[string]any{"format": "text"}, "maxConns": 6,
		"apiServer": map[string]any{"replicaCount": 1, "maxConns": 6},
	}
	text, err := json.Marshal(values)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(c.dir, name+"-values.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, err
	}
	if _, err := c.run(ctx, c.helm, "install", "dbc", "charts/db-controller", "--namespace", name, "--values", file, "--kubeconfig", c.kubeconfig); err != nil {
		return nil, err
	}
	for secret, data := range map[string]map[string][]byte{
		"packages-database": {v1alpha1.DefaultDSNKey: []byte(r.DSN)},
		"packages-tls":      {v1alpha1.TLSCertKey: r.pair.CertPEM, v1alpha1.TLSKeyKey: r.pair.KeyPEM, v1alpha1.TLSCAKey: c.ca.CertPEM()},
	} {
		if err := c.admin.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: secret}, Data: data}); err != nil {
			return nil, err
		}
	}
	sample := &unstructured.Unstructured{}
	if err := yaml.Unmarshal(samples.Packages, &sample.Object); err != nil {
		return nil, err
	}
	sample.SetNamespace(name)
	if err := c.admin.Create(ctx, sample); err != nil {
		return nil, err
	}
	c.opt.Log("installed %s", name)
	return r, r.Sync(ctx)
}

// Declare declares the Deployment of a region in the namespaces of all regions, with its database in its own.
func (c *Cluster) Declare(ctx context.Context, names ...string) error {
	for _, at := range c.Regions() {
		for _, name := range c.Regions() {
			d := &v1alpha1.Deployment{
				ObjectMeta: metav1.ObjectMeta{Namespace: at, Name: "packages." + name},
				Spec:       v1alpha1.DeploymentSpec{Service: Service, Region: name, Version: "v1", Endpoint: "https://" + c.Region(name).api},
			}
			if at == name {
				d.Spec.Database = &v1alpha1.DatabaseSpec{SecretRef: v1alpha1.SecretKeyRef{Name: "packages-database"}}
				d.Spec.TLS = &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: "packages-tls"}}
			}
			if err := c.admin.Create(ctx, d); client.IgnoreAlreadyExists(err) != nil {
				return fmt.Errorf("declare %s in %s: %w", name, at, err)
			}
		}
	}
	c.opt.Log("declared %s", strings.Join(names, ", "))
	return nil
}

// Deployment returns the region's own Deployment with its status.
func (r *Region) Deployment(ctx context.Context) (*v1alpha1.Deployment, error) {
	d := &v1alpha1.Deployment{}
	return d, r.c.admin.Get(ctx, client.ObjectKey{Namespace: r.Name, Name: "packages." + r.Name}, d)
}

// Ready says whether the condition Ready holds, and why.
func (r *Region) Ready(ctx context.Context) (bool, string) {
	d, err := r.Deployment(ctx)
	if err != nil {
		return false, err.Error()
	}
	ready := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionReady)
	if ready == nil {
		return false, "no condition Ready yet"
	}
	peers, err := json.Marshal(d.Status.Peers)
	if err != nil {
		return false, err.Error()
	}
	return ready.Status == metav1.ConditionTrue, fmt.Sprintf("%s: %s; peers %s", ready.Reason, ready.Message, peers)
}

// RestartControlPlane stops the kube-apiserver, waits, and starts it again on the same data.
func (c *Cluster) RestartControlPlane(ctx context.Context, away time.Duration) error {
	return c.kube.Restart(ctx, away)
}

// kubeconfigOf writes a kubeconfig with a token of a service account.
func (r *Region) kubeconfigOf(ctx context.Context, account string) (string, error) {
	if file := r.tokens[account]; file != "" {
		return file, nil
	}
	token, err := r.c.kube.Token(ctx, r.Name, account)
	if err != nil {
		return "", err
	}
	at := r.c.kube.Config
	config := clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"e2e": {Server: at.Host, CertificateAuthorityData: at.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"account": {Token: token}},
		Contexts:       map[string]*clientcmdapi.Context{"e2e": {Cluster: "e2e", AuthInfo: "account", Namespace: r.Name}},
		CurrentContext: "e2e",
	}
	file := filepath.Join(r.c.dir, r.Name+"-"+account+".kubeconfig")
	if err := clientcmd.WriteToFile(config, file); err != nil {
		return "", err
	}
	r.tokens[account] = file
	return file, nil
}

// run runs a command in the module's folder and returns what it prints.
func (c *Cluster) run(ctx context.Context, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.root, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// Get asks an address of the operator's port.
func (c *Cluster) Get(ctx context.Context, url string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}
