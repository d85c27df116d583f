"""Verdicts: what a check counted in a data set without problems, kept in the cache folder.

The name of a verdict's file is a hash of everything that it depends on. A changed data set
therefore has no verdict. A file that cannot be read, or that no check wrote, counts as no verdict:
the data set is checked again.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from ppvision.files import find_cache_folder, write_text

logger = logging.getLogger("ppvision")

Verdict = dict[str, Any]


def find_verdict_file(digest: "hashlib._Hash") -> Path:
    """Return the file of the verdict for the values that `digest` has seen."""
    return find_cache_folder() / "checked" / f"{digest.hexdigest()}.json"


def read_verdict(path: Path, example: Verdict) -> Verdict | None:
    """Return the verdict, or None if there is none with the keys and types of `example`.

    Args:
        path: see `find_verdict_file`.
        example: counts (whole numbers), and lists or dictionaries of counts.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or [*found] != [*example]:
        return None
    fits = all(_is_like(found[key], value) for key, value in example.items())
    return found if fits else None


def write_verdict(path: Path, verdict: Verdict, name: str) -> None:
    """Keep a verdict. If this fails, the log says so and nothing else happens."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(verdict))
    except OSError as error:
        logger.warning("%s: will be checked again next time: %s", name, error)


def _is_like(value: object, example: object) -> bool:
    if isinstance(example, int):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if type(value) is not type(example):
        return False
    counts = value.values() if isinstance(value, dict) else value
    return all(_is_like(count, 0) for count in counts)  # type: ignore[attr-defined]
