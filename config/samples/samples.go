// Package samples carries sample manifests inside the binary: the demo declares its service with them.
package samples

import _ "embed"

// Packages is the ServiceDescriptor of a Debian package index.
//
//go:embed packages.yaml
var Packages []byte
