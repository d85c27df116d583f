"""The one reader of images for check, training, evaluation, prediction and export.

A file is read once, as bytes (OpenCV ends the process on a name that is not UTF-8). Its header and
structure are checked. Then it is decoded once: a JPEG by libjpeg, whose warnings count as errors; a
TIFF by libtiff, whose errors count; a plain BMP by this module; other formats by OpenCV. The pixels
of an intact 8-bit image equal those of `cv2.imread`. A file that is cut off, visibly damaged,
deeper than 8 bits or larger than the limit raises a `DataError` with the file's name.

The module has no state: any number of threads and processes may read at the same time.
"""

import contextlib
import io
import os
import stat
import struct
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ppvision.data.limits import MAX_PIXELS, read_max_pixels
from ppvision.data.picture_headers import (
    QUARTER_TURNS,
    Bytes,
    Header,
    make_damage_error,
    read_header,
    read_png_chunks,
    read_tiff_tags,
)
from ppvision.errors import DataError, InputError, MissingFileError, shorten, show_path

Source = str | os.PathLike | bytes

# OpenCV's own limit. Only an environment variable, set before OpenCV is imported, raises it.
_OPENCV_PIXELS, _OPENCV_VARIABLE = 2**30, "OPENCV_IO_MAX_IMAGE_PIXELS"
# Bytes per pixel; no image needs more: four channels of 32 bits, without compression.
_BYTES_PER_PIXEL = 16
_READ_AT_ONCE = 2**26  # bytes; for larger files the header is read first
# Larger BMPs are read in parts: a second buffer of the image's size costs more time than the
# decoding. A part of this size stays in the processor's cache until it is converted.
_PART = 2**17  # bytes
_PILLOW_PART = 2**16  # bytes; malloc asks the system each time for larger blocks
_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK


class MissingPictureError(DataError, MissingFileError):
    """There is no regular file of that name; also a FileNotFoundError."""


class DepthError(DataError):
    """An image has more than 8 bits per channel, and there is no `max_value` to scale it."""


class IndexMapError(DataError):
    """A label map has colours instead of class numbers."""


def read_picture(
    source: Source, name: str | None = None, *, max_value: int | None = None
) -> np.ndarray:
    """Read an image as `[H, W, 3]` uint8 RGB.

    Grey is repeated for the three channels, transparency is dropped, and the Exif orientation is
    applied. In animations and files of several pages the first image counts. All of this is as in
    `cv2.imread`.

    Args:
        source: a path (of any bytes), or the content of a file.
        name: its name in errors. Default: the path.
        max_value: the value that becomes 255 in images of more than 8 bits per channel, such as
            4095 for 12 bits. Images of 8 bits are not changed. Default None: deeper images are
            refused.

    Raises:
        DataError: no such file (`MissingPictureError`) or no right to read it, not a regular file,
            not an image, cut off or damaged, larger than the limit (`read_max_pixels`), deeper
            than 8 bits without `max_value` (`DepthError`), or with values above it. Damage that
            still decodes, such as a flipped bit inside a JPEG, cannot be detected.
        ConfigError: `PPVISION_MAX_PIXELS` is no whole number above 0.
    """
    return read_like_opencv(source, cv2.IMREAD_COLOR_RGB, name, max_value=max_value)


def read_like_opencv(
    source: Source, flags: int, name: str | None = None, *, max_value: int | None = None
) -> np.ndarray:
    """`read_picture` with the channels of `cv2.imread(path, flags)`: `[H, W, 3]` or `[H, W]` uint8.

    Args:
        source, name, max_value: see `read_picture`.
        flags: `cv2.IMREAD_COLOR` (BGR), `IMREAD_COLOR_RGB` or `IMREAD_GRAYSCALE`, also together
            with `IMREAD_IGNORE_ORIENTATION`.

    Raises:
        DataError, ConfigError: as `read_picture`.
    """
    name = _shown(source, name)
    with _opened(source, name) as file:
        content, header = _load(file, name)
        if not header.deep:
            pixels = _decode(content, flags, name, header)
        elif max_value is None:
            raise DepthError(
                f"{name}: expected 8 bits per channel, got {describe(header)}. Set max_value of "
                "the data set to the value that means white (4095 for 12 bits), or scale the "
                "image to 8 bits."
            )
        else:
            pixels = _scaled_pixels(content, header, flags, name, max_value)
    upright = header.format == "TIFF" or not flags & cv2.IMREAD_IGNORE_ORIENTATION
    _check_size(pixels, header.size if upright else (header.height, header.width), name)
    return pixels


