package chart_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	appsv1 "k8s.io/api/apps/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

func TestExamplesAreLintedAndRendered(t *testing.T) {
	for _, values := range examples(t) {
		t.Run(filepath.Base(values), func(t *testing.T) {
			g := NewWithT(t)
			out, err := helm(t, "lint", "--strict", "--kube-version", kube, chart, "--values", values)
			g.Expect(err).NotTo(HaveOccurred(), out)
			objects := render(t, "--values", values)
			seen := map[string]bool{}
			for _, o := range objects {
				g.Expect(seen).NotTo(HaveKey(id(o)), "rendered twice")
				seen[id(o)] = true
			}
			g.Expect(seen).To(HaveKey("Deployment system/dbc-db-controller-manager"))
		})
	}
	out, err := helm(t, "lint", "--strict", "--kube-version", kube, crdsChart)
	NewWithT(t).Expect(err).NotTo(HaveOccurred(), out)
}

// Both charts carry the same definitions, those of config/crd.
func TestDefinitionsOfBothCharts(t *testing.T) {
	g := NewWithT(t)
	definitions := func(objects []*unstructured.Unstructured) map[string]any {
		specs := map[string]any{}
		for _, o := range objects {
			if o.GetKind() == "CustomResourceDefinition" {
				g.Expect(o.GetAnnotations()).To(HaveKeyWithValue("helm.sh/resource-policy", "keep"))
				specs[o.GetName()] = o.Object["spec"]
			}
		}
		return specs
	}
	ours := map[string]any{}
	files, err := filepath.Glob(root + "/config/crd/*.yaml")
	g.Expect(err).NotTo(HaveOccurred())
	for _, file := range files {
		text, err := os.ReadFile(file)
		g.Expect(err).NotTo(HaveOccurred())
		o := parse(t, string(text))[0]
		ours[o.GetName()] = o.Object["spec"]
	}
	g.Expect(ours).To(HaveLen(3))
	g.Expect(definitions(render(t, "--set", "region=eu"))).To(Equal(ours))
	g.Expect(definitions(render(t, "--set", "region=eu,crds.enabled=false"))).To(BeEmpty())
	out, err := helm(t, "template", "crds", crdsChart, "--kube-version", kube)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(definitions(parse(t, out))).To(Equal(ours))
	for _, o := range render(t, "--set", "region=eu,crds.keep=false") {
		g.Expect(o.GetAnnotations()).NotTo(HaveKey("helm.sh/resource-policy"))
	}
}

func TestBadValuesAreRefusedWithWordsThatHelp(t *testing.T) {
	for name, c := range map[string]struct{ set, says string }{
		"no region":               {"", "region is required"},
		"region in capitals":      {"region=EU", "/region"},
		"unknown key":             {"region=eu,replicas=3", "replicas"},
		"unknown key further in":  {"region=eu,image.name=x", "name"},
		"unknown key of an entry": {"region=eu,apiServers[0].service=a.b,apiServers[0].replica=3", "replica"},
		"wrong type":              {"region=eu,replicaCount=many", "/replicaCount"},
		"moving tag":              {"region=eu,image.tag=latest", "/image/tag"},
		"bad digest":              {"region=eu,image.digest=abc", "/image/digest"},
		"no service":              {"region=eu,apiServers[0].replicaCount=3", "service"},
		"service twice":           {"region=eu,apiServers[0].service=a.b,apiServers[1].service=a.b", "a.b is listed twice"},
		"deadline after the lease": {"region=eu,leaderElection.renewDeadline=15s",
			"renewDeadline (15s) must be less than leaseDuration (15s)"},
		"half a second":            {"region=eu,leaderElection.leaseDuration=2500ms", "/leaderElection/leaseDuration"},
		"retry after the deadline": {"region=eu,leaderElection.retryPeriod=1m", "retryPeriod (1m) must be less than renewDeadline (10s)"},
		"too little time to hand over": {"region=eu,terminationGracePeriodSeconds=10",
			"terminationGracePeriodSeconds (10) must be at least leaderElection.leaseDuration (15s)"},
		"killed while it sleeps": {"region=eu,apiServers[0].service=a.b,apiServer.preStopSeconds=30", "must be more than its preStopSeconds (30)"},
		"no issuer":              {"region=eu,certManager.enabled=true", "certManager.issuerRef.name is required"},
		"scraped twice":          {"region=eu,metrics.podMonitor.enabled=true,metrics.serviceMonitor.enabled=true", "every pod is scraped twice"},
		"nothing to scrape":      {"region=eu,metrics.enabled=false,metrics.podMonitor.enabled=true", "need metrics.enabled"},
		"secrets where nothing is watched": {"region=eu,rbac.namespaced=true,rbac.secretNamespaces[0]=elsewhere",
			"elsewhere is not watched"},
		"no name of an account": {"region=eu,serviceAccount.create=false", "serviceAccount.name is needed"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := helm(t, "template", "dbc", chart, "--kube-version", kube, "--set", c.set)
			NewWithT(t).Expect(err).To(MatchError(ContainSubstring(c.says)))
		})
	}
}

