"""YAML as configurations have it: read safely, with the place of every key, and written again."""

import re
from collections.abc import Hashable

import yaml


class Located(dict):
    """A mapping that knows where each of its keys was written: `where[key]` is `file:line`."""

    def __init__(self, content: dict, where: dict[object, str]) -> None:
        super().__init__(content)
        self.where = where

    def place(self, key: object) -> str:
        """` (file:line)` of a key, or nothing where it is not known."""
        return f" ({self.where[key]})" if key in self.where else ""


class Tagged(Located):
    """A mapping that stands for an object of PaddleDetection's: `!COCODataSet {...}`.

    Attributes:
        tag: without the exclamation mark.
        place_of_tag: `file:line`.
    """

    def __init__(self, tag: str, place_of_tag: str, content: Located) -> None:
        super().__init__(content, content.where)
        self.tag, self.place_of_tag = tag, place_of_tag


def plain(node: object) -> object:
    """The same without the places: dictionaries and lists as libraries expect them. Tags stay."""
    if isinstance(node, Tagged):
        return Tagged(node.tag, node.place_of_tag, Located(plain(dict(node)), {}))
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return [plain(item) for item in node] if isinstance(node, list) else node


class _Loader(yaml.SafeLoader):
    """Safe: a tag that would make a Python object is refused. Mappings are `Located`, a key may
    stand only once, and `1e-3` is a number (YAML 1.1 takes it for text, since it has no dot)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
                    None, None, f"{key!r} is written twice, before at {where[key]}", mark
                )
            where[key] = place
    loader.flatten_mapping(node)
    return Located(yaml.SafeLoader.construct_mapping(loader, node, deep=True), where)


def _construct_tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Tagged:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(
            None, None, f"expected keys and values behind !{tag}", node.start_mark
        )
    place = f"{node.start_mark.name}:{node.start_mark.line + 1}"
    return Tagged(tag, place, _construct_mapping(loader, node))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_multi_constructor("!", _construct_tagged)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


_Dumper.add_representer(Located, lambda dumper, node: dumper.represent_dict(node))
_Dumper.add_representer(
    Tagged, lambda dumper, node: dumper.represent_mapping(f"!{node.tag}", dict(node))
)


def yaml_text(content: dict) -> str:
    """A config as YAML, tags and all."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_yaml(text: str, name: str) -> object:
    """Read one YAML document; `name` stands in places and errors.

    Raises:
        yaml.YAMLError: not YAML, a Python object, or a key written twice.
    """
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
