"""BCCD: blood cells with boxes, Pascal VOC to COCO."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from ppvision.console import track
from ppvision.data.convert.coco import CocoInstances
from ppvision.data.convert.sources import SPLITS, find_source, read_filled_list
from ppvision.data.pictures import read_picture
from ppvision.data.text import read_xml
from ppvision.data.writing import write_description
from ppvision.errors import DataError
from ppvision.files import create_folder

CLASSES = ["RBC", "WBC", "Platelets"]
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_KINDS = ("cut_boxes", "flat_boxes", "outside_boxes")


def convert_bccd(source: str | Path, output: str | Path) -> dict:
    """Convert blood cells (Pascal VOC boxes of red cells, white cells, platelets) to COCO.

    Args:
        source: folder with `annotations/ID.xml`, `images/ID.jpg`, and `train.txt` and `val.txt`
            with an ID per line; or BCCD_Dataset's `BCCD` folder with `Annotations`, `JPEGImages`
            and `ImageSets/Main`.
        output: folder to make; it must not exist or be empty.

    Returns:
        The content of `dataset.json`: the number of images, of images without objects
        (`empty_images`), of boxes, of boxes that were cut at the image's border (`cut_boxes`), and
        of dropped boxes: without an area (`flat_boxes`; BCCD has a few), or outside the image
        (`outside_boxes`).

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: `output` is not empty.
        DataError: names the list or file that is missing, empty, damaged or has another class.
    """
    source = find_source(source, "bccd")
    voc = (source / "JPEGImages").is_dir()
    lists = source / "ImageSets" / "Main" if voc else source
    images = source / ("JPEGImages" if voc else "images")
    boxes = source / ("Annotations" if voc else "annotations")
    names = {split: [line[0] for _, line in read_filled_list(lists, split)] for split in SPLITS}
    summary = {"name": "bccd", "source": source.resolve().name, "classes": CLASSES}
    with create_folder(output) as folder:
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True)
            coco = CocoInstances(dict(enumerate(CLASSES, start=1)))
            counts = dict.fromkeys(("empty_images", *_KINDS), 0)
            for name in track(names[split], f"bccd {split}"):
                image = images / f"{name}.jpg"
                height, width = read_picture(image).shape[:2]
                shutil.copyfile(image, folder / "images" / split / image.name)
                coco.add_image(f"{split}/{image.name}", height, width)
                before = len(coco.annotations)
                for edges, category in _voc_boxes(boxes / f"{name}.xml"):
                    box, kind = _cut(edges, width, height)
                    if kind is not None:
                        counts[kind] += 1
                    if box is not None:
                        coco.add_box(box, category)
                counts["empty_images"] += len(coco.annotations) == before
            coco.write(folder / "annotations" / f"instances_{split}.json")
            summary[split] = {
                "images": len(names[split]),
                "boxes": len(coco.annotations),
                **counts,
            }
        write_description(folder, summary)
    return summary


def _voc_boxes(path: Path) -> Iterator[tuple[list[int], int]]:
    """Yield left, top, right, bottom and category of every object of a VOC file."""
    try:
        for item in read_xml(path).findall("object"):
            edges = [round(float(item.findtext(f"bndbox/{key}"))) for key in _EDGES]
            yield edges, CLASSES.index((item.findtext("name") or "").strip()) + 1
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: expected Pascal VOC boxes of {', '.join(CLASSES)} ({error}). "
            "Get the file again."
        ) from error


def _cut(edges: list[int], width: int, height: int) -> tuple[list[int] | None, str | None]:
    """Return a box `[x, y, width, height]` inside the image, or None, and the problem of the
    box."""
    left, top, right, bottom = edges
    if right <= left or bottom <= top:
        return None, "flat_boxes"
    inside = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    box = [inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]]
    if box[2] <= 0 or box[3] <= 0:
        return None, "outside_boxes"
    return box, "cut_boxes" if list(inside) != edges else None
