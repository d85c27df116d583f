"""Runs verbs one after another in one process.

    python -m tests.helpers.verb_runner FOLDER <verbs.json

Each entry is `[name, argv, columns]`: its stdout and stderr are FOLDER/name.out and .err; with
`columns` they are one pseudo-terminal of that width, read into FOLDER/name.out. The exit codes
are written to FOLDER/codes.json. Paddle is imported once for all of them.
"""

import contextlib
import fcntl
import json
import os
import pty
import struct
import sys
import termios
import threading
from pathlib import Path

from ppvision.cli import run
from tests.helpers.tracing import quick_tracing


def _run(argv: list[str], out: int, err: int) -> int:
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    if err != out:
        os.close(err)
    # As a new process would open them: a terminal cannot be told from a file afterwards.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        return run(argv)
    except SystemExit as end:
        return int(end.code or 0)


def _run_in_terminal(argv: list[str], columns: int, output: Path) -> int:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def read() -> None:
        with output.open("wb") as file, contextlib.suppress(OSError):  # the terminal was closed
            while data := os.read(ours, 65536):
                file.write(data)

    reader = threading.Thread(target=read)
    reader.start()
    code = _run(argv, theirs, theirs)
    for number in (1, 2):  # the last descriptors of the terminal
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    reader.join()
    os.close(ours)
    return code


def main() -> None:
    folder, codes = Path(sys.argv[1]), {}
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with quick_tracing():
        for name, argv, columns in json.load(sys.stdin):
            if columns:
                codes[name] = _run_in_terminal(argv, columns, folder / f"{name}.out")
                continue
            out, err = (os.open(folder / f"{name}.{end}", flags) for end in ("out", "err"))
            codes[name] = _run(argv, out, err)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
