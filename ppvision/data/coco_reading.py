"""Read a COCO annotation file so that all later readers interpret it in the same way.

PaddleDetection and pycocotools read the same file by different rules: pycocotools treats the
annotation id 0 as "no match"; PaddleDetection omits a flat box from training that pycocotools
counts in an evaluation. `read_coco` gives content that both interpret in the same way, and says
what it changed. The file itself does not change.
"""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ppvision.data.listing import is_leftover, locate
from ppvision.data.text import cut_text, read_json, shorten
from ppvision.errors import DataError, InputError

_SHOWN = 10  # problems of one kind that are named
_LARGEST_ID = 2**53  # NumPy converts a mix of 64-bit and other numbers to floats
# Pixels. PaddleDetection stores boxes in float32, which represents every whole number up to this
# one.
_LARGEST_EDGE = 2**24
_FORMAT = "entries are not as COCO's format has them"
_NO_MASK = "masks are no list of polygons [x, y, x, y, x, y, ...] and no run lengths"
_FEW_POINTS = "polygons have fewer than three points and are omitted"
_NO_PIXEL = "objects have no pixel of a mask and are omitted"
# Pixels. pycocotools follows every edge pixel by pixel: an edge of 2**24 takes seconds and
# gigabytes.
_LONGEST_WALK = 2**16


@dataclass
class CocoFile:
    """The content of an annotation file.

    Attributes:
        content: `images`, `annotations` and `categories` in the form for evaluators.
        problems: the problems, one line per kind.
        notes: changes and unusual entries, one line per kind.
        changed: whether `content` differs from the file.
        objects: number of annotations that training learns and an evaluation counts.
    """

    content: dict
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changed: bool = False
    objects: int = 0


def read_coco(path: str | Path, images: str | Path, *, masks: bool = False) -> CocoFile:
    """Read an annotation file.

    Changed in memory: annotation ids that an evaluator reserves or that do not identify become 1,
    2, ...; image ids that are text become numbers; a missing `iscrowd` is 0 and a missing `area`
    that of the box; whole numbers written as floats become whole; file names get the spelling under
    which the file is there; polygons of fewer than three points go; and objects that cannot be
    learned (no area, with `masks` no pixel of a mask) go from training and evaluation alike.

    Args:
        path: the JSON file.
        images: the folder that its `file_name`s are in.
        masks: whether every object needs a mask. Default False: an invalid mask is dropped, and the
            box stays.

    Raises:
        DataError: not JSON, or without lists of `images` and `categories`.
    """
    read = read_json(path)
    for key in ("categories", "images"):
        _require_list(path, read, key)
    found = CocoFile({**read})
    if "annotations" not in read:  # PaddleDetection would see no objects
        found.problems.append("expected a list 'annotations', as COCO's format has it, got none")
        return found
    _require_list(path, read, "annotations")
    _Reader(found, Path(images), masks).read()
    for key in ("images", "annotations", "categories"):
        # Entries without a change are identical objects, not only equal ones: 1.0 equals 1.
        before, after = read[key], found.content[key]
        same = len(before) == len(after) and all(map(operator.is_, before, after))
        found.changed |= not same
    return found


def read_category_names(path: str | Path) -> list[str]:
    """Return the names of the classes of an annotation file, in the order of their numbers.

    Raises:
        DataError: not JSON, or without categories.
    """
    content = read_json(path)
    _require_list(path, content, "categories")
    return [str(entry.get("name", number)) for number, entry in enumerate(content["categories"])]


def _require_list(path: str | Path, content: object, key: str) -> None:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise DataError(f"{path}: expected a list {key!r} of objects, as COCO's format has it.")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a number that float64 can represent."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_whole(value) and abs(value) < 2**1000


def find_repeated(values: Iterable[Hashable]) -> list[str]:
    """Return the entries that occur more than once, as text."""
    return [shorten(value) for value, count in Counter(values).items() if count > 1]


def list_problems(what: str, found: list[str]) -> list[str]:
    """Return problems of one kind as a line of a report: their number and the first of them.
    Without problems, return nothing."""
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{len(found)} {what}: {', '.join(map(cut_text, found[:_SHOWN]))}{more}"]


def _as_whole(value: object) -> object:
    """Return a whole number for one that is written as a float; return other values unchanged."""
    is_integral = isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_ID
    return int(value) if is_integral else value


def _is_id(value: object) -> bool:
    return is_whole(value) and abs(value) < _LARGEST_ID


def _is_side(value: object) -> bool:
    return is_whole(value) and 0 < value <= _LARGEST_EDGE


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_crowd_flag(value: object) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)


