#!/usr/bin/env bash
# Export a model to one folder per bit-width:
#   bash scripts/export_multibit.sh CONFIG MODEL [--bits 8 6 4 3 2] [flags of `ppvision export`]
# MODEL: a checkpoint of once-QAT, a layered model (folder or URL), or float weights together with
# --slim_config. Prints and writes a table: bits, bytes, score, error, latency, load time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 2 ] || { sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
config=$1 model=$2
shift 2
bits=(--bits 8 6 4 3 2)
case " $* " in *" --bits "*) bits=() ;; esac
exec python -m ppvision export --config "$config" --model_path "$model" "$@" "${bits[@]}"
