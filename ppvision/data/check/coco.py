"""Check a COCO annotation file before training, and report all problems together."""

import logging
import os
from collections import Counter
from pathlib import Path

from ppvision.data.check.segmentation import check_pairs
from ppvision.data.check.summary import DataSummary
from ppvision.data.coco_reading import find_repeated, is_whole, list_problems, read_coco
from ppvision.data.pictures import read_picture_size
from ppvision.errors import DataError

logger = logging.getLogger("ppvision")

_SHOWN = 10  # ids and names that a message lists


def check_coco(
    part: str,
    annotations: Path,
    images: Path,
    num_classes: int,
    *,
    masks: bool = False,
    max_value: int | None = None,
) -> DataSummary:
    """Check an annotation file and every image that it names.

    The log counts the changes that `ppvision.data.coco_reading` makes in memory, and classes with
    the same name. Training and evaluation read the changed content, so they meet no other problem.

    Args:
        part: of the config, for messages.
        annotations: the JSON file.
        images: the folder that its `file_name`s are in.
        num_classes: of the model.
        masks: whether every object needs one. Default False.
        max_value: of images of more than 8 bits per channel; see `read_picture`.

    Returns:
        Images, and objects of each class, by category id.

    Raises:
        DataError: one report of everything that is wrong.
    """
    if not annotations.is_file():
        raise DataError(
            f"{part}: expected annotations in COCO's JSON, found no file {annotations}."
        )
    try:
        found = read_coco(annotations, images, masks=masks)
    except DataError as error:
        raise DataError(f"{part}: {error}") from error
    problems = found.problems
    entries = [c for c in found.content["categories"] if is_whole(c.get("id"))]
    numbers = [category["id"] for category in entries]
    categories = {c["id"]: c.get("name") for c in entries}
    # PaddleDetection would count such a category twice, and give its objects to a class beyond the
    # last.
    problems += list_problems("category ids are there twice", find_repeated(numbers))
    if len(categories) != num_classes:
        problems.append(
            f"expected {num_classes} categories, as num_classes says, got {len(categories)}"
        )
    if numbers != sorted(numbers):
        problems.append(
            f"expected categories in the order of their ids, which numbers the classes, got "
            f"{', '.join(map(str, numbers[:_SHOWN]))}: sort the list"
        )
    _check_images(found.content["images"], images, problems)
    if problems:
        raise DataError(f"{part}: {annotations}:\n  " + "\n  ".join(problems))
    for note in found.notes:
        logger.warning(f"{part}: {annotations}: {note}")
    if same := find_repeated(categories.values()):
        logger.warning(f"{part}: categories of one name: {', '.join(same[:_SHOWN])}")
    pictures = [(str(images / image["file_name"]), None) for image in found.content["images"]]
    checked = check_pairs(part, pictures, max_value)
    objects = Counter(item["category_id"] for item in found.content["annotations"])
    order = sorted(categories)
    return DataSummary(
        checked["images"],
        checked["sizes"],
        "objects",
        [objects[number] for number in order],
        [categories[number] for number in order],
    )


def _check_images(entries: list[dict], folder: Path, problems: list[str]) -> None:
    missing, other = [], []
    for entry in entries:
        name, size = entry.get("file_name"), (entry.get("width"), entry.get("height"))
        if not isinstance(name, str) or not all(map(is_whole, size)):
            continue  # reported when it was read
        path = folder / name
        if not os.path.isfile(path):
            missing.append(str(path))
            continue
        other += find_other_size(path, size)
    problems += list_problems("images are missing", missing)
    problems += list_problems("images have another size than the file says", other)


def find_other_size(path: Path, size: tuple[float, float]) -> list[str]:
    """Return a message if an image does not have the size `(width, height)`. Return nothing if it
    has, or if it does not decode, because another check reports that."""
    try:
        height, width = read_picture_size(path)
    except DataError:
        return []
    if (width, height) == size:
        return []
    return [f"{path}: expected {size[0]:g}x{size[1]:g}, got {width}x{height}"]
