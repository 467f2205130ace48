# shellcheck shell=bash source-path=SCRIPTDIR/..
# Sourced by every slurm/*.sbatch: goes to the repository, loads the site, and defines run_job and run_experiment.
# Slurm copies the batch script to a spool folder, so everything is found from the folder that sbatch was called in.
set -euo pipefail
# Slurm's warning (USR1) and TERM may come at any moment. The default of both is to end this shell, and a task that a
# warning ends is not requeued; so they are noted first of all, and handed on once there is a job to hand them to.
warned='' ended='' pid='' woken=''
trap 'warned=1 woken=1; [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null || true' USR1
trap 'ended=1 woken=1; [ -n "$pid" ] || exit 143; kill -TERM "$pid" 2>/dev/null || true' TERM
cd "${SLURM_SUBMIT_DIR:-$PWD}"
. env/site.sh
. env/modules.sh
python="$PWD/.venv/bin/python"
most=${SUITE_MAX_REQUEUES:-50}
[[ $most =~ ^[0-9]{1,6}$ ]] || { echo "error: SUITE_MAX_REQUEUES=$most is no number from 0 to 999999; export one, or unset it" >&2; exit 2; }
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

# The log is where this shell writes, whatever it is called; none where that is no file.
unset SUITE_LOG
log=$(readlink "/proc/$$/fd/1" || true)
[ ! -f "$log" ] || export SUITE_LOG="$log"
anew='submit it again' # what helps where this task is not requeued

say() { echo "$*" || true; } # a log on a full disk is no reason to end

# Stopped by the warning with work left: requeue this task alone. The array's own id would requeue every task of it.
again() {
  local times=${SLURM_RESTART_COUNT:-0}
  [ -n "${SLURM_JOB_ID:-}" ] || exit 75  # without Slurm the local worker runs it again
  # SLURM_RESTART_COUNT holds preemptions and node failures too; the log, which is appended to, our own requeues
  [ -z "${SUITE_LOG:-}" ] || times=$(grep -cFx "requeue $this" "$SUITE_LOG" || true)
  if [ "$times" -ge "$most" ]; then
    echo "error: stopped with work left, and requeued $times times already (SUITE_MAX_REQUEUES=$most); ask for a longer --time, then $anew" >&2
    exit 75
  fi
  say "requeue $this"
  if ! timeout 60 scontrol requeue "$this"; then
    [ -n "$ended" ] || { sleep 2 & wait $!; }  # the requeue ends scontrol too, and this script hears of it no later
    [ -n "$ended" ] || { echo "error: could not requeue $this; $anew" >&2; exit 75; }
  fi
  sleep 60 & wait $!  # the requeue ends this script
  exit 75
}

# A bare sbatch reads no env/<site>.sh: say what this task has where the site asks for something else.
compare_with_site() {
  local asks='' has='' gpu=''
  differ() { # differ WHAT ASKED HAS: nothing is asked, or one of a list
    case ,$2, in ,, | *,"$3",*) ;; *) asks+=", $1 $2" has+=", $1 ${3:-none}" ;; esac
  }
  if [ -z "${SLURM_JOB_GPUS:-}" ]; then
    differ partition "${SUITE_CPU_PARTITION:-}" "${SLURM_JOB_PARTITION:-}"
  else
    differ partition "${SBATCH_PARTITION:-}" "${SLURM_JOB_PARTITION:-}"
    differ account "${SBATCH_ACCOUNT:-}" "${SLURM_JOB_ACCOUNT:-}"
    [ "${SUITE_GPU:-cpu}" = cpu ] ||
      gpu=$(timeout 20 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || true
    case " ${gpu,,} " in '  ' | *[\ -]"${SUITE_GPU,,}"[\ -]*) ;; *) differ GPU "$SUITE_GPU" "$gpu" ;; esac
  fi
  [ -z "$asks" ] || say "note: site $SUITE_SITE asks for ${asks#, }; this task has ${has#, }; (. env/site.sh && sbatch ...) asks as the site does"
}

quoted() { # a word as a shell and the overrides' reader both take it
  case $1 in '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "${1//\'/\'\"\'\"\'}" ;; *) printf %s "$1" ;; esac
}

# run_experiment NAME CONFIG ARGS...: the job on the configuration that ARGS begin with, else on CONFIG.
run_experiment() {
  local name=$1 config=$2 word overrides=''
  shift 2
  case ${1:-} in *.yaml) config=$1; shift ;; esac
  for word in "$@"; do
    case $word in --set=*) overrides+=" ${word#--set=}" ;; -*) ;; *) overrides+=" $(quoted "$word")" ;; esac
  done
  anew="CONFIG=$(quoted "$config")${overrides:+ SET=$(quoted "${overrides# }")}"
  case $name in fetch) anew="\`make fetch $anew JOB=1\`" ;; *) anew="\`make resume $anew\`" ;; esac
  run_job "$name" --config "$config" "$@"
}

# run_job NAME ARGS...: python -m jobs.NAME in the background, so that bash hears the warning signal at once (in the
# foreground its trap would run only after the job), handed on to Python. Exit code 75 = stopped by it with work left.
# SUITE_WATCH: whose end is the job's end too, this shell's and, under Slurm, that of the daemon that watches over it.
run_job() {
  local rc=0 status
  [ -x "$python" ] || { echo "error: no .venv here; \`make setup\` on a login node, or \`make fetch JOB=1\`, makes it" >&2; exit 2; }
  [ -z "$warned" ] || { say "SIGUSR1 came before the job"; again; }
  say "job $this restart ${SLURM_RESTART_COUNT:-0} site $SUITE_SITE node ${SLURMD_NODENAME:-$(uname -n)} gpus ${CUDA_VISIBLE_DEVICES:-none}: $*"
  [ -z "${SLURM_JOB_ID:-}" ] || compare_with_site
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
