#!/usr/bin/env bash
# Runs all tests against real components, the product under the race detector, and ends with
# how many passed, failed and were skipped. Arguments go to go test; without
# any, all packages are tested.
set -euo pipefail

cd "$(dirname "$0")/.."
KUBEBUILDER_ASSETS=$(hack/kube-assets.sh)
export KUBEBUILDER_ASSETS DBC_REQUIRE_KUBE=1 DBC_REQUIRE_PROMETHEUS=1 CGO_ENABLED=1 # the race detector is written in C
# Temporary clusters are much faster in memory, where there is plenty of it: each makes some hundred files a database.
if [ -w /dev/shm ] && [ "$(df --output=avail -k /dev/shm | tail -1)" -gt 6000000 ]; then
	export DBC_POSTGRES_TMP=${DBC_POSTGRES_TMP:-/dev/shm}
fi
gotestsum=$(hack/tool.sh gotestsum)/gotestsum

# Two packages at a time: most of them run database servers of their own.
# shellcheck disable=SC2016 # gotestsum sets the variables
summary='echo "tests$ON: $((TESTS_TOTAL - TESTS_FAILED - TESTS_SKIPPED)) passed, $TESTS_FAILED failed, $TESTS_SKIPPED skipped"'
run() {
	"$gotestsum" --format pkgname-and-test-fails --hide-summary skipped --post-run-command "bash -c '$summary'" -- -p 2 -timeout 30m "$@"
}
export ON=""

if [ $# != 0 ]; then
	run -race "$@"
	exit
fi
# A stage that fails does not keep the others from running.
failed=0
# What the product is made of, under the race detector. Tests from outside run it as it is shipped: that takes half the time, and their limits are those of the product.
outside='/(cmd/db-controller|hack/.*|test/(bench|chart|e2e|monitoring|security))$'
# shellcheck disable=SC2046 # one argument per package
run -race $(go list ./... | grep -Ev "$outside") || failed=1
# They share what is compiled with kube-apiserver and the tools, which have no cgo.
export CGO_ENABLED=0
ON=" from outside" run ./test/chart ./test/chaos ./cmd/db-controller ./test/bench ./test/monitoring ./test/security ./hack/... || failed=1
# Processes on a control plane of their own, alone: they have timing of their own.
ON=" end to end" run ./test/e2e || failed=1

# The store speaks to PostgreSQL, so it is tested on every supported version
# that is installed; DBC_REQUIRE_POSTGRES makes a missing one an error.
for version in 16 17 18; do
	if [ -d "$(hack/cache-dir.sh)/postgres/$version" ] || [[ " ${DBC_REQUIRE_POSTGRES:-} " == *" $version "* ]]; then
		ON=" of the store on PostgreSQL $version" DBC_TEST_POSTGRES_VERSION=$version run ./store/... || failed=1
	fi
done
exit $failed
