"""Check the arguments of the Python interface: each argument's type, before any work starts.

`ppvision.schema` checks the values in files.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppvision.errors import (
    InputError,
    InputTypeError,
    MissingFileError,
    StorageError,
    shorten,
    shorten_text,
)


def check_path(value: object, argument: str, expected: str = "a path") -> Path:
    """Return a path: of an existing file or folder, or of one to be made.

    Args:
        value: text or a `PathLike` of text.
        argument: its name in the error.
        expected: what it may be, for the error.

    Raises:
        InputTypeError: another type; bytes too.
        InputError: text that the system does not accept as a path.
    """
    try:
        is_text = isinstance(os.fspath(value), str)  # type: ignore[call-overload]
    except TypeError:
        is_text = False
    if not is_text:
        hint = " os.fsdecode makes text of bytes." if isinstance(value, bytes) else ""
        raise InputTypeError(
            f"{argument}: expected {expected}, as text or pathlib.Path, got {shorten(value)}.{hint}"
        )
    path = Path(value)  # type: ignore[arg-type]
    try:
        os.fsencode(path)
        fits = "\0" not in str(path)
    except UnicodeEncodeError:  # half a character, such as "\ud800"
        fits = False
    if not fits:
        raise InputError(f"{argument}: expected {expected}, got {shorten(str(value))}.")
    return path


def check_file(value: object, argument: str, expected: str) -> Path:
    """Return a path that the system can look up. The caller finds out whether it exists.

    Raises:
        InputTypeError, InputError: as `check_path`.
        MissingFileError: a name that no file can have.
        StorageError: the system refuses to look it up.
    """
    path = check_path(value, argument, expected)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        kind = MissingFileError if error.errno == errno.ENAMETOOLONG else StorageError
        shown = shorten_text(str(path), 200)  # the end of a path says the most
        raise kind(
            f"{argument}: expected {expected}, got {shown!r} ({error.strerror}). Check the path "
            "and its rights."
        ) from error
    return path


def check_utf8(path: Path, argument: str) -> None:
    """Raise `InputError` for a path that is not UTF-8: Paddle opens no others."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{argument}: expected a path in UTF-8, got {shorten(str(path))}. Rename the folder, "
            "or use a link with another name."
        ) from error


def check_choice(value: object, argument: str, known: Sequence[str]) -> str:
    """Return one of a few words.

    Raises:
        InputError: another value.
    """
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{argument}: expected one of {', '.join(known)}, got {shorten(value)}.")
    return value


def check_flag(value: object, argument: str, *, optional: bool = False) -> Any:
    """Return True or False, or None if the argument is `optional`.

    Raises:
        InputTypeError: another value: the text "false" would count as true.
    """
    if not isinstance(value, (bool, np.bool_)) and not (optional and value is None):
        known = "None, True or False" if optional else "True or False"
        raise InputTypeError(f"{argument}: expected {known}, got {shorten(value)}.")
    return value if value is None else bool(value)


def check_count(value: object, argument: str, *, least: int = 1, most: int = 2**31 - 1) -> int:
    """Return a whole number; NumPy's are accepted too.

    Raises:
        InputError: another value.
    """
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        raise InputError(
            f"{argument}: expected a whole number from {least} to {most}, got {shorten(value)}."
        )
    return int(value)


def check_text(value: object, argument: str, expected: str = "text") -> str:
    """Text.

    Raises:
        InputTypeError: another type.
    """
    if not isinstance(value, str):
        raise InputTypeError(f"{argument}: expected {expected}, got {shorten(value)}.")
    return value


def check_patterns(value: object, argument: str) -> list[str]:
    """Return a list of shell patterns, from a list or from one pattern.

    Raises:
        InputTypeError: another type.
    """
    patterns = [value] if isinstance(value, str) else value
    is_list = isinstance(patterns, (list, tuple, set, frozenset))
    if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputTypeError(
            f"{argument}: expected a list of shell patterns, got {shorten(value)}."
        )
    return list(patterns)


def check_layer(value: object, argument: str = "model") -> Any:
    """A `paddle.nn.Layer`.

    Raises:
        InputTypeError: another type.
    """
    from paddle import nn  # here, so that a check of a path does not load Paddle

    if not isinstance(value, nn.Layer):
        hint = f" Build it: {value.__name__}(...)." if isinstance(value, type) else ""
        raise InputTypeError(f"{argument}: expected a paddle.nn.Layer, got {shorten(value)}.{hint}")
    return value
