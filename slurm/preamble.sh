# shellcheck shell=bash source-path=SCRIPTDIR/..
# Sourced by every slurm/*.sbatch: goes to the repository, loads the site, and defines run_job.
# Slurm copies the batch script to a spool folder, so everything is found from the folder that sbatch was called in.
set -euo pipefail
# Slurm's warning (USR1) and TERM may come at any moment. The default of both is to end this shell, and a task that a
# warning ends is not requeued; so they are noted first of all, and handed on once there is a job to hand them to.
warned='' pid='' woken=''
trap 'warned=1 woken=1; [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null || true' USR1
trap 'woken=1; [ -n "$pid" ] || exit 143; kill -TERM "$pid" 2>/dev/null || true' TERM
cd "${SLURM_SUBMIT_DIR:-$PWD}"
. env/site.sh
for module in ${SUITE_MODULES:-}; do module load "$module"; done
python="$PWD/.venv/bin/python"
[ -x "$python" ] || { echo "error: no .venv here; run \`make setup\` on a login node first" >&2; exit 2; }
# Triton runs what lies in its cache: nobody else may write there, whatever the umask
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$SUITE_CACHE/triton-$(id -u)}"
[ -e "$TRITON_CACHE_DIR" ] || { mkdir -p "${TRITON_CACHE_DIR%/*}" && mkdir -m 700 "$TRITON_CACHE_DIR"; } 2>/dev/null || true
if [ -L "$TRITON_CACHE_DIR" ] || [ ! -O "$TRITON_CACHE_DIR" ] || [ -n "$(find "$TRITON_CACHE_DIR" -maxdepth 0 -perm /022)" ]; then
  echo "error: $TRITON_CACHE_DIR is not a folder of yours that nobody else can write to, and what lies there is executed; remove it, or set TRITON_CACHE_DIR" >&2
  exit 2
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_GPU:-1}}" TOKENIZERS_PARALLELISM=true
this="${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-local}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"

[ ! -f "slurm/logs/${SLURM_JOB_NAME:-}-$this.out" ] || export SUITE_LOG="$PWD/slurm/logs/$SLURM_JOB_NAME-$this.out"

# Stopped by the warning with work left: requeue this task alone. The array's own id would requeue every task of it.
again() {
  [ -n "${SLURM_JOB_ID:-}" ] || exit 75  # without Slurm the local worker runs it again
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${SUITE_MAX_REQUEUES:-50}" ]; then
    echo "error: stopped for the ${SLURM_RESTART_COUNT}th time with work left; ask for a longer --time, then \`make resume\`" >&2
    exit 75
  fi
  echo "requeue $this"
  timeout 60 scontrol requeue "$this" || { echo "error: could not requeue $this; \`make resume\` submits what is missing" >&2; exit 75; }
  sleep 60 & wait $!  # the requeue ends this script
  exit 75
}

# run_job NAME ARGS...: python -m jobs.NAME in the background, so that bash hears the warning signal at once (in the
# foreground its trap would run only after the job), handed on to Python. Exit code 75 = stopped by it with work left.
# SUITE_WATCH: whose end is the job's end too, this shell's and, under Slurm, that of the daemon that watches over it.
run_job() {
  local rc=0 status
  [ -z "$warned" ] || { echo "SIGUSR1 came before the job"; again; }
  echo "job $this restart ${SLURM_RESTART_COUNT:-0} site $SUITE_SITE node ${SLURMD_NODENAME:-$(uname -n)} gpus ${CUDA_VISIBLE_DEVICES:-none}: $*"
  SUITE_WATCH="$$${SLURM_JOB_ID:+ $PPID}" "$python" -m "jobs.$1" "${@:2}" &
  pid=$!
  [ -z "$warned" ] || kill -USR1 "$pid" 2>/dev/null || true  # it came since it was last looked for
  # wait comes back early, with 128 + n, each time a trap runs; 127 = its status was already taken
  while :; do
    woken='' status=0
    wait "$pid" || status=$?
    [ "$status" -eq 127 ] || rc=$status
    [ -n "$woken" ] || break
  done
  [ "$rc" -ne 138 ] || rc=75  # ended by USR1: the warning came before the job could hear it
  [ "$rc" -eq 75 ] || exit "$rc"
  again
}
