#!/usr/bin/env bash
# Installs what env/slurm-up.sh and the tests need from Debian's or Ubuntu's own packages; nothing where all is there.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

missing=()
need() { # need PACKAGE PROGRAM-OR-FILE
  case $2 in /*) compgen -G "$2" >/dev/null ;; *) command -v "$2" >/dev/null ;; esac || missing+=("$1")
}
need slurmctld slurmctld
need slurmd slurmd
need slurm-client sbatch
need munge munged
need slurmdbd slurmdbd
need slurm-wlm-mysql-plugin '/usr/lib/*/slurm*/accounting_storage_mysql.so'
need mariadb-server mariadbd
need shellcheck shellcheck
[ ${#missing[@]} -gt 0 ] || exit 0

fail() { echo "install-slurm: $*" >&2; exit 3; }
command -v apt-get >/dev/null || fail "missing ${missing[*]}, and there is no apt-get here; install them with this system's own tool"
[ "$(id -u)" = 0 ] || fail "missing ${missing[*]}; ask an administrator for: apt-get install -y --no-install-recommends ${missing[*]}"

echo "install-slurm: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get -qq update && apt-get -qq -y install --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null ||
  { tail -n 5 "$log" >&2; fail "apt-get could not install them; see the lines above"; }
