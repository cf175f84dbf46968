#!/usr/bin/env bash
# Builds etcd, kube-apiserver and kubectl from hack/kubeapi into the cache, unless they
# are there, and prints the folder (for KUBEBUILDER_ASSETS). The first build
# takes 5 to 12 minutes of two cores and about 4 GB of Go's build cache.
set -euo pipefail

hack=$(cd "$(dirname "$0")" && pwd)
cache=$("$hack/cache-dir.sh")
cd "$hack/kubeapi"

# The key covers all that the binaries depend on: modules, flags and compiler.
key=$({ cat go.mod go.sum "$hack/kube-assets.sh"; go env GOVERSION GOOS GOARCH; } | sha256sum | cut -c1-16)
out=$cache/kube/$key

if [ ! -x "$out/kubectl" ]; then
	mkdir -p "$cache/kube"
	exec 9>"$cache/kube/lock"
	flock 9 # two makes at once must not both pay for the build
	if [ ! -x "$out/kubectl" ]; then
		version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
		minor=${version#v1.} minor=${minor%%.*}
		v=k8s.io/component-base/version
		tmp=$cache/kube/.$key.tmp
		rm -rf "$tmp" && mkdir "$tmp"
		echo "building etcd, kube-apiserver and kubectl $version, once; this takes some minutes" >&2
		export CGO_ENABLED=0 GOFLAGS=-mod=readonly GOGC=400 # memory for time
		nice -n 10 go build -ldflags '-s -w' -o "$tmp/etcd" go.etcd.io/etcd/server/v3 >&2
		# Without the version the server calls itself v0.0.0-master.
		nice -n 10 go build -ldflags "-s -w -X $v.gitVersion=$version -X $v.gitMajor=1 -X $v.gitMinor=$minor" \
			-o "$tmp/kube-apiserver" k8s.io/kubernetes/cmd/kube-apiserver >&2
		nice -n 10 go build -ldflags "-s -w -X $v.gitVersion=$version -X $v.gitMajor=1 -X $v.gitMinor=$minor" \
			-o "$tmp/kubectl" k8s.io/kubernetes/cmd/kubectl >&2
		rm -rf "$out" && mv "$tmp" "$out"
	fi
	exec 9>&-
fi
echo "$out"
