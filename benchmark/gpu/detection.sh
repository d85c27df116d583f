#!/bin/bash
# Train within a number of seconds, whatever works: bash benchmark/gpu/detection.sh 300 [options]
# What fails is tried again without a CUDA graph, in the time that is left, under another name: the
# first may have written weights.
set -u
budget=$1
shift
name=ppyoloe_pale_nano
python3 -m benchmark.gpu.detection train --deadline "$budget" --name $name "$@" ||
    python3 -m benchmark.gpu.detection train --deadline "$((budget - SECONDS))" \
        --name ${name}_again "$@" --mode eager
