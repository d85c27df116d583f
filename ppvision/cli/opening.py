"""Open the device and the job of a config for a verb."""

import argparse
import functools
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ppvision.console import show_crashes
from ppvision.errors import InputError, shorten, shorten_text

if TYPE_CHECKING:
    from ppvision.tasks.job import Job


def open_job(args: argparse.Namespace, **overrides: object) -> "Job":
    """Return the job of `--config`; options of the command line have priority over the config."""
    from ppvision import tasks

    return tasks.open_job(
        args.config,
        args.opts or [],
        slim_config=getattr(args, "slim_config", None),
        allow_download=args.allow_download,
        **overrides,
    )


def device_kind(device: str) -> str:
    """Return "cpu" or "gpu"."""
    return device.split(":")[0]


def set_device(device: str) -> None:
    """Let Paddle compute on `--device`.

    Raises:
        InputError: this machine has no such device.
    """
    import paddle

    drop_paddles_signal_handler()
    if not re.fullmatch(r"cpu|gpu(:\d+)?", device):
        raise InputError(f"--device: expected cpu, gpu or gpu:N, got {shorten(device)}.")
    if device_kind(device) == "gpu" and not paddle.is_compiled_with_cuda():
        raise InputError(
            "--device gpu: this Paddle was built for CPU. Install requirements-gpu.txt (README, "
            "'On a GPU') or pass --device cpu."
        )
    try:
        paddle.set_device(device)
    except ValueError as error:  # no such card
        text = shorten_text(str(error), 300)
        raise InputError(f"--device {device}: Paddle cannot use it ({text}).") from error


@functools.cache  # a second call would remove the handlers that a verb has set since the first
def drop_paddles_signal_handler() -> None:
    """Restore the handling of SIGTERM from before Paddle's import.

    Paddle's handler allocates memory to print a traceback. A signal that comes inside an
    allocation then hangs the process forever.
    """
    import paddle

    paddle.disable_signal_handler()
    show_crashes()


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by an exception, so that unfinished files are removed."""
    drop_paddles_signal_handler()

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        raise SystemExit(128 + number)

    # Not signals that are ignored (nohup) or that the calling program handles.
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
