"""Checks of values that a file holds: type and range, with the value's place in the message.

A check takes a value and its place (`files.model.json.bytes`) and returns the value, lists and
mappings as new ones. It raises `InputError` for a value of another type or out of range. A value
is never converted: `true` is no number, and `1` is no text.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from ppvision.errors import InputError

Check = Callable[[Any, str], Any]

SHOWN = 60  # characters of a value in a message


def show_value(value: object) -> str:
    """A value for a message: its first characters, or its type where it is a list or mapping."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print long ones
        return "a whole number of more than 64 bits"
    if isinstance(value, (str, bytes)):
        text = repr(value[:SHOWN])
        return text if len(value) <= SHOWN else f"{text}... ({len(value)} characters)"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        if len(value) <= 6 and all(isinstance(v, (int, float, type(None))) for v in value):
            return f"[{', '.join(map(show_value, value))}]"
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"keys and values, {len(value)} of them"
    return type(value).__name__


def refuse(value: object, where: str, expected: str) -> InputError:
    """The error of a check."""
    return InputError(f"{where}: expected {expected}, got {show_value(value)}")


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise refuse(value, where, "true or false")
    return value


def whole(lowest: int, highest: int) -> Check:
    """A whole number in a range, both ends included."""

    def check(value: Any, where: str) -> int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not lowest <= value <= highest:
            raise refuse(value, where, f"a whole number from {lowest} to {highest}")
        return value

    return check


def number(lowest: float, highest: float) -> Check:
    """A finite number in a range, both ends included."""

    def check(value: Any, where: str) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN compares with nothing; a whole number may be too large for a float.
        if not is_number or not lowest <= value <= highest or not math.isfinite(value):
            raise refuse(value, where, f"a number from {lowest:g} to {highest:g}")
        return value

    return check


def text(longest: int, pattern: str = "", described: str = "text") -> Check:
    """Text of at most `longest` characters that matches a regular expression as a whole."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise refuse(value, where, f"{described} of at most {longest} characters")
        if pattern and not re.fullmatch(pattern, value):
            raise refuse(value, where, described)
        return value

    return check


def one_of(*known: str | int) -> Check:
    """One of a few values, of its type."""

    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(k) and value == k for k in known):
            raise refuse(value, where, f"one of {', '.join(map(str, known))}")
        return value

    return check


def optional(check: Check) -> Check:
    """Null, or what another check takes."""
    return lambda value, where: None if value is None else check(value, where)


def list_of(check: Check, least: int, most: int) -> Check:
    """A list of `least` to `most` values."""

    def check_list(value: Any, where: str) -> list:
        if not isinstance(value, list) or not least <= len(value) <= most:
            count = f"{least} to {most}" if least < most else f"{least}"
            raise refuse(value, where, f"a list of {count} values")
        return [check(item, f"{where}[{place}]") for place, item in enumerate(value)]

    return check_list


def mapping_of(key: Check, check: Check, most: int) -> Check:
    """At most `most` keys and values."""

    def check_mapping(value: Any, where: str) -> dict:
        if not isinstance(value, dict) or len(value) > most:
            raise refuse(value, where, f"at most {most} keys and values")
        return {
            key(k, f"{where}: a key"): check(item, _inside(where, k)) for k, item in value.items()
        }

    return check_mapping


def record(required: Mapping[str, Check], more: Mapping[str, Check] | None = None) -> Check:
    """Keys that are known, `required` ones all there, each with a check of its own."""
    known = {**required, **(more or {})}

    def check(value: Any, where: str) -> dict:
        if not isinstance(value, dict):
            raise refuse(value, where, "keys and values")
        if missing := [name for name in required if name not in value]:
            raise InputError(f"{_before(where)}lacks {_listed(missing)}")
        if unknown := [name for name in value if name not in known]:
            raise InputError(f"{_before(where)}has unknown keys {_listed(unknown)}")
        return {name: known[name](item, _inside(where, name)) for name, item in value.items()}

    return check


def fields_of(kind: type) -> Check:
    """An instance of a dataclass from keys and values; the type of each of its fields is
    `Annotated[type, check]`.

    Fields with a default may be missing.
    """
    required, more, types = {}, {}, get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        has_default = entry.default is not MISSING or entry.default_factory is not MISSING
        (more if has_default else required)[entry.name] = types[entry.name].__metadata__[0]
    checked = record(required, more)
    return lambda value, where: kind(**checked(value, where))


def plain_mapping(most: int, depth: int) -> Check:
    """Keys and values as YAML holds them without Python objects, of at most `most` values in
    `depth` levels."""

    def check(value: Any, where: str) -> Any:
        left = most
        if not isinstance(value, dict):
            raise refuse(value, where, "keys and values")

        def copy(node: Any, level: int) -> Any:
            nonlocal left
            left -= 1
            if left < 0 or level > depth:
                raise InputError(f"{where}: expected at most {most} values in {depth} levels")
            if isinstance(node, dict):
                return {copy(k, level + 1): copy(v, level + 1) for k, v in node.items()}
            if isinstance(node, list):
                return [copy(item, level + 1) for item in node]
            if node is None or isinstance(node, (bool, int, float, str)):
                return node
            raise refuse(node, where, "text, numbers, true, false, null, lists and mappings")

        return copy(value, 1)

    return check


def _before(where: str) -> str:
    return f"{where}: " if where else ""


def _inside(where: str, key: object) -> str:
    """The place of a key's value; `where` is empty for the document."""
    name = key[:SHOWN] if isinstance(key, str) else show_value(key)
    return f"{where}.{name}" if where else name


def _listed(names: Sequence[object]) -> str:
    """Names for a message."""
    few = ", ".join(n[:SHOWN] if isinstance(n, str) else show_value(n) for n in names[:8])
    return few if len(names) <= 8 else f"{few}, ..."
