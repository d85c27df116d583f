"""Tables of what `segmentation.py` found on a GPU.

    python benchmark/gpu/segmentation_results.py OUT/segmentation.jsonl

writes three tables into the folder of results: transfer_gpu (without SDN, from nothing and from a
classifier's weights), transfer_curves_gpu (the learning curves of these runs) and sdn_forms_gpu
(every form of SDN, from a classifier's weights and, where there was time, from nothing): a row per
run, then mean and standard deviation (of the sample) over the seeds. Of equal runs the last counts.
The tables of `benchmark/transfer.py`, on a CPU, have the names without `_gpu`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmark.runs import Rows, mean_and_spread, write_rows
from benchmark.sdn_forms import FORMS

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCORES = ("mIoU", "BoundaryIoU", "BoundaryF3")
SETS = ("nuclei", "facade")
INITS = ("pretrained", "scratch")
KEYS = ("data", "init", "form")


def read_runs(paths: list[Path]) -> Rows:
    """Comparable runs: those whose weights are not averaged, each once."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    found = {}
    for row in map(json.loads, lines):
        if not row["ema"] and row["data"] in SETS:
            found[row["data"], row["init"], row["form"], row["seed"]] = row
    order = {name: place for names in (SETS, INITS, FORMS) for place, name in enumerate(names)}

    def place(row: dict) -> tuple:
        return *(order[row[key]] for key in KEYS), row["seed"]

    return sorted(found.values(), key=place)


def table(runs: Rows) -> Rows:
    """A row per run, then the summary."""
    rows = [
        {
            **{key: run[key] for key in (*KEYS, "seed")},
            **{score: f"{run[score]:.4f}" for score in SCORES},
            **{key: run[key] for key in ("steps", "batch")},
            "crop": "x".join(map(str, run["crop"])),
            **{key: run[key] for key in ("seconds", "parameters", "multiply_adds")},
            "machine": run["gpu"],
        }
        for run in runs
    ]
    if not rows:
        raise SystemExit("rows: expected runs of nuclei or facade, found none.")
    empty = dict.fromkeys(rows[0], "")
    return rows + [empty | row for row in mean_and_spread(rows, KEYS, SCORES)]


def curves(runs: Rows) -> Rows:
    """The points of the learning curves: pictures of at most 400 pixels a side."""
    return [
        {
            **{key: run[key] for key in ("data", "init", "seed")},
            **dict(zip(run["curve_columns"], point, strict=True)),
        }
        for run in runs
        for point in run["curve"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="segmentation.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = read_runs(args.rows)
    args.output.mkdir(parents=True, exist_ok=True)
    plain = [run for run in runs if run["form"] == "none"]
    for name, content in (
        ("transfer_gpu.csv", table(plain)),
        ("transfer_curves_gpu.csv", curves(plain)),
        ("sdn_forms_gpu.csv", table(runs)),
    ):
        write_rows(args.output / name, content)
        print(args.output / name)


if __name__ == "__main__":
    main()
