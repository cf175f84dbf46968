package folder

import (
	"context"
	"fmt"
	"io/fs"
	"strings"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/objectmeta"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/config"
)

// schemas are the CRDs of this binary, by kind.
type schemas map[string]kindSchema

type kindSchema struct {
	structural *schema.Structural
	openAPI    validation.SchemaValidator
	cel        *cel.Validator
}

func loadSchemas() (schemas, error) {
	loaded := schemas{}
	names, err := fs.Glob(config.CRDs, "crd/*.yaml")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		text, err := fs.ReadFile(config.CRDs, name)
		if err != nil {
			return nil, err
		}
		var crd apiextensionsv1.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(text, &crd); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if loaded[crd.Spec.Names.Kind], err = compileSchema(&crd); err != nil {
			return nil, fmt.Errorf("compile %s: %w", name, err)
		}
	}
	for _, kind := range []string{kindDeployment, kindService} {
		if _, ok := loaded[kind]; !ok {
			return nil, fmt.Errorf("no CRD of kind %s", kind)
		}
	}
	return loaded, nil
}

func compileSchema(crd *apiextensionsv1.CustomResourceDefinition) (kindSchema, error) {
	for _, v := range crd.Spec.Versions {
		if v.Name != v1alpha1.GroupVersion.Version {
			continue
		}
		var props apiextensions.JSONSchemaProps
		if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(v.Schema.OpenAPIV3Schema, &props, nil); err != nil {
			return kindSchema{}, err
		}
		structural, err := schema.NewStructural(&props)
		if err != nil {
			return kindSchema{}, err
		}
		openAPI, _, err := validation.NewSchemaValidator(&props)
		if err != nil {
			return kindSchema{}, err
		}
		return kindSchema{structural, openAPI, cel.NewValidator(structural, true, celconfig.PerCallLimit)}, nil
	}
	return kindSchema{}, fmt.Errorf("version %s is missing", v1alpha1.GroupVersion.Version)
}

// admit does to an object what an API server does before it stores it: refuse unknown fields, fill in defaults, validate, and hold
// the object against its previous state (nil when there is none).
func (k kindSchema) admit(content, previous map[string]any) error {
	var errs field.ErrorList
	_, _, unknown, err := objectmeta.GetObjectMetaWithOptions(content, objectmeta.ObjectMetaOptions{ReturnUnknownFieldPaths: true})
	if err != nil {
		return err
	}
	unknown = append(unknown, pruning.PruneWithOptions(content, k.structural, true, schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true})...)
	for _, path := range unknown {
		errs = append(errs, &field.Error{Type: field.ErrorTypeForbidden, Field: strings.TrimPrefix(path, "."), Detail: "unknown field; check its spelling and its place"})
	}
	defaulting.Default(content, k.structural)
	defaulting.PruneNonNullableNullsWithoutDefaults(content, k.structural)

	// Only an object of the right shape is handed to the CEL rules, as in an API server.
	errs = append(errs, validation.ValidateCustomResource(nil, content, k.openAPI)...)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, k.structural, content)...)
	if len(errs) == 0 {
		var old any // a typed nil would count as a previous state
		if previous != nil {
			old = previous
		}
		errs, _ = k.cel.Validate(context.Background(), nil, k.structural, content, old, celconfig.RuntimeCELCostBudget)
	}
	return errs.ToAggregate()
}
