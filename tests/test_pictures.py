"""One reader for everybody: pixels equal OpenCV's, and every entry point says the same."""

import contextlib
import io
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from ppvision.cli import run
from ppvision.data.check.coco import find_other_size
from ppvision.data.check.segmentation import check_pairs, check_segmentation_list
from ppvision.data.class_folders import ClassFolders
from ppvision.data.convert.cifar10 import CLASSES
from ppvision.data.limits import DEFAULT_MAX_PIXELS, MAX_PIXELS, read_max_pixels
from ppvision.data.pictures import (
    DepthError,
    IndexMapError,
    MissingPictureError,
    read_label,
    read_like_opencv,
    read_picture,
    read_picture_size,
)
from ppvision.errors import ConfigError, DataError, InputError
from tests.helpers.messages import raises_naming

HEIGHT, WIDTH = 43, 61


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path_factory.mktemp("cache")))


def pixels(seed: int = 0) -> np.ndarray:
    """`[H, W, 3]` uint8: smooth, so that a decoder's interpolation shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def encode(picture: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_xmp(content: bytes, orientation: int) -> bytes:
    """A JPEG with an orientation in XMP, which PIL obeys and OpenCV does not."""
    text = (
        b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf="
        b"'http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description xmlns:tiff="
        b"'http://ns.adobe.com/tiff/1.0/' tiff:Orientation='%d'/></rdf:RDF></x:xmpmeta>"
    ) % orientation
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(text) + 2) + text + content[2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# --------------------------------------------------------------------------------------------------
# Pixels


def _formats() -> dict[str, bytes]:
    picture = Image.fromarray(pixels())
    found = {}
    kinds = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "AVIF")
    modes = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK")
    for kind, mode in itertools.product(kinds, modes):
        if (kind, mode) == ("JPEG2000", "CMYK"):
            continue  # OpenCV does not read it
        try:
            found[f"{kind} {mode}"] = encode(picture.convert(mode), kind)
        except (OSError, ValueError):  # the format has no such mode
            continue
    alpha = Image.linear_gradient("L").resize(picture.size)
    for mode in ("RGBA", "LA"):
        seen_through = picture.convert(mode)
        seen_through.putalpha(alpha)
        for kind in ("PNG", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF"):
            try:
                found[f"{kind} {mode}, transparent"] = encode(seen_through, kind)
            except (OSError, ValueError):
                continue
    for kind, orientation in itertools.product(kinds, range(10)):
        if kind == "TIFF" and orientation in range(5, 9):
            continue  # cv2.imread itself fails on them: see below
        found[f"{kind} turned {orientation}"] = encode(picture, kind, exif=turned(orientation))
    for name, options in {
        "progressive": {"progressive": True},
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "restarts by block": {"restart_marker_blocks": 3},
        "restarts by row": {"restart_marker_rows": 1, "subsampling": 2},
        "restarts, progressive": {"restart_marker_blocks": 2, "progressive": True},
    }.items():
        found[f"JPEG {name}"] = encode(picture, "JPEG", **options)
    found["JPEG CMYK restarts"] = encode(picture.convert("CMYK"), "JPEG", restart_marker_blocks=2)
    found["JPEG XMP"] = with_xmp(found["JPEG RGB"], 6)
    found["JPEG trailing bytes"] = found["JPEG RGB"] + b"a camera's own data" * 9
    found["JPEG padding"] = found["JPEG RGB"][:2] + b"\xff\xff" + found["JPEG RGB"][2:]
    found["PNG trailing bytes"] = found["PNG RGB"] + b"more"
    for bits in (1, 2, 4):
        palette = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=2**bits)
        found[f"PNG palette {bits}"] = encode(palette, "PNG", bits=bits)
        found[f"PNG transparent {bits}"] = encode(palette, "PNG", bits=bits, transparency=1)
    _, interlaced = cv2.imencode(".png", pixels())
    found["PNG of OpenCV"] = interlaced.tobytes()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"TIFF {compression}"] = encode(picture, "TIFF", compression=compression)
    found["TIFF group4"] = encode(picture.convert("1"), "TIFF", compression="group4")
    found["TIFF big"] = encode(picture, "TIFF", big_tiff=True)
    found["WEBP lossless"] = encode(picture, "WEBP", lossless=True)
    more = [Image.fromarray(pixels(seed)) for seed in (1, 2)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        found[f"{kind} of three"] = encode(picture, kind, save_all=True, append_images=more)
    for mode in ("L", "P", "RGB", "RGBA"):
        frames = [frame.convert(mode) for frame in more]
        found[f"PNG {mode} that is no frame"] = encode(
            picture.convert(mode), "PNG", save_all=True, append_images=frames, default_image=True
        )
    return found


FORMATS = _formats()


def test_formats_are_all_there():
    assert len(FORMATS) > 140
    assert {"JPEG CMYK", "PNG LA", "BMP P", "WEBP RGBA", "TIFF CMYK", "AVIF RGB"} <= set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_pixels_and_size_are_those_of_imread(name, tmp_path):
    path = tmp_path / "picture"  # formats are told by their content
    path.write_bytes(FORMATS[name])
    expected = cv2.imread(str(path))
    assert expected is not None
    found = read_picture(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected[:, :, ::-1])
    assert read_picture_size(path) == expected.shape[:2]
    np.testing.assert_array_equal(read_picture(FORMATS[name]), found)


@pytest.mark.parametrize(
    "flags",
    [
        cv2.IMREAD_COLOR,
        cv2.IMREAD_GRAYSCALE,
        cv2.IMREAD_COLOR_RGB,
        cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
    ],
)
@pytest.mark.parametrize(
    "name", ["JPEG turned 6", "PNG RGBA", "TIFF L", "GIF RGB", "TIFF turned 3"]
)
def test_other_channels_are_those_of_imread(name, flags, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(FORMATS[name])
    np.testing.assert_array_equal(read_like_opencv(path, flags), cv2.imread(str(path), flags))


@pytest.mark.parametrize("orientation", range(5, 9))
def test_quarter_turns_of_tiff(orientation):
    """cv2.imread returns None for them (it makes room before it turns); PIL reads them."""
    content = encode(pixels(), "TIFF", exif=turned(orientation))
    with Image.open(io.BytesIO(content)) as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert expected.shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_array_equal(read_picture(content), expected)
    assert read_picture_size(content) == (WIDTH, HEIGHT)


def test_exif_of_other_byte_orders_and_types():
    """OpenCV reads 16 bits whatever the entry's type says."""
    plain = FORMATS["JPEG RGB"]
    for order, kind, value in itertools.product("<>", (3, 4), (6, 9)):
        block = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, 1)
        block += struct.pack(f"{order}HHI", 0x0112, kind, 1)
        block += struct.pack(f"{order}I" if kind == 4 else f"{order}HH", *[value, 0][: 5 - kind])
        data = b"Exif\0\0" + block + bytes(4)
        content = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + plain[2:]
        expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(read_picture(content), expected[:, :, ::-1])
        assert read_picture_size(content) == expected.shape[:2]


