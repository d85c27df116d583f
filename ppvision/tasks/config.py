"""Read configurations safely, and stop at the first wrong name."""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import yaml

from ppvision import schema
from ppvision.data.text import read_text
from ppvision.engine.trainer import TrainOptions
from ppvision.errors import ConfigError, DataError, shorten, shorten_text, suggest_nearest
from ppvision.safe_yaml import MAX_BYTES, Located, find_tagged, load_yaml
from ppvision.schema import Check, Place, SchemaError, build, collect_checks

_MAX_FILES = 100  # files per config, because files of `_base_` can name each other

ENGINE_CHECKS = collect_checks(TrainOptions)

T = TypeVar("T")


def read_yaml(path: str | Path) -> Located:
    """Read one YAML file and the files of its `_base_` (in PaddleDetection `_BASE_`) safely.

    Returns:
        The merged content; every mapping knows the file and line of its keys.

    Raises:
        ConfigError: the file does not exist, is not YAML or not a mapping, has an unsafe tag or a
            key twice, or its `_base_` leads back to itself.
    """
    return _read(Path(path), (), [])


def _read(path: Path, chain: tuple[Path, ...], read: list[Path]) -> Located:
    """Merge one file with its bases; `chain` led to it, `read` are all files so far."""
    shown = path
    if "\0" in str(path):
        raise ConfigError(f"config: expected a path, got a null byte in {shorten(str(path))}.")
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"config: {path} is its own _base_ (through {chain[-1]}).")
    if not _is_file(path):
        beside = path.parent
        siblings = [p.name for p in beside.glob("*.y*ml")] if _is_folder(beside) else []
        raise ConfigError(
            f"config: expected a YAML file, found none at {shorten_text(str(path), 500)}. "
            f"{suggest_nearest(path.name, siblings)}"
        )
    read.append(path)
    if len(read) > _MAX_FILES:
        raise ConfigError(f"config: {path}: expected at most {_MAX_FILES} files of _base_.")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"config: {path}: expected at most {MAX_BYTES} bytes of YAML, got more.")
    try:
        content: Any = load_yaml(read_text(path), str(shown))
    except (yaml.YAMLError, DataError) as error:
        raise ConfigError(f"config: {path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config: expected keys and values in {path}, got {shorten(content)}.")
    bases = content.pop("_base_", content.pop("_BASE_", []))
    if not isinstance(bases, (str, list)) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(
            f"config: {path}: _base_: expected a file or a list, got {shorten(bases)}."
        )
    merged = Located({}, {})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, _read(shown.parent / base, (*chain, path), read))
    return merge(merged, cast(Located, content))  # `load_yaml` makes every mapping of this type


def _is_file(path: Path) -> bool:
    """Whether a file exists; a name that the system cannot look up has no file."""
    try:
        return path.is_file()
    except OSError:  # for example a part of more than 255 bytes, or no rights to a folder
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def merge(base: Located, over: Located) -> Located:
    """Merge `over` into `base`, key by key; `_inherited_: False` in a mapping, or a tag, replaces
    the whole mapping."""
    over = Located(over, over.where)
    if not over.pop("_inherited_", True):
        return over
    result = Located(base, base.where | over.where)
    for key, value in over.items():
        both = type(value) is type(result.get(key)) is Located
        result[key] = merge(result[key], value) if both else value
    return result


def apply_options(config: dict, options: list[str]) -> None:
    """Apply `--opts a.b=value` in place. Values are YAML; entries of lists have numbers.

    Raises:
        ConfigError: an option is not `key=value`, or its path does not exist.
    """
    for option in options:
        path, separator, text = option.partition("=")
        if not separator or not path:
            raise ConfigError(f"--opts: expected key=value, got {shorten(option)}.")
        try:
            value = load_yaml(text, f"--opts {path}")
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--opts {shorten_text(option, 80)}: the value is not YAML: {error}"
            ) from error
        *parents, last = path.split(".")
        node: Any = config
        if parents and parents[0] not in config:  # an omitted part; its keys are checked
            config[parents[0]] = Located({}, {})
            if isinstance(config, Located):
                config.where[parents[0]] = f"--opts {shorten_text(option, 80)}"
        for key in parents:
            node = _child(node, key, path)
        if isinstance(node, list):
            _child(node, last, path)
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
            if isinstance(node, Located):
                node.where[last] = f"--opts {shorten_text(option, 80)}"
        else:
            raise ConfigError(
                f"--opts {path}: expected a mapping before {shorten(last)}, got {shorten(node)}."
            )


def _child(node: Any, key: str, path: str) -> Any:
    if isinstance(node, dict):
        if key in node:
            return node[key]
        raise ConfigError(
            f"--opts {path}: no {shorten(key)} in the config. {suggest_nearest(key, list(node))}"
        )
    if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
        return node[int(key)]
    size = f"a list of {len(node)}" if isinstance(node, list) else shorten(node)
    raise ConfigError(f"--opts {path}: expected an entry {shorten(key)}, got {size}.")


def place_of(node: dict, key: object) -> str:
    """Return the place of a key, ` (file:line)`; empty if it is not known."""
    return node.place(key) if isinstance(node, Located) else ""


