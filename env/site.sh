# Sourced, by bash, from the repository's root: chooses the site and loads env/<site>.sh.
# SUITE_SITE from the environment wins; then the word in .site; then fasrc where there is an sbatch, local elsewhere.
if [ -z "${SUITE_SITE:-}" ] && [ -s .site ]; then read -r SUITE_SITE <.site || true; fi
if [ -z "${SUITE_SITE:-}" ]; then
  if command -v sbatch >/dev/null; then SUITE_SITE=fasrc; else SUITE_SITE=local; fi
fi
export SUITE_SITE
if [ ! -f "env/$SUITE_SITE.sh" ]; then
  echo "error: no site '$SUITE_SITE'; there are: $(cd env && ls ./*.sh | sed 's|^\./||; s|\.sh$||' | grep -vE '^(site|setup|slurm-|install-)' | tr '\n' ' ')(set SUITE_SITE or write one into .site)" >&2
  return 2 2>/dev/null || exit 2
fi
# shellcheck source=/dev/null
. "env/$SUITE_SITE.sh"
