#!/usr/bin/env bash
# Builds the wheel and installs it with its requirements into a fresh environment. There it trains a
# classifier for two steps, exports it, and predicts an image with it and with the zoo's model.
#
#   bash scripts/wheel_check.sh                         with python3
#   PYTHON=python3.12 bash scripts/wheel_check.sh       with another Python, 3.10 to 3.13
#   PADDLE=3.3.1 bash scripts/wheel_check.sh            with this version of paddlepaddle
#   EXTRAS=onnx,remote bash scripts/wheel_check.sh      with optional parts
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# A build leaves folders behind, so it runs on a copy.
mkdir "$work/source"
tar -C "$root" --exclude='./.*' --exclude=./output --exclude=./data -cf - . | tar -C "$work/source" -xf -
"${PYTHON:-python3}" -m venv "$work/venv"
python="$work/venv/bin/python"
pip() { "$python" -m pip "$@" --quiet --disable-pip-version-check; }
pip wheel --no-deps --wheel-dir "$work" "$work/source"
wheel="$(echo "$work"/ppvision-*.whl)"
pip install "$wheel${EXTRAS:+[$EXTRAS]}" ${PADDLE:+"paddlepaddle==$PADDLE"}

cd "$work" # not the project: what is imported is the wheel's
"$python" - <<'PYTHON'
import warnings
from pathlib import Path

import cv2
import numpy as np

random = np.random.default_rng(0)
for split in ("train", "val"):
    for name in ("dark", "light"):
        folder = Path(split, name)
        folder.mkdir(parents=True)
        for number in range(4):
            picture = random.integers(0, 100, (32, 32, 3)) + 150 * (name == "light")
            cv2.imwrite(str(folder / f"{number}.png"), picture.astype(np.uint8))
transforms = "[{type: Resize, target_size: [32, 32]}, {type: Normalize}]"
Path("job.yml").write_text(f"""
task: classification
batch_size: 4
iters: 2
model: {{type: pale_nano, num_classes: 2, pale_size: 4}}
train_dataset: {{root: train, transforms: {transforms}}}
val_dataset: {{root: val, transforms: {transforms}}}
lr_scheduler: {{learning_rate: 0.001}}
""")
PYTHON
ppvision() { "$work/venv/bin/ppvision" "$@" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }; }
ppvision configs >configs.txt
ppvision train -c job.yml --save_dir run --do_eval >/dev/null
ppvision export -c job.yml --model_path run/best_model/model.pdparams --save_dir exported >/dev/null
ppvision predict --model_dir exported --image_path val --save_dir found >/dev/null
"$python" - <<'PYTHON'
import json
import platform
import warnings

warnings.simplefilter("ignore")
import numpy as np
import paddle

import ppvision

found = json.load(open("found/predictions.json"))
assert len(found) == 8, found
with ppvision.Predictor("segformer_pale_nano.digit_scenes") as predictor:
    labels = predictor(np.zeros((112, 112, 3), np.uint8))
    engine = predictor.engine
assert labels.shape == (112, 112), labels.shape
configs = open("configs.txt").read().split()
print(
    f"wheel: Python {platform.python_version()}, paddlepaddle {paddle.__version__}, "
    f"numpy {np.__version__}: trained, exported, predicted; {len(configs)} configs; "
    f"zoo in {engine}"
)
PYTHON
