#!/usr/bin/env bash
# Print a table of what works on this machine's GPU: training in bfloat16, continuing from a
# checkpoint, export, prediction and evaluation on the GPU, and TensorRT if it is installed. The aim
# is less than four minutes. Nobody has run it on a GPU yet.
#
#   REQUIREMENTS=requirements-gpu.txt bash scripts/gpu_check.sh
#   DEVICE=cpu bash scripts/gpu_check.sh       the same rows in float32 on a CPU: a test of this script
set -euo pipefail
device="${DEVICE:-gpu}"
precision=bf16
if [[ "$device" == cpu ]]; then
    precision=fp32
elif ! nvidia-smi -L >/dev/null 2>&1; then # before hundreds of megabytes are installed
    echo "gpu_check: expected a card that nvidia-smi lists, got none (README, 'On a GPU')." >&2
    exit 1
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ppvision_root"

python - "$device" <<'PYTHON' || exit 1
import sys

import paddle

cuda = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
if sys.argv[1] == "gpu" and not cuda:
    sys.exit("gpu_check: expected a Paddle for GPUs, got one without (README, 'On a GPU').")
name = f"CUDA {paddle.version.cuda()}, {paddle.device.cuda.get_device_name()}" if cuda else "CPU"
print(f"paddle {paddle.__version__}, {name}")
PYTHON

out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
config=configs/segmentation/segformer_pale_nano_digit_scenes.yml
data=(-o "train_dataset.dataset_root=$out/data" "train_dataset.train_path=$out/data/train.txt"
    "val_dataset.dataset_root=$out/data" "val_dataset.val_path=$out/data/val.txt")
rows=()

try() { # NAME COMMAND...: a row of the table. A command that ends with 3 says what is absent.
    local name=$1 start=$SECONDS status=0 last
    shift
    "$@" >"$out/$name.log" 2>&1 || status=$?
    last="$(tail -n 1 "$out/$name.log" | cut -c1-100)"
    case "$status" in
        0) rows+=("works   $((SECONDS - start)) s   $name") ;;
        3) rows+=("absent  $((SECONDS - start)) s   $name: $last") ;;
        *) rows+=("fails   $((SECONDS - start)) s   $name: $last") ;;
    esac
}

tensorrt() { # the graph of a known size in TensorRT, against `Predictor`
    python - "$out/fixed" "$out/data/images/val/000000.jpg" <<'PYTHON'
import sys

import numpy as np
from paddle import inference

import ppvision
from ppvision.data.pictures import read_picture
from ppvision.deploy.run.transforms import Transforms

if inference.get_trt_runtime_version() == (0, 0, 0):
    print("this Paddle finds no TensorRT")
    sys.exit(3)
folder, picture = sys.argv[1:]
config = inference.Config(f"{folder}/model.pdmodel", f"{folder}/model.pdiparams")
config.enable_use_gpu(256, 0)
config.enable_tensorrt_engine(
    workspace_size=1 << 28, max_batch_size=1, precision_mode=inference.PrecisionType.Float32
)
engine = inference.create_predictor(config)
with ppvision.Predictor(folder, device="gpu") as predictor:
    expected = predictor(picture)
    x, _ = Transforms(predictor.manifest.transforms)(read_picture(picture))
handle = engine.get_input_handle(engine.get_input_names()[0])
handle.reshape([1, *x.shape])
handle.copy_from_cpu(x[None])
engine.run()
found = engine.get_output_handle(engine.get_output_names()[0]).copy_to_cpu()[0]
same = float(np.mean(found == expected))
print(f"labels equal in {same:.4f} of the pixels")
sys.exit(same < 0.999)
PYTHON
}

how=(-c "$config" "${data[@]}" --device "$device" --precision "$precision" --save_interval 60)
try data ppvision data digit-scenes --output "$out/data"
try "train-$precision" ppvision train "${how[@]}" --iters 60 --save_dir "$out/run"
try resume ppvision train "${how[@]}" --iters 120 --save_dir "$out/run" --resume auto
try export ppvision export -c "$config" "${data[@]}" --model_path segformer_pale_nano.digit_scenes \
    --save_dir "$out/exported"
try export-fixed ppvision export -c "$config" "${data[@]}" --model_path segformer_pale_nano.digit_scenes \
    --input_shape 1 3 112 112 --save_dir "$out/fixed"
try predict ppvision predict --model_dir "$out/exported" --image_path "$out/data/images/val" \
    --save_dir "$out/found" --device "$device"
try eval ppvision eval -c "$config" "${data[@]}" --model_dir "$out/exported" --device "$device"
try tensorrt tensorrt
printf '%s\n' "${rows[@]}"
[[ "${rows[*]}" != *fails* ]]
