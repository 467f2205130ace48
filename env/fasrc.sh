# shellcheck shell=bash
# Sourced, by bash. FASRC's Cannon and the Kempner cluster. A value that is already set wins.
#   FASRC_LAB      the lab's group, if it is not your primary group: names the lab's folder on netscratch
#   FASRC_ACCOUNT  the account to charge; Kempner's partitions demand one (kempner_<lab>)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${SUITE_SITE:=fasrc}" "${FASRC_LAB:=$(id -gn)}" "${FASRC_ACCOUNT:=}"
# netscratch: 50 TB a lab, no backup, and what was not modified for 90 days is purged
: "${SUITE_SCRATCH:=/n/netscratch/$FASRC_LAB/Lab/${USER:-$(id -un)}/hpc-job-suite}"
: "${SUITE_CACHE:=$SUITE_SCRATCH/cache}" # models can be fetched again
: "${SUITE_OUTPUT:=$root/outputs}"
: "${SUITE_THROTTLE:=16}" # GPUs at once a user: Kempner's cap on its base partitions, a courtesy on the requeue ones
: "${SUITE_GPU:=h200}" "${SUITE_MODULES=python/3.12.8-fasrc01}" "${SUITE_SLURM:=yes}"
case $FASRC_LAB in kempner_*) : "${FASRC_ACCOUNT:=$FASRC_LAB}" ;; esac
case $FASRC_ACCOUNT in
  kempner_*) : "${SBATCH_PARTITION:=kempner_requeue}" ;;
  *) : "${SBATCH_PARTITION:=gpu_requeue}" ;;
esac
: "${SBATCH_CONSTRAINT:=$SUITE_GPU}" "${SBATCH_ACCOUNT:=$FASRC_ACCOUNT}"
[ -n "$SBATCH_ACCOUNT" ] || unset SBATCH_ACCOUNT
export SUITE_SITE SUITE_SCRATCH SUITE_CACHE SUITE_OUTPUT SUITE_THROTTLE SUITE_GPU SUITE_MODULES SUITE_SLURM
export SBATCH_PARTITION SBATCH_CONSTRAINT ${SBATCH_ACCOUNT+SBATCH_ACCOUNT}
