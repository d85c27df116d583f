"""Direct the output of a command: results to stdout, the log to stderr, the rest to a log file.

Libraries print warnings, whole configs and C++ log lines to both streams. Inside `Console` the
descriptors 1 and 2 lead to a log file, and the user sees only the output of ppvision itself:

    with Console("eval", verbose=False) as console:
        show("mIoU 0.5340")            # a result: stdout
        tell("ppvision: stopped")      # a message: stderr, as is the log of `ppvision`
        for item in track(items, "eval"):
            ...                        # one progress line: stderr

With `verbose` both descriptors lead to stderr, so that stdout has only results. Without
a `Console` (ppvision used as a library) nothing is redirected, and progress lines are shown on
terminals only.
"""

import contextlib
import faulthandler
import functools
import io
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

logger = logging.getLogger("ppvision")

TAIL_LINES = 20  # of the log file, shown after a failure
_TAIL_BYTES = 64 * 1024  # of the log file that are read for them
_LINE_LENGTH = 300  # characters of one line
# Seconds between two plain progress lines: a log of a day's training then has 3,000 of them.
_PLAIN_INTERVAL = 30.0
_PACKAGE = Path(__file__).parent
_RANK = "PADDLE_TRAINER_ID"  # set by Paddle's launcher

# Attribute of a log record that is for the log file only. Example: the numbers of a training step,
# because the progress line shows them.
FILE_ONLY = {"file_only": True}

Item = TypeVar("Item")

_console: "Console | None" = None  # the one in use


