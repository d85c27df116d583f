"""Reading text files as people's tools write them, with errors that name the file."""

from pathlib import Path

from ppvision.errors import DataError


def read_list(path: str | Path, separator: str = " ") -> list[tuple[int, list[str]]]:
    """The lines of a list file: number (from 1) and fields of each, split as PaddleSeg splits.

    Raises:
        DataError: no such file, not UTF-8 text, or a byte order mark (which would become part of
            the first file's name).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a list file, found none. Check the path.")
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error}). Save it as UTF-8.") from error
    if lines and lines[0].startswith("\ufeff"):
        raise DataError(f"{path}: starts with a byte order mark. Save it as UTF-8 without one.")
    return [(number, line.strip().split(separator)) for number, line in enumerate(lines, start=1)]
