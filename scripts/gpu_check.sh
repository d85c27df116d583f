#!/usr/bin/env bash
# What works on this machine's GPU, in one table: training in bfloat16, going on from a checkpoint,
# export, prediction on the GPU. Under four minutes is the aim. Nobody has run this file yet.
#
#   REQUIREMENTS=requirements-gpu.txt bash scripts/gpu_check.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ppvision_root"

python - <<'PYTHON' || exit 1
import sys

import paddle

if not paddle.is_compiled_with_cuda() or not paddle.device.cuda.device_count():
    sys.exit("gpu_check: expected a Paddle for GPUs and a card, got none (README, 'On a GPU').")
print(f"paddle {paddle.__version__}, CUDA {paddle.version.cuda()}, {paddle.device.cuda.get_device_name()}")
PYTHON

out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
config=configs/segmentation/segformer_pale_nano_digit_scenes.yml
data=(-o "train_dataset.dataset_root=$out/data" "train_dataset.train_path=$out/data/train.txt"
    "val_dataset.dataset_root=$out/data" "val_dataset.val_path=$out/data/val.txt")
rows=()

try() { # NAME COMMAND...: a row of the table
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1; then
        rows+=("works   $((SECONDS - start)) s   $name")
    else
        rows+=("fails   $((SECONDS - start)) s   $name: $(tail -n 1 "$out/$name.log" | cut -c1-100)")
    fi
}

try data ppvision data digit-scenes --output "$out/data"
try train-bf16 ppvision train -c "$config" "${data[@]}" --device gpu --precision bf16 --iters 60 \
    --save_interval 60 --save_dir "$out/run"
try resume ppvision train -c "$config" "${data[@]}" --device gpu --precision bf16 --iters 120 \
    --save_interval 60 --save_dir "$out/run" --resume auto
try export ppvision export -c "$config" "${data[@]}" --model_path segformer_pale_nano.digit_scenes \
    --save_dir "$out/exported"
try predict ppvision predict --model_dir "$out/exported" --image_path "$out/data/images/val" \
    --save_dir "$out/found" --device gpu
try eval ppvision eval -c "$config" "${data[@]}" --model_dir "$out/exported" --device gpu
printf '%s\n' "${rows[@]}"
[[ "${rows[*]}" != *fails* ]]
