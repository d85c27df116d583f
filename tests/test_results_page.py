"""docs/results.md is what the tables in benchmark/results say."""

import pytest

from benchmark import results_page
from benchmark.claims import CLAIMS, VERDICTS
from benchmark.results_page import GROUPS, PAGE, RESULTS, Table

# Scores during a training, which a plot shows as curves.
ELSEWHERE = {"transfer_curves.csv", "transfer_curves_gpu.csv"}


def test_the_page_is_what_the_files_say():
    assert PAGE.read_text(encoding="utf-8") == results_page.render(), (
        "run: python benchmark/results_page.py"
    )


def test_every_table_names_its_machine():
    assert "machine not noted" not in PAGE.read_text(encoding="utf-8")


def test_no_table_is_forgotten():
    shown = {table.file for tables in GROUPS.values() for table in tables}
    found = {path.name for path in RESULTS.glob("*.csv")}
    assert found - shown - ELSEWHERE == set()


def test_a_section_shows_the_rows_and_columns_that_it_names(tmp_path):
    (tmp_path / "a.csv").write_text(
        'model,seed,ms,machine\nnano,0,1.5,"AMD, 2 cores"\nnano,mean,1.4,\n'
    )
    table = Table("a.csv", "A", "Says.", "python a.py", ("model", "ms"), results_page.is_summary)
    text = results_page.section(table, tmp_path)
    assert "| nano | 1.4 |" in text
    assert "1.5" not in text
    assert "AMD, 2 cores" in text
    assert "python a.py" in text


def test_a_column_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("model,ms\nnano,1.5\n")
    with pytest.raises(ValueError, match="seconds"):
        results_page.section(Table("a.csv", "A", "S", "c", ("model", "seconds")), tmp_path)
    assert results_page.section(Table("b.csv", "B", "S", "c"), tmp_path) == ""


@pytest.mark.parametrize("claim", [c for claims in CLAIMS.values() for c in claims])
def test_a_verdict_names_the_measurement_or_test_it_rests_on(claim):
    assert claim.verdict in VERDICTS
    assert bool(claim.evidence) == (claim.verdict != "not testable here")
    root = RESULTS if claim.evidence.endswith(".csv") else RESULTS.parents[1]
    assert not claim.evidence or (root / claim.evidence).is_file()
    assert f"| {claim.text} | {claim.verdict} |" in PAGE.read_text(encoding="utf-8")