def build_config(kind: type[T], content: object, where: str = "", line: str = "") -> T:
    """Build the dataclass of a part of a config.

    Args:
        kind: the dataclass (`ppvision.schema`).
        content: the part.
        where: its path in the config, for messages; empty for the top.
        line: `file:line` of the part; may be empty.

    Raises:
        ConfigError: a key, type or value is not valid; the message has its place.
    """
    with _config_errors():
        return build(kind, content, where, line)


def check_keys(config: dict, known: Iterable[str], where: str = "") -> None:
    """Raise `ConfigError` for a key of a mapping that is not known.

    Args:
        config: the mapping.
        known: its possible keys.
        where: the mapping's path in the config, for messages; empty for the top.
    """
    with _config_errors():
        schema.check_keys(config, known, Place(where))


def check_number(
    config: dict, key: str, where: str = "", *, low: float, whole: bool = False
) -> None:
    """Raise `ConfigError` if a value exists and is not a number of at least `low`."""
    check = schema.whole(int(low)) if whole else schema.number(low)
    _check_entry(check, config, key, where)


def check_engine_keys(config: dict) -> None:
    """Raise `ConfigError` for a key of the engine with another type or range."""
    for key in ("iters", "batch_size", "accumulate", "seed", "ema_decay", "clip_norm"):
        _check_entry(ENGINE_CHECKS[key], config, key)


def _check_entry(check: Check, config: dict, key: str, where: str = "") -> None:
    if key in config:
        with _config_errors():
            check(config[key], Place(where).inside(config, key))


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    try:
        yield
    except SchemaError as error:
        line = f" ({error.line})" if error.line else ""
        raise ConfigError(f"config{line}: {error.sentence}") from error


def find_task(config: dict, known: Collection[str]) -> str:
    """Return the config's task; `segmentation` if it names none, as in PaddleSeg's own configs.

    Args:
        config: the top level of the config.
        known: names of tasks.

    Raises:
        ConfigError: an unknown task.
    """
    task = config.get("task", "segmentation")
    if not isinstance(task, str) or task not in known:
        raise ConfigError(
            f"config{place_of(config, 'task')}: task: got {shorten(task)}. "
            f"{suggest_nearest(str(task), list(known))}"
        )
    return task


def check_untagged(node: object) -> None:
    """Raise `ConfigError` for a tag, because only PaddleDetection's configs have tags."""
    tagged = find_tagged(node)
    if tagged is not None:
        raise ConfigError(
            f"config ({tagged.place_of_tag}): expected plain keys and values, got !{tagged.tag}. "
            "Tags are for configs with task: detection."
        )


def import_modules(names: str | list[str]) -> None:
    """Import the modules of a config's `imports`, which register their own components.

    Raises:
        ConfigError: a module does not import.
    """
    if not isinstance(names, str | list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"config: imports: expected a module or a list of them, got {shorten(names)}."
        )
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module of the user may raise anything
            raise ConfigError(
                f"config: imports: {shorten(name)} does not import ({type(error).__name__}: "
                f"{shorten_text(str(error))}). Put its folder on PYTHONPATH."
            ) from error


def check_components(node: object, known: Mapping[str, object], where: str = "") -> None:
    """Check every `type:` below `node`, and the arguments given with it: their names, and their
    values where the component annotates them as a `Literal`.

    Args:
        node: part of a config.
        known: components by name.
        where: the part's path, for messages.

    Raises:
        ConfigError: an unknown type, argument or value; the message names the closest ones.
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
                f"config{place_of(node, 'type')}: {where}.type: got {shorten(name)}. "
                f"{suggest_nearest(str(name), list(known))}"
            )
        _check_arguments(known[name], node, where)
    for key, value in node.items():
        check_components(value, known, f"{where}.{key}")


def check_texts(component: Callable, options: dict, where: str) -> None:
    """Raise `ConfigError` for text if a component's default is a number, such as a momentum of
    `0,9`: Paddle's optimizers would fail only in their first step."""
    for name, parameter in inspect.signature(component).parameters.items():
        default, value = parameter.default, options.get(name)
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and isinstance(value, str):
            raise ConfigError(
                f"config{place_of(options, name)}: {where}.{name}: expected a number such as "
                f"{default}, got {shorten(value)}."
            )


def _find_choices(annotation: object) -> list[object]:
    """Return the values of `Literal[...]` or of `Literal[...] | None`; none for other types."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    parts = get_args(annotation)
    if len(parts) == 2 and parts[1] is type(None) and get_origin(parts[0]) is Literal:
        return [*get_args(parts[0]), None]
    return []


def _check_arguments(component: Any, node: dict, where: str) -> None:
    parameters = inspect.signature(component).parameters.values()
    for parameter in parameters:
        if (choices := _find_choices(parameter.annotation)) and parameter.name in node:
            value = node[parameter.name]
            if value not in choices:
                names = [choice for choice in choices if choice is not None]
                raise ConfigError(
                    f"config{place_of(node, parameter.name)}: {where}.{parameter.name}: got "
                    f"{shorten(value)}. {suggest_nearest(str(value), names)}"
                )
    check_texts(component, node, where)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return  # it passes on arguments that it does not name
    names = [p.name for p in parameters]
    for key in node:
        if key != "type" and key not in names:
            raise ConfigError(
                f"config{place_of(node, key)}: {where}: {node['type']} takes no {shorten(key)}. "
                f"{suggest_nearest(str(key), names)}"
            )
