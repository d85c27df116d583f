"""Signals that ask a training run to stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Signals within this many seconds after the first one count as the same request. `timeout` signals
# a process and then its group, and Ctrl-C may come from the terminal and from a parent that passes
# it on.
SAME_REQUEST = 0.25
# For several ranks: Paddle's launchers signal them up to three times within a second.
SAME_REQUEST_OF_RANKS = 2.0


class TrainingStopped(KeyboardInterrupt):
    """A signal ended the training; no training step is lost.

    It is a `KeyboardInterrupt`, so that `except Exception` around several runs does not treat it as
    a failure of one run.

    Attributes:
        signal_number: SIGINT, SIGTERM or SIGHUP.
        step: the last complete step.
        checkpoint: the folder to continue from, or None before the first complete step.
    """

    def __init__(self, signal_number: int, step: int, checkpoint: Path | None) -> None:
        name = signal.Signals(signal_number).name
        if checkpoint is None:
            what = f"stopped by {name} before the first step was complete; start again"
        else:
            what = f"stopped by {name} after step {step}; go on with --resume auto ({checkpoint})"
        super().__init__(what)
        self.signal_number = signal_number
        self.step = step
        self.checkpoint = checkpoint


class StopRequest:
    """Records SIGINT, SIGTERM and SIGHUP during the block; they do not end the process.

    A second signal, at least `same_request` seconds after the first, ends the process at once.

    Only the main thread may change the handling of signals; in another thread this has no effect.
    An ignored signal stays ignored (`nohup`, `command &` in a script), and a signal that the
    program handles itself keeps its handler.

    Args:
        same_request: see above, in seconds.

    Attributes:
        number: number of the first signal; 0 before the first one.
    """

    def __init__(self, same_request: float = SAME_REQUEST) -> None:
        self.same_request = same_request
        self.number = 0
        self._on_request: Callable[[], None] | None = None
        self._time = 0.0
        self._process = os.getpid()
        self._interruption: Callable[[], BaseException] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def call(self, on_request: Callable[[], None]) -> None:
        """Call a function when the first signal comes, or now if it has already come. It may be
        called twice."""
        self._on_request = on_request
        if self.number:
            on_request()

    @contextlib.contextmanager
    def interrupt_at_once(self, interruption: Callable[[], BaseException]) -> Iterator[None]:
        """In this block a signal raises `interruption()`. If a signal came earlier, it is raised
        immediately."""
        self._interruption = interruption
        try:
            if self.number:
                raise interruption()
            yield
        finally:
            self._interruption = None

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # this is a data-reading process that was just forked; the trainer will stop it
        if self.number == 0:
            self.number, self._time = number, time.monotonic()
            if self._on_request is not None:
                self._on_request()
            if self._interruption is not None:
                raise self._interruption()
        elif time.monotonic() - self._time >= self.same_request:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
