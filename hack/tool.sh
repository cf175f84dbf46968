#!/usr/bin/env bash
# hack/tool.sh NAME builds the development tools of the module hack/tools/NAME
# into the cache, unless they are there, and prints their folder. Each heavy tool is a module of
# its own, so that their dependencies meet neither each other nor the product's.
set -euo pipefail

hack=$(cd "$(dirname "$0")" && pwd)
cache=$("$hack/cache-dir.sh")
cd "$hack/tools/$1"

key=$({ cat go.mod go.sum; go env GOVERSION GOOS GOARCH; } | sha256sum | cut -c1-16)
out=$cache/bin/$1-$key
if [ ! -d "$out" ]; then
	mkdir -p "$cache/bin"
	tmp=$(mktemp -d "$cache/bin/.$1.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	echo "building $1, once" >&2
	GOGC=400 CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -ldflags '-s -w' -o "$tmp/" tool >&2
	chmod 755 "$tmp"
	mv -T "$tmp" "$out" 2>/dev/null || [ -d "$out" ] # another make may have been faster
fi
echo "$out"
