"""Read format, size, bits per channel and orientation from the first bytes of an image file.

Decoders only give pixels. This module decides whether a file may be decoded (its size, its depth),
and which size a reader has to expect. It follows the specification of each format, so that a check
and a training cannot differ. The orientation counts if `cv2.imread` uses it: the Exif block of
JPEG, PNG and WebP, and TIFF's own tag. XMP does not count.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ppvision.errors import DataError

# The formats that `read_picture` accepts, for messages.
FORMATS = "JPEG, PNG, BMP, WebP, TIFF, GIF, JPEG 2000, PNM, AVIF"

EXIF_ORIENTATION = 0x0112  # also TIFF's tag
QUARTER_TURNS = {5, 6, 7, 8}  # orientations that swap width and height
_EXIF = b"Exif\0\0"


class Bytes(Protocol):
    """The input of this module: `bytes`, or a file that gives slices like `bytes`."""

    def __getitem__(self, place: slice) -> bytes: ...

    def __len__(self) -> int: ...


class Header(NamedTuple):  # made for every image; a frozen dataclass is 4 times slower
    """An image before it is decoded.

    Attributes:
        format: JPEG, PNG, BMP, WebP, TIFF, GIF, JPEG 2000, PNM or AVIF.
        width, height: pixels as they are stored.
        bits: bits per channel.
        kind: "grey", "palette" or "colour" (grey with transparency counts as colour).
        values: "unsigned", "signed" or "float".
        orientation: 1 to 8 as in Exif; 1 if there is none that counts.
        samples: for a TIFF whose samples are its pixels, Pillow's name for them: "RGB", "L" (grey)
            or "L;I" (grey, 0 is white). Otherwise empty.
    """

    format: str
    width: int
    height: int
    bits: int = 8
    kind: str = "colour"
    values: str = "unsigned"
    orientation: int = 1
    samples: str = ""

    @property
    def deep(self) -> bool:
        """Whether its values need more than 8 bits."""
        return self.bits > 8 or self.values != "unsigned"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width after the orientation is applied."""
        turned = self.orientation in QUARTER_TURNS
        return (self.width, self.height) if turned else (self.height, self.width)


class _Damaged(Exception):
    """A damaged file; the text describes the damage."""


def read_header(content: Bytes, name: str, *, to_the_end: bool = False) -> Header:
    """Read the header of an image of any of the `FORMATS`, whatever its suffix.

    Args:
        content: the file.
        name: its name in errors.
        to_the_end: read all markers of a JPEG, not only those before its first scan. libjpeg fills
            missing data with grey and only prints a warning. This finds a file without an end
            marker, markers that a scan cannot contain, and restart markers that are lost or out of
            order. It cannot find a flipped bit that still decodes: JPEG has no checksum.

    Raises:
        DataError: empty, another format, cut off or damaged inside its header (with `to_the_end`
            anywhere in its structure); starts with `name`.
    """
    start = content[:32]
    if not start:
        raise DataError(f"{name}: does not decode (an empty file). Copy it again, or remove it.")
    try:
        header = _parse(content, start, to_the_end)
    except _Damaged as error:
        raise make_damage_error(name, str(error)) from error
    except (struct.error, LookupError, ValueError) as error:
        raise make_damage_error(name, "cut off in its header") from error
    if header is not None:
        if header.width < 1 or header.height < 1:
            raise make_damage_error(name, f"a size of {header.width} x {header.height}")
        return header
    raise DataError(
        f"{name}: does not decode (not an image of a known format). Expected {FORMATS}: save it "
        "as one of them, or remove it."
    )


def make_damage_error(name: str, reason: str) -> DataError:
    """Return the error for an image that is cut off or damaged."""
    return DataError(f"{name}: does not decode ({reason}). Copy it again, or remove it.")


def _numbers(layout: str, content: Bytes, at: int) -> tuple[int, ...]:
    return struct.unpack(layout, content[at : at + struct.calcsize(layout)])


