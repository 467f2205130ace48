# shellcheck shell=bash
# Sourced, by bash. One machine: everything lies under the repository. A value that is already set wins.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${SUITE_SITE:=local}" "${SUITE_SCRATCH:=$root/.scratch}" "${SUITE_CACHE:=$root/.cache}" "${SUITE_OUTPUT:=$root/outputs}"
: "${SUITE_GPU:=cpu}" "${SUITE_MODULES:=}"
# Slurm means the one that env/slurm-up.sh raised or that /etc configures. Programs of a Slurm that does not run may
# well be there; submission then goes through submitit's local executor.
if [ -z "${SLURM_CONF:-}" ]; then
  # shellcheck source=env/own-slurm.sh
  . "$root/env/own-slurm.sh"
  if [ -n "${SLURM_CONF:-}" ]; then :; elif [ ! -e /etc/slurm/slurm.conf ]; then : "${SUITE_SLURM:=no}"; fi
fi
: "${SUITE_THROTTLE:=2}" "${SUITE_SLURM:=yes}"
export SUITE_SITE SUITE_SCRATCH SUITE_CACHE SUITE_OUTPUT SUITE_THROTTLE SUITE_GPU SUITE_MODULES SUITE_SLURM
