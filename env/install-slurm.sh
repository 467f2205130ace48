#!/usr/bin/env bash
# Installs what env/slurm-up.sh needs (--tests: and the tests) from Debian's or Ubuntu's own packages; nothing where all is there.
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
if [ "${1:-}" = --tests ]; then # what the tests look at shell scripts and report pages with
  need shellcheck shellcheck
  command -v chromium-browser google-chrome google-chrome-stable >/dev/null || need chromium chromium
  need fonts-dejavu-core /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf
fi
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
