"""Looking at a COCO annotation file before training, so that all that is wrong is said at once."""

import json
import logging
import math
from collections import Counter
from pathlib import Path

from PIL import Image

from ppvision.data.checks import EXIF_ORIENTATION, QUARTER_TURNS, check_pairs
from ppvision.data.files import DataError

logger = logging.getLogger("ppvision")

_SHOWN = 10  # problems of one kind that are named


def check_coco(part: str, annotations: Path, images: Path, num_classes: int) -> list[str]:
    """Check an annotation file, and every picture that it names.

    Boxes without an area, which PaddleDetection leaves out, and those that reach beyond their
    picture are counted in the log.

    Args:
        part: of the config, for messages.
        annotations: the JSON file.
        images: the folder that its `file_name`s are in.
        num_classes: of the model.

    Returns:
        Names of the classes, by category id.

    Raises:
        DataError: one report of everything that is wrong.
    """
    content = _read(part, annotations)
    categories = {c["id"]: str(c.get("name", c["id"])) for c in content["categories"]}
    problems = []
    if len(categories) != num_classes:
        problems.append(
            f"expected {num_classes} categories, as num_classes says, got {len(categories)}"
        )
    if list(categories) != sorted(categories, key=lambda number: (str(type(number)), number)):
        problems.append(
            f"expected categories in the order of their ids, which numbers the classes, got "
            f"{', '.join(map(str, list(categories)[:_SHOWN]))}"
        )
    sizes = _check_images(content["images"], images, problems)
    _check_boxes(part, content["annotations"], sizes, categories, problems)
    if problems:
        raise DataError(f"{part}: {annotations}:\n  " + "\n  ".join(problems))
    check_pairs(part, [(str(images / image["file_name"]), None) for image in content["images"]])
    return [categories[number] for number in sorted(categories)]


def _read(part: str, path: Path) -> dict[str, list[dict]]:
    if not path.is_file():
        raise DataError(f"{part}: expected annotations in COCO's JSON, found no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{part}: {path} is not JSON that can be read: {error}") from error
    for key, needed in (
        ("images", ("id", "file_name", "width", "height")),
        ("annotations", ("id", "image_id", "category_id", "bbox", "area", "iscrowd")),
        ("categories", ("id",)),
    ):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{part}: {path}: expected a list {key!r}, as COCO's format has it.")
        for number, entry in enumerate(entries):
            missing = [name for name in needed if name not in entry]
            if missing:
                raise DataError(
                    f"{part}: {path}: {key}[{number}]: expected {', '.join(needed)}, got no "
                    f"{', '.join(missing)}."
                )
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
        try:
            with Image.open(path) as picture:
                found = picture.size
                if picture.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS:
                    found = found[::-1]  # as it is read
        except OSError:
            continue  # named with those that do not decode
        if found != (image["width"], image["height"]):
            other.append(
                f"{path}: expected {image['width']}x{image['height']}, got {found[0]}x{found[1]}"
            )
    problems += listed("pictures are missing", missing)
    problems += listed("pictures have another size than the file says", other)
    return sizes


def _check_boxes(
    part: str,
    annotations: list[dict],
    sizes: dict[object, tuple[int, int]],
    categories: dict[object, str],
    problems: list[str],
) -> None:
    nowhere, unknown, wrong, flat, beyond = [], [], [], 0, 0
    counts = Counter(annotation["id"] for annotation in annotations)
    twice = [str(number) for number, count in counts.items() if count > 1]
    problems += listed("annotation ids are there twice", twice)  # the later one would replace it
    for number, annotation in enumerate(annotations):
        name = f"annotation {annotation.get('id', number)}"
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
        flat += width <= 0 or height <= 0 or not annotation["area"] > 0
        beyond += left < 0 or top < 0 or left + width > across or top + height > down
    problems += listed("annotations belong to no picture", nowhere)
    problems += listed("annotations have a category that is not there", unknown)
    problems += listed("boxes are not [x, y, width, height]", wrong)
    if not annotations:
        problems.append("expected annotations, got none")
    for count, what in (
        (flat, "have no area and are left out"),
        (beyond, "reach beyond their picture"),
    ):
        if count:
            logger.warning(f"{part}: {count} of {len(annotations)} boxes {what}")


def _finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def listed(what: str, found: list[str]) -> list[str]:
    """Problems of one kind as a line of a report: their number and the first of them; nothing for
    none."""
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{more}"]
