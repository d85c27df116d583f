"""Check a segmentation data set before the first step, and name every file that is wrong.

The check reads what PaddleSeg's `Dataset` reads under `ppvision`: the same `image label` lines
(both call `ppvision.data.listing.read_pairs`), and images and label maps with the reader of
training, evaluation and prediction (`ppvision.data.pictures`). Files that pass the check can
therefore be read there. PaddleSeg itself finds most of these faults in the middle of a training, as
a broadcast error or a loss of NaN, or not at all.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ppvision.console import FILE_ONLY, track
from ppvision.data.check.verdicts import find_verdict_file, read_verdict, write_verdict
from ppvision.data.limits import read_max_pixels
from ppvision.data.listing import read_pairs
from ppvision.data.pictures import DepthError, IndexMapError, read_label, read_picture
from ppvision.data.text import cut_text
from ppvision.errors import DataError

SHOWN = 10  # problems of each kind that the error lists
ANY_CLASS = 2**16  # more classes than a label map of 16 bits can hold: no value is out of range
CHECKS_VERSION = 3  # raise it when a check changes, so that stored verdicts are not used

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    """One line of the list: its name in errors, and its files."""

    where: str
    image: Path
    label: Path | None


@dataclass
class _Finding:
    """The result of the check of one pair: problems as (kind, text), the image's height and width,
    and pixels by label value."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    pixels: Counter = field(default_factory=Counter)


def check_segmentation_list(
    list_file: str | Path,
    dataset_root: str | Path,
    num_classes: int,
    ignore_index: int = 255,
    separator: str = " ",
    need_labels: bool = True,
    max_value: int | None = None,
) -> dict:
    """Check every line and file of a PaddleSeg list; raise one error that groups all problems.

    Every image is decoded to its end, in several threads. The verdict on a set without problems
    is kept in `~/.cache/ppvision/checked` (`PPVISION_CACHE` replaces `~/.cache/ppvision`) and
    holds until the list, an argument, or the size or time of a file changes. With several
    processes call it in one of them.

    Args:
        list_file: the list, one `image<separator>label` per line.
        dataset_root: folder that the list's paths start from.
        num_classes: label values are 0 to `num_classes - 1`.
        ignore_index: the label value of pixels that do not count.
        separator: text between the two paths.
        need_labels: whether every line must name a label (training, evaluation); labels that are
            named are checked either way.
        max_value: of images of more than 8 bits per channel; see `read_picture`. Default None: they
            are refused.

    Returns:
        `images` and `labels` (how many), `sizes` (images by "WIDTHxHEIGHT"), `class_pixels` (pixels
        of each class over the whole set, a list of length `num_classes`) and `ignored_pixels`.

    Raises:
        DataError: problems that would disturb a training: the first ten of each kind with line
            number and file, the number of the others, and what to do.
    """
    list_file, root = Path(list_file), Path(dataset_root)
    if not list_file.is_file() and (root / list_file).is_file():
        raise DataError(
            f"{list_file}: expected a list file, found none; there is one at {root / list_file}. "
            "List paths start from the current folder, not from dataset_root."
        )
    found, problems = read_pairs(list_file, root, separator, need_labels)
    if not root.is_dir():
        raise DataError(f"dataset_root: expected a folder, found none at {root}. Check the path.")
    if not found and not problems:
        raise DataError(f"{list_file}: the data set is empty: the list has no line. Fill it.")

    pairs = [_Pair(*entry) for entry in found]
    lines = [[pair.where, str(pair.image), str(pair.label)] for pair in pairs]
    settings = [str(root.resolve()), num_classes, ignore_index, separator, need_labels]
    settings += [lines, problems]
    return _checked(str(list_file), pairs, problems, settings, num_classes, ignore_index, max_value)


