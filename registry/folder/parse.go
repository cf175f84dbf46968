package folder

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/registry"
)

const (
	kindDeployment = "Deployment"
	kindService    = "ServiceDescriptor"
	kindSecret     = "Secret"

	defaultNamespace = "default"
)

// id is what makes two documents the same object.
type id struct{ kind, namespace, name string }

// object is the content of a good document.
type object struct {
	id
	file     string
	document int            // from 1
	content  map[string]any // with defaults; what the next state is compared with; nil for a Secret
	typed    any            // *v1alpha1.Deployment, *v1alpha1.ServiceDescriptor or *corev1.Secret
}

func (o object) ref() registry.ObjectRef {
	return registry.ObjectRef{Kind: o.kind, Namespace: o.namespace, Name: o.name}
}

func (o object) origin() string { return origin(o.file, o.document) }

func (o object) compare(p object) int {
	return cmp.Or(cmp.Compare(o.file, p.file), cmp.Compare(o.document, p.document))
}

func origin(file string, document int) string { return fmt.Sprintf("%s, document %d", file, document) }

// parse judges the documents of a file. It returns the good ones, the identities of the bad ones as far as they can be read, and
// what is wrong with those.
func parse(s schemas, name string, content []byte, known map[id]object) (good []object, bad []id, problems []registry.Problem) {
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(content)))
	for n := 1; ; n++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return good, bad, problems
		}
		var o object
		if err == nil {
			o, err = parseDocument(s, document, known)
		}
		switch {
		case err != nil:
			problems = append(problems, registry.Problem{Object: o.ref(), Reason: registry.InvalidManifest, Origin: origin(name, n), Message: err.Error()})
			bad = append(bad, o.id)
		case o.typed != nil:
			o.file, o.document = name, n
			good = append(good, o)
		}
	}
}

// parseDocument returns the zero object for a document without content. With an error, the object has what is known of its identity.
func parseDocument(s schemas, document []byte, known map[id]object) (object, error) {
	text, err := yaml.YAMLToJSONStrict(document)
	if err != nil {
		return object{}, withoutSecrets(document, err)
	}
	if string(text) == "null" {
		return object{}, nil
	}
	var content map[string]any
	if err := utilyaml.Unmarshal(text, &content); err != nil { // integers stay integers
		return object{}, errors.New("the document is not an object with apiVersion, kind, metadata and spec")
	}
	var head struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return object{}, fmt.Errorf("apiVersion, kind, metadata: %w", err)
	}
	o := object{id: id{head.Kind, cmp.Or(head.Metadata.Namespace, defaultNamespace), head.Metadata.Name}}
	var errs field.ErrorList
	for _, problem := range validation.NameIsDNSSubdomain(o.name, false) {
		errs = append(errs, field.Invalid(field.NewPath("metadata", "name"), o.name, problem))
	}
	for _, problem := range validation.ValidateNamespaceName(o.namespace, false) {
		errs = append(errs, field.Invalid(field.NewPath("metadata", "namespace"), o.namespace, problem))
	}
	if len(errs) > 0 {
		return o, errs.ToAggregate()
	}

	switch [2]string{head.APIVersion, head.Kind} {
	case [2]string{v1alpha1.GroupVersion.String(), kindDeployment}:
		o.typed = &v1alpha1.Deployment{}
	case [2]string{v1alpha1.GroupVersion.String(), kindService}:
		o.typed = &v1alpha1.ServiceDescriptor{}
	case [2]string{"v1", kindSecret}:
		secret, err := parseSecret(document)
		o.typed = secret
		return o, err
	default:
		return object{}, fmt.Errorf("kind: %s of apiVersion %q is not known here; it must be Deployment or ServiceDescriptor of %s, or Secret of v1",
			head.Kind, head.APIVersion, v1alpha1.GroupVersion)
	}

	delete(content, "status") // as an API server does: status is not the author's to say
	content["metadata"].(map[string]any)["namespace"] = o.namespace
	o.content = content
	if err := s[o.kind].admit(content, known[o.id].content); err != nil {
		return o, err
	}
	admitted, err := json.Marshal(content)
	if err != nil {
		return o, err
	}
	return o, json.Unmarshal(admitted, o.typed)
}

// parseSecret merges stringData into data, as an API server does.
func parseSecret(document []byte) (*corev1.Secret, error) {
	var secret corev1.Secret
	if err := yaml.UnmarshalStrict(document, &secret); err != nil {
		return nil, withoutSecrets(document, err)
	}
	if secret.Data == nil {
		secret.Data = map[string][]byte{}
	}
	for key, value := range secret.StringData {
		secret.Data[key] = []byte(value)
	}
	secret.StringData = nil
	secret.Data = maps.Clone(secret.Data)
	return &secret, nil
}

var (
	declaresSecret = regexp.MustCompile(`(?m)^\s*["']?kind["']?\s*:\s*["']?Secret\b`)
	lineOfError    = regexp.MustCompile(`line \d+|unknown field "[^"]*"|illegal base64 data`)
)

// withoutSecrets keeps of an error about a Secret only what cannot quote its contents.
func withoutSecrets(document []byte, err error) error {
	if !declaresSecret.Match(document) {
		return err
	}
	return fmt.Errorf("the Secret cannot be read (%s); its contents are not shown here", cmp.Or(lineOfError.FindString(err.Error()), "malformed"))
}
