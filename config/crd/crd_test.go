package crd_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/descriptor"
)

// object decodes YAML as an API server would.
func object(t *testing.T, doc string) map[string]any {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(doc))
	if err != nil {
		t.Fatalf("parse %s: %v", doc, err)
	}
	var out map[string]any
	if err := json.UnmarshalCaseSensitivePreserveInts(raw, &out); err != nil {
		t.Fatalf("decode %s: %v", doc, err)
	}
	return out
}

// An API server refuses a definition whose rules may cost too much, or whose schema is not structural: the same check, here.
func TestDefinitionsAreAccepted(t *testing.T) {
	files, err := filepath.Glob("*.yaml")
	if err != nil || len(files) != 3 {
		t.Fatalf("definitions: %v, %v", files, err)
	}
	for _, file := range files {
		v1, err := read(file)
		if err != nil {
			t.Fatal(err)
		}
		apiextensionsv1.SetDefaults_CustomResourceDefinition(v1)
		apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&v1.Spec)
		var internal apiextensions.CustomResourceDefinition
		if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(v1, &internal, nil); err != nil {
			t.Fatal(err)
		}
		internal.Status.StoredVersions = []string{"v1alpha1"}
		if faults := validation.ValidateCustomResourceDefinition(context.Background(), &internal); len(faults) > 0 {
			t.Errorf("%s: %v", file, faults.ToAggregate())
		}
	}
}

const deployment = `
apiVersion: meta.dbcontroller.io/v1alpha1
kind: Deployment
metadata: {name: packages.eu}
spec:
  service: packages.example.com
  region: eu
  version: v1
  endpoint: https://eu.example.com:8443
  database: {secretRef: {name: db}}
  tls: {secretRef: {name: tls}}
`

const descriptorDoc = `
apiVersion: meta.dbcontroller.io/v1alpha1
kind: ServiceDescriptor
metadata: {name: packages}
spec:
  service: packages.example.com
  multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
  versions:
  - name: v1
    imports: [{service: iam.example.com, version: v1}]
    resources:
    - {type: Section, plural: sections, patterns: ["sections/{section}"], policyHolder: {field: multiRegionPolicy}}
    - type: Package
      plural: packages
      patterns: ["sections/{section}/packages/{package}"]
      parent: Section
      onParentDeleted: Block
      references: [{field: "depends[]", target: Package, onTargetDeleted: Block}]
      schema: {type: object, properties: {depends: {type: array, items: {type: string}}}}
`

func TestDefaults(t *testing.T) {
	d := object(t, deployment)
	if faults, err := admit(d, nil); err != nil || len(faults) > 0 {
		t.Fatalf("admit: %v, %v", faults, err)
	}
	var typed v1alpha1.Deployment
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(d, &typed); err != nil {
		t.Fatal(err)
	}
	if s := typed.Spec; s.Shards != v1alpha1.DefaultShards || s.LagObjective.Duration.String() != "5s" ||
		s.Database.SecretRef.Key != v1alpha1.DefaultDSNKey || s.TLS.TrustDomain != v1alpha1.DefaultTrustDomain || s.ReclaimPolicy != v1alpha1.ReclaimRetain {
		t.Errorf("defaults: %+v", s)
	}

	sd := object(t, descriptorDoc)
	if faults, err := admit(sd, nil); err != nil || len(faults) > 0 {
		t.Fatalf("admit: %v, %v", faults, err)
	}
	var typedSD v1alpha1.ServiceDescriptor
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(sd, &typedSD); err != nil {
		t.Fatal(err)
	}
	r := typedSD.Spec.Versions[0].Resources[1]
	if r.SyncType != v1alpha1.SyncDefault || r.MaxBodyBytes != v1alpha1.DefaultMaxBodyBytes || r.Schema == nil {
		t.Errorf("defaults: %+v", r)
	}
	if _, err := descriptor.Compile(&typedSD.Spec); err != nil {
		t.Errorf("Compile: %v", err)
	}
}

