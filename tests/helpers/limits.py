"""Readers under attack: in a child process, with limits on memory and time."""

import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

FLOOR = 64 << 20  # bytes that any file may take
FACTOR = 10  # times its size that a larger one may take
MAX_MESSAGE = 2000  # letters
SECONDS = 10  # of processor time for one input, however loaded the machine is
_ROOT = Path(__file__).parents[2]


def check_reader(*arguments: object, **options: object) -> Counter:
    """Count what `find_outcomes` gives for its arguments."""
    return Counter(find_outcomes(*arguments, **options))


def find_outcomes(
    reader: str, inputs: Sequence[bytes], folder: Path, name: str, *, by_folder: bool = False
) -> list[str]:
    """Give a reader many files; what came of each: "read", or the type of the error.

    Args:
        reader: `module:function`, which takes a path.
        inputs: contents of files. The first is read once before, without limits: what a reader
            imports is not its files' doing.
        folder: to write them to.
        name: of each file.
        by_folder: the reader takes the file's folder.

    Raises:
        AssertionError: the process died, hung, took more memory than `max(FACTOR * size, FLOOR)`,
            or raised anything but a `PpvisionError`; names the input. (A message without end counts
            as an outcome of its own.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(inputs):
        (folder / f"{number:05d}").mkdir()
        (folder / f"{number:05d}" / name).write_bytes(content)
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.limits", reader, str(folder)]
    command += [name, str(int(by_folder))]
    done = subprocess.run(
        command,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300 + len(inputs),  # of real time: something waits for ever
    )
    lines = [line.split(" ", 1) for line in done.stdout.splitlines() if line[:1].isdigit()]
    last = lines[-1][0] if lines else "none"
    assert done.returncode == 0, (
        f"input {last} of {folder} ended the process with {done.returncode}: {done.stderr[-3000:]}"
    )
    assert len(lines) == len(inputs)
    return [outcome for _, outcome in lines]


def _main(reader: str, folder: str, name: str, by_folder: str) -> None:
    module, function = reader.split(":")
    read = getattr(importlib.import_module(module), function)
    from ppvision.errors import PpvisionError

    def hangs(*_: object) -> None:
        raise SystemExit("hangs")

    signal.signal(signal.SIGPROF, hangs)
    told, sys.stdout = sys.stdout, sys.stderr  # libraries print
    places = sorted(Path(folder).iterdir())
    with contextlib.suppress(PpvisionError):
        read(places[0] if by_folder == "1" else places[0] / name)
    for place in places:
        path = place / name
        allowed = max(FACTOR * path.stat().st_size, FLOOR)
        print(place.name, end=" ", file=told, flush=True)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (in_use + allowed, hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read(place if by_folder == "1" else path)
            outcome = "read"
        except PpvisionError as error:
            outcome = type(error).__name__
            if len(str(error)) > MAX_MESSAGE:
                outcome = f"message of {len(str(error))} letters"
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        print(outcome, file=told, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
