#!/usr/bin/env bash
# Evaluate a model:  bash scripts/eval.sh CONFIG --model_path FILE | --model_dir FOLDER [flags of `ppvision eval`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 1 ] || { sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
config=$1
shift
exec python -m ppvision eval --config "$config" "$@"
