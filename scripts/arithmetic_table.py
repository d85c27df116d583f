"""Print a table of exported folders by the bits of their weights and by arithmetic.

    python scripts/arithmetic_table.py FLOAT INT8 [WIDTH ...]

FLOAT is an export without integers, INT8 one of the same model with `--int8`, each WIDTH a folder
of `export --bits ... --int8`. Scores and milliseconds (one thread, OpenVINO) come from
`deploy.yaml`.
"""

import sys
from pathlib import Path

from ppvision.deploy.run.manifest import Manifest, PrecisionCheck, read_manifest
from ppvision.tables import format_records


def make_rows(as_float: Manifest, as_int8: Manifest, widths: list[Manifest]) -> list[dict]:
    """Return one row for the float export, one for the same model in integers, two per width."""
    checked = as_int8.int8
    rows = [_row(as_float, "float32", checked), _row(as_int8, "int8", checked)]
    for manifest in widths:
        rows += [_row(manifest, kind, manifest.int8) for kind in ("float32", "int8")]
    return rows


def _row(manifest: Manifest, arithmetic: str, checked: PrecisionCheck) -> dict[str, object]:
    in_integers = arithmetic == "int8"
    score = checked.score if in_integers else checked.float_score
    taken = checked.milliseconds if in_integers else checked.float_milliseconds
    return {
        "bits": manifest.bits,
        "arithmetic": arithmetic,
        checked.metric or "score": score,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "ms": None if taken is None else f"{taken:.2f}",
    }


def main() -> None:
    as_float, as_int8, *widths = [read_manifest(Path(folder)) for folder in sys.argv[1:]]
    print(format_records(make_rows(as_float, as_int8, widths)))


if __name__ == "__main__":
    main()
