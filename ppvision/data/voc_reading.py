"""Read Pascal VOC lists and annotations. Check and training use the same functions."""

import math
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ppvision.data.coco_reading import has_area, list_problems
from ppvision.data.listing import LeftOut, is_leftover, locate
from ppvision.data.text import read_list, read_xml, shorten
from ppvision.errors import DataError

_MOST = 2**31  # pixels; more than any image has
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_YES, _NO = {"true", "yes"}, {"", "false", "no", "unspecified", "none"}


@dataclass
class VocObject:
    """One object inside its image."""

    class_id: int
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    is_difficult: bool


@dataclass
class VocPicture:
    """One line of the list. Objects without an area inside the image are omitted."""

    image: Path
    width: float
    height: float
    objects: list[VocObject] = field(default_factory=list)


@dataclass
class VocFiles:
    """The content of a list and its XML files.

    Attributes:
        pictures: the images whose XML file can be read.
        problems: the problems, one line per kind.
        notes: entries that were read in another way than they are written, one line per kind.
    """

    pictures: list[VocPicture]
    problems: list[str]
    notes: list[str]


def read_voc(annotations: str | Path, folder: str | Path, names: Sequence[str]) -> VocFiles:
    """Read a list of images and XML files, and all files that it names.

    `difficult` may be a number, true, false, yes, no, Unspecified, empty or missing. It is 0 unless
    it says yes or true, or is a number other than 0.

    Args:
        annotations: the list, with an image and its XML file per line, separated by blanks or a
            tab.
        folder: the folder of both.
        names: of the classes, in the order of their numbers.

    Raises:
        DataError: no such list, or not text.
    """
    folder = Path(folder)
    numbers = {name: number for number, name in enumerate(names)}
    wrong: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    counts: Counter[str] = Counter()
    left_out = LeftOut()
    pictures: list[VocPicture] = []
    seen: set[str] = set()
    for line, words in read_list(annotations):
        if len(words) < 2:
            wrong[_LINES].append(f"line {line}")
            continue
        if is_leftover(words[0]):
            left_out.leftovers[Path(words[0]).name] += 1
            continue
        image, xml = (folder / locate(folder, word) for word in words[:2])
        missing = [str(path) for path in (image, xml) if not os.path.isfile(path)]
        wrong[_MISSING] += missing
        if str(xml) in missing:
            continue
        try:
            picture, objects = _read_picture(image, read_xml(xml))
        except DataError as error:
            text = str(error)
            wrong[_BROKEN].append(text if str(xml) in text else f"{xml} ({text})")
            continue
        pictures.append(picture)
        counts["lines repeat an earlier one"] += words[0] in seen
        counts["images have no <object>"] += not objects
        seen.add(words[0])
        for place, item in enumerate(objects):
            where = f"{xml}, object {place}"
            try:
                _read_object(picture, item, numbers, where, wrong, counts)
            except DataError as error:
                wrong[_BROKEN].append(f"{where} ({error})")
    left_out.log(annotations)
    problems = [problem for kind, found in wrong.items() for problem in list_problems(kind, found)]
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    return VocFiles(pictures, problems, notes)


_LINES = "lines are no image and XML file"
_MISSING = "files are missing"
_BROKEN = "XML files have no size or boxes that can be read"
_UNKNOWN = "objects have a class that is not in the label_list"
_DIFFICULT = "objects have a `difficult` that is neither a number nor true or false"
_KINDS = (_LINES, _MISSING, _BROKEN, _UNKNOWN, _DIFFICULT)


def _read_picture(
    image: Path, root: ElementTree.Element
) -> tuple[VocPicture, list[ElementTree.Element]]:
    width, height = (_read_number(root, f"size/{axis}") for axis in ("width", "height"))
    if not (width > 0 and height > 0):
        raise DataError(f"a size of {width:g} x {height:g}")
    return VocPicture(image, width, height), root.findall("object")


def _read_object(
    picture: VocPicture,
    item: ElementTree.Element,
    numbers: dict[str, int],
    where: str,
    wrong: dict[str, list[str]],
    counts: Counter[str],
) -> None:
    name = (item.findtext("name") or "").strip()
    if name not in numbers:
        wrong[_UNKNOWN].append(f"{where}: {shorten(name)}")
    left, top, right, bottom = (_read_number(item, f"bndbox/{edge}") for edge in _EDGES)
    text = item.findtext("difficult")
    is_difficult, is_plain = _read_difficult(text)
    if is_difficult is None:
        wrong[_DIFFICULT].append(f"{where}: {shorten(text)}")
    counts[
        "objects have no `difficult`, or one that is not 0 or 1: taken as 0 or 1"
    ] += not is_plain
    # PaddleDetection cuts a box at its image's edge in the same way.
    box = max(left, 0), max(top, 0), min(right, picture.width - 1), min(bottom, picture.height - 1)
    if not has_area(*box):
        counts["boxes have no area inside their image and are omitted"] += 1
    elif name in numbers:
        picture.objects.append(VocObject(numbers[name], box, bool(is_difficult)))


def _read_number(item: ElementTree.Element, path: str) -> float:
    text = item.findtext(path)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not abs(number) <= _MOST:  # also true for infinity and NaN
        raise DataError(f"{path}: expected a number of pixels, got {shorten(text)}")
    return number


def _read_difficult(text: str | None) -> tuple[bool | None, bool]:
    """Return whether an object is difficult (None if this is unclear), and whether it is written as
    0 or 1."""
    word = (text or "").strip().lower()
    if word in ("0", "1"):
        return word == "1", True
    if word in _YES | _NO:
        return word in _YES, False
    try:
        number = float(word)
    except ValueError:
        return None, False
    return (number != 0 if math.isfinite(number) else None), False
