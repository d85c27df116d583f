"""The packaged configs: list them, find one by name, or copy one to change it.

In a wheel they are in a folder next to this module. In a clone they are in `configs/`.
"""

import os
import re
import shutil
from pathlib import Path

from ppvision.errors import (
    FolderInUseError,
    InputError,
    MissingFileError,
    shorten_text,
    suggest_nearest,
)
from ppvision.files import replace_file

_BASE = re.compile(r"(?i)^_base_\s*:\s*(.*(?:\n\s*-.*)*)", re.MULTILINE)
_FILE = re.compile(r"[\w./-]+\.ya?ml")


def find_config_folder() -> Path:
    """The folder with the configs."""
    package = Path(__file__).parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def list_configs() -> dict[str, Path]:
    """The packaged configs by name: `TASK/NAME`, without the base files in `_base_`."""
    folder = find_config_folder()
    paths = sorted(folder.glob("*/*.yml"))
    return {f"{path.parent.name}/{path.stem}": path for path in paths}


def find_config(value: str | Path) -> Path:
    """Return the file that a path or name of a config means. An existing file has priority.

    Args:
        value: a path, or a name of `list_configs` with or without its folder and `.yml`.

    Raises:
        MissingFileError: no such name. (A path that does not exist is returned as it is.)
    """
    path = Path(value)
    if path.exists():
        return path
    name = str(value).removesuffix(".yml").removeprefix("configs/")
    configs = list_configs()
    for known, found in configs.items():
        if name in (known, known.partition("/")[2]):
            return found
    if path.suffix or len(path.parts) > 2:  # a path: its reader reports it if it is missing
        return path
    names = [*configs, *(known.partition("/")[2] for known in configs)]
    raise MissingFileError(
        f"expected a config's file, or the name of one that `ppvision configs` lists, got "
        f"{shorten_text(str(value), 200)!r}. {suggest_nearest(name, names)}"
    )


def copy_config(name: str | Path, target: str | Path) -> list[Path]:
    """Copy a packaged config, with the files that it builds on, to change it.

    Args:
        name: as for `find_config`.
        target: a folder, which gets `TASK/NAME.yml`; or the new file itself, if it ends in `.yml`
            or `.yaml`. The files that it builds on keep their place relative to it.

    Returns:
        The new files, the config itself first.

    Raises:
        MissingFileError: no such config.
        InputError: it is not one of the package's.
        FolderInUseError: one of the files exists already, with other content.
    """
    folder = find_config_folder()
    source = find_config(name)
    if not source.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{source}: expected the name of a packaged config, got another file.")
    sources = _with_bases(source.resolve())
    first = Path(target)
    if first.suffix not in (".yml", ".yaml"):
        first = first / sources[0].relative_to(folder.resolve())
    places = [os.path.relpath(path, sources[0].parent) for path in sources[1:]]
    targets = [first, *(Path(os.path.normpath(first.parent / place)) for place in places)]
    for path, copy in zip(sources, targets, strict=True):
        if copy.exists() and copy.read_bytes() != path.read_bytes():
            raise FolderInUseError(
                f"{copy}: expected no file, or an unchanged copy of the config, got a changed "
                "file. Choose another path."
            )
    for path, copy in zip(sources, targets, strict=True):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(copy) as partial:
            shutil.copyfile(path, partial)
    return targets


def _with_bases(path: Path) -> list[Path]:
    """Return a config and all files that it builds on, directly or indirectly."""
    found = [path]
    for path in found:  # grows during the loop
        for block in _BASE.findall(path.read_text(encoding="utf-8")):
            for name in _FILE.findall(block):
                base = (path.parent / name).resolve()
                if base not in found:
                    found.append(base)
    return found
