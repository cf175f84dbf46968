#!/usr/bin/env bash
# hack/reproducible.sh builds the binary twice, from copies of the tree in two
# folders and with two build caches, the second empty, and fails if a byte of the
# binaries or of their bills of materials differs. It prints their checksum.
#
#   VERSION=v1.2.3 hack/reproducible.sh    # the checksum that the release of v1.2.3 should have
set -euo pipefail

cd "$(dirname "$0")/.."
version=${VERSION:-dev}
tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT

build() { # FOLDER CACHE
	mkdir -p "$1"
	git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' f; do
		[ ! -e "$f" ] || printf '%s\0' "$f" # a file that is deleted and not committed yet
	done | tar --null --files-from=- -cf - | tar -xf - -C "$1"
	(cd "$1" && GOCACHE=$2 CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$version" -o out/db-controller ./cmd/db-controller &&
		GOCACHE=$2 go run ./hack/sbom out/db-controller >out/db-controller.cdx.json)
}

build "$tmp/first" "$(go env GOCACHE)"
build "$tmp/a/second/one" "$tmp/cache"
for f in db-controller db-controller.cdx.json; do
	cmp "$tmp/first/out/$f" "$tmp/a/second/one/out/$f" || {
		echo "reproducible: two builds of $f differ" >&2
		exit 1
	}
done
(cd "$tmp/first/out" && sha256sum db-controller db-controller.cdx.json)
