#!/usr/bin/env bash
# Train a model:  bash scripts/train.sh CONFIG [flags of `ppvision train`]
#   NPROC=2 bash scripts/train.sh CONFIG ...     data-parallel, 2 processes
# Scores while it trains (--do_eval) and records for VisualDL (--use_vdl).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
config=$1
shift
[[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || {
    echo "NPROC: expected a number of processes, got '$NPROC'" >&2
    exit 2
}
if [ "${NPROC:-1}" -gt 1 ]; then
    case " $* " in
        *" --device gpu"* | *" --device=gpu"*) backend=(--devices "$(seq -s, 0 $((NPROC - 1)))") ;;
        *) backend=(--nproc_per_node "$NPROC" --backend gloo) ;; # Paddle's CPU transport
    esac
    exec python -m ppvision.engine.launch "${backend[@]}" --log_dir "${LOG_DIR:-output/launch_logs}" \
        "$ppvision_root/ppvision/__main__.py" train --config "$config" --do_eval --use_vdl "$@"
fi
exec python -m ppvision train --config "$config" --do_eval --use_vdl "$@"
