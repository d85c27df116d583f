"""What the first bytes of a picture file say: format, size, bits a channel and orientation.

Decoders are asked for pixels only. Whether a file may be decoded (its size, its depth), and which
size a reader has to expect, is decided here, from the format's own specification, so that a check
and a training cannot differ. The orientation counts where `cv2.imread` obeys it: the Exif block of
JPEG, PNG and WebP, and TIFF's own tag. XMP does not count.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ppvision.errors import DataError

# What `read_picture` accepts, as messages name it.
FORMATS = "JPEG, PNG, BMP, WebP, TIFF, GIF, JPEG 2000, PNM, AVIF"

EXIF_ORIENTATION = 0x0112  # also TIFF's tag
QUARTER_TURNS = {5, 6, 7, 8}  # orientations that swap width and height
_EXIF = b"Exif\0\0"


class Bytes(Protocol):
    """What is read here: `bytes`, or a file that gives slices as `bytes` does."""

    def __getitem__(self, place: slice) -> bytes: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Header:
    """A picture before it is decoded.

    Attributes:
        format: JPEG, PNG, BMP, WebP, TIFF, GIF, JPEG 2000, PNM or AVIF.
        width, height: pixels as they are stored.
        bits: of a channel.
        kind: "grey", "palette" or "colour" (grey with transparency counts as colour).
        values: "unsigned", "signed" or "float".
        orientation: 1 to 8 as in Exif; 1 where there is none that counts.
    """

    format: str
    width: int
    height: int
    bits: int = 8
    kind: str = "colour"
    values: str = "unsigned"
    orientation: int = 1

    @property
    def deep(self) -> bool:
        """Whether 8 bits do not hold its values."""
        return self.bits > 8 or self.values != "unsigned"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as it is read, turned upright."""
        turned = self.orientation in QUARTER_TURNS
        return (self.width, self.height) if turned else (self.height, self.width)


class _Damaged(Exception):
    """The text says how."""


def read_header(content: Bytes, name: str) -> Header:
    """Read the header of a picture of any of the `FORMATS`, whatever its name ends with.

    Raises:
        DataError: empty, another format, cut off or damaged inside its header; starts with `name`.
    """
    start = content[:32]
    if not start:
        raise DataError(f"{name}: does not decode (an empty file). Copy it again, or remove it.")
    for parse in _PARSERS:
        try:
            header = parse(content, start)
        except _Damaged as error:
            raise damaged(name, str(error)) from error
        except (struct.error, IndexError, ValueError) as error:
            raise damaged(name, "cut off in its header") from error
        if header is None:
            continue
        if header.width < 1 or header.height < 1:
            raise damaged(name, f"a size of {header.width} x {header.height}")
        return header
    raise DataError(
        f"{name}: does not decode (not a picture of a known format). Expected {FORMATS}: save it "
        "as one of them, or remove it."
    )


def damaged(name: str, reason: str) -> DataError:
    """The error for a picture that is cut off or damaged."""
    return DataError(f"{name}: does not decode ({reason}). Copy it again, or remove it.")


def _numbers(layout: str, content: Bytes, at: int) -> tuple[int, ...]:
    return struct.unpack(layout, content[at : at + struct.calcsize(layout)])


