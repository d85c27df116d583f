"""CIFAR-10 as picture files, packed or in class folders: `classes/{train,val}/NAME/*`."""

import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ppvision.data.pictures import decode_picture
from ppvision.data.sources import PICTURE_SUFFIXES, SPLITS, existing_source
from ppvision.data.writing import progress, write_description
from ppvision.errors import DataError
from ppvision.files import create_folder

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

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
        archives = [path for path in source.iterdir() if path.name.endswith(TAR_SUFFIXES)]
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
            decode_picture(io.BytesIO(content), f"{source}: {where}")
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


def _split_and_class(parts: tuple[str, ...], where: str) -> tuple[str, str] | None:
    """Split and class of a picture by its path, or None for a file that is no part of the set."""
    if len(parts) < 3 or parts[-3] not in ("train", "test", "val"):
        return None
    is_picture = PurePosixPath(parts[-1]).suffix.lower() in PICTURE_SUFFIXES
    if not is_picture or parts[-1].startswith("."):  # `._NAME.jpg`: what macOS adds to tar files
        return None
    if parts[-2] not in CLASSES:
        raise DataError(
            f"{where}: expected one of CIFAR-10's classes ({', '.join(CLASSES)}), got the folder "
            f"{parts[-2]}. Rename or remove it."
        )
    return ("train" if parts[-3] == "train" else "val"), parts[-2]


def _folder_pictures(source: Path) -> Iterator[_Picture]:
    for path in sorted(path for path in source.glob("*/*/*") if path.is_file()):
        relative = path.relative_to(source)
        if found := _split_and_class(relative.parts, str(path)):
            yield (relative.as_posix(), *found, path.read_bytes())


def _tar_pictures(source: Path) -> Iterator[_Picture]:
    """Nothing is unpacked under the name that the tar file gives it."""
    try:
        with tarfile.open(source, "r:*") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts:
                    raise DataError(
                        f"{source}: refused: the member {member.name} points out of its folder. "
                        "Get the file from a source you trust."
                    )
                found = _split_and_class(parts, f"{source}: {member.name}")
                if found is None or member.isdir():
                    continue
                if not member.isreg():
                    raise DataError(
                        f"{source}: refused: {member.name} is a link or device, not a picture. "
                        "Get the file from a source you trust."
                    )
                yield (member.name, *found, archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{source}: the tar file is cut off or damaged ({error}). Get it again."
        ) from error
