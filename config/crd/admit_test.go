// Package crd_test checks the generated CustomResourceDefinitions: that an API server takes them, and that their rules refuse
// what they should, with words that help.
package crd_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
)

// definition is a compiled CustomResourceDefinition.
type definition struct {
	structural *structuralschema.Structural
	schema     validation.SchemaValidator
	cel        *cel.Validator
}

var definitions = sync.OnceValues(compileAll)

// admit does to an object what an API server does before it stores it: it fills in defaults and returns what is wrong. old is the
// object as it was, nil for a new one.
func admit(object, old map[string]any) (field.ErrorList, error) {
	all, err := definitions()
	if err != nil {
		return nil, err
	}
	apiVersion, _ := object["apiVersion"].(string)
	kind, _ := object["kind"].(string)
	d := all[kind]
	if d == nil || apiVersion != v1alpha1.GroupVersion.String() {
		return nil, fmt.Errorf("admit %s of %s: it is not a kind of %s", kind, apiVersion, v1alpha1.GroupVersion)
	}
	var faults field.ErrorList
	for _, path := range pruning.PruneWithOptions(object, d.structural, true, structuralschema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}) {
		faults = append(faults, field.Invalid(field.NewPath(path), "", "there is no such field: remove it, or correct its spelling"))
	}
	defaulting.PruneNonNullableNullsWithoutDefaults(object, d.structural)
	defaulting.Default(object, d.structural)
	faults = append(faults, validation.ValidateCustomResource(nil, object, d.schema)...)
	faults = append(faults, listtype.ValidateListSetsAndMaps(nil, d.structural, object)...)
	if len(faults) > 0 {
		return faults, nil // rules in CEL rely on the types that the schema has checked
	}
	var before any
	if old != nil {
		before = old
	}
	faults, _ = d.cel.Validate(context.Background(), nil, d.structural, object, before, celconfig.RuntimeCELCostBudget)
	return faults, nil
}

func compileAll() (map[string]*definition, error) {
	files, err := filepath.Glob("*.yaml")
	if err != nil {
		return nil, err
	}
	out := map[string]*definition{}
	for _, file := range files {
		crd, err := read(file)
		if err != nil {
			return nil, err
		}
		if out[crd.Spec.Names.Kind], err = compileSchema(crd.Spec.Versions[0].Schema.OpenAPIV3Schema); err != nil {
			return nil, fmt.Errorf("compile %s: %w", file, err)
		}
	}
	return out, nil
}

func read(file string) (*apiextensionsv1.CustomResourceDefinition, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var crd apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(raw, &crd); err != nil {
		return nil, fmt.Errorf("parse %s: %w", file, err)
	}
	return &crd, nil
}

func compileSchema(v1 *apiextensionsv1.JSONSchemaProps) (*definition, error) {
	var props apiextensions.JSONSchemaProps
	if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(v1, &props, nil); err != nil {
		return nil, err
	}
	structural, err := structuralschema.NewStructural(&props)
	if err != nil {
		return nil, err
	}
	schema, _, err := validation.NewSchemaValidator(&props)
	if err != nil {
		return nil, err
	}
	return &definition{structural, schema, cel.NewValidator(structural, true, celconfig.PerCallLimit)}, nil
}
