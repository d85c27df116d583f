"""Make PaddleDetection's data sets read annotations by `ppvision.data`, so that check, data sets
and metrics read the same.

If `ppvision.data.coco_reading` changes something, such as the annotation id 0, which pycocotools
treats as "no match", `COCODataSet` gets the path of a changed copy. pycocotools then evaluates the
same copy. `VOCDataSet` gets its records from `ppvision.data.voc_reading`, and VOC's metric gets a
copy of the label list.
"""

import atexit
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ppdet.data.source import category
from ppdet.data.source.coco import COCODataSet, SemiCOCODataSet, SlicedCOCODataSet
from ppdet.data.source.voc import VOCDataSet, pascalvoc_label

from ppvision.data.coco_reading import read_coco
from ppvision.data.text import is_plain_utf8, open_lines, read_names
from ppvision.data.voc_reading import VocPicture, read_voc
from ppvision.errors import DataError
from ppvision.files import write_text

logger = logging.getLogger("ppvision")

_OURS = "reads_by_ppvision"  # marks a method that is replaced already


def read_alike() -> None:
    """Make PaddleDetection's COCO and VOC data sets read annotations by `ppvision.data`.

    A COCO data set omits objects without a mask if its attribute `needs_masks` is true or its
    `data_fields` contain `gt_poly`.
    """
    for component in (COCODataSet, SemiCOCODataSet, SlicedCOCODataSet):
        if not hasattr(component.parse_dataset, _OURS):
            component.parse_dataset = _parse_copy_by(component.parse_dataset)
    VOCDataSet.parse_dataset = _parse_voc
    category.open = open_lines  # label lists of `get_categories`


def _parse_copy_by(parse: Callable) -> Callable:
    @functools.wraps(parse)
    def parse_dataset(self: COCODataSet) -> None:
        path = self.get_anno()
        if path is not None and os.path.isfile(path):
            masks = getattr(self, "needs_masks", False) or "gt_poly" in self.data_fields
            status = os.stat(path)
            changes = status.st_size, status.st_mtime_ns
            images = os.path.join(self.dataset_dir, self.image_dir)
            self.anno_path = _copy_of_coco(os.path.abspath(path), images, masks, changes)
        parse(self)

    setattr(parse_dataset, _OURS, True)
    return parse_dataset


@functools.cache
def _copy_of_coco(path: str, images: str, masks: bool, changes: tuple[int, int]) -> str:
    """Return the annotation file for later readers; `changes` are its size and time."""
    found = read_coco(path, images, masks=masks)
    if not found.changed and path.endswith(".json") and is_plain_utf8(path):
        return path
    try:
        text = json.dumps(found.content)
    except RecursionError as error:
        raise DataError(
            f"{path}: expected COCO's format, got a value nested too deeply."
        ) from error
    return _write_copy(f"{Path(path).stem}.json", text)


def _write_copy(name: str, text: str) -> str:
    path = Path(tempfile.mkdtemp(dir=_temporary_folder())) / name
    write_text(path, text)
    return str(path)


@functools.cache
def _temporary_folder() -> str:
    """Return a folder for this process; it is removed when the process ends."""
    folder, owner = tempfile.mkdtemp(prefix="ppvision-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked worker
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _parse_voc(self: VOCDataSet) -> None:
    """Replaces `VOCDataSet.parse_dataset`; it uses the result of `read_voc`.

    As in the original, missing images are omitted. There are two differences: an image whose boxes
    all have no area counts as an image without objects, and images are numbered by their place, not
    by the XML's `id`, which tools often leave at 0.
    """
    names = list(pascalvoc_label())
    if self.label_list:
        labels = os.path.join(self.dataset_dir, self.label_list)
        names = read_names(labels)
        # VOC's metric reads this.
        self.label_list = _write_copy("labels.txt", "".join(f"{name}\n" for name in names))
    annotations = os.path.join(self.dataset_dir, self.anno_path)
    found = read_voc(annotations, os.path.join(self.dataset_dir, self.image_dir), names)
    for problem in found.problems:
        logger.warning(f"{annotations}: {problem}")
    pictures = [picture for picture in found.pictures if os.path.exists(picture.image)]
    if self.sample_num > 0:
        pictures = pictures[: self.sample_num]
    if not pictures:
        raise DataError(f"{annotations}: expected images with XML files, found none.")
    made = [_make_record(number, p, self.data_fields) for number, p in enumerate(pictures)]
    records = [r for r, picture in zip(made, pictures, strict=True) if picture.objects]
    if self.allow_empty:
        empty = [r for r, picture in zip(made, pictures, strict=True) if not picture.objects]
        records += self._sample_empty(empty, len(records)) if empty else []
    self.roidbs = records
    self.cname2cid = {name: number for number, name in enumerate(names)}


def _make_record(number: int, picture: VocPicture, fields: list[str]) -> dict[str, object]:
    """Make a record for PaddleDetection: the entries of `fields`, and the image's file and size."""
    objects = picture.objects
    values = {
        "gt_class": np.array([[item.class_id] for item in objects], np.int32).reshape(-1, 1),
        "gt_score": np.ones((len(objects), 1), np.float32),
        "gt_bbox": np.array([item.box for item in objects], np.float32).reshape(-1, 4),
        "difficult": np.array([[item.is_difficult] for item in objects], np.int32).reshape(-1, 1),
    }
    record: dict[str, object] = {}
    if "image" in fields:
        record = {
            "im_file": str(picture.image),
            "im_id": np.array([number]),
            "h": picture.height,
            "w": picture.width,
        }
    return record | {key: value for key, value in values.items() if key in fields}
