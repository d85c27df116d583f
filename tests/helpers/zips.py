"""Zip files of class folders."""

import zipfile
from pathlib import Path


def pack(folder: Path, path: Path, method: int = zipfile.ZIP_STORED, inner: str = "") -> Path:
    """A folder as a zip, its files in another order than the sorted one."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, f"{inner}{file.relative_to(folder).as_posix()}")
    return path


def write_entries(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path
