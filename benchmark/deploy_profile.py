"""Where the time of an exported Pale goes in oneDNN, by its own log.

    python benchmark/deploy_profile.py --model pale_tiny --threads 1

The export runs in a process of its own under ONEDNN_VERBOSE=1, where oneDNN writes a line for each
primitive that it runs. A row for each kind: how many a run, and their milliseconds (medians, added
up). What the log has not is the rest of a run's time without the log: operators that are not
oneDNN's, and the calls of some hundreds of operators. Writes
benchmark/results/deploy_profile_MODEL_THREADS.csv.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).with_name("results")
SIDE, RUNS = 224, 25


def run(folder: Path, threads: int, runs: int) -> None:
    """What the process with the log does; prints the median of the runs' milliseconds."""
    from ppvision.deploy import Predictor

    predictor = Predictor(folder, threads=threads, use_onednn=True)
    x = np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        predictor.run(x)
        times.append(1e3 * (time.perf_counter() - start))
    print("median", np.median(times))


def primitives(lines: Iterable[str], runs: int) -> dict[str, list[float]]:
    """By kind: how many a run, and their milliseconds. Those that only loading needs, such as
    weights in another order, are left out: they do not come in every run."""
    times = defaultdict(list)
    for line in lines:
        fields = line.strip().split(",")
        if "exec" in fields:
            place = fields.index("exec")
            kind, implementation = fields[place + 2 : place + 4]
            # Memory formats, attributes and shape tell one use of a primitive from another.
            times[(kind, implementation, *fields[place + 5 : -1])].append(float(fields[-1]))
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for (kind, implementation, *_), values in times.items():
        count = len(values) // runs
        if kind == "convolution":
            kind += ", depthwise" if "dw" in implementation else ""
        elif kind == "gemm_api":
            kind = "products inside of attention"
        found[kind][0] += count
        found[kind][1] += count * float(np.median(values))
    return {kind: values for kind, values in found.items() if values[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pale_tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="default: see above")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import paddle

    import ppvision
    from benchmark.runs import write_rows
    from ppvision.deploy import export_model
    from ppvision.environment import machine

    paddle.seed(0)
    with tempfile.TemporaryDirectory() as work:
        folder = export_model(
            ppvision.create_model(args.model),
            Path(work) / "model",
            input_shape=[1, 3, SIDE, SIDE],
            output_op="none",
            task="classification",
        )
        command = [sys.executable, "-W", "ignore", __file__, "--run", str(folder)]
        command += [str(args.threads), str(RUNS)]
        outputs = {}
        for log in ("0", "1"):
            environment = {**os.environ, "ONEDNN_VERBOSE": log}
            outputs[log] = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout.splitlines()
    (whole,) = (float(line.split()[1]) for line in outputs["0"] if line.startswith("median"))
    found = primitives(outputs["1"], RUNS)
    known = sum(milliseconds for _, milliseconds in found.values())
    rows = [
        {"kind": kind, "a_run": int(count), "ms": f"{milliseconds:.2f}"}
        for kind, (count, milliseconds) in sorted(found.items(), key=lambda item: -item[1][1])
    ]
    rows += [
        {"kind": "the rest of a run", "a_run": "", "ms": f"{whole - known:.2f}"},
        {"kind": "a run", "a_run": 1, "ms": f"{whole:.2f}"},
    ]
    rows = [
        {"model": args.model, "threads": args.threads, **row, "machine": machine()} for row in rows
    ]
    path = args.results or RESULTS / f"deploy_profile_{args.model}_{args.threads}.csv"
    write_rows(path, rows)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
