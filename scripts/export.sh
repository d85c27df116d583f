#!/usr/bin/env bash
# Export a model:  bash scripts/export.sh CONFIG --model_path FILE [flags of `ppvision export`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 1 ] || { sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
config=$1
shift
exec python -m ppvision export --config "$config" "$@"
