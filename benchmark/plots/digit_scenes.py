"""The picture of the README: held-out scenes as input, label, prediction, errors.

    bash scripts/quickstart.sh && python benchmark/plots/digit_scenes.py

Takes the first scenes of the val split, whatever they look like, through the exported model.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from ppvision.data.pictures import read_picture
from ppvision.deploy import Predictor
from ppvision.tasks.pictures import GAP, draw_panel

ROWS, COLUMNS = 4, 2  # panels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("docs/images/digit_scenes.png"))
    args = parser.parse_args()
    data = args.quickstart / "digit-scenes"
    predictor = Predictor(args.quickstart / "inference")
    panels = []
    for line in (data / "val.txt").read_text().splitlines()[: ROWS * COLUMNS]:
        image, label = (data / name for name in line.split())
        truth = np.asarray(Image.open(label))
        panels.append(draw_panel(read_picture(image), truth, predictor(image), ignore_index=255))
    height, width = panels[0].shape[:2]
    sheet = np.full(
        (ROWS * (height + GAP) - GAP, COLUMNS * (width + 3 * GAP) - 3 * GAP, 3), 255, np.uint8
    )
    for number, picture in enumerate(panels):
        top = (number // COLUMNS) * (height + GAP)
        left = (number % COLUMNS) * (width + 3 * GAP)
        sheet[top : top + height, left : left + width] = picture
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