class _Reader:
    """Goes through a file's lists once and replaces the entries that change.

    Args:
        file: to be completed.
        images: folder of the images.
        masks: whether every object needs one.
    """

    def __init__(self, file: CocoFile, images: Path, masks: bool) -> None:
        self.file, self.images, self.masks = file, images, masks
        self.wrong: defaultdict[str, list[str]] = defaultdict(list)  # by kind
        self.counts: Counter[str] = Counter()  # the changes, in words

    def read(self) -> None:
        content = self.file.content
        categories = self._read_categories(content["categories"])
        content["images"], ids, sizes = self._read_images(content["images"])
        kept = (
            self._read_annotation(number, entry, ids, sizes, categories)
            for number, entry in enumerate(content["annotations"])
        )
        content["annotations"] = self._number([entry for entry in kept if entry is not None])
        problems = self.file.problems
        for what, found in self.wrong.items():
            problems += list_problems(what, found)
        self.file.notes += [f"{count} {what}" for what, count in self.counts.items() if count]
        if not content["images"]:
            problems.append("expected images, got none")
        if not problems and not self.file.objects:
            what = "crowds, ignored ones and boxes without an area alone"
            problems.append(f"expected objects, got {what if content['annotations'] else 'none'}")

    def _require(
        self, where: str, entry: dict, needed: dict[str, tuple[Callable[[object], bool], str]]
    ) -> bool:
        """Whether an entry has the values that it needs. Problems are added to the report."""
        if missing := [name for name in needed if name not in entry]:
            self.wrong[_FORMAT].append(
                f"{where}: expected {', '.join(needed)}, got no {', '.join(missing)}"
            )
            return False
        faults = [
            f"{where}: {name}: expected {what}, got {shorten(entry[name])}"
            for name, (fits, what) in needed.items()
            if not fits(entry[name])
        ]
        self.wrong[_FORMAT] += faults
        return not faults

    def _changed(self, entry: dict, values: dict[str, object]) -> dict:
        """Return the entry with these values; the same object if it has them already."""
        same = all(
            key in entry and type(entry[key]) is type(value) and entry[key] == value
            for key, value in values.items()
        )
        return entry if same else {**entry, **values}

    def _read_categories(self, entries: list[dict]) -> dict[int, str]:
        needed = {"id": (_is_id, "a whole number"), "name": (_is_text, "text")}
        kept, categories = [], {}
        for number, entry in enumerate(entries):
            changed = self._changed(entry, {"id": _as_whole(entry["id"])} if "id" in entry else {})
            kept.append(changed)
            if not self._require(f"categories[{number}]", changed, needed):
                continue
            if any("\ud800" <= letter <= "\udfff" for letter in changed["name"]):
                self.wrong[_FORMAT].append(f"categories[{number}]: name: expected UTF-8 text")
            categories[changed["id"]] = changed["name"]
        self.file.content["categories"] = kept
        return categories

    def _read_images(
        self, entries: list[dict]
    ) -> tuple[list[dict], dict[Hashable, int], dict[int, tuple[int, int]]]:
        """Return the entries, their new ids by the ids of the file, and their sizes (width, height)
        by id."""
        names = all(_is_text(entry.get("id")) for entry in entries) and bool(entries)
        if names:
            self.counts["image ids are text and get numbers"] = len(entries)
        side = _is_side, "a whole number above 0"
        needed = {
            "id": (_is_id, "a whole number"),
            "file_name": (_is_text, "text"),
            "width": side,
            "height": side,
        }
        kept, ids, sizes = [], {}, {}
        for number, entry in enumerate(entries):
            keys = [key for key in ("id", "width", "height") if key in entry]
            whole = {key: _as_whole(entry[key]) for key in keys}
            if names:
                whole["id"] = ids.get(entry["id"], len(ids) + 1)
            changed = self._changed(entry, whole)
            if not self._require(f"images[{number}]", changed, needed):
                kept.append(changed)
                continue
            key = entry["id"] if names else changed["id"]
            if key in ids:
                self.wrong["image ids are there twice"].append(shorten(key))
            ids[key] = changed["id"]
            if is_leftover(changed["file_name"]):
                self.counts["images are what tools leave behind and are omitted"] += 1
                sizes[changed["id"]] = None
                continue
            located = locate(self.images, changed["file_name"])
            kept.append(self._changed(changed, {"file_name": located}))
            sizes[changed["id"]] = changed["width"], changed["height"]
        return kept, ids, sizes

    def _number(self, entries: list[dict]) -> list[dict]:
        """Give annotations new ids if needed: pycocotools treats 0 as "no match", and confuses
        annotations with the same id."""
        wrong, seen = 0, set()
        for entry in entries:
            number = entry.get("id")
            if not _is_id(number) or number < 1 or number in seen:
                wrong += 1
            else:
                seen.add(number)
        if not wrong:
            return entries
        self.counts[
            "annotation ids are no number above 0 of their own: all annotations get new ones"
        ] = wrong
        return [{**entry, "id": number} for number, entry in enumerate(entries, start=1)]

    def _read_annotation(
        self,
        number: int,
        entry: dict,
        ids: dict[Hashable, int],
        sizes: dict[int, tuple[int, int] | None],
        categories: dict[int, str],
    ) -> dict | None:
        """Return one annotation in the form for later readers, or None to omit it."""
        where = f"annotations[{number}]"
        name = f"annotation {shorten(entry.get('id', number))}"
        values = {}
        if "category_id" in entry:
            values["category_id"] = _as_whole(entry["category_id"])
        if entry.get("iscrowd") is None:
            self.counts["annotations have no iscrowd, taken as 0"] += 1
            values["iscrowd"] = 0
        elif _is_crowd_flag(entry["iscrowd"]):
            values["iscrowd"] = int(entry["iscrowd"])
        box = entry.get("bbox")
        is_box = isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))
        is_box = is_box and all(abs(edge) <= _LARGEST_EDGE for edge in box)
        if entry.get("area") is None:
            self.counts["annotations have no area, taken as that of their box"] += 1
            values["area"] = box[2] * box[3] if is_box else 0
        if not _is_int32(entry.get("track_id", 0)):
            self.counts["annotations have a track_id that is not a whole number, omitted"] += 1
            entry = {key: value for key, value in entry.items() if key != "track_id"}
        changed = self._changed(entry, values)
        needed = {
            "image_id": (lambda value: isinstance(value, (int, float, str)), "a whole number"),
            "category_id": (_is_id, "a whole number"),
            "bbox": (lambda value: True, ""),  # reported together
            "area": (is_finite, "a number"),
            "iscrowd": (_is_crowd_flag, "0 or 1"),
        }
        if not self._require(where, changed, needed):
            return changed
        picture = entry["image_id"]
        if isinstance(picture, bool) or picture not in ids:
            kind = "annotations belong to no image"
            self.wrong[kind].append(f"{name}: image_id {shorten(picture)}")
            return changed
        changed = self._changed(changed, {"image_id": ids[picture]})
        size = sizes[ids[picture]]
        if size is None:  # its image is omitted
            return None
        if changed["category_id"] not in categories:
            kind = "annotations have a category that is not there"
            self.wrong[kind].append(f"{name}: category_id {shorten(changed['category_id'])}")
        if not is_box:
            self.wrong["boxes are not [x, y, width, height]"].append(f"{name}: {shorten(box)}")
            return changed
        if _lies_outside(box, size):
            kind = "boxes lie outside their image"
            self.wrong[kind].append(f"{name}: {box} in {size[0]}x{size[1]}")
            return changed
        changed = self._read_mask(name, changed, size)
        if changed is None:
            return None
        # pycocotools would count objects on which PaddleDetection never trains.
        left, top, width, height = box
        if not (changed["area"] > 0 and has_area(left, top, left + width, top + height)):
            self.counts["boxes have no area and are omitted"] += 1
            return None
        beyond = box[0] < 0 or box[1] < 0 or box[0] + box[2] > size[0] or box[1] + box[3] > size[1]
        self.counts["boxes extend beyond their image"] += beyond
        ignored = bool(changed.get("ignore"))
        self.counts["annotations say `ignore`: training leaves them out, scores count them"] += (
            ignored
        )
        self.file.objects += not changed["iscrowd"] and not ignored
        return changed

    def _read_mask(self, name: str, entry: dict, size: tuple[int, int]) -> dict | None:
        """Return the annotation with its valid polygons, or None if masks are needed and its mask
        has no pixel."""
        mask = entry.get("segmentation")
        if not self.masks:
            # At an empty mask, PaddleDetection's reader loses its place, and with it other boxes
            # are lost.
            if "segmentation" in entry and not _is_filled(mask):
                return {key: value for key, value in entry.items() if key != "segmentation"}
            return entry
        if isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
            kept = [polygon for polygon in mask if len(polygon) >= 6]
            self.counts[_FEW_POINTS] += len(mask) - len(kept)
            if len(kept) != len(mask):
                entry, mask = {**entry, "segmentation": kept}, kept
        if mask is None or mask == []:
            self.counts[_NO_PIXEL] += 1
            return None
        if fault := find_mask_fault(mask, size):
            self.wrong[_NO_MASK].append(f"{name}: {fault}")
        elif not _has_pixels(mask, size):
            self.counts[_NO_PIXEL] += 1
            return None
        return entry


