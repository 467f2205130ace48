#!/usr/bin/env bash
# Raises a real Slurm on this machine alone, with its own munge and accounting database, all under one folder.
# No service manager, no cgroups, nothing outside DIR; as root or as an ordinary user (then only that user's jobs run).
#
#   slurm-up.sh [--dir DIR] [--port P] [--nodes N] [--gpus G] [--cpus C] [--memory MB] [--no-accounting] [--test]
#
#   --dir DIR        default <repository>/.slurm. The queue and the accounting in it survive slurm-down and slurm-up
#   --nodes, --gpus, --cpus, --memory
#                    pretend to have these (each node's). Default: one node with what the machine has; without an
#                    NVIDIA GPU two pretended ones, which are only numbers in CUDA_VISIBLE_DEVICES
#   --port P         first of the N+2 ports used (default 17800)
#   --no-accounting  no database; sacct then does not work
#   --test           starts from nothing, loses its state when the power fails, kills and requeues after 5 s, not minutes
set -euo pipefail
umask 022 # what lies in DIR is run, by daemons and by shells
PATH=$PATH:/usr/sbin:/sbin
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
started=$(date +%s%N)
dir='' nodes=1 gpus='' cpus=$(nproc) memory='' port=17800 accounting=1 test='' named=()
while [ $# -gt 0 ]; do
  case $1 in
    --no-accounting) accounting='' ;;
    --test) test=1 ;;
    --dir | --port | --nodes | --gpus | --cpus | --memory)
      [ $# -ge 2 ] || { echo "slurm-up: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" %s "$2"
      shift ;;
    *) echo "slurm-up: unknown option $1; see the head of env/slurm-up.sh" >&2; exit 2 ;;
  esac
  shift
done

