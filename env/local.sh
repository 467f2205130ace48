# This machine alone: everything under the repository, nothing asked of Slurm but the partition that slurm-up makes.
: "${SUITE_SCRATCH:=$PWD/.scratch}" "${SUITE_CACHE:=$PWD/.cache}" "${SUITE_OUTPUT:=$PWD/outputs}"
: "${SUITE_THROTTLE:=2}" "${SUITE_GPU:=cpu}" "${SUITE_MODULES:=}"
export SUITE_SCRATCH SUITE_CACHE SUITE_OUTPUT SUITE_THROTTLE SUITE_GPU SUITE_MODULES
