#!/bin/bash
# All trainings of segmentation on one GPU: final weights in one process, comparisons in others.
#   bash benchmark/gpu/segmentation.sh DATA OUT WEIGHTS SECONDS [WAIT]
# DATA: packed data sets; OUT: rows, weights and the log; WEIGHTS: a classifier's, which may come to
# be there within WAIT seconds (default: SECONDS): runs that start from nothing come first.
# In the environment: LANES (4) comparisons run side by side in one process; SPLIT=1 takes a process
# per data set; MPS=0 does not try MPS; OPTIONS go to the Python script.
set -u
here=$(cd "$(dirname "$0")/../.." && pwd)
data=$1 out=$2 weights=$3 seconds=$4 wait=${5:-$4}
lanes=${LANES:-4} begun=$SECONDS unfinished=/tmp/segmentation
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} CUDA_DEVICE_MAX_CONNECTIONS=32
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
# Kernels of several processes run side by side under MPS; without it they take turns.
if [ "${MPS:-1}" = 1 ] && command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/segmentation_mps CUDA_MPS_LOG_DIRECTORY=/tmp/segmentation_mps
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY"
    nvidia-cuda-mps-control -d
    if timeout 25 python3 -c 'import torch; print(float(torch.ones(8, device="cuda").sum()))'; then
        echo "segmentation: MPS is on"
    else
        echo "segmentation: MPS does not work here"
        echo quit | timeout 10 nvidia-cuda-mps-control
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
fi
seconds=$((seconds - SECONDS + begun)) wait=$((wait - SECONDS + begun))
common=(--data "$data" --output "$out" --weights "$weights" --seconds "$seconds" --wait "$wait")
common+=(--scratch "$unfinished")
processes=()
run() {
    local name=$1
    shift
    timeout -k 5 "$((seconds + 10))" python3 "$here/benchmark/gpu/segmentation.py" "$@" \
        "${common[@]}" ${OPTIONS:-} > >(sed -u "s/^/$name: /" >>"$out/segmentation.log") 2>&1 &
    processes+=($!)
}
trap 'kill "${processes[@]}" 2>/dev/null' TERM INT
run final --runs final --lanes 3
if [ "${SPLIT:-0}" = 1 ]; then
    run nuclei --runs experiments --lanes $((lanes / 2)) --only nuclei
    run facade --runs experiments --lanes $((lanes / 2)) --only facade
else
    run experiments --runs experiments --lanes "$lanes"
fi
wait "${processes[@]}"
[ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ] || echo quit | timeout 10 nvidia-cuda-mps-control
# Where a process did not come to its end: what it had saved on the way.
for name in digit_scenes nuclei; do
    compgen -G "$out/${name}_*.pt" >/dev/null ||
        cp $(ls -t "$unfinished/${name}"_*.pt 2>/dev/null | head -n 1) "$out" 2>/dev/null
done
tail -n 40 "$out/segmentation.log"
