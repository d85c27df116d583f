"""Top-1 against bits, from the table of `benchmark/layered_cifar10.py`.

    python benchmark/plots/layered_cifar10.py

A panel a network, a line a method: the mean over seeds, and bars from the lowest to the highest.
Writes docs/images/layered_cifar10.png.
"""

import argparse
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmark.layered_cifar10 import DEFAULT_METHODS, NETWORKS, RESULTS, WIDTHS
from benchmark.runs import read_rows

IMAGE = Path("docs/images/layered_cifar10.png")
LABELS = {
    "float": "float",
    "dedicated": "a QAT run for each width",
    "once_mean": "once-QAT, mean",
    "once_sandwich": "once-QAT, sandwich rule",
    "cut": "8-bit model, cut",
    "ptq": "no training",
}


def scores(rows: list[dict], method: str) -> dict[int, list[float]]:
    """Top-1 in percent of every seed by width, the highest first."""
    found: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: -int(row["bits"])):
        if row["method"] == method:
            found.setdefault(int(row["bits"]), []).append(100 * float(row["top1"]))
    if method == "cut":  # begins at the model that is cut
        found = {8: scores(rows, "dedicated").get(8, [])} | found
    return {bits: values for bits, values in found.items() if values}


def draw(panel: plt.Axes, rows: list[dict]) -> None:
    """The lines of one network."""
    for number, method in enumerate(DEFAULT_METHODS):
        found = scores(rows, method)
        if not found:
            continue
        means = [np.mean(values) for values in found.values()]
        look = {"color": f"C{number}", "label": LABELS[method]}
        if method == "float":
            panel.axhline(means[0], linestyle="--", **look)
            continue
        spread = [
            [m - min(v) for m, v in zip(means, found.values(), strict=True)],
            [max(v) - m for m, v in zip(means, found.values(), strict=True)],
        ]
        places = [WIDTHS.index(bits) + 0.04 * (number - 3) for bits in found]  # bars side by side
        panel.errorbar(places, means, spread, marker="o", markersize=4, capsize=2, **look)
    panel.set_xticks(range(len(WIDTHS)), [str(bits) for bits in WIDTHS])
    panel.set_xlabel("bits of the weights")
    panel.set_ylabel("top-1, %")
    panel.grid(alpha=0.3)


def figure(path: Path) -> plt.Figure:
    """All networks of a table."""
    rows = read_rows(path)
    networks = [name for name in NETWORKS if any(row["network"] == name for row in rows)]
    size = (5 * len(networks), 3.8)
    found, panels = plt.subplots(
        1, len(networks), figsize=size, constrained_layout=True, squeeze=False
    )
    for panel, network in zip(panels[0], networks, strict=True):
        mine = [row for row in rows if row["network"] == network]
        draw(panel, mine)
        panel.set_title(f"{network}, CIFAR-10, seeds: {len({row['seed'] for row in mine})}")
        panel.legend(fontsize=8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=IMAGE)
    args = parser.parse_args()
    figure(args.results).savefig(args.output, dpi=110)
    print(args.output)


if __name__ == "__main__":
    main()
