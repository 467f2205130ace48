#!/usr/bin/env bash
# Makes .venv from the lock that fits this machine. A second call sees the stamp and returns at once.
#   PYTHON=...            the interpreter to build on (3.11 or 3.12)
#   SUITE_BUILD=gpu|cpu   the builds to install; by default gpu where nvidia-smi lists a GPU or the site's tasks have one
#   SUITE_DRIVER=570      the NVIDIA driver of the nodes, which chooses between the builds for CUDA 13 (580 or newer) and
#                         12.8; by default this machine's, else what `make doctor GPU=1` saw on a node
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/.venv
stamp=$venv/suite-stamp
site=''

die() { echo "setup: $*" >&2; exit 2; }

choose_build() { # sets build and why
  local held
  held=$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)
  case ${SUITE_BUILD:-}:$held in
    gpu:*) choose_cuda 'SUITE_BUILD=gpu' ;;
    cpu:*) build=cpu why='SUITE_BUILD=cpu' ;;
    :gpu*) build=$held why='.venv holds them already' ;;
    :*)
      if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        choose_cuda 'nvidia-smi lists a GPU'
      elif [ -z "$held" ] && load_site && [ "${SUITE_GPU:-cpu}" != cpu ]; then
        choose_cuda "tasks of site $SUITE_SITE run on $SUITE_GPU"
      else
        build=cpu why='nvidia-smi lists no GPU; on a login node of a GPU cluster say SUITE_BUILD=gpu'
      fi ;;
    *) die "SUITE_BUILD=$SUITE_BUILD is neither gpu nor cpu; unset it to let nvidia-smi decide" ;;
  esac
}

choose_cuda() { # choose_cuda WHY: the builds that the nodes' driver can run
  local driver=${SUITE_DRIVER:-} from=SUITE_DRIVER
  if [ -z "$driver" ]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -m 1 '^[0-9]') || true
    from=nvidia-smi
  fi
  if [ -z "$driver" ] && read -r driver 2>/dev/null <.driver; then from="make doctor GPU=1"; fi
  build=gpu why="$1; driver ${driver:-not known}${driver:+ ($from)}"
  case ${driver%%.*} in
    '') case $held in gpu*) build=$held ;; esac ;;
    *[!0-9]* | ????*) die "SUITE_DRIVER=$driver is no driver's version, such as 570 or 580.65.06" ;;
    *) [ "${driver%%.*}" -ge 580 ] || build=gpu-cuda12 ;;
  esac
}

load_site() { # its modules may hold the Python
  [ -z "$site" ] || return 0
  site=loaded
  . env/site.sh
  . env/modules.sh
}

ready() { [ "$(cat "$stamp" 2>/dev/null)" = "$build $digest" ] && [ -x "$venv/bin/python" ]; }

find_python() { # prints the first interpreter of a version we support
  local candidate version found=
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case $version in 3.11 | 3.12) command -v "$candidate" && return ;; esac
    found+="${found:+, }$candidate is $version"
  done
  die "needs Python 3.11 or 3.12 (${found:-${PYTHON:-python3} does not run}); say PYTHON=/path/to/python3.12" \
    "(on a cluster: module load python)"
}

make_venv() {
  local python=$1
  rm -rf "$venv"
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check uv ||
      echo 'setup: uv cannot be had here; going on with pip, which takes some minutes' >&2
  elif command -v uv >/dev/null; then
    uv -q venv --python "$python" "$venv"
  else
    die "$python lacks ensurepip: apt-get install -y $("$python" -c 'import sys; print("python3.%d" % sys.version_info[1])')-venv"
  fi
}

install_with() { # install_with PROGRAM...: the lock is complete, so nothing is resolved but torch's own CUDA parts
  local torch
  torch=$(grep '^torch==' "$lock")
  if [ "$build" != cpu ]; then
    "$@" --no-deps -r "$lock"
  elif "$@" --no-deps "$torch+cpu" 2>/dev/null || torch_index "$torch+cpu" "$@" 2>/dev/null; then
    "$@" --no-deps -r "$lock"
  else
    echo "setup: no CPU build of $torch in reach; taking its CUDA build, which runs without a GPU but is 2.5 GB larger"
    "$@" -c env/lock-gpu.txt "$torch" && "$@" --no-deps -r "$lock"
  fi
}

torch_index() { # uv knows where PyTorch keeps its CPU builds; pip does not
  local torch=$1
  shift
  [ "${1##*/}" = uv ] && UV_HTTP_RETRIES=0 "$@" --torch-backend cpu --no-deps "$torch"
}

choose_build
lock=env/lock-$build.txt
digest=$(sha256sum <"$lock" | cut -d' ' -f1)
ready && exit 0

load_site
python=$(find_python)
exec 9>>.venv.lock # opened for writing: NFS grants exclusive locks only then
flock -n 9 || { echo 'setup: another set-up is at work; waiting for it'; flock 9; }
ready && exit 0

echo "setup: $build builds ($why), $("$python" -V), into .venv"
SECONDS=0
make_venv "$python" # anew: what a killed set-up or an older lock left behind cannot be trusted
if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}; fi
uv=$venv/bin/uv
[ -x "$uv" ] || uv=$(command -v uv || true)
pip_install=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)
if [ -z "$uv" ] || ! install_with "$uv" pip install -q --python "$venv/bin/python"; then
  [ -z "$uv" ] || echo 'setup: uv could not install the lock; trying pip' >&2
  install_with "${pip_install[@]}"
fi
echo "$build $digest" >"$stamp.new" && mv "$stamp.new" "$stamp"
echo "setup: done in $SECONDS s"
