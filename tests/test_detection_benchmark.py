"""`benchmark/detection.py`: every case once on a few pictures, and its table."""

import csv
import shutil

import pytest

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from benchmark import detection
from tests.helpers.small_detectors import WARNINGS

pytestmark = WARNINGS

READ = "[{Decode: {}}, {Resize: {target_size: 96, keep_ratio: false}}, {Permute: {}}]"
SMALL = [
    *("TrainReader.batch_size=2", "num_classes=10", "epoch=1", "LearningRate.base_lr=0.0001"),
    *(f"{reader}.sample_transforms={READ}" for reader in ("TrainReader", "EvalReader")),
]


@pytest.mark.all
def test_every_case_once_and_nothing_twice(monkeypatch, scenes, tmp_path):
    for name in ("bccd", "digit_scenes"):
        shutil.copytree(scenes, tmp_path / name)
    results = tmp_path / "table.csv"
    paths = ("--data_root", tmp_path, "--work_dir", tmp_path / "work", "--results", results)
    cases = ("bccd", "bccd_ptq", "bccd_once", "scenes")
    arguments = ["detection", *paths, "--cases", *cases, "--opts", *SMALL]
    monkeypatch.setattr("sys.argv", [str(a) for a in arguments])
    detection.main()
    with results.open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["case"], row["bits"]) for row in rows]
    assert found == [
        ("bccd", "32"),
        *(("bccd_ptq", k) for k in "842"),
        *(("bccd_once", k) for k in "842"),
        ("scenes", "32"),
    ]
    assert all(0 <= float(row["bbox_AP50"]) <= 1 for row in rows)
    assert [bool(row["mask_AP"]) for row in rows] == [False] * 7 + [True]
    assert all(float(row["cpu_minutes"]) > 0 for row in rows if row["case"] != "bccd_ptq")
    monkeypatch.setattr(detection, "run", lambda *_: pytest.fail("ran again"))
    detection.main()