def _exif_orientation(block: bytes) -> int:
    """The orientation that OpenCV takes from a TIFF block inside of a picture; 1 for none.

    OpenCV reads 16 bits whatever type the entry says, and the first entry counts.
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
    except struct.error:  # it ends inside of the list
        pass
    return 1


# -- JPEG ------------------------------------------------------------------------------------------

_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_RESTARTS = range(0xD0, 0xD8)
_SCAN, _END, _RESTART_INTERVAL, _APP1 = 0xDA, 0xD9, 0xDD, 0xE1
# What ends coded pixels: 0xFF with neither a stuffed zero nor padding behind it.
_MARKER = re.compile(rb"\xff[^\x00\xff]")
# Segments that may stand between two scans.
_BETWEEN_SCANS = {0xC4, 0xCC, 0xDB, 0xDC, _RESTART_INTERVAL, 0xFE, *range(0xE0, 0xF0)}


@dataclass
class _Frame:
    """What a JPEG's start of frame says."""

    marker: int
    bits: int
    height: int
    width: int
    sampling: dict[int, tuple[int, int]]  # component -> horizontal, vertical

    def units(self, components: bytes) -> int:
        """Minimum coded units of a scan of these components."""
        widest = max(h for h, _ in self.sampling.values())
        tallest = max(v for _, v in self.sampling.values())
        if len(components) > 1:
            return -(-self.width // (8 * widest)) * -(-self.height // (8 * tallest))
        across, down = self.sampling[components[0]]
        columns = -(-self.width * across // widest)
        rows = -(-self.height * down // tallest)
        return -(-columns // 8) * -(-rows // 8)


def _jpeg_segments(content: Bytes, at: int) -> Iterator[tuple[int, int, bytes]]:
    """`(marker, end, payload)` of each segment from `at` to the next scan or the end of the
    picture, which have the last `end`."""
    while True:
        if len(mark := content[at : at + 2]) < 2:
            raise _Damaged("cut off: it has no end marker")
        if mark[0] != 0xFF:
            raise _Damaged("data between its segments")
        if mark[1] == 0xFF:  # padding
            at += 1
            continue
        marker = mark[1]
        if marker == _END:
            yield marker, at + 2, b""
            return
        length = int.from_bytes(content[at + 2 : at + 4])
        payload = content[at + 4 : at + 2 + length]
        if length < 2 or len(payload) != length - 2:
            raise _Damaged("cut off inside of a segment")
        at += 2 + length
        yield marker, at, payload
        if marker == _SCAN:
            return


def _read_frame(marker: int, payload: bytes) -> _Frame:
    bits, height, width, count = _numbers(">BHHB", payload, 0)
    sampling = {}
    for index in range(count):
        component, factors, _ = _numbers(">BBB", payload, 6 + 3 * index)
        sampling[component] = factors >> 4, factors & 15
    if not sampling or any(0 in factors for factors in sampling.values()):
        raise _Damaged("a frame without components")
    return _Frame(marker, bits, height, width, sampling)


def _parse_jpeg(content: Bytes, start: bytes) -> Header | None:
    if start[:3] != b"\xff\xd8\xff":
        return None
    frame, orientation = None, 1
    for marker, _, payload in _jpeg_segments(content, 2):
        if marker in _START_OF_FRAME and frame is None:
            frame = _read_frame(marker, payload)
        elif marker == _APP1 and orientation == 1 and payload.startswith(_EXIF):
            orientation = _exif_orientation(payload[len(_EXIF) :])
    if frame is None:
        raise _Damaged("no size before its pixels")
    kind = "grey" if len(frame.sampling) == 1 else "colour"
    size = frame.width, frame.height
    return Header("JPEG", *size, frame.bits, kind, orientation=orientation)


def check_jpeg(content: bytes, name: str) -> None:
    """Walk through all markers of a JPEG.

    libjpeg fills what it misses with grey and only prints a warning. Found here: a file without an
    end marker, markers that a scan cannot hold, and restart markers that are lost or out of order.
    A flipped bit that still decodes cannot be known: JPEG has no checksum.

    Raises:
        DataError: the file is cut off or damaged.
    """
    try:
        _walk_jpeg(content)
    except _Damaged as error:
        raise damaged(name, str(error)) from error
    except (struct.error, IndexError, KeyError) as error:
        raise damaged(name, "a segment that is cut off") from error


def _walk_jpeg(content: bytes) -> None:
    at, interval, frame = 2, 0, None
    while True:
        for marker, end, payload in _jpeg_segments(content, at):
            at = end
            if marker in _START_OF_FRAME:
                frame = _read_frame(marker, payload)
            elif marker == _RESTART_INTERVAL:
                (interval,) = _numbers(">H", payload, 0)
            elif marker not in _BETWEEN_SCANS and marker not in (_SCAN, _END):
                raise _Damaged(f"a marker 0x{marker:02x} that has no place in it")
        if marker == _END:
            return
        if frame is None:
            raise _Damaged("no size before its pixels")
        count = 0
        for found in _MARKER.finditer(content, at):
            at = found.start()
            if content[at + 1] not in _RESTARTS:
                break
            if content[at + 1] != _RESTARTS[count % 8]:
                raise _Damaged("restart markers out of order")
            count += 1
        else:
            raise _Damaged("cut off: it has no end marker")
        if frame.marker in _LOSSLESS:  # whose units are pixels
            continue
        expected = 0
        if interval:
            components = payload[1 : 1 + 2 * payload[0] : 2]
            expected = -(-frame.units(components) // interval) - 1
        # Encoders may write one more behind the last interval.
        if count not in (expected, expected + bool(interval)):
            raise _Damaged(f"{count} restart markers where {expected} belong")


# -- PNG -------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KINDS = {0: "grey", 2: "colour", 3: "palette", 4: "colour", 6: "colour"}


def png_chunks(content: Bytes) -> Iterator[tuple[bytes, int, int]]:
    """`(type, start, end)` of each chunk's data, to the last one, IEND; four bytes of CRC follow.

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
            raise _Damaged(f"cut off inside of {kind!r:.12}")
        yield kind, at + 8, end
        if kind == b"IEND":
            return
        at = end + 4


def _parse_png(content: Bytes, start: bytes) -> Header | None:
    if not start.startswith(_PNG):
        return None
    header, orientation = None, 1
    for kind, begin, end in png_chunks(content):
        if header is None:
            if kind != b"IHDR":
                raise _Damaged("it does not begin with its size")
            width, height, bits, colour = _numbers(">IIBB", content, begin)
            if colour not in _PNG_KINDS:
                raise _Damaged(f"a colour type {colour}")
            header = Header("PNG", width, height, bits, _PNG_KINDS[colour])
        elif kind == b"eXIf":
            orientation = _exif_orientation(content[begin:end])
    return replace(header, orientation=orientation)


# -- TIFF ------------------------------------------------------------------------------------------

_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT = 256, 257, 258, 262, 277, 339
_READ_TAGS = {_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT, EXIF_ORIENTATION}
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB_PALETTE = 0, 1, 3
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 4: "unsigned"}  # 4: undefined; the rest are floats


def tiff_tags(content: Bytes) -> dict[int, tuple[tuple[int, ...], int]]:
    """The first page's tags that are read here: values, and the place of the first of them.

    Raises:
        struct.error: the file ends before.
    """
    order = {b"II": "<", b"MM": ">"}[content[:2]]
    big = _numbers(f"{order}H", content, 2) == (43,)  # BigTIFF: 64-bit places
    number, word = (f"{order}Q", 8) if big else (f"{order}I", 4)
    (at,) = _numbers(number, content, 8 if big else 4)
    (count,) = _numbers(f"{order}Q" if big else f"{order}H", content, at)
    at += 8 if big else 2
    tags: dict[int, tuple[tuple[int, ...], int]] = {}
    for entry in range(min(count, 4096)):  # more than any page has; a damaged count is huge
        place = at + entry * (4 + 2 * word)
        tag, kind = _numbers(f"{order}HH", content, place)
        (values,) = _numbers(number, content, place + 4)
        if tag not in _READ_TAGS or kind not in _TIFF_TYPES or tag in tags:
            continue
        code = _TIFF_TYPES[kind]
        values = min(values, 8)  # of a damaged count the first are enough
        inside = values * struct.calcsize(code) <= word
        begin = place + 4 + word
        if not inside:
            (begin,) = _numbers(number, content, begin)
        tags[tag] = _numbers(f"{order}{values}{code}", content, begin), begin
    return tags


def _parse_tiff(content: Bytes, start: bytes) -> Header | None:
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    tags = tiff_tags(content)

    def value(tag: int, default: int) -> int:
        values, _ = tags.get(tag, ((), 0))
        return values[0] if values else default

    if not value(_WIDTH, 0) or not value(_HEIGHT, 0):
        raise _Damaged("a first page without a size")
    channels, photometric = value(_SAMPLES, 1), value(_PHOTOMETRIC, _MIN_IS_BLACK)
    kind = "colour"
    if channels == 1 and photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK):
        kind = "grey"
    elif channels == 1 and photometric == _RGB_PALETTE:
        kind = "palette"
    bits, _ = tags.get(_BITS, ((1,), 0))
    values = _SAMPLE_FORMATS.get(value(_SAMPLE_FORMAT, 1), "float")
    turn = value(EXIF_ORIENTATION, 1)
    orientation = turn if turn in range(1, 9) else 1
    size = value(_WIDTH, 0), value(_HEIGHT, 0)
    return Header("TIFF", *size, max(bits, default=1), kind, values, orientation)


# -- the others ------------------------------------------------------------------------------------


def _parse_bmp(content: Bytes, start: bytes) -> Header | None:
    if start[:2] != b"BM":
        return None
    (size,) = _numbers("<I", start, 14)
    if size == 12:  # of OS/2
        width, height, _, bits = _numbers("<HHHH", start, 18)
    else:
        width, height, _, bits = _numbers("<iiHH", start, 18)
    # A negative height: the first row is the upper one. 16 bits are three channels of 5.
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
        raise _Damaged("no picture in it")
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
    """Begin and end of the data of the first box of a kind, of JPEG 2000's and AVIF's."""
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
    # OpenCV reads a highest value below 255 as it stands, without scaling it.
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
    # The whole picture, where there are tiles or a thumbnail as well.
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return Header("AVIF", width, height, bits)


_PARSERS = (
    *(_parse_jpeg, _parse_png, _parse_tiff, _parse_bmp, _parse_webp, _parse_gif),
    *(_parse_jpeg2000, _parse_pnm, _parse_avif),
)