func workload(t *testing.T, objects []*unstructured.Unstructured, name string) *appsv1.Deployment {
	t.Helper()
	d := &appsv1.Deployment{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(find(t, objects, "Deployment", name).Object, d, true); err != nil {
		t.Fatal(err)
	}
	return d
}

func args(d *appsv1.Deployment) []string { return d.Spec.Template.Spec.Containers[0].Args }

// The program takes the arguments of every example.
func TestArgumentsAreThoseOfTheProgram(t *testing.T) {
	g := NewWithT(t)
	binary, err := program()
	g.Expect(err).NotTo(HaveOccurred())
	for _, values := range examples(t) {
		for _, o := range render(t, "--values", values) {
			if o.GetAPIVersion() != "apps/v1" {
				continue
			}
			args := args(workload(t, []*unstructured.Unstructured{o}, o.GetName()))
			out, err := exec.Command(binary, append(slices.Clone(args), "--help")...).CombinedOutput()
			g.Expect(err).NotTo(HaveOccurred(), "%s: %v\n%s", values, args, out)
		}
	}
}

func TestWorkloads(t *testing.T) {
	g := NewWithT(t)
	objects := render(t, "--values", chart+"/ci/full-values.yaml")
	manager := workload(t, objects, "dbc-db-controller-manager")
	g.Expect(args(manager)).To(ContainElements("manager", "--region=eu", "--service=packages.example.com", "--watch-namespaces=packages", "--leader-elect",
		"--leader-election-id=packages-eu", "--lease-namespace=system", "--lease-duration=30s", "--nodes=2", "--max-shards-per-node=1024", "--purge-after=48h"))
	g.Expect(args(manager)[len(args(manager))-1]).To(Equal("--max-conns=24"), "extraArgs come last, so that they win")
	g.Expect(manager.Spec.Template.Spec.Containers[0].Image).To(HavePrefix("registry.example.com/dbcontroller/db-controller@sha256:"))
	api := workload(t, objects, "dbc-db-controller-packages-example-com")
	g.Expect(*api.Spec.Replicas).To(Equal(int32(3)))
	g.Expect(args(api)).To(ContainElements("apiserver", "--service=packages.example.com", "--region=eu", "--bind-address=:8443"))
	g.Expect(api.Spec.Template.Spec.Containers[0].Lifecycle.PreStop.Sleep.Seconds).To(Equal(int64(5)))
	g.Expect(workload(t, objects, "dbc-db-controller-library-example-com").Spec.Replicas).To(BeNil(), "the autoscaler sets it")

	for _, d := range []*appsv1.Deployment{manager, api} {
		pod := d.Spec.Template.Spec
		for _, env := range pod.Containers[0].Env {
			g.Expect(env.ValueFrom == nil || env.ValueFrom.SecretKeyRef == nil).To(BeTrue(), "secrets are not in the environment")
		}
		g.Expect(*pod.Containers[0].SecurityContext.ReadOnlyRootFilesystem).To(BeTrue())
		g.Expect(pod.TopologySpreadConstraints).To(HaveLen(2))
		for _, c := range pod.TopologySpreadConstraints {
			g.Expect(c.LabelSelector).To(Equal(d.Spec.Selector), "spread over its own pods alone")
		}
		budget := find(t, objects, "PodDisruptionBudget", d.Name)
		labels, _, err := unstructured.NestedStringMap(budget.Object, "spec", "selector", "matchLabels")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(labels).To(Equal(d.Spec.Selector.MatchLabels))
	}
	none := render(t, "--set", "region=eu,apiServers[0].service="+service+",apiServers[0].replicaCount=0,apiServers[0].podDisruptionBudget.enabled=false")
	g.Expect(*workload(t, none, "dbc-db-controller-packages-example-com").Spec.Replicas).To(BeZero(), "an entry overrides, also with nothing")
	for _, o := range none {
		if o.GetKind() == "PodDisruptionBudget" {
			g.Expect(o.GetName()).To(Equal("dbc-db-controller-manager"))
		}
	}
	plain := workload(t, render(t, "--set", "region=eu"), "dbc-db-controller-manager")
	g.Expect(plain.Spec.Template.Spec.Containers[0].Image).To(Equal("ghcr.io/dbcontroller/db-controller:0.1.0"), "the tag is the chart's appVersion")
}

// Two releases in one namespace share nothing, not even the Lease they elect by (conventions: a second install must not freeze the first).
func TestTwoReleasesInOneNamespaceShareNothing(t *testing.T) {
	g := NewWithT(t)
	seen := map[string]bool{}
	elections := map[string]bool{}
	for _, release := range []string{"blue", "green"} {
		objects := renderAs(t, release, "--values", chart+"/ci/monitoring-values.yaml", "--set", "crds.enabled=false")
		for _, o := range objects {
			g.Expect(seen).NotTo(HaveKey(id(o)))
			seen[id(o)] = true
		}
		for _, a := range args(workload(t, objects, release+"-db-controller-manager")) {
			if strings.HasPrefix(a, "--leader-election-id=") {
				elections[a] = true
			}
		}
	}
	g.Expect(elections).To(HaveLen(2))
}

func rules(t *testing.T, o *unstructured.Unstructured) []rbacv1.PolicyRule {
	t.Helper()
	role := &rbacv1.Role{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, role); err != nil {
		t.Fatal(err)
	}
	return role.Rules
}

// S13: the roles are least; with rbac.namespaced nothing is cluster-wide, and what is watched is as narrow as what is granted.
func TestRoles(t *testing.T) {
	g := NewWithT(t)
	wide := render(t, "--set", "region=eu,apiServers[0].service="+service+",rbac.secretNames={eu-database,eu-tls}")
	for _, o := range wide {
		switch o.GetKind() {
		case "Role", "ClusterRole":
			for _, r := range rules(t, o) {
				g.Expect(slices.Concat(r.Verbs, r.Resources, r.APIGroups)).NotTo(ContainElement("*"), id(o))
				if slices.Contains(r.Resources, "secrets") {
					g.Expect(o.GetKind()).To(Equal("Role"), "secrets are never read cluster-wide")
					g.Expect(r.Verbs).To(Equal([]string{"get"}))
					g.Expect(r.ResourceNames).To(Equal([]string{"eu-database", "eu-tls"}))
				}
			}
		case "ServiceAccount":
			g.Expect(o.Object).To(HaveKeyWithValue("automountServiceAccountToken", false))
		}
	}
	g.Expect(strings.Join(args(workload(t, wide, "dbc-db-controller-manager")), " ")).NotTo(ContainSubstring("--watch-namespaces"))
	g.Expect(find(t, wide, "ClusterRole", "system:dbc-db-controller:view").GetLabels()).To(HaveKeyWithValue("rbac.authorization.k8s.io/aggregate-to-view", "true"))

	for _, c := range []struct{ set, watched string }{
		{"", "system"},
		{",watchNamespaces={one,two}", "one,two"},
	} {
		narrow := render(t, "--values", chart+"/ci/namespaced-values.yaml", "--set", "region=eu"+c.set)
		granted := map[string]bool{}
		for _, o := range narrow {
			g.Expect(o.GetKind()).NotTo(HavePrefix("Cluster"))
			if o.GetKind() == "Role" {
				for _, r := range rules(t, o) {
					if slices.Contains(r.Resources, "deployments") {
						granted[o.GetNamespace()] = true
					}
				}
			}
		}
		for _, name := range []string{"dbc-db-controller-manager", "dbc-db-controller-packages-example-com"} {
			g.Expect(args(workload(t, narrow, name))).To(ContainElement("--watch-namespaces=" + c.watched))
		}
		for ns := range strings.SplitSeq(c.watched, ",") {
			g.Expect(granted).To(HaveKey(ns))
		}
		g.Expect(granted).To(HaveLen(len(strings.Split(c.watched, ","))))
	}
}

// A Certificate has exactly one URI, the identity of the Deployment, which finds its Secret by itself.
func TestCertificates(t *testing.T) {
	g := NewWithT(t)
	objects := render(t, "--values", chart+"/ci/cert-manager-values.yaml")
	certificate := find(t, objects, "Certificate", "dbc-db-controller-packages-example-com-tls")
	uris, _, err := unstructured.NestedStringSlice(certificate.Object, "spec", "uris")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(uris).To(Equal([]string{"spiffe://db-controller/service/packages.example.com/region/eu"}))
	hosts, _, err := unstructured.NestedStringSlice(certificate.Object, "spec", "dnsNames")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(hosts).To(ContainElement("eu.packages.example.com"))
	declared := find(t, objects, "Deployment", "packages.example.com.eu")
	secret, _, err := unstructured.NestedString(declared.Object, "spec", "tls", "secretRef", "name")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(certificate.Object["spec"]).To(HaveKeyWithValue("secretName", secret))
}

// The pods can be reached on the API's port, and for metrics from where Prometheus is; nothing else.
func TestNetworkPolicies(t *testing.T) {
	g := NewWithT(t)
	objects := render(t, "--values", chart+"/ci/monitoring-values.yaml")
	for name, ports := range map[string][]any{
		"dbc-db-controller-manager":              {"metrics"},
		"dbc-db-controller-packages-example-com": {"api", "metrics"},
	} {
		policy := find(t, objects, "NetworkPolicy", name)
		ingress, _, err := unstructured.NestedSlice(policy.Object, "spec", "ingress")
		g.Expect(err).NotTo(HaveOccurred())
		var open []any
		for _, rule := range ingress {
			rule := rule.(map[string]any)
			port := rule["ports"].([]any)[0].(map[string]any)["port"]
			open = append(open, port)
			if port == "metrics" {
				g.Expect(rule["from"]).NotTo(BeEmpty(), "metrics are plain HTTP: not for everyone")
			}
		}
		g.Expect(open).To(Equal(ports))
		egress, _, err := unstructured.NestedSlice(policy.Object, "spec", "egress")
		g.Expect(err).NotTo(HaveOccurred())
		for _, rule := range egress {
			g.Expect(rule.(map[string]any)["ports"]).NotTo(BeEmpty())
		}
	}
}

func TestMonitoring(t *testing.T) {
	g := NewWithT(t)
	objects := render(t, "--values", chart+"/ci/monitoring-values.yaml")
	rule := find(t, objects, "PrometheusRule", "dbc-db-controller")
	groups, _, err := unstructured.NestedSlice(rule.Object, "spec", "groups")
	g.Expect(err).NotTo(HaveOccurred())
	alerts := map[string]bool{}
	for _, group := range groups {
		for _, r := range group.(map[string]any)["rules"].([]any) {
			r := r.(map[string]any)
			if name, ok := r["alert"].(string); ok {
				alerts[name] = true
				g.Expect(r["labels"]).To(HaveKeyWithValue("team", "storage"), name)
				g.Expect(r["labels"]).To(HaveKey("severity"), name)
			}
		}
	}
	g.Expect(alerts).To(HaveKey("DBControllerPeerUnreachable"))
	g.Expect(alerts).NotTo(HaveKey("DBControllerShardFlapping"), "it is excluded")
	files, err := filepath.Glob(chart + "/files/dashboards/*.json")
	g.Expect(err).NotTo(HaveOccurred())
	dashboards := 0
	for _, o := range objects {
		if o.GetKind() == "ConfigMap" {
			dashboards++
			g.Expect(o.GetNamespace()).To(Equal("monitoring"))
			g.Expect(o.GetLabels()).To(HaveKeyWithValue("grafana_dashboard", "1"))
			for name, text := range o.Object["data"].(map[string]any) {
				file, err := os.ReadFile(filepath.Join(chart, "files", "dashboards", name))
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(strings.TrimSpace(text.(string))).To(Equal(strings.TrimSpace(string(file))))
			}
		}
	}
	g.Expect(dashboards).To(Equal(len(files)))
}

// The kustomize bases are the objects of the chart.
func TestKustomizeBases(t *testing.T) {
	g := NewWithT(t)
	out, err := kustomize(t, "default")
	g.Expect(err).NotTo(HaveOccurred())
	ids := func(objects []*unstructured.Unstructured) (all []string) {
		for _, o := range objects {
			if o.GetKind() != "Namespace" {
				all = append(all, id(o))
			}
		}
		slices.Sort(all)
		return all
	}
	rendered, err := helm(t, "template", "db-controller", chart, "--kube-version", kube, "--namespace", "db-controller-system", "--set", "region=eu,apiServers[0].service="+service)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(ids(parse(t, out))).To(Equal(ids(parse(t, rendered))))
	for _, base := range []string{"networkpolicy", "prometheus"} {
		out, err := kustomize(t, base)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(parse(t, out)).NotTo(BeEmpty())
	}
}