fail() { echo "slurm-up: $*" >&2; exit 1; }
wait_for() { # wait_for SECONDS COMMAND...: until it succeeds
  local end=$(($(date +%s) + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$(date +%s)" -lt $end ] || return 1
    sleep 0.05
  done
}

mine() { # mine DIR: a folder of ours, not a link to one, that nobody else can write to: env.sh in it is run by shells
  [ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ] && [ -z "$(find "$1" -maxdepth 0 -perm /022)" ]
}

choose_dir() { # socket paths end at 107 characters, of which Slurm's own names below DIR take up to 40
  if [ -z "$dir" ]; then
    dir=$repo/.slurm
    if [ ${#dir} -gt 60 ] || [[ $dir == *[^A-Za-z0-9._/-]* ]]; then
      # the link remembers the folder; whoever could guess its name could make it first
      dir=$(readlink "$repo/.slurm" || true)
      if ! mine "${dir:-/nowhere}"; then
        dir=$(mktemp -d /tmp/slurm-XXXXXXXX)
        ln -sfn "$dir" "$repo/.slurm"
      fi
      echo "slurm-up: $repo/.slurm is too long a path for sockets, or one that slurm.conf cannot hold; state lies in $dir"
    fi
  fi
  mkdir -p "$dir"
  dir=$(readlink -f "$dir")
  mine "$dir" || fail "$dir is not a folder of yours that nobody else can write to; chmod go-w it, or choose another --dir"
  [ ${#dir} -le 70 ] || fail "--dir $dir is too long a path for sockets; choose one of at most 70 characters"
  [ -z "$(ls -A "$dir")" ] || [ -f "$dir/slurm-up.lock" ] || fail "$dir holds something else; choose an empty --dir"
}

choose_hardware() { # sets gpus, gpu_files, memory, site
  local real=()
  mapfile -t real < <(nvidia-smi -L 2>/dev/null | grep '^GPU ' || true)
  site=local gpu_files=()
  if [ ${#real[@]} -gt 0 ] && [ "${gpus:-${#real[@]}}" -le ${#real[@]} ] && [ "$nodes" = 1 ]; then
    gpus=${gpus:-${#real[@]}} site=b200
    mapfile -t gpu_files < <(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | sort -V | head -n "$gpus")
    [ ${#gpu_files[@]} -eq "$gpus" ] || fail "nvidia-smi lists ${#real[@]} GPUs but /dev has ${#gpu_files[@]} nvidiaN files"
  fi
  gpus=${gpus:-2}
  while [ ${#gpu_files[@]} -lt "$gpus" ]; do gpu_files+=(/dev/null); done
  # what the machine has, less 4 % and 1 GB for the system
  memory=${memory:-$(awk '/^MemTotal:/ {print int($2 / 1024 * 0.96 - 1024)}' /proc/meminfo)}
}

choose_address() { # Slurm binds to the one address that its host's name stands for, or to all
  local own
  address=$(getent ahostsv4 "$(uname -n)" 2>/dev/null | awk 'NR == 1 {print $1}') || true
  own=" $(hostname -I 2>/dev/null) "
  [[ $address != 127.* && ( -z $address || $own != *" $address "* ) ]] || return 0
  # The name stands for no address of this machine: the daemons, and their jobs, get a name of their own that does
  address=127.0.0.1 named=(unshare --uts)
  [ "$(id -u)" = 0 ] || named=(unshare --user --map-current-user --keep-caps --uts)
  named+=(sh -c 'hostname localhost && exec "$@"' named)
  "${named[@]}" true 2>/dev/null ||
    fail "this host's name, $(uname -n), stands for no address of it; add a line '127.0.0.1 $(uname -n)' to /etc/hosts"
}

write_config() {
  local i munge="socket=$dir/munge/socket" kill_wait=30 slurmd_timeout=60 database='' share conf
  if [ -n "$test" ]; then
    # cred_expire is also what a requeued job waits before it may start again: 120 s by default
    munge+=,cred_expire=5 kill_wait=5 slurmd_timeout=10
  fi
  if [ -n "$accounting" ]; then
    database="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$address
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$dir/munge/socket
AccountingStorageTRES=gres/gpu"
  fi
  # Links, numbered from 0 in nvidia-smi's order: Slurm takes CUDA_VISIBLE_DEVICES from the number in the file's name,
  # and in a container /dev may hold only nvidia3. Any character device will do for a pretended one.
  rm -f "$dir"/dev/gpu*
  for ((i = 0; i < gpus; i++)); do ln -s "${gpu_files[i]}" "$dir/dev/gpu$i"; done
  : >"$dir/etc/gres.conf"
  [ "$gpus" -eq 0 ] || echo "NodeName=n[1-$nodes] Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))]" >"$dir/etc/gres.conf"
  case $(slurmctld -V) in # releases from 24.05 on want to be told that no cgroups are used
    *' 2'[23].*) printf '%s\n' IgnoreSystemd=yes CgroupPlugin=cgroup/v1 ;; # cgroup/v2 wants a service manager's folders
    *' 2'[01].* | *' 24.02'* | *' 24.11'*) echo IgnoreSystemd=yes ;;
    *) echo CgroupPlugin=disabled ;;
  esac >"$dir/etc/cgroup.conf"
  cat >"$dir/etc/slurm.conf" <<CONF
# Written by env/slurm-up.sh at each start.
ClusterName=$cluster
SlurmctldHost=localhost($address)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=$munge
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=$([ -n "$test" ] && echo 1 || echo 15)
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# a job that names no memory would otherwise get the whole node's
DefMemPerCPU=$((memory / cpus))
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=$kill_wait
SlurmdTimeout=$slurmd_timeout
InactiveLimit=0
MinJobAge=3600
MaxArraySize=10001
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_continue
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$database
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=$address Port=[$((port + 2))-$((port + 1 + nodes))] CPUs=$cpus RealMemory=$memory $([ "$gpus" -eq 0 ] || echo "Gres=gpu:$gpus") Feature=local State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE DefaultTime=1-0 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE DefaultTime=1-0 State=UP
CONF
  # srun listens too, and has the host's own name
  conf=$dir/etc/slurm.conf
  if [ ${#named[@]} -gt 0 ]; then
    grep -v '^CommunicationParameters=' "$conf" >"$dir/etc/client.conf"
    conf=$dir/etc/client.conf
  fi
  # The batch files ask for 8 CPUs and 180 GB a GPU; where that does not fit, each GPU gets its equal part.
  share=''
  if [ "$gpus" -gt 0 ] && { [ $((cpus / gpus)) -lt 8 ] || [ $((memory / gpus)) -lt 184320 ]; }; then
    share="export SBATCH_CPUS_PER_GPU=$((cpus > gpus ? cpus / gpus : 1)) SBATCH_MEM_PER_GPU=$((memory / gpus))M"
  fi
  cat >"$dir/env.sh" <<CONF
# Written by env/slurm-up.sh. Source it: sbatch, squeue, sacct and the make targets then mean this machine's own Slurm.
export SLURM_CONF=$conf
export SUITE_SITE=\${SUITE_SITE:-$site} SUITE_THROTTLE=\${SUITE_THROTTLE:-$((nodes * gpus > 0 ? nodes * gpus : nodes * cpus))}
# The nodes' one feature is "local", so that the constraint in the batch files is replaced by one that always holds.
export SUITE_SLURM=yes SBATCH_PARTITION=main SBATCH_CONSTRAINT=local SUITE_CPU_PARTITION=main
$share
unset SBATCH_ACCOUNT \${!SLURM_JOB*} \${!SLURM_STEP*}
[ ! -f $(printf %q "$repo")/env/"\$SUITE_SITE".sh ] || . $(printf %q "$repo")/env/"\$SUITE_SITE".sh
CONF
}

start_munge() {
  [ -s "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
  munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" >"$dir/log/munged.out" 2>&1 ||
    fail "munged did not start: $(tail -n 1 "$dir/log/munged.out")"
}

start_database() { # MariaDB on a socket only: who may log in is this system's user of the same name, with no password
  local me options
  me=$(id -un)
  options=(--no-defaults --datadir="$dir/mysql" --user="$me" --skip-name-resolve --innodb-log-file-size=16M)
  # the tables' thousand syncs take 4 s on a busy disk; without them a power failure loses the database
  [ -z "$test" ] || options+=(--debug-no-sync)
  if [ ! -d "$dir/mysql" ]; then
    rm -rf "$dir/mysql.new"
    mariadb-install-db "${options[@]}" --datadir="$dir/mysql.new" --auth-root-socket-user="$me" --skip-test-db \
      >"$dir/log/mariadb-install.log" 2>&1 || fail "mariadb-install-db failed; see $dir/log/mariadb-install.log"
    mv "$dir/mysql.new" "$dir/mysql"
  fi
  setsid mariadbd "${options[@]}" --socket="$dir/run/mysql.sock" --skip-networking --pid-file="$dir/run/mariadbd.pid" \
    --innodb-lock-wait-timeout=900 --max-allowed-packet=16M >"$dir/log/mariadbd.log" 2>&1 </dev/null &
  wait_for 60 mariadb --no-defaults --socket="$dir/run/mysql.sock" -e "create database if not exists slurm_acct_db;
    create user if not exists '$me'@localhost identified via unix_socket; grant all on slurm_acct_db.* to '$me'@localhost" ||
    fail "the accounting database did not start; see $dir/log/mariadbd.log"
  (umask 077 && cat >"$dir/etc/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
DbdHost=localhost
DbdAddr=$address
DbdPort=$((port + 1))
CommunicationParameters=NoInAddrAny
SlurmUser=$me
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$me
StorageLoc=slurm_acct_db
CONF
  MYSQL_UNIX_PORT=$dir/run/mysql.sock "${named[@]}" slurmdbd
  wait_for 30 timeout 5 sacctmgr -nP list cluster || fail "slurmdbd did not start; see $dir/log/slurmdbd.log"
  [ -n "$(sacctmgr -nP list cluster "$cluster")" ] || sacctmgr -i add cluster "$cluster" >"$dir/log/sacctmgr.log" 2>&1 ||
    fail "sacctmgr could not add the cluster: $(tail -n 1 "$dir/log/sacctmgr.log")"
}

all_idle() { [ "$(sinfo -h -N -p main -o %T | grep -cx -e idle -e mixed -e allocated)" = "$nodes" ]; }

"$repo/env/install-slurm.sh" || exit $?
choose_dir
exec 9>"$dir/slurm-up.lock" && { flock -n 9 || fail "another slurm-up is at work in $dir"; }
if [ -f "$dir/etc/slurm.conf" ]; then
  if [ -z "$test" ] && SLURM_CONF=$dir/etc/slurm.conf timeout 10 scontrol ping >/dev/null 2>&1; then
    echo "slurm-up: runs already; . $dir/env.sh   (stop it: env/slurm-down.sh --dir $dir)"
    exit 0
  fi
  [ -z "$test" ] || [ -f "$dir/test" ] || fail "$dir holds a Slurm that was raised without --test; choose another --dir"
  "$repo/env/slurm-down.sh" --dir "$dir" >/dev/null || fail "what runs in $dir does not stop; see above"
fi
choose_hardware
choose_address
cluster=suite
if [ -n "$test" ]; then
  cluster=test$port
  find "$dir" -mindepth 1 -maxdepth 1 ! -name slurm-up.lock -exec rm -rf {} +
  touch "$dir/test"
fi
mkdir -p "$dir"/{etc,state,run,log,dev,munge,spool}
chmod 755 "$dir" "$dir"/{etc,run,log,munge} # munged refuses a socket below folders that others may write to
for ((p = port; p < port + 2 + nodes; p++)); do
  ! (: >"/dev/tcp/$address/$p") 2>/dev/null || fail "port $p is in use; choose another --port"
done

export SLURM_CONF=$dir/etc/slurm.conf
done=''
trap '[ -n "$done" ] || { "$repo/env/slurm-down.sh" --dir "$dir" >/dev/null; echo "slurm-up: stopped again; logs are in $dir/log" >&2; }' EXIT
write_config
exec 9>&- # daemons must not inherit the lock
start_munge
[ -z "$accounting" ] || start_database
"${named[@]}" slurmctld || fail "slurmctld did not start: $(tail -n 1 "$dir/log/slurmctld.log")"
for ((i = 1; i <= nodes; i++)); do
  mkdir -p "$dir/spool/n$i"
  "${named[@]}" slurmd -N "n$i" || fail "slurmd n$i did not start: $(tail -qn 1 "$dir/log/slurmd.n$i.log" 2>&1)"
done
wait_for 60 all_idle || fail "the nodes did not become idle: $(sinfo -h -N -p main -o '%N %T' | xargs); see $dir/log"
done=1
cat <<TEXT
slurm-up: $nodes nodes idle after $((($(date +%s%N) - started) / 1000000)) ms, each $cpus CPUs, $memory MB, $gpus GPUs (${gpu_files[*]:-none})
  . $dir/env.sh
  sbatch slurm/compute_lls.sbatch
  squeue
TEXT
