#!/usr/bin/env bash
# hack/generate.sh writes the generated files: deep copies and CRDs from
# api/v1alpha1, RBAC rules from the markers in controllers, Go code from the
# protobuf contracts, and what the charts and kustomize bases have of all that
# (hack/chart.sh). With --check it writes nothing and fails if a file that it
# would write differs.
set -euo pipefail

cd "$(dirname "$0")/.."
controller_gen=$(hack/tool.sh controller-gen)/controller-gen
buf=$(hack/tool.sh buf)/buf
crd_ref_docs=$(hack/tool.sh crd-ref-docs)/crd-ref-docs
PATH=$(hack/tool.sh protoc):$PATH # the plugins that buf runs

generate() {
	local out=$1
	"$controller_gen" object crd paths=./api/v1alpha1/... \
		output:object:dir="$out/api/v1alpha1" output:crd:dir="$out/config/crd"
	"$controller_gen" rbac:roleName=db-controller paths=./controllers/... \
		output:rbac:dir="$out/config/rbac"
	(cd api && "$buf" generate --output "$out/api")
	hack/chart.sh generate "$out"
	mkdir -p "$out/docs/reference"
	"$crd_ref_docs" --log-level ERROR --source-path=api/v1alpha1 --config=hack/tools/crd-ref-docs/config.yaml --renderer=markdown \
		--output-path="$out/docs/reference/api.md"
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
