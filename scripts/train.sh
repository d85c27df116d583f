#!/usr/bin/env bash
# Train a model:  bash scripts/train.sh CONFIG [flags of `ppvision train`]
#   NPROC=2 bash scripts/train.sh CONFIG ...     data-parallel, 2 processes
#   NNODES=2 MASTER=10.0.0.1:6170 NODE_RANK=0 NPROC=8 bash scripts/train.sh CONFIG ...
#       on 2 machines, this is the first; MASTER is the address or name of the first, and a free port of it
#   MAX_RESTART=3 NPROC=2 ... bash scripts/train.sh CONFIG ...
#       continues from the newest checkpoint, up to 3 times, after a process has failed
# It evaluates during the training (--do_eval) and writes records for VisualDL (--use_vdl).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 1 ] || { sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
config=$1
shift
[[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || {
    echo "NPROC: expected a number of processes, got '$NPROC'" >&2
    exit 2
}
[[ ${MAX_RESTART:-0} =~ ^[0-9]+$ ]] || {
    echo "MAX_RESTART: expected a number of restarts, got '$MAX_RESTART'" >&2
    exit 2
}
nodes=()
if [ "${NNODES:-1}" != 1 ]; then
    [[ $NNODES =~ ^[1-9][0-9]*$ ]] || {
        echo "NNODES: expected a number of machines, got '$NNODES'" >&2
        exit 2
    }
    [[ ${MASTER:-} =~ ^[^:]+:[0-9]+$ ]] || {
        echo "MASTER: expected HOST:PORT of the first machine with NNODES, got '${MASTER:-}'" >&2
        exit 2
    }
    [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] || {
        echo "NODE_RANK: expected this machine's number, 0 to $((NNODES - 1)), got '${NODE_RANK:-}'" >&2
        exit 2
    }
    nodes=(--nnodes "$NNODES" --master "$MASTER" --rank "$NODE_RANK")
    # A file system may be shared: ranks of each machine are numbered from 0 in the names of logs.
    LOG_DIR=${LOG_DIR:-output/launch_logs/machine$NODE_RANK}
fi
if [ "${NPROC:-1}" -gt 1 ] || [ "${#nodes[@]}" -gt 0 ] || [ "${MAX_RESTART:-0}" -gt 0 ]; then
    case " $* " in
        *" --device gpu"* | *" --device=gpu"*) backend=(--devices "$(seq -s, 0 $((${NPROC:-1} - 1)))") ;;
        *) backend=(--nproc_per_node "${NPROC:-1}" --backend gloo) ;; # Paddle's CPU transport
    esac
    exec python -m ppvision.engine.launch --max_restart "${MAX_RESTART:-0}" \
        "${nodes[@]}" "${backend[@]}" --log_dir "${LOG_DIR:-output/launch_logs}" \
        "$ppvision_root/ppvision/__main__.py" train --config "$config" --do_eval --use_vdl "$@"
fi
exec python -m ppvision train --config "$config" --do_eval --use_vdl "$@"