def read_label(source: Source, name: str | None = None) -> np.ndarray:
    """Read a label map as `[H, W]` whole numbers: the indices of a palette, or the values of grey.

    The result is that of PIL: maps are not rotated (except TIFF), and 2 and 4 bits of grey are
    scaled to 8. Single bits are 0 and 1.

    Args:
        source, name: see `read_picture`.

    Raises:
        IndexMapError: colours, transparency or floats; a DataError.
        DataError: as `read_picture`.
    """
    name = _shown(source, name)
    with _opened(source, name) as file:
        content, header = _load(file, name)
        if header.kind == "colour" or header.values == "float":
            raise IndexMapError(
                f"{name}: expected one channel of whole numbers (grey, or a palette), got "
                f"{describe(header)}. Map its colours to class numbers first."
            )
        if header.kind == "palette":
            label = _palette_indices(content[:], header, name)
        else:
            label = _decode(content, cv2.IMREAD_UNCHANGED, name, header)
            if header.bits == 1:
                label = (label > 0).astype(np.uint8)
    if label.ndim != 2:
        raise IndexMapError(f"{name}: expected one channel, got shape {list(label.shape)}.")
    upright = header.format == "TIFF"
    _check_size(label, header.size if upright else (header.height, header.width), name)
    return label


def read_picture_size(source: Source, name: str | None = None) -> tuple[int, int]:
    """Return height and width of the result of `read_picture`, from the header only.

    Raises:
        DataError: no such file, or not an image.
    """
    name = _shown(source, name)
    with _opened(source, name) as file:
        return read_header(file, name).size


def describe(header: Header) -> str:
    """Describe an image's format, channels and depth in words."""
    form = "" if header.values == "unsigned" else f" ({header.values})"
    return f"{header.format}, {header.kind}, {header.bits} bit{'s' * (header.bits != 1)}{form}"


def scale_to_bytes(values: np.ndarray, max_value: int, name: str) -> np.ndarray:
    """Scale values from 0 to `max_value` to uint8 from 0 to 255, rounded to the nearest.

    Args:
        values: any shape, of any number type.
        max_value: the value that becomes 255.
        name: of the image, for the error.

    Raises:
        InputError: `max_value` is no whole number above 0.
        DataError: a value below 0 or above `max_value`, or not a number.
    """
    if isinstance(max_value, bool) or not isinstance(max_value, int) or max_value < 1:
        raise InputError(f"max_value: expected a whole number above 0, got {shorten(max_value)}.")
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest <= max_value:  # comparisons with NaN are false
        raise DataError(
            f"{name}: expected values from 0 to max_value = {max_value}, got {lowest} to {highest}."
            " Set max_value to the highest value that this kind of image can have."
        )
    if values.dtype == np.uint16:  # a table is several times as fast
        return _to_bytes(np.arange(int(highest) + 1), max_value)[values]
    return _to_bytes(values, max_value)


def _to_bytes(values: np.ndarray, max_value: int) -> np.ndarray:
    return np.rint(values.astype(np.float64) * 255 / max_value).astype(np.uint8)


# -- the file --------------------------------------------------------------------------------------


def _shown(source: Source, name: str | None) -> str:
    """Return the name for messages."""
    if name is None:
        if isinstance(source, bytes):
            return "picture"
        name = os.fsdecode(source)
    return show_path(name)


