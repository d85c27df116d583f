"""Print a table of exported folders by the bits of their weights and by arithmetic.

    python scripts/arithmetic_table.py FLOAT INT8 [WIDTH ...]

FLOAT is an export without integers, INT8 one of the same model with `--int8`, each WIDTH a folder
of `export --bits ... --int8`. Scores come from `deploy.yaml`. Milliseconds are measured here, on
one thread, in turn, each folder in the arithmetic of its row.
"""

import sys
from pathlib import Path

from ppvision.console import Console, show
from ppvision.deploy.run.bench import time_arithmetic
from ppvision.deploy.run.manifest import Manifest, PrecisionCheck, read_manifest
from ppvision.tables import format_records


def make_rows(as_float: Path, as_int8: Path, widths: list[Path]) -> list[dict]:
    """Return one row for the float export, one for the same model in integers, two per width; rows
    in integers only if an engine ran them when they were exported."""
    kinds = [(as_float, "float32"), (as_int8, "int8")]
    kinds += [(folder, kind) for folder in widths for kind in ("float32", "int8")]
    # Without OpenVINO no engine ran the integers when they were exported, and none runs them now.
    kinds = [(folder, kind) for folder, kind in kinds if kind == "float32" or _ran(folder)]
    of_float = read_manifest(as_int8).int8  # the check of the integers has float's score too
    rows = []
    for (folder, kind), taken in zip(kinds, time_arithmetic(kinds), strict=True):
        manifest = read_manifest(folder)
        rows.append(_row(manifest, kind, manifest.int8 or of_float) | {"ms": f"{taken:.2f}"})
    return rows


def _ran(folder: Path) -> bool:
    checked = read_manifest(folder).int8
    return checked is not None and checked.engine is not None


def _row(manifest: Manifest, arithmetic: str, checked: PrecisionCheck) -> dict[str, object]:
    return {
        "bits": manifest.bits,
        "arithmetic": arithmetic,
        checked.metric or "score": checked.score if arithmetic == "int8" else checked.float_score,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }


def main() -> None:
    as_float, as_int8, *widths = map(Path, sys.argv[1:])
    with Console("table"):  # the engine prints on stdout
        show(format_records(make_rows(as_float, as_int8, widths)))


if __name__ == "__main__":
    main()
