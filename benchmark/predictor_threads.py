"""Throughput of one `Predictor` that several threads share, in every engine.

    python benchmark/predictor_threads.py                        # results/predictor_threads.csv
    python benchmark/predictor_threads.py --seconds 1 --rounds 1 --output output/try.csv

A classifier, `pale_tiny` at 224 x 224 with random weights, predicts pictures of 480 x 360 in
memory: the resize to 224 is included, as in a server. One Predictor with 1 and with 2 CPU threads
is shared by 1, 2 and 8 Python threads; beside it, each Python thread has a Predictor of its own.
All take turns in rounds; a row is the median over rounds. Every engine runs in a process of its
own, whose peak memory stands in the row's last column.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from ppvision.environment import machine

ENGINES = ("openvino", "onednn", "native", "onnx")
CALLERS = (1, 2, 8)
COLUMNS = (
    "engine",
    "predictors",
    "threads",
    "callers",
    "pictures_per_second",
    "peak_mib",
    "machine",
)


def export(folder: Path, model_format: str) -> None:
    import paddle

    from ppvision import create_model
    from ppvision.deploy import export_model

    paddle.seed(0)
    export_model(
        create_model("pale_tiny"),
        folder,
        input_shape=[1, 3, 224, 224],
        task="classification",
        output_op="softmax",
        format=model_format,
        transforms=[{"type": "Resize", "target_size": [224, 224]}, {"type": "Normalize"}],
    )


def count_calls(predictors: list, pictures: list[np.ndarray], seconds: float) -> float:
    """Pictures a second of as many threads as there are entries in `predictors`."""
    done = [0] * len(predictors)
    end = time.perf_counter() + seconds

    def call(number: int) -> None:
        while time.perf_counter() < end:
            predictors[number](pictures[(number + done[number]) % len(pictures)])
            done[number] += 1

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(predictors))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


def measure(engine: str, folder: str, own: bool, seconds: float, rounds: int) -> None:
    """Print the rows of one engine."""
    import resource

    from ppvision.deploy import Predictor

    use_onednn = {"native": False, "onednn": True}.get(engine)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (360, 480, 3), dtype=np.uint8) for _ in range(8)]
    cases = {}
    for threads in (1, 2):
        count = max(CALLERS) if own else 1
        made = [Predictor(folder, threads=threads, use_onednn=use_onednn) for _ in range(count)]
        for predictor in made:
            predictor(pictures[0])
        for callers in CALLERS:
            cases[threads, callers] = made[:callers] if own else made * callers
    found: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, predictors in cases.items():
            found[case].append(count_calls(predictors, pictures, seconds))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for (threads, callers), rates in found.items():
        kind = "own" if own else "shared"
        writer.writerow([engine, kind, threads, callers, f"{statistics.median(rates):.1f}", peak])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    results = Path(__file__).parent / "results" / "predictor_threads.csv"
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        engine, folder, own = args.child
        measure(engine, folder, own == "own", args.seconds, args.rounds)
        return
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for model_format in ("paddle", "onnx"):
            export(Path(work) / model_format, model_format)
        for engine in args.engines:
            folder = f"{work}/{'onnx' if engine == 'onnx' else 'paddle'}"
            for own in ("shared", "own"):
                done = subprocess.run(
                    [
                        *(sys.executable, __file__, "--child", engine, folder, own),
                        *("--seconds", str(args.seconds), "--rounds", str(args.rounds)),
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith(engine)]
                rows += list(csv.reader(lines))
                print("\n".join(lines), flush=True)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([*row, machine()] for row in rows)


if __name__ == "__main__":
    main()