class _Descriptor(io.RawIOBase):
    """Writes to a descriptor, wherever it leads at the time. Output that it refuses is lost.

    A full disk must not end a command because a library prints. It is reported once.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def fileno(self) -> int:
        return self._number

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._number, rest) :]
        except OSError as error:
            if _console is not None:
                _console.tell_lost(error)
        return len(data)


def _open_stream(number: int) -> TextIO:
    # Nothing is buffered: a forked process would write the buffer a second time.
    return io.TextIOWrapper(
        _Descriptor(number), encoding="utf-8", errors="backslashreplace", write_through=True
    )


def _keep_stream(stream: TextIO, number: int) -> TextIO:
    """Return a stream to the current target of `stream`, also if descriptor `number` changes
    later."""
    try:
        same = stream.fileno() == number
    except (OSError, ValueError):  # in memory, as in a test
        return stream
    if not same:
        return stream
    return open(
        os.dup(number), "w", encoding=stream.encoding, errors="backslashreplace", buffering=1
    )


class _ConsoleHandler(logging.StreamHandler):
    """Log lines to stderr, above the progress line."""

    def __init__(self, console: "Console") -> None:
        super().__init__(console.err)
        self._console = console

    def filter(self, record: logging.LogRecord) -> bool:
        hidden = getattr(record, "file_only", False) and not self._console.verbose
        return not hidden and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        with _bars_cleared():
            super().emit(record)


class Console:
    """The output of one command. It is a context manager; only one is in use at a time.

    However the block ends, the descriptors 1 and 2, `sys.stdout`, `sys.stderr` and the logger are
    restored. If there are several ranks, only the first redirects anything: the launcher gives each
    of the others its own file.

    Args:
        verb: verb of the command; it is a part of the log file's name.
        verbose: show on stderr what libraries print, instead of a log file. Default False.

    Attributes:
        out: the command's stdout, for results.
        err: the command's stderr, for the log.
        log_path: the log file, or None if there is none (`verbose`, another rank, no folder to
            write to).
        is_temporary: whether the log file is removed when the command ends; that of a run's folder
            stays.
    """

    def __init__(self, verb: str, *, verbose: bool = False) -> None:
        self.verb = verb
        self._is_first = os.environ.get(_RANK, "0") == "0"
        self.verbose = verbose or not self._is_first
        self.out: TextIO = sys.stdout
        self.err: TextIO = sys.stderr
        self.log_path: Path | None = None
        self.is_temporary = True
        self._run_log: Path | None = None  # the log file in the run's folder, also with `verbose`
        self._keep = False
        self._told_lost = False
        self.process = os.getpid()
        self._catches_crashes = False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Console":
        global _console
        if not self.verbose:
            self._redirect()
        elif self._is_first:
            self._show_libraries()
        self._take_logger()
        if not self.verbose:
            self._show_our_warnings()
        _console = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _console
        _end_progress()
        if self._catches_crashes:
            faulthandler.disable()
        _console = None
        self._restore.close()
        if self.log_path is not None and self.is_temporary and not self._keep:
            self.log_path.unlink(missing_ok=True)

    # -- descriptors -----------------------------------------------------------------------------

    def _redirect(self) -> None:
        """Let both descriptors lead to the log file."""
        before = self._keep_streams()
        log, reason = self._open_log()
        saved = {number: _duplicate(number) for number in (1, 2)}
        self._restore.callback(self._lead_back, before, saved)
        _lead_streams_to(log)
        sys.stdout, sys.stderr = _open_stream(1), _open_stream(2)
        if reason:
            self.tell(
                f"ppvision: no log file: {reason}. The command continues; the output of libraries "
                "is lost (--verbose shows it)."
            )

    def _show_libraries(self) -> None:
        """Let descriptor 1 lead to stderr, so that results alone reach stdout."""
        before = self._keep_streams()
        saved = {1: _duplicate(1)}
        self._restore.callback(self._lead_back, before, saved)
        if (error := _duplicate(2)) is not None:
            os.dup2(error, 1)
            os.close(error)
        sys.stdout = sys.stderr

    def _keep_streams(self) -> tuple[TextIO, TextIO]:
        """Remember where stdout and stderr lead now, and return both."""
        before = sys.stdout, sys.stderr
        for stream in before:
            stream.flush()
        _flush_c()
        self.out, self.err = _keep_stream(sys.stdout, 1), _keep_stream(sys.stderr, 2)
        return before

    def _lead_back(self, before: tuple[TextIO, TextIO], saved: dict[int, int | None]) -> None:
        sys.stdout, sys.stderr = before
        _flush_c()  # write the buffered output of C code to its own target
        for number, copy in saved.items():
            if copy is None:
                os.close(number)
            else:
                os.dup2(copy, number)
                os.close(copy)
        for stream, first in zip((self.out, self.err), before, strict=True):
            if stream is not first:
                with contextlib.suppress(OSError):  # its reader has ended
                    stream.close()

    def _open_log(self) -> tuple[int, str]:
        """Return a descriptor to write to, and the reason if it is not a file (otherwise an empty
        text)."""
        try:
            handle, name = tempfile.mkstemp(prefix=f"ppvision-{self.verb}-", suffix=".log")
            os.close(handle)
            self.log_path = Path(name)
            return os.open(name, os.O_WRONLY | os.O_APPEND), ""
        except OSError as error:  # no folder for temporary files can be written
            return os.open(os.devnull, os.O_WRONLY), error.strerror or str(error)

    def move_log(self, path: Path) -> None:
        """Continue the log in `path`, after its present content; the file stays.

        If `path` cannot be written, a message says so and the file in use stays the log.
        """
        if self.verbose:
            self._add_file(path)
            return
        _flush_c()
        try:
            with path.open("ab") as target:
                if self.log_path is not None:
                    with self.log_path.open("rb") as source:
                        shutil.copyfileobj(source, target)
                target.flush()
                _lead_streams_to(os.dup(target.fileno()))
        except OSError as error:
            where = "" if self.log_path is None else f" It stays in {self.log_path}."
            self.tell(
                f"ppvision: {path}: the log cannot be written there "
                f"({error.strerror or error}).{where}"
            )
            self._keep = True
            return
        if self.log_path is not None:
            self.log_path.unlink(missing_ok=True)
        self.log_path = self._run_log = path
        self.is_temporary = False

    def _add_file(self, path: Path) -> None:
        try:
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            self.tell(f"ppvision: {path}: the log cannot be written ({error.strerror or error}).")
            return
        handler.setFormatter(_formatter())
        logger.addHandler(handler)
        self._run_log = path
        self._restore.callback(handler.close)

    # -- the log -----------------------------------------------------------------------------------

    def _take_logger(self) -> None:
        """Add our own handlers, because libraries change the level of the root logger."""
        before = logger.handlers, logger.level, logger.propagate

        def restore() -> None:
            logger.handlers, logger.propagate = before[0], before[2]
            logger.setLevel(before[1])

        self._restore.callback(restore)
        handlers: list[logging.Handler] = [_ConsoleHandler(self)]
        if not self.verbose:
            handlers.append(logging.StreamHandler(sys.stderr))  # which leads to the log file
        for handler in handlers:
            handler.setFormatter(_formatter())
        logger.handlers = handlers
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def _show_our_warnings(self) -> None:
        """Write Python's warnings to the log file, and those of ppvision's own code also to
        stderr."""
        before = warnings.showwarning

        def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
            # Our warnings are UserWarnings and name our module that called.
            if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
                logger.warning(str(message))
            before(message, category, filename, lineno, file, line)

        warnings.showwarning = show_warning
        self._restore.callback(setattr, warnings, "showwarning", before)

    def show(self, text: str) -> None:
        """Write a result to stdout."""
        with _bars_cleared():
            print(text, file=self.out, flush=True)

    def tell(self, text: str) -> None:
        """Write a message to stderr; it is lost if the reader of stderr has ended."""
        with _bars_cleared(), contextlib.suppress(OSError):
            print(text, file=self.err)

    def tell_lost(self, error: OSError) -> None:
        """Report once that the log file cannot be written any more."""
        if not self._told_lost and self.process == os.getpid():
            self._told_lost = True
            self.tell(
                f"ppvision: {self.log_path}: the log cannot be written "
                f"({error.strerror or error}). The command continues without it."
            )

    def tell_last(self, line: str) -> None:
        """Write a message before the process ends, even if its terminal is closed (SIGHUP)."""
        _end_progress()
        for stream, text in ((self.out, ""), (self.err, line and f"{line}\n")):
            try:
                stream.write(text)
                stream.flush()
            except OSError:  # otherwise Python would fail again at its end, with another exit code
                drop_stream(stream)

    def log(self, text: str) -> None:
        """Write a text to the log of the run, so that the log says why the run ended."""
        if self._run_log is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), self._run_log.open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")

    def tell_tail(self) -> None:
        """After a failure: show the last lines of the log file and its path, and keep it."""
        _end_progress()
        _flush_c()
        lines = self._read_tail()
        if not lines:
            return
        self._keep = True
        self.tell(f"ppvision: the last lines of {self.log_path}:")
        for line in lines:
            self.tell(f"    {line}")

    def _read_tail(self) -> list[str]:
        if self.log_path is None:
            return []
        try:
            with self.log_path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL_BYTES))
                text = file.read().decode("utf-8", errors="backslashreplace")
        except OSError:
            return []
        # A library's progress bar rewrites its line many times: only the last version counts.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n")]
        shown = ["".join(c for c in x if c.isprintable() or c == "\t") for x in lines if x.strip()]
        return [line[:_LINE_LENGTH] for line in shown[-TAIL_LINES:]]

    def show_crashes(self) -> None:
        """Let a crash in C code (SIGSEGV, SIGABRT, ...) write Python's traceback to stderr.

        If the process already does so (pytest), nothing changes. Call it after Paddle's own
        handlers are removed.
        """
        if self.log_path is None or faulthandler.is_enabled():
            return
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            faulthandler.enable(self.err)
            self._catches_crashes = True


def _formatter() -> logging.Formatter:
    return logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:  # closed since the command started
        return None


def _lead_streams_to(log: int) -> None:
    """Redirect descriptors 1 and 2 to the target of `log`, and close `log`."""
    for number in (1, 2):
        if log != number:
            os.dup2(log, number)
    if log > 2:
        os.close(log)


def _flush_c() -> None:
    """Write the buffered stdout of C code before its descriptor is redirected."""
    import ctypes  # here, because its import is slow and --help does not need it

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def drop_stream(stream: TextIO) -> None:
    """Discard the output to a stream whose reader has ended."""
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)


# -- for all modules -------------------------------------------------------------------------------


def show(text: str) -> None:
    """Write a result to the command's stdout."""
    if _console is None:
        print(text, flush=True)
    else:
        _console.show(text)


