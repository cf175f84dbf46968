#!/usr/bin/env bash
# Prints the folder that keeps what this repository installs or builds for
# itself (PostgreSQL 16 to 18, kube-apiserver, tools). DBC_CACHE overrides it.
# internal/pgserver follows the same rule.
set -euo pipefail

if [ -n "${DBC_CACHE:-}" ]; then
	echo "$DBC_CACHE"
elif [ "$(id -u)" = 0 ]; then
	# PostgreSQL refuses to run as root, and the user it runs as cannot
	# look into root's home.
	echo /var/cache/db-controller
else
	echo "${XDG_CACHE_HOME:-$HOME/.cache}/db-controller"
fi
