"""Where the zoo's digit model loses its score: strokes that are not found, or classes mixed up.

    python -m ppvision data digit-scenes --output data/digit_scenes
    python benchmark/digit_errors.py --data_root data/digit_scenes

`stroke_iou` takes all digits for one class. `class_share` is the share of the pixels found on
strokes that have the right digit. An mIoU cannot be higher than about their product allows. Writes
results/digit_errors.csv.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

import ppvision
from ppvision.data.pictures import read_label
from ppvision.environment import machine

NAME = "segformer_pale_nano.digit_scenes"
RESULTS = Path(__file__).parent / "results" / "digit_errors.csv"


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
    scores = describe_errors(count_pixels(args.data_root, args.weights))
    row = {"weights": args.weights, **{k: f"{v:.4f}" for k, v in scores.items()}}
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*row, "machine"], lineterminator="\n")
        writer.writeheader()
        writer.writerow({**row, "machine": machine()})
    print(row)


if __name__ == "__main__":
    main()