def _exif_orientation(block: bytes) -> int:
    """Return the orientation that OpenCV reads from a TIFF block inside an image; 1 if there is
    none.

    OpenCV reads 16 bits, whatever the type of the entry, and the first entry counts.
    """
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    try:
        if order is None or _numbers(f"{order}H", block, 2) != (42,):
            return 1
        (at,) = _numbers(f"{order}I", block, 4)
        (count,) = _numbers(f"{order}H", block, at)
        for entry in range(count):
            tag, _, _, value = _numbers(f"{order}HHIH", block, at + 2 + 12 * entry)
            if tag == EXIF_ORIENTATION:
                return value if value in range(1, 9) else 1
    except struct.error:  # the block ends inside the list
        pass
    return 1


# -- JPEG ------------------------------------------------------------------------------------------

_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_RESTARTS = range(0xD0, 0xD8)
_SCAN, _END, _RESTART_INTERVAL, _APP1 = 0xDA, 0xD9, 0xDD, 0xE1
# The end of coded pixels: 0xFF with neither a stuffed zero nor padding after it.
_MARKER = re.compile(rb"\xff[^\x00\xff]")
# Other markers that may be before, between and after scans; half of all segments are tables.
_TABLES = {0xC4, 0xCC, 0xDB}
_MARKERS = {*_TABLES, 0xDC, 0xFE, *range(0xE0, 0xF0), _SCAN, _END}


