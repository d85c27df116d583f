"""Pictures of folders and lists: what tools leave behind, suffixes, links, spellings of names."""

import logging
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppvision.data.class_folders import ClassFolders
from ppvision.data.listing import (
    LeftOut,
    find_pictures,
    is_leftover,
    list_images,
    list_labels,
    locate,
    name_results,
    read_pairs,
)
from ppvision.errors import DataError, InputError, PpvisionError
from tests.helpers.messages import raises_naming

LEFTOVERS = (
    ".ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/cat/._0.png",
    "._0.png",
    ".DS_Store",
    "Thumbs.db",
    "thumbs.DB",
    "desktop.ini",
    "@eaDir/0.png",
    ".git/objects/0.png",
    ".hidden.png",
)


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    # PIL knows JPEG by other names as well.
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP"}.get(suffix)
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(path, kind)
    return path


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ppvision"]


@pytest.fixture
def root(tmp_path):
    """Class folders with a picture each and all that tools leave behind, in every folder."""
    for name in ("cat", "dog"):
        save(tmp_path / name / "0.png")
        for leftover in LEFTOVERS:
            path = tmp_path / name / leftover
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no picture")
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
        save(tmp_path / name / "0.png")
    return tmp_path


def test_leftovers_are_no_samples(root, caplog):
    with caplog.at_level(logging.INFO, logger="ppvision"):
        found = ClassFolders(root)
    assert found.classes == ["cat", "dog"]
    assert found.samples == [(root / "cat" / "0.png", 0), (root / "dog" / "0.png", 1)]
    (line,) = messages(caplog)
    # Ten in each class (a folder counts once) and three beside them.
    assert f"{root}: files and folders omitted: 23 hidden" in line
    assert ".ipynb_checkpoints" in line


def test_leftovers_are_not_predicted(root, caplog):
    with caplog.at_level(logging.INFO, logger="ppvision"):
        found = list_images(root)
    assert [name for _, name in found] == ["cat/0", "dog/0"]
    assert len(messages(caplog)) == 1


def test_a_second_reading_does_not_repeat_the_line(root, caplog):
    with caplog.at_level(logging.INFO, logger="ppvision"):
        find_pictures(root)
        find_pictures(root)
    assert len(messages(caplog)) == 1


def test_leftovers_in_lists(root, caplog):
    lines = ["cat/0.png l.png", "cat/._0.png l.png", "cat/.ipynb_checkpoints/0.png l.png"]
    (root / "list.txt").write_text("\n".join(lines))
    with caplog.at_level(logging.INFO, logger="ppvision"):
        pairs, problems = read_pairs(root / "list.txt", root)
        listed = list_images(root / "list.txt")
    assert pairs == [("line 1", root / "cat" / "0.png", root / "l.png")]
    assert not problems
    assert [path for path, _ in listed] == [root / "cat" / "0.png"]
    assert "2 hidden or left behind by tools" in messages(caplog)[0]


def test_a_hidden_folder_that_is_named_is_searched(tmp_path):
    picture = save(tmp_path / ".cache" / "data" / "a.png")
    assert find_pictures(tmp_path / ".cache") == [picture]
    (tmp_path / "list.txt").write_text(f"{picture}\n")
    assert [path for path, _ in list_images(tmp_path / "list.txt")] == [picture]


@pytest.mark.parametrize("name", ["a.png", "ipynb_checkpoints/a.png", "macosx/x.png", "thumbs.png"])
def test_no_leftovers(name):
    assert not is_leftover(name)


SUFFIXES = [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff"]
SUFFIXES += [".gif", ".jp2", ".ppm", ".pnm"]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".JFIF", ".JPG", ".Png"])
def test_suffixes(suffix, tmp_path):
    """In a folder, alone and in a list: the same answer."""
    picture = save(tmp_path / f"a{suffix}")
    assert find_pictures(tmp_path) == [picture]
    assert list_images(picture) == [(picture, "a")]
    (tmp_path / "list.txt").write_text(f"a{suffix}\n")
    assert list_images(tmp_path / "list.txt") == [(picture, "a")]


def test_other_files_are_counted_in_one_line(tmp_path, caplog):
    save(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "deep/d.txt", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.INFO, logger="ppvision"):
        assert find_pictures(tmp_path) == [tmp_path / "a.png"]
    (line,) = messages(caplog)
    assert "4 with another suffix than images (2 x .heic, 1 x " in line


def test_what_is_no_regular_file(tmp_path):
    """Reading a pipe would wait for ever; a link that leads nowhere is a missing picture."""
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in find_pictures(tmp_path)] == ["a.png", "gone.png"]


def test_a_folder_that_cannot_be_searched_is_named(tmp_path, caplog, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "closed" / "b.png")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_pictures(tmp_path) == [tmp_path / "a.png"]
    assert re.search(r"1 folders cannot be read and are omitted: .*/closed \(Perm", caplog.text)


