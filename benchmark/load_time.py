"""Processor time that opening a graph takes in OpenVINO, and that a run takes.

    python benchmark/int8_attention.py --work_dir output/int8_attention    # writes float and int8
    python benchmark/load_time.py output/int8_attention/float output/int8_attention/int8

Each folder is opened in a process of its own, one thread, all folders in turn. "open" is the time
to load the graph and run it once, without the import of Paddle. Processor time changes less than
time by the clock where other programs run too; it still grows with what they do to the caches, so
compare the folders of one call only.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import numpy as np
from ppvision.deploy.run.engines import open_runtime
folder, runs = Path(sys.argv[1]), int(sys.argv[2])
x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
start = time.process_time()
runtime = open_runtime(folder, "paddle", engine="openvino", threads=1)
runtime.run(x)
opened, taken = time.process_time() - start, []
for _ in range(runs):
    start = time.process_time()
    runtime.run(x)
    taken.append(1e3 * (time.process_time() - start))
print("ANSWER", json.dumps([opened, float(np.median(taken))]), flush=True)
os._exit(0)
"""


def measure(folder: Path, runs: int) -> tuple[float, float]:
    """Seconds to open a graph of one 224 x 224 picture, and milliseconds of a run."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(folder), str(runs), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    opened, run = json.loads(answer.removeprefix("ANSWER "))
    return opened, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, help="with model.pdmodel")
    parser.add_argument("--repeats", type=int, default=3, help="of all folders in turn (3)")
    parser.add_argument("--runs", type=int, default=20, help="of each graph (20)")
    args = parser.parse_args()
    found: dict[Path, list[tuple[float, float]]] = {folder: [] for folder in args.folders}
    for _ in range(args.repeats):
        for folder in args.folders:
            found[folder].append(measure(folder, args.runs))
    for folder, taken in found.items():
        opened, run = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"{folder}: open {opened:.2f} s, run {run:.1f} ms")


if __name__ == "__main__":
    main()
