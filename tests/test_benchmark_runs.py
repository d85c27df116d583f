"""Tables of many runs, to which several processes add."""

import multiprocessing
from pathlib import Path

import pytest

from benchmark.runs import add_row, add_rows, read_rows, write_rows

FIELDS = ("kind", "seed", "score")
PROCESSES, ROWS = 6, 12


def _add(path: Path, kind: int) -> None:
    for seed in range(ROWS):
        row = {"kind": kind, "seed": seed, "score": "0.5"}
        add_row(path, row, FIELDS, lambda row: (row["kind"], int(row["seed"])), lambda rows: [])


def test_no_row_is_lost_and_no_file_stays(tmp_path):
    path = tmp_path / "results" / "table.csv"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(path, k)) for k in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = read_rows(path)
    assert [(row["kind"], row["seed"]) for row in rows] == [
        (str(kind), str(seed)) for kind in range(PROCESSES) for seed in range(ROWS)
    ]
    assert [p.name for p in path.parent.iterdir()] == ["table.csv"]


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.csv"
    write_rows(path, [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}])
    assert path.read_bytes() == b'a,b\n1,"x,y"\n2,\n'
    path.unlink()
    rows, new = [{"kind": "k", "seed": 0, "score": 1}], {"kind": "k", "seed": 1}
    add_rows(path, rows, FIELDS, lambda row: row["seed"], lambda rows: [{"seed": "mean"}])
    try:
        add_rows(path, [new | {"other": 1}], FIELDS, lambda row: row["seed"], lambda rows: [])
    except ValueError:
        pass
    else:
        raise AssertionError("a column that the table has not")
    assert path.read_text().splitlines()[-1] == ",mean,"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


SCRIPTS = [
    path
    for path in sorted((Path(__file__).resolve().parents[1] / "benchmark").glob("*.py"))
    if "\nfrom benchmark" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_the_others_from_any_folder(path):
    """`python benchmark/NAME.py` has its own folder on the path, not the one above."""
    text = path.read_text(encoding="utf-8")
    assert 0 < text.find("\nsys.path.") < text.index("\nfrom benchmark") or (
        0 < text.find("    sys.path.") < text.index("\nfrom benchmark")
    )
