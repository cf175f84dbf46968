// Package v1alpha1 holds the custom resources by which people declare a topology: a Deployment is one service in one
// region, a ServiceDescriptor is the schema of a service.
//
// The same objects are read from a Kubernetes API server and from a folder of manifests. The rules on the fields here are
// generated into the CustomResourceDefinitions of config/crd, which both sources apply; package descriptor checks what a
// schema cannot say.
//
// +kubebuilder:object:generate=true
// +groupName=meta.dbcontroller.io
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var (
	// GroupVersion is the API group and version of all types of this package.
	GroupVersion = schema.GroupVersion{Group: "meta.dbcontroller.io", Version: "v1alpha1"}

	// SchemeBuilder collects the functions that add the types to a scheme.
	SchemeBuilder = runtime.NewSchemeBuilder(addKnownTypes)

	// AddToScheme adds the types of this package to a scheme.
	AddToScheme = SchemeBuilder.AddToScheme
)

func addKnownTypes(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion, &Deployment{}, &DeploymentList{}, &ServiceDescriptor{}, &ServiceDescriptorList{}, &Verification{}, &VerificationList{})
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}
