"""Find the images of a folder or a list, and the names of their results."""

import logging
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ppvision.data.text import cut_text, read_lines, read_list
from ppvision.errors import DataError, InputError, MissingFileError

logger = logging.getLogger("ppvision")

# Suffixes of image files; upper and lower case are equal.
READABLE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif"}
READABLE_SUFFIXES |= {".tiff", ".gif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"}

SEPARATORS = " \t,"  # between an image and its label in a list file

# Names that notebooks, desktops, archives and network drives put next to images, in lower case.
_LEFTOVERS = {".ipynb_checkpoints", "__macosx", ".ds_store", "thumbs.db", "ehthumbs.db", "@eadir"}
_LEFTOVERS |= {"desktop.ini", "$recycle.bin", "#recycle", "system volume information", ".git"}
_SHOWN = 5  # kinds of files that a line of the log names


def is_leftover(name: str | PurePath) -> bool:
    """Whether a relative path leads to files that tools leave behind, such as `.ipynb_checkpoints`
    or macOS's `._NAME` files."""
    parts = PurePath(name).parts
    return any(part.startswith("._") or part.lower() in _LEFTOVERS for part in parts)


def holds_only(folder: Path, known: Collection[str], needed: str) -> bool:
    """Whether a folder is empty, or contains the file `needed` and otherwise only files of `known`
    names. Files that tools leave in folders do not count."""
    if not folder.is_dir():
        return False
    present = [path for path in folder.iterdir() if not is_leftover(path.name)]
    names = {path.name for path in present}
    no_folders = not any(path.is_dir() for path in present)
    return not names or (needed in names and names <= set(known) and no_folders)


@dataclass
class LeftOut:
    """Counts the files that a search omits."""

    leftovers: Counter[str] = field(default_factory=Counter)  # by name
    others: Counter[str] = field(default_factory=Counter)  # by suffix
    unreadable: list[str] = field(default_factory=list)  # folders

    def log(self, where: str | Path) -> None:
        """Log the counts in one line; log nothing if nothing was omitted."""
        parts = []
        if self.leftovers:
            parts.append(
                f"{self.leftovers.total()} hidden or left behind by tools "
                f"({_list_kinds(self.leftovers)})"
            )
        if self.others:
            parts.append(
                f"{self.others.total()} with another suffix than images "
                f"({_list_kinds(self.others)})"
            )
        if parts:
            log_once(f"{where}: files and folders omitted: {', '.join(parts)}")
        if self.unreadable:
            shown = ", ".join(map(cut_text, self.unreadable[:_SHOWN]))
            logger.warning(
                f"{where}: {len(self.unreadable)} folders cannot be read and are omitted: {shown}"
            )