def _is_filled(mask: object) -> bool:
    """Whether a `segmentation` has run lengths or begins with a polygon."""
    if isinstance(mask, list):
        return bool(mask and isinstance(mask[0], list) and mask[0] and is_finite(mask[0][0]))
    return isinstance(mask, dict) and bool(mask)


def has_area(left: float, top: float, right: float, bottom: float) -> bool:
    """Whether a box has an area in float32 with three decimals, the form in PaddleDetection.

    A box without a width causes losses that are not finite.
    """
    if right - left >= 2 and bottom - top >= 2:  # larger than any rounding of an edge
        return True
    edges = np.float32([round(float(edge), 3) for edge in (left, top, right, bottom)])
    return bool(edges[2] > edges[0] and edges[3] > edges[1])


def _is_int32(value: object) -> bool:
    return is_whole(value) and -(2**31) <= value < 2**31


def _lies_outside(box: list[float], size: tuple[int, int]) -> bool:
    left, top, width, height = box
    before = (left < 0 and left + width <= 0) or (top < 0 and top + height <= 0)
    return before or left >= size[0] or top >= size[1]


def find_mask_fault(mask: object, size: tuple[int, int]) -> str | None:
    """Return the problem of a `segmentation` for an image of `(width, height)`, or None."""
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list):
                return f"{shorten(polygon)} in place of a polygon"
            in_range = all(is_finite(edge) and abs(edge) <= _LARGEST_EDGE for edge in polygon)
            if len(polygon) < 6 or len(polygon) % 2 or not in_range:
                return f"a polygon of {len(polygon)} numbers"
        return None if mask else "no polygon"
    if not isinstance(mask, dict) or not {"size", "counts"} <= mask.keys():
        return shorten(mask)
    if mask["size"] != [size[1], size[0]]:
        return f"run lengths of size {shorten(mask['size'])}, expected {[size[1], size[0]]}"
    counts = mask["counts"]
    if isinstance(counts, list):
        fits = all(is_whole(n) and n >= 0 for n in counts) and sum(counts) == size[0] * size[1]
        return None if fits else "run lengths that do not fill the image"
    if not isinstance(counts, str):
        return f"run lengths {shorten(counts)}"
    try:
        filled = sum(expand_run_lengths(counts))
    except ValueError:
        filled = -1
    return None if filled == size[0] * size[1] else "compressed run lengths that are damaged"


