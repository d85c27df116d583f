"""`python -m ppvision.engine.launch`: Paddle's launcher, which also passes signals to its ranks.

If Paddle's own launcher of CPU processes gets a signal or is killed, its ranks continue training.
The launcher of GPU processes gives them 30 seconds, and ends with another code than 128 + signal.
Arguments are those of `paddle.distributed.launch`.

`--max_restart N` (default: 0) starts the training again, with `--resume auto`, up to N times after
a process on this or another machine has failed, which ends all processes. Paddle has an argument of
this name, which has an effect only with a master at `etcd://`; it does not get ours.

`--master HOST:PORT` also accepts the name of a host. Paddle finds the master by comparing the host,
as text, with this machine's IP address: with a name, no machine is the master, and all wait
forever.
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from paddle.distributed.launch.controllers.controller import ControllerBase
from paddle.distributed.launch.main import launch

from ppvision.engine.reading import LAUNCHER
from ppvision.engine.stopping import STOP_SIGNALS

_MAX_RESTART = "--max_restart"
_RESUME = ["--resume", "auto"]
_MASTER = "--master"
_KNOWN_AFTER = 300  # seconds until a name must be known: DNS may know a Pod only after its start
_ASK_EVERY = 2  # seconds
# Exit codes of ranks after which another attempt does not help: 2 is wrong usage; the others mean
# that the training was asked to stop, on this or another machine.
_FINAL = {2, *(128 + number for number in STOP_SIGNALS)}
_first_signal = 0


def _children() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended just now
            fields = path.read_text().rpartition(")")[2].split()  # fields after the program
            if int(fields[1]) == os.getpid():
                yield int(path.parent.name)


def _hand_on(number: int, _: FrameType | None) -> None:
    """Pass a signal to the ranks. They stop together after a step, and then the launcher ends."""
    global _first_signal
    _first_signal = _first_signal or number
    for child in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)


def take_option(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """Return the word after `name` (None if it is missing), and the other words."""
    if name not in words:
        return None, words
    place = words.index(name)
    return words[place + 1], [*words[:place], *words[place + 2 :]]


def resolve_master(words: list[str]) -> list[str]:
    """Replace the name of the master by its IP address.

    Raises:
        OSError: the name has no address after `_KNOWN_AFTER` seconds.
    """
    words = [part for word in words for part in _split_master(word)]
    master, others = take_option(words, _MASTER)
    if master is None or "://" in master:
        return words
    host, colon, port = master.rpartition(":")
    until = time.monotonic() + _KNOWN_AFTER
    while True:
        try:
            return [_MASTER, f"{socket.gethostbyname(host)}{colon}{port}", *others]
        except OSError as error:
            if time.monotonic() >= until:
                raise OSError(
                    f"launch: {_MASTER}: expected the name or IP address of the first machine, "
                    f"got {host!r}, which had no address for {_KNOWN_AFTER} s ({error}). Check "
                    f"the name (`getent hosts {host}`), or give the IP address."
                ) from error
        time.sleep(_ASK_EVERY)


def _split_master(word: str) -> list[str]:
    name, is_pair, value = word.partition("=")
    return [name, value] if is_pair and name == _MASTER else [word]


def _launch() -> int:
    """Run Paddle's launcher; return its exit code."""
    try:
        launch()
    except SystemExit as end:
        return end.code or 0
    except Exception:
        # The thread of its key-value server would keep this process alive forever, and with it the
        # processes that wait for it.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return 0


def main() -> None:
    restarts, words = take_option(sys.argv[1:], _MAX_RESTART)
    left = int(restarts or 0)
    given = words
    if "--nnodes" in words:
        # Paddle's launcher of several machines does not know this option: it would read its value
        # as the program. It passes on this variable, which the ranks read.
        backend, words = take_option(words, "--backend")
        if backend is not None:
            os.environ["PADDLE_DISTRI_BACKEND"] = backend
    try:
        # Before our handlers are set, so that a signal ends this wait. `given` keeps the name,
        # because a Pod that starts again has another address.
        sys.argv[1:] = resolve_master(words)
    except OSError as error:
        sys.exit(str(error))
    os.environ[LAUNCHER] = str(os.getpid())
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` sets it to be ignored
            signal.signal(number, _hand_on)
    # The launcher would set its own handlers.
    ControllerBase.signal_handler = lambda self, number, frame: _hand_on(number, frame)
    code = _launch()
    if code and _first_signal:
        sys.exit(128 + _first_signal)
    if code and code not in _FINAL and left > 0:
        print(
            f"launch: a process ended with code {code}; training continues from the newest "
            f"checkpoint; restarts left after this one: {left - 1}",
            file=sys.stderr,
            flush=True,
        )
        if given[-2:] != _RESUME:
            given = [*given, *_RESUME]
        # A new process, because Paddle's launcher leaves threads and settings behind in this one.
        again = ["-m", "ppvision.engine.launch", _MAX_RESTART, str(left - 1), *given]
        os.execv(sys.executable, [sys.executable, *again])
    sys.exit(code)


if __name__ == "__main__":
    main()
