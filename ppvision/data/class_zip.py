"""Class folders inside a zip file, read in place.

A data set of many small images is faster to copy as one file, and takes fewer resources of a file
system. The zip is never unpacked: `pread` reads an image's bytes from their place, so that threads
and forked workers can share one open file.
"""

import hashlib
import json
import logging
import os
import struct
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ppvision.console import FILE_ONLY, track
from ppvision.data.check.verdicts import find_verdict_file, read_verdict, write_verdict
from ppvision.data.limits import read_max_pixels
from ppvision.data.listing import READABLE_SUFFIXES, is_leftover
from ppvision.data.pictures import read_picture
from ppvision.errors import DataError

logger = logging.getLogger("ppvision")

# Bytes of one image file. A zip of 1 MB can claim petabytes; training images are much smaller than
# 256 MiB.
MAX_FILE_BYTES = 2**28
SHOWN = 10  # problems that an error lists
CHECKS_VERSION = 2  # raise it when `check_zip` changes, so that stored verdicts are not used

_UTF8_NAME = 0x800  # flag of an entry whose name is UTF-8
_ENCRYPTED = 0x1
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of name and extra field


@dataclass(frozen=True, slots=True)
class _Entry:
    """Position of a file in the zip."""

    header: int  # offset of its local header
    stored_bytes: int
    bytes: int
    method: int
    crc: int
    encrypted: bool


class PictureZip:
    """A zip file that is open for reading.

    Args:
        path: of the file.

    Attributes:
        entries: of files by name, folders divided by `/`.
        folders: names of the folders that have an entry of their own.

    Raises:
        DataError: not a zip file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, _Entry] = {}
        self.folders: list[str] = []
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(
                f"{path}: expected a zip file, got one that does not read ({error}). It may be cut "
                "short: copy it again."
            ) from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size
        for info in infos:  # if a name occurs twice, the last entry counts, as in unzip
            name = _file_name(info)
            if name.endswith("/"):
                self.folders.append(name.rstrip("/"))
                continue
            self.entries[name] = _Entry(
                info.header_offset,
                info.compress_size,
                info.file_size,
                info.compress_type,
                info.CRC,
                bool(info.flag_bits & _ENCRYPTED),
            )

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            DataError: no such file, encrypted, neither stored nor deflated, too large or damaged.
        """
        shown = f"{self.path}: {make_printable(name)}"
        entry = self.entries.get(name)
        if entry is None:
            raise DataError(f"{shown}: no such file in the zip. Check the path and the list.")
        if entry.encrypted:
            raise DataError(f"{shown}: is encrypted. Pack the images without a password.")
        if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{shown}: expected a stored or deflated file, got method {entry.method}. Pack the "
                "images again (`zip -r`)."
            )
        if max(entry.bytes, entry.stored_bytes) > MAX_FILE_BYTES:
            raise DataError(
                f"{shown}: expected an image file of at most {MAX_FILE_BYTES} bytes, got "
                f"{entry.bytes}. Remove it from the zip."
            )
        damaged = f"{shown}: is damaged ({{}}). Copy the zip again from its source."
        header = os.pread(self._descriptor, _LOCAL_HEADER.size, entry.header)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise DataError(damaged.format("no header where the directory says"))
        _, *lengths = _LOCAL_HEADER.unpack(header)
        start = entry.header + _LOCAL_HEADER.size + sum(lengths)
        if start + entry.stored_bytes > self._size:  # before memory is allocated for it
            raise DataError(damaged.format("cut short"))
        content = os.pread(self._descriptor, entry.stored_bytes, start)
        if entry.method == zipfile.ZIP_DEFLATED:
            try:
                # Read one byte more than announced, to find out whether there is more.
                content = zlib.decompressobj(-15).decompress(content, entry.bytes + 1)
            except zlib.error as error:
                raise DataError(damaged.format(error)) from error
        if len(content) != entry.bytes or zlib.crc32(content) != entry.crc:
            raise DataError(damaged.format("its checksum differs"))
        return content


def _file_name(info: zipfile.ZipInfo) -> str:
    """Return the name that the file would have on Linux after unpacking."""
    if info.flag_bits & _UTF8_NAME:
        return info.filename
    # Without the flag, `zipfile` decodes the bytes as code page 437. Their real encoding depends on
    # the machine that packed them; it is mostly UTF-8.
    return os.fsdecode(info.orig_filename.encode("cp437"))


