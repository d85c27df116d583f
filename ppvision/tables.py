"""Tables of text with aligned columns, for scores, sizes and times."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from numbers import Integral, Real

TERMINAL_COLUMNS = 80  # default width of a terminal


def format_table(rows: Iterable[Iterable[object]], align: str = "<") -> str:
    """Format rows of cells as aligned columns with two spaces between.

        print(format_table([("class", "IoU"), ("road", 0.51), ("sky", math.nan)], "<>"))

        class     IoU
        road   0.5100
        sky         -

    Args:
        rows: rows of the same length; usually the first has the names of the columns. Numbers that
            are not whole are shown with four digits, None and NaN as `-`, other values as `str`.
        align: `<` (left) or `>` (right) for each column; the last applies to all further columns.
    """
    cells = [[_show(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)).rstrip()
        for line in cells
    )


def format_records(records: Sequence[Mapping[str, object]]) -> str:
    """Format records with the same keys as a table; all columns are aligned to the right."""
    return format_table([records[0], *(record.values() for record in records)], ">")


def _show(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Real) and not isinstance(cell, Integral):
        return "-" if isnan(cell) else f"{cell:.4f}"
    return str(cell)