def check_pairs(
    name: str, file_list: Sequence[Sequence[str | None]], max_value: int | None = None
) -> dict:
    """`check_segmentation_list` for a data set that finds its files itself, as ADE20K does.

    The values of its labels are not checked, because the data set converts them itself.

    Args:
        name: how errors call the set.
        file_list: `(image, label or None)` paths.
        max_value: see `check_segmentation_list`.

    Returns:
        `images` and `labels` (how many), `sizes` (images by "WIDTHxHEIGHT").

    Raises:
        DataError: as `check_segmentation_list`.
    """
    if not file_list:
        raise DataError(f"{name}: the data set is empty. Check dataset_root.")
    pairs = [
        _Pair(f"sample {number}", Path(image), None if label is None else Path(label))
        for number, (image, label) in enumerate(file_list)
    ]
    settings = [name, [[str(pair.image), str(pair.label)] for pair in pairs]]
    summary = _checked(name, pairs, [], settings, ANY_CLASS, -1, max_value)
    return {key: summary[key] for key in ("images", "labels", "sizes")}


def _checked(
    name: str,
    pairs: list[_Pair],
    problems: list[tuple[str, str]],
    settings: list,
    num_classes: int,
    ignore_index: int,
    max_value: int | None,
) -> dict:
    count = len(pairs) + len(problems)
    # All values that a verdict depends on.
    stamp = _stamp([CHECKS_VERSION, read_max_pixels(), max_value, *settings], pairs)
    example = {
        "images": 0,
        "labels": 0,
        "sizes": {},
        "class_pixels": [],
        "ignored_pixels": 0,
    }
    if (summary := read_verdict(stamp, example)) is not None:
        logger.info(
            "%s: unchanged since it was last checked, not decoded again", name, extra=FILE_ONLY
        )
        return summary

    check = partial(
        _check_pair, num_classes=num_classes, ignore_index=ignore_index, max_value=max_value
    )
    pixels: Counter = Counter()
    sizes: Counter = Counter()
    with ThreadPoolExecutor() as pool:
        try:
            for finding in track(pool.map(check, pairs), f"check {Path(name).name}", len(pairs)):
                problems += finding.problems
                pixels += finding.pixels
                if finding.size is not None:
                    height, width = finding.size
                    sizes[f"{width}x{height}"] += 1
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: do not decode the rest
            raise
    nothing_else = ignore_index != 0 and set(pixels) <= {0, ignore_index}
    if num_classes > 1 and pixels[ignore_index] and nothing_else:
        problems.append(
            ("only background", f"every label pixel is 0 or {ignore_index} (which is ignored)")
        )
    if problems:
        raise DataError(_report(name, count, problems, num_classes, ignore_index))
    summary = {
        "images": len(pairs),
        "labels": sum(pair.label is not None for pair in pairs),
        "sizes": dict(sizes.most_common()),
        "class_pixels": [pixels[value] for value in range(num_classes)],
        "ignored_pixels": pixels[ignore_index] if ignore_index not in range(num_classes) else 0,
    }
    write_verdict(stamp, summary, name)
    return summary


def _check_pair(
    pair: _Pair, num_classes: int, ignore_index: int, max_value: int | None
) -> _Finding:
    finding = _Finding()
    image_size = finding.size = _checked_image(pair, finding, max_value)
    if pair.label is not None:
        label = _checked_label(pair, finding, num_classes, ignore_index)
        if label is not None and image_size is not None and label.shape != image_size:
            finding.problems.append(
                (
                    "sizes differ",
                    f"{pair.where}: image {pair.image} is {image_size[1]} x {image_size[0]}, "
                    f"label {pair.label} is {label.shape[1]} x {label.shape[0]}",
                )
            )
    return finding


def _read(
    read: Callable[[Path], np.ndarray], path: Path, what: str, where: str, finding: _Finding
) -> np.ndarray | None:
    """Return the pixels, or None and a problem."""
    if not os.path.exists(path):  # (Path.exists raises if a folder may not be entered)
        finding.problems.append((f"missing {what}", f"{where}: {path}"))
        return None
    try:
        return read(path)
    except DataError as error:
        kind = f"{what} does not decode"
        if isinstance(error, DepthError):
            kind = "image is not 8-bit"
        elif isinstance(error, IndexMapError):
            kind = "label is not an index map"
        finding.problems.append((kind, f"{where}: {error}"))
        return None


