#!/usr/bin/env bash
# Resolves requirements/requirements.in with requirements/overrides.txt into requirements.txt,
# and derives requirements-gpu.txt from it.
#
#   bash scripts/lock_requirements.sh              keeps every pin that still fits
#   bash scripts/lock_requirements.sh --upgrade    takes the newest versions that fit
#
# Arguments go to `uv pip compile`. uv is installed into a temporary folder, at the version
# below, so that the same inputs give the same file.
set -euo pipefail

readonly uv_version=0.13.9
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"

# Inside the project, so that the last step is a rename on one file system.
work="$(mktemp -d "$root/.lock.XXXXXX")"
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/uv"
"$work/uv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"

# uv takes the pins of an existing output file as its preferences.
if [[ -f requirements.txt ]]; then cp requirements.txt "$work/pins"; fi
# No header (it would quote the temporary path) and no index addresses.
"$work/uv/bin/uv" pip compile requirements/requirements.in \
  --override requirements/overrides.txt \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --no-header --no-emit-index-url --no-emit-find-links --annotation-style line \
  --quiet --output-file "$work/pins" "$@"

{
  cat <<'HEADER'
# Every package of ppvision, pinned. Python 3.11, Linux x86-64.
#
#   python3.11 -m venv .venv
#   .venv/bin/python -m pip install --no-deps -r requirements.txt
#   .venv/bin/python -m pip install --no-deps --no-build-isolation -e .
#
# `bash scripts/setup.sh` does all three. --no-deps is needed: the declared requirements of
# PaddleSeg, PaddleDetection and PaddleSlim contradict each other and pip cannot resolve them;
# requirements/overrides.txt says where and why.
#
# Made by scripts/lock_requirements.sh from requirements/. Do not edit.
HEADER
  cat "$work/pins"
} >"$work/requirements.txt"

{
  cat <<'HEADER'
# requirements.txt with paddlepaddle-gpu in place of paddlepaddle. No one has run this file: the
# machines that ppvision was built and tested on have no GPU.
#
# PyPI has no paddlepaddle-gpu of this version, and its wheel depends on NVIDIA's CUDA packages,
# which this file does not pin. So install that one first, with its dependencies, from Paddle's
# own index (the line that Paddle's documentation gives; cu126 is for CUDA 12.6), then the rest:
#
#   python3.11 -m venv .venv
#   .venv/bin/python -m pip install paddlepaddle-gpu==PADDLE -i https://www.paddlepaddle.org.cn/packages/stable/cu126/
#   REQUIREMENTS=requirements-gpu.txt bash scripts/setup.sh
#
# Made by scripts/lock_requirements.sh from requirements/. Do not edit.
HEADER
  sed 's/^paddlepaddle==/paddlepaddle-gpu==/' "$work/pins"
} >"$work/gpu"
paddle="$(sed -n 's/^paddlepaddle==\([^ ]*\).*/\1/p' "$work/pins")"
sed "s/paddlepaddle-gpu==PADDLE/paddlepaddle-gpu==$paddle/" "$work/gpu" >"$work/requirements-gpu.txt"

mv "$work/requirements.txt" "$work/requirements-gpu.txt" "$root/"
echo "Wrote requirements.txt and requirements-gpu.txt: $(grep -c '^[a-z]' requirements.txt) packages."
