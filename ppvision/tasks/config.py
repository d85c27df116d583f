"""Reading configurations: safely, and stopping at the first wrong name."""

import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from ppvision.zoo.registry import nearest

TASKS = ("segmentation",)


class _Loader(yaml.SafeLoader):
    """Safe, and `1e-3` is a number (YAML 1.1 takes it for text, since it has no dot)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load(text: str) -> object:
    return yaml.load(text, Loader=_Loader)


class ConfigError(ValueError):
    """A configuration that cannot be read, or that names something unknown."""


def read_yaml(path: str | Path) -> dict:
    """Read one YAML file and the files of its `_base_`, safely.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a `_base_` that leads back to itself.
    """
    return _read(Path(path), ())


def _read(path: Path, chain: tuple[Path, ...]) -> dict:
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"config: {path} is its own _base_ (through {chain[-1]}).")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(
            f"config: expected a YAML file, found none at {path}. {nearest(path.name, siblings)}"
        )
    try:
        content = _load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config: expected keys and values in {path}, got {content!r:.60}.")
    bases = content.pop("_base_", [])
    if not isinstance(bases, (str, list)) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"config: {path}: _base_: expected a file or a list, got {bases!r}.")
    merged: dict = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, _read(path.parent / base, (*chain, path)))
    return merge(merged, content)


def merge(base: dict, over: dict) -> dict:
    """`over` laid upon `base`, key by key; `_inherited_: False` in a mapping replaces it whole."""
    over = dict(over)
    if not over.pop("_inherited_", True):
        return over
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def apply_options(config: dict, options: list[str]) -> None:
    """Apply `--opts a.b=value`, in place. Values are YAML; list entries go by number.

    Raises:
        ConfigError: not `key=value`, or a path that leads nowhere.
    """
    for option in options:
        path, separator, text = option.partition("=")
        if not separator or not path:
            raise ConfigError(f"--opts: expected key=value, got {option!r}.")
        try:
            value = _load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--opts {option}: the value is not YAML: {error}") from error
        *parents, last = path.split(".")
        node = config
        for key in parents:
            node = _child(node, key, path)
        if isinstance(node, list):
            _child(node, last, path)
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"--opts {path}: expected a mapping before {last!r}, got {node!r}.")


def _child(node: object, key: str, path: str) -> object:
    if isinstance(node, dict):
        if key in node:
            return node[key]
        raise ConfigError(f"--opts {path}: no {key!r} in the config. {nearest(key, list(node))}")
    if isinstance(node, list) and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    size = f"a list of {len(node)}" if isinstance(node, list) else repr(node)
    raise ConfigError(f"--opts {path}: expected an entry {key!r}, got {size}.")


def check_keys(config: dict, known: Sequence[str]) -> None:
    """Raise `ConfigError` for a key at the top that the task does not know."""
    for key in config:
        if key not in known:
            raise ConfigError(
                f"config: expected only known keys, got {key!r}. {nearest(key, list(known))}"
            )


def task_of(config: dict) -> str:
    """The config's task; `segmentation` when it names none, as PaddleSeg's own configs.

    Raises:
        ConfigError: an unknown task.
    """
    task = config.get("task", "segmentation")
    if task not in TASKS:
        raise ConfigError(f"config: task: got {task!r}. {nearest(str(task), list(TASKS))}")
    return task


def import_modules(names: str | list[str]) -> None:
    """Import the modules of a config's `imports`, which register components of their own.

    Raises:
        ConfigError: one that does not import.
    """
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module of the user's can raise anything
            raise ConfigError(
                f"config: imports: {name!r} does not import ({type(error).__name__}: {error}). "
                "Put its folder on PYTHONPATH."
            ) from error


def check_components(node: object, known: dict[str, object], where: str = "") -> None:
    """Check every `type:` below `node`, and the arguments given with it.

    Args:
        node: part of a config.
        known: components by name.
        where: the part's path, for messages.

    Raises:
        ConfigError: an unknown type or argument; the message names the closest ones.
    """
    if isinstance(node, list):
        for number, item in enumerate(node):
            check_components(item, known, f"{where}.{number}")
    if not isinstance(node, dict):
        return
    if "type" in node:
        name = node["type"]
        if not isinstance(name, str) or name not in known:
            raise ConfigError(
                f"config: {where}.type: got {name!r}. {nearest(str(name), list(known))}"
            )
        _check_arguments(known[name], node, where)
    for key, value in node.items():
        check_components(value, known, f"{where}.{key}")


def _check_arguments(component: object, node: dict, where: str) -> None:
    parameters = inspect.signature(component).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return  # passes on what it does not name itself
    names = [p.name for p in parameters]
    for key in node:
        if key != "type" and key not in names:
            raise ConfigError(
                f"config: {where}: {node['type']} takes no {key!r}. {nearest(key, names)}"
            )
