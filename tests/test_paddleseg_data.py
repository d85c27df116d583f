"""PaddleSeg's data sets take the lists that the check passes, by its own tools as well."""

import codecs
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.messages import raises_naming

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")

import ppvision.plugins.paddleseg

# isort: split
from paddleseg.cvlibs import Config, SegBuilder
from paddleseg.datasets import ADE20K, Dataset, OpticDiscSeg

from ppvision.data.check.segmentation import check_pairs, check_segmentation_list
from ppvision.errors import DataError
from ppvision.tasks import open_job
from tests.helpers.verbs import ppvision

NAMES = ("a.png", "sub/my cat.png", "c.png")


def save(path: Path, value: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (12, 8), value).save(path)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate(NAMES):
        save(tmp_path / "images" / name)
        save(tmp_path / "labels" / name, number % 2, "L")
    return tmp_path


def dataset(root: Path, **options: object) -> Dataset:
    return Dataset(
        **{
            "mode": "train",
            "dataset_root": str(root),
            "transforms": [],
            "num_classes": 2,
            "train_path": str(root / "list.txt"),
            **options,
        }
    )


def paths(root: Path, *names: str) -> list[list[str]]:
    return [[str(root / "images" / n), str(root / "labels" / n)] for n in names]


PLAIN = "images/a.png labels/a.png\nimages/c.png labels/c.png\n"
TABS = "images/a.png\tlabels/a.png\nimages/sub/my cat.png\tlabels/sub/my cat.png\n"
FORMS = {
    "plain": (PLAIN.encode(), ("a.png", "c.png")),
    "mark": (codecs.BOM_UTF8 + PLAIN.encode(), ("a.png", "c.png")),
    "utf-16": (PLAIN.encode("utf-16"), ("a.png", "c.png")),
    "crlf": (PLAIN.replace("\n", "\r\n").encode() + b"\r\n\r\n", ("a.png", "c.png")),
    "blank lines": (b"\n\n" + PLAIN.replace("\n", "\n\n").encode(), ("a.png", "c.png")),
    "two blanks": (PLAIN.replace(" ", "   ").encode(), ("a.png", "c.png")),
    "tabs": (TABS.encode(), ("a.png", "sub/my cat.png")),
    "backslashes": (TABS.replace("/", "\\").encode(), ("a.png", "sub/my cat.png")),
    "leftovers": (PLAIN.encode() + b"images/._a.png labels/a.png\n", ("a.png", "c.png")),
    "twice": (PLAIN.encode() * 2, ("a.png", "c.png") * 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_check_and_the_data_set_read_the_same(root, form):
    text, names = FORMS[form]
    (root / "list.txt").write_bytes(text)
    summary = check_segmentation_list(root / "list.txt", root, 2)
    found = dataset(root)
    assert found.file_list == paths(root, *names)
    assert summary["images"] == len(found)
    labels = np.stack([found[index]["label"] for index in range(len(found))])
    assert summary["class_pixels"] == [int((labels == value).sum()) for value in range(2)]


def test_another_separator_and_absolute_paths(root):
    lines = [",".join(pair) for pair in paths(root, *NAMES)]
    (root / "list.txt").write_text("\n".join(lines))
    assert check_segmentation_list(root / "list.txt", root, 2, separator=",")["images"] == 3
    assert dataset(root, separator=",").file_list == paths(root, *NAMES)


def test_names_that_are_not_utf8(root):
    name = os.fsdecode("图.png".encode("gbk"))
    save(root / "images" / name)
    (root / "list.txt").write_bytes(os.fsencode(f"images/{name} labels/a.png\n"))
    assert check_segmentation_list(root / "list.txt", root, 2)["images"] == 1
    ((image, _),) = dataset(root).file_list
    assert os.path.isfile(image)


@pytest.mark.parametrize(
    "line", ["images/a.png", "images/a.png labels/a.png labels/c.png", "images/my cat.png l.png"]
)
def test_lines_that_are_no_pairs(root, line):
    (root / "list.txt").write_text(f"{PLAIN}{line}\n")
    with raises_naming(DataError, "list.txt", "line", "3"):
        check_segmentation_list(root / "list.txt", root, 2)
    with raises_naming(ValueError, "list.txt", "line", "3"):  # as PaddleSeg's own
        dataset(root)


def test_pictures_alone_are_enough_to_test(root):
    (root / "list.txt").write_text("images/a.png\nimages/c.png labels/c.png\n")
    found = dataset(root, mode="test", test_path=str(root / "list.txt")).file_list
    assert found == [[str(root / "images" / "a.png"), None], *paths(root, "c.png")]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"mode": "other"}, "mode"),
        ({"train_path": None}, "`train_path` necessary"),
        ({"train_path": "absent.txt"}, "`train_path` found"),
        ({"dataset_root": "absent"}, "`dataset_root`"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_what_paddleseg_refuses_it_refuses(root, options, tokens):
    (root / "list.txt").write_text(PLAIN)
    with raises_naming((ValueError, FileNotFoundError), *tokens.split()):
        dataset(root, **options)


def test_the_builder_of_its_own_tools(root):
    (root / "list.txt").write_bytes(FORMS["mark"][0])
    (root / "job.yml").write_text(
        "batch_size: 1\niters: 1\nmodel: {type: UNet, num_classes: 2}\n"
        "optimizer: {type: SGD}\nlr_scheduler: {type: PolynomialDecay, learning_rate: 0.1}\n"
        "loss: {types: [{type: CrossEntropyLoss}], coef: [1]}\n"
        f"train_dataset: {{type: Dataset, dataset_root: {root}, train_path: {root}/list.txt, "
        "num_classes: 2, mode: train, transforms: [{type: Normalize}]}\n"
    )
    built = SegBuilder(Config(str(root / "job.yml"))).train_dataset
    assert built.file_list == paths(root, "a.png", "c.png")


def test_data_sets_with_lists_of_their_own(root):
    (root / "train_list.txt").write_bytes(
        codecs.BOM_UTF8 + b"\r\nimages/a.png labels/a.png\r\n\r\nimages/c.png labels/c.png\r\n\r\n"
    )
    found = OpticDiscSeg(dataset_root=str(root), transforms=[], mode="train")
    assert found.file_list == paths(root, "a.png", "c.png")


def test_ade20k_beside_leftovers(root):
    pictures = root / "images" / "training"
    for name in ("x.jpg", "y.jpg"):
        save(pictures / name)
        save(root / "annotations" / "training" / name.replace(".jpg", ".png"), 1, "L")
    for name in (".DS_Store", "._x.jpg", "Thumbs.db"):
        (pictures / name).write_bytes(b"no picture")
    found = ADE20K(transforms=[], dataset_root=str(root), mode="train")
    assert sorted(image for image, _ in found.file_list) == [
        str(pictures / "x.jpg"),
        str(pictures / "y.jpg"),
    ]
    assert check_pairs("x", found.file_list)["labels"] == 2


def test_training_and_names_of_classes_through_the_verbs(config_file, scenes, tmp_path):
    """Marks, CRLF, tabs and blank lines in every text file, the config too."""

    def change(config: dict) -> None:
        for part in ("train_dataset", "val_dataset"):
            mode = config[part]["mode"]
            text = (scenes / f"{mode}.txt").read_text().replace(" ", "\t").replace("\n", "\r\n\r\n")
            config[part][f"{mode}_path"] = str(tmp_path / f"{mode}.txt")
            (tmp_path / f"{mode}.txt").write_bytes(codecs.BOM_UTF8 + text.encode())

    config = config_file(change)
    text = config.read_text()
    (tmp_path / "marked.yml").write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    options = ("--iters", 1, "--save_dir", tmp_path / "run", "--save_interval", 1)
    assert ppvision("train", "-c", tmp_path / "marked.yml", *options) == 0
    job = open_job(tmp_path / "marked.yml")
    job.content["val_dataset"]["dataset_root"] = str(tmp_path)
    names = (scenes / "classes.txt").read_text().split()
    (tmp_path / "classes.txt").write_bytes(codecs.BOM_UTF8 + "\r\n".join(names).encode() + b"\r\n")
    assert job.class_names == names
