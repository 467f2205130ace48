# shellcheck shell=bash
# Sourced, by bash, from the repository's root: chooses the site and loads env/<site>.sh.
# A Slurm of this box (`make slurm-up`) is taken when no other is set.
# SUITE_SITE from the environment wins; then the word in .site; then fasrc where there is an sbatch, local elsewhere.
# shellcheck source=/dev/null
if [ -z "${SLURM_CONF:-}" ] && [ -f .slurm/env.sh ]; then . .slurm/env.sh; fi
if [ -z "${SUITE_SITE:-}" ] && [ -s .site ]; then read -r SUITE_SITE <.site || true; fi
if [ -z "${SUITE_SITE:-}" ]; then
  if command -v sbatch >/dev/null; then SUITE_SITE=fasrc; else SUITE_SITE=local; fi
fi
export SUITE_SITE
if [ ! -f "env/$SUITE_SITE.sh" ]; then
  echo "error: there is no env/$SUITE_SITE.sh: set SUITE_SITE, or write into .site, one of: fasrc b200 local, or a file of your own there" >&2
  exit 2
fi
# shellcheck source=/dev/null
. "env/$SUITE_SITE.sh"
# sbatch may be installed where no cluster is: on a box of one's own, Slurm is what has a configuration.
case $SUITE_SITE in
  local | b200) if [ -z "${SLURM_CONF:-}" ] && [ ! -e /etc/slurm/slurm.conf ]; then export SUITE_SLURM=no; fi ;;
esac
# The token stays where `hf auth login` puts it (a file of mode 600), although the cache is elsewhere.
: "${HF_TOKEN_PATH:=$HOME/.cache/huggingface/token}" "${HF_HOME:=$SUITE_CACHE/hf}"
export HF_TOKEN_PATH HF_HOME
