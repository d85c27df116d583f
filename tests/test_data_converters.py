"""Converters on tiny sources made here, and on the real sets where PPVISION_DATA names them."""

import gzip
import io
import json
import logging
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ppvision.data.check.segmentation import check_segmentation_list
from ppvision.data.convert import (
    CONVERTERS,
    camvid,
    cifar10,
    convert_bccd,
    convert_camvid,
    convert_cifar10,
    convert_dsb2018,
    dsb2018,
)
from ppvision.data.convert.digit_scenes import load_photos
from ppvision.data.convert.dsb2018 import make_nucleus_label
from ppvision.errors import DataError
from tests.helpers.messages import raises_naming

# pycocotools 2.0.11 on numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning:pycocotools"
)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def cut_off(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


def masks_of(path: Path) -> dict[str, list[np.ndarray]]:
    """Instance masks by file name, decoded by pycocotools."""
    coco = COCO(str(path))
    return {
        image["file_name"]: [
            coco.annToMask(item).astype(bool) for item in coco.loadAnns(coco.getAnnIds(image["id"]))
        ]
        for image in coco.loadImgs(coco.getImgIds())
    }


# Two touching nuclei, a third one further away with a number above 255, and one at the border.
NUCLEI = np.zeros((20, 24), np.uint16)
NUCLEI[4:9, 3:8] = 1
NUCLEI[4:9, 8:12] = 2
NUCLEI[15:18, 15:20] = 300
NUCLEI[19, 0:3] = 7


def nucleus(number: int) -> np.ndarray:
    return np.equal(NUCLEI, number)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def nuclei(tmp_path) -> Path:
    source = tmp_path / "dsb"
    for split, names in (("train", "abc"), ("val", "d")):
        lines = []
        for name in names:
            save(source / "images" / f"{name}.png", noise(ord(name)))
            save(source / "instances" / f"{name}.png", NUCLEI)
            lines.append(f"images/{name}.png instances/{name}.png\n")
        (source / f"{split}.txt").write_text("".join(lines))
    return source


@pytest.fixture
def stage1(tmp_path) -> Path:
    source = tmp_path / "stage1_train"
    for index in range(6):
        folder = source / f"id{index}"
        rgba = np.dstack([noise(index), np.full((20, 24), 255, np.uint8)])
        save(folder / "images" / f"id{index}.png", rgba)
        for number in np.unique(NUCLEI)[1:]:
            save(folder / "masks" / f"m{number:03}.png", nucleus(number) * np.uint8(255))
    return source


@pytest.fixture
def roads(tmp_path) -> Path:
    source = tmp_path / "roads"
    label = (np.arange(20 * 24).reshape(20, 24) % 11).astype(np.uint8)
    label[0, :5] = 255
    for split, names in (("train", "ab"), ("val", "c")):
        lines = []
        for name in names:
            save(source / split / "images" / f"{name}.jpg", noise(ord(name)))
            save(source / split / "labels" / f"{name}.png", label)
            lines.append(f"{split}/images/{name}.jpg {split}/labels/{name}.png\n")
        (source / f"{split}.txt").write_text("".join(lines))
    return source


@pytest.fixture
def small_pictures(tmp_path) -> Path:
    source = tmp_path / "cifar"
    for split, count in (("train", 2), ("test", 1)):
        for index, name in enumerate(cifar10.CLASSES):
            for number in range(count):
                path = source / split / name / f"{number:04d}.jpg"
                save(path, noise(100 * index + number, 32, 32))
    (source / "README.txt").write_text("not a picture")
    return source


def packed(source: Path, target: Path) -> Path:
    mode = "w:gz" if target.name.endswith("gz") else "w"
    with tarfile.open(target, mode) as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, path.name)
    return target


# --------------------------------------------------------------------------------------------------
# DSB2018


