// Package kubetest runs a real kube-apiserver and etcd, with our CRDs installed, for as long as a test suite lives.
//
// The binaries come from KUBEBUILDER_ASSETS, else from the newest build in the cache that "make kube-assets" fills. Without them a
// suite is skipped, loudly, unless DBC_REQUIRE_KUBE is set, as "make test" does: then it fails.
package kubetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// ErrNoAssets says that there is no kube-apiserver to run and that none is required.
var ErrNoAssets = errors.New("no kube-apiserver: run \"make kube-assets\", or set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver")

// Cluster is a running API server.
type Cluster struct {
	env *envtest.Environment
	// Config reaches the API server as an administrator.
	Config *rest.Config

	stops []func() error // of what was started again
}

// Option changes how a cluster is started.
type Option func(*envtest.Environment) error

// WithoutCRDs leaves our CRDs out: the test installs them.
func WithoutCRDs() Option {
	return func(env *envtest.Environment) error {
		env.CRDDirectoryPaths = nil
		return nil
	}
}

// WithAudit makes the API server write a line of JSON for every request into file: who asked what, and the answer's code. It also
// lets it take care of service accounts in pods, as clusters do.
func WithAudit(file string) Option {
	return func(env *envtest.Environment) error {
		const policy = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived, ResponseStarted]\nrules: [{level: Metadata}]\n"
		if err := os.WriteFile(file+".policy", []byte(policy), 0o600); err != nil {
			return err
		}
		env.ControlPlane.GetAPIServer().Configure().Set("audit-policy-file", file+".policy").Set("audit-log-path", file).
			Disable("disable-admission-plugins")
		return nil
	}
}

// Start starts etcd and kube-apiserver on free ports with fresh data; RBAC decides who may do what. It fails with ErrNoAssets when a
// suite may be skipped.
func Start(options ...Option) (*Cluster, error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	assets, err := findAssets(root)
	if err != nil {
		return nil, err
	}
	env := &envtest.Environment{
		BinaryAssetsDirectory: assets,
		CRDDirectoryPaths:     []string{filepath.Join(root, "config", "crd")},
		ErrorIfCRDPathMissing: true,
		// Other suites may keep the machine busy.
		ControlPlaneStartTimeout: 2 * time.Minute,
	}
	for _, o := range options {
		if err := o(env); err != nil {
			return nil, fmt.Errorf("configure kube-apiserver: %w", err)
		}
	}
	config, err := env.Start()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start kube-apiserver of %s: %w", assets, err), env.Stop())
	}
	return &Cluster{env: env, Config: config}, nil
}

// Stop ends both processes and removes their data.
func (c *Cluster) Stop() error {
	var err error
	for _, stop := range c.stops {
		err = errors.Join(err, stop())
	}
	return errors.Join(err, c.env.Stop())
}

// As returns how a user without any rights of its own reaches the API server; RBAC decides what it may do.
func (c *Cluster) As(user string) (*rest.Config, error) {
	u, err := c.env.AddUser(envtest.User{Name: user}, nil)
	if err != nil {
		return nil, fmt.Errorf("add user %s: %w", user, err)
	}
	return u.Config(), nil
}

// Kubeconfig returns a kubeconfig file with which a user reaches the API server. It has the rights of its groups (system:masters has all),
// and those that RBAC gives it.
func (c *Cluster) Kubeconfig(user string, groups ...string) ([]byte, error) {
	u, err := c.env.AddUser(envtest.User{Name: user, Groups: groups}, nil)
	if err != nil {
		return nil, fmt.Errorf("add user %s: %w", user, err)
	}
	return u.KubeConfig()
}

// Kubectl returns the program, of the same version as the API server.
func (c *Cluster) Kubectl() (string, error) {
	file := filepath.Join(c.env.BinaryAssetsDirectory, "kubectl")
	if _, err := os.Stat(file); err != nil {
		return "", fmt.Errorf("find kubectl: %w; \"make kube-assets\" builds it", err)
	}
	return file, nil
}

// Token returns a token of a service account, valid for an hour, as its pods have one.
func (c *Cluster) Token(ctx context.Context, namespace, account string) (string, error) {
	clients, err := kubernetes.NewForConfig(c.Config)
	if err != nil {
		return "", err
	}
	hour := int64(3600)
	req := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &hour}}
	res, err := clients.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, req, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("get a token of service account %s/%s: %w", namespace, account, err)
	}
	return res.Status.Token, nil
}

func findAssets(root string) (string, error) {
	if dir := os.Getenv("KUBEBUILDER_ASSETS"); dir != "" {
		return dir, nil
	}
	cache, err := exec.Command(filepath.Join(root, "hack", "cache-dir.sh")).Output()
	if err != nil {
		return "", fmt.Errorf("find the cache: %w", err)
	}
	built, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(cache)), "kube", "*", "kube-apiserver"))
	if err != nil {
		return "", err
	}
	newest := ""
	var when int64
	for _, file := range built {
		if info, err := os.Stat(file); err == nil && info.ModTime().UnixNano() > when {
			newest, when = filepath.Dir(file), info.ModTime().UnixNano()
		}
	}
	switch {
	case newest != "":
		return newest, nil
	case os.Getenv("DBC_REQUIRE_KUBE") != "":
		return "", errors.New("DBC_REQUIRE_KUBE is set, but there is no kube-apiserver: run \"make kube-assets\"")
	}
	return "", ErrNoAssets
}

// moduleRoot is the folder of go.mod above the test that runs.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("find go.mod: not in a module")
}
