"""Learning curves from nothing and from a classifier's weights.

    python benchmark/plots/transfer.py

reads the learning curves that `benchmark/transfer.py` wrote, and draws a thin line
per seed and a thick one for their mean (`--image`).
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"scratch": "tab:gray", "pretrained": "tab:blue"}
NAMES = {"scratch": "from nothing", "pretrained": "from pale_nano.tiny_imagenet_100"}


def draw(curves: Path, image: Path) -> None:
    """Args: `curves`, the table; `image`, a PNG file to write."""
    with curves.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sets = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 3.6), squeeze=False)
    for axis, name in zip(axes[0], sets, strict=True):
        for init, colour in COLOURS.items():
            seeds: dict[str, list] = defaultdict(list)
            at: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                if (row["data"], row["init"]) == (name, init):
                    point = int(row["step"]), float(row["mIoU"])
                    seeds[row["seed"]].append(point)
                    at[point[0]].append(point[1])
            for points in seeds.values():
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=0.6, alpha=0.6)
            if at:
                steps = sorted(at)
                means = [mean(at[step]) for step in steps]
                axis.plot(steps, means, color=colour, linewidth=2, label=NAMES[init])
        axis.set_title(name)
        axis.set_xlabel("steps")
        axis.set_ylabel("mIoU, a quarter of the val split")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "benchmark" / "results" / "transfer_curves.csv"
    parser.add_argument("--curves", type=Path, default=default)
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "transfer.png")
    args = parser.parse_args()
    draw(args.curves, args.image)
    print(args.image)


if __name__ == "__main__":
    main()
