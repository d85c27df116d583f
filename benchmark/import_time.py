"""What `from ppvision.deploy import Predictor` takes beyond Paddle's own import, now and before.

    python benchmark/import_time.py --before 4a335d5

Fresh processes take turns: `import paddle` alone, and Predictor in this tree and in that of an
earlier revision. Written are medians of seconds from the start of a process to its end, of what
they need beyond Paddle's own, and of the share of the earlier revision's. Every process has its
bytecode, and nothing else is to run on the machine: the clock is the wall's. Beside it, since other
work disturbs it less, stand medians of processor time. Writes benchmark/results/import_time.csv.
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ppvision.environment import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "import_time.csv"
PADDLE = "import paddle"
PREDICTOR = "import paddle; from ppvision.deploy import Predictor"


def time_process(statements: str, tree: Path) -> tuple[float, float]:
    """Seconds of the wall clock and of the processors that a fresh process takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", statements],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, used


def unpack_revision(revision: str, folder: Path) -> None:
    """The package as it was at a revision of this repository."""
    packed = subprocess.run(
        ["git", "archive", revision, "ppvision"], cwd=ROOT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--before", default="4a335d5", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=40, help="processes of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpack_revision(options.before, Path(folder))
        kinds = {
            "paddle": (PADDLE, ROOT),
            options.before: (PREDICTOR, Path(folder)),
            "now": (PREDICTOR, ROOT),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for number in tqdm(range(options.rounds + 1), unit="round", disable=None):
            for name, (statements, tree) in kinds.items():
                found = time_process(statements, tree)
                if number:  # the first round writes bytecode and fills the page cache
                    times[name].append(found)
    medians = {name: np.median(found, axis=0) for name, found in times.items()}
    beyond = {name: found - medians["paddle"] for name, found in medians.items()}
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["tree", "rounds", "wall_s", "wall_beyond_paddle_s", "cpu_s", "cpu_beyond_paddle_s",
             "share_of_before", "machine"]
        )  # fmt: skip
        for name, (wall, used) in medians.items():
            shares = beyond[name] / beyond[options.before]
            row = [name, options.rounds, f"{wall:.3f}", f"{beyond[name][0]:.3f}", f"{used:.3f}"]
            row += [f"{beyond[name][1]:.3f}", f"{shares[1]:.3f}", machine()]
            writer.writerow(row)
            print(*row, sep="\t")


if __name__ == "__main__":
    main()
