"""Nuclei of the Data Science Bowl 2018: PaddleSeg pairs and COCO instances."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ppvision.console import track
from ppvision.data.convert.coco import CocoInstances
from ppvision.data.convert.sources import (
    SPLITS,
    find_source,
    list_samples,
    make_pair_folders,
    read_map,
    write_pair_list,
)
from ppvision.data.listing import LeftOut, find_pictures, is_leftover
from ppvision.data.pictures import read_picture
from ppvision.data.writing import write_description, write_picture
from ppvision.errors import DataError, InputError, shorten
from ppvision.files import create_folder

VAL_EVERY = 5  # stage1_train has no split: one in five images, by sorted ID, is val


@dataclass(frozen=True)
class _Nuclei:
    """One image; its nuclei are numbered in one map, or have one mask each."""

    name: str
    image: Path
    instance_map: Path | None = None
    masks: tuple[Path, ...] = ()


def convert_dsb2018(source: str | Path, output: str | Path, *, border: int = 0) -> dict:
    """Convert nuclei of the Data Science Bowl 2018 to PaddleSeg pairs and COCO instances.

    Args:
        source: either `train.txt` and `val.txt` with `image instances` per line, where an instance
            map is a PNG with one number per nucleus (0 background); or the original
            `stage1_train` with `ID/images/*.png` and one `ID/masks/*.png` per nucleus, of which
            one image in five, by sorted ID, becomes val.
        output: folder to make; it must not exist or be empty.
        border: 0 for the classes background and nucleus; k for a third class, border, on every
            pixel that has pixels of two different nuclei within k pixels (Euclidean).

    Returns:
        The content of `dataset.json`. `dropped_masks` counts masks that keep no pixel (if masks of
        the original overlap, the pixel belongs to the later file).

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: `output` is not empty.
        DataError: names the list or file that is missing, empty, damaged or of another size.
        ValueError: `border` is not a whole number from 0 on.
    """
    if isinstance(border, bool) or not isinstance(border, int) or border < 0:
        raise InputError(
            f"border: expected a whole number of pixels, 0 or more, got {shorten(border)}."
        )
    source = find_source(source, "dsb2018")
    original = source / "stage1_train" if (source / "stage1_train").is_dir() else source
    if not (source / "train.txt").exists() and any(original.glob("*/masks")):
        pictures = _stage1_pictures(original)
    else:
        pictures = {
            split: [_Nuclei(s.name, s.image, s.label) for s in list_samples(source, split)]
            for split in SPLITS
        }
    summary = {
        "name": "dsb2018",
        "source": source.resolve().name,
        "border": border,
        "classes": ["background", "nucleus", *(["border"] if border else [])],
    }
    with create_folder(output) as folder:
        for split in SPLITS:
            summary[split] = _write_split(folder, split, pictures[split], border)
        write_description(folder, summary)
    return summary


def _stage1_pictures(source: Path) -> dict[str, list[_Nuclei]]:
    pictures = []
    left_out = LeftOut()
    for folder in sorted(path.parent for path in source.glob("*/masks")):
        if is_leftover(folder.name):
            left_out.leftovers[folder.name] += 1
            continue
        images, masks = (
            find_pictures(folder / part, left_out) if (folder / part).is_dir() else []
            for part in ("images", "masks")
        )
        if len(images) != 1 or not masks:
            raise DataError(
                f"{folder}: expected one image in images/ and at least one in masks/, found "
                f"{len(images)} and {len(masks)}. Unpack stage1_train again."
            )
        pictures.append(_Nuclei(folder.name, images[0], masks=tuple(masks)))
    left_out.log(source)
    if len(pictures) < 2:
        raise DataError(f"{source}: expected at least 2 images, found {len(pictures)}.")
    return {
        "train": [picture for i, picture in enumerate(pictures) if i % VAL_EVERY],
        "val": pictures[::VAL_EVERY],
    }


def _write_split(folder: Path, split: str, pictures: list[_Nuclei], border: int) -> dict:
    make_pair_folders(folder, split)
    coco = CocoInstances({1: "nucleus"})
    dropped = 0
    for picture in track(pictures, f"dsb2018 {split}"):
        name = f"{split}/{picture.name}.png"
        image = read_picture(picture.image)
        instances = _read_instances(picture, image.shape[:2])
        numbers = np.unique(instances[instances > 0])
        if picture.instance_map is None:
            dropped += len(picture.masks) - len(numbers)
        write_picture(folder / "images" / name, image)
        write_picture(folder / "labels" / name, make_nucleus_label(instances, border))
        coco.add_image(name, *instances.shape)
        for number in numbers:
            coco.add_mask(instances == number, 1)
    coco.write(folder / "annotations" / f"instances_{split}.json")
    write_pair_list(folder, split, [f"{picture.name}.png" for picture in pictures])
    nuclei = len(coco.annotations)
    return {"images": len(pictures), "nuclei": nuclei, "dropped_masks": dropped}


def _read_instances(picture: _Nuclei, shape: tuple[int, int]) -> np.ndarray:
    """Return `[H, W]` whole numbers: 0 for background, one number per nucleus."""
    if picture.instance_map is not None:
        return read_map(picture.instance_map, shape)
    instances = np.zeros(shape, np.int32)
    for number, path in enumerate(picture.masks, start=1):
        instances[read_map(path, shape) > 0] = number
    return instances


def make_nucleus_label(instances: np.ndarray, border: int) -> np.ndarray:
    """Return the class map `[H, W]` uint8 of an instance map `[H, W]`: 0 background, 1 nucleus, 2
    border.

    A pixel is border if pixels of two different instances are within `border` pixels of it, itself
    included. With 0 there is no border class.
    """
    label = (instances > 0).astype(np.uint8)
    if border:
        offsets = np.arange(-border, border + 1)
        disc = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= border**2).astype(np.uint8)
        # The largest and the smallest number within reach: if they differ, there are two instances.
        # float32 represents whole numbers up to 2^24, and infinity for pixels without an instance.
        numbers = instances.astype(np.float32)
        largest = cv2.dilate(numbers, disc)
        smallest = cv2.erode(np.where(numbers > 0, numbers, np.float32(np.inf)), disc)
        label[smallest < largest] = 2
    return label
