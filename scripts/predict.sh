#!/usr/bin/env bash
# Predict images with an exported model:  bash scripts/predict.sh MODEL_DIR IMAGE [flags of `ppvision predict`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 2 ] || { sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
model_dir=$1 image=$2
shift 2
exec python -m ppvision predict --model_dir "$model_dir" --image_path "$image" "$@"
