#!/usr/bin/env bash
# Builds the site of the documentation in site/, in an environment of its own (.venv-docs: no torch), which is made once.
# A link or an anchor that leads nowhere, a name that the package has not, and a page that nobody is led to are errors, and
# so is a page that would ask another host for a font, a script or a picture.
#
# Environment: PYTHON (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."

venv="$PWD/.venv-docs"
stamp="$venv/.quantplug-pins"
pins="$("${PYTHON:-python3}" -V) $PWD $(sed -n '/^\[dependency-groups\]/,/^$/p' pyproject.toml | sha256sum | cut -d' ' -f1)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$pins" ]; then
  printf '\n== docs: environment in .venv-docs\n'
  "${PYTHON:-python3}" -m venv --clear "$venv"
  # From 25.1 on pip installs a dependency group without the project, and so without torch.
  "$venv/bin/python" -m pip --disable-pip-version-check install -q --upgrade "pip>=25.1"
  "$venv/bin/python" -m pip --disable-pip-version-check install -q --group docs
  printf '%s' "$pins" > "$stamp"
fi

# Not --quiet: a warning that is not shown is not counted either.
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict
if grep -rEn --include '*.html' '<(script|img|iframe|source)[^>]* src="?(https?:)?//|<link[^>]*rel="?(stylesheet|preconnect|icon)[^>]* href="?(https?:)?//' site; then
  echo "docs: pages ask another host, see above" >&2
  exit 1
fi
printf 'The site is in %s.\n' "$PWD/site"
