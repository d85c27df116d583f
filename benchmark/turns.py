"""Timings of several programs in turn: each in a process of its own, which waits while another one
works.

A benchmark's own file is both sides: its main part makes `Worker`s, which start the same file with
`--worker` and arguments, where `answer` makes a run for each line that it is sent.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

PAUSE = 0.3  # seconds before a run: OpenMP's threads spin for 0.2 after one, in the others' way


class Worker:
    """A process that makes a run when it is told to.

    Args:
        name: in messages, and as a key of the results.
        script: the benchmark's file.
        arguments: for its `--worker`.
        threads: of OpenMP.
        variables: of the environment, beside the present ones.
    """

    def __init__(
        self,
        name: str,
        script: str | Path,
        arguments: Sequence[object],
        threads: int,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), "--worker", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **(variables or {}), "OMP_NUM_THREADS": str(threads)},
            text=True,
        )

    def __call__(self, order: str = "run") -> dict[str, float]:
        """What the process answers: `ms` of the run; in MiB `peak`, what it has held at most,
        `resident`, what it holds, and `imports`, what it held before `make`."""
        time.sleep(PAUSE)
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{order}\n")
            self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"{self.name}: its process ended with {self.process.wait()}.")
        return json.loads(reply)


@contextmanager
def end_afterwards(made: list[Worker]) -> Iterator[list[Worker]]:
    """The workers, ended afterwards."""
    try:
        yield made
    finally:
        for worker in made:
            worker.process.kill()
            with suppress(BrokenPipeError), worker.process:  # closes its pipes and waits
                pass


def in_turn(
    made: list[Worker], warm_up: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Milliseconds of each one's runs, one run each a round, and each one's last answer."""
    times: dict[str, list[float]] = {worker.name: [] for worker in made}
    last: dict[str, dict[str, float]] = {}
    for number in range(warm_up + repeats):
        for worker in made:
            reply = worker()
            last[worker.name] = reply
            if number >= warm_up:
                times[worker.name].append(reply["ms"])
    return times, last


def answer(make: Callable[[], Callable[[], Sequence[np.ndarray]]]) -> None:
    """A worker's side: for each line of the input, a timed run.

    Args:
        make: gives `run() -> arrays`. A line `save PATH` also writes these to PATH.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    imports = _memory("VmRSS")
    run = make()
    for line in sys.stdin:
        words = line.split()
        start = time.perf_counter()
        found = run()
        reply = {"ms": 1e3 * (time.perf_counter() - start), "imports": imports}
        reply |= {"peak": _memory("VmHWM"), "resident": _memory("VmRSS")}
        if words[0] == "save":
            np.savez(words[1], *found)
        print(json.dumps(reply), file=replies, flush=True)


def _memory(entry: str) -> float:
    """MiB of this process (not its parent's, which `getrusage` counts in)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(entry))
