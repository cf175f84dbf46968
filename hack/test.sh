#!/usr/bin/env bash
# Runs all tests under the race detector against real components and ends with
# how many passed, failed and were skipped. Arguments go to go test; without
# any, all packages are tested.
set -euo pipefail

cd "$(dirname "$0")/.."
KUBEBUILDER_ASSETS=$(hack/kube-assets.sh)
export KUBEBUILDER_ASSETS CGO_ENABLED=1 # the race detector is written in C
gotestsum=$(hack/tool.sh gotestsum)/gotestsum

if [ $# = 0 ]; then set -- ./...; fi
# Two packages at a time: most of them run database servers of their own.
# shellcheck disable=SC2016 # gotestsum sets the variables
summary='echo "tests: $((TESTS_TOTAL - TESTS_FAILED - TESTS_SKIPPED)) passed, $TESTS_FAILED failed, $TESTS_SKIPPED skipped"'
"$gotestsum" --format pkgname-and-test-fails --hide-summary skipped --post-run-command "bash -c '$summary'" \
	-- -race -p 2 -timeout 30m "$@"