@dataclass(slots=True)
class _Frame:
    """The content of a JPEG's start of frame."""

    marker: int
    bits: int
    height: int
    width: int
    sampling: dict[int, tuple[int, int]]  # component -> horizontal, vertical

    def units(self, components: bytes) -> int:
        """Return the number of minimum coded units of a scan of these components."""
        widest = max(h for h, _ in self.sampling.values())
        tallest = max(v for _, v in self.sampling.values())
        if len(components) > 1:
            return -(-self.width // (8 * widest)) * -(-self.height // (8 * tallest))
        across, down = self.sampling[components[0]]
        columns = -(-self.width * across // widest)
        rows = -(-self.height * down // tallest)
        return -(-columns // 8) * -(-rows // 8)


def _jpeg_segments(content: Bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(marker, begin, end)` of the payload of each segment from `at` to the next scan or the
    end of the image, which is the last one."""
    size = len(content)
    while True:
        head = content[at : at + 4]
        if len(head) < 2:
            raise _Damaged("cut off: it has no end marker")
        if head[0] != 0xFF:
            raise _Damaged("data between its segments")
        marker = head[1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == _END:
            yield marker, at + 2, at + 2
            return
        length = head[2] << 8 | head[3] if len(head) == 4 else 0
        begin, at = at + 4, at + 2 + length
        if length < 2 or at > size:
            raise _Damaged("cut off inside a segment")
        yield marker, begin, at
        if marker == _SCAN:
            return


def _read_frame(marker: int, payload: bytes) -> _Frame:
    bits, height, width, count = struct.unpack_from(">BHHB", payload)
    sampling = {}
    for component, factors, _ in struct.iter_unpack("BBB", payload[6 : 6 + 3 * count]):
        sampling[component] = factors >> 4, factors & 15
    if len(payload) < 6 + 3 * count:
        raise _Damaged("a frame that is cut off")
    if not sampling or any(0 in factors for factors in sampling.values()):
        raise _Damaged("a frame without components")
    return _Frame(marker, bits, height, width, sampling)


def _parse_jpeg(content: Bytes, to_the_end: bool) -> Header:
    first, frame, orientation, interval, at = None, None, 1, 0, 2
    at_first = True  # before the first scan, the Exif block counts
    while True:
        for marker, begin, end in _jpeg_segments(content, at):
            at = end
            if marker in _TABLES:
                continue
            if marker in _START_OF_FRAME:
                frame = _read_frame(marker, content[begin:end])
                first = first or frame
            elif marker == _APP1:
                if at_first and orientation == 1 and content[begin : begin + 6] == _EXIF:
                    orientation = _exif_orientation(content[begin + 6 : end])
            elif marker == _RESTART_INTERVAL:
                interval = int.from_bytes(content[begin : begin + 2], "big")
            elif to_the_end and marker not in _MARKERS:
                raise _Damaged(f"a marker 0x{marker:02x} that has no place in it")
        if first is None:
            raise _Damaged("no size before its pixels")
        if marker == _END or not to_the_end:
            break
        at_first = False
        at = _end_of_scan(content, frame, interval, content[begin:end], at)
    kind = "grey" if len(first.sampling) == 1 else "colour"
    return Header("JPEG", first.width, first.height, first.bits, kind, "unsigned", orientation)


def _end_of_scan(content: bytes, frame: _Frame, interval: int, scan: bytes, at: int) -> int:
    """Return the position of the marker after the coded pixels from `at`."""
    count = 0
    for found in _MARKER.finditer(content, at):
        at = found.start()
        marker = content[at + 1]
        if marker not in _RESTARTS:
            break
        if marker != _RESTARTS[count % 8]:
            raise _Damaged("restart markers out of order")
        count += 1
    else:
        raise _Damaged("cut off: it has no end marker")
    if frame.marker in _LOSSLESS:  # units are pixels there
        return at
    expected = 0
    if interval:
        expected = -(-frame.units(scan[1 : 1 + 2 * scan[0] : 2]) // interval) - 1
    # Encoders may write one more restart marker after the last interval.
    if count not in (expected, expected + bool(interval)):
        raise _Damaged(f"{count} restart markers where {expected} belong")
    return at


# -- PNG -------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KINDS = {0: "grey", 2: "colour", 3: "palette", 4: "colour", 6: "colour"}


def read_png_chunks(content: Bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield `(type, start, end)` of each chunk's data up to the last chunk, IEND. Four bytes of CRC
    follow each.

    Raises:
        _Damaged: the file ends before.
    """
    at = len(_PNG)
    while True:
        head = content[at : at + 8]
        if len(head) < 8:
            raise _Damaged("cut off: it has no end")
        length, kind = struct.unpack(">I4s", head)
        end = at + 8 + length
        if end + 4 > len(content):
            raise _Damaged(f"cut off inside {kind!r:.12}")
        yield kind, at + 8, end
        if kind == b"IEND":
            return
        at = end + 4


def _parse_png(content: Bytes, start: bytes) -> Header | None:
    if not start.startswith(_PNG):
        return None
    header, orientation = None, 1
    for kind, begin, end in read_png_chunks(content):
        if header is None:
            if kind != b"IHDR":
                raise _Damaged("it does not begin with its size")
            width, height, bits, colour = _numbers(">IIBB", content, begin)
            if colour not in _PNG_KINDS:
                raise _Damaged(f"a colour type {colour}")
            header = Header("PNG", width, height, bits, _PNG_KINDS[colour])
        elif kind == b"eXIf":
            orientation = _exif_orientation(content[begin:end])
    return header._replace(orientation=orientation)


# -- TIFF ------------------------------------------------------------------------------------------

_TIFF_TYPES = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4), 16: ("Q", 8)}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_SAMPLES, _PLANES, _SAMPLE_FORMAT = 277, 284, 339
_READ_TAGS = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, EXIF_ORIENTATION}
_READ_TAGS |= {_SAMPLES, _PLANES, _SAMPLE_FORMAT}
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _RGB_PALETTE = 0, 1, 2, 3
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 4: "unsigned"}  # 4: undefined; the rest are floats
# Lossless compressions: none, LZW, deflate (two numbers) and PackBits.
_LOSSLESS_PACKING = {1, 5, 8, 32946, 32773}
_NO_TAG = ((), 0)
# (samples, photometric interpretation) of the images whose samples of 8 bits are their pixels.
_PLAIN_SAMPLES = {(3, _RGB): "RGB", (1, _MIN_IS_BLACK): "L", (1, _MIN_IS_WHITE): "L;I"}


def read_tiff_tags(content: Bytes) -> dict[int, tuple[tuple[int, ...], int]]:
    """Return the needed tags of the first page: their values, and the place of the first value.

    Raises:
        struct.error: the file ends before.
    """
    order = {b"II": "<", b"MM": ">"}[content[:2]]
    endian = "little" if order == "<" else "big"
    start = content[:16]
    version, at = struct.unpack_from(f"{order}HI", start, 2)
    big = version == 43  # BigTIFF: 64-bit places
    number, word = (f"{order}Q", 8) if big else (f"{order}I", 4)
    if big:
        (at,) = struct.unpack_from(number, start, 8)
    (count,) = _numbers(f"{order}Q" if big else f"{order}H", content, at)
    at += 8 if big else 2
    count = min(count, 4096)  # more than any page has; the count of a damaged file can be huge
    table = content[at : at + count * (4 + 2 * word)]
    tags: dict[int, tuple[tuple[int, ...], int]] = {}
    whole = len(table) // (4 + 2 * word)
    entries = struct.iter_unpack(f"{order}HH{number[1]}{word}s", table[: whole * (4 + 2 * word)])
    for index, (tag, kind, values, inline) in enumerate(entries):
        if tag not in _READ_TAGS or kind not in _TIFF_TYPES or tag in tags:
            continue
        code, length = _TIFF_TYPES[kind]
        values = min(values, 8)  # a damaged count can be huge; the first values are enough
        begin = at + index * (4 + 2 * word) + 4 + word
        if values == 1 and length <= word:  # true for nearly all entries
            tags[tag] = (int.from_bytes(inline[:length], endian),), begin
            continue
        layout = f"{order}{values}{code}"
        if values * length <= word:
            tags[tag] = struct.unpack_from(layout, inline), begin
        else:
            (begin,) = struct.unpack(number, inline)
            data = content[begin : begin + values * length]
            tags[tag] = struct.unpack(layout, data), begin
    if whole < count:
        raise struct.error("a list of tags that is cut off")
    return tags


def _parse_tiff(content: Bytes, start: bytes) -> Header | None:
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    tags = read_tiff_tags(content)

    def value(tag: int, default: int) -> int:
        values, _ = tags.get(tag, _NO_TAG)
        return values[0] if values else default

    width, height = value(_WIDTH, 0), value(_HEIGHT, 0)
    if not width or not height:
        raise _Damaged("a first page without a size")
    channels, photometric = value(_SAMPLES, 1), value(_PHOTOMETRIC, _MIN_IS_BLACK)
    kind = "colour"
    if channels == 1 and photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK):
        kind = "grey"
    elif channels == 1 and photometric == _RGB_PALETTE:
        kind = "palette"
    bits, _ = tags.get(_BITS, ((1,), 0))
    form = value(_SAMPLE_FORMAT, 1)
    values = _SAMPLE_FORMATS.get(form, "float")
    turn = value(EXIF_ORIENTATION, 1)
    orientation = turn if turn in range(1, 9) else 1
    samples = ""
    if (
        {*bits} == {8}
        and _PHOTOMETRIC in tags
        and _SAMPLES in tags
        and value(_COMPRESSION, 1) in _LOSSLESS_PACKING
        and value(_FILL_ORDER, 1) == value(_PLANES, 1) == form == 1
    ):
        samples = _PLAIN_SAMPLES.get((channels, photometric), "")
    depth = max(bits, default=1)
    return Header("TIFF", width, height, depth, kind, values, orientation, samples)


# -- the others ------------------------------------------------------------------------------------


def _parse_bmp(content: Bytes, start: bytes) -> Header | None:
    if start[:2] != b"BM":
        return None
    (size,) = struct.unpack_from("<I", start, 14)
    # OS/2 writes the short header.
    layout = "<HHHH" if size == 12 else "<iiHH"
    width, height, _, bits = struct.unpack_from(layout, start, 18)
    # A negative height means that the first row is the top row. 16 bits are three channels of 5.
    return Header("BMP", width, abs(height), min(bits, 8), "palette" if bits <= 8 else "colour")


def _parse_webp(content: Bytes, start: bytes) -> Header | None:
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP":
        return None
    (length,) = _numbers("<I", start, 4)
    if len(content) < 8 + length:
        raise _Damaged(f"cut off: {len(content)} of {8 + length} bytes")
    size, orientation, at = None, 1, 12
    while at + 8 <= 8 + length:
        kind, length_of_chunk = _numbers("<4sI", content, at)
        if size is None and kind in (b"VP8X", b"VP8L", b"VP8 "):
            size = _webp_size(kind, content[at + 8 : at + 18])
        elif kind == b"EXIF":
            block = content[at + 8 : at + 8 + length_of_chunk]
            orientation = _exif_orientation(block)
        at += 8 + length_of_chunk + length_of_chunk % 2
    if size is None:
        raise _Damaged("no image in it")
    return Header("WebP", *size, orientation=orientation)


def _webp_size(kind: bytes, data: bytes) -> tuple[int, int]:
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") for at in (4, 7))
        return width + 1, height + 1
    if kind == b"VP8L":
        (packed,) = _numbers("<I", data, 1)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    width, height = _numbers("<HH", data, 6)
    return width & 0x3FFF, height & 0x3FFF


def _parse_gif(content: Bytes, start: bytes) -> Header | None:
    if start[:6] not in (b"GIF87a", b"GIF89a"):
        return None
    return Header("GIF", *_numbers("<HH", start, 6), kind="palette")


_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_CODESTREAM = b"\xff\x4f\xff\x51"


def _parse_jpeg2000(content: Bytes, start: bytes) -> Header | None:
    if start.startswith(_JP2):
        at = _box(content, b"jp2c", 0, len(content))[0]
    elif start.startswith(_CODESTREAM):
        at = 0
    else:
        return None
    if content[at : at + 4] != _CODESTREAM:
        raise _Damaged("no codestream in it")
    right, bottom, left, top = _numbers(">IIII", content, at + 8)
    (channels,) = _numbers(">H", content, at + 40)
    depths = _numbers(f">{'Bxx' * channels}", content, at + 42)
    kind = "grey" if channels == 1 else "colour"
    values = "signed" if any(depth & 0x80 for depth in depths) else "unsigned"
    bits = max((depth & 0x7F) + 1 for depth in depths)
    return Header("JPEG 2000", right - left, bottom - top, bits, kind, values)


def _box(content: Bytes, kind: bytes, at: int, end: int) -> tuple[int, int]:
    """Return begin and end of the data of the first box of a kind in JPEG 2000 or AVIF."""
    while at + 8 <= end:
        length, found = _numbers(">I4s", content, at)
        begin = at + 8
        if length == 1:
            (length,) = _numbers(">Q", content, begin)
            begin += 8
        stop = at + length if length else end
        if stop < begin:
            break
        if found == kind:
            return begin, stop
        at = stop
    raise _Damaged(f"no {kind.decode()} in it")


def _parse_pnm(content: Bytes, start: bytes) -> Header | None:
    if start[:1] != b"P" or start[1:2] not in b"123456" or not start[2:3].isspace():
        return None
    words: list[int] = []
    text = content[2:4096]
    for line in text.split(b"\n"):
        words += [int(word) for word in line.split(b"#")[0].split()[:3]]
        if len(words) >= 3 or (len(words) >= 2 and start[1:2] in b"14"):
            break
    bilevel = start[1:2] in b"14"
    highest = 1 if bilevel else words[2]
    if not 0 < highest < 65536:
        raise _Damaged(f"a highest value of {highest}")
    # OpenCV does not scale values if the highest value is below 255.
    bits = 1 if bilevel else 8 if highest < 256 else 16
    return Header("PNM", words[0], words[1], bits, "colour" if start[1:2] in b"36" else "grey")


def _parse_avif(content: Bytes, start: bytes) -> Header | None:
    if start[4:8] != b"ftyp" or start[8:12] not in (b"avif", b"avis"):
        return None
    begin, end = _box(content, b"meta", 0, len(content))
    begin, end = _box(content, b"iprp", begin + 4, end)
    begin, end = _box(content, b"ipco", begin, end)
    sizes, bits = [], 8
    while begin + 8 <= end:
        length, kind = _numbers(">I4s", content, begin)
        if length < 8:
            raise _Damaged("a box without a length")
        if kind == b"ispe":
            sizes.append(_numbers(">II", content, begin + 12))
        elif kind == b"av1C":
            (flags,) = content[begin + 10 : begin + 11]
            bits = max(bits, (12 if flags & 0x20 else 10) if flags & 0x40 else 8)
        begin += length
    # The size of the whole image; there may also be tiles or a thumbnail.
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return Header("AVIF", width, height, bits)


_PARSERS = (
    *(_parse_png, _parse_tiff, _parse_bmp, _parse_webp, _parse_gif),
    *(_parse_jpeg2000, _parse_pnm, _parse_avif),
)


def _parse(content: Bytes, start: bytes, to_the_end: bool) -> Header | None:
    if start.startswith(b"\xff\xd8\xff"):
        return _parse_jpeg(content, to_the_end)
    for parse in _PARSERS:
        header = parse(content, start)
        if header is not None:
            return header
    return None
