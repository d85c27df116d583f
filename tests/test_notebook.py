"""`examples/quickstart.ipynb`: its cells run, one after another, in an empty folder."""

import json

import numpy as np
import pytest

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")

from tests.helpers.configs import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        assert cell["outputs"] == []  # it is stored as it was before it ran
        exec(compile("".join(cell["source"]), f"cell_{number}.py", "exec"), names)
    assert names["labels"].shape == (112, 112)
    assert len(np.unique(names["labels"])) > 1
    # Four steps at the rate of a warm-up change little.
    assert (names["exported"] == names["labels"]).mean() > 0.9
