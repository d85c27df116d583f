#!/usr/bin/env bash
# Run one piece of a long training:  bash scripts/train_weights.sh CONFIG [flags of `ppvision train`]
#   PPVISION_RUNS=DIR   needed: folder of the runs, outside the checkout; this run is DIR/NAME
#   NAME=...            name of the run; default: that of the config
#   PIECE=2h            time limit of one piece
# It trains on one core and continues from the newest checkpoint. Repeat the command until it exits
# with 0: 75 means that the time of the piece is over. Two runs at once, one per core, use two cores
# best.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 1 ] || { sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
: "${PPVISION_RUNS:?expected the folder of the runs, outside of the checkout, such as ~/ppvision-runs}"
config=$1
shift
name=${NAME:-$(basename "${config%.*}")}
# After SIGTERM the step ends and a checkpoint is written.
code=0
OMP_NUM_THREADS=1 timeout --signal=TERM --kill-after=10m "${PIECE:-2h}" \
    python -m ppvision train --config "$config" --save_dir "$PPVISION_RUNS/$name" --resume auto \
    --device cpu --do_eval "$@" || code=$?
if [ "$code" = 124 ]; then
    echo "train_weights: ${PIECE:-2h} are over. Run the same command again to go on." >&2
    exit 75
fi
exit "$code"