class _Reading:
    """An open regular file that gives slices like `bytes`."""

    def __init__(self, path: str | os.PathLike, name: str) -> None:
        try:
            found = os.stat(path)  # before opening: opening a device can have effects
            regular = stat.S_ISREG(found.st_mode)
            # If a pipe replaces the file in the meantime, this does not wait for it, and reading at
            # a place fails. A file that grows in the meantime counts as cut off.
            self._file = os.open(path, _OPEN_FLAGS) if regular else None
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingPictureError(
                f"{name}: no such file. Check the path and the list."
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{name}: cannot be opened ({reason}). Check its rights.") from error
        if self._file is None:
            raise MissingPictureError(
                f"{name}: expected an image, got {_kind_of_file(found.st_mode)}."
            )
        self._size, self._name = found.st_size, name

    def __enter__(self) -> "_Reading":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(self._size)
        return self._read(start, max(0, stop - start))

    def _read(self, at: int, count: int) -> bytes:
        parts = []
        try:
            while count and (part := os.pread(self._file, min(count, 2**30), at)):
                if len(part) == count and not parts:
                    return part
                parts.append(part)
                at += len(part)
                count -= len(part)
        except OSError as error:
            raise DataError(
                f"{self._name}: cannot be read ({error.strerror}). Check the disk and its rights."
            ) from error
        return b"".join(parts)


def _opened(source: Source, name: str) -> contextlib.AbstractContextManager[Bytes]:
    return contextlib.nullcontext(source) if isinstance(source, bytes) else _Reading(source, name)


def _kind_of_file(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _load(file: Bytes, name: str) -> tuple[Bytes, Header]:
    """Return the content of a file that may be decoded, and its header.

    The content is `bytes`; for a large BMP it is the file itself.
    """
    if len(file) > _PART and file[:2] == b"BM":
        return file, _allowed_header(file, name)
    if len(file) > _READ_AT_ONCE:
        _allowed_header(file, name)
    content = file[:]
    header = _allowed_header(content, name, to_the_end=True)
    if header.format == "PNG":
        content = _check_png(content, name)
    return content, header


def _allowed_header(content: Bytes, name: str, *, to_the_end: bool = False) -> Header:
    header, limit = read_header(content, name, to_the_end=to_the_end), read_max_pixels()
    count = header.width * header.height
    advice = f"If it is meant to be that large, pass --max_pixels {count} or set {MAX_PIXELS}"
    if count > limit:
        raise DataError(
            f"{name}: {header.width} x {header.height} are {count} pixels, more than the limit of "
            f"{limit} against files that fill the memory. {advice}={count}."
        )
    if count > _OPENCV_PIXELS and _OPENCV_VARIABLE not in os.environ:
        raise DataError(
            f"{name}: {count} pixels are more than OpenCV reads. Set {_OPENCV_VARIABLE}={count} "
            "before the start."
        )
    if len(content) > _BYTES_PER_PIXEL * limit:
        raise DataError(
            f"{name}: a file of {len(content)} bytes, more than an image of {limit} pixels needs. "
            f"{advice}."
        )
    return header


_ANIMATION = {b"acTL", b"fcTL", b"fdAT"}  # a PNG's chunks of further frames


def _check_png(content: bytes, name: str) -> bytes:
    """Check that every chunk exists, up to the last one, and has the right checksum.

    Returns:
        The file without an animation. If a PNG's main image is not a frame, OpenCV decodes that
        image from a file, but the first frame from memory.
    """
    view = memoryview(content)
    kept, animated = [view[:8]], False
    for kind, begin, end in read_png_chunks(content):
        if zlib.crc32(view[begin - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise make_damage_error(
                name, f"a wrong checksum of {kind.decode('ascii', 'backslashreplace')}"
            )
        if kind in _ANIMATION:
            animated = True
        else:
            kept.append(view[begin - 8 : end + 4])
    return b"".join(kept) if animated else content


# -- the pixels ------------------------------------------------------------------------------------


def _decode_tiff(content: bytes, flags: int, name: str, header: Header) -> np.ndarray | None:
    """Return a TIFF's pixels as OpenCV gives them, decoded once; None for a kind that OpenCV
    decodes.

    OpenCV continues after libtiff's errors. Pillow's decoder (the same library) stops at them.
    `Image.open` is not needed here, and takes longer than decoding a small image.
    """
    grey = header.samples != "RGB"
    as_it_is = flags == cv2.IMREAD_UNCHANGED
    wants_grey = not as_it_is and not flags & (cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB)
    if not header.samples or (not grey and (wants_grey or as_it_is)):
        return None
    options = header.samples, False, 0  # samples, file descriptor, place of the first page
    size = header.width, header.height
    try:
        picture = Image.frombytes("L" if grey else "RGB", size, content, "libtiff", options)
    except ValueError as error:
        raise make_damage_error(
            name, "libtiff: what is packed in it is cut off or damaged"
        ) from error
    except (OSError, TypeError):  # this Pillow has no libtiff, or its decoder has other options
        return None
    pixels = _turn(_pixels_of(picture), header.orientation)
    if grey and not as_it_is and not wants_grey:
        return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_GRAY2RGB)
    if not grey and not flags & cv2.IMREAD_COLOR_RGB:
        return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR)
    return np.ascontiguousarray(pixels)


def _pixels_of(picture: Image.Image) -> np.ndarray:
    """Return `np.array(picture)`, in a third of its time for large images.

    For `np.array`, Pillow copies an image twice, and NumPy once more. A few rows at a time stay in
    the processor's cache.
    """
    width, height = picture.size
    bands = len(picture.getbands())
    pixels = np.empty((height, width, bands)[: 2 + (bands > 1)], np.uint8)
    rows = max(1, _PILLOW_PART // (4 * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        part = picture if rows >= height else picture.crop((0, top, width, bottom))
        target = pixels[top:bottom]
        target[:] = np.frombuffer(part.tobytes(), np.uint8).reshape(target.shape)
    return pixels


def _check_packed_tiff(content: bytes, name: str) -> None:
    """Let libtiff check whether the packed data of another kind of TIFF are complete.

    Plain TIFFs, whose bytes are the pixels, have nothing to check, so they are not decoded here.
    """
    from PIL import TiffImagePlugin  # such images are rare, and this import is slow

    try:
        with TiffImagePlugin.TiffImageFile(io.BytesIO(content)) as picture:
            if picture.info.get("compression", "raw") != "raw":
                picture.load()
    except (SyntaxError, KeyError):
        return  # PIL does not know this kind; OpenCV may
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: Pillow, which checks TIFFs of this kind, does not decode as many pixels. "
            "Save it as RGB or grey of 8 bits, packed with LZW or deflate."
        ) from error
    except (OSError, ValueError) as error:
        raise make_damage_error(name, f"libtiff: {error}") from error


def _decode_bmp(content: Bytes, flags: int, name: str, header: Header) -> np.ndarray | None:
    """Return the pixels of a BMP of 24 bits without compression; None for a kind that OpenCV
    decodes.

    The file contains the pixels unchanged, so that no part is copied more than once.
    """
    rgb = flags & cv2.IMREAD_COLOR_RGB
    start = content[:34]
    if len(start) < 34 or not (rgb or flags & cv2.IMREAD_COLOR):
        return None
    begin, length, width, height, _, bits, packing = struct.unpack_from("<10xIIiiHHI", start)
    stride = (3 * width + 3) // 4 * 4
    whole = 14 + length <= begin <= len(content) - stride * abs(height)
    if flags == cv2.IMREAD_UNCHANGED or length < 40 or bits != 24 or packing or not whole:
        return None
    pixels = np.empty((header.height, width, 3), np.uint8)
    rows = max(1, _PART // stride)
    flipped = np.empty((min(rows, header.height), width, 3), np.uint8)
    for top in range(0, header.height, rows):
        count = min(rows, header.height - top)
        part = content[begin + top * stride : begin + (top + count) * stride]
        if len(part) != count * stride:
            raise make_damage_error(name, "cut off while it was read")
        stored = np.ndarray((count, width, 3), np.uint8, part, strides=(stride, 3, 1))
        if height < 0:  # the first row is the upper one
            target = pixels[top : top + count]
        else:
            target = pixels[header.height - top - count : header.height - top]
            stored = cv2.flip(stored, 0, dst=flipped[:count] if rgb else target)
        if rgb:
            cv2.cvtColor(stored, cv2.COLOR_BGR2RGB, dst=target)
        elif height < 0:
            target[:] = stored
    return pixels


# libjpeg's messages for an incomplete file. Other errors of `simplejpeg` mean a kind of file that
# it does not know; OpenCV may know it.
_JPEG_DAMAGE = ("Corrupt JPEG", "Premature end", "Inconsistent progression", "Invalid")


def _decode_jpeg(content: bytes, flags: int, name: str, header: Header) -> np.ndarray | None:
    """Return a JPEG's pixels, bit-identical to OpenCV's; None for a kind that OpenCV decodes.

    libjpeg fills missing data with grey and warns. OpenCV only prints the warning; `simplejpeg`
    (the same library) raises it.
    """
    as_it_is = flags == cv2.IMREAD_UNCHANGED
    if as_it_is:
        space = "GRAY" if header.kind == "grey" else "BGR"
    elif flags & cv2.IMREAD_COLOR_RGB:
        space = "RGB"
    else:
        space = "BGR" if flags & cv2.IMREAD_COLOR else "GRAY"
    try:
        pixels = simplejpeg.decode_jpeg(content, space, strict=True)
    except ValueError as error:
        if str(error).startswith(_JPEG_DAMAGE):
            raise make_damage_error(name, f"libjpeg: {error}") from error
        return None
    pixels = pixels[..., 0] if space == "GRAY" else pixels
    upright = as_it_is or flags & cv2.IMREAD_IGNORE_ORIENTATION
    return np.ascontiguousarray(pixels if upright else _turn(pixels, header.orientation))


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate pixels `[H, W, ...]` upright by their Exif orientation."""
    if orientation in QUARTER_TURNS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode(content: Bytes, flags: int, name: str, header: Header) -> np.ndarray:
    """Decode pixels with OpenCV for `flags`, at their own depth."""
    pixels = None
    if header.format == "BMP":
        if len(content) > _PART:
            pixels = _decode_bmp(content, flags, name, header)
            content = content if pixels is not None else content[:]
    elif header.format == "TIFF":
        pixels = _decode_tiff(content, flags, name, header)
        if pixels is None:
            _check_packed_tiff(content, name)
    elif header.format == "JPEG" and not header.deep:
        pixels = _decode_jpeg(content, flags, name, header)
    if pixels is not None:
        return pixels
    # For TIFF and BMP, OpenCV makes RGB in place, which takes four times as long as into new
    # memory. For AVIF with transparency it gives BGR instead of RGB (4.14).
    swapped = ("TIFF", "BMP", "AVIF")
    reorder = header.format in swapped and flags > 0 and flags & cv2.IMREAD_COLOR_RGB
    if reorder:
        flags = flags & ~cv2.IMREAD_COLOR_RGB | cv2.IMREAD_COLOR
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        raise make_damage_error(name, f"OpenCV: {error.err or error}") from error
    if pixels is None:
        raise make_damage_error(
            name, "its pixels are cut off, damaged or of a kind that OpenCV cannot read"
        )
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if reorder else pixels


def _scaled_pixels(
    content: bytes, header: Header, flags: int, name: str, max_value: int
) -> np.ndarray:
    # OpenCV 4.14 gives wrong pixels for the RGB of a TIFF of 16 bits.
    reorder = header.format == "TIFF" and flags & cv2.IMREAD_COLOR_RGB
    if reorder:
        flags = flags & ~cv2.IMREAD_COLOR_RGB | cv2.IMREAD_COLOR
    # OpenCV does not give three channels for TIFF's grey of 32 bits; they are made below.
    as_it_is = header.format == "TIFF" and header.kind == "grey"
    wanted = cv2.IMREAD_UNCHANGED if as_it_is else flags | cv2.IMREAD_ANYDEPTH
    pixels = _decode(content, wanted, name, header)
    if pixels.dtype == np.uint8:
        raise DepthError(
            f"{name}: {header.bits} bits per channel, of which OpenCV reads the upper 8 only. Save "
            "it as PNG or TIFF of 16 bits."
        )
    scaled = scale_to_bytes(pixels, max_value, name)
    grey = not flags & (cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB)
    if scaled.ndim == 2 and not grey:
        return cv2.cvtColor(scaled, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(scaled, cv2.COLOR_BGR2RGB) if reorder else scaled


def _check_size(pixels: np.ndarray, expected: tuple[int, int], name: str) -> None:
    """Check that header and pixels agree, so that checks of the header only are valid."""
    height, width = pixels.shape[:2]
    if (height, width) != expected:
        raise make_damage_error(
            name,
            f"its header says {expected[1]} x {expected[0]}, its pixels are {width} x {height}",
        )


# -- palettes --------------------------------------------------------------------------------------
# OpenCV gives colours, but a label needs their numbers. So before decoding, each colour of the
# palette is replaced by a grey with its number.


def _palette_indices(content: bytes, header: Header, name: str) -> np.ndarray:
    try:
        content = _PALETTES[header.format](content)
    except (struct.error, IndexError) as error:
        raise make_damage_error(name, "a palette that is cut off") from error
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    greys = cv2.extractChannel(_decode(content, flags, name, header), 0)
    if header.format == "TIFF" and header.bits < 8:  # grey with fewer bits was scaled to 8
        greys //= 255 // (2**header.bits - 1)
    return greys


def _greys(count: int, layout: str = "ggg") -> bytes:
    """Return a palette in which colour i is the grey i."""
    return bytes(i if entry == "g" else 0 for i in range(count) for entry in layout)


def _png_with_greys(content: bytes) -> bytes:
    parts = [content[:8]]
    for kind, begin, end in read_png_chunks(content):
        if kind == b"PLTE":
            data = kind + _greys(2 ** min(8, content[24]))  # as many as its bits can address
            parts += [struct.pack(">I", len(data) - 4), data, struct.pack(">I", zlib.crc32(data))]
        elif kind in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(content[begin - 8 : end + 4])
    return b"".join(parts)


def _bmp_with_greys(content: bytes) -> bytes:
    (pixels,) = struct.unpack_from("<I", content, 10)
    (length,) = struct.unpack_from("<I", content, 14)
    begin, layout = 14 + length, "ggg" if length == 12 else "ggg0"
    count = min(256, max(0, pixels - begin) // len(layout))
    greys = _greys(count, layout)
    return content[:begin] + greys + content[begin + len(greys) :]


def _tiff_with_greys(content: bytes) -> bytes:
    _, place = read_tiff_tags(content)[262]  # photometric interpretation: from palette to grey
    one = (1).to_bytes(2, "little" if content[:2] == b"II" else "big")
    return content[:place] + one + content[place + 2 :]


def _gif_with_greys(content: bytes) -> bytes:
    result = bytearray(content)

    def fill(flags: int, at: int) -> int:
        """Overwrite a colour table if there is one; return its end."""
        if not flags & 0x80:
            return at
        greys = _greys(2 << (flags & 7))
        result[at : at + len(greys)] = greys
        return at + len(greys)

    at = fill(content[10], 13)
    while content[at] == 0x21:  # extensions before the first image
        if content[at + 1] == 0xF9:
            result[at + 3] &= 0xFE  # no colour is transparent
        at += 2
        while content[at]:
            at += 1 + content[at]
        at += 1
    if content[at] == 0x2C:
        fill(content[at + 9], at + 10)
    return bytes(result)


_PALETTES = {
    "PNG": _png_with_greys,
    "BMP": _bmp_with_greys,
    "TIFF": _tiff_with_greys,
    "GIF": _gif_with_greys,
}
