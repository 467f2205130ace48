#!/usr/bin/env bash
# slurm-down.sh [--dir DIR]: stops the Slurm that env/slurm-up.sh started there, and every process of its jobs.
# Its queue and its accounting stay in DIR: jobs that were running go back into the queue and start at the next
# slurm-up. One raised with --test loses both.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=$repo/.slurm
if [ "${1:-}" = --dir ]; then dir=${2:?--dir needs a folder}; fi
if [ ! -f "$dir/etc/slurm.conf" ]; then
  echo "slurm-down: nothing to stop in $dir"
  exit 0
fi
dir=$(readlink -f "$dir")
export SLURM_CONF=$dir/etc/slurm.conf

# A daemon is known by its name and by a file it holds open in DIR, not by a pid file: those outlive their process, and
# numbers come round again. A zombie holds nothing open, so it counts as gone even where nobody reaps it.
daemons() { # daemons NAME...: their pids
  local proc name
  for proc in /proc/[0-9]*; do
    read -r name 2>/dev/null <"$proc/comm" || continue
    case " $* " in *" $name "*) ;; *) continue ;; esac
    find "$proc/fd" -lname "$dir/*" -print -quit 2>/dev/null | grep -q . && echo "${proc#/proc/}"
  done
}

job_processes() { # what jobs left running: their environment names this configuration and a job
  grep -slzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | while IFS=/ read -r _ _ pid _; do
    grep -qsz '^SLURM_JOB_ID=' "/proc/$pid/environ" && [ "$pid" != $$ ] && echo "$pid"
  done
}

stop() { # stop SECONDS NAME: TERM, and KILL where that is not heeded
  local pids end=$((SECONDS + $1)) signal=TERM
  mapfile -t pids < <(daemons "$2")
  while [ ${#pids[@]} -gt 0 ]; do
    [ $SECONDS -lt $end ] || signal=KILL
    [ "$signal" = sent ] || kill -s "$signal" "${pids[@]}" 2>/dev/null
    [ "$signal" = KILL ] || signal=sent
    sleep 0.05
    mapfile -t pids < <(daemons "$2")
  done
}

end_jobs() {
  local jobs id partition
  # nothing may start in the freed places; slurm-up opens the partitions again
  for partition in main high; do timeout 10 scontrol update partitionname=$partition state=down 2>/dev/null; done
  if [ -f "$dir/test" ]; then
    timeout 10 scancel --state=PENDING --user="$(id -un)" 2>/dev/null
    mapfile -t jobs < <(timeout 10 squeue -h -o %A 2>/dev/null | sort -u)
    [ ${#jobs[@]} -eq 0 ] || timeout 10 scancel --signal=KILL --full "${jobs[@]}" 2>/dev/null
  else
    mapfile -t jobs < <(timeout 10 squeue -h -t RUNNING -o %i 2>/dev/null)
    for id in "${jobs[@]}"; do timeout 10 scontrol requeue "$id" 2>/dev/null; done
    [ ${#jobs[@]} -eq 0 ] || echo "slurm-down: ${#jobs[@]} running jobs go back into the queue"
  fi
  for ((i = 0; i < 200; i++)); do # KillWait and a little
    [ -n "$(timeout 10 squeue -h -t RUNNING,COMPLETING 2>/dev/null)" ] || break
    sleep 0.2
  done
}

[ -z "$(daemons slurmctld)" ] || end_jobs
rm -f "$dir/env.sh" # it would point shells at a Slurm that does not answer
stop 10 slurmd
stop 10 slurmctld
stop 15 slurmdbd
stop 60 mariadbd
stop 5 munged
for ((i = 0; i < 100; i++)); do
  mapfile -t left < <(daemons slurmstepd; job_processes)
  if [ ${#left[@]} -eq 0 ]; then
    echo "slurm-down: stopped"
    exit 0
  fi
  kill -9 "${left[@]}" 2>/dev/null
  sleep 0.1
done
echo "slurm-down: these processes do not end: ${left[*]}" >&2
exit 1
