#!/usr/bin/env bash
# Check the conditions for a release; changes nothing:  bash scripts/release_check.sh
#   version, changelog and citation agree; nothing is uncommitted; docs/results.md is up to date;
#   the wheel has the code, configs, weights and licence, and nothing else; a fresh environment
#   trains, exports and predicts with it (scripts/wheel_check.sh).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
fail() { echo "release: $1" >&2; exit 1; }

version=$(python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
echo "version $version"
grep -q "^## \[$version\] - [0-9]\{4\}-[0-9][0-9]-[0-9][0-9]$" CHANGELOG.md ||
  fail "CHANGELOG.md: expected a heading '## [$version] - DATE'; move what is under Unreleased there."
grep -q "^version: $version$" CITATION.cff ||
  fail "CITATION.cff: expected 'version: $version'; change it."
[ -z "$(git status --porcelain)" ] || fail "expected no uncommitted changes; commit or undo them."

python benchmark/results_page.py --check

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git archive HEAD | tar -x -C "$work"
python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/dist" "$work"
python scripts/wheel_contents.py "$work"/dist/ppvision-*.whl
bash scripts/wheel_check.sh
echo "release: $version can go out"
