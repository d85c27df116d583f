"""One checker for our own formats: `deploy.yaml`, `slim_config`, configurations of classification,
options of training.

A format is a dataclass. The annotation of a field states its possible values; a field with a
default may be omitted:

    @dataclass(frozen=True, kw_only=True)
    class Schedule:
        learning_rate: Annotated[float, number(0)]
        warmup_epochs: Annotated[int, whole(0)] = 0
        shape: Literal["cosine", "linear"] = "cosine"

    schedule = build(Schedule, load_yaml(text, "job.yml"), "lr_scheduler")

For `bool`, `str`, `Any`, `Literal`, `X | None`, `list[X]`, `dict[K, V]` and other such dataclasses
the annotation is enough; a range is in `Annotated`. A value is never converted: `true` is not a
number, and `1` is not text. An error names the place of the value (its path, and file and line if
the mapping is `Located`), what was expected and what was found, and the nearest valid key.
"""

import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from math import inf
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ppvision.errors import InputError, shorten, suggest_nearest

_KEY = 60  # characters of a key in a path

# The default of a key that may be omitted, but not be null like `X | None`.
LEFT_OUT: Any = None

T = TypeVar("T")


class Place(NamedTuple):
    """Position of a value in a file.

    Attributes:
        path: the keys that lead to it, separated by dots; empty for the whole document.
        line: `file:line` of the last of these keys that has one; empty if none has.
    """

    path: str = ""
    line: str = ""

    def inside(self, owner: object, key: object) -> "Place":
        """Return the place of an entry of the mapping or list `owner` at this place."""
        name = key[:_KEY] if isinstance(key, str) else shorten(key)
        return Place(f"{self.path}.{name}" if self.path else name, self.line_of(owner, key))

    def line_of(self, owner: object, key: object) -> str:
        """Return `file:line` of a key of the mapping `owner` at this place."""
        # `safe_yaml.Located` has `where`. It is not imported, because this would import PyYAML.
        return getattr(owner, "where", {}).get(key, self.line)


# Takes a value and its place; returns the value (lists and mappings are copied), or raises
# `SchemaError`.
Check = Callable[[Any, Place], Any]


class SchemaError(InputError):
    """A value is not valid in its format.

    Attributes:
        line: `file:line`, or empty.
    """

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(f"{place.path}: {text}" if place.path else text)
        self.line = place.line

    @property
    def sentence(self) -> str:
        """Return the message with a mark at its end."""
        text = str(self)
        return text if text.endswith((".", "?")) else f"{text}."


def refuse(value: object, place: Place, expected: str) -> SchemaError:
    """Return the error for a value."""
    return SchemaError(place, f"expected {expected}, got {shorten(value)}")


# -- from a dataclass ------------------------------------------------------------------------------


def build(kind: type[T], content: object, path: str = "", line: str = "") -> T:
    """Build a dataclass from keys and values.

    Args:
        kind: the dataclass.
        content: a mapping, with or without places.
        path: path of the mapping in its document, for messages.
        line: `file:line` of the mapping, or empty.

    Raises:
        SchemaError: a key is unknown or missing, or a value has another type or is out of range.
    """
    return check_of(kind)(content, Place(path, line))


def check_values(instance: object) -> None:
    """Raise `SchemaError` if a field of a dataclass does not have a valid value."""
    for name, check in collect_checks(type(instance)).items():
        check(getattr(instance, name), Place(name))


@cache
def collect_checks(kind: type) -> dict[str, Check]:
    """Return the check of each field of a dataclass, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {entry.name: check_of(hints[entry.name]) for entry in fields(kind)}


def check_of(annotation: Any) -> Check:
    """Return the check for an annotation.

    Raises:
        TypeError: the annotation is not enough, such as `int` without a range.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    count = Count()
    if origin is Annotated:
        annotation, *said = parts
        origin, parts = get_origin(annotation), get_args(annotation)
        counts = [entry for entry in said if isinstance(entry, Count)]
        if not counts:
            return said[0]
        count = counts[0]
    simple = {bool: flag, str: text(), Any: take_any}
    if annotation in simple:
        return simple[annotation]
    if origin is Literal:
        return one_of(*parts)
    if origin is list:
        return _list_of(check_of(parts[0]), count)
    if origin is dict:
        return _mapping_of(check_of(parts[0]), check_of(parts[1]), count)
    if origin in (Union, types.UnionType) and len(parts) == 2 and parts[1] is type(None):
        return optional(check_of(parts[0]))
    if is_dataclass(annotation):
        return _fields_of(annotation)
    raise TypeError(f"expected an annotation that says what a value may be, got {annotation}")


def _fields_of(kind: type) -> Check:
    checks = collect_checks(kind)
    required = [
        entry.name
        for entry in fields(kind)
        if entry.default is MISSING and entry.default_factory is MISSING
    ]

    def check(value: Any, place: Place) -> Any:
        if not isinstance(value, dict):
            raise refuse(value, place, "keys and values")
        check_keys(value, checks, place)
        if missing := [name for name in required if name not in value]:
            raise SchemaError(place, f"expected {', '.join(missing)}, got none")
        return kind(**{k: checks[k](item, place.inside(value, k)) for k, item in value.items()})

    return check


