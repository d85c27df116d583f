"""Score against bytes and milliseconds, for every width and arithmetic.

    python benchmark/plots/widths.py

draws results/widths.csv, which `benchmark/widths.py` wrote: docs/images/widths.png. Coloured dots
are folders for Paddle Inference, grey ones the same network in ONNX Runtime. What computes codes
with rounded inputs in float, for processors without integers, is in the table alone.
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmark" / "results" / "widths.csv"
IMAGE = ROOT / "docs" / "images" / "widths.png"
COLOURS = {
    "float": "tab:blue",
    "integers": "tab:red",
    "packed, integers": "tab:orange",
}


def draw(table: Path, image: Path) -> None:
    """Args: `table`, the CSV; `image`, the PNG to write."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["ours"] == "False" or r["name"] in COLOURS]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, key, unit, scale in (
        (axes[0], "bytes", "megabytes of the exported folder", 1e6),
        (axes[1], "ms", "milliseconds per image, one thread", 1),
    ):
        seen = set()
        for row in rows:
            ours = row["ours"] == "True"
            colour = COLOURS[row["name"]] if ours else "0.6"
            label = row["name"] if ours else "ONNX Runtime"
            x, y = float(row[key]) / scale, float(row["mIoU"])
            axis.scatter(x, y, color=colour, s=45, label=None if label in seen else label, zorder=3)
            # Where dots are close, one number is above its dot and the other below.
            place = (5, -11) if row["name"] == "packed, integers" else (-4, 6)
            axis.annotate(row["bits"], (x, y), xytext=place, textcoords="offset points", fontsize=8)
            seen.add(label)
        axis.set_xlim(0, 1.08 * max(float(row[key]) for row in rows) / scale)
        axis.margins(y=0.12)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mIoU, 240 scenes")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(TABLE, IMAGE)
    print(IMAGE)
