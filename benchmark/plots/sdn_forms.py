"""Picture of results/sdn_forms.csv: Boundary IoU of every run, by form of SDN.

    python benchmark/plots/sdn_forms.py

Writes docs/images/sdn_forms.png.
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmark.runs import read_rows
from benchmark.sdn_forms import COMPARED

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmark" / "results" / "sdn_forms.csv"
IMAGE = ROOT / "docs" / "images" / "sdn_forms.png"


def draw(rows: list[dict]) -> plt.Figure:
    """A panel for each data set: a point per run, a line at the mean of a form.

    Args:
        rows: of sdn_forms.csv.
    """
    runs = [row for row in rows if row["seed"].isdigit()]
    sets = list(dict.fromkeys(row["data"] for row in runs))
    figure, panels = plt.subplots(
        1, len(sets), figsize=(4.6 * len(sets), 3.2), constrained_layout=True, squeeze=False
    )
    for panel, data in zip(panels.flat, sets, strict=True):
        for place, form in enumerate(COMPARED):
            values = [
                float(row["BoundaryIoU"])
                for row in runs
                if (row["data"], row["form"]) == (data, form)
            ]
            panel.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
            if values:
                panel.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, "k-")
        panel.set_xticks(range(len(COMPARED)), COMPARED, rotation=30, ha="right", fontsize=8)
        panel.set_title(data, fontsize=10)
        panel.set_ylabel("Boundary IoU")
    return figure


def main() -> None:
    draw(read_rows(RESULTS)).savefig(IMAGE, dpi=110)
    print(IMAGE)


if __name__ == "__main__":
    main()
