# shellcheck shell=bash
# Sourced, by bash, from the repository's root: chooses the site and loads env/<site>.sh.
# In this order: SUITE_SITE; the word in .site; the Slurm that `make slurm-up` raised here; fasrc where sbatch has a
# cluster behind it; local.
if [ -z "${SUITE_SITE:-}" ] && [ -s .site ]; then read -r SUITE_SITE <.site || true; fi
# shellcheck source=env/own-slurm.sh
if [ -z "${SUITE_SITE:-}${SLURM_CONF:-}" ]; then . env/own-slurm.sh; fi
if [ -z "${SUITE_SITE:-}" ]; then
  SUITE_SITE=local
  if command -v sbatch >/dev/null && [ -n "${SLURM_CONF:-}$(compgen -G '/etc/slurm*/slurm.conf')" ]; then
    SUITE_SITE=fasrc
  fi
fi
export SUITE_SITE
if [ ! -f "env/$SUITE_SITE.sh" ]; then
  echo "error: there is no env/$SUITE_SITE.sh: set SUITE_SITE, or write into .site, one of: fasrc b200 local, or a file of your own there" >&2
  exit 2
fi
# shellcheck source=/dev/null
. "env/$SUITE_SITE.sh"
# The token stays where `hf auth login` puts it (a file of mode 600), although the cache is elsewhere.
: "${HF_TOKEN_PATH:=$HOME/.cache/huggingface/token}" "${HF_HOME:=$SUITE_CACHE/hf}"
export HF_TOKEN_PATH HF_HOME