def tiff(order: str, blocks: list[bytes], tags: dict[int, tuple[int, ...]]) -> bytes:
    """A TIFF of 32-bit tags; tag 273 or 324 gets the places of the blocks."""
    places, at = [], 8
    for block in blocks:
        places.append(at)
        at += len(block)
    tags = {tag: tuple(places) if values == ("places",) else values for tag, values in tags.items()}
    table, behind = b"", at + 2 + 12 * len(tags) + 4
    lists = b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            lists += packed
            packed = struct.pack(f"{order}I", behind + len(lists) - len(packed))
        table += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at)
    count = struct.pack(f"{order}H", len(tags))
    return start + b"".join(blocks) + count + table + bytes(4) + lists


def _tiffs() -> dict[str, bytes]:
    found = {}
    rgb = pixels()[:32, :48]
    size = {256: (48,), 257: (32,), 258: (8, 8, 8), 262: (2,), 277: (3,)}
    for order, packing in itertools.product("<>", (1, 8, 32946)):
        pack = zlib.compress if packing != 1 else bytes
        strips = [pack(rgb[y : y + 5].tobytes()) for y in range(0, 32, 5)]
        counts = tuple(map(len, strips))
        strip = {259: (packing,), 273: ("places",), 278: (5,), 279: counts}
        found[f"strips {order} {packing}"] = tiff(order, strips, size | strip)
        places = list(itertools.product((0, 16), (0, 16, 32)))
        tiles = [pack(rgb[y : y + 16, x : x + 16].tobytes()) for y, x in places]
        counts = tuple(map(len, tiles))
        tile = {259: (packing,), 322: (16,), 323: (16,), 324: ("places",), 325: counts}
        found[f"tiles {order} {packing}"] = tiff(order, tiles, size | tile)
        planes = [pack(rgb[..., band].tobytes()) for band in range(3)]
        plane = {259: (packing,), 273: ("places",), 278: (32,), 279: tuple(map(len, planes))}
        found[f"planes {order} {packing}"] = tiff(order, planes, size | plane | {284: (2,)})
        grey = [pack(rgb[..., 0].tobytes())]
        for white in (0, 1):
            words = {258: (8,), 262: (white,), 277: (1,)}
            strip = {259: (packing,), 273: ("places",), 278: (32,), 279: (len(grey[0]),)}
            found[f"grey {white} {order} {packing}"] = tiff(order, grey, size | words | strip)
            found[f"grey {white} without samples {order} {packing}"] = tiff(
                order, grey, {k: v for k, v in (size | words | strip).items() if k != 277}
            )
    return found