def test_nuclei_become_pairs_and_instances(nuclei, tmp_path):
    output = tmp_path / "out"
    summary = convert_dsb2018(nuclei, output)
    assert summary["train"] == {"images": 3, "nuclei": 12, "dropped_masks": 0}
    assert summary["val"] == {"images": 1, "nuclei": 4, "dropped_masks": 0}
    assert json.loads((output / "dataset.json").read_text()) == summary
    assert summary["source"] == "dsb", "the folder's name, not its path"
    assert (output / "classes.txt").read_text() == "background\nnucleus\n"
    assert (output / "val.txt").read_text() == "images/val/d.png labels/val/d.png\n"
    checked = check_segmentation_list(output / "train.txt", output, num_classes=2)
    nucleus_pixels = 3 * int((NUCLEI > 0).sum())
    assert checked["class_pixels"] == [3 * NUCLEI.size - nucleus_pixels, nucleus_pixels]
    np.testing.assert_array_equal(
        np.array(Image.open(output / "images/val/d.png")), noise(ord("d"))
    )
    label = np.array(Image.open(output / "labels/val/d.png"))
    np.testing.assert_array_equal(label, NUCLEI > 0)
    masks = masks_of(output / "annotations" / "instances_val.json")["val/d.png"]
    expected = [nucleus(number) for number in (1, 2, 7, 300)]
    np.testing.assert_array_equal(masks, expected)


def test_original_layout_gives_the_same_masks(stage1, tmp_path):
    output = tmp_path / "out"
    summary = convert_dsb2018(stage1, output)
    assert (summary["train"]["images"], summary["val"]["images"]) == (4, 2)
    assert (output / "val.txt").read_text().split()[::2] == [
        "images/val/id0.png",
        "images/val/id5.png",
    ]
    with Image.open(output / "images/val/id0.png") as picture:
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.array(picture), noise(0))
    masks = masks_of(output / "annotations" / "instances_val.json")["val/id0.png"]
    expected = [nucleus(number) for number in (1, 2, 7, 300)]
    np.testing.assert_array_equal(masks, expected)
    again = convert_dsb2018(stage1.parent, tmp_path / "from_parent")
    assert {**again, "source": ""} == {**summary, "source": ""}


def test_overlapping_masks_are_counted(stage1, tmp_path):
    save(stage1 / "id0" / "masks" / "m000.png", nucleus(1) * np.uint8(255))
    summary = convert_dsb2018(stage1, tmp_path / "out")
    assert summary["val"] == {"images": 2, "nuclei": 8, "dropped_masks": 1}


def test_more_than_255_nuclei_in_the_original_layout(stage1, tmp_path):
    for number in range(300):
        mask = np.zeros(NUCLEI.shape, np.uint8)
        mask.flat[number] = 255
        save(stage1 / "id0" / "masks" / f"z{number:03}.png", mask)
    convert_dsb2018(stage1, tmp_path / "out")
    masks = masks_of(tmp_path / "out" / "annotations" / "instances_val.json")["val/id0.png"]
    assert sum(mask.sum() == 1 and mask.ravel()[:300].any() for mask in masks) == 300


def test_folder_called_masks_may_hold_instance_maps(nuclei, tmp_path):
    (nuclei / "instances").rename(nuclei / "masks")
    for split in ("train", "val"):
        text = (nuclei / f"{split}.txt").read_text()
        (nuclei / f"{split}.txt").write_text(text.replace("instances/", "masks/"))
    assert convert_dsb2018(nuclei, tmp_path / "out")["val"]["nuclei"] == 4


def naive_border(instances: np.ndarray, border: int) -> np.ndarray:
    """By the definition: two instances among the pixels whose centres are within `border`."""
    height, width = instances.shape
    label = (instances > 0).astype(np.uint8)
    for y in range(height):
        for x in range(width):
            near = {
                int(instances[v, u])
                for v in range(height)
                for u in range(width)
                if (v - y) ** 2 + (u - x) ** 2 <= border**2
            }
            if len(near - {0}) > 1:
                label[y, x] = 2
    return label


