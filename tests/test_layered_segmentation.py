"""`benchmark/layered_segmentation.py`: every method once on a few pictures, and its table."""

import csv

import numpy as np
import pytest

from benchmark import layered_segmentation, sdn_boundary
from benchmark.layered_segmentation import WIDTHS, cases_of, main
from ppvision.quant.codes import FLOAT_BITS


def test_every_method_has_its_widths():
    widths = {}
    for case in cases_of(0):
        widths[case.method] = widths.get(case.method, ()) + case.bits
    assert widths == {
        "float": (FLOAT_BITS,),
        **dict.fromkeys(("ptq", "once", "dedicated"), WIDTHS),
        "cut": WIDTHS[1:],
    }


@pytest.mark.all
def test_every_method_once_and_nothing_twice(monkeypatch, scenes, tmp_path):
    monkeypatch.setitem(sdn_boundary.DATA, "dsb2018", (scenes.name, 11))
    monkeypatch.setitem(sdn_boundary.LOSS, "dsb2018", {})
    monkeypatch.setattr(sdn_boundary, "CROP", 56)
    results = tmp_path / "table.csv"
    paths = ("--data_root", scenes.parent, "--work_dir", tmp_path / "work", "--results", results)
    arguments = ["layered_segmentation", *paths, "--float_steps", 2, "--steps", 1]
    monkeypatch.setattr("sys.argv", [str(a) for a in arguments])
    main()
    with results.open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["method"], int(row["bits"])): row for row in rows}
    assert len(found) == len(rows) == 1 + 3 * len(WIDTHS) + len(WIDTHS[1:])
    assert all(0 <= float(row["mIoU"]) <= 1 for row in rows)
    # Cut to all of its bits a model would be itself; below that it is another.
    whole, cut = (float(found[k]["mIoU"]) for k in (("dedicated", 8), ("cut", 2)))
    assert whole != pytest.approx(cut, abs=1e-4)
    trained = [r for r in rows if r["method"] in ("dedicated", "once")]
    assert all(float(row["cpu_minutes"]) > 0 for row in trained)
    assert np.unique([r["cpu_minutes"] for r in trained if r["method"] == "once"]).size == 1

    monkeypatch.setattr(layered_segmentation, "run", lambda *_: pytest.fail("ran again"))
    main()
