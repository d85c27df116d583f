#!/usr/bin/env bash
# Run set-up, linter, formatter, type checker and tests; the last lines are pytest's summary.
#
#   bash scripts/test.sh                      the tests that run everywhere
#   bash scripts/test.sh --all                also the tests that need nginx and Chromium, which
#                                             are installed with apt-get when run as root
#   bash scripts/test.sh [--all] -k doctor    other arguments go to pytest
#                                             (-n 0: in one process, for a debugger)
#   bash scripts/test.sh --matrix             the wheel with each Python and Paddle: scripts/matrix.sh
set -euo pipefail
if [[ "${1:-}" == --matrix ]]; then
  shift
  exec bash "$(dirname "${BASH_SOURCE[0]}")/matrix.sh" "$@"
fi
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ppvision_root"

# The last -m wins: this one selects everything, over pyproject.toml's "not all".
select=()
if [[ "${1:-}" == --all ]]; then
  shift
  select=(-m "")
  if command -v nginx >/dev/null && command -v chromium >/dev/null &&
    command -v chromedriver >/dev/null; then
    :
  elif [[ "$(id -u)" == 0 ]]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx chromium chromium-driver fonts-dejavu-core >/dev/null
  else
    echo "test: not root, so nginx and chromium are not installed; tests that need them will skip" >&2
  fi
fi

python -m ruff check --quiet .
python -m ruff format --check --quiet . || {
  echo "test: expected formatted files; run: .venv/bin/ruff format ." >&2
  exit 1
}
python -m mypy --no-error-summary  # the public modules: [tool.mypy] in pyproject.toml
# Two processes, because most tests use one core. Tests of a file stay together, for their fixtures;
# files have the order of tests/conftest.py, with the long ones first.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 "${select[@]}" "$@"
