"""Convert CIFAR-10 image files, packed or in class folders, to `classes/{train,val}/NAME/*`."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ppvision.console import track
from ppvision.data.convert.sources import SPLITS, find_source
from ppvision.data.listing import READABLE_SUFFIXES, LeftOut, is_leftover
from ppvision.data.pictures import read_picture
from ppvision.data.writing import write_description
from ppvision.errors import DataError, shorten, shorten_text
from ppvision.files import create_folder

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# CIFAR-10 as images has 60,000 of at most 4 kB.
_MAX_PICTURE = 16 << 20
_MAX_MEMBERS = 100_000
_MAX_BYTES = 4 << 30
_MAX_HEADERS = 1 << 20  # of one member
_START = 1 << 16
_XZ_MEMORY = 128 << 20  # `xz -9` makes files that take 65 MiB

# Path within the source, split, class and content of one image.
_Picture = tuple[str, str, str, bytes]


def convert_cifar10(source: str | Path, output: str | Path) -> dict:
    """Convert CIFAR-10 in class folders to `classes/{train,val}/NAME/*`; files are copied.

    Args:
        source: a tar file (also gzip, bzip2, xz), a folder that holds one, or a folder with
            `train/NAME/*` and `test/NAME/*` (or `val/NAME/*`). The test images become val.
        output: folder to make; it must not exist or be empty.

    Returns:
        The content of `dataset.json`.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: `output` is not empty.
        DataError: a damaged or cut-off tar file, a tar member that points out of its folder, an
            image that does not decode, a class that is unknown or has no image; names it.
    """
    source = find_source(source, "cifar10", file_allowed=True)
    if source.is_dir() and not (source / "train").is_dir():
        archives = [
            path
            for path in source.iterdir()
            if path.name.endswith(TAR_SUFFIXES) and not is_leftover(path.name)
        ]
        if len(archives) != 1:
            raise DataError(
                f"{source}: expected train/ and test/ with class folders, or one tar file, found "
                f"{len(archives)} tar files. Name the right folder or file."
            )
        source = archives[0]
    pictures = _folder_pictures(source) if source.is_dir() else _tar_pictures(source)
    counts = {split: Counter() for split in SPLITS}
    with create_folder(output) as folder:
        for split in SPLITS:
            for name in CLASSES:
                (folder / "classes" / split / name).mkdir(parents=True)
        for where, split, name, content in track(pictures, "cifar10"):
            target = folder / "classes" / split / name / PurePosixPath(where).name
            if target.exists():
                raise DataError(f"{source}: {where} occurs twice. Remove one of them.")
            read_picture(content, f"{source}: {where}")
            target.write_bytes(content)
            counts[split][name] += 1
        summary = {"name": "cifar10", "source": source.resolve().name, "classes": CLASSES}
        for split in SPLITS:
            if missing := [name for name in CLASSES if not counts[split][name]]:
                raise DataError(
                    f"{source}: expected images of ten classes for {split}, found none of "
                    f"{', '.join(missing)}. The source is incomplete: get it again."
                )
            per_class = {name: counts[split][name] for name in CLASSES}
            summary[split] = {"images": counts[split].total(), "per_class": per_class}
        write_description(folder, summary)
    return summary


def _split_and_class(
    parts: tuple[str, ...], where: str, left_out: LeftOut
) -> tuple[str, str] | None:
    """Return split and class of an image by its path, or None for a file that is not part of the
    set."""
    # macOS adds `._NAME.jpg` to tar files and `__MACOSX` to zip files.
    if is_leftover(PurePosixPath(*parts)) or (parts[-1:] and parts[-1].startswith(".")):
        left_out.leftovers[parts[-1]] += 1
        return None
    if len(parts) < 3 or parts[-3] not in ("train", "test", "val"):
        return None
    suffix = PurePosixPath(parts[-1]).suffix.lower()
    if suffix not in READABLE_SUFFIXES:
        left_out.others[suffix or "no suffix"] += 1
        return None
    if parts[-2] not in CLASSES:
        raise DataError(
            f"{where}: expected one of CIFAR-10's classes ({', '.join(CLASSES)}), got the folder "
            f"{parts[-2]}. Rename or remove it."
        )
    return ("train" if parts[-3] == "train" else "val"), parts[-2]


def _folder_pictures(source: Path) -> Iterator[_Picture]:
    left_out = LeftOut()
    for path in sorted(path for path in source.glob("*/*/*") if path.is_file()):
        relative = path.relative_to(source)
        if found := _split_and_class(relative.parts, str(path), left_out):
            _check_size(path.stat().st_size, str(path))
            yield (relative.as_posix(), *found, path.read_bytes())
    left_out.log(source)


def _check_size(size: int, where: str) -> None:
    if size > _MAX_PICTURE:
        raise DataError(
            f"{where}: expected an image of at most {_MAX_PICTURE} bytes, got {size}. CIFAR-10's "
            "have 32 x 32 pixels: replace or remove it."
        )


class _TarBytes(io.RawIOBase):
    """Reads the content of a tar file with limits. `tarfile` reads a name or a header as long as
    the file says, and unpacked content can be a thousand times as large as the file.

    Args:
        source: the file, plain or packed with gzip, bzip2 or xz.
    """

    def __init__(self, source: Path) -> None:
        self._source = source.open("rb")
        self._file = self._source
        start = self._source.read(_START)
        self._source.seek(0)
        for magic, unpack in (
            (b"\x1f\x8b", gzip.open),
            (b"BZh", bz2.open),
            (b"\xfd7zXZ\x00", lzma.open),
        ):
            if start.startswith(magic):
                self._file = unpack(self._source)
        if self._file is not self._source and start.startswith(b"\xfd"):
            # An xz file states the memory that unpacking needs.
            lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(start, max_length=1)
        self._left = 0

    def allow(self, count: int) -> None:
        """Allow `count` bytes to be read from now on."""
        self._left = count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size) if 0 <= size <= self._left else None
        if data is None:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADERS} bytes")
        self._left -= len(data)
        self._check_place(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._check_place(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    @staticmethod
    def _check_place(place: int) -> None:
        if place > _MAX_BYTES:
            raise tarfile.ReadError(f"more than {_MAX_BYTES} bytes of content")

    def close(self) -> None:
        self._file.close()
        self._source.close()
        super().close()


def _tar_pictures(source: Path) -> Iterator[_Picture]:
    """Yield the members. No file is written under the name in the tar file."""
    try:
        left_out = LeftOut()
        with _TarBytes(source) as unpacked:
            unpacked.allow(_MAX_HEADERS)
            with tarfile.open(fileobj=unpacked, mode="r:") as archive:
                for number, member in enumerate(archive):
                    if number >= _MAX_MEMBERS:
                        raise DataError(
                            f"{source}: expected at most {_MAX_MEMBERS} members, got more. Get the "
                            "file from a source you trust."
                        )
                    where = f"{source}: {shorten(member.name)}"
                    parts = _checked_parts(member, where)
                    if parts and (found := _split_and_class(parts, where, left_out)):
                        _check_member(member, where)
                        unpacked.allow(member.size)
                        content = archive.extractfile(member).read()
                        if len(content) != member.size:
                            raise tarfile.ReadError(f"{where}: unexpected end of data")
                        yield (member.name, *found, content)
                    unpacked.allow(_MAX_HEADERS)
        left_out.log(source)
    except DataError:
        raise
    except (
        *(tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError),
        # Errors that `tarfile` itself raises for invalid headers.
        *(ArithmeticError, LookupError, RecursionError, TypeError, ValueError),
    ) as error:
        raise DataError(
            f"{source}: the tar file is cut off or damaged ({shorten_text(str(error), 200)}). Get "
            "it again."
        ) from error


def _checked_parts(member: tarfile.TarInfo, where: str) -> tuple[str, ...]:
    """Return the parts of a member's path; nothing for a member that is not a file."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        raise DataError(
            f"{where}: refused: this member points out of its folder. Get the file from a source "
            "you trust."
        )
    if not member.name.isprintable() or any(len(os.fsencode(part)) > 255 for part in parts):
        raise DataError(
            f"{where}: refused: expected a name that a file can have. Get the file from a source "
            "you trust."
        )
    return () if member.isdir() else parts


def _check_member(member: tarfile.TarInfo, where: str) -> None:
    if not member.isreg() or member.issparse():
        raise DataError(
            f"{where}: refused: is a link, a device or a file with holes, not an image. Get the "
            "file from a source you trust."
        )
    _check_size(member.size, where)
