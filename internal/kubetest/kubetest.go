// Package kubetest runs a real kube-apiserver and etcd, with our CRDs installed, for as long as a test suite lives.
//
// The binaries come from KUBEBUILDER_ASSETS, else from the newest build in the cache that "make kube-assets" fills. Without them a
// suite is skipped, loudly, unless DBC_REQUIRE_KUBE is set, as "make test" does: then it fails.
package kubetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

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
}

// Start starts etcd and kube-apiserver on free ports with fresh data. It fails with ErrNoAssets when a suite may be skipped.
func Start() (*Cluster, error) {
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
	}
	config, err := env.Start()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start kube-apiserver of %s: %w", assets, err), env.Stop())
	}
	return &Cluster{env: env, Config: config}, nil
}

// Stop ends both processes and removes their data.
func (c *Cluster) Stop() error { return c.env.Stop() }

// As returns how a user without any rights of its own reaches the API server; RBAC decides what it may do.
func (c *Cluster) As(user string) (*rest.Config, error) {
	u, err := c.env.AddUser(envtest.User{Name: user}, nil)
	if err != nil {
		return nil, fmt.Errorf("add user %s: %w", user, err)
	}
	return u.Config(), nil
}

// Kubeconfig returns a kubeconfig file with which such a user reaches the API server.
func (c *Cluster) Kubeconfig(user string) ([]byte, error) {
	u, err := c.env.AddUser(envtest.User{Name: user}, nil)
	if err != nil {
		return nil, fmt.Errorf("add user %s: %w", user, err)
	}
	return u.KubeConfig()
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
