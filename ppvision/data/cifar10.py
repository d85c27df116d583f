"""CIFAR-10 as picture files, packed or in class folders: `classes/{train,val}/NAME/*`."""

import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ppvision.data.listing import READABLE_SUFFIXES, LeftOut, is_leftover
from ppvision.data.pictures import read_picture
from ppvision.data.sources import SPLITS, existing_source
from ppvision.data.writing import progress, write_description
from ppvision.errors import DataError
from ppvision.files import create_folder

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# A packed file may say that a kilobyte becomes gigabytes. A picture of 32 x 32 pixels has 3 KiB,
# a name in a header of its own a few hundred bytes.
PICTURE_BYTES = 64 * 2**20
HEADER_BYTES = 2**20

_HEADER_TYPES = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE}
_HEADER_TYPES |= {tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}

# Path within the source, split, class and content of one picture.
_Picture = tuple[str, str, str, bytes]


def convert_cifar10(source: str | Path, output: str | Path) -> dict:
    """Convert CIFAR-10 in class folders to `classes/{train,val}/NAME/*`; files are copied.

    Args:
        source: a tar file (also gzip, bzip2, xz), a folder that holds one, or a folder with
            `train/NAME/*` and `test/NAME/*` (or `val/NAME/*`). The test pictures become val.
        output: folder to make; it must not exist or be empty.

    Returns:
        What `dataset.json` says.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: `output` is not empty.
        DataError: a damaged or cut-off tar file, a tar member that points out of its folder, a
            picture that does not decode, a class that is unknown or has no picture; names it.
    """
    source = existing_source(source, "cifar10", file_allowed=True)
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
        for where, split, name, content in progress(pictures, "cifar10"):
            target = folder / "classes" / split / name / PurePosixPath(where).name
            if target.exists():
                raise DataError(f"{source}: {where} is there twice. Remove one of them.")
            read_picture(content, f"{source}: {where}")
            target.write_bytes(content)
            counts[split][name] += 1
        summary = {"name": "cifar10", "source": source.resolve().name, "classes": CLASSES}
        for split in SPLITS:
            if missing := [name for name in CLASSES if not counts[split][name]]:
                raise DataError(
                    f"{source}: expected pictures of ten classes for {split}, found none of "
                    f"{', '.join(missing)}. The source is incomplete: get it again."
                )
            per_class = {name: counts[split][name] for name in CLASSES}
            summary[split] = {"images": counts[split].total(), "per_class": per_class}
        write_description(folder, summary)
    return summary


def _split_and_class(
    parts: tuple[str, ...], where: str, left_out: LeftOut
) -> tuple[str, str] | None:
    """Split and class of a picture by its path, or None for a file that is no part of the set."""
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
            yield (relative.as_posix(), *found, path.read_bytes())
    left_out.log(source)


class _BoundedMember(tarfile.TarInfo):
    """A member of a tar file. Long names stand in headers of their own, which `tarfile` reads whole
    whatever size they say."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADER_TYPES and member.size > HEADER_BYTES:
            raise tarfile.ReadError(
                f"a header of {member.size} bytes, expected at most {HEADER_BYTES}"
            )
        return member


def _tar_pictures(source: Path) -> Iterator[_Picture]:
    """Nothing is unpacked under the name that the tar file gives it."""
    try:
        left_out = LeftOut()
        with tarfile.open(source, "r:*", tarinfo=_BoundedMember) as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts:
                    raise DataError(
                        f"{source}: refused: the member {member.name} points out of its folder. "
                        "Get the file from a source you trust."
                    )
                if member.isdir():
                    continue
                found = _split_and_class(parts, f"{source}: {member.name}", left_out)
                if found is None:
                    continue
                if not member.isreg():
                    raise DataError(
                        f"{source}: refused: {member.name} is a link or device, not a picture. "
                        "Get the file from a source you trust."
                    )
                if member.size > PICTURE_BYTES:
                    raise DataError(
                        f"{source}: refused: {member.name} says that it has {member.size} bytes, "
                        f"expected at most {PICTURE_BYTES}. Get the file from a source you trust."
                    )
                yield (member.name, *found, archive.extractfile(member).read())
        left_out.log(source)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(
            f"{source}: the tar file is cut off or damaged ({error}). Get it again."
        ) from error
