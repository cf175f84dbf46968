#!/usr/bin/env bash
# hack/generate.sh writes the generated files: deep copies and CRDs from
# api/v1alpha1, RBAC rules from the markers in controllers, and Go code from
# the protobuf contracts. With --check it writes nothing and fails if a file
# that it would write differs.
set -euo pipefail

cd "$(dirname "$0")/.."
controller_gen=$(hack/tool.sh controller-gen)/controller-gen
buf=$(hack/tool.sh buf)/buf
PATH=$(hack/tool.sh protoc):$PATH # the plugins that buf runs

generate() {
	local out=$1
	"$controller_gen" object crd paths=./api/v1alpha1/... \
		output:object:dir="$out/api/v1alpha1" output:crd:dir="$out/config/crd"
	"$controller_gen" rbac:roleName=db-controller paths=./controllers/... \
		output:rbac:dir="$out/config/rbac"
	(cd api && "$buf" generate --output "$out/api")
}

if [ "${1:-}" != --check ]; then
	generate "$PWD"
	exit
fi

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
generate "$tmp"
stale=0
while IFS= read -r file; do
	diff -u "$file" "$tmp/$file" || stale=1
done < <(cd "$tmp" && find . -type f | sort)
if [ $stale = 1 ]; then
	echo "generated files are stale: run 'make generate'" >&2
	exit 1
fi
