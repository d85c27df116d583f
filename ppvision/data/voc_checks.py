"""Looking at Pascal VOC annotations before training, so that all that is wrong is said at once."""

import logging
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from ppvision.data.checks import check_pairs
from ppvision.data.coco_checks import listed, other_size
from ppvision.errors import DataError, InputError

_EDGES = ("xmin", "ymin", "xmax", "ymax")

logger = logging.getLogger("ppvision")


def check_voc(part: str, annotations: Path, folder: Path, labels: Path, num_classes: int) -> None:
    """Check a list of pictures and XML files, and all that it names.

    Boxes without an area inside of their picture, which PaddleDetection leaves out, are counted in
    the log.

    Args:
        part: of the config, for messages.
        annotations: the list, a picture and its XML file a line.
        folder: that both are in.
        labels: a class a line.
        num_classes: of the model.

    Raises:
        DataError: one report of everything that is wrong.
    """
    for file, what in ((annotations, "a list of pictures and XML files"), (labels, "a label_list")):
        if not file.is_file():
            raise DataError(f"{part}: expected {what}, found no file {file}.")
    lines = annotations.read_text(encoding="utf-8").splitlines()
    names = [name.strip() for name in labels.read_text(encoding="utf-8").splitlines()]
    problems = []
    if "" in names:  # PaddleDetection would count it as a class
        problems.append(f"expected a class in every line of {labels}, got an empty one")
    if len(names) != num_classes:
        problems.append(
            f"expected {num_classes} classes in {labels}, as num_classes says, got {len(names)}"
        )
    pairs = [line.split() for line in lines]
    short = [f"line {number}" for number, words in enumerate(pairs, start=1) if len(words) < 2]
    problems += listed("lines are no picture and XML file", short)
    pairs = [(folder / words[0], folder / words[1]) for words in pairs if len(words) >= 2]
    if not pairs:
        problems.append("expected pictures, got none")
    missing = [str(path) for pair in pairs for path in pair if not path.is_file()]
    problems += listed("files are missing", missing)
    _check_objects(part, [pair for pair in pairs if pair[1].is_file()], names, problems)
    if problems:
        raise DataError(f"{part}: {annotations}:\n  " + "\n  ".join(problems))
    check_pairs(part, [(str(image), None) for image, _ in pairs])


def _check_objects(
    part: str, pairs: Sequence[tuple[Path, Path]], names: Sequence[str], problems: list[str]
) -> None:
    broken, unknown, other, flat, count = [], [], [], 0, 0
    for image, path in pairs:
        try:
            root = ElementTree.parse(path).getroot()
            width, height = (float(root.findtext(f"size/{axis}")) for axis in ("width", "height"))
            other += other_size(image, (width, height))
            for number, item in enumerate(root.iter("object")):
                count += 1
                if item.findtext("name") not in names:
                    unknown.append(f"{path}, object {number}: {item.findtext('name')!r}")
                box = [float(item.findtext(f"bndbox/{edge}")) for edge in _EDGES]
                left, top, right, bottom = box
                if not all(map(math.isfinite, box)):
                    raise InputError("a box that is not finite")
                across = min(right, width - 1) - max(left, 0)
                down = min(bottom, height - 1) - max(top, 0)
                flat += across <= 0 or down <= 0
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            broken.append(f"{path} ({error})")
    problems += listed("XML files have no size or boxes that can be read", broken)
    problems += listed("pictures have another size than their XML file says", other)
    problems += listed("objects have a class that is not in the label_list", unknown)
    if not count:
        problems.append("expected objects, got none")
    if flat:
        logger.warning(f"{part}: {flat} of {count} boxes have no area inside and are left out")
