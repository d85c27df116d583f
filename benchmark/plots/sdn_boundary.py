"""Pictures of `benchmark/sdn_boundary.py`: the same crops without and with SDN, and the scores.

    python benchmark/plots/sdn_boundary.py --data_root data --work_dir output/sdn_boundary

Of every third picture of the val split the square with the most boundary, whatever the models make
of it: input, label, and the errors of either model (`ppvision.tasks.pictures.draw_errors`). Writes
docs/images/sdn_<data>.png and docs/images/sdn_scores.png.
"""

import argparse
import itertools
import sys
from pathlib import Path

import cv2
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from ppvision.data.pictures import read_picture
from ppvision.deploy import Predictor
from ppvision.metrics.boundary import other_class_near
from ppvision.tasks.pictures import CAPTION, GAP, draw_errors, draw_overlay

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmark.runs import read_rows
from benchmark.sdn_boundary import BACKBONES, BEST, DATA, VARIANTS

IMAGES = Path("docs/images")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "sdn_runs.csv"
SIDE, ZOOM, ROWS, EVERY = 96, 2, 4, 3  # pixels of a crop, its enlargement, crops, pictures apart
COLUMNS = ("input", "label", "baseline", "SDN")


def busiest(label: np.ndarray) -> tuple[slice, slice]:
    """The square of `SIDE` with the most boundary pixels."""
    edge = other_class_near(np.where(label == 255, -1, label).astype(np.int16), 1, False)
    sums = cv2.boxFilter(edge.astype(np.float32), -1, (SIDE, SIDE), normalize=False)
    half = SIDE // 2
    inner = sums[half : label.shape[0] - half, half : label.shape[1] - half]
    row, column = np.unravel_index(inner.argmax(), inner.shape)
    return slice(row, row + SIDE), slice(column, column + SIDE)


def crops(data: str, data_root: Path, work_dir: Path) -> np.ndarray:
    """A sheet: one crop a row, `COLUMNS` side by side."""
    root = data_root / DATA[data][0]
    predictors = [
        Predictor(work_dir / f"{data}_pale_nano_{variant}_0" / "inference")
        for variant in ("baseline", BEST)
    ]
    rows = []
    for line in (root / "val.txt").read_text().splitlines()[::EVERY][:ROWS]:
        image_name, label_name = line.split()
        image, label = read_picture(root / image_name), np.asarray(Image.open(root / label_name))
        found = [draw_errors(image, label, predictor(image), 255) for predictor in predictors]
        shown = draw_overlay(image, np.where(label == 255, 0, label))
        cut = busiest(label)
        tiles = [
            cv2.resize(part[cut], None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_NEAREST)
            for part in (image, shown, *found)
        ]
        gap = np.full((SIDE * ZOOM, GAP, 3), 255, np.uint8)
        rows.append(np.concatenate([p for tile in tiles for p in (tile, gap)][:-1], axis=1))
    width = rows[0].shape[1]
    head = np.full((CAPTION, width, 3), 255, np.uint8)
    for number, text in enumerate(COLUMNS):
        place = (number * (SIDE * ZOOM + GAP) + 2, CAPTION - 6)
        cv2.putText(head, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    line = np.full((GAP, width, 3), 255, np.uint8)
    return np.concatenate([head, *(p for row in rows for p in (row, line))][:-1], axis=0)


def scores(path: Path) -> plt.Figure:
    """Boundary IoU of every run, a column a variant, a panel a set and backbone."""
    rows = read_rows(path)
    there = {(row["backbone"], row["data"]) for row in rows}
    backbones = [name for name in BACKBONES if any(name == b for b, _ in there)]
    sets = [name for name in DATA if any(name == d for _, d in there)]
    figure, panels = plt.subplots(
        len(backbones),
        len(sets),
        figsize=(5 * len(sets), 3.2 * len(backbones)),
        constrained_layout=True,
        squeeze=False,
    )
    for panel, case in zip(panels.flat, itertools.product(backbones, sets), strict=True):
        mine = [row for row in rows if (row["backbone"], row["data"]) == case]
        names = [v for v in VARIANTS if any(row["variant"] == v for row in mine)]
        for place, name in enumerate(names):
            values = [float(row["BoundaryIoU"]) for row in mine if row["variant"] == name]
            panel.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
            panel.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, "k-")
        panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        panel.set_xlim(-0.6, max(2, len(names)) - 0.4)
        panel.set_title(f"{case[1]}, {case[0]}", fontsize=10)
        panel.set_ylabel("Boundary IoU")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("output/sdn_boundary"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for data in DATA:
        if (args.work_dir / f"{data}_pale_nano_{BEST}_0" / "inference").exists():
            path = IMAGES / f"sdn_{data}.png"
            Image.fromarray(crops(data, args.data_root, args.work_dir)).save(path)
            print(path)
    scores(args.results).savefig(IMAGES / "sdn_scores.png", dpi=110)
    print(IMAGES / "sdn_scores.png")


if __name__ == "__main__":
    main()
