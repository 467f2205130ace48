# shellcheck shell=bash
# Sourced, by bash, from the repository's root: chooses the site and loads env/<site>.sh.
# SUITE_SITE from the environment wins; then the word in .site; then fasrc where there is an sbatch, local elsewhere.
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
