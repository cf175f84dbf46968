package descriptor

import (
	"os"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// service compiles a descriptor's spec in YAML.
func service(t testing.TB, doc string) *Service {
	t.Helper()
	s, err := Compile(parseSpec(t, doc))
	if err != nil {
		t.Fatalf("Compile: %v", err)
	}
	return s
}

func parseSpec(t testing.TB, doc string) *v1alpha1.ServiceDescriptorSpec {
	t.Helper()
	var s v1alpha1.ServiceDescriptorSpec
	if err := yaml.UnmarshalStrict([]byte(doc), &s); err != nil {
		t.Fatalf("parse spec: %v", err)
	}
	return &s
}

// packages is the version of the sample that the demo uses.
func packages(t testing.TB) *Version {
	t.Helper()
	raw, err := os.ReadFile("../config/samples/packages.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var sd v1alpha1.ServiceDescriptor
	if err := yaml.UnmarshalStrict(raw, &sd); err != nil {
		t.Fatal(err)
	}
	s, err := Compile(&sd.Spec)
	if err != nil {
		t.Fatal(err)
	}
	return s.Version("v1")
}

// secrets has what packages has not: optional segments, several patterns, recursion, holders below holders, imports.
func secrets(t testing.TB) *Version {
	t.Helper()
	return service(t, `
service: secrets.example.com
multiRegionPolicy: {enabledRegions: [eu, us], defaultControlRegion: eu}
versions:
- name: v1
  imports: [{service: iam.example.com, version: v2}]
  resources:
  - {type: Organization, plural: organizations, patterns: ["organizations/{organization}"], policyHolder: {field: policy}}
  - {type: Project, plural: projects, patterns: ["projects/{project}", "organizations/{organization}/projects/{project}"],
     parent: Organization, onParentDeleted: Block, policyHolder: {field: spec.policy}}
  - type: Secret
    plural: secrets
    patterns: ["projects/{project}/[regions/{region}/]secrets/{secret}"]
    parent: Project
    onParentDeleted: CascadeDelete
    syncType: Never
    references:
    - {field: owner, target: iam.example.com/User, onTargetDeleted: AsyncUnset}
    - {field: "uses[].secret", target: Secret, onTargetDeleted: Block}
  - {type: Folder, plural: folders, patterns: ["folders/{folder}", "folders/{folder}/folders/{subfolder}"],
     parent: Folder, onParentDeleted: Block}
`).Version("v1")
}