@pytest.mark.parametrize("border", [0, 1, 2, 3])
def test_border_equals_its_definition(border):
    expected = naive_border(NUCLEI, border)
    assert (expected == 2).any() == (border > 0)
    np.testing.assert_array_equal(make_nucleus_label(NUCLEI, border), expected)
    crowded = np.random.default_rng(0).integers(0, 4, (13, 11)).astype(np.uint16)
    crowded[crowded == 3] = 65535
    crowded[:6] *= np.random.default_rng(1).random((6, 11)) < 0.2
    np.testing.assert_array_equal(
        make_nucleus_label(crowded, border), naive_border(crowded, border)
    )


def test_border_is_the_third_class(nuclei, tmp_path):
    summary = convert_dsb2018(nuclei, tmp_path / "out", border=1)
    assert summary["classes"] == ["background", "nucleus", "border"]
    assert summary["border"] == 1
    label = np.array(Image.open(tmp_path / "out" / "labels/val/d.png"))
    np.testing.assert_array_equal(label, naive_border(NUCLEI, 1))
    # The instance masks keep the pixels that the label map calls border.
    masks = masks_of(tmp_path / "out" / "annotations" / "instances_val.json")["val/d.png"]
    assert sum(mask.sum() for mask in masks) == (NUCLEI > 0).sum()


@pytest.mark.parametrize("border", [-1, 1.5, True])
def test_border_has_to_be_a_whole_number(nuclei, tmp_path, border):
    with pytest.raises(ValueError, match="border"):
        convert_dsb2018(nuclei, tmp_path / "out", border=border)


def break_nuclei(source: Path, fault: str) -> str:
    """Put one fault into the prepared source; returns the tokens of the error."""
    image, instances = source / "images" / "b.png", source / "instances" / "b.png"
    if fault == "no list":
        (source / "val.txt").unlink()
        return "val.txt: list"
    if fault == "empty list":
        (source / "val.txt").write_text("\n")
        return "val.txt: empty"
    if fault == "no label":
        (source / "train.txt").write_text("images/a.png\n")
        return "train.txt, 1: `image label`"
    if fault == "twice":
        (source / "train.txt").write_text("images/a.png instances/a.png\n" * 2)
        return "train.txt, 2: a twice"
    if fault == "no image":
        image.unlink()
        return "b.png: such"
    if fault == "truncated image":
        cut_off(image)
        return "images/b.png: decode cut"
    if fault == "deep image":
        save(image, NUCLEI)
        return "images/b.png: 8 PNG, grey, 16 bits"
    if fault == "not a picture":
        instances.write_text("no")
        return "instances/b.png: decode (not image"
    if fault == "other size":
        save(instances, NUCLEI[:-1])
        return "instances/b.png: size, 24 20, 19"
    assert fault == "colours"
    save(instances, noise(0))
    return "instances/b.png: channel whole"


