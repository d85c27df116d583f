"""BCCD: blood cells with boxes, Pascal VOC to COCO."""

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from ppvision.data.coco import CocoInstances
from ppvision.data.files import DataError, decode_picture
from ppvision.data.sources import SPLITS, existing_source, filled_list
from ppvision.data.writing import complete_folder, progress, write_description

CLASSES = ["RBC", "WBC", "Platelets"]


def convert_bccd(source: str | Path, output: str | Path) -> dict:
    """Convert blood cells (Pascal VOC boxes of red cells, white cells, platelets) to COCO.

    Args:
        source: folder with `annotations/ID.xml`, `images/ID.jpg`, and `train.txt` and `val.txt`
            with an ID per line; or BCCD_Dataset's `BCCD` folder with `Annotations`, `JPEGImages`
            and `ImageSets/Main`.
        output: folder to make; it must not exist or be empty.

    Returns:
        What `dataset.json` says. Boxes are cut at the picture's border; `dropped_boxes` counts
        those without an area (BCCD has a few).

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: `output` is not empty.
        DataError: names the list or file that is missing, empty, damaged or has another class.
    """
    source = existing_source(source, "bccd")
    voc = (source / "JPEGImages").is_dir()
    lists = source / "ImageSets" / "Main" if voc else source
    images = source / ("JPEGImages" if voc else "images")
    boxes = source / ("Annotations" if voc else "annotations")
    names = {split: [line[0] for _, line in filled_list(lists, split)] for split in SPLITS}
    summary = {"name": "bccd", "source": source.resolve().name, "classes": CLASSES}
    with complete_folder(output) as folder:
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True)
            coco = CocoInstances(dict(enumerate(CLASSES, start=1)))
            dropped = 0
            for name in progress(names[split], f"bccd {split}"):
                image = images / f"{name}.jpg"
                width, height = decode_picture(image, str(image)).size
                shutil.copyfile(image, folder / "images" / split / image.name)
                coco.add_image(f"{split}/{image.name}", height, width)
                for box, category in _voc_boxes(boxes / f"{name}.xml", width, height):
                    if box[2] > 0 and box[3] > 0:
                        coco.add_box(box, category)
                    else:
                        dropped += 1
            coco.write(folder / "annotations" / f"instances_{split}.json")
            summary[split] = {
                "images": len(names[split]),
                "boxes": len(coco.annotations),
                "dropped_boxes": dropped,
            }
        write_description(folder, summary)
    return summary


def _voc_boxes(path: Path, width: int, height: int) -> Iterator[tuple[list[int], int]]:
    """`[x, y, width, height]`, cut at the border, and category of every object of a VOC file."""

    def corner(item: ElementTree.Element, key: str, most: int) -> int:
        return min(max(round(float(item.findtext(f"bndbox/{key}"))), 0), most)

    try:
        for item in ElementTree.parse(path).getroot().iter("object"):
            left, right = corner(item, "xmin", width), corner(item, "xmax", width)
            top, bottom = corner(item, "ymin", height), corner(item, "ymax", height)
            category = CLASSES.index(item.findtext("name")) + 1
            yield [left, top, right - left, bottom - top], category
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected Pascal VOC boxes of {', '.join(CLASSES)} ({error}). "
            "Get the file again."
        ) from error
