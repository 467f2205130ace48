# shellcheck shell=bash
# Sourced, by bash: env.sh of the Slurm that `make slurm-up` raised here, if nobody else can have written it. .slurm may be
# a link into /tmp, where after a restart anybody can make what is gone.
own_slurm=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.slurm/env.sh
if [ -n "$(find -L "$own_slurm" -maxdepth 0 \( -user "$(id -u)" -o -user 0 \) ! -perm /022 2>/dev/null)" ]; then
  # shellcheck source=/dev/null
  . "$own_slurm"
fi