func TestAdmit(t *testing.T) {
	for name, tc := range map[string]struct {
		doc, from, to string
		want          string // part of the only fault
	}{
		"endpoint with another scheme":       {deployment, "https://eu.example.com:8443", "ftp://eu.example.com", "endpoint must be an http or https URL"},
		"endpoint that is no URL":            {deployment, "https://eu.example.com:8443", "'eu.example.com:8443'", "endpoint must be an http or https URL"},
		"endpoint with a password":           {deployment, "https://eu.", "https://u:p@eu.", "endpoint must have no user"},
		"endpoint with a query":              {deployment, ":8443", ":8443/?x=1", "endpoint must have no user, query or fragment"},
		"endpoint missing":                   {deployment, "  endpoint: https://eu.example.com:8443\n", "", "spec.endpoint: Required value"},
		"region in capitals":                 {deployment, "region: eu", "region: EU", "spec.region"},
		"service of one label":               {deployment, "packages.example.com", "packages", "spec.service"},
		"version that is none":               {deployment, "version: v1", "version: '1'", "spec.version"},
		"secret of another namespace (S7)":   {deployment, "{name: db}", "{name: db, namespace: other}", "there is no such field"},
		"secret with a path (S7)":            {deployment, "{name: db}", "{name: ../other/db}", "spec.database.secretRef.name: Invalid value"},
		"unknown reclaim policy":             {deployment, "region: eu", "region: eu\n  reclaimPolicy: Recycle", "reclaimPolicy: Unsupported value"},
		"unknown field":                      {deployment, "region: eu", "region: eu\n  regoin: eu", "spec.regoin: Invalid value: \"\": there is no such field"},
		"objective of zero":                  {deployment, "region: eu", "region: eu\n  lagObjective: 0s", "lagObjective must be more than zero"},
		"objective that is no duration":      {deployment, "region: eu", "region: eu\n  lagObjective: soon", "spec.lagObjective"},
		"ring of no shards":                  {deployment, "region: eu", "region: eu\n  shards: 0", "spec.shards"},
		"suspend scope of everything":        {deployment, "region: eu", "region: eu\n  suspendScopes: [{}]", "suspendScopes[0].peerRegion: Required value"},
		"control region not enabled":         {descriptorDoc, "defaultControlRegion: eu", "defaultControlRegion: ap", "defaultControlRegion must be one of enabledRegions"},
		"region enabled twice":               {descriptorDoc, "[eu, us]", "[eu, us, eu]", "spec.multiRegionPolicy.enabledRegions[2]: Duplicate value"},
		"type declared twice":                {descriptorDoc, "type: Section", "type: Package", "spec.versions[0].resources[1]: Duplicate value"},
		"parent without a behavior":          {descriptorDoc, "      onParentDeleted: Block\n", "", "parent and onParentDeleted go together"},
		"parent that unsets":                 {descriptorDoc, "onParentDeleted: Block", "onParentDeleted: Unset", "onParentDeleted: Unsupported value"},
		"holder that is never copied":        {descriptorDoc, "policyHolder:", "syncType: Never, policyHolder:", "a policy holder cannot have syncType Never"},
		"reference with an unknown behavior": {descriptorDoc, "onTargetDeleted: Block", "onTargetDeleted: BLOCK", "onTargetDeleted: Unsupported value"},
		"body limit over the cap":            {descriptorDoc, "parent: Section", "parent: Section\n      maxBodyBytes: 2000000", "maxBodyBytes"},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(tc.doc, tc.from) {
				t.Fatalf("the document has no %q", tc.from)
			}
			faults, err := admit(object(t, strings.Replace(tc.doc, tc.from, tc.to, 1)), nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(faults) != 1 || !strings.Contains(faults[0].Error(), tc.want) {
				t.Errorf("faults = %v, want one with %q", faults, tc.want)
			}
		})
	}
}

func TestAdmitUpdate(t *testing.T) {
	for name, tc := range map[string]struct{ doc, from, to, want string }{
		"region":                {deployment, "region: eu", "region: us", "the region of a Deployment cannot change"},
		"service":               {deployment, "packages.example.com", "other.example.com", "the service of a Deployment cannot change"},
		"shards":                {deployment, "region: eu", "region: eu\n  shards: 8", "shards cannot change"},
		"endpoint":              {deployment, "eu.example.com", "eu2.example.com", ""},
		"service of descriptor": {descriptorDoc, "service: packages.", "service: others.", "the service of a ServiceDescriptor cannot change"},
	} {
		t.Run(name, func(t *testing.T) {
			old := object(t, tc.doc)
			if faults, err := admit(old, nil); err != nil || len(faults) > 0 {
				t.Fatal(faults, err)
			}
			faults, err := admit(object(t, strings.Replace(tc.doc, tc.from, tc.to, 1)), old)
			if err != nil {
				t.Fatal(err)
			}
			if tc.want == "" && len(faults) > 0 || tc.want != "" && (len(faults) != 1 || !strings.Contains(faults[0].Error(), tc.want)) {
				t.Errorf("faults = %v, want %q", faults, tc.want)
			}
		})
	}
}

func TestSamples(t *testing.T) {
	files, err := filepath.Glob("../samples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("samples: %v, %v", files, err)
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for doc := range strings.SplitSeq(string(raw), "\n---\n") {
			o := object(t, doc)
			if o["apiVersion"] != v1alpha1.GroupVersion.String() {
				continue
			}
			if faults, err := admit(o, nil); err != nil || len(faults) > 0 {
				t.Errorf("%s: admit: %v, %v", file, faults, err)
			}
			if o["kind"] != "ServiceDescriptor" {
				continue
			}
			var sd v1alpha1.ServiceDescriptor
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o, &sd); err != nil {
				t.Fatal(err)
			}
			if _, err := descriptor.Compile(&sd.Spec); err != nil {
				t.Errorf("%s: Compile: %v", file, err)
			}
		}
	}
}