@pytest.mark.parametrize(
    "fault",
    [
        "no list",
        "empty list",
        "no label",
        "twice",
        "no image",
        "truncated image",
        "deep image",
        "not a picture",
        "other size",
        "colours",
    ],
)
def test_fault_is_named_and_nothing_is_left(nuclei, tmp_path, fault):
    tokens = break_nuclei(nuclei, fault)
    with raises_naming(DataError, *tokens.split()):
        convert_dsb2018(nuclei, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dsb"]


def test_picture_without_masks_in_the_original_layout(stage1, tmp_path):
    for path in (stage1 / "id3" / "masks").iterdir():
        path.unlink()
    with raises_naming(DataError, "id3:", "1", "0"):
        convert_dsb2018(stage1, tmp_path / "out")


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_missing_source(name, tmp_path):
    with raises_naming(FileNotFoundError, name, "nowhere"):
        CONVERTERS[name](tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("name", ["bccd", "camvid", "dsb2018"])
def test_source_without_lists(name, tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match=r"train\.txt"):
        CONVERTERS[name](tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_with_files_is_refused(nuclei, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with raises_naming(FileExistsError, "output:", "out,", "holds"):
        convert_dsb2018(nuclei, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_leaves_nothing(nuclei, tmp_path, monkeypatch, interruption):
    def stop(*args):
        raise interruption("stop")

    monkeypatch.setattr(dsb2018, "write_description", stop)  # the last thing that is written
    with pytest.raises(interruption):
        convert_dsb2018(nuclei, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dsb"]


def test_what_a_killed_run_left_is_replaced(nuclei, tmp_path):
    left = tmp_path / ".out.ppvision-partial"
    left.mkdir()
    (left / "old.txt").write_text("old")
    convert_dsb2018(nuclei, tmp_path / "out")
    assert not left.exists()
    assert not (tmp_path / "out" / "old.txt").exists()


# --------------------------------------------------------------------------------------------------
# CamVid


def test_road_scenes_are_copied(roads, tmp_path):
    output = tmp_path / "out"
    summary = convert_camvid(roads, output)
    assert (summary["train"]["images"], summary["val"]["images"]) == (2, 1)
    assert summary["val"]["ignored_pixels"] == 5
    assert len((output / "classes.txt").read_text().splitlines()) == 11
    assert (output / "val.txt").read_text() == "images/val/c.jpg labels/val/c.png\n"
    source_image = roads / "val" / "images" / "c.jpg"
    assert (output / "images/val/c.jpg").read_bytes() == source_image.read_bytes()
    label = np.array(Image.open(output / "labels/val/c.png"))
    np.testing.assert_array_equal(label, np.array(Image.open(roads / "val/labels/c.png")))
    checked = check_segmentation_list(output / "train.txt", output, num_classes=11)
    assert checked["class_pixels"] == summary["train"]["class_pixels"]
    assert checked["ignored_pixels"] == 10


@pytest.mark.parametrize("value", [11, 254])
def test_unknown_road_class_is_named(roads, tmp_path, value):
    label = np.zeros((20, 24), np.uint8)
    label[3, 4:7] = value
    save(roads / "train" / "labels" / "b.png", label)
    with raises_naming(DataError, "labels/b.png:", str(value), "3"):
        convert_camvid(roads, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_road_scene_is_named(roads, tmp_path):
    cut_off(roads / "train" / "images" / "b.jpg")
    with raises_naming(DataError, "images/b.jpg", "cut"):
        convert_camvid(roads, tmp_path / "out")


def test_segnet_layout(tmp_path):
    source = tmp_path / "CamVid"
    label = (np.arange(20 * 24).reshape(20, 24) % 12).astype(np.uint8)
    for split in ("train", "val"):
        save(source / split / "x.png", noise(1))
        save(source / f"{split}annot" / "x.png", label)
    summary = convert_camvid(source, tmp_path / "out")
    assert summary["train"]["ignored_pixels"] == (label == 11).sum() == 40
    written = np.array(Image.open(tmp_path / "out" / "labels" / "train" / "x.png"))
    np.testing.assert_array_equal(written, np.where(label == 11, 255, label))
    (source / "valannot" / "x.png").unlink()
    with pytest.raises(DataError, match=r"valannot/x\.png"):
        convert_camvid(source, tmp_path / "out2")


# --------------------------------------------------------------------------------------------------
# CIFAR-10


@pytest.mark.parametrize("form", ["folder", "tar.gz", "tar", "folder with a tar.gz"])
def test_small_pictures_from_every_form(small_pictures, tmp_path, form):
    source = small_pictures
    if form.startswith("tar"):
        source = packed(small_pictures, tmp_path / f"pack.{form}")
    if form.startswith("folder with"):
        (tmp_path / "holder").mkdir()
        packed(small_pictures, tmp_path / "holder" / "pack.tar.gz")
        source = tmp_path / "holder"
    output = tmp_path / "out"
    summary = convert_cifar10(source, output)
    assert (summary["train"]["images"], summary["val"]["images"]) == (20, 10)
    assert summary["val"]["per_class"] == dict.fromkeys(cifar10.CLASSES, 1)
    for split, source_split in (("train", "train"), ("val", "test")):
        written = {
            str(path.relative_to(output / "classes" / split)): path.read_bytes()
            for path in (output / "classes" / split).rglob("*.jpg")
        }
        expected = {
            str(path.relative_to(small_pictures / source_split)): path.read_bytes()
            for path in (small_pictures / source_split).rglob("*.jpg")
        }
        assert written == expected
    assert (output / "classes.txt").read_text().split() == sorted(cifar10.CLASSES)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_cut_off_tar(small_pictures, tmp_path, suffix, share):
    archive = packed(small_pictures, tmp_path / f"pack.{suffix}")
    whole = archive.read_bytes()
    # An uncompressed tar ends with padding, so the shares are of what comes before it.
    used = len(whole.rstrip(b"\0")) if suffix == "tar" else len(whole)
    archive.write_bytes(whole[: int(used * share)])
    with raises_naming(DataError, f"pack.{suffix}:") as caught:
        convert_cifar10(archive, tmp_path / "out")
    assert re.search(r"\b(damaged|incomplete)\b", str(caught.value))
    assert not (tmp_path / "out").exists()


def test_file_that_is_no_tar(tmp_path):
    (tmp_path / "pack.tar.gz").write_text("<html>not found</html>")
    with pytest.raises(DataError, match="damaged"):
        convert_cifar10(tmp_path / "pack.tar.gz", tmp_path / "out")


def add_member(archive: Path, source: Path, name: str, link: str | None = None) -> Path:
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo(name)
        if link is None:
            content = b"evil"
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        else:
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
        tar.add(source, ".")
    return archive


@pytest.mark.parametrize(
    ("name", "link", "token"),
    [
        ("../evil.jpg", None, "points"),
        ("train/cat/../../../evil.jpg", None, "points"),
        ("/anywhere/train/cat/evil.jpg", None, "points"),
        ("train/cat/evil.jpg", "/etc/passwd", "link"),
    ],
)
def test_member_that_points_elsewhere_is_refused(small_pictures, tmp_path, name, link, token):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    archive = add_member(tmp_path / "deep" / "er" / "pack.tar", small_pictures, name, link)
    with raises_naming(DataError, "pack.tar", token):
        convert_cifar10(archive, tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("evil*"))
    assert not (tmp_path / "deep" / "er" / "out").exists()


def test_faulty_class_folders(small_pictures, tmp_path):
    output = tmp_path / "out"
    broken = small_pictures / "train" / "dog" / "0001.jpg"
    whole = broken.read_bytes()
    cut_off(broken)
    with raises_naming(DataError, "train/dog/0001.jpg", "cut"):
        convert_cifar10(small_pictures, output)
    broken.write_bytes(whole)

    save(small_pictures / "val" / "dog" / "0000.jpg", noise(1, 32, 32))
    with raises_naming(DataError, "val/dog/0000.jpg", "twice"):
        convert_cifar10(small_pictures, output)
    (small_pictures / "val" / "dog" / "0000.jpg").unlink()

    (small_pictures / "test" / "ship" / "0000.jpg").unlink()
    with raises_naming(DataError, "val", "ship"):
        convert_cifar10(small_pictures, output)

    (small_pictures / "test" / "ship").rename(small_pictures / "test" / "boat")
    save(small_pictures / "test" / "boat" / "0000.jpg", noise(1, 32, 32))
    with pytest.raises(DataError, match="boat"):
        convert_cifar10(small_pictures, output)
    assert not output.exists()

    (tmp_path / "empty").mkdir()
    with raises_naming(DataError, "empty:", "train/", "0", "tar"):
        convert_cifar10(tmp_path / "empty", output)


# --------------------------------------------------------------------------------------------------
# BCCD

OBJECT = """<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


@pytest.fixture
def blood(tmp_path) -> Path:
    source = tmp_path / "blood"
    objects = [
        OBJECT.format("RBC", 2, 3, 10, 9),
        OBJECT.format("WBC", 20, 15, 30, 25),  # reaches out of the 24 x 20 picture
        OBJECT.format("Platelets", 5, 5, 5, 9),  # no area
        OBJECT.format("Platelets", 30, 5, 40, 9),  # outside
    ]
    (source / "annotations").mkdir(parents=True)
    for name in "ab":
        save(source / "images" / f"{name}.jpg", noise(ord(name)))
        text = f"<annotation>{''.join(objects)}</annotation>"
        (source / "annotations" / f"{name}.xml").write_text(text)
    (source / "train.txt").write_text("a\r\n")
    (source / "val.txt").write_text("b\n")
    return source


def check_blood(output: Path, summary: dict) -> None:
    counts = {"cut_boxes": 1, "flat_boxes": 1, "outside_boxes": 1}
    assert summary["train"] == {"images": 1, "boxes": 2, "empty_images": 0, **counts}
    coco = COCO(str(output / "annotations" / "instances_val.json"))
    assert [category["name"] for category in coco.loadCats([1, 2, 3])] == [
        "RBC",
        "WBC",
        "Platelets",
    ]
    boxes = [(item["category_id"], item["bbox"], item["area"]) for item in coco.anns.values()]
    assert boxes == [(1, [2, 3, 8, 6], 48), (2, [20, 15, 4, 5], 20)]
    assert (output / "images" / coco.imgs[1]["file_name"]).is_file()


def test_boxes_become_coco(blood, tmp_path):
    check_blood(tmp_path / "out", convert_bccd(blood, tmp_path / "out"))


def test_pictures_without_objects_are_kept(blood, tmp_path):
    (blood / "annotations" / "a.xml").write_text("<annotation></annotation>")
    summary = convert_bccd(blood, tmp_path / "out")
    assert (summary["train"]["empty_images"], summary["train"]["boxes"]) == (1, 0)
    assert len(COCO(str(tmp_path / "out" / "annotations" / "instances_train.json")).imgs) == 1


def test_boxes_in_voc_folders(blood, tmp_path):
    (blood / "annotations").rename(blood / "Annotations")
    (blood / "images").rename(blood / "JPEGImages")
    (blood / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("train.txt", "val.txt"):
        (blood / name).rename(blood / "ImageSets" / "Main" / name)
    check_blood(tmp_path / "out", convert_bccd(blood, tmp_path / "out"))


@pytest.mark.parametrize(
    "text",
    [
        "<annotation><object>",
        f"<annotation>{OBJECT.format('Elephant', 1, 1, 5, 5)}</annotation>",
        f"<annotation>{OBJECT.format('RBC', 'one', 1, 5, 5)}</annotation>",
        "<annotation><object><name>RBC</name></object></annotation>",
        None,
    ],
)
def test_faulty_boxes_are_named(blood, tmp_path, text):
    path = blood / "annotations" / "b.xml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=r"b\.xml"):
        convert_bccd(blood, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# What tools leave behind, and how they write


def leave_behind(folder: Path) -> int:
    """Put what tools leave behind into a folder and all below; returns how many in each."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        for name in (".DS_Store", "Thumbs.db", "._x.png", "__MACOSX/._x.jpg"):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(b"no picture")
        save(path / ".ipynb_checkpoints" / "x-checkpoint.png", noise(1))
    return len(folders)


def count_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_leftovers_of_tools_are_left_out_of_every_set(
    stage1, small_pictures, blood, roads, nuclei, tmp_path, caplog
):
    cases = (
        (convert_dsb2018, stage1),
        (convert_dsb2018, nuclei),
        (convert_camvid, roads),
        (convert_bccd, blood),
        (convert_cifar10, small_pictures),
    )
    for number, (convert, source) in enumerate(cases):
        clean = convert(source, tmp_path / f"clean{number}")
        leave_behind(source)
        for text in source.glob("*.txt"):
            text.write_bytes(text.read_bytes().rstrip() + b"\r\n\r\n._x.png ._x.png\r\n")
        with caplog.at_level(logging.INFO, logger="ppvision"):
            assert convert(source, tmp_path / f"again{number}") == clean
        assert count_files(tmp_path / f"again{number}") == count_files(tmp_path / f"clean{number}")
    assert f"{small_pictures}: files and folders omitted" in caplog.text
    assert f"{stage1}: files and folders omitted" in caplog.text


def test_leftovers_in_a_tar_file(small_pictures, tmp_path):
    clean = convert_cifar10(packed(small_pictures, tmp_path / "a.tar"), tmp_path / "clean")
    leave_behind(small_pictures)
    (tmp_path / "holder").mkdir()
    packed(small_pictures, tmp_path / "holder" / "b.tar.gz")
    (tmp_path / "holder" / "._b.tar.gz").write_bytes(b"no tar")
    found = convert_cifar10(tmp_path / "holder", tmp_path / "out")
    assert found["train"] == clean["train"]
    assert count_files(tmp_path / "out") == count_files(tmp_path / "clean")


@pytest.mark.parametrize("kind", ["picture", "long name", "pax header"])
def test_a_tar_file_that_unpacks_to_more_than_it_may(tmp_path, kind):
    """A few kilobytes that say they are more than any picture or name."""
    size = 100 * 2**20
    member = tarfile.TarInfo("train/cat/x.png")
    types = {"long name": tarfile.GNUTYPE_LONGNAME, "pax header": tarfile.XHDTYPE}
    member.type = types.get(kind, tarfile.REGTYPE)
    member.size = size
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
        file.write(bytes(1024))
    tracemalloc.start()
    with raises_naming(DataError, "bomb.tar.gz:") as caught:
        convert_cifar10(tmp_path / "bomb.tar.gz", tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert re.search(r"\b(most|damaged)\b", str(caught.value))


def test_xml_of_other_tools(blood, tmp_path):
    """In another encoding, with a namespace, blanks around names, and a line before the start."""
    text = (blood / "annotations" / "a.xml").read_text()
    text = text.replace("<name>RBC</name>", "<name>\n RBC </name><pose>图</pose>")
    text = text.replace("<annotation>", '<annotation xmlns="http://example.org">')
    declared = f'\n<?xml version="1.0" encoding="GBK"?>{text}'
    (blood / "annotations" / "a.xml").write_bytes(declared.encode("gbk"))
    check_blood(tmp_path / "out", convert_bccd(blood, tmp_path / "out"))


def test_entities_in_xml_are_refused(blood, tmp_path):
    text = '<!DOCTYPE a [<!ENTITY x "RBC">]>' + (blood / "annotations" / "a.xml").read_text()
    (blood / "annotations" / "a.xml").write_text(text)
    with raises_naming(DataError, "a.xml:", "entities"):
        convert_bccd(blood, tmp_path / "out")


def test_photographs_beside_leftovers(tmp_path):
    save(tmp_path / "a.png", noise(1, 300, 400))
    leave_behind(tmp_path)
    (part,) = load_photos("train", tmp_path)
    assert part.shape == (300, 300, 3)


# --------------------------------------------------------------------------------------------------
# The real sets

REAL = os.environ.get("PPVISION_DATA")


@pytest.mark.skipif(not REAL, reason="PPVISION_DATA does not name a folder with the real sets")
@pytest.mark.parametrize(
    ("name", "train", "val", "checks"),
    [
        ("dsb2018", 464, 100, 2),
        ("camvid", 367, 101, len(camvid.CLASSES)),
        ("bccd", 205, 87, None),
        ("cifar10", 50_000, 10_000, None),
    ],
)
def test_real_set(name, train, val, checks, tmp_path):
    source = Path(REAL) / name
    if not source.exists():
        pytest.skip(f"PPVISION_DATA holds no {name}")
    summary = CONVERTERS[name](source, tmp_path / "out")
    assert (summary["train"]["images"], summary["val"]["images"]) == (train, val)
    if checks:
        for split in ("train", "val"):
            check_segmentation_list(tmp_path / "out" / f"{split}.txt", tmp_path / "out", checks)
    if name in ("dsb2018", "bccd"):
        coco = COCO(str(tmp_path / "out" / "annotations" / "instances_val.json"))
        assert len(coco.imgs) == val
        assert len(coco.anns) == summary["val"].get("nuclei", summary["val"].get("boxes"))