TIFFS = _tiffs()


@pytest.mark.parametrize("name", TIFFS)
def test_tiffs_in_strips_tiles_and_planes(name, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(TIFFS[name])
    for flags in (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR_RGB, cv2.IMREAD_GRAYSCALE):
        expected = cv2.imread(str(path), flags)
        assert np.ptp(expected) > 0
        if flags == cv2.IMREAD_GRAYSCALE and name.startswith("tiles") and name.endswith(" 1"):
            continue  # cv2.imdecode of OpenCV 4.14 refuses tiles that are not packed
        np.testing.assert_array_equal(read_like_opencv(path, flags), expected)
    if name.startswith("grey"):
        expected = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(read_label(path), expected)
    # The first block lies behind the end of the file; the table is whole.
    if name.startswith(("strips", "tiles")):
        places = struct.pack(f"{name.split()[1]}I", 8)
        at = TIFFS[name].rindex(places)
        far = struct.pack(f"{name.split()[1]}I", 2**24)
        with pytest.raises(DataError, match=r"x\.tif"):
            read_picture(TIFFS[name][:at] + far + TIFFS[name][at + 4 :], "x.tif")


@pytest.mark.parametrize("width", [1, 2, 3, 403, 404])
@pytest.mark.parametrize("upside_down", [False, True])
def test_large_bmps_are_read_by_parts(width, upside_down, tmp_path, monkeypatch):
    height = 500
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    content = bytearray(encode(values, "BMP"))
    if upside_down:  # a negative height: the first row is the upper one
        struct.pack_into("<i", content, 22, -height)
    path = tmp_path / "a.bmp"
    path.write_bytes(content)
    # Also the sizes that fit into one part.
    monkeypatch.setattr("ppvision.data.pictures._PART", min(2**17, len(content) // 3))
    for flags in (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR_RGB, cv2.IMREAD_GRAYSCALE):
        expected = cv2.imread(str(path), flags)
        for source in (path, bytes(content)):
            found = read_like_opencv(source, flags)
            np.testing.assert_array_equal(found, expected)
            assert found.flags.c_contiguous
            assert found.flags.writeable
    for cut in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        for source in (path, bytes(content[:cut])):
            with pytest.raises(DataError, match="decode"):
                read_picture(source)
    # It shrinks between its header and its last row.
    path.write_bytes(content)
    read_part = os.pread

    def shrink(file, count, at):
        if at:
            os.truncate(path, len(content) // 2)
        return read_part(file, count, at)

    monkeypatch.setattr(os, "pread", shrink)
    with raises_naming(DataError, path.name, "cut"):
        read_picture(path)


@pytest.mark.parametrize("name", ["TIFF RGB", "TIFF L", "TIFF tiff_lzw", "BMP RGB", "JPEG RGB"])
def test_pixels_may_be_written_to(name):
    for flags in (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR_RGB, cv2.IMREAD_GRAYSCALE):
        found = read_like_opencv(FORMATS[name], flags)
        assert found.flags.c_contiguous
        found += 1


def test_a_tiff_of_more_pixels_than_pil_opens(monkeypatch):
    """Pillow's own limit counts only for the kinds of TIFF that Pillow has to check."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("TIFF tiff_lzw", "TIFF RGB", "TIFF CMYK", "TIFF RGBA"):
        assert read_picture(FORMATS[name]).shape == (HEIGHT, WIDTH, 3)
    with raises_naming(DataError, "x.tif", "LZW"):
        read_picture(FORMATS["TIFF jpeg"], "x.tif")


# --------------------------------------------------------------------------------------------------
# Label maps


def classes() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 200, (HEIGHT, WIDTH)).astype(np.uint8)


def _labels() -> dict[str, bytes]:
    found = {}
    random = np.random.default_rng(4)
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        for count in (2, 4, 16, 200, 256):
            picture = Image.frombytes("P", (WIDTH, HEIGHT), (classes() % min(count, 255)).tobytes())
            picture.putpalette(random.integers(0, 256, 3 * count).tolist())
            found[f"{kind} palette of {count}"] = encode(picture, kind)
            if kind in ("PNG", "GIF"):
                found[f"{kind} transparent {count}"] = encode(picture, kind, transparency=1)
        found[f"{kind} grey"] = encode(classes(), kind)
    for kind in ("PNG", "TIFF"):
        found[f"{kind} of 16 bits"] = encode(classes().astype(np.uint16) * 300, kind)
    found["PNG turned"] = encode(classes(), "PNG", exif=turned(6))
    found["TIFF of 32 bits"] = encode(classes().astype(np.int32) * 300, "TIFF")
    found["TIFF lzw"] = encode(
        Image.fromarray(classes()).convert("P"), "TIFF", compression="tiff_lzw"
    )
    found["JPEG grey"] = encode(classes(), "JPEG")
    found["PGM"] = encode(classes(), "PPM")
    return found


LABELS = _labels()


def test_labels_in_tiff_turn_as_pictures_do():
    content = encode(classes(), "TIFF", exif=turned(6))
    np.testing.assert_array_equal(read_label(content), np.rot90(classes(), -1))
    np.testing.assert_array_equal(read_picture(content)[..., 0], np.rot90(classes(), -1))


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_the_indices_that_pil_reads(name, tmp_path):
    path = tmp_path / "label"
    path.write_bytes(LABELS[name])
    with Image.open(path) as picture:
        expected = np.asarray(picture)
    assert expected.ndim == 2
    assert len(np.unique(expected)) > 1
    found = read_label(path)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype.kind in "iu"


@pytest.mark.parametrize(
    "name", ["PNG RGB", "PNG LA", "PNG RGBA", "TIFF RGB", "WEBP RGB", "BMP RGB"]
)
def test_labels_of_colours_are_refused(name):
    with pytest.raises(IndexMapError, match="channel"):
        read_label(FORMATS[name])


# --------------------------------------------------------------------------------------------------
# Damage


CUT = ["JPEG RGB", "JPEG progressive", "PNG RGB", "WEBP RGB", "TIFF RGB", "TIFF tiff_lzw"]
CUT += ["BMP RGB", "GIF RGB", "JPEG2000 RGB", "PPM RGB", "AVIF RGB"]


@pytest.mark.parametrize("name", CUT)
def test_cut_off_anywhere_is_refused(name):
    whole = FORMATS[name]
    # The last bytes of TIFF and AVIF may be data that no pixel needs.
    cuts = {1, 2, 3, 8, 20, *(len(whole) * k // 23 for k in range(1, 23)), len(whole) - 12}
    if name.split()[0] not in ("TIFF", "AVIF"):
        cuts.add(len(whole) - 1)
    for cut in sorted(cuts):
        with raises_naming(DataError, "picture.x:", "decode"):
            read_picture(whole[:cut], "picture.x")


def test_jpegs_that_libjpeg_would_fill_with_grey(tmp_path):
    whole = encode(pixels(), "JPEG", restart_marker_blocks=1)
    places = [m.start() for m in re.finditer(b"\xff[\xd0-\xd7]", whole)]
    assert len(places) > 8
    middle = slice(places[2], places[5])
    damaged = {
        "intervals lost": whole[: middle.start] + whole[middle.stop :],
        "cut off and ended": whole[: places[6]] + b"\xff\xd9",
        "zeros to the end": whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        "a marker inside": whole[: places[3] + 5] + b"\xff\xc9\0\3\0" + whole[places[3] + 5 :],
    }
    for name, content in damaged.items():
        path = tmp_path / "cut.jpg"
        path.write_bytes(content)
        assert cv2.imread(str(path)) is not None or name == "a marker inside", "OpenCV reads it"
        with pytest.raises(DataError, match=r"cut\.jpg"):
            read_picture(path)


def smooth_pixels() -> np.ndarray:
    """A photograph's size and smoothness: `[180, 240, 3]`."""
    noise = np.random.default_rng(5).integers(0, 256, (23, 30, 3), np.uint8)
    return cv2.resize(noise, (240, 180), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("damage", ["end marker added", "bytes missing", "bytes zeroed"])
def test_jpegs_that_decode_with_warnings_alone(damage, progressive):
    """Their structure is whole; only what decodes the data can see it."""
    content = encode(smooth_pixels(), "JPEG", quality=90, progressive=progressive)
    middle = len(content) // 2
    read_picture(content)
    broken = {
        "end marker added": content[: len(content) // 3] + b"\xff\xd9",
        "bytes missing": content[:middle] + content[middle + 700 :],
        "bytes zeroed": content[:middle] + bytes(700) + content[middle + 700 :],
    }[damage]
    with pytest.raises(DataError, match=r"x\.jpg"):
        read_picture(broken, "x.jpg")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_packed_tiffs_that_libtiff_complains_of(compression):
    content = encode(smooth_pixels(), "TIFF", compression=compression)
    np.testing.assert_array_equal(read_picture(content), smooth_pixels())
    middle = len(content) // 2
    broken = content[:middle] + bytes(1000) + content[middle + 1000 :]
    with pytest.raises(DataError, match=r"x\.tif"):
        read_picture(broken, "x.tif")


def test_png_with_a_wrong_checksum():
    whole = FORMATS["PNG RGB"]
    for place in range(30, len(whole) - 16, 97):
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        with pytest.raises(DataError, match="decode"):
            read_picture(flipped)
    # In a chunk that OpenCV itself does not look at.
    text = chunk(b"tEXt", b"Comment\0hello")
    with_text = whole[:33] + text + whole[33:]
    np.testing.assert_array_equal(read_picture(with_text), read_picture(whole))
    with raises_naming(DataError, "checksum", "tEXt"):
        read_picture(whole[:33] + text[:-1] + bytes([text[-1] ^ 1]) + whole[33:])


def test_a_png_with_too_few_rows():
    """Its checksums are right."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    for rows, fits in ((8, True), (5, False)):
        data = chunk(b"IDAT", zlib.compress((b"\0" + bytes(8)) * rows))
        content = b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")
        if fits:
            assert not read_picture(content).any()
            assert not read_label(content).any()
            continue
        for read in (read_picture, read_label):
            with pytest.raises(DataError, match="decode"):
                read(content)


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        (b"", "empty"),
        (b"not a picture", "image"),
        (b"%PDF-1.7" + bytes(99), "JPEG, PNG, TIFF"),
        (b"\x89PNG\r\n\x1a\n", "cut"),
        (b"\xff\xd8\xff", "cut"),
        (b"GIF89a", "cut"),
        (b"BM", "cut"),
        (b"II*\0\xff\xff\xff\xff", "cut"),
        (b"P6 4", "cut"),
        (b"P6 4 4 0\n" + bytes(48), "highest"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"IEND", b""), "size 0"),
    ],
)
def test_headers_that_say_nothing(content, tokens):
    with raises_naming(DataError, "name:", *tokens.split()):
        read_picture(content, "a name")
    with raises_naming(DataError, "name:", *tokens.split()):
        read_picture_size(content, "a name")


# --------------------------------------------------------------------------------------------------
# Files


def test_files_that_are_no_regular_ones(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    with socket.socket(socket.AF_UNIX) as server:
        short = os.path.relpath(tmp_path / "socket.png")  # names of sockets are short
        server.bind(short if len(short) < 100 else str(tmp_path / "s.png"))
        found = sorted(tmp_path.iterdir())
        assert len(found) == 6
        for path in found:
            for read in (read_picture, read_label, read_picture_size):
                with pytest.raises(DataError, match=re.escape(path.name)):
                    read(path)
    with pytest.raises(DataError, match="zero"):
        read_picture("zero\0.png")
    with pytest.raises(MissingPictureError) as caught:
        read_picture(tmp_path / "gone" / "a.png")
    assert isinstance(caught.value, FileNotFoundError)
    (tmp_path / "file").write_bytes(FORMATS["PNG RGB"])
    with pytest.raises(MissingPictureError):
        read_picture(tmp_path / "file" / "a.png")
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "file")
    assert read_picture(link).shape == (HEIGHT, WIDTH, 3)


def test_no_right_to_read(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(FORMATS["PNG RGB"])
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")
    with raises_naming(DataError, "secret.png", "rights"):
        read_picture(path)


@pytest.mark.parametrize("name", ["照片".encode("gbk"), b"\xff\xfe", "naïve 图 #%s.jpg".encode()])
def test_names_of_any_bytes(name, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(FORMATS["JPEG RGB"])
    assert read_picture(path).shape == (HEIGHT, WIDTH, 3)
    assert read_picture(str(path)).shape == (HEIGHT, WIDTH, 3)
    path.write_bytes(FORMATS["JPEG RGB"][:99])
    with pytest.raises(DataError) as caught:
        read_picture(path)
    str(caught.value).encode("utf-8")  # it can be printed
    path.unlink()
    with pytest.raises(MissingPictureError) as caught:
        read_picture(path)
    str(caught.value).encode("utf-8")


def test_a_disk_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(FORMATS["PNG RGB"])

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with raises_naming(DataError, "a.png", "Input/output"):
        read_picture(path)


def test_files_stay_closed(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(FORMATS["JPEG RGB"])
    before = len(os.listdir("/proc/self/fd"))
    for content in (FORMATS["JPEG RGB"], FORMATS["JPEG RGB"][:99], b"", b"text"):
        path.write_bytes(content)
        for read in (read_picture, read_label, read_picture_size):
            with contextlib.suppress(DataError):
                read(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_read_at_once_whatever_pil_is_told(tmp_path, monkeypatch):
    # What `import ppdet.engine` does to the process.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for number in range(8):
        content = encode(pixels(number), "PNG")
        (tmp_path / f"{number}.png").write_bytes(content)
        (tmp_path / f"cut{number}.png").write_bytes(content[: len(content) // 2])

    def check(number: int) -> bool:
        for _ in range(10):
            np.testing.assert_array_equal(read_picture(tmp_path / f"{number}.png"), pixels(number))
            for read in (read_picture, read_label):
                with raises_naming(DataError, f"cut{number}.png:", "cut"):
                    read(tmp_path / f"cut{number}.png")
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(8)))


# --------------------------------------------------------------------------------------------------
# The limit


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says any size, for which a decoder takes the memory first."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_limit_is_looked_at_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(bomb(2**14, 2**14 + 1))
    assert read_max_pixels() == DEFAULT_MAX_PIXELS == 2**28
    monkeypatch.setattr(cv2, "imdecode", None)
    for read in (read_picture, read_label):
        with pytest.raises(DataError, match="limit") as caught:
            read(path)
        for token in ("huge.png", str(2**28), "--max_pixels", MAX_PIXELS):
            assert token in str(caught.value)
    assert read_picture_size(path) == (2**14 + 1, 2**14)  # nothing is decoded


def test_limit_is_raised_and_lowered(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(FORMATS["PNG RGB"])
    monkeypatch.setenv(MAX_PIXELS, str(HEIGHT * WIDTH))
    assert read_picture(path).shape == (HEIGHT, WIDTH, 3)
    monkeypatch.setenv(MAX_PIXELS, str(HEIGHT * WIDTH - 1))
    with pytest.raises(DataError, match="limit"):
        read_picture(path)
    monkeypatch.setenv(MAX_PIXELS, str(2**40))
    path.write_bytes(bomb(2**16, 2**15))
    with pytest.raises(DataError, match="OPENCV_IO_MAX_IMAGE_PIXELS"):
        read_picture(path)
    for wrong in ("0", "-1", "many", "1e9", "", "\u0663"):
        monkeypatch.setenv(MAX_PIXELS, wrong)
        with pytest.raises(ConfigError, match=MAX_PIXELS):
            read_picture(path)


def test_a_file_larger_than_any_picture_is_not_read_into_memory(tmp_path, monkeypatch):
    path = tmp_path / "sparse.jpg"
    path.write_bytes(FORMATS["JPEG RGB"])
    with path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="bytes"):
        read_picture(path)


def test_flag_holds_for_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(MAX_PIXELS, raising=False)
    source = tmp_path / "source"
    for split in ("train", "test"):
        for name in CLASSES:
            (source / split / name).mkdir(parents=True)
            (source / split / name / "0001.png").write_bytes(FORMATS["PNG RGB"])
    words = ["data", "cifar10", "--source", str(source), "--output", str(tmp_path / "out")]
    assert run([*words, "--max_pixels", "2000"]) == 1
    assert "--max_pixels" in capsys.readouterr().err
    assert MAX_PIXELS not in os.environ
    assert run([*words, "--max_pixels", "3000"]) == 0


@pytest.mark.all
def test_a_tile_of_196_megapixels(tmp_path):
    label = np.zeros((14000, 14000), np.uint8)
    label[2000:9000, 3000:9000] = 1
    cv2.imwrite(str(tmp_path / "label.png"), label)
    cv2.imwrite(str(tmp_path / "tile.png"), cv2.merge([label * 90] * 3))
    (tmp_path / "list.txt").write_text("tile.png label.png\n")
    summary = check_segmentation_list(tmp_path / "list.txt", tmp_path, 2)
    assert summary["class_pixels"] == [14000 * 14000 - 7000 * 6000, 7000 * 6000]


# --------------------------------------------------------------------------------------------------
# More than 8 bits


def deep_pixels() -> np.ndarray:
    """`[H, W, 3]` uint16, 12 bits."""
    values = np.random.default_rng(5).integers(0, 4096, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, 4095
    return values


def scaled(values: np.ndarray, white: int) -> np.ndarray:
    """The nearest whole number to `255 v / white`, exactly; halves to the even one."""
    table = {int(v): round(Fraction(int(v) * 255, white)) for v in np.unique(values)}
    return np.vectorize(table.get)(values).astype(np.uint8)


def opencv_file(extension: str, values: np.ndarray) -> bytes:
    options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000] if extension == ".jp2" else []
    done, content = cv2.imencode(extension, values, options)
    assert done
    return content.tobytes()


@pytest.mark.parametrize("extension", [".png", ".tif", ".jp2", ".ppm"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_pictures_are_refused_or_scaled(extension, channels):
    rgb = deep_pixels()
    values = {1: rgb[..., 0], 3: rgb[..., ::-1]}.get(channels)
    if channels == 4:
        if extension != ".png":
            pytest.skip("transparency of 16 bits is for PNG")
        values = np.dstack([rgb[..., ::-1], np.full((HEIGHT, WIDTH), 900, np.uint16)])
    content = opencv_file(".pgm" if (extension, channels) == (".ppm", 1) else extension, values)
    with raises_naming(DepthError, "deep.x", "max_value"):
        read_picture(content, "deep.x")
    expected = scaled(rgb if channels > 1 else np.dstack([rgb[..., 0]] * 3), 4095)
    found = read_picture(content, max_value=4095)
    assert (found.min(), found.max()) == (0, 255)
    np.testing.assert_array_equal(found, expected)
    with raises_naming(DataError, "max_value", "4094", "4095"):
        read_picture(content, "deep.x", max_value=4094)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize("grey", [True, False])
def test_tiffs_of_32_bits(kind, grey):
    rgb = deep_pixels()
    values = rgb[..., 0] if grey else rgb[..., ::-1]
    content = opencv_file(".tif", values.astype(kind))
    with raises_naming(DepthError, "32", "bits"):
        read_picture(content)
    expected = scaled(np.dstack([rgb[..., 0]] * 3) if grey else rgb, 4095)
    np.testing.assert_array_equal(read_picture(content, max_value=4095), expected)
    values = values.astype(kind)
    values[3, 3] = -1
    with pytest.raises(DataError, match="-1"):
        read_picture(opencv_file(".tif", values), max_value=4095)
    if kind is np.float32:
        values[3, 3] = np.nan
        with pytest.raises(DataError, match="nan"):
            read_picture(opencv_file(".tif", values), max_value=4095)


def test_turned_deep_pictures():
    picture = Image.fromarray(deep_pixels()[..., 0])
    content = encode(picture, "PNG", exif=turned(6))
    expected = np.rot90(scaled(deep_pixels()[..., 0], 4095), -1)
    np.testing.assert_array_equal(read_picture(content, max_value=4095)[..., 1], expected)
    assert read_picture_size(content) == expected.shape


def test_pictures_of_8_bits_are_as_they_are():
    expected = read_picture(FORMATS["PNG RGB"])
    np.testing.assert_array_equal(read_picture(FORMATS["PNG RGB"], max_value=4095), expected)


@pytest.mark.parametrize("white", [0, -1, 1.5, True, "4095"])
def test_max_value_is_a_whole_number(white):
    with pytest.raises(InputError, match="max_value"):
        read_picture(opencv_file(".png", deep_pixels()), max_value=white)


# --------------------------------------------------------------------------------------------------
# The check's stored verdict


def test_verdict_depends_on_the_limit_and_on_max_value(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(opencv_file(".png", deep_pixels()))
    pairs = [(str(path), None)]
    assert check_pairs("set", pairs, 4095)["images"] == 1
    monkeypatch.setattr("ppvision.data.check.segmentation.read_picture", None)
    assert check_pairs("set", pairs, 4095)["images"] == 1, "stored"
    monkeypatch.undo()
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    assert check_pairs("set", pairs, 4095)["images"] == 1
    with pytest.raises(DataError, match="8-bit"):
        check_pairs("set", pairs)
    with pytest.raises(DataError, match="4094"):
        check_pairs("set", pairs, 4094)
    monkeypatch.setenv(MAX_PIXELS, "100")
    with pytest.raises(DataError, match="limit"):
        check_pairs("set", pairs, 4095)


def test_size_in_annotations_is_that_of_the_reader(tmp_path):
    path = tmp_path / "a.jpg"
    for content in (with_xmp(FORMATS["JPEG RGB"], 6), FORMATS["JPEG turned 6"]):
        path.write_bytes(content)
        height, width, _ = read_picture(path).shape
        assert find_other_size(path, (width, height)) == []
        assert len(find_other_size(path, (height, width))) == 1


def test_every_class_folder_picture_names_its_file(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(FORMATS["JPEG RGB"][:200])
    with pytest.raises(DataError, match=r"cat/a\.jpg"):
        ClassFolders(tmp_path)[0]


# --------------------------------------------------------------------------------------------------
# Every entry point: in another process, which a damaged file may not end


AGREEMENT = Path(__file__).parent / "helpers" / "picture_agreement.py"


def agreement(folder: Path, *words: object) -> dict:
    run = subprocess.run(
        [sys.executable, str(AGREEMENT), str(folder), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_all_entry_points_agree(tmp_path):
    deep = opencv_file(".png", deep_pixels())
    whole = FORMATS["JPEG RGB"]
    files = {
        b"12_bits_in_16.png": deep,
        b"xmp.jpg": with_xmp(whole, 6),
        b"exif.jpg": FORMATS["JPEG turned 6"],
        b"exif.png": FORMATS["PNG turned 8"],
        b"exif.webp": FORMATS["WEBP turned 5"],
        "照片".encode("gbk") + b".jpg": whole,
        b"chrome.jfif": whole,
        b"upper.JPE": whole,
        b"a.gif": FORMATS["GIF RGB"],
        b"a.jp2": FORMATS["JPEG2000 RGB"],
        b"cut.jpg": whole[: len(whole) // 2],
        b"ended.jpg": FORMATS["JPEG restarts by block"][:-200] + b"\xff\xd9",
        b"cut.png": FORMATS["PNG RGB"][:-20],
        b"cmyk.jpg": FORMATS["JPEG CMYK"],
        b"grey.png": FORMATS["PNG LA"],
        b"huge.png": bomb(2**15, 2**14),
        b"empty.png": b"",
        b"text.bmp": b"text",
    }
    for name, content in files.items():
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    refused = {"cut.jpg", "ended.jpg", "cut.png", "huge.png", "empty.png", "text.bmp"}
    refused |= {"pipe.png", "folder.png"}

    found = agreement(tmp_path, "files")
    assert len(found) == len(files) + 2
    assert {os.fsdecode(bytes.fromhex(n)) for n in found if found[n] == "refused"} == {
        *refused,
        "12_bits_in_16.png",
    }
    found = agreement(tmp_path, "files", 4095)
    assert {os.fsdecode(bytes.fromhex(n)) for n in found if found[n] == "refused"} == refused


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.all)])
def test_damaged_files_give_pixels_or_our_error_everywhere(tmp_path, count):
    names = ["JPEG RGB", "JPEG restarts by block", "JPEG progressive", "PNG RGB", "PNG palette 4"]
    names += ["WEBP RGB", "TIFF tiff_lzw", "TIFF RGB", "GIF RGB", "BMP P", "JPEG turned 6"]
    for number, name in enumerate(names):
        (tmp_path / f"{number}").write_bytes(FORMATS[name])
    found = agreement(tmp_path, "damage", count)
    assert found["tried"] == count
    assert found["refused"] > count / 4
    assert found["read"] > count / 20
