#!/usr/bin/env bash
# Resolves requirements/requirements.in with requirements/overrides.txt: for Python 3.11 into
# requirements.txt, from which requirements-gpu.txt is derived; for each other Python that
# pyproject.toml allows into requirements/python3.X.txt.
#
#   bash scripts/lock_requirements.sh              keeps every pin that still fits
#   bash scripts/lock_requirements.sh --upgrade    takes the newest versions that fit
#
# Arguments are passed to `uv pip compile`. uv is installed into a temporary folder, at the version
# below, so that the same inputs give the same file.
set -euo pipefail

readonly uv_version=0.13.9
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"

# The folder is inside the project, so that the last step is a rename on one file system.
work="$(mktemp -d "$root/.lock.XXXXXX")"
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/uv"
"$work/uv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"

resolve() { # PYTHON FILE ARGUMENTS...: the pins of FILE, as far as they still fit
  local python="$1" file="$2" pins="$work/pins$1"
  shift 2
  # uv takes the pins of an existing output file as its preferences.
  if [[ -f "$file" ]]; then cp "$file" "$pins"; fi
  # No header (it would quote the temporary path) and no index addresses.
  # Without pyproject.toml: it repeats the overrides for `uv sync`.
  "$work/uv/bin/uv" pip compile requirements/requirements.in --no-config \
    --override requirements/overrides.txt \
    --python-version "$python" --python-platform x86_64-manylinux_2_28 \
    --no-header --no-emit-index-url --no-emit-find-links --annotation-style line \
    --quiet --output-file "$pins" "$@"
}

write_header() { # PYTHON FILE
  local setup="PYTHON=python$1 bash scripts/setup.sh"
  if [[ "$1" == 3.11 ]]; then setup="bash scripts/setup.sh"; fi
  cat <<HEADER
# Every package of ppvision, pinned. Python $1, Linux x86-64.
#
#   python$1 -m venv .venv
#   .venv/bin/python -m pip install --no-deps -r $2
#   .venv/bin/python -m pip install --no-deps --no-build-isolation -e .
#
# \`$setup\` does all three. --no-deps is needed: the declared
# requirements of PaddleSeg, PaddleDetection and PaddleSlim contradict each other and pip cannot
# resolve them; requirements/overrides.txt says where and why.
#
# Made by scripts/lock_requirements.sh from requirements/. Do not edit.
HEADER
}

for python in 3.10 3.11 3.12 3.13; do
  file="requirements/python$python.txt"
  if [[ "$python" == 3.11 ]]; then file=requirements.txt; fi
  resolve "$python" "$file" "$@"
  { write_header "$python" "$file" && cat "$work/pins$python"; } >"$work/lock$python"
done

{
  cat <<'HEADER'
# requirements.txt with paddlepaddle-gpu in place of paddlepaddle. No one has run this file: the
# machines that ppvision was built and tested on have no GPU.
#
# PyPI has no paddlepaddle-gpu of this version, and its wheel depends on NVIDIA's CUDA packages,
# which this file does not pin. So install that one first, with its dependencies, by the line that
# Paddle's install page gives for your CUDA
# (https://www.paddlepaddle.org.cn/en/install/quick), then the rest:
#
#   python3.11 -m venv .venv
#   .venv/bin/python -m pip install paddlepaddle-gpu==PADDLE ...    as that page says
#   REQUIREMENTS=requirements-gpu.txt bash scripts/setup.sh
#
# Made by scripts/lock_requirements.sh from requirements/. Do not edit.
HEADER
  sed 's/^paddlepaddle==/paddlepaddle-gpu==/' "$work/pins3.11"
} >"$work/gpu"
paddle="$(sed -n 's/^paddlepaddle==\([^ ]*\).*/\1/p' "$work/pins3.11")"
sed "s/paddlepaddle-gpu==PADDLE/paddlepaddle-gpu==$paddle/" "$work/gpu" >"$work/requirements-gpu.txt"

mv "$work/lock3.11" "$root/requirements.txt"
mv "$work/requirements-gpu.txt" "$root/"
for python in 3.10 3.12 3.13; do mv "$work/lock$python" "$root/requirements/python$python.txt"; done
echo "Wrote requirements.txt, requirements-gpu.txt and requirements/python3.X.txt:" \
  "$(grep -c '^[a-z]' requirements.txt) packages for Python 3.11."
