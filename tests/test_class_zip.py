"""Class folders inside of a zip file."""

import os
import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest

from ppvision.cli import run
from ppvision.data import class_zip
from ppvision.data.class_folders import ClassFolders
from ppvision.data.class_zip import PictureZip
from ppvision.errors import DataError
from ppvision.tasks import open_job
from tests.helpers.messages import raises_naming
from tests.helpers.zips import pack, write_entries


def png(value: int) -> bytes:
    return cv2.imencode(".png", np.full((6, 5, 3), value, np.uint8))[1].tobytes()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("inner", ["", "some/train/"])
def test_a_zip_gives_the_samples_of_the_unpacked_folders(crops, tmp_path, method, inner):
    path = pack(crops / "train", tmp_path / "x.zip", method, inner)
    root = f"{path}//{inner.rstrip('/')}" if inner else path
    zipped, folders = ClassFolders(root, num_classes=3), ClassFolders(crops / "train")
    assert zipped.classes == folders.classes
    assert len(zipped) == len(folders) == 36
    for k in range(36):
        ours, theirs = zipped[k], folders[k]
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
        name = Path(folders.samples[k][0]).relative_to(crops / "train")
        assert str(zipped.samples[k][0]) == f"{path}: {inner}{name}"


def test_a_zip_is_read_by_forked_workers_and_threads_at_once(crops, tmp_path):
    global shared
    shared = ClassFolders(pack(crops / "train", tmp_path / "x.zip", zipfile.ZIP_DEFLATED))
    expected = [total(k) for k in range(36)]
    assert len(set(expected)) > 30
    order = list(range(36)) * 20
    with get_context("fork").Pool(4) as pool:  # inherits `shared` and its open file
        assert pool.map(total, order) == expected * 20
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(total, order)) == expected * 20


shared: ClassFolders


def total(k: int) -> float:
    """A number that tells the samples apart."""
    image, label = shared[k]
    return float(image.sum()) + label / 10


def test_leftovers_of_tools_are_left_out(tmp_path):
    path = write_entries(
        tmp_path / "x.zip",
        {
            "a/1.png": png(1),
            "a/._1.png": b"resource fork",
            "a/.ipynb_checkpoints/1.png": png(1),
            "__MACOSX/a/._1.png": b"resource fork",
            ".DS_Store": b"x",
            "a/Thumbs.db": b"x",
            "b/deep/er/2.PNG": png(2),
            "readme.txt": b"x",
        },
    )
    dataset = ClassFolders(path)
    assert dataset.classes == ["a", "b"]
    assert [(path.name, k) for path, k in dataset.samples] == [
        ("a/1.png", 0),
        ("b/deep/er/2.PNG", 1),
    ]