def _list_kinds(counts: Counter[str]) -> str:
    kinds = [f"{count} x {kind}" for kind, count in counts.most_common(_SHOWN)]
    return ", ".join([*kinds, "..."] if len(counts) > _SHOWN else kinds)


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log omissions and changes. A second reading of the same file does not repeat them."""
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def find_pictures(folder: str | Path, left_out: LeftOut | None = None) -> list[Path]:
    """Return the images of a folder and of all folders below it, sorted. They are found by their
    suffix.

    Hidden files and folders, and files that tools leave behind, are omitted. Symbolic links are
    followed. A folder that several links lead to is searched once, under its own name if it is
    below `folder`. Links to a folder above are not followed.

    Args:
        folder: where to search; it must exist.
        left_out: counts omitted files, for a caller that searches several folders. Default None:
            one line of the log reports them.
    """
    folder = Path(folder)
    counts = LeftOut() if left_out is None else left_out
    found: list[Path] = []
    real = folder.resolve()
    seen = {_identity(above) for above in real.parents}
    waiting = [str(folder)]

    def refused(error: OSError) -> None:
        counts.unreadable.append(f"{error.filename} ({error.strerror})")

    while waiting:
        for here, folders, files in os.walk(waiting.pop(0), onerror=refused):
            try:
                identity = _identity(here)
            except OSError as error:  # a path that is too long, a folder that was just removed
                refused(error)
                folders.clear()
                continue
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            for name in sorted(folders):
                if _is_hidden(name):
                    counts.leftovers[name] += 1
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            waiting += [p for p in (os.path.join(here, n) for n in folders) if os.path.islink(p)]
            folders[:] = [n for n in folders if not os.path.islink(os.path.join(here, n))]
            found += [Path(here, name) for name in files if _is_picture(here, name, counts)]
    if left_out is None:
        counts.log(folder)
    return sorted(found)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or is_leftover(name)


def _is_picture(here: str, name: str, counts: LeftOut) -> bool:
    if _is_hidden(name):
        counts.leftovers[name if is_leftover(name) and name[:2] != "._" else f"{name[:2]}*"] += 1
        return False
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in READABLE_SUFFIXES:
        counts.others[suffix or "no suffix"] += 1
        return False
    # A broken link is kept, so that the missing image is reported. A pipe is not kept: reading it
    # would wait forever.
    try:
        is_file = stat.S_ISREG(os.stat(os.path.join(here, name)).st_mode)
    except OSError:
        is_file = True
    if not is_file:
        counts.others[f"{suffix} that is no file"] += 1
    return is_file


def locate(root: str | Path, name: str) -> str:
    """Return the spelling of a relative name under which the file exists, or the name unchanged.

    Tools on Windows write `images\\1.png`; macOS stores accents as separate characters.
    """
    if os.path.isfile(os.path.join(root, name)):
        return name
    slashed = name.replace("\\", "/")
    for other in (slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))):
        if other != name and os.path.isfile(os.path.join(root, other)):
            return other
    return name


def read_pairs(
    list_file: str | Path, root: str | Path, separator: str = " ", need_labels: bool = True
) -> tuple[list[tuple[str, Path, Path | None]], list[tuple[str, str]]]:
    """Return the images and labels of a PaddleSeg list. Check and training use the same function.

    Lines for files that tools leave behind are omitted. The log counts them, and lines that occur
    twice.

    Args:
        list_file: one `image<separator>label` per line; see `read_list`.
        root: folder that the list's paths start from.
        separator: text between the two paths.
        need_labels: whether every line must name a label.

    Returns:
        `(line number in words, image, label or None)` of every line, and `(kind, text)` of every
        problem.

    Raises:
        DataError: no such list, or not text.
    """
    root = Path(root)
    pairs, problems = [], []
    left_out = LeftOut()
    seen: Counter[tuple[str, ...]] = Counter()
    for number, fields in read_list(list_file, separator):
        where = f"line {number}"
        if len(fields) > 2:
            text = f"{where}: {cut_text(separator.join(fields))!r} has {len(fields)} fields"
            problems.append(("too many fields", text))
        elif len(fields) < 2 and need_labels:
            problems.append(("no label", f"{where}: {cut_text(fields[0])!r}"))
        elif is_leftover(fields[0]):
            left_out.leftovers[PurePath(fields[0]).name] += 1
        else:
            seen[tuple(fields)] += 1
            image, *label = (root / locate(root, name) for name in fields)
            pairs.append((where, image, label[0] if label else None))
    left_out.log(list_file)
    if repeated := sum(count - 1 for count in seen.values()):
        log_once(f"{list_file}: {repeated} lines repeat an earlier one")
    return pairs, problems


def list_images(image_path: str | Path, flag: str = "--image_path") -> list[tuple[Path, str]]:
    """Return the images of a flag's path, each with the name of its result.

    Args:
        image_path: an image, a folder (with its sub-folders, see `find_pictures`), or a list file:
            one image per line, relative to the list. Text after a space, tab or comma, such as a
            label, is ignored (see `list_labels`).
        flag: for messages.

    Returns:
        `(path, name)` pairs. Names are relative, without `..`, and all different: images that would
        share a name (`a.jpg`, `a.png`) keep their suffix in it, then get a number.

    Raises:
        FileNotFoundError: no such path.
        ValueError: no image in it.
    """
    path = Path(image_path)
    # An empty path, for example from an unset variable in a script, would mean the current folder.
    if not str(image_path) or not os.path.exists(path):
        raise MissingFileError(
            f"{flag}: expected a file or folder, found none at {cut_text(str(image_path))!r}."
        )
    if path.is_dir():
        found = [(p, p.relative_to(path)) for p in find_pictures(path)]
    elif path.suffix.lower() in READABLE_SUFFIXES:
        found = [(path, Path(path.name))]
    else:
        found = [(path.parent / name, Path(name)) for name, _ in _listed(path, flag)]
    if not found:
        raise InputError(f"{flag}: expected images, found none in {path}.")
    return list(zip([p for p, _ in found], name_results([n for _, n in found]), strict=True))


def list_labels(image_path: str | Path) -> dict[Path, Path]:
    """Return the label of each image of a list file, by path of the image; empty for other
    paths."""
    path = Path(image_path)
    if path.is_dir() or path.suffix.lower() in READABLE_SUFFIXES:
        return {}
    found = _listed(path, "--image_path")
    return {path.parent / name: path.parent / label for name, label in found if label}


def _listed(list_path: Path, flag: str) -> list[tuple[str, str]]:
    """Return image and label (or an empty label) of every line of a list file."""
    try:
        lines = read_lines(list_path, file_names=True)
    except DataError as error:
        raise InputError(
            f"{flag}: expected an image, a folder or a text file, got {list_path} ({error})."
        ) from error
    left_out = LeftOut()
    found = []
    for _, line in lines:
        name = _picture_of(list_path, line)
        label = line[len(name) :].strip(SEPARATORS)
        if not name:  # only separators
            continue
        if is_leftover(name):
            left_out.leftovers[PurePath(name).name] += 1
            continue
        folder = list_path.parent
        found.append((locate(folder, name), locate(folder, label) if label else ""))
    left_out.log(list_path)
    return found


def _picture_of(list_path: Path, line: str) -> str:
    """Return the image of a list's line: the whole line, or the text before a label. Names may
    contain separators."""
    for name in (line, *(line.rpartition(separator)[0] for separator in SEPARATORS)):
        if name and os.path.isfile(list_path.parent / locate(list_path.parent, name)):
            return name
    return re.split(f"[{SEPARATORS}]", line)[0]


def name_results(names: list[Path]) -> list[str]:
    """Return names of results, relative, without suffix and `..`, all different: see
    `list_images`."""
    inside = [Path(*(part for part in n.parts if part not in (n.anchor, "..", "."))) for n in names]
    inside = [name if name.name else Path("picture") for name in inside]  # `..` alone, `/`
    stems = Counter(map(_without_suffix, inside))
    taken: set[str] = set()
    results = []
    for name in inside:
        stem = _without_suffix(name)
        first = result = stem if stems[stem] == 1 else f"{stem}_{name.suffix[1:]}"
        number = 1
        while result in taken:
            number += 1
            result = f"{first}_{number}"
        taken.add(result)
        results.append(result)
    return results


def _without_suffix(name: Path) -> str:
    # The rest of `...png` would lead to the folder above.
    return str(name) if name.stem in (".", "..") else str(name.with_suffix(""))
