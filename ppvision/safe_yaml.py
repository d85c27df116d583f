"""Read YAML of configurations safely, with the place of every key, and write it.

Safe means that a file creates only plain values, and not more than its size allows: sizes, also of
repetitions by aliases, are checked before values are created.
"""

import math
import re
from collections.abc import Hashable
from typing import IO, Any

import yaml

from ppvision.errors import shorten, shorten_text

# The longest config of PaddleDetection has 0.01 MB; names of 21,841 classes take 0.4 MB.
MAX_BYTES = 1 << 20
MAX_VALUES = 60_000  # PyYAML needs 600 bytes for each: 36 MB
MAX_DEPTH = 50
_MAX_NUMBER = 64  # characters
_MAX_KEY = 200  # characters; keys occur in messages
_INTEGERS = 1 << 63  # frameworks do not read larger integers


class Located(dict):
    """A mapping that knows the place of each key: `where[key]` is `file:line`."""

    def __init__(self, content: dict, where: dict[object, str]) -> None:
        super().__init__(content)
        self.where = where

    def place(self, key: object) -> str:
        """Return ` (file:line)` of a key, or an empty text if it is not known."""
        return f" ({self.where[key]})" if key in self.where else ""


class Tagged(Located):
    """A mapping that describes an object of PaddleDetection: `!COCODataSet {...}`.

    Attributes:
        tag: the tag without the exclamation mark.
        place_of_tag: `file:line`.
    """

    def __init__(self, tag: str, place_of_tag: str, content: Located) -> None:
        super().__init__(content, content.where)
        self.tag, self.place_of_tag = tag, place_of_tag


def drop_places(node: object) -> Any:
    """Return the content without places: dictionaries and lists for libraries. Tags stay."""
    if isinstance(node, Tagged):
        return Tagged(node.tag, node.place_of_tag, Located(drop_places(dict(node)), {}))
    if isinstance(node, dict):
        return {key: drop_places(value) for key, value in node.items()}
    return [drop_places(item) for item in node] if isinstance(node, list) else node


def _refuse(node: yaml.Node, text: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


class BoundedLoader(yaml.SafeLoader):
    """PyYAML's SafeLoader with limits on size, number and depth of values (also by aliases), and on
    numbers.

    Raises:
        yaml.YAMLError: a limit is exceeded, or a value does not fit its tag.
    """

    def __init__(self, stream: IO[str] | str) -> None:
        text = stream if isinstance(stream, str | bytes) else stream.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise yaml.YAMLError(f"expected at most {MAX_BYTES} bytes, got more")
        super().__init__(text)
        self.name = getattr(stream, "name", self.name)  # the name for places
        self._values = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        self._values += 1
        self._depth += 1
        mark = self.peek_event().start_mark
        for found, most, what in (
            (self._values, MAX_VALUES, "values"),
            (self._depth, MAX_DEPTH, "levels of values in values"),
        ):
            if found > most:
                raise yaml.composer.ComposerError(
                    None, None, f"expected at most {most} {what}, got more", mark
                )
        node = super().compose_node(parent, index)
        self._depth -= 1
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if is_key and isinstance(node, yaml.ScalarNode) and len(node.value) > _MAX_KEY:
            raise _refuse(
                node, f"expected a key of at most {_MAX_KEY} characters, got a longer one"
            )
        return node

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        _count_values(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > _MAX_NUMBER:
            raise _refuse(
                node,
                f"expected a number of at most {_MAX_NUMBER} characters, got {len(node.value)}",
            )
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"expected a value of {node.tag}, got {shorten(node.value)}"
            raise _refuse(node, text) from error  # `2001-99-99`, or `!!int x`
        if isinstance(value, int) and not -_INTEGERS <= value < _INTEGERS:
            raise _refuse(node, f"expected an integer of 64 bits, got {shorten(value)}")
        if isinstance(value, float) and math.isinf(value) and "inf" not in node.value.lower():
            raise _refuse(node, f"expected a number of 64 bits, got {shorten(node.value)}")
        return value


def _count_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Count the values below a node; those of aliases count at each place.

    Args:
        known: counts by the node's id; None while a node is counted.
    """
    if id(node) not in known:
        known[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        count = 1 + sum(_count_values(child, known) for child in children)
        if count > MAX_VALUES:
            raise _refuse(node, f"expected at most {MAX_VALUES} values, its aliases make more")
        known[id(node)] = count
    elif known[id(node)] is None:
        raise _refuse(node, "expected values that end, got an alias of a value that contains it")
    return known[id(node)]


class _Loader(BoundedLoader):
    """The loader for configurations. It refuses tags for Python objects. Mappings are `Located`, a
    key may occur only once, and `1e-3` is a number (in YAML 1.1 it is text, because it has no
    dot)."""


def _add_numbers(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """Resolve `1e-3` as a number. A dumper quotes texts that look like it."""
    number = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))


_add_numbers(_Loader)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Located:
    where: dict[object, str] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable):
            mark = key_node.start_mark
            place = f"{mark.name}:{mark.line + 1}"
            if key in where:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shorten(key)} is written twice, before at {where[key]}", mark
                )
            where[key] = place
    loader.flatten_mapping(node)
    return Located(yaml.SafeLoader.construct_mapping(loader, node, deep=True), where)


def _construct_tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Tagged:
    if len(tag) > _MAX_KEY:
        raise _refuse(node, f"expected a tag of at most {_MAX_KEY} characters, got a longer one")
    if not isinstance(node, yaml.MappingNode):
        raise _refuse(node, f"expected keys and values behind !{tag}")
    place = f"{node.start_mark.name}:{node.start_mark.line + 1}"
    return Tagged(tag, place, _construct_mapping(loader, node))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_multi_constructor("!", _construct_tagged)


class _Dumper(yaml.SafeDumper):
    """Writes YAML for `_Loader`."""


_add_numbers(_Dumper)

_Dumper.add_representer(Located, lambda dumper, node: dumper.represent_dict(node))
_Dumper.add_representer(
    Tagged, lambda dumper, node: dumper.represent_mapping(f"!{node.tag}", dict(node))
)


def format_yaml(content: dict) -> str:
    """Return a config as YAML, with its tags."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _ShortDumper(_Dumper):
    """Write a repeated value again, without an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def format_short_yaml(content: dict) -> str:
    """Return plain values as YAML without aliases; lists and mappings of single values are on one
    line."""
    return yaml.dump(
        content,
        Dumper=_ShortDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
    )


def load_yaml(text: str, name: str) -> object:
    """Read one YAML document; `name` is used in places and errors.

    Raises:
        yaml.YAMLError: the text is not YAML, has a Python object or a key twice, or is larger than
            our documents (`BoundedLoader`). The message is short.
    """
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise yaml.YAMLError(shorten_text(str(error))) from error


def find_tagged(node: object) -> Tagged | None:
    """Return the first tag in a document."""
    if isinstance(node, Tagged):
        return node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for child in children if (found := find_tagged(child)) is not None), None)
