# shellcheck shell=bash
# Sourced, by bash. FASRC's Cannon and the Kempner cluster. A value that is already set wins.
#   FASRC_LAB      the lab's folder on netscratch; by default the first that is there of your primary group,
#                  kempner_<primary group> and your other groups
#   FASRC_ACCOUNT  the account to charge; Kempner's partitions demand one (kempner_<lab>)
#   FASRC_SCRATCH  the file system with the labs' folders
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${SUITE_SITE:=fasrc}" "${FASRC_SCRATCH:=/n/netscratch}" "${FASRC_ACCOUNT:=}"
if [ -z "${SUITE_SCRATCH:-}" ]; then # look for the lab's folder before anything is written, and say which it is
  lab=${FASRC_LAB:-$(id -gn)} chosen=''
  read -ra groups <<<"$([ -n "${FASRC_LAB:-}" ] || id -Gn)"
  for group in "$lab" "kempner_${lab#kempner_}" "${groups[@]}"; do
    [ -n "$chosen" ] || [ ! -d "$FASRC_SCRATCH/$group/Lab" ] || chosen=$group
  done
  if [ -z "$chosen" ]; then
    SUITE_SITE_NOTE="no folder for $lab${groups[0]:+ or another group of yours} in $FASRC_SCRATCH; export FASRC_LAB=<the lab's folder there>"
  elif [ "$chosen" != "$lab" ]; then
    SUITE_SITE_NOTE="$FASRC_SCRATCH/$chosen/Lab is taken, as there is no $FASRC_SCRATCH/$lab/Lab; export FASRC_LAB=<folder> for another"
  fi
  [ -z "${SUITE_SITE_NOTE:-}" ] || echo "site fasrc: $SUITE_SITE_NOTE" >&2
  FASRC_LAB=${chosen:-$lab}
fi
: "${FASRC_LAB:=$(id -gn)}"
# netscratch: 50 TB a lab, no backup, and what was not modified for 90 days is purged
: "${SUITE_SCRATCH:=$FASRC_SCRATCH/$FASRC_LAB/Lab/${USER:-$(id -un)}/hpc-job-suite}"
: "${SUITE_CACHE:=$SUITE_SCRATCH/cache}" # models can be fetched again
: "${SUITE_OUTPUT:=$root/outputs}"
: "${SUITE_THROTTLE:=16}" # GPUs at once a user: Kempner's cap on its base partitions, a courtesy on the requeue ones
: "${SUITE_GPU:=h200}" "${SUITE_MODULES=python/3.12.8-fasrc01}" "${SUITE_SLURM:=yes}"
: "${SUITE_CPU_PARTITION:=shared}" # for tasks without a GPU: 3 days at most
case $FASRC_LAB in kempner_*) : "${FASRC_ACCOUNT:=$FASRC_LAB}" ;; esac
case $FASRC_ACCOUNT in
  kempner_*) : "${SBATCH_PARTITION:=kempner_requeue}" ;;
  *) : "${SBATCH_PARTITION:=gpu_requeue}" ;;
esac
: "${SBATCH_CONSTRAINT:=$SUITE_GPU}" "${SBATCH_ACCOUNT:=$FASRC_ACCOUNT}"
[ -n "$SBATCH_ACCOUNT" ] || unset SBATCH_ACCOUNT
export SUITE_SITE SUITE_SCRATCH SUITE_CACHE SUITE_OUTPUT SUITE_THROTTLE SUITE_GPU SUITE_MODULES SUITE_SLURM FASRC_LAB
export SUITE_CPU_PARTITION SBATCH_PARTITION SBATCH_CONSTRAINT ${SBATCH_ACCOUNT+SBATCH_ACCOUNT} SUITE_SITE_NOTE
