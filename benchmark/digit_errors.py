"""Where the zoo's digit model loses its score: strokes that are not found, or classes mixed up.

    python -m ppvision data digit-scenes --output data/digit_scenes
    python benchmark/digit_errors.py --data_root data/digit_scenes

`stroke_iou` takes all digits for one class. `class_share` is the share of the pixels found on
strokes that have the right digit. An mIoU cannot be higher than about their product allows. Writes
results/digit_errors.csv.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

import ppvision

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.runs import write_rows
from ppvision.data.pictures import read_label
from ppvision.environment import machine

NAME, LABELS = "segformer_pale_nano.digit_scenes", "(the labels, at a stride of 4)"
RESULTS = Path(__file__).parent / "results" / "digit_errors.csv"
STRIDE = 4  # of the maps that SegFormer's head joins


def count_pixels(root: Path, name: str) -> np.ndarray:
    """Pixels by true class (rows) and predicted class, over the val split."""
    predictor = ppvision.Predictor(name)
    classes = len(predictor.manifest.classes)
    pixels = np.zeros((classes, classes), np.int64)
    for line in (root / "val.txt").read_text(encoding="utf-8").splitlines():
        image, label = line.split()
        found = np.asarray(predictor(root / image))
        np.add.at(pixels, (read_label(root / label).ravel(), found.ravel()), 1)
    return pixels


def reduce_label(label: np.ndarray, classes: int) -> np.ndarray:
    """The classes `[H, W]` that are left of a label `[H, W]` at a stride of STRIDE: each cell has
    the shares of its pixels' classes, which are enlarged bilinearly like logits."""
    height, width = label.shape
    shares = (label[..., None] == np.arange(classes)).astype(np.float32)  # [H, W, K]
    size = width // STRIDE, height // STRIDE
    small = cv2.resize(shares, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR).argmax(axis=2)


def count_reduced(root: Path, classes: int) -> np.ndarray:
    """`count_pixels` of labels at that stride."""
    pixels = np.zeros((classes, classes), np.int64)
    for line in (root / "val.txt").read_text(encoding="utf-8").splitlines():
        label = read_label(root / line.split()[1])
        np.add.at(pixels, (label.ravel(), reduce_label(label, classes).ravel()), 1)
    return pixels


def describe_errors(pixels: np.ndarray) -> dict[str, float]:
    """`mIoU`, `stroke_iou` and `class_share` of a confusion matrix whose class 0 is background."""
    hits = np.diag(pixels)
    union = pixels.sum(axis=0) + pixels.sum(axis=1) - hits
    strokes = pixels[1:, 1:].sum()
    return {
        "mIoU": float((hits / union).mean()),
        "stroke_iou": float(strokes / (pixels.sum() - pixels[0, 0])),
        "class_share": float(hits[1:].sum() / strokes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="the digit scenes")
    parser.add_argument("--weights", default=NAME, help="of the zoo, or an exported folder")
    args = parser.parse_args()
    found = count_pixels(args.data_root, args.weights)
    counted = {args.weights: found, LABELS: count_reduced(args.data_root, len(found))}
    rows = [
        {"weights": name, **{k: f"{v:.4f}" for k, v in describe_errors(pixels).items()}}
        for name, pixels in counted.items()
    ]
    write_rows(RESULTS, [{**row, "machine": machine()} for row in rows])
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
