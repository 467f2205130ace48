#!/usr/bin/env bash
# Submits a batch file as a job without a GPU: cpu-job.sh FILE ARGS...
# What the site and the user have in SBATCH_* variables is meant for tasks with GPUs and would win over the file's lines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. env/site.sh
if [ "${SUITE_SLURM:-yes}" = no ]; then
  echo "error: site $SUITE_SITE has no Slurm: without JOB=1 it is done here" >&2
  exit 2
fi
unset SBATCH_PARTITION SBATCH_ACCOUNT SBATCH_QOS SBATCH_CONSTRAINT SBATCH_TIMELIMIT "${!SBATCH_GPU@}" \
  "${!SBATCH_GRES@}" SBATCH_CPUS_PER_GPU SBATCH_MEM_PER_GPU SBATCH_ARRAY_INX
job=$(sbatch --parsable ${SUITE_CPU_PARTITION:+--partition="$SUITE_CPU_PARTITION"} "$@") || exit 2
name=$(basename "$1" .sbatch)
echo "Slurm job ${job%%;*}: $name${SUITE_CPU_PARTITION:+ on $SUITE_CPU_PARTITION}"
echo "next: tail -F slurm/logs/$name-${job%%;*}_0.out"
