# shellcheck shell=bash
# Sourced, by bash, after the site: loads each of SUITE_MODULES and says which cannot be. A job goes on without: its Python
# is named by its path.
nounset=$(set +o | grep nounset)
set +u # a module command may read what is not set
for module in ${SUITE_MODULES:-}; do
  if ! type module >/dev/null 2>&1; then
    echo "warning: module $module is not loaded: there is no module command here" >&2
  elif ! module load "$module"; then
    echo "warning: module $module cannot be loaded; see \`module avail ${module%%/*}\`, and export SUITE_MODULES=<others, or none>" >&2
  fi
done
eval "$nounset"
