package chart_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/internal/kubetest"
)

// control is a control plane without our definitions, and its administrator.
type control struct {
	*kubetest.Cluster
	admin      client.Client
	kubeconfig string
	audit      string
}

func start(t *testing.T) *control {
	t.Helper()
	g := NewWithT(t)
	dir := t.TempDir()
	c := &control{kubeconfig: filepath.Join(dir, "kubeconfig"), audit: filepath.Join(dir, "audit.log")}
	var err error
	c.Cluster, err = kubetest.Start(kubetest.WithoutCRDs(), kubetest.WithAudit(c.audit))
	if errors.Is(err, kubetest.ErrNoAssets) {
		t.Skip(err)
	}
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { g.Expect(c.Stop()).To(Succeed()) })
	text, err := c.Kubeconfig("administrator", "system:masters")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(os.WriteFile(c.kubeconfig, text, 0o600)).To(Succeed())
	scheme := runtime.NewScheme()
	g.Expect(errors.Join(clientgoscheme.AddToScheme(scheme), apiextensionsv1.AddToScheme(scheme), v1alpha1.AddToScheme(scheme))).To(Succeed())
	c.admin, err = client.New(c.Config, client.Options{Scheme: scheme})
	g.Expect(err).NotTo(HaveOccurred())
	return c
}

func (c *control) helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return helm(t, append(args, "--kubeconfig", c.kubeconfig)...)
}

// namespace makes a namespace that takes restricted pods only.
func (c *control) namespace(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}}}
		NewWithT(t).Expect(c.admin.Create(t.Context(), ns)).To(Succeed())
	}
}

// foreign are the kinds of other operators that the chart can make objects of.
var foreign = []schema.GroupVersionKind{
	{Group: "monitoring.coreos.com", Version: "v1", Kind: "ServiceMonitor"},
	{Group: "monitoring.coreos.com", Version: "v1", Kind: "PodMonitor"},
	{Group: "monitoring.coreos.com", Version: "v1", Kind: "PrometheusRule"},
	{Group: "cert-manager.io", Version: "v1", Kind: "Certificate"},
}

// defineForeign makes the API server take foreign objects, whatever is in them.
func (c *control) defineForeign(t *testing.T) {
	t.Helper()
	g := NewWithT(t)
	for _, kind := range foreign {
		plural := strings.ToLower(kind.Kind) + "s"
		keep := true
		crd := &apiextensionsv1.CustomResourceDefinition{
			ObjectMeta: metav1.ObjectMeta{Name: plural + "." + kind.Group},
			Spec: apiextensionsv1.CustomResourceDefinitionSpec{
				Group: kind.Group, Scope: apiextensionsv1.NamespaceScoped,
				Names: apiextensionsv1.CustomResourceDefinitionNames{Kind: kind.Kind, Plural: plural},
				Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{Name: kind.Version, Served: true, Storage: true,
					Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: &keep}}}},
			},
		}
		g.Expect(c.admin.Create(t.Context(), crd)).To(Succeed())
		g.Eventually(func() error {
			list := &unstructured.UnstructuredList{}
			list.SetGroupVersionKind(kind)
			return c.admin.List(t.Context(), list)
		}).WithTimeout(30 * time.Second).Should(Succeed())
	}
}

// checkTaken asks the API server about every object of a release, strictly, and about a pod of every workload.
func (c *control) checkTaken(t *testing.T, namespace, manifest string) (objects []*unstructured.Unstructured) {
	t.Helper()
	g := NewWithT(t)
	pods := 0
	for _, o := range parse(t, manifest) {
		objects = append(objects, o)
		namespaced, err := c.admin.IsObjectNamespaced(o)
		g.Expect(err).NotTo(HaveOccurred())
		if namespaced && o.GetNamespace() == "" {
			o.SetNamespace(namespace) // as helm does
		}
		text, err := json.Marshal(o)
		g.Expect(err).NotTo(HaveOccurred())
		force := true
		g.Expect(c.admin.Patch(t.Context(), o.DeepCopy(), client.RawPatch(types.ApplyPatchType, text), &client.PatchOptions{
			DryRun: []string{metav1.DryRunAll}, FieldManager: "test", Force: &force, Raw: &metav1.PatchOptions{FieldValidation: metav1.FieldValidationStrict},
		})).To(Succeed(), id(o))
		if o.GetAPIVersion() != "apps/v1" {
			continue
		}
		pods++
		pod := podOf(t, o)
		g.Expect(c.admin.Create(t.Context(), pod, client.DryRunAll)).To(Succeed(), "restricted: "+id(o))
		pod = podOf(t, o)
		pod.Spec.SecurityContext.RunAsNonRoot = nil
		g.Expect(apierrors.IsForbidden(c.admin.Create(t.Context(), pod, client.DryRunAll))).To(BeTrue(), "the namespace enforces it")
	}
	g.Expect(pods).NotTo(BeZero())
	return objects
}

func podOf(t *testing.T, o *unstructured.Unstructured) *corev1.Pod {
	t.Helper()
	template := workload(t, []*unstructured.Unstructured{o}, o.GetName()).Spec.Template
	pod := &corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}
	pod.Namespace, pod.Name = o.GetNamespace(), o.GetName()+"-0"
	return pod
}

// TestInCluster does with a real API server what needs one, in this order.
func TestInCluster(t *testing.T) {
	c := start(t)
	t.Run("install, upgrade, uninstall", c.testInstallUpgradeUninstall)
	t.Run("kustomize", c.testApplyKustomize)
	t.Run("rights granted are rights used", c.testRightsGrantedAreRightsUsed)
}

