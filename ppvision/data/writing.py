"""How every data writer leaves a folder: complete, or not there."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


@contextmanager
def complete_folder(output: str | Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its name once the block has ended without error.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"output: expected a new or empty folder, got {output}, which holds files. "
            "Name another one or remove it."
        )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.is_dir():
        output.rmdir()
    partial.replace(output)


def progress(items: Iterable, what: str) -> Iterable:
    """A bar with speed and time left; silent where the output is not a terminal."""
    return tqdm(items, desc=what, unit="img", disable=None)