def tell(text: str) -> None:
    """Write a message to the command's stderr."""
    if _console is None:
        print(text, file=sys.stderr)
    else:
        _console.tell(text)


def log(text: str) -> None:
    """See `Console.log`; does nothing without a console."""
    if _console is not None:
        _console.log(text)


def find_result_stream() -> TextIO:
    """The command's stdout."""
    return sys.stdout if _console is None else _console.out


def tell_last(line: str) -> None:
    """See `Console.tell_last`."""
    (_console or Console("")).tell_last(line)


def show_crashes() -> None:
    """See `Console.show_crashes`; does nothing without a console."""
    if _console is not None:
        _console.show_crashes()


def is_verbose() -> bool:
    """Whether the command shows every log line, also those with numbers of steps."""
    return _console is not None and _console.verbose


def move_log(path: Path) -> None:
    """See `Console.move_log`; does nothing without a console."""
    if _console is not None:
        _console.move_log(path)


# -- progress --------------------------------------------------------------------------------------


@functools.cache
def _bar_class() -> type:
    """Return a tqdm bar for one line of a terminal. It is imported here, because `ppvision doctor`
    runs without it."""
    from tqdm import tqdm

    class Bar(tqdm):
        # tqdm's monitor would start a thread, and its lock is shared with forked processes: if one
        # of them is killed while it holds the lock, this process would wait forever.
        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar


