#!/usr/bin/env bash
# hack/vuln.sh [PACKAGES] looks for known vulnerabilities that the code really reaches
# (govulncheck). It asks the Go vulnerability database, https://vuln.go.dev or
# $GOVULNDB, and fails where that cannot be reached: not having looked is no
# clean result.
set -euo pipefail

cd "$(dirname "$0")/.."
tool=$(hack/tool.sh govulncheck)/govulncheck
db=${GOVULNDB:-https://vuln.go.dev}
out=$(mktemp)
trap 'rm -f "$out"' EXIT

code=0
"$tool" -db "$db" "${@:-./...}" >"$out" 2>&1 || code=$?
cat "$out"
case $code in
0) ;;
3)
	echo "vuln: the code reaches known vulnerabilities, listed above: raise those modules" >&2
	exit 1
	;;
*)
	if grep -qE 'fetching vulnerabilities|vuln\.go\.dev|dial tcp|lookup .*: ' "$out"; then
		echo "vuln: nothing was checked: the vulnerability database ($db) cannot be reached." >&2
		echo "vuln: run this where it can be, or set GOVULNDB to a mirror (file:///... works too)." >&2
	else
		echo "vuln: nothing was checked: govulncheck failed with code $code" >&2
	fi
	exit 1
	;;
esac
