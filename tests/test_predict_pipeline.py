"""The benchmark of `predict`, on a few small photographs."""

import csv

import numpy as np
import pytest

from benchmark import predict_pipeline as pipeline
from ppvision.data.writing import write_picture
from tests.helpers.messages import raises_naming

# What PaddleSeg's imports call.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*Non compatible API")


@pytest.mark.all
def test_a_row_for_each_case(tmp_path, monkeypatch):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    random = np.random.default_rng(0)
    for number in range(2):
        pixels = random.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        write_picture(photographs / f"{number}.png", pixels)
    name = "pale_nano SegFormer, whole"
    monkeypatch.setattr(pipeline, "CASES", {name: pipeline.CASES[name]})
    table = tmp_path / "pipeline.csv"
    options = ["--photographs", photographs, "--count", 5, "--at_a_time", 3, "--results", table]
    monkeypatch.setattr("sys.argv", ["", *map(str, options)])
    pipeline.main()
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert (row["case"], row["photographs"], row["pixels"]) == (name, "5", "96x64")
    assert float(row["images_per_second"]) > 0
    assert 0 < float(row["share_outside_of_the_model"]) < 1
    assert float(row["over_the_graph_alone"]) > 0


def test_no_photographs(tmp_path):
    with raises_naming(SystemExit, "--photographs:", "none"):
        pipeline.copy_photographs(tmp_path, tmp_path / "copies", 3, 2)


def test_photographs_go_round(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in "ab":
        (photographs / f"{name}.png").write_text(name, encoding="utf-8")
    folders = pipeline.copy_photographs(photographs, tmp_path / "copies", 5, 2)
    texts = [[p.read_text(encoding="utf-8") for p in sorted(f.iterdir())] for f in folders]
    assert texts == [["a", "b"], ["a", "b"], ["a"]]