def _has_pixels(mask: list | dict, size: tuple[int, int]) -> bool:
    """Whether a `segmentation` without a fault sets a pixel of an image of `(width, height)`."""
    if isinstance(mask, list):
        return any(_fills_pixels(polygon, size) for polygon in mask)
    counts = mask["counts"]
    return any((counts if isinstance(counts, list) else expand_run_lengths(counts))[1::2])


def _fills_pixels(polygon: list[float], size: tuple[int, int]) -> bool:
    # Imported here only: the package is installed with PaddleDetection, which has the mask heads.
    from pycocotools import mask as mask_utils

    width, height = size
    across, down = polygon[::2], polygon[1::2]
    left, right, top, bottom = min(across), max(across), min(down), max(down)
    # One pixel more than the image: pycocotools rounds corners to a fifth of a pixel.
    if right < -1 or left > width + 1 or bottom < -1 or top > height + 1:
        return False
    if max(-left, right, -top, bottom) > _LONGEST_WALK:
        return True
    # The area between the corners does not say whether there are pixels: a polygon that goes around
    # twice has twice its area and no pixel, a bow tie has no area and many pixels, and a thin
    # polygon of any length passes between the centres of pixels. Drawing a polygon takes about 20
    # to 70 microseconds.
    (runs,) = mask_utils.frPyObjects([polygon], height, width)
    return bool(mask_utils.area(runs))


def expand_run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run lengths. They are digits of five bits, the lowest first; the
    sixth bit says that more digits follow. From the third number on, each is the difference from
    the number two places before.

    Raises:
        ValueError: the text ends inside a number, has other characters, or a length that is
            below 0 or has more than 32 bits.
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
            if shift > 30:  # pycocotools uses 32 bits; an endless number would take forever
                raise InputError(text[:20])
            continue
        if digit & 16:
            number -= 1 << shift  # its sign
        if len(found) > 2:
            number += found[-2]
        if not 0 <= number < 2**32:
            raise InputError(text[:20])
        found.append(number)
        number = shift = 0
    if shift:
        raise InputError(text[:20])
    return found