def _checked_image(pair: _Pair, finding: _Finding, max_value: int | None) -> tuple[int, int] | None:
    """Return height and width of the image, or None if it cannot be read."""
    read = partial(read_picture, max_value=max_value)
    pixels = _read(read, pair.image, "image", pair.where, finding)
    return None if pixels is None else pixels.shape[:2]


def _checked_label(
    pair: _Pair, finding: _Finding, num_classes: int, ignore_index: int
) -> np.ndarray | None:
    """Return the label map `[H, W]`, or None if the file is not a label map."""
    label = _read(read_label, pair.label, "label", pair.where, finding)
    if label is None:
        return None
    for value, count in _value_counts(label):
        finding.pixels[value] = count
    wrong = {
        value: count
        for value, count in finding.pixels.items()
        if value != ignore_index and not 0 <= value < num_classes
    }
    if wrong:
        listed = ", ".join(f"{value} ({count} px)" for value, count in list(wrong.items())[:5])
        more = f" and {len(wrong) - 5} more values" if len(wrong) > 5 else ""
        text = f"{pair.where}: {pair.label}: {listed}{more}"
        finding.problems.append(("label out of range", text))
    return label


def _value_counts(label: np.ndarray) -> Iterable[tuple[int, int]]:
    if label.dtype == np.uint8:
        counts = np.bincount(label.ravel())
        values = np.flatnonzero(counts)
        return zip(values.tolist(), counts[values].tolist(), strict=True)
    values, counts = np.unique(label, return_counts=True)
    return zip(values.tolist(), counts.tolist(), strict=True)


def _report(
    name: str,
    lines: int,
    problems: list[tuple[str, str]],
    num_classes: int,
    ignore_index: int,
) -> str:
    advice = {
        "no label": "Every line needs an image and a label with the separator between them.",
        "too many fields": "Expected two. For file names with the separator in them choose another "
        "one, for example a tab, in the list and as the data set's separator.",
        "missing image": "Paths start from dataset_root. Check both, or remove the line.",
        "missing label": "Paths start from dataset_root. Check both, or remove the line.",
        "image does not decode": "Do what is said below, or remove the line.",
        "label does not decode": "Do what is said below, or remove the line.",
        "image is not 8-bit": "It would be cut to its upper byte. Set max_value of the data set, "
        "by which it is scaled, or scale it to 8 bits.",
        "sizes differ": "A label map has one pixel for each pixel of its image (turned as its EXIF "
        "orientation says). Make the label again at the image's size.",
        "label is not an index map": "Expected one channel (or a palette PNG) whose values "
        "are class numbers. Map the colours to class numbers first.",
        "label out of range": f"Expected 0 to {num_classes - 1}, or {ignore_index} to ignore. "
        "Raise num_classes, or give these pixels a class or the ignored value.",
        "only background": f"Nothing but the background would be learned. Masks of 0 and "
        f"{ignore_index} have to become masks of 0 and 1.",
    }
    kinds = Counter(kind for kind, _ in problems)
    plural = "" if len(problems) == 1 else "s"
    parts = [f"{name}: {len(problems)} problem{plural} in {lines} lines."]
    for kind, sentence in advice.items():
        if kind in kinds:
            parts.append(f"{kind} ({kinds[kind]}): {sentence}")
            texts = [text for other, text in problems if other == kind]
            parts += [f"    {cut_text(text)}" for text in texts[:SHOWN]]
            if len(texts) > SHOWN:
                parts.append(f"    and {len(texts) - SHOWN} more")
    return "\n  ".join(parts)


def _stamp(settings: list, pairs: list[_Pair]) -> Path:
    """Return the file of the verdict on exactly these settings and files."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for pair in pairs:
        for path in (pair.image, pair.label):
            if path is None:
                continue
            try:
                status = path.stat()
            except (OSError, ValueError):  # the check will report it
                continue
            digest.update(os.fsencode(path))
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return find_verdict_file(digest)
