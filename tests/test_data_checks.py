"""The data check finds each fault before a training does, and says which line and file it is."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from ppvision.data.check.segmentation import check_segmentation_list
from ppvision.errors import DataError
from tests.helpers.messages import raises_naming

SIZE = (12, 16)  # height, width


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PPVISION_CACHE", str(folder))
    return folder


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


def label_map() -> np.ndarray:
    """Classes 0, 1, 2 and one row of 255."""
    label = (np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 3).astype(np.uint8)
    label[-1] = 255
    return label


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def cut_off(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


@pytest.fixture
def root(tmp_path) -> Path:
    """A correct set of four pairs."""
    lines = []
    for index in range(4):
        save(tmp_path / "images" / f"{index}.jpg", picture(index))
        save(tmp_path / "labels" / f"{index}.png", label_map())
        lines.append(f"images/{index}.jpg labels/{index}.png\n")
    (tmp_path / "train.txt").write_text("".join(lines))
    return tmp_path


def check(root: Path, **options) -> dict:
    return check_segmentation_list(root / "train.txt", root, **{"num_classes": 3, **options})


def failure(root: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        check(root, **options)
    return str(caught.value)


def test_correct_set_is_counted(root):
    summary = check(root)
    values, counts = np.unique(label_map(), return_counts=True)
    assert values.tolist() == [0, 1, 2, 255]
    assert summary == {
        "images": 4,
        "labels": 4,
        "sizes": {f"{label_map().shape[1]}x{label_map().shape[0]}": 4},
        "class_pixels": (4 * counts[:3]).tolist(),
        "ignored_pixels": 4 * int(counts[3]),
    }
    assert issubclass(DataError, ValueError)


# --------------------------------------------------------------------------------------------------
# The list


def test_missing_list(root):
    (root / "train.txt").unlink()
    assert "train.txt: expected a list file, found none" in failure(root)


def test_list_path_that_was_meant_from_the_root(root):
    with pytest.raises(DataError, match=r"train\.txt"):
        check_segmentation_list("train.txt", root, 3)


def test_missing_root(root):
    with raises_naming(DataError, "dataset_root", "gone"):
        check_segmentation_list(root / "train.txt", root / "gone", 3)


def test_empty_list(root):
    (root / "train.txt").write_text("")
    assert "the data set is empty" in failure(root)


def test_list_that_is_no_text(root):
    (root / "train.txt").write_bytes(b"\0\1\2images/0.jpg labels/0.png\n")
    assert "train.txt: expected UTF-8 text" in failure(root)


def test_lines_that_are_no_pairs(root):
    (root / "train.txt").write_text(
        "images/0.jpg labels/0.png\nimages/1.jpg\n\nimages/my cat.jpg labels/my cat.png\n"
    )
    message = failure(root)
    assert "train.txt: 2 problems in 3 lines" in message
    assert "no label (1)" in message
    assert "line 2: 'images/1.jpg'" in message
    assert "too many fields (1)" in message
    assert "line 4: 'images/my cat.jpg labels/my cat.png' has 4 fields" in message


def test_windows_line_ends_are_fine(root):
    text = (root / "train.txt").read_text()
    (root / "train.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert check(root)["images"] == 4


def test_another_separator(root):
    save(root / "images" / "my cat.jpg", picture())
    (root / "train.txt").write_text("images/my cat.jpg, labels/0.png\n")
    assert "cat.jpg" in failure(root)
    assert check(root, separator=",")["labels"] == 1


def test_labels_may_be_missing_for_prediction(root):
    (root / "train.txt").write_text("images/0.jpg\nimages/1.jpg labels/1.png\n")
    summary = check(root, need_labels=False)
    assert (summary["images"], summary["labels"]) == (2, 1)
    save(root / "labels" / "1.png", np.full(SIZE, 7, np.uint8))
    assert "label out of range" in failure(root, need_labels=False)
    assert "no label (1)" in failure(root)


# --------------------------------------------------------------------------------------------------
# The files


@pytest.mark.parametrize(("path", "what"), [("images/2.jpg", "image"), ("labels/2.png", "label")])
def test_missing_file(root, path, what):
    (root / path).unlink()
    message = failure(root)
    assert "1 problem in 4 lines" in message
    assert f"missing {what} (1)" in message
    assert f"line 3: {root / path}" in message


def test_folder_in_place_of_an_image(root):
    (root / "images" / "2.jpg").unlink()
    (root / "images" / "2.jpg").mkdir()
    assert f"line 3: {root / 'images/2.jpg'}" in failure(root)


@pytest.mark.parametrize(
    ("path", "what"),
    [("images/2.jpg", "image"), ("images/2.png", "image"), ("labels/2.png", "label")],
)
@pytest.mark.parametrize("fault", ["truncated", "text", "empty"])
def test_file_that_does_not_decode(root, path, what, fault):
    if path == "images/2.png":
        save(root / path, picture())
        text = (root / "train.txt").read_text()
        (root / "train.txt").write_text(text.replace("images/2.jpg", path))
        assert check(root)["images"] == 4
    if fault == "truncated":
        cut_off(root / path)
    else:
        (root / path).write_text("no picture" if fault == "text" else "")
    message = failure(root)
    assert f"{what} does not decode (1)" in message
    assert f"line 3: {root / path}: does not decode" in message


def test_truncation_is_found_where_ppdet_has_allowed_it(root, monkeypatch):
    # What `import ppdet.engine` does to the process.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    cut_off(root / "images" / "1.jpg")
    cut_off(root / "labels" / "2.png")
    message = failure(root)
    assert "image does not decode (1)" in message
    assert "label does not decode (1)" in message
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "the process's own setting is given back"


def test_format_that_opencv_does_not_read(root):
    Image.fromarray(picture()).save(root / "images" / "2.pcx")
    text = (root / "train.txt").read_text()
    (root / "train.txt").write_text(text.replace("images/2.jpg", "images/2.pcx"))
    message = failure(root)
    assert "image does not decode (1)" in message
    assert "2.pcx: does not decode (not an image of a known format). Expected JPEG" in message


def test_sizes_differ(root):
    save(root / "labels" / "2.png", label_map()[:-2])
    message = failure(root)
    assert "sizes differ (1)" in message
    assert f"line 3: image {root / 'images/2.jpg'} is 16 x 12, label" in message
    assert "2.png is 16 x 10" in message


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotation_counts(root, suffix):
    """OpenCV turns the image, PIL does not turn the label: the sizes are those after turning."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = save(root / "images" / f"turned.{suffix}", picture(), exif=exif)
    (root / "train.txt").write_text(f"images/{path.name} labels/0.png\n")
    assert "is 12 x 16, label" in failure(root)
    save(root / "labels" / "0.png", label_map().T.copy())
    assert check(root)["images"] == 1


