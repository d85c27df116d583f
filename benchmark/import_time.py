"""What `from ppvision.deploy import Predictor` takes beyond Paddle's own import, now and before.

    python benchmark/import_time.py --before 4a335d5

Fresh processes of this tree and of an earlier revision take turns. Each imports Paddle first and
Predictor then, and says what both took. (The difference between processes that import Paddle only
and others drowns: Paddle's own import takes some 50 times as long, and varies by more.) Both trees
are copied, and their bytecode is there. Written are medians in milliseconds, by the wall clock and
of processor time, which other work on the machine disturbs less, and the share of what the earlier
revision takes. Writes benchmark/results/import_time.csv.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ppvision.environment import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "import_time.csv"

TIMED = """
import json, sys, time
def now():
    return 1e3 * time.perf_counter(), 1e3 * time.process_time()
before = now()
import paddle
between, modules = now(), len(sys.modules)
from ppvision.deploy import Predictor
after = now()
print(json.dumps([*(b - a for a, b in zip(before, between)),
                  *(b - a for a, b in zip(between, after)), len(sys.modules) - modules]))
"""


def time_imports(tree: Path) -> list[float]:
    """Of a fresh process: milliseconds of Paddle's import by the wall clock and of processor time,
    the same of Predictor's, and how many modules the latter loads."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TIMED],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


def copy_tree(revision: str | None, folder: Path) -> None:
    """The package at a revision (None: as it is in the working tree), with its bytecode."""
    folder.mkdir()
    source = ["tar", "-c", "ppvision"] if revision is None else ["git", "archive", revision]
    arguments = [] if revision is None else ["ppvision"]
    packed = subprocess.run([*source, *arguments], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--before", default="4a335d5", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=30, help="processes of each tree")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        trees = {options.before: Path(work) / "before", "now": Path(work) / "now"}
        copy_tree(options.before, trees[options.before])
        copy_tree(None, trees["now"])
        times: dict[str, list[list[float]]] = {name: [] for name in trees}
        for number in tqdm(range(options.rounds + 1), unit="round", disable=None):
            for name, tree in trees.items():
                found = time_imports(tree)
                if number:  # the first round fills the page cache
                    times[name].append(found)
    medians = {name: np.median(found, axis=0) for name, found in times.items()}
    shares = medians["now"] / medians[options.before]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["tree", "rounds", "paddle_ms", "paddle_cpu_ms", "predictor_ms", "predictor_cpu_ms",
             "modules", "share", "cpu_share", "machine"]
        )  # fmt: skip
        for name, found in medians.items():
            share = shares[2:4] if name == "now" else (1, 1)
            row = [name, options.rounds, *(f"{value:.1f}" for value in found[:4])]
            row += [f"{found[4]:.0f}", *(f"{value:.3f}" for value in share), machine()]
            writer.writerow(row)
            print(*row, sep="\t")


if __name__ == "__main__":
    main()
