"""The picture of the README: blood cells that the zoo's detector finds, nuclei that it segments.

    python -m ppvision data bccd --source BCCD --output data/bccd
    python -m ppvision data dsb2018 --border 2 --source stage1_train --output data/nuclei
    python benchmark/plots/front.py

Takes the first val picture of blood cells, and the val picture with most of it nuclei. Data: BCCD
(MIT), Data Science Bowl 2018 (CC0).
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ppvision import Predictor
from ppvision.data.pictures import read_picture
from ppvision.tasks.pictures import draw_detections, draw_errors, draw_overlay, join_side_by_side

ROOT = Path(__file__).resolve().parents[2]
SURE = 0.5  # boxes with a lower score are not drawn
HEIGHT = 400  # pixels of a row


def scaled(picture: np.ndarray) -> np.ndarray:
    """A picture at the height of a row."""
    width = round(picture.shape[1] * HEIGHT / picture.shape[0])
    return cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_AREA)


def cells(data: Path) -> np.ndarray:
    """The first val picture with the boxes found in it."""
    path = sorted((data / "bccd" / "images" / "val").iterdir())[0]
    with Predictor("ppyoloe_pale_nano.blood_cells") as predictor:
        found = predictor(path).above(SURE)
    return scaled(draw_detections(read_picture(path), found))


def nuclei(data: Path) -> list[np.ndarray]:
    """The val picture with most of it nuclei: what was found, and what is wrong in it."""
    lines = (data / "nuclei" / "val.txt").read_text().splitlines()
    pairs = [[data / "nuclei" / name for name in line.split()] for line in lines]
    labels = {path: np.asarray(Image.open(label)) for path, label in pairs}
    path = max(labels, key=lambda path: (labels[path] > 0).mean())
    with Predictor("segformer_pale_nano_sdn.nuclei") as predictor:
        image, found = read_picture(path), predictor(path)
    truth = labels[path]
    return [scaled(p) for p in (draw_overlay(image, found), draw_errors(image, truth, found, 255))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, default=ROOT / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "front.png")
    args = parser.parse_args()
    sheet = join_side_by_side([cells(args.data_root), *nuclei(args.data_root)])
    Image.fromarray(sheet).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