def test_a_folder_that_goes_while_it_is_searched(tmp_path, caplog, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "gone" / "b.png")
    stat = os.stat

    def refuse(path: str, **options: object) -> object:
        if str(path).endswith("gone"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert find_pictures(tmp_path) == [tmp_path / "a.png"]
    assert re.search(r"1 folders cannot be read and are omitted: .*/gone \(No", caplog.text)


# -- links -----------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """`root/dog/extra` leads to a store beside; links of every folder lead back."""
    root = tmp_path / "root"
    for name in ("root/cat/a.png", "root/dog/b.png", "store/c.png", "store/deep/d.png"):
        save(tmp_path / name)
    (root / "dog" / "extra").symlink_to("../../store")
    (root / "dog" / "again").symlink_to("../../store")
    (root / "dog" / "self").symlink_to(".")
    (root / "dog" / "up").symlink_to("..")
    (root / "cat" / "far_up").symlink_to(tmp_path)
    (tmp_path / "store" / "deep" / "back").symlink_to("../..")
    (tmp_path / "store" / "deep" / "dog").symlink_to(root / "dog")
    (root / "cat" / "link.png").symlink_to("../dog/b.png")
    return root


def test_links_are_followed_once(linked):
    found = ClassFolders(linked)
    classes = {number: [p for p, k in found.samples if k == number] for number in (0, 1)}
    assert classes[0] == [linked / "cat" / "a.png", linked / "cat" / "link.png"]
    # `again` comes before `extra`; both lead to one folder.
    again = linked / "dog" / "again"
    assert classes[1] == [again / "c.png", again / "deep" / "d.png", linked / "dog" / "b.png"]


def test_folders_are_found_under_their_own_name_first(tmp_path):
    save(tmp_path / "z" / "p.png")
    (tmp_path / "a").symlink_to("z")
    assert find_pictures(tmp_path) == [tmp_path / "z" / "p.png"]
    assert [name for _, name in list_images(tmp_path)] == ["z/p"]


def test_linked_class_folders(tmp_path):
    save(tmp_path / "store" / "x.png")
    (tmp_path / "root").mkdir()
    for name in ("one", "two"):
        (tmp_path / "root" / name).symlink_to("../store")
    assert len(ClassFolders(tmp_path / "root").samples) == 2


# -- names -----------------------------------------------------------------------------------------


def test_spellings(tmp_path):
    composed = unicodedata.normalize("NFC", "é.png")
    decomposed = unicodedata.normalize("NFD", "é.png")
    save(tmp_path / "sub" / decomposed)
    assert locate(tmp_path, f"sub\\{composed}") == f"sub/{decomposed}"
    assert locate(tmp_path, "sub\\absent.png") == "sub\\absent.png"
    save(tmp_path / "back\\slash.png")  # a name that has one here
    assert locate(tmp_path, "back\\slash.png") == "back\\slash.png"
    for strange in ("", "\0", "x" * 5000, "\ud800", "..", "/"):
        assert locate(tmp_path, strange) == strange


def test_pairs(tmp_path):
    save(tmp_path / "a" / "my cat.png")
    lines = [
        "\ufeffa\\my cat.png\tl.png",
        "",
        f"{tmp_path}/a.png  {tmp_path}/l.png",
        "../b.png l.png ",
        "c.png",
        "a.png b.png c.png",
        "../b.png l.png",
    ]
    (tmp_path / "list.txt").write_bytes("\r\n".join(lines).encode())
    pairs, problems = read_pairs(tmp_path / "list.txt", tmp_path)
    assert pairs == [
        ("line 1", tmp_path / "a" / "my cat.png", tmp_path / "l.png"),
        ("line 3", tmp_path / "a.png", tmp_path / "l.png"),
        ("line 4", tmp_path / "../b.png", tmp_path / "l.png"),
        ("line 7", tmp_path / "../b.png", tmp_path / "l.png"),
    ]
    assert [kind for kind, _ in problems] == ["no label", "too many fields"]
    pairs, problems = read_pairs(tmp_path / "list.txt", tmp_path, need_labels=False)
    assert ("line 5", tmp_path / "c.png", None) in pairs
    assert [kind for kind, _ in problems] == ["too many fields"]


def test_lines_that_are_there_twice_are_counted(tmp_path, caplog):
    (tmp_path / "list.txt").write_text("a b\nc d\na b\na  b\n")
    with caplog.at_level(logging.INFO, logger="ppvision"):
        assert len(read_pairs(tmp_path / "list.txt", tmp_path)[0]) == 4
    assert "2 lines repeat an earlier one" in caplog.text


def test_lists_of_predictions(tmp_path):
    name = os.fsdecode("图.png".encode("gbk"))
    for picture in (name, "sub/b c.png"):
        save(tmp_path / picture)
    text = b"\xef\xbb\xbf" + os.fsencode(name) + b"\r\n\r\nsub\\b c.png,l.png\r\n,\r\n"
    (tmp_path / "list.txt").write_bytes(text)
    found = list_images(tmp_path / "list.txt")
    assert [path for path, _ in found] == [tmp_path / name, tmp_path / "sub" / "b c.png"]
    assert all(path.is_file() for path, _ in found)
    assert list_labels(tmp_path / "list.txt") == {tmp_path / "sub" / "b c.png": tmp_path / "l.png"}


def test_what_is_neither_picture_nor_list(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InputError, match=r"a\.heic"):
        list_images(tmp_path / "a.heic")


def test_names_of_results_differ():
    names = [
        "x.jpg",
        "x.jpg",
        "x.png",
        "x_jpg_2.png",
        "..",
        "/",
        "a/../x_png.gif",
        ".jpg",
        "...png",
    ]
    names += ["..png", "a/...png", "...png/b.png"]
    results = name_results([Path(name) for name in names])
    assert len(set(results)) == len(names)
    assert not any(".." in Path(result).parts or result.startswith("/") for result in results)
    assert results[:2] == ["x_jpg", "x_jpg_2"]


def test_left_out_says_nothing_of_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="ppvision"):
        LeftOut().log(tmp_path)
    assert not messages(caplog)


def test_missing_list(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt"):
        read_pairs(tmp_path / "absent.txt", tmp_path)
    for absent in (tmp_path / "absent.txt", "", "a\0b", "x" * 5000):
        with raises_naming(PpvisionError, "--image_path:", "none") as caught:
            list_images(absent)
        assert len(str(caught.value)) < 1000
