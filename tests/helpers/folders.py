"""Folders that several tests read."""

from collections.abc import Iterator
from pathlib import Path


def check_unchanged(folder: Path) -> Iterator[Path]:
    """A folder of several tests; at their end nothing may have changed."""
    before = _list_files(folder)
    yield folder
    after = _list_files(folder)
    changed = sorted(name for name, _ in before.items() ^ after.items())
    assert not changed, f"a test changed {changed}, which others read: expected it to take a copy"


def _list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each file, by name."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}