def make_printable(name: str) -> str:
    """Return a name, which may not be UTF-8, as text that can be printed anywhere."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class ZipPath:
    """A file or folder inside a zip; `name` is empty for the zip itself."""

    archive: PictureZip
    name: str

    def __truediv__(self, name: str) -> "ZipPath":
        return ZipPath(self.archive, str(PurePosixPath(self.name, name)))

    def __str__(self) -> str:
        return f"{self.archive.path}: {make_printable(self.name)}"

    def read_bytes(self) -> bytes:
        """Return the content of the file; see `PictureZip.read`."""
        return self.archive.read(self.name)

    def pictures_by_class(self) -> dict[str, list["ZipPath"]]:
        """Return the images below each sub-folder, both in the order of `sorted` paths. A folder
        without an image has an empty list.

        Files that tools leave behind (hidden files and folders, `__MACOSX`) are omitted.

        Raises:
            DataError: no such folder in the zip.
        """
        inside = PurePosixPath(self.name)
        base = () if self.name == "" else inside.parts
        found: dict[str, list[PurePosixPath]] = {}
        exists, left_out = not base, 0
        for name, is_file in (
            *((name, True) for name in self.archive.entries),
            *((name, False) for name in self.archive.folders),
        ):
            path = PurePosixPath(name)
            if path.parts[: len(base)] != base:
                continue
            exists = True
            parts = path.parts[len(base) :]
            hidden = is_leftover(PurePosixPath(*parts)) or any(p.startswith(".") for p in parts)
            if hidden or len(parts) < 1 + is_file:
                left_out += is_file
                continue
            pictures = found.setdefault(parts[0], [])
            if is_file and path.suffix.lower() in READABLE_SUFFIXES:
                pictures.append(path)
            else:
                left_out += is_file
        if not exists:
            folders = sorted({PurePosixPath(name).parts[0] for name in self.archive.entries})
            shown = ", ".join(map(make_printable, folders[:SHOWN])) or "no files"
            raise DataError(
                f"root: expected a folder {make_printable(self.name)} in {self.archive.path}, got "
                f"none. The zip has at its top: {shown}."
            )
        if left_out:
            where = str(self).removesuffix(": ")  # at the top of the zip
            logger.info(f"{where}: {left_out} files omitted that are not images")
        return {
            make_printable(name): [ZipPath(self.archive, str(path)) for path in sorted(found[name])]
            for name in sorted(found)
        }


def split_zip(root: str | Path) -> tuple[Path, str] | None:
    """Return the zip file and the folder in it that `root` names (`train.zip`, `data.zip//train`),
    or None if it does not name a zip file."""
    root = Path(root)
    for path in (root, *root.parents):
        if path.suffix.lower() == ".zip" and path.is_file():
            inner = root.relative_to(path).as_posix()
            return path, "" if inner == "." else inner
    return None


def open_root(root: str | Path) -> Path | ZipPath:
    """Return a folder of images, on disk or in a zip.

    Raises:
        DataError: no such folder, or a zip that does not read.
    """
    found = split_zip(root)
    if found is not None:
        path, inner = found
        return ZipPath(PictureZip(path), inner)
    if not Path(root).is_dir():
        raise DataError(f"root: expected a folder of images or a zip file, found none at {root}.")
    return Path(root)


def has_root(root: str | Path) -> bool:
    """Whether the folder or the zip file exists."""
    return Path(root).is_dir() or split_zip(root) is not None


def read_sample(path: Path | ZipPath, max_value: int | None = None) -> np.ndarray:
    """Read an image of a data set: `[H, W, 3]` uint8 RGB.

    Args:
        path: on disk or in a zip.
        max_value: of images of more than 8 bits per channel; see `read_picture`.

    Raises:
        DataError: not an image, or one that does not decode.
    """
    if isinstance(path, ZipPath):
        return read_picture(path.read_bytes(), str(path), max_value=max_value)
    return read_picture(path, max_value=max_value)


def check_zip(name: str, paths: Sequence[ZipPath], max_value: int | None = None) -> dict:
    """Decode every image, in several threads; raise one error that lists what is wrong.

    The verdict on a zip without problems is kept in the cache folder, until the zip's size or time
    or the images change.

    Args:
        name: how errors call the set.
        paths: of one zip.
        max_value: of images of more than 8 bits per channel; see `read_picture`.

    Returns:
        `images` (how many) and `sizes` (images by "WIDTHxHEIGHT").

    Raises:
        DataError: images that do not decode: the first ten, and how many there are.
    """
    archive = paths[0].archive
    status = archive.path.stat()
    file = [str(archive.path.resolve()), status.st_size, status.st_mtime_ns]
    how = [CHECKS_VERSION, max_value, read_max_pixels()]  # settings that decide what is refused
    settings = json.dumps([how, *file, [path.name for path in paths]])
    verdict = find_verdict_file(hashlib.sha256(settings.encode()))
    if (known := read_verdict(verdict, {"images": 0, "sizes": {}})) is not None:
        logger.info(
            f"{name}: unchanged since it was last checked, not decoded again", extra=FILE_ONLY
        )
        return known

    def look_at(path: ZipPath) -> tuple[str | None, str | None]:
        """Return the problem of an image, or its size."""
        try:
            height, width = read_sample(path, max_value).shape[:2]
        except DataError as error:
            return str(error), None
        return None, f"{width}x{height}"

    with ThreadPoolExecutor() as pool:
        try:
            looked = list(track(pool.map(look_at, paths), f"check {name}", len(paths)))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: do not decode the rest first
            raise
    found = [text for text, _ in looked if text is not None]
    if found:
        lines = [f"{name}: {len(found)} of {len(paths)} images cannot be read.", *found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"and {len(found) - SHOWN} more")
        raise DataError("\n    ".join(lines))
    sizes = Counter(size for _, size in looked)
    summary = {"images": len(paths), "sizes": dict(sizes.most_common())}
    write_verdict(verdict, summary, name)
    return summary
