"""Looking at a COCO annotation file before training, so that all that is wrong is said at once."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from ppvision.data.checks import EXIF_ORIENTATION, QUARTER_TURNS, check_pairs
from ppvision.errors import DataError, InputError

logger = logging.getLogger("ppvision")

_SHOWN = 10  # problems of one kind that are named


def check_coco(
    part: str, annotations: Path, images: Path, num_classes: int, *, masks: bool = False
) -> list[str]:
    """Check an annotation file, and every picture that it names.

    Boxes without an area, which PaddleDetection leaves out, and those that reach beyond their
    picture are counted in the log, as are classes of one name.

    Args:
        part: of the config, for messages.
        annotations: the JSON file.
        images: the folder that its `file_name`s are in.
        num_classes: of the model.
        masks: whether every object needs one. Default False.

    Returns:
        Names of the classes, by category id.

    Raises:
        DataError: one report of everything that is wrong.
    """
    content = _read(part, annotations)
    problems = []
    numbers = [category["id"] for category in content["categories"]]
    categories = {c["id"]: c["name"] for c in content["categories"]}
    # PaddleDetection would count one twice, and give its objects to a class beyond the last.
    problems += listed("category ids are there twice", _twice(numbers))
    if len(categories) != num_classes:
        problems.append(
            f"expected {num_classes} categories, as num_classes says, got {len(categories)}"
        )
    if numbers != sorted(numbers):
        problems.append(
            f"expected categories in the order of their ids, which numbers the classes, got "
            f"{', '.join(map(str, numbers[:_SHOWN]))}: sort the list"
        )
    if same := _twice(categories.values()):
        logger.warning(f"{part}: categories of one name: {', '.join(same[:_SHOWN])}")
    sizes = _check_images(content["images"], images, problems)
    _check_boxes(part, content["annotations"], sizes, categories, problems)
    if masks:
        _check_masks(content["annotations"], sizes, problems)
    if problems:
        raise DataError(f"{part}: {annotations}:\n  " + "\n  ".join(problems))
    check_pairs(part, [(str(images / image["file_name"]), None) for image in content["images"]])
    return [categories[number] for number in sorted(categories)]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return (_whole(value) or isinstance(value, float)) and math.isfinite(value)


_ID = _whole, "a whole number"
_TEXT = lambda value: isinstance(value, str), "text"
_SIDE = lambda value: _whole(value) and value > 0, "a whole number above 0"
_ANY = lambda value: True, ""
# What each entry of a list needs, and what its value must be.
_ENTRIES = {
    "images": {"id": _ID, "file_name": _TEXT, "width": _SIDE, "height": _SIDE},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": _ANY,  # reported together, see below
        "area": (_finite, "a number"),
        "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
    },
    "categories": {"id": _ID, "name": _TEXT},
}


def _read(part: str, path: Path) -> dict[str, list[dict]]:
    if not path.is_file():
        raise DataError(f"{part}: expected annotations in COCO's JSON, found no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{part}: {path} is not JSON that can be read: {error}") from error
    for key, needed in _ENTRIES.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{part}: {path}: expected a list {key!r}, as COCO's format has it.")
        for number, entry in enumerate(entries):
            where = f"{part}: {path}: {key}[{number}]"
            if missing := [name for name in needed if name not in entry]:
                raise DataError(
                    f"{where}: expected {', '.join(needed)}, got no {', '.join(missing)}."
                )
            for name, (fits, what) in needed.items():
                if not fits(entry[name]):
                    raise DataError(f"{where}: {name}: expected {what}, got {entry[name]!r}.")
    if not content["images"]:
        raise DataError(f"{part}: {path}: expected pictures, got none.")
    return content


def _check_images(
    images: list[dict], folder: Path, problems: list[str]
) -> dict[object, tuple[int, int]]:
    sizes, missing, other = {}, [], []
    for image in images:
        if image["id"] in sizes:
            problems.append(f"image id {image['id']} is there twice")
        sizes[image["id"]] = image["width"], image["height"]
        path = folder / image["file_name"]
        if not path.is_file():
            missing.append(str(path))
            continue
        other += other_size(path, (image["width"], image["height"]))
    problems += listed("pictures are missing", missing)
    problems += listed("pictures have another size than the file says", other)
    return sizes


def other_size(path: Path, size: tuple[float, float]) -> list[str]:
    """What to say of a picture that is not `(width, height)` as it is read; nothing where it is, or
    does not decode, which another check names."""
    try:
        with Image.open(path) as picture:
            found = picture.size
            if picture.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS:
                found = found[::-1]  # as it is read
    except OSError:
        return []
    if found == size:
        return []
    return [f"{path}: expected {size[0]:g}x{size[1]:g}, got {found[0]}x{found[1]}"]


def _twice(values: Iterable[object]) -> list[str]:
    return [str(value) for value, count in Counter(values).items() if count > 1]


def _check_boxes(
    part: str,
    annotations: list[dict],
    sizes: dict[object, tuple[int, int]],
    categories: dict[object, str],
    problems: list[str],
) -> None:
    nowhere, unknown, wrong, outside, flat, beyond, counted = [], [], [], [], 0, 0, 0
    twice = _twice(annotation["id"] for annotation in annotations)
    problems += listed("annotation ids are there twice", twice)  # the later one would replace it
    for annotation in annotations:
        name = f"annotation {annotation['id']}"
        if annotation["image_id"] not in sizes:
            nowhere.append(f"{name}: image_id {annotation['image_id']!r}")
            continue
        if annotation["category_id"] not in categories:
            unknown.append(f"{name}: category_id {annotation['category_id']!r}")
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_finite, box))):
            wrong.append(f"{name}: {box!r}")
            continue
        left, top, width, height = box
        across, down = sizes[annotation["image_id"]]
        ends = (left < 0 and left + width <= 0) or (top < 0 and top + height <= 0)
        if left >= across or top >= down or ends:
            outside.append(f"{name}: {box} in {across}x{down}")
            continue
        empty = width <= 0 or height <= 0 or not annotation["area"] > 0
        flat += empty
        beyond += left < 0 or top < 0 or left + width > across or top + height > down
        counted += not empty and not annotation["iscrowd"]
    problems += listed("annotations belong to no picture", nowhere)
    problems += listed("annotations have a category that is not there", unknown)
    problems += listed("boxes are not [x, y, width, height]", wrong)
    problems += listed("boxes lie outside of their picture", outside)
    if not annotations:
        problems.append("expected annotations, got none")
    elif not counted and not problems:
        problems.append("expected objects, got crowds and boxes without an area alone")
    for count, what in (
        (flat, "have no area and are left out"),
        (beyond, "reach beyond their picture"),
    ):
        if count:
            logger.warning(f"{part}: {count} of {len(annotations)} boxes {what}")


def _check_masks(
    annotations: list[dict], sizes: dict[object, tuple[int, int]], problems: list[str]
) -> None:
    wrong = []
    for annotation in annotations:
        if annotation["image_id"] not in sizes:
            continue
        fault = _fault_of_mask(annotation.get("segmentation"), sizes[annotation["image_id"]])
        if fault:
            wrong.append(f"annotation {annotation['id']}: {fault}")
    problems += listed(
        "masks are no list of polygons [x, y, x, y, x, y, ...] and no run lengths", wrong
    )


def _fault_of_mask(mask: object, size: tuple[int, int]) -> str | None:
    """What is wrong with a `segmentation` of a picture of `(width, height)`, or None."""
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list):
                return f"{polygon!r} in place of a polygon"
            if len(polygon) < 6 or len(polygon) % 2 or not all(map(_finite, polygon)):
                return f"a polygon of {len(polygon)} numbers"
        return None if mask else "no polygon"
    if not isinstance(mask, dict) or not {"size", "counts"} <= mask.keys():
        return f"{mask!r}"
    if mask["size"] != [size[1], size[0]]:
        return f"run lengths of size {mask['size']}, expected {[size[1], size[0]]}"
    counts = mask["counts"]
    if isinstance(counts, list):
        fits = all(_whole(n) and n >= 0 for n in counts) and sum(counts) == size[0] * size[1]
        return None if fits else "run lengths that do not fill the picture"
    if not isinstance(counts, str):
        return f"run lengths {counts!r}"
    try:
        filled = sum(_run_lengths(counts))
    except ValueError:
        filled = -1
    return None if filled == size[0] * size[1] else "compressed run lengths that are damaged"


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths: digits of five bits, the lowest first, of which the sixth bit
    says that more follow; from the third one on, differences to the one before the last.

    Raises:
        ValueError: the text ends inside of a number, has other characters, or a length below 0.
    """
    found: list[int] = []
    number = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise InputError(character)
        number |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            number -= 1 << shift  # its sign
        if len(found) > 2:
            number += found[-2]
        if number < 0:
            raise InputError(number)
        found.append(number)
        number = shift = 0
    if shift:
        raise InputError(text)
    return found


def listed(what: str, found: list[str]) -> list[str]:
    """Problems of one kind as a line of a report: their number and the first of them; nothing for
    none."""
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{more}"]
