"""Score, bytes and milliseconds of one trained network at every width and in both arithmetics.

    bash scripts/quickstart.sh
    python benchmark/widths.py --quickstart output/quickstart --work_dir output/widths
    python benchmark/plots/widths.py

The network is what the quickstart trained: `pale_nano` under SegFormer's head on digit scenes, and
its layered model of 8, 4 and 2 bits after 40 steps of once-QAT. Exported for one picture of
112 x 112, in float and in integers, for Paddle Inference and, to compare with, as ONNX for ONNX
Runtime. Scores are those of `ppvision eval` on the 240 val scenes. All are timed in turn on one
thread, in processes of their own. Writes results/widths.csv.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.integer_latency import UNITS, Worker
from benchmark.runs import write_rows
from ppvision.deploy.run.precision import find_usable_flags
from ppvision.environment import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results" / "widths.csv"
CONFIG = ROOT / "configs" / "segmentation" / "segformer_pale_nano_digit_scenes.yml"
WIDTHS = (8, 4, 2)
SHAPE = ("--input_shape", "1", "3", "112", "112")


@dataclass(frozen=True)
class Variant:
    """One point of the chart.

    Attributes:
        name: in the table.
        bits: of the weights.
        folder: that is run, below the work folder.
        precision: that is asked of `Predictor`.
        ours: whether it is a folder for Paddle Inference; the others are what it is compared with.
    """

    name: str
    bits: int
    folder: str
    precision: str
    ours: bool = True


VARIANTS = (
    Variant("float", 32, "float", "float32"),
    Variant("integers", 8, "int8", "int8"),
    *(Variant("packed, float", bits, f"bits/w{bits}", "float32") for bits in WIDTHS),
    *(Variant("packed, integers", bits, f"bits/w{bits}", "int8") for bits in WIDTHS),
    Variant("ONNX Runtime, float", 32, "onnx", "float32", ours=False),
    Variant("ONNX Runtime, QDQ", 8, "onnx-int8", "int8", ours=False),
)


def run_verb(*arguments: object) -> str:
    """What a verb of ppvision prints."""
    done = subprocess.run(
        [sys.executable, "-m", "ppvision", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stderr[-3000:]}")
    return done.stdout


def export_all(quickstart: Path, work: Path, data: list[str]) -> None:
    """All folders; those that are there stay."""
    best = quickstart / "run" / "best_model" / "model.pdparams"
    layers = quickstart / "run-once" / "model.layered"
    for folder, weights, more in (
        ("float", best, ()),
        ("int8", best, ("--int8",)),
        ("onnx", best, ("--format", "onnx")),
        ("onnx-int8", best, ("--format", "onnx", "--int8")),
        ("bits", layers, ("--bits", *WIDTHS, "--int8")),
    ):
        if not (work / folder).exists():
            where = ("--model_path", weights, "--save_dir", work / folder)
            run_verb("export", "--config", CONFIG, *where, *SHAPE, *more, "--opts", *data)


def score_of(folder: Path, precision: str, data: list[str]) -> float:
    arguments = ("--model_dir", folder, "--precision", precision, "--json", "--opts", *data)
    (result,) = json.loads(run_verb("eval", "--config", CONFIG, *arguments))["results"]
    return result["scores"]["mIoU"]


def time_in_turn(work: Path, seconds: float) -> dict[Variant, list[float]]:
    workers = {v: Worker(work / v.folder, v.precision, threads=1) for v in VARIANTS}
    taken: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken[VARIANTS[0]]) < 5:
        for variant, worker in workers.items():
            taken[variant].append(worker.run())
    for worker in workers.values():
        worker.close()
    return taken


def make_rows(work: Path, data: list[str], seconds: float) -> list[dict[str, object]]:
    scores = {
        variant: score_of(work / variant.folder, variant.precision, data) for variant in VARIANTS
    }
    taken = time_in_turn(work, seconds)
    float_times = np.array(taken[VARIANTS[0]])
    units = ", ".join(unit for unit in UNITS if unit in find_usable_flags())
    return [
        {
            "name": variant.name,
            "bits": variant.bits,
            "ours": variant.ours,
            "mIoU": f"{scores[variant]:.4f}",
            "bytes": sum(f.stat().st_size for f in (work / variant.folder).iterdir()),
            "ms": f"{1e3 * np.median(taken[variant]):.2f}",
            "ratio": f"{np.median(np.array(taken[variant]) / float_times):.3f}",
            "rounds": len(float_times),
            "machine": f"{machine()}, {units}",
        }
        for variant in VARIANTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="folder that it wrote")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30, help="of timing, for all together")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    root = (args.quickstart / "digit-scenes").resolve()
    data = [
        f"{part}_dataset.{key}"
        for part in ("train", "val")
        for key in (f"dataset_root={root}", f"{part}_path={root}/{part}.txt")
    ]
    args.work_dir.mkdir(parents=True, exist_ok=True)
    export_all(args.quickstart, args.work_dir, data)
    rows = make_rows(args.work_dir, data, args.seconds)
    write_rows(args.output, rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
