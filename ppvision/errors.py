"""The errors that ppvision raises.

Every error that a user can correct is a `PpvisionError`. It is also the built-in type that fits, so
that `except ValueError` catches it. Its message says what was expected, what was found and what to
do; the command line shows it as one message. Any other exception is a fault of ppvision or of a
library that it uses: the command line shows its traceback.
"""

import os
from collections.abc import Iterable
from difflib import get_close_matches


class PpvisionError(Exception):
    """An error that a user can correct."""


class InputError(PpvisionError, ValueError):
    """An argument, a flag or an array is not what was expected."""


class InputTypeError(PpvisionError, TypeError):
    """An argument has the wrong type, or a function was called with an unknown one."""


class ConfigError(PpvisionError, ValueError):
    """A configuration cannot be read, or names something unknown."""


class DataError(PpvisionError, ValueError):
    """A data set, a list or an image is not what training, prediction or conversion needs."""


class WeightsError(PpvisionError, ValueError):
    """Weights cannot be read, or do not fit the model."""


class ManifestError(PpvisionError, ValueError):
    """An exported folder's `deploy.yaml`, or a file that it names, is not as it was written."""


class MissingFileError(PpvisionError, FileNotFoundError):
    """A file or folder that was named is not there."""


class FolderInUseError(PpvisionError, FileExistsError):
    """A folder to be written holds other files, or another process is writing it."""


class StorageError(PpvisionError, OSError):
    """The system refused to read or write: a full disk, missing rights, a device that failed."""


class MissingPackageError(PpvisionError, ImportError):
    """An optional package is needed and not installed."""


class EngineError(PpvisionError, RuntimeError):
    """An inference engine, a converter or the tracer could not do what it was asked."""


class DivergenceError(PpvisionError, FloatingPointError):
    """A loss or gradient of training is not finite."""


class LibraryError(PpvisionError, RuntimeError):
    """PaddleSeg or PaddleDetection raised an error while it built or ran a component of a
    configuration; the cause is attached."""


_SHOWN = 80  # characters of a value in a message: one line of a terminal
_LEVELS = 4  # of containers in containers


def shorten(value: object) -> str:
    """Return the text of a user's value for a message: its `repr`, at most 80 characters long."""
    text = _show(value, _SHOWN, _LEVELS)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def shorten_text(text: str, room: int = 1000) -> str:
    """Return a message of a library, without its middle if it is longer than `room` characters."""
    half = (room - 5) // 2
    return text if len(text) <= room else f"{text[:half]} ... {text[-half:]}"


def show_path(path: str | os.PathLike[str]) -> str:
    """Return the text of a path for a message. Bytes that are not text, and characters that would
    control a terminal or begin a line, are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def suggest_nearest(name: str, known: Iterable[object]) -> str:
    """Return `Did you mean ...?` with the closest names of `known`, or list all of them."""
    names = sorted(map(str, known))  # a user's own keys may be numbers
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {shorten_text(', '.join(names)) or 'none'}."


def _show(value: object, room: int, levels: int) -> str:
    """Return `repr` at a cost that does not grow with the value; text beyond `room` may be
    omitted."""
    if isinstance(value, str | bytes | bytearray):
        return repr(value[: room + 1])  # one character more than fits shows that the text is longer
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:
        # Python refuses to write integers of more than 4300 digits.
        return f"<an integer of {int(value.bit_length() * 0.30103) + 1} digits>"
    if isinstance(value, dict | list | tuple):
        return _show_container(value, room, levels)
    try:
        return repr(value)
    except Exception:  # an object of other code may raise anything
        return f"<a {type(value).__name__}>"


def _show_container(value: dict | list | tuple, room: int, levels: int) -> str:
    kind = dict if isinstance(value, dict) else type(value)
    start, end = tuple({dict: "{}", list: "[]"}.get(kind, "()"))
    parts = []
    for item in value:
        if levels == 0 or room <= 0:
            parts.append("...")
            break
        part = _show(item, room, levels - 1)
        if isinstance(value, dict):
            part += f": {_show(value[item], room, levels - 1)}"
        parts.append(part)
        room -= len(part) + 2
    one = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return f"{start}{', '.join(parts)}{one}{end}"
