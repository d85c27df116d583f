#!/usr/bin/env bash
# Builds the site of docs/ into output/site:  bash scripts/docs.sh [flags of `mkdocs build`]
# A warning is an error. mkdocs has a separate environment, output/docs-venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=output/docs-venv
[ -x "$venv/bin/mkdocs" ] || {
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
}
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --quiet "$@"
echo "site: output/site/index.html"
