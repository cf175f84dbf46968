// Package config carries the generated CustomResourceDefinitions inside the binary, so that a folder of manifests is judged by the
// same rules as objects in a cluster.
package config

import "embed"

// CRDs holds crd/*.yaml.
//
//go:embed crd/*.yaml
var CRDs embed.FS
