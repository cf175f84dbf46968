// Package chart_test checks the charts and the kustomize bases: what they render from values good and bad, that a real kube-apiserver takes it,
// that namespaces which enforce the Pod Security Standard "restricted" take the pods, that install, upgrade and uninstall leave what they
// should, and that the roles grant what the program uses and nothing else.
//
//	helm_test.go       helm, kubectl kustomize and the program, built once; manifests -> objects
//	template_test.go   what is rendered
//	cluster_test.go    install, upgrade, uninstall on a real API server
//	audit_test.go      rights granted against rights used, by the API server's audit log
package chart_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/dbcontroller/db-controller/internal/pgserver/pgtest"
)

const (
	root      = "../.."
	chart     = root + "/charts/db-controller"
	crdsChart = root + "/charts/db-controller-crds"
	// helm, built from its module, believes in a version of long ago.
	kube    = "1.37.0"
	service = "packages.example.com"
)

// scratch is where helm keeps what it keeps, and where the program is built.
var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "dbc-chart-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := pgtest.Main(m, goleak.IgnoreCurrent())
	_ = os.RemoveAll(scratch)
	os.Exit(code)
}

// tool returns a program of hack/tools, built once per machine. Where it cannot be, a test is skipped, unless DBC_REQUIRE_KUBE is set.
func tool(t *testing.T, name string) string {
	t.Helper()
	out, err := tools(name)
	if err != nil {
		if os.Getenv("DBC_REQUIRE_KUBE") != "" {
			t.Fatalf("DBC_REQUIRE_KUBE is set, but %s cannot be built: %v", name, err)
		}
		t.Skipf("%s cannot be built: %v", name, err)
	}
	return filepath.Join(out, name)
}

func tools(name string) (string, error) {
	cmd := exec.Command(filepath.Join(root, "hack", "tool.sh"), name)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// program is the real binary.
var program = sync.OnceValues(func() (string, error) {
	file := filepath.Join(scratch, "db-controller")
	if out, err := exec.Command("go", "build", "-o", file, root+"/cmd/db-controller").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the program: %w: %s", err, out)
	}
	return file, nil
})

// helm runs helm; its error is what a person would read.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(tool(t, "helm"), args...)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+scratch, "HELM_CONFIG_HOME="+scratch, "HELM_DATA_HOME="+scratch)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("helm %s: %w: %s%s", args[0], err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// kustomize builds a base of config/, with the kubectl that was built beside the control plane.
func kustomize(t *testing.T, base string) (string, error) {
	t.Helper()
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		if os.Getenv("DBC_REQUIRE_KUBE") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make kube-assets prints the folder with kubectl")
		}
		t.Skip("no kubectl: KUBEBUILDER_ASSETS is not set")
	}
	var stderr bytes.Buffer
	cmd := exec.Command(filepath.Join(assets, "kubectl"), "kustomize", filepath.Join(root, "config", base))
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("kubectl kustomize config/%s: %w: %s", base, err, stderr.String())
	}
	return string(out), nil
}

// render renders the chart as release dbc in namespace system.
func render(t *testing.T, args ...string) []*unstructured.Unstructured {
	t.Helper()
	return renderAs(t, "dbc", args...)
}

func renderAs(t *testing.T, release string, args ...string) []*unstructured.Unstructured {
	t.Helper()
	out, err := helm(t, append([]string{"template", release, chart, "--kube-version", kube, "--namespace", "system"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, out)
}

// parse reads the objects of manifests.
func parse(t *testing.T, manifests string) (objects []*unstructured.Unstructured) {
	t.Helper()
	decoder := yaml.NewYAMLOrJSONDecoder(strings.NewReader(manifests), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := decoder.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, manifests)
		}
		if len(o.Object) > 0 {
			objects = append(objects, o)
		}
	}
}

// id tells objects apart.
func id(o *unstructured.Unstructured) string {
	return o.GetKind() + " " + o.GetNamespace() + "/" + o.GetName()
}

func find(t *testing.T, objects []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	for _, o := range objects {
		if o.GetKind() == kind && o.GetName() == name {
			return o
		}
	}
	t.Fatalf("no %s %s", kind, name)
	return nil
}

// examples are the example values of the chart.
func examples(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(chart + "/ci/*-values.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no examples of values", err)
	}
	return files
}
