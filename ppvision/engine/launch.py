"""`python -m ppvision.engine.launch`: Paddle's launcher, which hands signals on to its ranks.

By itself Paddle's launcher of CPU processes leaves its ranks behind when it is signalled or killed:
they go on training. The one of GPU processes gives them 30 seconds, and ends with another code
than 128 + signal. Arguments are those of `paddle.distributed.launch`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from paddle.distributed.launch.controllers.controller import ControllerBase
from paddle.distributed.launch.main import launch

from ppvision.engine.reading import LAUNCHER
from ppvision.engine.stopping import STOP_SIGNALS

_first_signal = 0


def _children() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended just now
            fields = path.read_text().rpartition(")")[2].split()  # behind the program's name
            if int(fields[1]) == os.getpid():
                yield int(path.parent.name)


def _hand_on(number: int, _: FrameType | None) -> None:
    """Ranks stop together after a step; the launcher ends when it sees that they have."""
    global _first_signal
    _first_signal = _first_signal or number
    for child in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)


def main() -> None:
    os.environ[LAUNCHER] = str(os.getpid())
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves it
            signal.signal(number, _hand_on)
    # It would set handlers of its own.
    ControllerBase.signal_handler = lambda self, number, frame: _hand_on(number, frame)
    code = 0
    try:
        launch()
    except SystemExit as end:
        code = end.code
    sys.exit(128 + _first_signal if code and _first_signal else code)


if __name__ == "__main__":
    main()