// S13 and the life of releases: what is installed is taken by a real API server, strictly and with pods restricted; upgrades go through every example;
// what is uninstalled is gone, but for the definitions.
func (c *control) testInstallUpgradeUninstall(t *testing.T) {
	g := NewWithT(t)
	c.defineForeign(t)
	c.namespace(t, "eu", "packages", "monitoring")
	ctx := t.Context()

	_, err := c.helm(t, "install", "one", chart, "-n", "eu", "-f", chart+"/ci/full-values.yaml")
	g.Expect(err).To(MatchError(ContainSubstring("Install the chart db-controller-crds first")))
	notes, err := c.helm(t, "install", "one", chart, "-n", "eu", "-f", chart+"/ci/minimal-values.yaml")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(notes).To(And(ContainSubstring("kubectl get dbd"), ContainSubstring("To uninstall")))

	// A second release in the same namespace.
	_, err = c.helm(t, "install", "two", chart, "-n", "eu", "--set", "region=us")
	g.Expect(err).To(MatchError(And(ContainSubstring("release one in namespace eu"), ContainSubstring("crds.enabled=false"))))
	_, err = c.helm(t, "install", "two", chart, "-n", "eu", "--set", "region=us,crds.enabled=false")
	g.Expect(err).NotTo(HaveOccurred())

	made := map[schema.GroupVersionKind]bool{}
	for _, values := range examples(t) {
		_, err := c.helm(t, "upgrade", "one", chart, "-n", "eu", "-f", values)
		g.Expect(err).NotTo(HaveOccurred(), values)
		manifest, err := c.helm(t, "get", "manifest", "one", "-n", "eu")
		g.Expect(err).NotTo(HaveOccurred())
		for _, o := range c.checkTaken(t, "eu", manifest) {
			made[o.GroupVersionKind()] = true
		}
	}
	g.Expect(len(made)).To(BeNumerically(">=", 15))

	_, err = c.helm(t, "uninstall", "two", "-n", "eu")
	g.Expect(err).NotTo(HaveOccurred())
	kept := &v1alpha1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "packages", Name: "kept"},
		Spec:       v1alpha1.DeploymentSpec{Service: service, Region: "eu", Version: "v1", Endpoint: "https://eu.example.com"},
	}
	g.Expect(c.admin.Create(ctx, kept)).To(Succeed())
	_, err = c.helm(t, "uninstall", "one", "-n", "eu")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(c.admin.Get(ctx, client.ObjectKeyFromObject(kept), kept)).To(Succeed(), "the definitions stay, and what people declared")
	g.Expect(c.admin.Delete(ctx, kept)).To(Succeed())
	for kind := range made {
		left := &unstructured.UnstructuredList{}
		left.SetGroupVersionKind(kind)
		g.Expect(c.admin.List(ctx, left, client.MatchingLabels{"app.kubernetes.io/part-of": "db-controller"})).To(Succeed())
		if kind.Kind == "CustomResourceDefinition" {
			g.Expect(left.Items).To(HaveLen(3))
			continue
		}
		for _, o := range left.Items {
			g.Expect(id(&o)).To(BeEmpty(), "it is left behind")
		}
	}

	// A later release of that name finds its definitions; another takes them as they are, lists and all.
	_, err = c.helm(t, "install", "three", chart, "-n", "eu", "-f", chart+"/ci/cert-manager-values.yaml")
	g.Expect(err).To(MatchError(ContainSubstring("release one in namespace eu")))
	_, err = c.helm(t, "install", "three", chart, "-n", "eu", "-f", chart+"/ci/cert-manager-values.yaml", "--set", "crds.enabled=false")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(c.admin.Get(ctx, client.ObjectKey{Namespace: "eu", Name: service + ".eu"}, kept)).To(Succeed())
	g.Expect(kept.Spec.TLS.SecretRef.Name).To(Equal("three-db-controller-packages-example-com-tls"))
	_, err = c.helm(t, "uninstall", "three", "-n", "eu")
	g.Expect(err).NotTo(HaveOccurred())
	_, err = c.helm(t, "install", "one", chart, "-n", "eu", "-f", chart+"/ci/minimal-values.yaml")
	g.Expect(err).NotTo(HaveOccurred())
	_, err = c.helm(t, "uninstall", "one", "-n", "eu")
	g.Expect(err).NotTo(HaveOccurred())
}

// The kustomize bases are taken as well.
func (c *control) testApplyKustomize(t *testing.T) {
	g := NewWithT(t)
	out, err := kustomize(t, "default")
	g.Expect(err).NotTo(HaveOccurred())
	pods, force := 0, true
	for _, o := range parse(t, out) {
		text, err := json.Marshal(o)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(c.admin.Patch(t.Context(), o.DeepCopy(), client.RawPatch(types.ApplyPatchType, text), &client.PatchOptions{
			FieldManager: "kubectl", Force: &force, Raw: &metav1.PatchOptions{FieldValidation: metav1.FieldValidationStrict},
		})).To(Succeed(), id(o))
		if o.GetAPIVersion() == "apps/v1" {
			pods++
			g.Expect(c.admin.Create(t.Context(), podOf(t, o), client.DryRunAll)).To(Succeed())
		}
	}
	g.Expect(pods).To(Equal(2))
}