_PLAIN = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_PLAIN_OPEN = "{desc}: {n_fmt} {unit} [{elapsed}, {rate_fmt}{postfix}]"  # unknown length


class ProgressLine:
    """One line that shows the progress of a piece of work: speed, time left, and a note.

    On a terminal the line updates. Elsewhere a command writes a plain line every 30 seconds and one
    at the end. A line that begins inside another line is shown in the outer line. As a context
    manager, it begins and ends with the block.

    Args:
        what: one or two words before the numbers.
        total: number of units; None if it is not known.
        unit: name of one unit; "B" for bytes.
        start: number of units that are done already.
        hidden: show nothing (for ranks other than the first).
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str = "img",
        *,
        start: int = 0,
        hidden: bool = False,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.count = self._start = start
        self.hidden = hidden
        self._note = ""
        self.bar: Any | None = None
        self._outer: ProgressLine | None = None
        self._plain = False
        self._written = start  # number of units in the last plain line
        self._began = self._told = time.monotonic()

    def __enter__(self) -> "ProgressLine":
        if self.hidden:
            return self
        self._outer = _open[-1] if _open else None
        _open.append(self)
        err = sys.stderr if _console is None else _console.err
        if self._outer is not None:
            self._outer._show_inner(self)
        elif err.isatty():
            self.bar = _bar_class()(
                total=self.total,
                initial=self.count,
                desc=self.what,
                unit=self.unit,
                unit_scale=self.unit == "B",
                dynamic_ncols=True,
                file=err,
            )
        else:
            self._plain = _console is not None and not _console.verbose
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Add `count` units that are done; `note` replaces the text after the numbers."""
        self.count += count
        if note is not None:
            self._note = note
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal is closed
                if note is not None:
                    self.bar.set_postfix_str(note, refresh=False)
                self.bar.update(count)
        elif self._outer is not None:
            self._outer._show_inner(self)
        elif self._plain and time.monotonic() - self._told >= _PLAIN_INTERVAL:
            self.write_line()

    def write_line(self) -> None:
        """Write a plain line now, if lines do not update here."""
        if self._plain and _console is not None and self._written != self.count:
            self._written = self.count
            self._told = time.monotonic()
            _console.tell(self._text())

    def close(self) -> None:
        """End the line; a second call does nothing."""
        if self not in _open:
            return
        _open.remove(self)
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
        elif self._outer is not None:
            self._outer._show_inner(None)
        else:
            self.write_line()

    def _show_inner(self, inner: "ProgressLine | None") -> None:
        """Show the progress of work inside this work."""
        if self.bar is None:
            return
        text = self._note
        if inner is not None:
            part = f"{inner.count}/{inner.total}" if inner.total else str(inner.count)
            text = f"{text}, {inner.what} {part}" if text else f"{inner.what} {part}"
        self.bar.set_postfix_str(text, refresh=False)
        # As often as tqdm itself would.
        if time.monotonic() - self._told >= self.bar.mininterval or inner is None:
            self._told = time.monotonic()
            with contextlib.suppress(OSError):
                self.bar.refresh()

    def _text(self) -> str:
        return _bar_class().format_meter(
            self.count,
            self.total,
            time.monotonic() - self._began,
            prefix=self.what,
            unit=self.unit,
            unit_scale=self.unit == "B",
            initial=self._start,
            bar_format=_PLAIN if self.total else _PLAIN_OPEN,
            postfix=self._note or None,
        )


_open: list[ProgressLine] = []  # lines, the inner ones last


def track(
    items: Iterable[Item],
    what: str,
    total: int | None = None,
    unit: str = "img",
    *,
    hidden: bool = False,
) -> Iterator[Item]:
    """Yield the items one after another with a `ProgressLine`; `total` defaults to their `len`."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with ProgressLine(what, total, unit, hidden=hidden) as progress:
        for item in items:
            yield item
            progress.update()


def _end_progress() -> None:
    """End all lines, so that later output comes after them."""
    for progress in reversed(_open.copy()):
        progress.close()


@contextlib.contextmanager
def _bars_cleared() -> Iterator[None]:
    """Hide the progress line during the block, and draw it again afterwards."""
    # A forked process has a copy of the lines, but they belong to the parent.
    ours = _console is not None and _console.process == os.getpid()
    bars = [line.bar for line in _open if line.bar is not None] if ours else []
    for bar in bars:
        with contextlib.suppress(OSError):  # the terminal is closed
            bar.clear()
    try:
        yield
    finally:
        for bar in bars:
            with contextlib.suppress(OSError):
                bar.refresh()
