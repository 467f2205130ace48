# shellcheck shell=bash
# Sourced, by bash. One rented machine with B200s, each task one GPU: as many tasks at once as there are GPUs.
gpu_files=$(compgen -G '/dev/nvidia[0-9]*' | wc -l || true)
: "${SUITE_SITE:=b200}" "${SUITE_GPU:=b200}" "${SUITE_THROTTLE:=$((gpu_files > 0 ? gpu_files : 1))}"
# shellcheck source=env/local.sh
. "$(dirname "${BASH_SOURCE[0]}")/local.sh"
