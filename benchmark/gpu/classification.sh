#!/bin/bash
# Train within a number of seconds, whatever works: bash benchmark/gpu/classification.sh 240 [options]
# What fails is tried again without graphs and compilers, in the time that is left.
set -u
budget=$1
shift
python3 -m benchmark.gpu.classification --seconds "$budget" "$@" ||
    python3 -m benchmark.gpu.classification --seconds "$((budget - SECONDS))" "$@" --mode eager