def test_image_of_16_bits(root):
    deep = np.full(SIZE, 900, np.uint16)
    save(root / "images" / "2.png", deep)
    text = (root / "train.txt").read_text()
    (root / "train.txt").write_text(text.replace("images/2.jpg", "images/2.png"))
    message = failure(root)
    assert "image is not 8-bit (1)" in message
    assert "2.png: expected 8 bits per channel, got PNG, grey, 16 bits" in message


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_that_opencv_turns_into_three_channels(root, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.fromarray(picture()).convert(mode).save(root / "images" / f"other.{suffix}")
    (root / "train.txt").write_text(f"images/other.{suffix} labels/0.png\n")
    assert check(root)["images"] == 1


# --------------------------------------------------------------------------------------------------
# Label values


def test_label_out_of_range(root):
    label = label_map()
    label[2, 3:8] = 3
    label[5, 5] = 200
    save(root / "labels" / "2.png", label)
    message = failure(root)
    assert "label out of range (1): Expected 0 to 2, or 255 to ignore. Raise num_classes" in message
    assert f"line 3: {root / 'labels/2.png'}: 3 (5 px), 200 (1 px)" in message
    label[label == 200] = 255
    save(root / "labels" / "2.png", label)
    assert check(root, num_classes=4)["class_pixels"][3] == 5


def test_ignored_value_is_not_taken_for_granted(root):
    message = failure(root, ignore_index=254)
    assert "label out of range (4)" in message
    assert "255 (16 px)" in message


def test_label_of_16_bits_with_large_values(root):
    label = label_map().astype(np.uint16)
    save(root / "labels" / "2.png", label)
    assert check(root)["labels"] == 4
    label[0, 0] = 256 + 1  # 1 when it is cut to 8 bits
    save(root / "labels" / "2.png", label)
    assert "257 (1 px)" in failure(root)


def test_many_wrong_values_are_shortened(root):
    save(root / "labels" / "2.png", np.arange(192, dtype=np.uint8).reshape(SIZE))
    message = failure(root)
    assert "3 (1 px), 4 (1 px), 5 (1 px), 6 (1 px), 7 (1 px)" in message
    assert "and 184 more values" in message


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_label_that_is_no_index_map(root, mode):
    Image.fromarray(label_map()).convert(mode).save(root / "labels" / "2.png")
    message = failure(root)
    assert "label is not an index map (1)" in message
    assert "2.png: expected one channel of whole numbers" in message


def test_label_of_single_bits_has_classes_0_and_1(root):
    ones = int((label_map() == 1).sum())
    for index in range(4):
        Image.fromarray(label_map() == 1).save(root / "labels" / f"{index}.png")
    with Image.open(root / "labels" / "0.png") as picture:
        assert picture.mode == "1"
    counts = check(root, num_classes=2)["class_pixels"]
    assert counts == [4 * (SIZE[0] * SIZE[1] - ones), 4 * ones]


def test_palette_label_is_read_by_its_indices(root):
    counts = check(root)["class_pixels"]
    for index in range(4):
        palette = Image.frombytes("P", SIZE[::-1], label_map().tobytes())
        palette.putpalette([200, 100, 50] * 256)
        palette.save(root / "labels" / f"{index}.png")
    assert check(root)["class_pixels"] == counts


def test_masks_of_0_and_255(root):
    for index in range(4):
        save(root / "labels" / f"{index}.png", (label_map() == 1) * np.uint8(255))
    message = failure(root, num_classes=2)
    assert "only background (1)" in message
    assert "masks of 0 and 1" in message
    save(root / "labels" / "0.png", (label_map() == 1) * np.uint8(1))
    assert check(root, num_classes=2)["class_pixels"][1] > 0


# --------------------------------------------------------------------------------------------------
# The report and the stored verdict


def test_all_kinds_in_one_report_ten_of_each(root):
    lines = [f"images/gone{index}.jpg labels/0.png\n" for index in range(13)]
    (root / "train.txt").write_text("images/0.jpg\n" + "".join(lines))
    message = failure(root)
    assert "14 problems in 14 lines" in message
    assert "no label (1)" in message
    assert "missing image (13)" in message
    assert message.count("gone") == 10
    assert "gone9.jpg" in message
    assert "and 3 more" in message


def test_one_pair_can_have_two_problems(root):
    (root / "images" / "2.jpg").unlink()
    save(root / "labels" / "2.png", np.full(SIZE, 9, np.uint8))
    message = failure(root)
    assert "missing image (1)" in message
    assert "label out of range (1)" in message


def spoil_unnoticed(path: Path) -> None:
    """Other content, same size and time: only a stored verdict can overlook it."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_unchanged_set_is_not_decoded_again(root, caplog):
    first = check(root)
    spoil_unnoticed(root / "images" / "2.jpg")
    with caplog.at_level(logging.INFO):
        assert check(root) == first
    assert "unchanged since it was last checked" in caplog.text


@pytest.mark.parametrize("change", ["time", "list", "num_classes", "ignore_index", "cache"])
def test_what_makes_a_verdict_void(root, change, monkeypatch, tmp_path_factory):
    check(root)
    spoil_unnoticed(root / "images" / "2.jpg")
    options = {}
    if change == "time":
        os.utime(root / "labels" / "0.png", ns=(1, 1))
    elif change == "list":
        with (root / "train.txt").open("a") as file:
            file.write("images/0.jpg labels/0.png\n")
    elif change == "cache":
        monkeypatch.setenv("PPVISION_CACHE", str(tmp_path_factory.mktemp("other")))
    else:
        options = {change: {"num_classes": 4, "ignore_index": 254}[change]}
    assert "2.jpg: does not decode" in failure(root, **options)


def test_a_line_that_is_no_pair_makes_a_verdict_void(root):
    assert check(root)["images"] == 4
    with (root / "train.txt").open("a") as file:
        file.write("images/0.jpg\n")
    assert "no label (1)" in failure(root)


def test_failure_is_never_stored(root, cache):
    cut_off(root / "images" / "2.jpg")
    assert failure(root) == failure(root)
    assert not list(cache.rglob("*.json"))


def test_verdicts_lie_in_the_home_folder(root, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.delenv("PPVISION_CACHE")
    monkeypatch.setenv("HOME", str(home))
    check(root)
    (verdict,) = (home / ".cache" / "ppvision" / "checked").iterdir()
    verdict.write_text("{damaged")
    assert check(root)["images"] == 4


@pytest.mark.parametrize(
    "text",
    [
        *("{cut", "[]", "null", '"x"', "{}", '{"images": 4}', "[" * 100_000, "\udcff"),
        '{"images": -1, "labels": 4, "sizes": {}, "class_pixels": [], "ignored_pixels": 0}',
        '{"images": 4, "labels": 4, "sizes": [], "class_pixels": [], "ignored_pixels": 0}',
        '{"images": 4, "labels": 4, "sizes": {"a": "b"}, "class_pixels": [], "ignored_pixels": 0}',
        '{"images": 4, "labels": 4, "sizes": {}, "class_pixels": [null], "ignored_pixels": 0}',
    ],
)
def test_a_damaged_verdict_is_none(root, cache, text):
    expected = check(root)
    (verdict,) = cache.rglob("*.json")
    verdict.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert check(root) == expected


def test_cache_that_cannot_be_written(root, monkeypatch, caplog):
    monkeypatch.setenv("PPVISION_CACHE", str(root / "train.txt" / "below_a_file"))
    assert check(root)["images"] == 4
    assert "will be checked again next time" in caplog.text


def test_agrees_with_paddleseg_on_a_correct_set(root):
    """What PaddleSeg's own Dataset reads is what was checked and counted."""
    dataset_class = pytest.importorskip("paddleseg.datasets", exc_type=ImportError).Dataset
    dataset = dataset_class(
        mode="train",
        dataset_root=str(root),
        transforms=[],
        num_classes=3,
        train_path=str(root / "train.txt"),
    )
    labels = np.stack([dataset[index]["label"] for index in range(len(dataset))])
    expected = [int((labels == value).sum()) for value in range(3)]
    assert check(root)["class_pixels"] == expected
