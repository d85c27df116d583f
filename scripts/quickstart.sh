#!/usr/bin/env bash
# Run the whole main job on a fresh machine:  bash scripts/quickstart.sh [--verbose] [FOLDER]
#
# Set-up; digit-scenes; pale_nano under PaddleSeg's SegFormer head, fine-tuned from the zoo's own
# small weights; scored on the val split; exported; run by Paddle Inference on held-out scenes and
# on a real photograph; exported in 8-bit integers. Then a short once-QAT of that model, packed as
# layers of bits and exported at 8, 4 and 2 bits, with products in float and in integers. FOLDER
# (default output/quickstart) has all results; a second run continues with them. The script fails if
# the mIoU is below 0.535: the zoo's weights have 0.567.
#
# It shows the steps, one progress line per step, and the result. The output of the verbs is in
# FOLDER/*.txt, and that of libraries during the training is in FOLDER/run/log.txt; --verbose shows
# both.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ppvision_root"

verbose=()
if [ "${1:-}" = --verbose ]; then verbose=(--verbose) && shift; fi
out=${1:-output/quickstart}
data=$out/digit-scenes run=$out/run model=$out/inference pictures=$out/predictions
config=configs/segmentation/segformer_pale_nano_digit_scenes.yml
weights=segformer_pale_nano.digit_scenes
paths=(train_dataset.dataset_root="$data" train_dataset.train_path="$data/train.txt"
    val_dataset.dataset_root="$data" val_dataset.val_path="$data/val.txt")

number=0
step() { number=$((number + 1)) && printf '%s/11 %s\n' "$number" "$*"; }
# Run ppvision; its results go into a file of $out, and with --verbose also to the terminal.
run_to() {
    local file=$out/$1 code=0
    shift
    if [ ${#verbose[@]} -gt 0 ]; then
        ppvision "$@" --verbose | tee "$file"
    else
        ppvision "$@" >"$file" || code=$?
        if [ "$code" != 0 ]; then cat "$file"; fi
        return "$code"
    fi
}
miou() { sed -n 's/^mIoU \([0-9.]*\) .*/\1/p' "$1"; }
mkdir -p "$out"

step "doctor"
run_to doctor.txt doctor

step "data: real digits on real photographs"
[ -f "$data/dataset.json" ] || run_to data.txt data digit-scenes --output "$data"

step "before: the zoo's weights on the val split"
run_to before.txt eval --config "$config" --model_path "$weights" --opts "${paths[@]}"

step "train: PaddleSeg's parts, from the zoo's weights"
run_to train.txt train --config "$config" --model_path "$weights" --save_dir "$run" --resume auto \
    --do_eval --use_vdl --save_interval 100 --log_iters 20 --opts "${paths[@]}"
best=$run/best_model/model.pdparams

step "after: the best model on the val split, 11 classes"
run_to after.txt eval --config "$config" --model_path "$best" --opts "${paths[@]}"

step "export (any size, 112 x 112 fixed), compared with eager inside, and scored"
run_to export.txt export --config "$config" --model_path "$best" --save_dir "$model" \
    --opts "${paths[@]}"
run_to export-112.txt export --config "$config" --model_path "$best" --save_dir "$model-112" \
    --input_shape 1 3 112 112 --opts "${paths[@]}"
run_to exported.txt eval --config "$config" --model_dir "$model" --opts "${paths[@]}"

step "predict: held-out scenes and a photograph"
run_to scenes.txt predict --model_dir "$model" --image_path "$data/images/val" \
    --save_dir "$pictures/scenes"
photograph=$(python -c 'import sklearn.datasets as d; print(d.__path__[0])')/images/china.jpg
run_to photograph.txt predict --model_dir "$model" --image_path "$photograph" \
    --save_dir "$pictures/photograph"

step "latency: eager against exported, one image of 112 x 112"
run_to latency.txt bench --config "$config" --model_path "$best" --model_dir "$model" "$model-112" \
    --size 112 112 --opts "${paths[@]}"

step "integers: the best model in 8 bits, scored beside float"
run_to integers.txt export --config "$config" --model_path "$best" --save_dir "$model-int8" \
    --input_shape 1 3 112 112 --int8 --opts "${paths[@]}"

step "once-QAT: the same model at 8, 4 and 2 bits, inputs of layers at 8 bits, 40 steps"
slim=(--slim_config configs/quantization/once_qat_8_4_2_integers.yml)
run_to train-once.txt train --config "$config" "${slim[@]}" --model_path "$best" \
    --save_dir "$run-once" --resume auto --iters 40 --save_interval 40 --log_iters 10 \
    --learning_rate 5.0e-5 --opts "${paths[@]}"
layers=$run-once/model.layered
run_to pack.txt pack --config "$run-once/config.yml" --output "$layers" \
    --model_path "$run-once/checkpoints/step_40/model.safetensors"

step "export at 8, 4 and 2 bits, products in float and in integers"
run_to widths.txt export --config "$config" --model_path "$layers" --save_dir "$model-bits" \
    --bits 8 4 2 --int8 --input_shape 1 3 112 112 --opts "${paths[@]}"

before=$(miou "$out/before.txt") after=$(miou "$out/after.txt") exported=$(miou "$out/exported.txt")
cat <<END

pictures        $pictures
VisualDL        $run/vdl    (bash scripts/dashboard.sh $run)
exported model  $model    (any size; $model-112: one image of 112 x 112, faster)
latency         $out/latency.txt
integers        $model-int8    (one image of 112 x 112; docs/integers.md)
all widths      $layers    (layers of bits); $model-bits/w8 w4 w2; table: $out/widths.txt
logs            $run/log.txt, $run-once/log.txt
mIoU            $before before, $after after, $exported exported

Score, bytes and milliseconds on one thread, by bits of the weights and arithmetic:
$(python -W ignore scripts/arithmetic_table.py "$model-112" "$model-int8" "$model-bits"/w{8,4,2})
END
awk -v miou="$after" 'BEGIN { exit !(miou >= 0.535) }' || {
    echo "quickstart: expected at least 0.535 mIoU, got $after. Look at the loss in VisualDL." >&2
    exit 1
}
