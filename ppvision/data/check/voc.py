"""Check Pascal VOC annotations before training, and report all problems together."""

import logging
import os
from collections import Counter
from pathlib import Path

from ppvision.data.check.coco import find_other_size
from ppvision.data.check.segmentation import check_pairs
from ppvision.data.check.summary import DataSummary
from ppvision.data.coco_reading import find_repeated, list_problems
from ppvision.data.text import read_names
from ppvision.data.voc_reading import read_voc
from ppvision.errors import DataError

logger = logging.getLogger("ppvision")


def check_voc(
    part: str,
    annotations: Path,
    folder: Path,
    labels: Path,
    num_classes: int,
    max_value: int | None = None,
) -> DataSummary:
    """Check a list of images and XML files, and all files that it names.

    The log counts boxes without an area inside their image, which are omitted, and values of
    `difficult` that are not 0 or 1.

    Args:
        part: of the config, for messages.
        annotations: the list, with an image and its XML file per line.
        folder: the folder of both.
        labels: a file with one class per line.
        num_classes: of the model.
        max_value: of images of more than 8 bits per channel; see `read_picture`.

    Returns:
        Images, and objects of each class.

    Raises:
        DataError: one report of everything that is wrong.
    """
    for file, what in ((annotations, "a list of images and XML files"), (labels, "a label_list")):
        if not file.is_file():
            raise DataError(f"{part}: expected {what}, found no file {file}.")
    try:
        names = read_names(labels)
        found = read_voc(annotations, folder, names)
    except DataError as error:
        raise DataError(f"{part}: {error}") from error
    problems = []
    if len(names) != num_classes:
        problems.append(
            f"expected {num_classes} classes in {labels}, as num_classes says, got {len(names)}"
        )
    problems += list_problems(f"classes are there twice in {labels}", find_repeated(names))
    problems += found.problems
    other = []
    for picture in found.pictures:
        if os.path.isfile(picture.image):
            other += find_other_size(picture.image, (picture.width, picture.height))
    problems += list_problems("images have another size than their XML file says", other)
    if not found.pictures and not problems:
        problems.append("expected images, got none")
    if not problems and not any(picture.objects for picture in found.pictures):
        problems.append("expected objects, got none with an area inside their image")
    if problems:
        raise DataError(f"{part}: {annotations}:\n  " + "\n  ".join(problems))
    if all(item.is_difficult for picture in found.pictures for item in picture.objects):
        found.notes.append("every object is difficult: a score counts none, and is 0")
    for note in found.notes:
        logger.warning(f"{part}: {annotations}: {note}")
    pairs = [(str(picture.image), None) for picture in found.pictures]
    checked = check_pairs(part, pairs, max_value)
    objects = Counter(item.class_id for picture in found.pictures for item in picture.objects)
    counts = [objects[number] for number in range(len(names))]
    return DataSummary(checked["images"], checked["sizes"], "objects", counts, names)
