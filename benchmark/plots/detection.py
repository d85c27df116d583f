"""What a detector finds, side by side, from what `ppvision predict` wrote.

    python -m ppvision predict -c configs/detection/mask_rcnn_pale_nano_digit_scenes.yml \\
        --model_path output/detection/scenes/checkpoints/step_1200/ema.safetensors \\
        --image_path data/digit_scenes/images/val --save_dir output/found
    python benchmark/plots/detection.py output/found

The first six pictures by name. Writes docs/images/detection.png.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from ppvision.tasks.pictures import join_side_by_side

IMAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "detection.png"
COUNT, ENLARGED = 6, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("found", type=Path, help="the --save_dir of `predict`")
    parser.add_argument("--image", type=Path, default=IMAGE)
    args = parser.parse_args()
    files = sorted((args.found / "overlay").rglob("*.png"))[:COUNT]
    if not files:
        raise SystemExit(f"found: expected pictures in {args.found / 'overlay'}, found none.")
    pictures = [cv2.imread(str(file)) for file in files]
    row = join_side_by_side(pictures)
    size = (row.shape[1] * ENLARGED, row.shape[0] * ENLARGED)
    args.image.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(args.image), np.ascontiguousarray(cv2.resize(row, size)))


if __name__ == "__main__":
    main()