def test_pictures_stand_in_the_order_of_unpacked_ones(tmp_path):
    """Which is that of the parts of a path, not of its letters."""
    names = ["a/x/1.png", "a/x-1/1.png", "a/x.png", "a-b/1.png", "B/1.png"]
    path = write_entries(tmp_path / "x.zip", {name: png(3) for name in names})
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(png(3))
    zipped, folders = ClassFolders(path), ClassFolders(tmp_path / "x")
    assert zipped.classes == folders.classes
    assert [p.name for p, _ in zipped.samples] == [
        p.relative_to(tmp_path / "x").as_posix() for p, _ in folders.samples
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_names_without_the_flag_for_utf8(tmp_path, encoding):
    """Bytes of some other machine: UTF-8 is read as such, others keep apart and can be written."""
    content = write_entries(tmp_path / "x.zip", {"??????/1.png": png(4)}).read_bytes()
    name = "\u732b\u72d7".encode(encoding).ljust(6, b"_")
    (tmp_path / "x.zip").write_bytes(content.replace(b"??????", name))
    dataset = ClassFolders(tmp_path / "x.zip")
    (path, _), (image, _) = dataset.samples[0], dataset[0]
    assert image.shape == (3, 6, 5)
    assert os.fsencode(path.name) == name + b"/1.png"
    shown = "\u732b\u72d7" if encoding == "utf-8" else "\\udcb9"
    assert shown in dataset.classes[0]
    assert shown in str(path)
    str(path).encode("utf-8")


def test_what_is_wrong_with_a_zip(crops, tmp_path):
    with pytest.raises(DataError, match=r"absent\.zip"):
        ClassFolders(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(DataError, match=r"text\.zip"):
        ClassFolders(tmp_path / "text.zip")
    good = pack(crops / "train", tmp_path / "x.zip", inner="train/")
    (tmp_path / "cut.zip").write_bytes(good.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.zip"):
        ClassFolders(tmp_path / "cut.zip")
    with raises_naming(DataError, "x.zip", "tain", "train"):
        ClassFolders(f"{good}//tain")
    with pytest.raises(DataError, match=r"x\.zip//train"):
        ClassFolders(good, num_classes=3)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("a/1.png", png(1))
        archive.mkdir("b")
    with raises_naming(DataError, "empty.zip", "1", "2", "b"):
        ClassFolders(tmp_path / "empty.zip")


def altered(tmp_path: Path, method: int, change) -> PictureZip:
    """A zip of one file of 2,000 zeros, its directory's entry changed: `change(fields)`."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/1.png", bytes(2000))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    layout = struct.Struct("<4s4H4B3I5H2I")  # of a central directory's entry
    fields = list(layout.unpack_from(content, place))
    change(fields)
    layout.pack_into(content, place, *fields)
    path.write_bytes(content)
    return PictureZip(path)


FLAGS, METHOD, CRC, STORED, SIZE, OFFSET = 3, 4, 9, 10, 11, -1


@pytest.mark.parametrize(
    ("field", "value", "token"),
    [
        (FLAGS, 1, "encrypted"),
        (METHOD, 12, "deflated"),
        (CRC, 5, "checksum"),
        (SIZE, 1999, "damaged"),
        (SIZE, 2001, "damaged"),
        (SIZE, 2**32 - 2, "268435456"),
        (STORED, 2**32 - 2, "268435456"),
        (STORED, 2**28, "cut"),
        (STORED, 3, "damaged"),
        (OFFSET, 1, "header"),
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_directory_that_lies(tmp_path, method, field, value, token):
    archive = altered(tmp_path, method, lambda fields: fields.__setitem__(field, value))
    with raises_naming(DataError, "a/1.png:", token):
        archive.read("a/1.png")


def test_a_bomb_takes_no_memory(tmp_path):
    """64 MiB of zeros that claim to be 2,000 bytes."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/1.png", bytes(2**26))
    content = path.read_bytes()
    size, claimed = struct.pack("<I", 2**26), struct.pack("<I", 2000)
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, claimed))
    archive = PictureZip(path)
    tracemalloc.start()
    with pytest.raises(DataError, match="damaged"):
        archive.read("a/1.png")
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_every_picture_of_a_zip_is_checked_once(crops, tmp_path, classification_file, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    good = pack(crops / "train", tmp_path / "x.zip")
    config = classification_file(lambda c: c["train_dataset"].update(root=str(good)))
    job, decoded = open_job(config), []
    read = class_zip.read_sample
    monkeypatch.setattr(
        class_zip, "read_sample", lambda p, white: decoded.append(p) or read(p, white)
    )
    job.check_data("train_dataset", "val_dataset")
    assert len(decoded) == 36
    open_job(config).check_data("train_dataset")
    assert len(decoded) == 36
    os.utime(good, ns=(1, 1))
    open_job(config).check_data("train_dataset")
    assert len(decoded) == 72
    for verdict in (tmp_path / "cache").rglob("*.json"):
        verdict.write_text("[]")
    open_job(config).check_data("train_dataset")
    assert len(decoded) == 108
    entries = {}
    with zipfile.ZipFile(good) as archive:
        for name in archive.namelist():
            entries[name] = archive.read(name)
    entries["digit 1/3.png"] = entries["digit 1/3.png"][:60]
    write_entries(good, entries)
    with raises_naming(DataError, "1", "36", "x.zip:", "1/3.png:"):
        open_job(config).check_data("train_dataset")


@pytest.mark.all
def test_the_verbs_take_a_zip(crops, tmp_path, classification_file, capsys):
    train, val = (pack(crops / s, tmp_path / f"{s}.zip", inner=f"{s}/") for s in ("train", "val"))
    roots = [f"train_dataset.root={train}//train", f"val_dataset.root={val}//val"]
    config = classification_file()

    def ppvision(*arguments) -> int:
        return run([str(argument) for argument in arguments])

    flags = ("--iters", 2, "--do_eval", "--use_vdl", "--num_workers", 1)
    arguments = ("train", "-c", config, "--save_dir", tmp_path / "zip", *flags, "--opts", *roots)
    assert ppvision(*arguments) == 0
    weights = tmp_path / "zip" / "best_model" / "model.pdparams"
    capsys.readouterr()
    tables = []
    for opts in (["--opts", *roots], []):
        assert ppvision("eval", "-c", config, "--model_path", weights, *opts) == 0
        tables.append(capsys.readouterr().out.splitlines()[-5:])
    assert tables[0] == tables[1]
    assert tables[0][-2].startswith("digit 2")
    arguments = ("export", "-c", config, "--model_path", weights, "--save_dir", tmp_path / "e")
    assert ppvision(*arguments, "--output_op", "softmax", "--opts", *roots) == 0
    capsys.readouterr()
    arguments = ("eval", "-c", config, "--model_dir", tmp_path / "e", "--opts", *roots)
    assert ppvision(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == tables[0]


def test_a_list_names_pictures_in_a_zip(crops, tmp_path):
    path = pack(crops / "train", tmp_path / "x.zip")
    (tmp_path / "list.txt").write_text("digit 2/0.png 1\ndigit 0/5.png 0\n")
    dataset = ClassFolders(path, list_path=tmp_path / "list.txt")
    folders = ClassFolders(crops / "train", list_path=tmp_path / "list.txt")
    for k in range(2):
        np.testing.assert_array_equal(dataset[k][0], folders[k][0])
    (tmp_path / "list.txt").write_text("digit 2/absent.png 1\n")
    with pytest.raises(DataError, match=r"2/absent\.png"):
        ClassFolders(path, list_path=tmp_path / "list.txt")[0]


# -- the order of classes -----------------------------------------------------------------------


def test_a_file_gives_the_order_and_the_names_of_the_classes(crops, tmp_path):
    plain = ClassFolders(crops / "train")
    path = tmp_path / "classes.txt"
    path.write_text("digit 2\tzwei, deux\n\ndigit 0\ndigit 1\n")
    with raises_naming(DataError, "classes.txt:1:", "'digit'"):
        ClassFolders(crops / "train", class_path=path)  # the tab comes after a name with a space
    path.write_text("digit 2\n\ndigit 0\ndigit 1\n")
    ordered = ClassFolders(crops / "train", num_classes=3, class_path=path)
    assert ordered.classes == ordered.folders == ["digit 2", "digit 0", "digit 1"]
    assert sorted(ordered.samples) == sorted(
        (path, (label + 1) % 3) for path, label in plain.samples
    )
    assert [label for _, label in ordered.samples] == [0] * 12 + [1] * 12 + [2] * 12


def test_the_order_of_tiny_imagenet(tmp_path):
    path = write_entries(
        tmp_path / "train.zip", {f"train/{name}/1.JPEG": png(9) for name in ("n02", "n01")}
    )
    (tmp_path / "classes.txt").write_text("n02 goldfish, Carassius auratus\r\nn01\tbullfrog\n")
    dataset = ClassFolders(f"{path}//train", class_path=tmp_path / "classes.txt")
    assert dataset.folders == ["n02", "n01"]
    assert dataset.classes == ["goldfish, Carassius auratus", "bullfrog"]
    assert [str(path)[-10:] for path, _ in dataset.samples] == ["n02/1.JPEG", "n01/1.JPEG"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("digit 0\ndigit 1\n", "line 2"),
        ("digit 0\ndigit 1\ndigit 2\ndigit 1\n", "classes.txt:4: twice"),
        ("digit 0\ndogit 1\n", "classes.txt:2: 'dogit'"),
        ("", "line 0, 1, 2"),
    ],
)
def test_class_files_that_are_wrong(crops, tmp_path, text, tokens):
    (tmp_path / "classes.txt").write_text(text)
    with raises_naming(DataError, *tokens.split()):
        ClassFolders(crops / "train", class_path=tmp_path / "classes.txt")
