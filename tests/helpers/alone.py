"""A function in a process of its own, to measure the memory that it takes.

The tests' own process is no measure: it holds what earlier tests left, and takes new objects from
what they gave back. `ru_maxrss` is none in a child either: Linux lets a program begin with the
highest of the process that started it (fs/exec.c, `setmax_mm_hiwater_rss`), so that a child of a
large one never gets above it. `VmHWM` of /proc begins anew with every program.

    grown = run_alone(measure_download, url)
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def read_resident() -> int:
    """Bytes that this process has in memory."""
    return _read("VmRSS")


def read_peak() -> int:
    """The most bytes that this process had in memory."""
    return _read("VmHWM")


def _read(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024  # "VmHWM:   10820 kB"


def run_alone(function: Callable, *arguments: Any, seconds: float = 600) -> Any:
    """What a function returns in a fresh process.

    Args:
        function: of a module in `tests/helpers`.
        arguments: that JSON can write, as well as what the function returns.
        seconds: that it may take. Default 600.

    Raises:
        AssertionError: it failed; with what it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.alone"],
        input=json.dumps([function.__module__, function.__name__, arguments]),
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{function.__name__}: {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    module, name, arguments = json.loads(sys.stdin.read())
    print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))


if __name__ == "__main__":
    _main()