def check_keys(value: Mapping, known: Iterable[str], place: Place) -> None:
    """Raise `SchemaError` for a key of a mapping that is not in `known`."""
    for key in value:
        if key not in known:
            raise SchemaError(
                Place(place.path, place.line_of(value, key)),
                f"expected only known keys, got {shorten(key)}. {suggest_nearest(str(key), known)}",
            )


# -- checks of lists and mappings ------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """The number of values of a list or mapping, both limits included.

    Attributes:
        described: description of the whole, for messages.
    """

    least: int = 0
    most: float = inf
    described: str = ""

    def refuse(self, value: object, place: Place, what: str) -> SchemaError:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        limit = "" if self == Count() else f" of {count} entries"
        return refuse(value, place, self.described or what + limit)


def optional(check: Check) -> Check:
    """Make a check that accepts null, or what another check accepts."""
    return lambda value, place: None if value is None else check(value, place)


def _list_of(check: Check, count: Count) -> Check:
    def check_list(value: Any, place: Place) -> list:
        if not isinstance(value, list) or not count.least <= len(value) <= count.most:
            raise count.refuse(value, place, "a list")
        return [check(item, place.inside(value, i)) for i, item in enumerate(value)]

    return check_list


def _mapping_of(key: Check, check: Check, count: Count) -> Check:
    def check_mapping(value: Any, place: Place) -> dict:
        if not isinstance(value, dict) or not count.least <= len(value) <= count.most:
            raise count.refuse(value, place, "keys and values")
        found = {}
        for k, item in value.items():
            key(k, Place(f"{place.path}: a key", place.line_of(value, k)))
            found[k] = check(item, place.inside(value, k))
        return found

    return check_mapping


def plain_mapping(most: int, depth: int) -> Check:
    """Make a check for plain YAML values without Python objects: at most `most` values in `depth`
    levels."""

    def check(value: Any, place: Place) -> Any:
        left = most
        if not isinstance(value, dict):
            raise refuse(value, place, "keys and values")

        def copy(node: Any, level: int) -> Any:
            nonlocal left
            left -= 1
            if left < 0 or level > depth:
                raise SchemaError(place, f"expected at most {most} values in {depth} levels")
            if isinstance(node, dict):
                return {copy(k, level + 1): copy(v, level + 1) for k, v in node.items()}
            if isinstance(node, list):
                return [copy(item, level + 1) for item in node]
            if node is None or isinstance(node, (bool, int, float, str)):
                return node
            raise refuse(node, place, "text, numbers, true, false, null, lists and mappings")

        return copy(value, 1)

    return check


# -- checks of single values -----------------------------------------------------------------------


def take_any(value: Any, place: Place) -> Any:
    """Accept any value; other code checks it."""
    return value


def flag(value: Any, place: Place) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise refuse(value, place, "true or false")
    return value


def number(lowest: float, highest: float = inf, kinds: Any = (int, float)) -> Check:
    """Make a check for a finite number in a range, both limits included."""
    limits = f"from {lowest} to {highest}" if highest < inf else f"of at least {lowest}"
    expected = f"a {'whole ' if kinds is int else ''}number {limits}"

    def check(value: Any, place: Place) -> Any:
        # Comparisons with NaN are false.
        fits = _is_number(value, kinds) and lowest <= value <= highest and value != inf
        if not fits:
            raise refuse(value, place, expected)
        return value

    return check


def whole(lowest: int, highest: float = inf) -> Check:
    """Make a check for a whole number in a range, both limits included."""
    return number(lowest, highest, int)


def between(low: float, high: float = inf) -> Check:
    """Make a check for a finite number in a range without its limits."""
    expected = f"a finite number above {low}" + (f" and below {high}" if high < inf else "")

    def check(value: Any, place: Place) -> float:
        if not _is_number(value, (int, float)) or not low < value < high:
            raise refuse(value, place, expected)
        return value

    return check


def _is_number(value: object, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def text(longest: float = inf, pattern: str = "", described: str = "text") -> Check:
    """Make a check for text of at most `longest` characters that fully matches a regular
    expression."""
    limit = f" of at most {longest} characters" if longest < inf else ""

    def check(value: Any, place: Place) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise refuse(value, place, described + limit)
        if pattern and not re.fullmatch(pattern, value):
            raise refuse(value, place, described)
        return value

    return check


def one_of(*known: str | int) -> Check:
    """Make a check for one of a few values, of the same type."""

    def check(value: Any, place: Place) -> Any:
        if any(type(value) is type(k) and value == k for k in known):
            return value
        hint = suggest_nearest(value[:_KEY], known) if isinstance(value, str) else ""
        hint = f". {hint}" if hint.startswith("Did") else ""  # all values are named anyway
        listed = ", ".join(map(str, known))
        raise SchemaError(place, f"expected one of {listed}, got {shorten(value)}{hint}")

    return check
